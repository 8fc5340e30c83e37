"""A process that has children, and asks the launcher about them: `python -m tests.programs.family CHECK`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from runners import launcher


def a_child(name: bytes = b"") -> int:
    """One that waits for a signal, once it has its name."""
    said, says = os.pipe()
    pid = os.fork()
    if not pid:
        if name:
            Path("/proc/self/comm").write_bytes(name)
        os.close(says)
        while True:
            signal.pause()
    os.close(says)
    if name:
        os.read(said, 1)
    os.close(said)
    return pid


def however_many_and_whatever_their_names() -> None:
    family = launcher.Family()
    assert family.children() == []
    pids = [a_child(b"a) R 1 ("), *(a_child() for _ in range(700))]
    os.kill(pids[0], signal.SIGKILL)
    os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
    assert family.children() == pids  # a zombie is one, too
    assert sorted(launcher._children_by_scan()) == pids
    family.end()
    assert family.children() == launcher._children_by_scan() == []


def a_whole_group_but_its_own() -> None:
    own, other, beside = a_child(), a_child(), a_child()
    os.setpgid(other, other)
    os.setpgid(beside, other)
    for pid in (own, other):
        launcher._signal_group_of(pid, signal.SIGKILL)
    assert os.waitpid(other, 0)[1] == os.waitpid(beside, 0)[1] == signal.SIGKILL
    assert os.waitpid(own, os.WNOHANG) == (0, 0)


CHECKS = {check.__name__: check for check in (however_many_and_whatever_their_names, a_whole_group_but_its_own)}

if __name__ == "__main__":
    try:
        CHECKS[sys.argv[1]]()
    finally:
        launcher.Family().end()
