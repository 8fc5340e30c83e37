"""The file that a working set is in: decoded where it is another than the last time, replaced whole."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from aos_context.artifacts import decode, encode, sha256
from aos_context.errors import BrokenError, SchemaError
from aos_context.files import replace, temporary_file
from aos_context.patches import check_ids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.artifacts import Document

HEAD_BYTES = 64
"""In which the file's `_update_seq` stands, as its keys are sorted."""


class Version(NamedTuple):
    """A working set, which nobody changes, and what it is called in a ledger."""

    working_set: Document
    sha256: str

    @property
    def update_seq(self) -> int:
        seq: int = self.working_set["_update_seq"]
        return seq


class _File(NamedTuple):
    """Which file it is, without all of its content. An inode may soon be another file's, in the same tick of the clock
    and of the same size, but not with the same `_update_seq`."""

    device: int
    inode: int
    mtime_ns: int
    size: int
    head: bytes


def encoded(working_set: Document) -> tuple[Version, bytes]:
    """With its file's content. Raises `SchemaError`."""
    text = encode("working_set", working_set)
    return Version(working_set, sha256(text)), text


class WorkingSetFile:
    """Read without a lock; replaced by who has the run's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[_File, Version] | None = None

    def read(self) -> Version | None:
        """None where there is no file. The same file is the same object. Raises `BrokenError`."""
        try:
            opened = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        with opened:
            file = _file(os.fstat(opened.fileno()), os.pread(opened.fileno(), HEAD_BYTES, 0))
            known = self._known
            if known is not None and known[0] == file:
                return known[1]
            text = opened.readall()
        working_set = decode("working_set", text, str(self.path))
        try:
            check_ids(working_set)
        except SchemaError as error:
            raise BrokenError(f"{self.path} is not what was written: {error}", file=str(self.path)) from None
        version = Version(working_set, sha256(text))
        self._known = file, version
        return version

    @contextlib.contextmanager
    def replacing(self, version: Version, text: bytes) -> Iterator[None]:
        """The content is on the disk when the block begins, and the file's when it ends. Raises `OSError`."""
        with temporary_file(self.path, text) as temporary:
            moment = time.time_ns()  # a kernel's own is that of its last tick, and runs are listed by it
            os.utime(temporary, ns=(moment, moment))
            file = _file(temporary.stat(), text)
            yield
            replace(temporary, self.path)
        self._known = file, version

    def sweep(self) -> None:
        """Remove what killed writers left: nobody else writes, as the caller has the run's lock."""
        for left in self.path.parent.glob(f".{self.path.name}.*"):
            left.unlink(missing_ok=True)


def _file(found: os.stat_result, text: bytes) -> _File:
    return _File(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, text[:HEAD_BYTES])
