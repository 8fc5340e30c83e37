"""What a server and all that it started take of the machine, read from /proc."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

MB = 2**20
N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class Tree:
    """A process and its descendants at one moment; MB are MiB.

    `rss_mb` and `fds` are the process's own, `tree_fds` and `processes` those of all. `pss_mb` is the memory of all
    without counting shared pages twice (proc(5), Pss of smaps_rollup). What the kernel does not show is None.
    """

    rss_mb: float
    pss_mb: float | None
    fds: int
    tree_fds: int | None
    processes: int

    @property
    def children(self) -> int:
        return self.processes - 1


def look(pid: int) -> Tree:
    """The tree of `pid`, which must be there. A process that ends meanwhile is left out."""
    root = psutil.Process(pid)
    processes = family(root)
    return Tree(
        rss_mb=root.memory_info().rss / MB,
        pss_mb=_sum(processes, lambda process: process.memory_full_info().pss / MB),
        fds=root.num_fds(),
        tree_fds=_sum(processes, psutil.Process.num_fds),
        processes=len(processes),
    )


def cpu_s(pid: int) -> float:
    """User and system time of a process and all that it ever started: proc(5), utime + stime + cutime + cstime.

    Whoever ended is counted at its parent, and so at the root in the end, whichever helper had started it; that needs
    no look at the right moment. What is lost is a process that ends between the look at its parent and at itself.
    """
    return sum(_each(family(psutil.Process(pid)), lambda process: float(sum(process.cpu_times()[:4]))))


def family(root: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants, parents first."""
    return [root, *root.children(recursive=True)]


def _sum(processes: list[psutil.Process], read: Callable[[psutil.Process], N]) -> N | None:
    """None where one of them is another user's, or as good as that to the kernel."""
    try:
        return sum(_each(processes, read))
    except psutil.AccessDenied:
        return None


def _each(processes: list[psutil.Process], read: Callable[[psutil.Process], N]) -> list[N]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(read(process))
    return found
