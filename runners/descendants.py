"""The processes below this one, as /proc tells (proc(5)): which there are, what memory they have; and signals to them.

Part of the helper (`launcher.py`), under the same rules.
"""

from __future__ import annotations

import os

import _signal as signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it

SCANS = 10
"""How often /proc is read at most, where it changed meanwhile."""


class Family:
    """The children of this process: those that it started, and the orphans that came to it.

    A child stays one until this process reaps it, so the kernel's list of them (proc(5)) misses none, however quickly
    they fork and end.
    """

    def __init__(self) -> None:
        try:
            self._list = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # the kernel was built without CONFIG_PROC_CHILDREN
            self._list = -1
        self.highest_fd = self._list

    def children(self) -> list[int]:
        """Their process ids, of those that ended and were not reaped, too."""
        if self._list < 0:
            return children_by_scan()
        text = part = os.pread(self._list, 4096, 0)
        while part:
            part = os.pread(self._list, 4096, len(text))
            text += part
        return list(map(int, text.split()))

    def descendants(self, roots: list[int]) -> list[int]:
        """These processes with their children and all that come from them, each once."""
        parents = None if self._list >= 0 else _parents()
        found = dict.fromkeys(roots)
        row = roots
        while row:
            below = [child for pid in row for child in (_children_of(pid) if parents is None else _of(pid, parents))]
            row = [pid for pid in below if pid not in found]
            found.update(dict.fromkeys(row))
        return list(found)

    def end(self) -> None:
        """Kill until nobody is left."""
        while True:
            for pid in self.children():
                signal_group_of(pid, signal.SIGKILL)
                send_signal(pid, signal.SIGKILL)
            try:
                os.wait()
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass  # there may be thousands that nobody reaped
            except ChildProcessError:
                return


def resident_kib(pid: int) -> int | None:
    """Of /proc/PID/statm; None where it has ended."""
    try:
        with open("/proc/%d/statm" % pid) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except (OSError, IndexError):
        return None


def share_kib(pid: int) -> int:
    """The process's share of what it has in memory, of which others may have the same (Pss of proc(5)).

    Its resident memory where the kernel does not tell: of another user's, or before Linux 4.14.
    """
    try:
        with open("/proc/%d/smaps_rollup" % pid, "rb") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(b"Pss:"))
    except (OSError, StopIteration):
        return resident_kib(pid) or 0


def tasks(pid: int) -> int:
    """How many threads it has, the first counted; 0 where it has ended. They are folders in one of procfs."""
    try:
        return os.stat("/proc/%d/task" % pid).st_nlink - 2
    except OSError:
        return 0


def _children_of(pid: int) -> list[int]:
    """Of all its threads; none where it has ended."""
    found = []
    try:
        for thread in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/children" % (pid, thread)) as file:
                found += [int(child) for child in file.read().split()]
    except OSError:
        pass
    return found


def children_by_scan() -> list[int]:
    return _of(os.getpid(), _parents())


def _of(parent: int, parents: dict[int, int | None]) -> list[int]:
    return [pid for pid, its in parents.items() if its == parent]


def _parents() -> dict[int, int | None]:
    """Of every process. What ended while /proc was read may have left a child that was not there yet: then again."""
    for _ in range(SCANS):
        parents = {int(name): _parent(name) for name in os.listdir("/proc") if name.isdigit()}
        if None not in parents.values():
            break
    return parents


def _parent(pid: str) -> int | None:
    """The fourth field of /proc/PID/stat, after a name in brackets that may hold anything; None where it has ended."""
    try:
        with open("/proc/%s/stat" % pid, "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:  # hidepid: another user's
        return 0


def signal_group(group: int, number: int) -> bool:
    """Whether there is such a group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # only a set-user-ID program is left
    return True


def signal_group_of(pid: int, number: int) -> None:
    """To all in the group of a child at once: none gets away by forking. The helper's own group is spared."""
    try:
        group = os.getpgid(pid)
    except ProcessLookupError:
        return
    if group != os.getpgrp():
        signal_group(group, number)


def send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
