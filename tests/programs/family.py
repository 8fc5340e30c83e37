"""A process that has children, and asks the launcher about them: `python -m tests.programs.family CHECK`."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from runners import descendants, launcher


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
    family = descendants.Family()
    assert family.children() == []
    pids = [a_child(b"a) R 1 ("), *(a_child() for _ in range(700))]
    os.kill(pids[0], signal.SIGKILL)
    os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
    assert family.children() == pids  # a zombie is one, too
    assert sorted(descendants.children_by_scan()) == sorted(pids)  # they may have begun anew at 1
    family.end()
    assert family.children() == descendants.children_by_scan() == []


def a_whole_group_but_its_own() -> None:
    own, other, beside = a_child(), a_child(), a_child()
    os.setpgid(other, other)
    os.setpgid(beside, other)
    for pid in (own, other):
        descendants.signal_group_of(pid, signal.SIGKILL)
    assert os.waitpid(other, 0)[1] == os.waitpid(beside, 0)[1] == signal.SIGKILL
    assert os.waitpid(own, os.WNOHANG) == (0, 0)


def a_launcher() -> launcher.Launcher:
    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return launcher.Launcher(ours, None, "mark", environment={})


def an_orphan_that_takes_its_time_as_one() -> None:
    ours = a_launcher()
    pid = a_child()
    for _ in range(5):  # it is not reaped, and so there
        assert ours._orphans_left()
    assert ours._sweeps == 1
    ours._bury(pid)
    assert not ours._orphans_left()
    a_child()
    assert ours._orphans_left()
    assert ours._sweeps == 2


ENDS = (
    (launcher.SWEEPS, signal.SIGKILL),
    (launcher.SWEEPS + 1, signal.SIGTERM),
    (launcher.SWEEPS + 1, signal.SIGKILL),
)
"""Sweeps until then, and what ends a call."""


def as_lost_only_what_was_killed_with_the_rest() -> None:
    ours = a_launcher()
    ours.in_namespace = True
    for number, (sweeps, by) in enumerate(ENDS):
        ours._sweeps = sweeps
        pid = ours._pids[number] = a_child()
        ours._calls[pid] = number
        ours._watch.begin(number, 0)
        os.kill(pid, by)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        ours._bury(pid)
    assert [lost for *_, lost in ours._ended] == [None, None, launcher.LOST]


CHECKS = {
    check.__name__: check
    for check in (
        however_many_and_whatever_their_names,
        a_whole_group_but_its_own,
        an_orphan_that_takes_its_time_as_one,
        as_lost_only_what_was_killed_with_the_rest,
    )
}

if __name__ == "__main__":
    try:
        CHECKS[sys.argv[1]]()
    finally:
        descendants.Family().end()
