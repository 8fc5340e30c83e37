"""What a program says: our ends of its pipes, what is kept of its stderr, the reply that stands on its stdout."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runners.base import Code, JsonError, Outcome, parse_json

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from collections.abc import Set as AbstractSet

READ_SIZE = 64 * 1024
"""Bytes taken from a pipe at once; a pipe holds that much unless the program enlarged it."""

PREVIEW_LENGTH = 200
"""Characters of unreadable output that an error quotes."""

MEMORY_EVERY_S = 1.0
"""Seconds from one look at the memory of a program that keeps running to the next."""


class Output:
    """Our end of one output pipe: hands on what comes, then says once that it has ended.

    Where it is not `watched`, it is read from `watch` on. Until then its writer can fill the pipe, and no more.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        take: Callable[[bytes], None],
        ended: Callable[[], None] = lambda: None,
        *,
        watched: bool = True,
    ) -> None:
        self.closed = False
        self._watched = False
        self._loop = loop
        self._fd = fd
        self._take = take
        self._ended = ended
        if watched:
            self.watch()

    def watch(self) -> None:
        if not self.closed and not self._watched:
            self._watched = True
            self._loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        """One read for each event, so that a flood does not keep the other calls waiting."""
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return
        if data:
            self._take(data)
        else:
            self.close()
            self._ended()

    def drain(self) -> None:
        """Take what is left, and close: whoever could write to it is gone.

        At most what the pipe can hold, in case that somebody is not.
        """
        left = 0 if self.closed else fcntl.fcntl(self._fd, fcntl.F_GETPIPE_SZ)
        while left > 0 and not self.closed:
            try:
                data = os.read(self._fd, READ_SIZE)
            except BlockingIOError:
                break
            if not data:
                break
            left -= len(data)
            self._take(data)
        self.close()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if self._watched:
                self._loop.remove_reader(self._fd)
            os.close(self._fd)


class Input:
    """Our end of a stdin pipe: writes as much as the program takes. A program need not read it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, data: bytes) -> None:
        self._loop = loop
        self._fd = fd
        self._rest = memoryview(data)
        self._closed = False
        loop.add_writer(fd, self._write)

    def _write(self) -> None:
        try:
            written = os.write(self._fd, self._rest)
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.close()
            return
        self._rest = self._rest[written:]
        if not self._rest:
            self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_writer(self._fd)
            os.close(self._fd)


class Log:
    """The first and the last half of at most `limit` bytes; what lies between is counted and dropped."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._size = 0
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes | bytearray) -> None:
        self._size += len(data)
        room = self.limit // 2 - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._tail_limit:
            self._shorten()

    def kept(self) -> bytes:
        self._shorten()
        dropped = self._size - len(self._head) - len(self._tail)
        gap = b"\n[... %d bytes left out ...]\n" % dropped if dropped else b""
        return bytes(self._head) + gap + bytes(self._tail)

    def after(self, data: bytes) -> Log:
        """What it would be had `data` come before all that it was given."""
        joined = Log(self.limit)
        joined.add(data)
        joined.add(self._head)
        joined._size = len(data) + self._size - len(self._tail)
        joined.add(self._tail)
        return joined

    @property
    def _tail_limit(self) -> int:
        return self.limit - self.limit // 2

    def _shorten(self) -> None:
        surplus = len(self._tail) - self._tail_limit
        if surplus > 0:
            del self._tail[:surplus]


@dataclass(frozen=True, slots=True)
class Reply:
    """What stood on stdout: a JSON value and the noise before it, or (`fault` is set) no JSON value and why not."""

    value: Any = None
    noise: bytes = b""
    fault: str | None = None


def read_reply(stdout: bytes) -> Reply:
    """The whole text as JSON, else its last line."""
    text = stdout.strip()
    if not text:
        return Reply(fault="wrote nothing to stdout")
    try:
        return Reply(parse_json(text))
    except JsonError as error:
        fault = error
    noise, newline, last = text.rpartition(b"\n")
    if newline and not _is_cut_short(text):
        try:
            return Reply(parse_json(last), noise)
        except JsonError as error:
            if last.startswith((b"{", b"[")):
                fault = error
    return Reply(noise=text, fault=f"wrote to stdout what is not JSON ({fault}): {preview(text)}")


def _is_cut_short(text: bytes) -> bool:
    """Whether the text is JSON that stops before its end: then its last line, a valid value perhaps, is no reply."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc)
    except (ValueError, RecursionError):
        return False
    return False


def preview(text: bytes) -> str:
    """The beginning of unreadable output, quoted."""
    return repr(text[: 4 * PREVIEW_LENGTH].decode("utf-8", "replace")[:PREVIEW_LENGTH])


def judge(reply: Reply, exit_code: int) -> tuple[Code, str | None]:
    """A protocol reply counts whatever the exit status; any other output only where that is 0."""
    if exit_code == 0:
        return (Code.OK, None) if reply.fault is None else (Code.PROTOCOL, f"the program {reply.fault}")
    if reply.fault is not None:
        return Code.CRASH, f"the program {describe(exit_code)} and {reply.fault}"
    if isinstance(reply.value, dict) and "ok" in reply.value:
        return Code.OK, None
    return Code.CRASH, f"the program {describe(exit_code)}"


def describe(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit status {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:  # the real-time signals have no names
        return f"was ended by signal {-exit_code}"


def excess(memory_mb: float, may_mb: int) -> str:
    """What is said of a process that has more memory than it may, both in MiB. It goes on after a name or "it".

    One that the kernel holds to its limit has no more, but needed it.
    """
    if memory_mb <= may_mb:
        return f"needed more memory than the {may_mb} MiB that it may use, when it had {memory_mb:.1f}"
    return f"used {memory_mb:.1f} MiB of memory, more than the {may_mb} that it may"


def excess_at_end(memory_mb: float, floor_mb: float, may_mb: int) -> str | None:
    """The same of one that has ended, None where it had no more. A peak at its floor is the helper's."""
    return excess(memory_mb, may_mb) if memory_mb > may_mb and memory_mb > floor_mb else None


def data_limit(mb: int | None) -> int:
    """RLIMIT_DATA, in bytes, of what may hold so many MiB: twice that, as a backstop behind who looks at its memory."""
    return 0 if mb is None else 2 * mb * 2**20


_OF_NO_MEMORY = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS})
"""By which programs die that do not check what malloc(3) gives them."""

_WORDS_OF_NO_MEMORY = ("MemoryError", "Cannot allocate memory", "out of memory", "bad_alloc")
"""What Python, the C library, Node and Go, and C++ say."""


_WORDS_OF_NO_SPACE = ("No space left on device", "File too large", "Disk quota exceeded", "ENOSPC", "EFBIG")
"""What the C library says, and Node."""


def with_hint(outcome: Outcome, hard_mb: int, scratch: str) -> Outcome:
    """A program that was given no more memory says so at most in its own words; and who killed it, nobody says.

    Nothing of the bus kills without a word, so a KILL is the kernel's, for want of memory, or some person's. Who writes
    more than there is room for says so no louder; `scratch` is what it may write, in words.
    """
    if outcome.exit_code == -signal.SIGKILL and outcome.code == Code.CRASH:
        error = f"{outcome.error}; the bus did not do it, and the kernel does where memory has run out"
        return outcome._replace(error=error, retryable=True)
    if _may_lack_memory(outcome):
        hint = f"It may have run out of memory: of its own data it can have twice its HARD of {hard_mb} MiB at most."
        return outcome._replace(hint=hint)
    if _may_lack(outcome, {signal.SIGXFSZ}, _WORDS_OF_NO_SPACE):
        return outcome._replace(hint=f"It may have filled its scratch folder: {scratch}.")
    return outcome


def _may_lack_memory(outcome: Outcome) -> bool:
    return _may_lack(outcome, _OF_NO_MEMORY, _WORDS_OF_NO_MEMORY)


def _may_lack(outcome: Outcome, signals: AbstractSet[int], words: Iterable[str]) -> bool:
    """Whether it failed, and by one of these signals or with one of these words."""
    failed = isinstance(outcome.result, dict) and outcome.result.get("ok") is False
    if outcome.ok and not failed:
        return False
    died = outcome.exit_code is not None and -outcome.exit_code in signals
    said = str(outcome.result) if failed else outcome.log
    return died or any(word in said for word in words)


def join_log(noise: bytes, log: Log) -> str:
    """The log of a program, after the `noise` that it wrote to stdout."""
    whole = log.after(noise + b"\n") if noise else log
    return whole.kept().decode("utf-8", "replace")


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
