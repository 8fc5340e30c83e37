"""Starts programs for the bus, outside of it: by small helper processes that limit, reap and kill.

`Helpers.start` is the door for whoever needs a process: a call, a worker, a service. The process that comes back is a
`Process`, whatever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from runners.base import Rights


@dataclass(frozen=True, slots=True)
class Home:
    """Where a process belongs. Processes with equal homes are started by the same helper, with the same rights."""

    overlay: str
    phase: str
    rights: Rights
    folder: Path = field(compare=False)
    env: Mapping[str, str] = field(compare=False)
    code_hash: str = ""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended.

    `code` is negative for a signal, as in `subprocess`; None where nobody can tell. `lost` says why the process was
    ended by the end of its helper, where that was the cause.
    """

    code: int | None
    cpu_ms: float | None = None
    peak_mb: float | None = None
    lost: str | None = None


class Process:
    """A program that was started, leader of its own session and group, until nothing of it is left.

    `ended` holds its exit once it was reaped and all that it had started is gone. It never fails, nor is it cancelled.
    """

    def __init__(self, popen: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self._popen = popen
        self._loop = loop
        self._pidfd = os.pidfd_open(popen.pid)
        loop.add_reader(self._pidfd, self._exited)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its group. KILL ends also what left the group. Nothing happens once it has ended."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, number)

    async def memory_mb(self) -> float | None:
        """The resident memory of the process now, in MiB; None once it has ended."""
        try:
            with open(f"/proc/{self._popen.pid}/statm") as file:  # noqa: ASYNC230, PTH123
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        except (OSError, IndexError):
            return None

    def _exited(self) -> None:
        self.signal(signal.SIGKILL)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        _, status, usage = os.wait4(self._popen.pid, 0)
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1000, 3)
        self.ended.set_result(Exit(self._popen.returncode, cpu_ms, round(usage.ru_maxrss / 1024, 3)))


class Helpers:
    """Every helper of a bus. Used in one event loop only."""

    async def start(
        self, home: Home, argv: Sequence[str], fds: tuple[int, int, int], env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program in the folder and environment of its home, with `env` added.

        `fds` become its stdin, stdout and stderr; they stay the caller's to close. Raises OSError, with the errno and
        the words of the program's failure to start, or ValueError (a NUL in the command).
        """
        popen = subprocess.Popen(  # noqa: ASYNC220
            argv,
            stdin=fds[0],
            stdout=fds[1],
            stderr=fds[2],
            cwd=home.folder,
            env={**home.env, **(env or {})},
            start_new_session=True,
        )
        return Process(popen, asyncio.get_running_loop())

    async def close(self) -> None:
        """End everything that was started."""
