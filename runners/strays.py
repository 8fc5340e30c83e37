"""Programs that lost every process that would have ended them: found by the mark of their helper, and killed.

A last resort for where the kernel gives no pid namespace, and both processes of a helper were killed at once. Each has
the mark from the helper, whose environment it began with. What runs another program with another environment is not
found, nor what never stays one process for long. While a process executes a program the kernel shows no environment of
it (execve(2) makes it a new memory): so where one shows none, it is looked at again.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

MARK = "OVERLAY_CALL"
"""The environment variable of a helper and its programs whose value begins with the mark of the helper."""

ROUNDS = 10
"""How often /proc is read at most: what is found may have started another meanwhile."""

EXEC_S = 0.005
"""Between two looks at a process that shows no environment."""

END_MS = 1000
"""How long, in milliseconds, one that was killed may take to end before the next is looked at."""


def end(mark: str) -> None:
    """Kill what carries the mark, round by round until nothing does. It blocks: call it in a thread.

    Raises OSError where it cannot look (too many files, ...).
    """
    for _ in range(ROUNDS):
        others = _others()
        if [pid for pid in others if _carries(pid, mark) and _end(pid, mark)]:
            continue
        if not any(_shows_none(pid) for pid in others):
            return
        time.sleep(EXEC_S)


def _others() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]  # noqa: PTH208


def _carries(pid: int, mark: str) -> bool:
    """False, too, of what has ended or is another user's."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return any(variable.startswith(f"{MARK}={mark}-".encode()) for variable in variables)


def _shows_none(pid: int) -> bool:
    """Whether a program shows no environment: it is being executed, or has none. Kernel threads are none."""
    try:
        return not Path(f"/proc/{pid}/environ").read_bytes() and bool(os.readlink(f"/proc/{pid}/exe"))  # noqa: PTH115
    except OSError:  # it has ended, or is another user's
        return False


def _end(pid: int, mark: str) -> bool:
    """Whether it was there to be killed.

    A pidfd does not hold a number. So it is looked at again, and stopped: what is stopped does not end, and keeps its
    number and its group's until that is killed.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not _carries(pid, mark):
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or become another user's
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            _kill_group_of(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(END_MS)
        return True
    finally:
        os.close(pidfd)


def _kill_group_of(pid: int) -> None:
    """All of a group at once: none gets away by forking. The group of this process is no program's."""
    group = os.getpgid(pid)
    if group != os.getpgrp():
        os.killpg(group, signal.SIGKILL)
