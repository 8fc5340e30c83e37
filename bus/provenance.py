"""Reading the ledger: one line, the last lines, all lines.

These functions take no part in writing and work while others write: a line without its newline is simply not yet one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from typing import TYPE_CHECKING, BinaryIO

from bus.errors import NotFoundError
from bus.records import check, hash_in, parse, parse_or_none

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from bus.model import Record

_BLOCK = 1 << 16
_LARGEST_BLOCK = 1 << 23


def read_line(path: Path, seq: int) -> Record:
    """Line `seq`. Raises `NotFoundError` where there is none, `BrokenLineError` where it is not what was written."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        line = _seek_line(file, seq) if seq > 0 else b""
        if line.endswith(b"\n"):
            return check(line, seq)
    raise NotFoundError(
        "ERR_NOT_FOUND", f"the ledger has no line {seq}", hint="aal provenance tail shows the last lines."
    )


def first_line(path: Path) -> bytes:
    """Line 1 as it stands in the file, without its newline where its write was cut off; `b""` where there is none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return file.readline()
    return b""


def iter_lines(path: Path, start: int = 1) -> Iterator[Record]:
    """The records from line `start` on that are whole now. Raises `BrokenLineError` at a line that is no record."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        line = _seek_line(file, start)
        while line.endswith(b"\n"):
            yield parse(line)
            line = file.readline()


def iter_hashes(path: Path) -> Iterator[bytes]:
    """The 32 bytes of the hash that each whole line holds, from line 1 on. Raises `BrokenLineError` at one without."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        yield from (hash_in(line) for line in _lines_until(file, _size_at_rest(path, file)) if line.endswith(b"\n"))


def raw_lines(path: Path, start: int = 1) -> Iterator[bytes]:
    """The lines from `start` on as they stand, the last perhaps without its newline; none where there is no ledger.

    As of a moment in which nobody writes.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        size = _size_at_rest(path, file)
        line = _seek_line(file, start)
        if line:
            yield line
            yield from _lines_until(file, size - file.tell())


def exists(path: Path) -> bool:
    """Whether there is a ledger."""
    return path.exists()


def tail(
    path: Path,
    limit: int,
    *,
    overlay: str | None = None,
    ok: bool | None = None,
    since_ms: int | None = None,
    types: Collection[str] | None = None,
    shown: Callable[[Record], bool] = lambda _: True,
    most_bytes: int = sys.maxsize,
) -> list[Record]:
    """The last `limit` records that fit and may be shown, oldest first. What is no record `verify` names.

    No further line is read after `most_bytes`.
    """
    found: list[Record] = []
    if limit > 0:
        for line in backwards(path, most_bytes):
            record = parse_or_none(line)
            if record is not None and _fits(record, overlay, ok, since_ms, types) and shown(record):
                found.append(record)
                if len(found) == limit:
                    break
    return found[::-1]


def backwards(path: Path, most_bytes: int = sys.maxsize) -> Iterator[bytes]:
    """The lines that are whole now, the last first. No further one is read after `most_bytes`."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in lines_backwards(file.fileno(), end_of_lines(file.fileno(), _size(file))):
            yield line
            most_bytes -= len(line)
            if most_bytes <= 0:
                return


def _fits(
    record: Record, overlay: str | None, ok: bool | None, since_ms: int | None, types: Collection[str] | None
) -> bool:
    return (
        (overlay is None or record.get("overlay") == overlay)
        and (ok is None or record.get("ok") is ok)
        and (since_ms is None or record["timestamp_ms"] >= since_ms)
        and (types is None or record["type"] in types)
    )


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _size_at_rest(path: Path, file: BinaryIO) -> int:
    """The file's size while nobody writes; a reader that may not open the lock takes it as it is."""
    try:
        lock = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return _size(file)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return _size(file)
    finally:
        os.close(lock)


def _lines_until(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The lines of the file's first `size` bytes; the last may lack its newline."""
    while size > 0 and (line := file.readline(size)):
        size -= len(line)
        yield line


def _seek_line(file: BinaryIO, seq: int) -> bytes:
    """Line `seq`, counted in newlines from the start, with the file left behind it; `b""` where there is none."""
    missing, position = seq - 1, 0
    while missing > 0:
        block = file.read(_LARGEST_BLOCK)
        if not block:
            return b""
        count = block.count(b"\n")
        if count >= missing:
            position += _nth_newline(block, missing) + 1
            break
        missing -= count
        position += len(block)
    file.seek(position)
    return file.readline()


def _nth_newline(block: bytes, n: int) -> int:
    index = -1
    for _ in range(n):
        index = block.index(b"\n", index + 1)
    return index


def _blocks_backwards(fd: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The bytes before `end` in blocks, the last first, each with its offset. They grow, for the sake of long lines."""
    length = _BLOCK
    while end > 0:
        start = max(0, end - length)
        yield start, os.pread(fd, end - start, start)
        end = start
        length = min(2 * length, _LARGEST_BLOCK)


def end_of_lines(fd: int, size: int) -> int:
    """The offset behind the last newline before `size`; 0 where there is none."""
    for start, block in _blocks_backwards(fd, size):
        index = block.rfind(b"\n")
        if index >= 0:
            return start + index + 1
    return 0


def lines_backwards(fd: int, end: int) -> Iterator[bytes]:
    """The lines before `end`, which is behind a newline, the last first, each with its newline."""
    later: list[bytes] = []  # the pieces of a line whose start is not read yet, the last first
    for _, block in _blocks_backwards(fd, end):
        stop = len(block)
        while True:
            index = block.rfind(b"\n", 0, stop if later else stop - 1)
            later.append(block[index + 1 : stop])
            if index < 0:
                break
            yield b"".join(reversed(later))
            later.clear()
            stop = index + 1
    if later:
        yield b"".join(reversed(later))


def lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")
