"""What was cut off the ledger, or is gone from it, and is not said in it yet: the next group begins with these records.

A tail is kept beside the log and named. Lines that somebody else took away are nowhere to be found: where a process
knew the last of them, the record has its number and hash, so that who has a receipt or another copy can tell which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bus.model import now_ms
from bus.records import draft, parse_or_none

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bus.model import Record
    from bus.records import Draft

TYPE = "recovered"
MARK = b'"type":"recovered"'
"""Stands in every such record's line, and may stand in others."""


class Last(NamedTuple):
    """The last line that a process has seen in the log: its number, and its hash as 64 hex digits."""

    seq: int
    hash: str


class Losses:
    """Those that are to be said. False where there are none."""

    def __init__(self) -> None:
        self._members: dict[str | None, dict[str, Any]] = {}
        """By the name of what is kept; one of what is not."""

    def __bool__(self) -> bool:
        return bool(self._members)

    def kept(self, name: str, size: int) -> None:
        """`size` bytes were cut off, and lie in the file `name` beside the log."""
        self._members.setdefault(name, _members(size, name))

    def gone(self, last: Last | None = None) -> None:
        """Lines are gone; `last` is the last of them, where that is known."""
        said = {} if last is None else {"lost_seq": last.seq, "lost_hash": last.hash}
        self._members[None] = {**_members(None, None), **said}

    def drafts(self) -> list[Draft]:
        """The records, of now: what a power loss takes is told by when its lines were written."""
        return [draft({**members, "timestamp_ms": now_ms()}) for members in self._members.values()]

    def said(self, lines: Iterable[bytes]) -> None:
        """Leave out what another, who found the same, has said meanwhile in these lines of the log."""
        for line in lines if self._members else ():
            record = parse_or_none(line) if MARK in line else None
            if record is not None and record["type"] == TYPE:
                self._leave_out(record)

    def _leave_out(self, record: Record) -> None:
        name = record.get("kept_as")
        ours = self._members.get(name) if name is None or isinstance(name, str) else None
        if ours is not None and (name is not None or _last_in(ours) == _last_in(record) != (None, None)):
            del self._members[name]

    def clear(self) -> None:
        """They stand in the log."""
        self._members.clear()


def _members(size: int | None, name: str | None) -> dict[str, Any]:
    return {"type": TYPE, "cut_bytes": size, "kept_as": name}


def _last_in(members: Record) -> tuple[Any, Any]:
    return members.get("lost_seq"), members.get("lost_hash")
