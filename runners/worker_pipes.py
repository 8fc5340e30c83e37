"""Our ends of a worker's stdin, stdout and stderr.

What it writes is read from stdout and stderr, one read for each event, so that a flood keeps nobody waiting; what it is
sent and its stdin does not take at once is written as it reads.
"""

from __future__ import annotations

import array
import fcntl
import os
import termios
from typing import TYPE_CHECKING

from runners.output import READ_SIZE

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

LAST_READS = 16
"""Reads from each pipe of an ended worker: a full megabyte, the largest that an ordinary user may give a pipe."""

_NO_FD = -1


class Pipes:
    """The three pipes, from before the start of a worker until nothing of it is left.

    `take_output` and `take_log` are given what comes from stdout and stderr; `closed` is told, with its name, of a pipe
    that the worker closed: of its stdin once it is written to.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        take_output: Callable[[bytes], None],
        take_log: Callable[[bytes], None],
        closed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._take_output = take_output
        self._take_log = take_log
        self._closed = closed
        self._stdin = self._stdout = self._stderr = _NO_FD
        self._rest = memoryview(b"")
        self._written = 0

    def open(self, theirs: list[int]) -> None:
        """Make them. The worker's ends of stdin, stdout and stderr are added to `theirs`, as many as could be made."""
        reader, self._stdin = os.pipe2(os.O_CLOEXEC)
        theirs.append(reader)
        self._stdout, writer = os.pipe2(os.O_CLOEXEC)
        theirs.append(writer)
        self._stderr, writer = os.pipe2(os.O_CLOEXEC)
        theirs.append(writer)
        for fd in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(fd, False)

    def watch_log(self) -> None:
        self._loop.add_reader(self._stderr, self._read_log)

    def watch_output(self) -> None:
        self._loop.add_reader(self._stdout, self._read_output)

    # To the worker

    def send(self, line: bytes) -> None:
        """Write all of a call's line, now and as the worker reads it. The line before it must have gone."""
        self._written = 0
        done = self.write(line)
        if done < len(line):
            self._rest = memoryview(line)[done:]
            self._loop.add_writer(self._stdin, self._write_on)

    def write(self, data: bytes | memoryview) -> int:
        """Write as much as the pipe takes. How much is done with: all of it where nobody can read it any more."""
        try:
            written = os.write(self._stdin, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            self._closed("stdin")
            return len(data)
        self._written += written
        return written

    def _write_on(self) -> None:
        self._rest = self._rest[self.write(self._rest) :]
        if not self._rest:
            self._loop.remove_writer(self._stdin)

    @property
    def is_sending(self) -> bool:
        """Whether some of the last line that was sent has yet to be written."""
        return bool(self._rest)

    @property
    def unread(self) -> int:
        """How many bytes the worker has been sent and has not read yet."""
        return _unread(self._stdin)

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of the last line that was sent was read; what lies before it in the pipe counts as well."""
        return self._stdin != _NO_FD and self.unread >= self._written

    # From the worker

    def read_log(self) -> None:
        """Take what it has written to stderr by now, without waiting for the event: as much as one read gives."""
        if self._stderr != _NO_FD and _unread(self._stderr):
            self._read_log()

    def read_last(self) -> None:
        """Take what an ended worker has left in stderr, then what it has left in stdout."""
        for read in (self._read_log, self._read_output):
            for _ in range(LAST_READS):
                if not read():
                    break

    def _read_output(self) -> bool:
        """One read. Whether there may be more."""
        if self._stdout == _NO_FD:
            return False
        try:
            data = os.read(self._stdout, READ_SIZE)
        except BlockingIOError:
            return False
        if data:
            self._take_output(data)
        else:
            self.close_output()
            self._closed("stdout")
        return bool(data)

    def _read_log(self) -> bool:
        """One read. Whether there may be more."""
        if self._stderr == _NO_FD:
            return False
        try:
            data = os.read(self._stderr, READ_SIZE)
        except BlockingIOError:
            return False
        if data:
            self._take_log(data)
        else:
            self._stderr = self._without_reader(self._stderr)
        return bool(data)

    # The end

    def close_input(self) -> None:
        if self._stdin != _NO_FD:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
        self._stdin = _NO_FD

    def close_output(self) -> None:
        self._stdout = self._without_reader(self._stdout)

    def close(self) -> None:
        """Close those that are open."""
        self.close_input()
        self.close_output()
        self._stderr = self._without_reader(self._stderr)

    def _without_reader(self, fd: int) -> int:
        if fd != _NO_FD:
            self._loop.remove_reader(fd)
            os.close(fd)
        return _NO_FD


def _unread(pipe: int) -> int:
    """How many bytes were written to a pipe and not yet read, told by either of its ends: FIONREAD, pipe(7)."""
    size = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, size)
    return size[0]
