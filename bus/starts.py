"""Calls that may change something: a line says that one starts, and one says so where its end was never written.

Such a call is started only once its `started` line is in the ledger. A line without its call's end may be of a call
that still runs: several processes share one ledger, and perhaps in containers where each has a numbering of processes
of its own. So a process that has such calls holds the lock of a file of its own beside the ledger, and names that file
in these lines. The kernel lets go of the lock at the end of the process, however that came. A file whose lock is free
is of a process that is no more: the next bus that starts closes what stands open in its name, and removes it.

The file holds the number of lines that the ledger had before the first call that may be open, so that nobody has to
search further back. It is on the disk before the first of these lines is, and moves up as the oldest of the open calls
end.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
from typing import TYPE_CHECKING, Any

from bus import provenance
from bus.chain import write_all
from bus.ledger import LedgerError
from bus.model import Phase, now_ms
from bus.own_files import make_own, open_folder, open_own
from bus.records import CALL_TYPES, BrokenLineError, parse_or_none
from bus.segments import FILE_MODE, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bus.ledger import Ledger
    from bus.model import Record

STARTED = "started"
INTERRUPTED = "interrupted"
FOLDER = "started"
PHASES = frozenset({Phase.ASCEND, Phase.SEAL})
"""The calls of these are written down before they start."""

TOLD_LINES = 100_000
"""A search through so many lines takes a while, and is told before."""

_REPEATED = ("request_id", "run_id", "caller", "overlay", "capability", "phase", "replay_of")
"""What an `interrupted` line repeats of its `started` line."""

_log = logging.getLogger(__name__)


class Starts:
    """The calls of this process that have started and are to be ended by a line; and those that others left open."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._folder = ledger.path.parent / FOLDER
        self._writer = secrets.token_hex(8)
        self._marking = asyncio.Lock()
        self._marker: _Marker | None = None
        self._open: dict[str, int] = {}
        """Of each open call, by its request id, no more lines than the ledger had before its started line."""
        self._lines_before = 0

    async def begin(self, record: Record) -> None:
        """Have it written that a call starts. Does nothing for one that has started and runs again.

        `record` has the members of a started line in `schemas/record.schema.json`, but for those of the writer. Raises
        `LedgerError` where it cannot be written; then the call is not to start.
        """
        request_id = record["request_id"]
        if request_id in self._open:
            return
        async with self._marking:
            await self._mark()
            self._open[request_id] = self._ledger.size
        # A line that could not be synced may stand all the same: so the call is open until one says what came of it.
        receipt = await self._ledger.submit(
            {"type": STARTED, "timestamp_ms": now_ms(), "writer": self._writer, **record}
        )
        if request_id in self._open:
            self._open[request_id] = receipt.seq - 1
        if receipt.seq <= self._lines_before:  # the log was moved away meanwhile
            self._note(receipt.seq - 1)

    def end(self, request_id: str) -> None:
        """The line of what came of the call stands; of one that was not begun, too."""
        if self._open.pop(request_id, None) is None or not self._open:
            return
        oldest = min(self._open.values())
        if oldest > self._lines_before:
            try:
                self._note(oldest)
            except OSError as error:  # then more is searched than would have to be
                _log.warning("the folder %s cannot be written: %s", self._folder, error)

    async def close_left(self) -> None:
        """Write an `interrupted` line for each call left open by a process that is no more.

        Where that cannot be done now, the next start does it.
        """
        try:
            for name, marker, lines_before in _left(self._folder):
                with contextlib.closing(marker):
                    await self._close_one(name, marker, lines_before)
        except OSError as error:
            _log.warning("calls that were cut off cannot be looked for in %s: %s", self._folder, error)

    def close(self) -> None:
        """Let go of the file. It stays where a call is open still: the next start closes that."""
        if self._marker is not None:
            if not self._open:
                with contextlib.suppress(OSError):  # the next start removes it
                    self._marker.remove()
            self._marker.close()
            self._marker = None

    def _note(self, lines_before: int) -> None:
        """Have the file say another number. Raises `OSError`."""
        self._lines_before = lines_before
        if self._marker is not None:
            self._marker.write(lines_before)

    async def _mark(self) -> None:
        """Have the file say from which line on to search. Raises `LedgerError`."""
        try:
            if not self._open:
                self._lines_before = self._ledger.size
            if self._marker is None or not self._marker.is_in_place():
                if self._marker is not None:
                    self._marker.close()
                    self._marker = None
                written = self._lines_before
                self._marker = await asyncio.to_thread(_make, self._folder / self._writer, written)
                if written != self._lines_before:  # it moved while nobody could write it
                    self._marker.write(self._lines_before)
            elif not self._open:
                self._marker.write(self._lines_before)
        except OSError as error:
            raise LedgerError(f"the folder {self._folder} beside the ledger cannot be written: {error}") from None

    async def _close_one(self, writer: str, marker: _Marker, lines_before: int) -> None:
        """Close what a writer left open, and remove its file. What goes wrong is told and keeps no other from it."""
        try:
            await self._interrupt(writer, lines_before)
            marker.remove()
        # ValueError: a line that somebody else wrote may say anything
        except (OSError, ValueError, LedgerError, BrokenLineError) as error:
            _log.warning("calls that were cut off are not marked in the ledger %s: %s", self._ledger.path, error)

    async def _interrupt(self, writer: str, lines_before: int) -> None:
        """Close what stands open in the name of a writer. Raises `OSError`, `LedgerError`, `BrokenLineError`."""
        started = await asyncio.to_thread(_still_open, self._ledger.path, writer, lines_before)
        closing = [self._ledger.submit(_interrupted(line)) for line in started]
        for failed in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(failed, BaseException):
                raise failed


class _Marker:
    """A file whose lock its process holds, and its folder, both open."""

    def __init__(self, path: Path, folder: int, fd: int) -> None:
        self._path = path
        self._folder = folder
        self._fd = fd

    def is_free(self) -> bool:
        """Whether no other held its lock, which is held now. Raises `OSError`."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_in_place(self) -> bool:
        """Whether its name is still this file's."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))  # noqa: PTH116  # for each such call
        except FileNotFoundError:
            return False

    def write(self, lines_before: int) -> None:
        """Not synced: after a power loss an earlier number stands there, and more is searched."""
        os.pwrite(self._fd, b"%020d\n" % lines_before, 0)

    def read(self) -> int | None:
        """None where its process had come to write no number, and so no line either."""
        text = os.pread(self._fd, 21, 0)
        return int(text) if len(text) == 21 and text.strip().isdigit() else None  # noqa: PLR2004

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path.name, dir_fd=self._folder)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._folder)


def _make(path: Path, lines_before: int) -> _Marker:
    """A locked file on the disk, that bears its name only once it is locked and written. Raises OSError."""
    temporary = f".{path.name}"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            folder = open_folder(path.parent)
            stack.callback(os.close, folder)
            with contextlib.suppress(FileNotFoundError):  # somebody cleaned up before it was locked
                fd = make_own(temporary, FILE_MODE, folder=folder)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
                write_all(fd, b"%020d\n" % lines_before)
                os.fsync(fd)
                os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
                sync_folder(path.parent.parent)
                stack.pop_all()
                return _Marker(path, folder, fd)


def _left(folder: Path) -> Iterator[tuple[str, _Marker, int]]:
    """Of each process that is no more and has left a file: its name, the file, now locked, and the number in it.

    What cannot be opened or read is told and passed over. Raises `OSError` where the folder cannot be listed.
    """
    try:
        opened = open_folder(folder)
    except FileNotFoundError:
        return
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, opened)
        for name in sorted(os.listdir(opened)):  # noqa: PTH208  # of a descriptor
            try:
                found = _abandoned(folder / name, opened)
            except OSError as error:
                _log.warning(
                    "%s, which tells of calls that may have been cut off, is passed over: %s", folder / name, error
                )
                continue
            if found is not None:
                yield name, *found


def _abandoned(path: Path, folder: int) -> tuple[_Marker, int] | None:
    """The file, now locked, and the number in it; None where its process lives, or another is at it, or it is gone.

    Its name is looked up in the open `folder`. What was left without a number is removed at once. Raises `OSError`.
    """
    try:
        fd = open_own(path.name, os.O_RDWR, folder=folder)
    except FileNotFoundError:
        return None
    marker = _Marker(path, os.dup(folder), fd)
    with contextlib.ExitStack() as stack:
        stack.callback(marker.close)
        if not marker.is_free():
            return None
        lines_before = marker.read()
        if not marker.is_in_place():
            return None
        if path.name.startswith(".") or lines_before is None:
            marker.remove()
            return None
        stack.pop_all()
        return marker, lines_before


def _still_open(path: Path, writer: str, lines_before: int) -> list[Record]:
    """The started lines of a writer that no line has ended, oldest first.

    Reads all that comes behind `lines_before`, be it much: from there on, so that only what is open is held meanwhile.
    Raises `OSError`, `BrokenLineError`.
    """
    size = next((record["seq"] for line in provenance.backwards(path) if (record := parse_or_none(line))), 0)
    if size <= lines_before:  # another log bears the name now
        lines_before = 0
    if size - lines_before >= TOLD_LINES:
        _log.info("%d lines of %s are searched for calls that were cut off", size - lines_before, path)
    found: dict[int, Record] = {}
    named = f'"writer":"{writer}"'.encode()
    for line in provenance.raw_lines(path, lines_before + 1):
        if (not found and named not in line) or (record := parse_or_none(line)) is None:
            continue
        if (record["type"], record.get("writer")) == (STARTED, writer):
            found[record["seq"]] = record
        elif record["type"] == INTERRUPTED:
            found.pop(record["started"], None)
        elif record["type"] in CALL_TYPES:
            found = {seq: one for seq, one in found.items() if one["request_id"] != record["request_id"]}
    return list(found.values())


def _interrupted(started: Record) -> dict[str, Any]:
    return {
        "type": INTERRUPTED,
        "timestamp_ms": now_ms(),
        "started": started["seq"],
        **{name: started.get(name) for name in _REPEATED},
    }
