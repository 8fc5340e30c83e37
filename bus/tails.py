"""The end of the ledger's file after a kill or a power loss: how far it is sound, and what is kept of the rest.

A write that was cut off leaves the beginning of a line, without its newline. A power loss may leave less of what was
not synced, and in any order: a file's size reaches the disk apart from its data (Linux,
Documentation/filesystems/ext4/journal.rst; for XFS the "NULL files" that Linux commit ba87ea699ebd tells of). What
never came there reads as NULs, with whole lines behind it. No line holds a NUL. And as a sync is of all that was
written before it, nobody was answered for what stands behind a block that was lost: all of it is cut off.

What was on the disk and is something else now, by a disk that fails or by somebody's hand, is not to be healed but
found. So bytes without a newline are taken for a torn line only where they are the beginning of one, and not a whole
one with more behind it, whose newline was changed. And NULs are taken for lost blocks only where

- they end with a sector or with the file, and begin with a sector or behind a newline, where the file ended at an
  earlier sync; and what stands before them in their line is the beginning of one;
- the lines behind them are whole, and not more than `UNSYNCED_BYTES`;
- these were written within `UNSYNCED_S` by what they say: no sync takes longer;
- no signed note of theirs lies beside the ledger: it is put there once its line is synced.

Else the log stays as it is, which is broken. With AAL_FSYNC=never more may be lost than that.

No bit that flips in a log which ends with a line has such a shape: it makes no more than one byte a NUL, and a sector
has 512; and a newline that it changes has a whole line before it. Of what was answered for is taken for a loss: the
last lines from one on of which whole sectors, or all to the end of the file, have become NULs; and a last line that has
lost its end to a file that became shorter. Who does that by hand does what he could do by cutting off the lines; what
was cut stays beside the log in full, a record says so, and who has a receipt or a checkpoint of these lines finds that
they are gone.
"""

from __future__ import annotations

import os
import re
from json import JSONDecoder
from typing import TYPE_CHECKING

from bus.checkpoints import TYPE
from bus.own_files import make_own
from bus.records import BrokenLineError, check
from bus.segments import FILE_MODE, end_of_lines, lines_backwards, names_in, sync_folder
from bus.unsynced import UNSYNCED_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus.model import Record

UNSYNCED_S = 60.0

_SECTOR = 512
"""Bytes that a disk writes as a whole, at least; a block of a file system is some of them."""

_CHUNK = 1 << 20
_NULS = re.compile(rb"\x00+")
_CONTROLS = re.compile(rb"[\x01-\x1f]")
_BEGINNING = b'{"'
_DECODER = JSONDecoder()


# --- How far it is sound ---


def sound_end(fd: int, size: int, known: int, is_synced: Callable[[Record], bool]) -> int:
    """The offset behind the last line that is to stay in a file of `size` bytes.

    The first `known` bytes, which end with a line, are not looked at: this process saw them on a machine that lives.
    `is_synced` says of a checkpoint's record whether its line was synced for certain. Raises `BrokenLineError` where
    bytes without a newline are not what a write that was cut off leaves.
    """
    end = end_of_lines(fd, size)
    if end < size and not _is_left(os.pread(fd, size - end, end), end):
        raise BrokenLineError("torn", "it has no newline, and is not what a write that was cut off leaves")
    if end < known:
        known = 0  # another file's bytes, or changed: the newline that they ended with is gone
    start = max(known, end - UNSYNCED_BYTES)
    if not _holds_nul(fd, start, end):
        return end
    lost = _Lost(is_synced)
    position = end
    for line in lines_backwards(fd, end):
        position -= len(line)
        if position < start and not lost.is_last:
            break
        if b"\x00" not in line:
            lost.behind(line)
        elif lost.may_be(line, position):
            end = position
        else:
            break
    return end


def _holds_nul(fd: int, start: int, end: int) -> bool:
    return any(b"\x00" in os.pread(fd, min(_CHUNK, end - at), at) for at in range(start, end, _CHUNK))


def _is_left(line: bytes, position: int) -> bool:
    """Whether bytes at `position`, behind a newline, are what is left of lines that a loss cut off or made holes in.

    They go on to the next newline or, without one, to the end of the file.
    """
    text = line.removesuffix(b"\n")
    if not _is_beginning(text.partition(b"\x00")[0]) or _CONTROLS.search(text):
        return False
    return all(
        (run.start() == 0 or (position + run.start()) % _SECTOR == 0)
        and (run.end() == len(line) or (position + run.end()) % _SECTOR == 0)
        for run in _NULS.finditer(text)
    )


def _is_beginning(text: bytes) -> bool:
    """Whether a line may begin so, be it whole; or the spaces by which a process tries whether it can write."""
    if not text.strip(b" "):
        return True
    if not text.startswith(_BEGINNING[: len(text)]):
        return False
    told = text.decode("utf-8", "replace")  # its last character may be cut in two
    try:
        _, end = _DECODER.raw_decode(told)
    except ValueError:
        return True
    except RecursionError:  # deeper than any line
        return False
    return end == len(told)


class _Lost:
    """What is known of the lines behind some NULs, the last first."""

    def __init__(self, is_synced: Callable[[Record], bool]) -> None:
        self._is_synced = is_synced
        self._are_unsynced = True
        self.is_last = True
        """Whether nothing stands behind them."""
        self._times_ms: list[float] = []

    def behind(self, line: bytes) -> None:
        """A line without NULs stands behind those that may come."""
        self.is_last = False
        try:
            record = check(line)
        except BrokenLineError:
            self._are_unsynced = False
            return
        took_ms = record.get("duration_ms") or 0
        if type(took_ms) not in {int, float} or (record["type"] == TYPE and self._is_synced(record)):
            self._are_unsynced = False
            return
        self._times_ms.append(record["timestamp_ms"] + took_ms)

    def may_be(self, line: bytes, position: int) -> bool:
        """Whether the NULs of a line at `position` are lost blocks."""
        if not self._are_unsynced or not _is_left(line, position):
            return False
        return self.is_last or max(self._times_ms) - min(self._times_ms) <= UNSYNCED_S * 1000


# --- What is cut off ---


def keep(path: Path, tail: bytes, seq: int, *, sync: bool) -> str:
    """Keep a tail of the log at `path` in a file beside it, whole or not at all; gives that file's name.

    `seq` is the number of the line that will say so. A file that a killed process has made of the same tail, and not
    yet cut off, is taken. Raises `OSError`.
    """
    for name, size in kept(path, seq):
        if size == len(tail) and path.with_name(name).read_bytes() == tail:
            break
    else:
        name = _write_kept(path, tail, seq, sync=sync)
    if sync:
        sync_folder(path.parent)
    return name


def kept(path: Path, seq: int) -> list[tuple[str, int]]:
    """The names and sizes of the files that a line `seq` is to name, in their order. Raises `OSError`."""
    pattern = re.compile(rf"{re.escape(path.name)}\.torn-{seq}(?:-([0-9]+))?")
    found = ((match, path.with_name(match[0])) for name in names_in(path.parent) if (match := pattern.fullmatch(name)))
    return [(file.name, file.stat().st_size) for match, file in sorted(found, key=lambda one: int(one[0][1] or 1))]


def _write_kept(path: Path, tail: bytes, seq: int, *, sync: bool) -> str:
    name = f"{path.name}.torn-{seq}"
    number = 1
    while os.path.lexists(path.with_name(name)):
        number += 1
        name = f"{path.name}.torn-{seq}-{number}"
    part = path.with_name(f"{path.name}.torn.part")
    try:
        with open(make_own(part, FILE_MODE), "wb") as file:  # noqa: PTH123  # a descriptor, not a path
            file.write(tail)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        part.rename(path.with_name(name))
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return name
