"""The files of a ledger: one that is written, and closed ones before it, of which the older are compressed.

`provenance.jsonl` is the open segment. A closed one is `provenance-<first seq>.jsonl`, and compressed the same with
`.gz`; while it has both forms the plain one counts. Readers take no part in that: they list the files at one moment,
and a closed segment that is gone by the time that it is opened is there in its other form.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import itertools
import logging
import os
import re
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Protocol, Self

from bus import unsynced
from bus.errors import OperatorError
from bus.members import MEMBER_BYTES, members, pack, unpack
from bus.own_files import make_own, open_own
from bus.records import BrokenLineError, check
from bus.unsynced import UNSYNCED_BYTES, Stretch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from bus.members import Member

FILE_MODE = 0o640
PACKED = ".gz"

_DIGITS = 12
_BLOCK = 1 << 16
_LARGEST_BLOCK = 1 << 23
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


# --- Names ---


def lock_path(path: Path) -> Path:
    """What all writers lock."""
    return path.with_suffix(".lock")


def closed_path(path: Path, first: int) -> Path:
    """The plain form of the closed segment that begins with line `first`."""
    return path.with_name(f"{path.stem}-{first:0{_DIGITS}}{path.suffix}")


def packed_path(path: Path, first: int) -> Path:
    """Its compressed form."""
    return path.with_name(closed_path(path, first).name + PACKED)


def _next_path(path: Path) -> Path:
    """What becomes the open segment at the end of a rotation."""
    return path.with_name(path.name + ".next")


def _closed(path: Path) -> dict[int, set[str]]:
    """The closed segments by their first lines, each with the forms that it has: "" and ".gz".

    A listing may miss the one form since it is new and the other since it is gone. It is new to one listing only.
    """
    found = _list_closed(path)
    while (again := _list_closed(path)) != found:
        found = again
    return found


def _list_closed(path: Path) -> dict[int, set[str]]:
    pattern = re.compile(rf"{re.escape(path.stem)}-([0-9]{{{_DIGITS},}}){re.escape(path.suffix)}({PACKED})?")
    found: dict[int, set[str]] = {}
    for name in names_in(path.parent):
        if match := pattern.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(match[2] or "")
    return found


def names_in(folder: Path) -> list[str]:
    """Of all files in it; none where it is not there. Begun again where a signal interrupts it, as Python does not."""
    while True:
        try:
            return os.listdir(folder)  # noqa: PTH208  # names alone
        except InterruptedError:
            continue
        except FileNotFoundError:
            return []


def closed_firsts(path: Path) -> list[int]:
    """The numbers of the first lines of the closed segments, in order."""
    return sorted(_closed(path))


def total_bytes(path: Path) -> int:
    """What all segments take on the disk."""
    paths = [
        path.with_name(closed_path(path, first).name + form) for first, forms in _closed(path).items() for form in forms
    ]
    return sum(_size_of(one) for one in (path, *paths))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# --- Reading one segment ---


class Content(Protocol):
    """The lines of one segment."""

    def chunks(self, skip: int = 0) -> Iterator[bytes]:
        """Whole lines, many at once, but for the first `skip`; the last of an open segment may be torn."""

    def chunks_from(self, offset: int, most: int = ...) -> Iterator[bytes]:
        """The same from the byte `offset` of its lines on, some `most` bytes at once."""

    def backwards(self) -> Iterator[bytes]:
        """The whole lines, the last first, each with its newline."""

    def count(self) -> int:
        """How many whole lines there are."""

    def close(self) -> None: ...


class Plain:
    """Of a file as it is, as far as its first `size` bytes."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    def chunks(self, skip: int = 0) -> Iterator[bytes]:
        offset = self._offset_behind(skip)
        return iter(()) if offset is None else self.chunks_from(offset)

    def chunks_from(self, offset: int, most: int = _CHUNK) -> Iterator[bytes]:
        rest: list[bytes] = []
        while offset < self.size and (block := os.pread(self.fd, min(most, self.size - offset), offset)):
            offset += len(block)
            end = block.rfind(b"\n") + 1
            if not end:
                rest.append(block)
                continue
            yield b"".join((*rest, block[:end]))
            rest = [block[end:]] if end < len(block) else []
        if rest:
            yield b"".join(rest)

    def _offset_behind(self, count: int) -> int | None:
        """Where line `count` ends; None where there are not so many."""
        offset = 0
        while count > 0:
            block = os.pread(self.fd, min(_LARGEST_BLOCK, self.size - offset), offset)
            if not block:
                return None
            found = block.count(b"\n")
            if found >= count:
                return offset + end_of_line(block, count)
            count -= found
            offset += len(block)
        return offset

    def backwards(self) -> Iterator[bytes]:
        return lines_backwards(self.fd, end_of_lines(self.fd, self.size))

    def count(self) -> int:
        return count_lines(self.fd, self.size)

    def close(self) -> None:
        os.close(self.fd)


class Packed:
    """Of a compressed file."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    @cached_property
    def members(self) -> list[Member]:
        """Raises `BrokenLineError`, as all that reads does."""
        return members(self._fd)

    def unpack(self, member: Member) -> bytes:
        """The lines of one member."""
        return unpack(self._fd, member)

    def chunks(self, skip: int = 0) -> Iterator[bytes]:
        for member in self.members:
            if 0 <= member.lines <= skip:
                skip -= member.lines
                continue
            lines = self.unpack(member)
            count = lines.count(b"\n") if skip else 0
            if skip:
                lines = lines[end_of_line(lines, min(skip, count)) :]
            skip = max(0, skip - count)
            if lines:
                yield lines

    def chunks_from(self, offset: int, most: int = _CHUNK) -> Iterator[bytes]:  # by the member
        for member in self.members:
            if 0 <= member.length <= offset:
                offset -= member.length
                continue
            lines = self.unpack(member)
            if offset < len(lines):
                yield lines[offset:]
            offset = max(0, offset - len(lines))

    def backwards(self) -> Iterator[bytes]:
        for member in reversed(self.members):
            yield from reversed(BytesIO(self.unpack(member)).readlines())

    def count(self) -> int:
        return sum(one.lines if one.lines >= 0 else self.unpack(one).count(b"\n") for one in self.members)

    def close(self) -> None:
        os.close(self._fd)


def _open_closed(path: Path, first: int) -> Content:
    """Raises `BrokenLineError` where it is not there in any form."""
    plain, packed = closed_path(path, first), packed_path(path, first)
    with contextlib.suppress(FileNotFoundError):
        return _open_plain(plain)
    with contextlib.suppress(FileNotFoundError):
        return Packed(open_own(packed, os.O_RDONLY), packed.name)
    raise BrokenLineError("seq", f"its segment {plain.name} was removed while it was read")


def _open_plain(path: Path) -> Plain:
    fd = open_own(path, os.O_RDONLY)
    return Plain(fd, os.fstat(fd).st_size)


# --- Reading all ---


class Segments:
    """All segments of a ledger as they are at one moment. A context manager; not for several threads.

    With `at_rest` that is a moment in which no writer holds the lock, where that may be opened. A group of lines is
    written under the lock and synced without it, so the last lines may not be on the disk yet, and a power loss can
    take them; a torn tail that a dead writer left is there until the next one cuts it off.
    """

    def __init__(self, path: Path, *, at_rest: bool = False, to_sign: bool = False) -> None:
        """Where they are `to_sign`, that moment lasts until they are synced: no writer can take back what is signed.

        Raises `OperatorError` where they cannot be synced; `OSError` where they cannot be listed or opened.
        """
        self.path = path
        with _nobody_writing(path) if at_rest or to_sign else contextlib.nullcontext() as lock:
            self.closed, self.open = _listed(path)
            if to_sign:
                self._make_last(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.open is not None:
            self.open.close()

    def _make_last(self, lock: int | None) -> None:
        """Sync the open segment, with which its writer may not have done so yet; the closed ones are.

        What another could not sync is written once more.
        """
        if self.open is None:
            return
        try:
            if lock is not None and unsynced.told(lock)[0]:
                with _lock_to_tell(self.path) as telling:
                    settle(self.path, telling)
            self._sync(self.open)
        except OSError as error:
            self.open.close()
            raise OperatorError(
                "ERR_LEDGER", f"the ledger {self.path} cannot be synced, so nothing is signed: {error}"
            ) from None

    def _sync(self, content: Plain) -> None:
        try:
            os.fdatasync(content.fd)
        except OSError:
            start = max(0, content.size - UNSYNCED_BYTES)
            with contextlib.suppress(OSError), _lock_to_tell(self.path) as telling:
                unsynced.tell(telling, Stretch(identity(os.fstat(content.fd)), start))
            raise

    @property
    def are_there(self) -> bool:
        return self.open is not None or bool(self.closed)

    @cached_property
    def firsts(self) -> list[int]:
        """The number of the first line of each segment: of the closed ones, by their names, and of the open one."""
        return self.closed if self.open is None else [*self.closed, self._first_of_open(self.open)]

    def _first_of_open(self, content: Plain) -> int:
        """As its first line says, or where that says nothing, by the lines before it."""
        line = next(lines_of(content.chunks_from(0, _BLOCK)), b"")
        with contextlib.suppress(BrokenLineError):
            record = check(line)
            if self.closed or record["type"] == "checkpoint":  # a new segment begins with one
                return int(record["seq"])
        if not self.closed:
            return 1
        with self.content(len(self.closed) - 1) as last:
            return self.closed[-1] + last.count()

    @contextlib.contextmanager
    def content(self, number: int) -> Iterator[Content]:
        """Of the segment `number`, from 0 on; the last is the open one, where that is there."""
        if number < len(self.closed):
            content = _open_closed(self.path, self.closed[number])
            with contextlib.closing(content):
                yield content
        elif self.open is not None:
            yield self.open

    @property
    def count(self) -> int:
        """How many segments there are."""
        return len(self.closed) + (self.open is not None)

    def number_of(self, seq: int) -> int:
        """Which segment line `seq` is in, if it is in any; the first for a line before all."""
        firsts = self.closed if self.closed and seq < self.closed[-1] else self.firsts
        return max(0, bisect.bisect_right(firsts, seq) - 1)

    def chunks(self, start: int = 1) -> Iterator[bytes]:
        """Whole lines from line `start` on, many at once; the last may be torn."""
        number = self.number_of(start) if start > 1 else 0
        while number < self.count:
            skip = max(0, start - self.firsts[number]) if start > 1 else 0
            with self.content(number) as content:
                yield from content.chunks(skip)
            number, start = number + 1, 1

    def lines(self, start: int = 1) -> Iterator[bytes]:
        """Each line from line `start` on, with its newline; the last may be torn. Raises `BrokenLineError`."""
        return lines_of(self.chunks(start))

    def backwards(self) -> Iterator[bytes]:
        """The whole lines, the last first. Raises `BrokenLineError`."""
        for number in reversed(range(self.count)):
            with self.content(number) as content:
                yield from content.backwards()


def closed_backwards(path: Path) -> Iterator[bytes]:
    """The lines of the closed segments, the last first. Raises `BrokenLineError`."""
    for first in reversed(closed_firsts(path)):
        with contextlib.closing(_open_closed(path, first)) as content:
            yield from content.backwards()


def lines_of(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Each line of them, with its newline; no chunk but the last ends within a line."""
    for chunk in chunks:
        yield from BytesIO(chunk)


def _listed(path: Path) -> tuple[list[int], Plain | None]:
    """The closed segments, and the open one: neither twice nor left out, while others rotate."""
    while True:
        try:
            fd = open_own(path, os.O_RDONLY)
        except FileNotFoundError:
            fd = -1
        try:
            status = os.fstat(fd) if fd >= 0 else None
            closed = closed_firsts(path)
            if identity_at(path) == (status and identity(status)):  # it had this name all the while
                found = None if status is None else Plain(fd, status.st_size)
                fd = -1
                return closed, found
        finally:
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def _nobody_writing(path: Path) -> Iterator[int | None]:
    """Hold off the writers, by their lock; a reader that may not open that does without, and has None.

    What they have written may be without its sync yet, which they do without the lock.
    """
    try:
        lock = open_own(lock_path(path), os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield lock
    finally:
        os.close(lock)


@contextlib.contextmanager
def _lock_to_tell(path: Path) -> Iterator[int]:
    """The locks' file, to append to. Raises `OSError`."""
    lock = open_own(lock_path(path), os.O_RDWR | os.O_APPEND)
    try:
        yield lock
    finally:
        os.close(lock)


def settle(path: Path, lock: int, own: Sequence[Stretch] = ()) -> int:
    """With the lock, write once more what could not be synced, as is told in its file; and what is `own`, and not told.

    Gives the length of that file up to which all is settled. Raises `OSError`.
    """
    stretches, length = unsynced.told(lock)
    files = itertools.chain((path,), (closed_path(path, first) for first in reversed(closed_firsts(path))))
    unsynced.write_again(files, [*stretches, *own])
    if stretches:
        with contextlib.suppress(OSError):  # then the next does it again
            unsynced.settle(lock, length)
    return length


# --- Bytes and lines ---


def end_of_line(block: bytes, n: int) -> int:
    """The offset behind the newline number `n`, from 1 on; 0 for 0."""
    index = -1
    for _ in range(n):
        index = block.index(b"\n", index + 1)
    return index + 1


def count_lines(fd: int, size: int) -> int:
    """The newlines in a file's first `size` bytes."""
    return sum(os.pread(fd, min(_CHUNK, size - start), start).count(b"\n") for start in range(0, size, _CHUNK))


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


def identity(status: os.stat_result) -> tuple[int, int]:
    """Which file it is, whatever its name."""
    return status.st_dev, status.st_ino


def identity_at(path: Path) -> tuple[int, int] | None:
    """Of the file of this name; None where there is none."""
    try:
        return identity(os.stat(path))  # noqa: PTH116  # for every group
    except FileNotFoundError:
        return None


def taken(lock: int, how: int) -> bool:
    """Whether a lock could be had as `flock` is told to have it."""
    try:
        fcntl.flock(lock, how)
    except OSError:
        return False
    return True


def make_folder(folder: Path, *, sync: bool) -> None:
    """Make a folder, and those above it that are not there; to `sync` is to make their names last. Raises `OSError`."""
    missing = list(itertools.takewhile(lambda one: not one.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing if sync else ():
        sync_folder(one.parent)


def sync_folder(folder: Path) -> None:
    """Make names last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- Rotation. Under the lock of all writers. ---


def rotate(path: Path, fd: int, seq: int) -> None:
    """Close the open segment, whose file is `fd` and whose last line is `seq`; an empty one takes its place.

    Killed anywhere in between, all lines are in one segment each, and `finish_rotation` does the rest. Raises
    `OSError`; then the caller looks anew what is there.
    """
    first = seq - count_lines(fd, os.fstat(fd).st_size) + 1
    closed, following = closed_path(path, first), _next_path(path)
    for taken in (closed, packed_path(path, first)):
        if os.path.lexists(taken):
            raise FileExistsError(errno.EEXIST, "another segment has the name that this one is to be closed by", taken)
    os.fsync(fd)
    os.close(make_own(following, FILE_MODE))
    os.rename(path, closed)  # noqa: PTH104  # as the lines around it
    os.rename(following, path)  # noqa: PTH104
    sync_folder(path.parent)


def finish_rotation(path: Path) -> bool:
    """End what was begun, if a rotation was. Says whether the open segment was lost in another way."""
    following = _next_path(path)
    if path.exists():
        following.unlink(missing_ok=True)
        return False
    if following.exists():
        os.rename(following, path)  # noqa: PTH104
        sync_folder(path.parent)
        return False
    return bool(closed_firsts(path))


# --- Compression. Not under that lock: nobody writes a closed segment. ---


def compress(path: Path, is_over: Callable[[], bool] = lambda: False) -> int:
    """Compress the closed segments, the oldest first, until `is_over`; gives how many it did.

    Does nothing while another process does. Killed anywhere, each segment is whole in one form at least, and the next
    run begins it again. Raises `OSError`; then too.
    """
    if all("" not in forms for forms in _closed(path).values()):
        return 0
    lock = open_own(path.with_suffix(".compressing"), os.O_RDWR | os.O_CREAT, FILE_MODE)
    try:
        if not taken(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return 0
        plain = [first for first, forms in sorted(_closed(path).items()) if "" in forms]
        return sum(_compress_one(path, first, is_over) for first in plain if not is_over())
    finally:
        os.close(lock)


def _compress_one(path: Path, first: int, is_over: Callable[[], bool]) -> bool:
    """Says whether it came to its end."""
    plain, packed = closed_path(path, first), packed_path(path, first)
    temporary = packed.with_name(packed.name + ".part")
    try:
        if not _pack_file(plain, temporary, is_over):
            return False
        os.replace(temporary, packed)  # noqa: PTH105
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    plain.unlink()
    _log.info("%s is compressed", plain.name)
    return True


def _pack_file(plain: Path, packed: Path, is_over: Callable[[], bool]) -> bool:
    """Says whether all of it was packed before it `is_over`; what is packed is on the disk."""
    with (
        contextlib.closing(_open_plain(plain)) as content,
        open(make_own(packed, FILE_MODE), "wb") as out,  # noqa: PTH123  # a descriptor, not a path
    ):
        for chunk in content.chunks_from(0, MEMBER_BYTES):
            if is_over():
                return False
            out.write(pack(chunk))
        out.flush()
        os.fsync(out.fileno())
    return True
