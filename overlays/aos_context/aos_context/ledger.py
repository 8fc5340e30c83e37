"""What happened to a run: a file of lines, each a JSON event with the line's number (JSONL). Lines are only appended.

A line counts once its newline is there. A crash may leave a torn tail: bytes after the last newline, or lines with
NULs, as a block is that never reached the disk (JSON has no NUL). Readers pass over it, and the next append cuts it
off; so no reader needs the lock. Which line an event is in is found by halves, and the last one from the end: nobody
reads all of a ledger for a part of it.

What was refused changes nothing, so its line waits for no disk. Each line that is synced takes those before it along,
so a power cut takes only what is behind the last one that was; but there a block can be missing before one that is
whole. The torn tail begins with the first such block, and is looked for back to what was certainly synced. Before
that, a NUL is damage, of which nothing is cut off.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from itertools import islice
from typing import IO, TYPE_CHECKING, NamedTuple

from aos_context.artifacts import decode, encode, now, sha256
from aos_context.config import SCHEMA_VERSION
from aos_context.errors import BrokenError, SchemaError
from aos_context.files import FILE_MODE, sync_folder, write_atomic
from aos_context.locks import locked

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from aos_context.artifacts import Document

BACK_BYTES = 1 << 16
"""How much is read at a time, from the end."""
UNSYNCED = frozenset({"WS_UPDATE_REJECTED"})
"""Types of events that are no change of state."""
UNSURE_MOST = 2
"""Synced lines at the end that may not have been: that of a sync that a power cut ended, and one before it whose writer
was killed in its own."""


class _Known(NamedTuple):
    """The last event, as long as the file is this one and of this size: device, inode, bytes.

    It is kept from an own append only: what is read may yet be taken back, where its writer cannot sync it.
    """

    file: tuple[int, int, int]
    seq: int
    run_id: str | None


class FileLedger:
    """The ledger in one file. Any number of them, in any number of processes and threads, may be of the same file."""

    def __init__(self, path: Path, *, run_id: str | None = None) -> None:
        self.path = path
        self.run_id = run_id
        self._lock = path.parent / ".lock"
        self._known: _Known | None = None

    def append(self, event: Document) -> Document:
        """The event as it is written, on the disk with all before it, unless its type is one of `UNSYNCED`.

        `_schema_version`, `event_id`, `run_id`, `timestamp`, `actor` and `data` are filled in where they are left out;
        the run is the ledger's own, else the one of its last event, else its folder's name. Raises `SchemaError` for an
        event that is not one, or that has a `seq`; `OSError`, and then the event is not in the ledger; `BrokenError`.
        """
        if "seq" in event:
            raise SchemaError("ledger_event", [{"path": "$.seq", "message": "the ledger numbers its events"}])
        with self.locked():
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            try:
                return self._append(fd, event)
            finally:
                os.close(fd)

    def locked(self) -> AbstractContextManager[None]:
        """The lock of the ledger, of all processes: no event is on its way meanwhile. Taken after the run's lock."""
        return locked(self._lock)

    def read(self, after: int = 0, limit: int | None = None) -> Iterator[Document]:
        """The events whose seq is greater, in order, as of now. Raises `BrokenError` that names the line."""
        with self._file() as file:
            end = whole_end(file.fileno())
            lines = _lines(file, self._place_after(file, end, after), end)
            for seq, line in enumerate(islice(lines, limit), after + 1):
                yield self._event(line, seq)

    def tail(self, limit: int) -> list[Document]:
        """The last events, at most so many, in order. Raises `BrokenError`."""
        events: list[Document] = []
        with self._file() as file:
            for _, line in _backwards(file.fileno(), whole_end(file.fileno())):
                if len(events) >= limit:
                    break
                events.append(self._event(line, events[-1]["seq"] - 1 if events else None))
        return events[::-1]

    def last_seq(self) -> int:
        """0 where nothing has happened. Raises `BrokenError`."""
        with contextlib.suppress(FileNotFoundError):
            known = self._known
            if known is not None and known.file == _identity(self.path.stat()):
                return known.seq
        with self._file() as file:
            return self._last(file.fileno())[0].seq

    def find_last(self, event_types: Collection[str]) -> Document | None:
        """The last event of one of these types, searched from the end. Raises `BrokenError`."""
        return next(self.read_back(event_types), None)

    def read_back(self, event_types: Collection[str], after: int = 0) -> Iterator[Document]:
        """The events of these types whose seq is greater, the last first. Raises `BrokenError`."""
        marks = _marks(event_types)
        with self._file() as file:
            known, end = self._last(file.fileno())
            seq = known.seq
            for _, line in _backwards(file.fileno(), end):
                if seq <= after:
                    return
                if any(mark in line for mark in marks):  # lines of other types need not be decoded
                    event = self._event(line, seq)
                    if event["event_type"] in event_types:
                        yield event
                seq -= 1

    def lines(self, after: int = 0) -> Iterator[bytes]:
        """The lines of the events whose seq is greater, as they stand in the file, as of now; all are on the disk.

        They are not parsed. Raises `BrokenError`, `OSError`.
        """
        with self._file() as file:
            with self.locked():  # an event on its way may be taken back
                end = whole_end(file.fileno())
                os.fdatasync(file.fileno())
            yield from _lines(file, self._place_after(file, end, after), end)

    def _append(self, fd: int, event: Document) -> Document:
        size = os.fstat(fd).st_size
        last, end = self._last(fd)
        if end < size:
            last, end = self._heal(fd, last, end, size)
        document = self._filled(event, last)
        line = encode("ledger_event", document) + b"\n"
        try:
            _write_at(fd, line, end)
            if document["event_type"] not in UNSYNCED:
                os.fdatasync(fd)
            if not end:
                sync_folder(self.path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the line may stand then, as if the crash had come after it
                os.ftruncate(fd, end)
            raise
        self._known = _Known(_identity(os.fstat(fd)), document["seq"], document["run_id"])
        return document

    def _heal(self, fd: int, last: _Known, end: int, size: int) -> tuple[_Known, int]:
        """Cut off the torn tail, which is kept beside, and say so in its place. The last event is then this one."""
        torn = os.pread(fd, size - end, end)
        kept = self.path.with_name(f"{self.path.name}.torn-{sha256(torn)[:16]}")
        write_atomic(kept, torn)
        data = {"cut_bytes": len(torn), "kept_as": kept.name}
        document = self._filled({"event_type": "LEDGER_HEALED", "data": data}, last)
        line = encode("ledger_event", document) + b"\n"
        # Written over the tail: after a crash in between there is a torn tail still, or this line.
        _write_at(fd, line, end)
        os.ftruncate(fd, end + len(line))
        os.fdatasync(fd)
        return _Known(_identity(os.fstat(fd)), document["seq"], document["run_id"]), end + len(line)

    def _filled(self, event: Document, last: _Known) -> Document:
        return {
            "_schema_version": SCHEMA_VERSION,
            "event_id": f"evt_{secrets.token_hex(12)}",
            "run_id": self.run_id or last.run_id or self.path.absolute().parent.parent.name,
            "timestamp": now(),
            "actor": None,
            "data": {},
            **event,
            "seq": last.seq + 1,
        }

    def _last(self, fd: int) -> tuple[_Known, int]:
        """The last event, and where its line ends."""
        file, known = _identity(os.fstat(fd)), self._known
        if known is not None and known.file == file:
            return known, file[2]
        end = whole_end(fd)
        for _, line in _backwards(fd, end):
            event = self._event(line)
            return _Known((*file[:2], end), event["seq"], event["run_id"]), end
        return _Known((*file[:2], 0), 0, None), 0

    def _place_after(self, file: IO[bytes], end: int, seq: int) -> int:
        """Where the first line begins whose event's seq is greater, by halves."""
        low, high = 0, end if seq > 0 else 0
        while low < high:
            start, _ = next(_backwards(file.fileno(), (low + high) // 2 + 1))
            file.seek(start)
            line = file.readline()
            if self._event(line)["seq"] <= seq:
                low = start + len(line)
            else:
                high = start
        return low

    def _event(self, line: bytes, seq: int | None = None) -> Document:
        where = str(self.path) if seq is None else f"{self.path}, line {seq}"
        event = decode("ledger_event", line, where)
        if seq is not None and event["seq"] != seq:
            raise BrokenError(f"{where} is event {event['seq']}", file=str(self.path))
        return event

    def _file(self) -> IO[bytes]:
        try:
            return self.path.open("rb")
        except FileNotFoundError:  # nothing has happened yet
            return open(os.devnull, "rb")  # noqa: PTH123


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines that count of a ledger's file, as they stand in it; none where it is not there. Nothing is parsed."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        yield from _lines(file, 0, whole_end(file.fileno()))


def _lines(file: IO[bytes], position: int, end: int) -> Iterator[bytes]:
    file.seek(position)
    while position < end:
        line = file.readline()
        position += len(line)
        yield line


def _marks(event_types: Collection[str]) -> list[bytes]:
    """What lines of these types have in them, and few others."""
    return [b'"event_type":"%s"' % event_type.encode() for event_type in event_types]


_UNSYNCED_MARKS = _marks(UNSYNCED)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_size


def whole_end(fd: int) -> int:
    """Where the torn tail of a ledger's file begins, which is its size where it has none."""
    end, synced = os.fstat(fd).st_size, 0
    for place, line in _backwards(fd, end):
        if not line.endswith(b"\n") or b"\0" in line:
            end = place
        elif not any(mark in line for mark in _UNSYNCED_MARKS):
            synced += 1
            if synced > UNSURE_MOST:
                break
    return end


def _backwards(fd: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines before `end`, the last first, each with the place where it begins; the last may be without its end."""
    start, data = end, b""
    while start or data:
        cut = data.rfind(b"\n", 0, max(len(data) - 1, 0)) + 1
        if not cut and start:
            step = min(start, max(BACK_BYTES, len(data)))  # a long line is read in steps that double
            start -= step
            data = os.pread(fd, step, start) + data
            continue
        yield start + cut, data[cut:]
        data = data[:cut]


def _write_at(fd: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, place)
        view, place = view[written:], place + written
