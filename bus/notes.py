"""Signed notes (C2SP signed-note) and checkpoints in them (C2SP tlog-checkpoint)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Signer:
    """To be written."""

    vkey: str

    @classmethod
    def read(cls, text: str) -> Signer:
        """Of the key's text."""
        raise NotImplementedError

    def checkpoint(self, size: int, root: bytes) -> str:
        """The signed note."""
        raise NotImplementedError


def new_key(name: str) -> str:
    """A new key's text."""
    raise NotImplementedError
