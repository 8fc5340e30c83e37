"""What the programs of an overlay say: one file an overlay, with the time before each line, of bounded size.

In it stand the stderr of all of them, those that were started for one call too, and the stdout of services.
`FOLDER/<overlay>.log` grows to `max_bytes`, is renamed to `<overlay>.log.1` in place of the one before, and begun anew.
Renamed, not cut: so who reads it misses nothing. `OverlayLogs` writes; `LogReader` reads, and follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

DELAY_S = 0.05
"""How long, in seconds, lines are gathered in an event loop before they are written. Nobody who reads a log notices."""

_FILE_MODE = 0o640


def path_of(folder: Path, overlay: str) -> Path:
    """The file that is written now."""
    return folder / f"{overlay}.log"


def rotated(path: Path) -> Path:
    """The file before it."""
    return path.with_name(f"{path.name}.1")


@dataclass(slots=True)
class _Said:
    """What an overlay has said that is not in its file yet."""

    begun: dict[Hashable, bytes] = field(default_factory=dict)
    """Of each source the line that has not ended yet."""
    waiting: deque[bytes] = field(default_factory=deque)
    """Whole lines, with their time."""
    size: int = 0
    """Of all that is waiting, in bytes."""


class OverlayLogs:
    """Writes the logs of all overlays. `clock` gives seconds since 1970.

    In an event loop lines are gathered for `DELAY_S` and then written by a thread, in their order, so that a slow disk
    holds nobody up; what waits for it is bounded by `max_bytes` an overlay, the newest being kept. Outside of a loop
    they are written at once. Used in one loop only, or in one thread.

    It never raises. What cannot be written (a full disk, no permission) is dropped, with one warning an overlay until
    it can be written again. No file is kept open.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int = MAX_BYTES,
        *,
        redact: Callable[[bytes], bytes] = bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._redact = redact
        self._max_bytes = max_bytes
        self._clock = clock
        self._said: dict[str, _Said] = {}
        self._warned: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def append(self, overlay: str, data: bytes, source: Hashable = None) -> None:
        """Write the lines of `data`. One that has not ended waits for its rest, up to `LINE_BYTES`.

        `source` tells apart the processes of one overlay, so that none ends the line of another.
        """
        said = self._said.get(overlay)
        if said is None:
            said = self._said[overlay] = _Said()
        begun = (said.begun.pop(source, b"") + data).replace(b"\r\n", b"\n")
        lines, newline, rest = begun.rpartition(b"\n")
        if len(rest) > LINE_BYTES:
            lines, newline, rest = begun, b"\n", b""
        if rest:
            said.begun[source] = rest
        if newline:
            self._put(said, lines)

    def end(self, overlay: str, source: Hashable = None) -> None:
        """The source says nothing more: a line that it has begun is written as it is."""
        said = self._said.get(overlay)
        if said is not None and (rest := said.begun.pop(source, b"")):
            self._put(said, rest)

    def flush(self) -> None:
        """Write now whatever has ended, and wait until it stands in the files."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None:
            wait([self._writing])
        self._write_all(self._take())

    def close(self) -> None:
        """Write all, lines that were begun as they are. What is said later opens it again."""
        for overlay, said in list(self._said.items()):
            for source in list(said.begun):
                self.end(overlay, source)
        self.flush()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _put(self, said: _Said, lines: bytes) -> None:
        """Take lines that are parted by newlines, the last one without its own."""
        stamp = _stamp(self._clock())
        # One pass in C: a program may well write a hundred thousand empty lines at once.
        text = _newest(stamp + self._redact(lines).replace(b"\n", b"\n" + stamp) + b"\n", self._max_bytes)
        said.waiting.append(text)
        said.size += len(text)
        while said.size - len(said.waiting[0]) >= self._max_bytes:
            said.size -= len(said.waiting.popleft())
        self._write_soon()

    def _write_soon(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if self._timer is None and (self._writing is None or self._writing.done()):
            self._timer = loop.call_later(DELAY_S, self._hand_over, loop)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "overlay-logs")
        self._writing = self._thread.submit(self._write_all, self._take())
        asyncio.wrap_future(self._writing, loop=loop).add_done_callback(self._written)

    def _written(self, written: asyncio.Future[None]) -> None:
        written.result()
        if any(said.waiting for said in self._said.values()):
            self._write_soon()

    def _take(self) -> dict[str, bytes]:
        """All that waits, by overlay. What then has nothing more to say is forgotten."""
        texts: dict[str, bytes] = {}
        for overlay, said in list(self._said.items()):
            if said.waiting:
                texts[overlay] = b"".join(said.waiting)
                said.waiting.clear()
                said.size = 0
            if not said.begun:
                del self._said[overlay]
        return texts

    def _write_all(self, texts: dict[str, bytes]) -> None:
        for overlay, text in texts.items():
            path = path_of(self._folder, overlay)
            try:
                self._write(path, _newest(text, self._max_bytes))
            except OSError as error:
                if overlay not in self._warned:
                    log.warning("%s cannot be written, lines are dropped: %s", path, error.strerror)
                self._warned.add(overlay)
            else:
                self._warned.discard(overlay)

    def _write(self, path: Path, text: bytes) -> None:
        """The file is the one that bears the name now: who else removed, renamed or emptied it may do so."""
        fd = self._open(path)
        try:
            while (size := os.fstat(fd).st_size) and size + len(text) > self._max_bytes:
                _rotate(path, fd)
                os.close(fd)
                fd = -1
                fd = self._open(path)
            _write_whole(fd, text, size)
        finally:
            if fd >= 0:
                os.close(fd)

    def _open(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # others may write the folder
        try:
            return os.open(path, flags, _FILE_MODE)
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags, _FILE_MODE)


class Voice:
    """One process among those that an overlay's log is of: what it says, and what the bus says of it.

    `name` is how the bus calls it there: `worker 3`, `the service`. Its own lines stand as they are, those of the bus
    begin with `aal:`, so that a log reads as one story.
    """

    def __init__(self, logs: OverlayLogs | None, overlay: str, name: str) -> None:
        self._logs = logs
        self._overlay = overlay
        self._name = name

    def say(self, data: bytes) -> None:
        """What the process wrote."""
        if self._logs is not None:
            self._logs.append(self._overlay, data, self)

    def end(self) -> None:
        """It says nothing more."""
        if self._logs is not None:
            self._logs.end(self._overlay, self)

    def note(self, words: str) -> None:
        """A line of the bus between its own. The words go on from the name."""
        if self._logs is not None:
            self._logs.append(self._overlay, f"aal: {self._name} {words}\n".encode())


def _rotate(path: Path, fd: int) -> None:
    """Rename the open file, unless another process has done so: a second time would be at the cost of that one's."""
    fcntl.flock(fd, fcntl.LOCK_EX)  # until the file is closed
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(fd)):
            path.replace(rotated(path))


def _write_whole(fd: int, text: bytes, size: int) -> None:
    """Raises OSError, and then leaves the file as it was, of `size` bytes: no half line, to which the next is added."""
    written = 0
    try:
        while written < len(text):
            written += os.write(fd, memoryview(text)[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size)
        raise


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
        return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")  # noqa: PTH123
    except FileNotFoundError:
        return None


def _is_same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.sameopenfile(one.fileno(), other.fileno())
