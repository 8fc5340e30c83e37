"""Attempts at other processes: of the bus, of another overlay, of the same call."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kernel import syscall  # type: ignore[import-not-found]  # a copy stands beside it
from telling import NothingGainedError  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.escape.programs.telling import Facts

PTRACE_ATTACH = 16
PR_SET_NAME = 15


def read_first_environment(facts: Facts) -> str:
    return _secret_in(Path("/proc/1/environ").read_bytes(), facts)


def read_environment_of_bus(facts: Facts) -> str:
    return _secret_in(_of_bus(facts, "environ").read_bytes(), facts)


def read_any_environment(facts: Facts) -> str:
    """Of whichever process can be seen."""
    read = b""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            read += (folder / "environ").read_bytes()
        except OSError:
            continue
    return _secret_in(read, facts)


def read_own_environment(facts: Facts) -> str:
    """What the bus was started with is not handed on."""
    return _secret_in(Path("/proc/self/environ").read_bytes() + repr(dict(os.environ)).encode(), facts)


def read_memory_of_bus(facts: Facts) -> None:
    os.close(os.open(_of_bus(facts, "mem"), os.O_RDONLY))


def read_descriptors_of_bus(facts: Facts) -> list[str]:
    return [str(link.readlink()) for link in _of_bus(facts, "fd").iterdir()]


def read_by_root_of_bus(facts: Facts) -> str:
    return Path(f"{_of_bus(facts, 'root')}{facts['outside']}/file").read_text()


def read_memory_of_sibling(facts: Facts) -> None:
    os.close(os.open(f"/proc/{facts['sibling']}/mem", os.O_RDONLY))


def read_environment_of_sibling(facts: Facts) -> int:
    found = Path(f"/proc/{facts['sibling']}/environ").read_bytes()
    if b"OVERLAY_STATE=" not in found:
        raise NothingGainedError(f"{len(found)} bytes of another process")
    return len(found)


def spare_from_memory_killer(facts: Facts) -> None:
    """By the value that is there: who may write that may write any."""
    path = _of_bus(facts, "oom_score_adj")
    path.write_text(path.read_text())


def signal_bus(facts: Facts) -> None:
    os.kill(facts["bus"], 0)


def signal_sibling(facts: Facts) -> None:
    os.kill(facts["sibling"], 0)


def signal_group_of_bus(facts: Facts) -> None:
    os.killpg(facts["bus_group"], 0)


def signal_bus_by_descriptor(facts: Facts) -> None:
    fd = os.pidfd_open(facts["bus"])
    signal.pidfd_send_signal(fd, 0)


def signal_thread_of_bus(facts: Facts) -> None:
    """By tgkill(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.tgkill(facts["bus"], facts["bus"], 0) != 0:
        raise OSError(ctypes.get_errno(), "tgkill")


def slow_bus(facts: Facts) -> None:
    """By the priority that it has: who may set that may set a lower one."""
    os.setpriority(os.PRIO_PROCESS, facts["bus"], os.getpriority(os.PRIO_PROCESS, facts["bus"]))


def bind_bus(facts: Facts) -> None:
    os.sched_setaffinity(facts["bus"], os.sched_getaffinity(facts["bus"]))


def schedule_bus(facts: Facts) -> None:
    os.sched_setscheduler(facts["bus"], os.sched_getscheduler(facts["bus"]), os.sched_getparam(facts["bus"]))


def find_system_v_memory(facts: Facts) -> int:
    """Which has no path, only a key (shmget(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: int = libc.shmget(facts["shared_key"], 1, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    return found


def trace_bus(facts: Facts) -> None:
    syscall("ptrace", PTRACE_ATTACH, facts["bus"], 0, 0)


def trace_sibling(facts: Facts) -> None:
    syscall("ptrace", PTRACE_ATTACH, facts["sibling"], 0, 0)


def trace_own_child(_: Facts) -> None:
    for child in _child():
        syscall("ptrace", PTRACE_ATTACH, child, 0, 0)


def read_child_by_vm(_: Facts) -> None:
    """process_vm_readv(2) needs the rights of ptrace(2)."""
    for child in _child():
        syscall("process_vm_readv", child, None, 0, None, 0, 0)


def take_descriptor_of_child(_: Facts) -> None:
    """pidfd_getfd(2): so, the socket to the bus of whoever has one."""
    for child in _child():
        os.close(syscall("pidfd_getfd", os.pidfd_open(child), 0, 0))


def compare_with_child(_: Facts) -> None:
    for child in _child():
        syscall("kcmp", os.getpid(), child, 0, 0, 0)


def limit_bus(facts: Facts) -> None:
    limits = resource.prlimit(facts["bus"], resource.RLIMIT_NOFILE)
    resource.prlimit(facts["bus"], resource.RLIMIT_NOFILE, limits)


def kill_own_child(_: Facts) -> str:
    """Which every phase allows."""
    for child in _child():
        os.kill(child, signal.SIGTERM)
    return "killed"


def run_on(facts: Facts) -> str:
    """Fork twice, in a session of its own, with no stream left: a daemon, which can be known by its name."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(PR_SET_NAME, facts["mark"].encode())
            os.write(writer, b"%d" % os.getpid())
            os.closerange(0, writer + 1)
            time.sleep(600)
        os._exit(0)
    os.close(writer)
    os.wait()
    return os.read(reader, 20).decode()


def wait_for_end(_: Facts) -> None:
    """The sibling: what others try to reach. It says that it runs."""
    (Path(os.environ["OVERLAY_STATE"]) / "runs").write_text("yes")
    time.sleep(600)


def _child() -> Iterator[int]:
    """One that waits, until it is done with."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _of_bus(facts: Facts, name: str) -> Path:
    return Path(f"/proc/{facts['bus']}/{name}")


def _secret_in(text: bytes, facts: Facts) -> str:
    if facts["secret"].encode() not in text:
        raise NothingGainedError(f"the secret is not in {len(text)} bytes")
    return "the secret of the bus"
