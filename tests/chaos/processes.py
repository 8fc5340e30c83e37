"""What runs, what it holds open and what was left behind, read from /proc.

Two nets catch what was left behind: a variable in the environment of all that the bus starts; and this process as the
subreaper (prctl(2)) of all its descendants, to which whatever has lost its parent comes, even with another environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from runners.helper import LAUNCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MARK = "CHAOS_MARK"
"""The variable whose value tells one run's processes from another's."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of <linux/prctl.h>."""

POLL_S = 0.01
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper(*, yes: bool = True) -> None:
    _libc.prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


def die_with_parent() -> None:
    """For a child between fork and exec: whatever becomes of this process, it ends as well."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def wait_until(ask: Callable[[], bool], limit_s: float) -> float | None:
    """How many seconds it took until it was so; None where it was not within the limit."""
    start = time.monotonic()
    while not ask():
        if time.monotonic() > start + limit_s:
            return None
        time.sleep(POLL_S)
    return time.monotonic() - start


def marked(mark: str) -> list[int]:
    """The processes with `MARK=mark` in their environment. A zombie has none."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def family(pid: int | None = None) -> list[psutil.Process]:
    """The descendants of a process, of this one by default; none of one that is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def zombies(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Those that have ended and that nobody has reaped."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def reap() -> None:
    """Take every child that has ended off the kernel's table, as process 1 would."""
    for child in zombies(family()):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def describe(processes: Iterable[int]) -> list[str]:
    """A line for people about each that is still there."""
    lines = []
    for pid in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            words = " ".join(process.cmdline()) or process.name()
            lines.append(f"{pid} (child of {process.ppid()}, {process.status()}): {words[:100]}")
    return lines


def held(pid: int) -> Counter[str]:
    """What a process holds open: how many descriptors of each kind; files by their path."""
    kinds: Counter[str] = Counter()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = str(fd.readlink())
            kinds[target if target.startswith("/") else target.partition(":[")[0]] += 1
    return kinds


def helpers(bus: int) -> list[int]:
    """The helpers of a bus, oldest first."""
    return [child for child in _children(bus) if _is_launcher(child)]


def folder(pid: int) -> str | None:
    """Where a process works; None where it is gone."""
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return None


def zygote(helper: int) -> int | None:
    """The process that starts a helper's programs, as the helper's child; None where there is none yet, or any more."""
    return next(filter(_is_launcher, _children(helper)), None)


def waits(pid: int, zygote: int | None) -> bool:
    """Whether a process was forked ahead of its call: it still has the stdin of its zygote."""
    try:
        stdins = {Path(f"/proc/{one}/fd/0").readlink() for one in (pid, zygote)}
    except OSError:
        return False
    return _is_launcher(pid) and len(stdins) == 1


def has_namespace(pid: int) -> bool:
    """Whether a process counts from another one than this one's namespace (NSpid of proc(5))."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return len(status.partition("NSpid:")[2].split("\n")[0].split()) > 1
    return False


def _children(pid: int) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return sorted(child.pid for child in psutil.Process(pid).children())
    return []


def _is_launcher(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.fsencode(LAUNCH) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


class Victim:
    """A process that will be killed; within `with` it is held, so that nobody else can come to have its number.

    Raises ProcessLookupError where it is no longer a child of `parent`.
    """

    def __init__(self, pid: int, parent: int) -> None:
        self._pid = pid
        self._parent = parent

    def __enter__(self) -> Self:
        self._fd = os.pidfd_open(self._pid)
        if self._pid not in _children(self._parent):
            os.close(self._fd)
            raise ProcessLookupError(self._pid)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
