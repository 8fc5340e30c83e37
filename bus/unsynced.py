"""What could not be synced, told to whoever writes or signs next, be it another process.

The kernel tells of a failed write-back once to each descriptor that was open then. What it dropped can still be read,
and the next sync of a descriptor that is newer is called a success (fsync(2), EIO; Linux Documentation, errseq). So
who has failed to sync says from which byte on, in the file that all writers lock; and who comes with a new descriptor
writes that stretch once more, and syncs it, before anything behind it is answered for or signed.

Looking costs nothing: who has the lock knows how long its file is. Telling takes no lock, as the event loop must not
wait for one: each statement is appended by one write, and nothing is ever taken out. That a stretch has been written
again is a statement as well, and names the length up to which all others are settled. It is not synced: a power loss
takes what could be written again from memory, and this with it. Not promised: that a process which is killed between
its failed sync and the statement, some microseconds, is known by one that opens the log just then.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from bus.own_files import open_own

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

UNSYNCED_BYTES = 1 << 24
"""How much writers may have written before the first sync of it had ended: many groups of usual lines."""

_CHUNK = 1 << 20
_FAILED = re.compile(rb"^failed ([0-9]{1,20}) ([0-9]{1,20}) ([0-9]{1,20})$", re.MULTILINE)
_SETTLED = re.compile(rb"^settled ([0-9]{1,20})$", re.MULTILINE)


class Stretch(NamedTuple):
    """All of a file from the byte `start` on; `identity` is its device and inode."""

    identity: tuple[int, int]
    start: int


def tell(lock: int, stretch: Stretch) -> None:
    """A stretch could not be synced. `lock` is the locks' file, open to append. Raises `OSError`."""
    known, _ = told(lock)
    if not any(one.identity == stretch.identity and one.start <= stretch.start for one in known):
        os.write(lock, b"\nfailed %d %d %d\n" % (*stretch.identity, stretch.start))


def told(lock: int) -> tuple[list[Stretch], int]:
    """The stretches that are not settled, and how long the locks' file is. Raises `OSError`."""
    text = os.pread(lock, os.fstat(lock).st_size, 0)
    settled = max((int(match[1]) for match in _SETTLED.finditer(text)), default=0)
    found = (list(map(int, match.groups())) for match in _FAILED.finditer(text) if match.start() >= settled)
    return [Stretch((device, inode), start) for device, inode, start in found], len(text)


def settle(lock: int, length: int) -> None:
    """All that was told in the first `length` bytes has been written again. Raises `OSError`."""
    os.write(lock, b"\nsettled %d\n" % length)


def write_again(paths: Iterable[Path], stretches: Sequence[Stretch]) -> None:
    """Write and sync the stretches once more. With the lock. Raises `OSError`.

    `paths` are looked through until each file is found. One that is not among them any more was compressed, which
    reads all of it and syncs what it makes; or it is no part of the ledger.
    """
    starts: dict[tuple[int, int], int] = {}
    for one in stretches:
        starts[one.identity] = min(one.start, starts.get(one.identity, one.start))
    for path in paths if starts else ():
        try:
            fd = open_own(path, os.O_RDWR)  # one that appends would not write at a place
        except FileNotFoundError:
            continue
        try:
            status = os.fstat(fd)
            start = starts.pop((status.st_dev, status.st_ino), None)
            if start is not None:
                _rewrite(fd, start, status.st_size)
        finally:
            os.close(fd)
        if not starts:
            return


def _rewrite(fd: int, start: int, end: int) -> None:
    for at in range(start, end, _CHUNK):
        data = os.pread(fd, min(_CHUNK, end - at), at)
        view, offset = memoryview(data), at
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done
    os.fdatasync(fd)
