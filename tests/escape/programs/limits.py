"""Attempts to take more than is given: of disk, descriptors, processes, memory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kernel import syscall  # type: ignore[import-not-found]  # a copy stands beside it
from telling import NothingGainedError  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from tests.escape.programs.telling import Facts

MIB = 2**20
MANY = 100_000
PATIENCE_MS = 20_000
CLONE_PARENT = 0x8000
PR_SET_CHILD_SUBREAPER = 36
WAIT = "import signal; signal.pause()"


def fill_scratch(facts: Facts) -> int:
    """One file that grows."""
    written = 0
    with (Path(os.environ["OVERLAY_SCRATCH"]) / "big").open("wb", buffering=0) as file:
        while written < 2 * facts["scratch_mb"] * MIB:
            written += file.write(bytes(MIB))
    return written


def fill_scratch_with_many(facts: Facts) -> int:
    """Files of which none is too large. The call is ended for them, whether or not there was room for the last."""
    folder = Path(os.environ["OVERLAY_SCRATCH"])
    with contextlib.suppress(OSError):
        for number in range(2 * facts["scratch_mb"]):
            with (folder / str(number)).open("wb", buffering=0) as file:
                file.write(bytes(MIB))
    time.sleep(600)
    return 0


def fill_shared_memory(facts: Facts) -> int:
    written = 0
    path = Path("/dev/shm/big")
    with path.open("wb", buffering=0) as file:
        try:
            while written < 2 * facts["scratch_mb"] * MIB:
                written += file.write(bytes(MIB))
        finally:
            path.unlink()
    return written


def open_many_files(_: Facts) -> int:
    with contextlib.ExitStack() as held:
        for _number in range(MANY):
            held.callback(os.close, os.open("/dev/null", os.O_RDONLY))
    return MANY


def start_many_processes(facts: Facts) -> int:
    """Each waits. The call is ended for them, not any one refused."""
    for _number in range(4 * facts["max_processes"]):
        if os.fork() == 0:
            signal.pause()
    time.sleep(600)
    return 0


def start_many_siblings(facts: Facts) -> int:
    """Each has this process's parent for its own."""
    for _number in range(4 * facts["max_processes"]):
        if syscall("clone", CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            signal.pause()
    time.sleep(600)
    return 0


def leave_many_behind(facts: Facts) -> int:
    """Each in a session of its own, without parents, and where it may execute without the environment of the call."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    made = 4 * facts["max_processes"]
    alive = {_orphan() for _number in range(made)}
    poll = select.poll()
    for held in alive:
        poll.register(held, 0)
    while len(alive) > facts["max_processes"]:
        ended = {fd for fd, _ in poll.poll(PATIENCE_MS)}
        if not ended:
            return len(alive)
        for fd in ended:
            poll.unregister(fd)
        alive -= ended
    raise NothingGainedError(f"{len(alive)} of {made} are left")


def allocate(facts: Facts) -> int:
    """Memory beyond the hard limit, which nobody else could have."""
    mapped = mmap.mmap(-1, 4 * facts["hard_mb"] * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    size = len(mapped)
    mapped.close()
    return size


def allocate_little(facts: Facts) -> int:
    """Half of what is allowed, which every phase gives."""
    with mmap.mmap(-1, facts["hard_mb"] * MIB // 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        return len(mapped)


def raise_limit_of_memory(_: Facts) -> None:
    _set_limit(resource.RLIMIT_DATA, resource.RLIM_INFINITY)


def raise_limit_of_files(_: Facts) -> None:
    """Beyond what was given, up to what root may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    _set_limit(resource.RLIMIT_NOFILE, hard + 1)


def raise_limit_of_core(_: Facts) -> None:
    _set_limit(resource.RLIMIT_CORE, resource.RLIM_INFINITY)


def _orphan() -> int:
    """One end of a pipe, of which a new orphan has the other."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.set_inheritable(theirs, True)
            with contextlib.suppress(OSError):
                os.execve(sys.executable, [sys.executable, "-S", "-c", WAIT], {})
            signal.pause()
        os._exit(0)
    os.wait()
    os.close(theirs)
    return ours


def _set_limit(number: int, value: int) -> None:
    try:
        resource.setrlimit(number, (value, value))
    except ValueError:  # Python's word for EPERM here
        raise PermissionError(errno.EPERM, "not allowed to raise the limit") from None
