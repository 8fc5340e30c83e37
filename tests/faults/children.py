"""A forked process: it runs one function, says lines through a pipe, and is waited for with a bound.

A fork of a process that has imported everything starts in a millisecond. Its parent must have one thread only.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import os
import select
import signal
import traceback
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    Say = Callable[[str], None]

HANG_S = 30.0
"""How long a child that ought to end by itself may take."""

HUNG = "hung"
DIED = 3
"""The exit status of a child whose function has raised; it has said the traceback."""

_PR_SET_PTRACER = 0x59616D61
_ANY = ctypes.c_ulong(-1 & (1 << 64) - 1)
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031


class Child:
    """Runs `work` once it is told to `go`. Use it in a `with` block: then it is gone and reaped afterwards.

    It hears and speaks by readv(2) and writev(2), which no ledger uses, so that faults in other system calls spare it.
    """

    def __init__(self, work: Callable[[Say], None]) -> None:
        hears, self._tells = os.pipe()
        self._says, said = os.pipe()
        with contextlib.suppress(OSError):  # room for all that is said before anybody reads it
            fcntl.fcntl(self._says, _F_SETPIPE_SZ, _PIPE_BYTES)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._tells)
            os.close(self._says)
            _live(work, hears, said)
        os.close(hears)
        os.close(said)
        self._pidfd = os.pidfd_open(self.pid)
        self._text = b""
        self.status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            self.kill()
        for fd in (self._tells, self._says, self._pidfd):
            os.close(fd)

    def go(self) -> None:
        os.write(self._tells, b"g")

    def first_line(self, timeout_s: float = HANG_S) -> None:
        """Wait until it has said something, or has ended."""
        select.select([self._says], [], [], timeout_s)

    def kill(self) -> list[str]:
        """kill -9, and what it had said before that; no line that it had not finished."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return self._reaped()

    def lines(self, timeout_s: float = HANG_S) -> list[str]:
        """All that it says until it ends. Where that takes too long it is killed, and `HUNG` comes last."""
        ended, _, _ = select.select([self._pidfd], [], [], timeout_s)
        if ended:
            return self._reaped()
        os.kill(self.pid, signal.SIGUSR1)  # where it hangs, on stderr
        select.select([self._pidfd], [], [], 0.5)
        return [*self.kill(), HUNG]

    def _reaped(self) -> list[str]:
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        while chunk := os.read(self._says, _PIPE_BYTES):
            self._text += chunk
        return self._text.decode().splitlines() if self._text.endswith(b"\n") else self._text.decode().split("\n")[:-1]


def _live(work: Callable[[Say], None], hears: int, said: int) -> None:
    """In the child. It never returns."""

    def say(line: str) -> None:
        os.writev(said, [line.encode(), b"\n"])

    status = DIED
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # strace is no ancestor of it
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if os.readv(hears, [bytearray(1)]):
            work(say)
            status = 0
    except BaseException:  # noqa: BLE001  # whatever it is, the parent is told
        say("raised " + traceback.format_exc().replace("\n", " | "))
    finally:
        os._exit(status)
