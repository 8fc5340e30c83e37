"""What programs that keep running say: one file an overlay, with the time before each line, of bounded size.

`FOLDER/<overlay>.log` grows to `max_bytes`, is renamed to `<overlay>.log.1` in place of the one before, and begun anew.
Renamed, not cut: so who reads it misses nothing. `OverlayLogs` writes; `LogReader` reads, and follows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

MAX_BYTES = 2**20
"""Size at which a file is rotated."""

LINE_BYTES = 16 * 1024
"""How much of a line that does not end is held back for its end."""

_FILE_MODE = 0o640


def path_of(folder: Path, overlay: str) -> Path:
    """The file that is written now."""
    return folder / f"{overlay}.log"


def rotated(path: Path) -> Path:
    """The file before it."""
    return path.with_name(f"{path.name}.1")


@dataclass(slots=True)
class _File:
    """An overlay's open file. `warned`: that it cannot be written was said, and it has not been written since."""

    path: Path
    fd: int | None = None
    size: int = 0
    warned: bool = False
    begun: dict[Hashable, bytes] = field(default_factory=dict)
    """Of each source the line that has not ended yet."""


class OverlayLogs:
    """Writes the logs of all overlays. `clock` gives seconds since 1970.

    It never raises. What cannot be written (a full disk, no permission) is dropped, with one warning an overlay until
    it can be written again.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._clock = clock
        self._files: dict[str, _File] = {}

    def append(self, overlay: str, data: bytes, source: Hashable = None) -> None:
        """Write the lines of `data`. One that has not ended waits for its rest, up to `LINE_BYTES`.

        `source` tells apart the processes of one overlay, so that none ends the line of another.
        """
        file = self._file(overlay)
        begun = (file.begun.pop(source, b"") + data).replace(b"\r\n", b"\n")
        lines, newline, rest = begun.rpartition(b"\n")
        if len(rest) > LINE_BYTES:
            lines, newline, rest = begun, b"\n", b""
        if rest:
            file.begun[source] = rest
        if newline:
            self._put(file, lines)

    def end(self, overlay: str, source: Hashable = None) -> None:
        """The source says nothing more: a line that it has begun is written as it is."""
        file = self._file(overlay)
        if rest := file.begun.pop(source, b""):
            self._put(file, rest)

    def close(self) -> None:
        """Write the lines that were begun, and close the files."""
        for overlay, file in self._files.items():
            for source in list(file.begun):
                self.end(overlay, source)
            _close(file)
        self._files.clear()

    def _file(self, overlay: str) -> _File:
        file = self._files.get(overlay)
        if file is None:
            file = self._files[overlay] = _File(path_of(self._folder, overlay))
        return file

    def _put(self, file: _File, lines: bytes) -> None:
        """Write lines that are parted by newlines, the last one without its own."""
        stamp = _stamp(self._clock())
        # One pass in C: a program may well write a hundred thousand empty lines at once.
        text = stamp + lines.replace(b"\n", b"\n" + stamp) + b"\n"
        try:
            self._write(file, _newest(text, self._max_bytes))
        except OSError as error:
            _close(file)
            if not file.warned:
                log.warning("%s cannot be written, lines are dropped: %s", file.path, error.strerror)
            file.warned = True
        else:
            file.warned = False

    def _write(self, file: _File, text: bytes) -> None:
        fd = self._open(file)
        if file.size and file.size + len(text) > self._max_bytes:
            file.path.replace(rotated(file.path))
            _close(file)
            fd = self._open(file)
        written = 0
        try:
            while written < len(text):
                written += os.write(fd, memoryview(text)[written:])
        except OSError:
            with contextlib.suppress(OSError):  # no half line stays, to which the next would be added
                os.ftruncate(fd, file.size)
            raise

    def _open(self, file: _File) -> int:
        """The descriptor of what bears the file's name now: who else removed, renamed or emptied it may do so."""
        if file.fd is not None:
            ours = os.fstat(file.fd)
            with contextlib.suppress(FileNotFoundError):
                there = file.path.stat()
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    file.size = there.st_size
                    return file.fd
            _close(file)
        self._folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        file.fd = os.open(file.path, flags, _FILE_MODE)
        file.size = os.fstat(file.fd).st_size
        return file.fd


def _stamp(now: float) -> bytes:
    """`2026-01-31T12:00:00.123Z `: RFC 3339, in UTC."""
    whole = int(now)
    return b"%s.%03dZ " % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)).encode(), (now - whole) * 1000)


def _newest(text: bytes, limit: int) -> bytes:
    """The last whole lines that fit; of a line that is longer than that its start, which has the time."""
    if len(text) <= limit:
        return text
    _, _, kept = text[-limit - 1 :].partition(b"\n")
    if kept:
        return kept
    last = text[:-1].rpartition(b"\n")[2]
    return last[: limit - 1] + b"\n"


def _close(file: _File) -> None:
    if file.fd is not None:
        os.close(file.fd)
        file.fd = None


class LogReader:
    """Reads one overlay's log, which may be written and rotated meanwhile. `last` first, then `more` again and again.

    Lines come without their newline. A file that cannot be read raises OSError; one that is not there has no lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        self._read_ns = 0

    def last(self, count: int) -> list[bytes]:
        """The last `count` lines, oldest first."""
        self._file = _open_or_none(self._path) or _open_or_none(rotated(self._path))
        text = b"" if self._file is None else self._read(self._file)
        if text.count(b"\n") < count:
            text = self._before(0) + text
        lines = self._lines(text)
        return lines[max(0, len(lines) - count) :]

    def more(self) -> list[bytes]:
        """The lines that came since. Some may be missing where the log was rotated more than once."""
        return self._lines(b"".join(self._news()))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _news(self) -> Iterator[bytes]:
        if self._file is not None:
            yield self._read(self._file)
        now = _open_or_none(self._path)
        if now is None:
            return
        if self._file is not None and _is_same(self._file, now):
            now.close()
            return
        if self._file is not None:
            yield self._read(self._file)  # what was written to it between our look and its new name
        yield self._before(self._read_ns)
        self.close()
        self._file = now
        yield self._read(now)

    def _before(self, since_ns: int) -> bytes:
        """The rotated file, unless that is the one that is read anyway, or was last written before `since_ns`."""
        before = _open_or_none(rotated(self._path))
        if before is None:
            return b""
        with before:
            is_ours = self._file is not None and _is_same(self._file, before)
            is_old = os.fstat(before.fileno()).st_mtime_ns < since_ns
            return b"" if is_ours or is_old else self._read(before)

    def _read(self, file: BinaryIO) -> bytes:
        """What stands after what was read; everything, where the file was emptied meanwhile."""
        about = os.fstat(file.fileno())
        if about.st_size < file.tell():
            file.seek(0)
        self._read_ns = max(self._read_ns, about.st_mtime_ns)
        return file.read()

    def _lines(self, text: bytes) -> list[bytes]:
        """Whole lines; what comes after the last of them waits for its end."""
        *lines, self._rest = (self._rest + text).split(b"\n")
        return lines


def _open_or_none(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _is_same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.sameopenfile(one.fileno(), other.fileno())
