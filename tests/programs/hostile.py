"""A program that misbehaves, for a helper to hold: `hostile.py TOKEN WAY [ARGUMENT]`.

It says `ready` once it has done its worst, and then runs until its stdin ends. Whatever it leaves behind has TOKEN in
its environment or its command line, and holds its stdout.
"""

from __future__ import annotations

import os
import signal
import sys
import time

TYPE_CHECKING = False  # typing takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import NoReturn

PR_SET_CHILD_SUBREAPER = 36
ENDED = 7
"""The exit status of what was let go."""


def hold() -> None:
    os.write(1, b"ready\n")
    while os.read(0, 4096):
        pass


def linger() -> NoReturn:
    while True:
        signal.pause()


def beside(do: Callable[[], object]) -> None:
    """Do it in a child, and go on once that has said that it is there."""
    said, says = os.pipe()
    if os.fork():
        os.close(says)
        os.read(said, 1)
        os.close(said)
        return
    do()
    os.write(says, b".")
    os.close(says)
    linger()


def daemon(do: Callable[[], object] = lambda: None) -> None:
    """Leave a grandchild behind, in a session of its own."""

    def between() -> NoReturn:
        os.setsid()
        beside(do)
        os._exit(0)

    pid = os.fork()
    if not pid:
        between()
    os.waitpid(pid, 0)


def deaf() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def unknown() -> NoReturn:
    """A new program without any environment. That it runs shows in the end of the pipe, which it does not inherit."""
    code = "import signal; signal.pause()"
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", code, sys.argv[1]], {})


def comet() -> NoReturn:
    """For ever a child of the last one, which ends: no process is there for long."""
    os.closerange(3, 20)
    os.setsid()
    while True:
        if os.fork():
            os._exit(0)


def restless_comet() -> NoReturn:
    """A comet of which no two processes share a group."""
    os.closerange(3, 20)
    while True:
        if os.fork():
            os._exit(0)
        os.setsid()


def stop_in_a_moment() -> None:
    if not os.fork():
        os.kill(os.getpid(), signal.SIGSTOP)


def keep_orphans() -> None:
    import ctypes  # noqa: PLC0415  # slow

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    daemon()


def crowd() -> None:
    for _ in range(20):
        daemon()


def burn(cpu_ms: int) -> None:
    while time.process_time() < cpu_ms / 1000:
        pass
    hold()


def flood() -> NoReturn:
    os.write(1, b"ready\n")
    while True:
        os.write(1, bytes(65536))


def stop(signal_it: Callable[[int, int], None], whom: int) -> None:
    os.write(1, b"ready\n")
    signal_it(whom, signal.SIGSTOP)


def kill_all() -> None:
    os.kill(-1, signal.SIGKILL)
    hold()


def signal_parent(numbers: Collection[int]) -> None:
    for number in sorted(numbers):
        os.kill(os.getppid(), number)
    hold()


def descriptors() -> None:
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # pathlib is slow to import
        try:
            os.fstat(int(name))
        except OSError:  # the listing's own
            continue
        found.append(name)
    os.write(1, " ".join(sorted(found)).encode() + b"\n")


def fill(mib: int) -> None:
    memory = bytearray(mib << 20)
    memory[::4096] = b"." * len(memory[::4096])
    hold()


def fill_beside(way: Callable[[Callable[[], object]], object], mib: int) -> None:
    """Memory that a child has, or a daemon."""
    memory = []

    def take() -> None:
        memory.append(bytearray(mib << 20))
        memory[0][::4096] = b"." * len(memory[0][::4096])

    way(take)
    hold()


LEFT: dict[str, Callable[[], object]] = {
    "orphan": lambda: beside(lambda: None),
    "daemon": daemon,
    "daemon of a daemon": lambda: daemon(daemon),
    "deaf": lambda: daemon(deaf),
    "unknown": lambda: daemon(unknown),
    "comet": lambda: daemon(comet),
    "restless comet": lambda: daemon(restless_comet),
    "stopped": lambda: daemon(stop_in_a_moment),
    "keeper": lambda: daemon(keep_orphans),
    "crowd": crowd,
}
"""What is left behind, by its name."""

WAYS: dict[str, Callable[[int], object]] = {
    "hold": lambda _: hold(),
    "burn": burn,
    "fill": fill,
    "fill child": lambda mib: fill_beside(beside, mib),
    "fill daemon": lambda mib: fill_beside(daemon, mib),
    "flood": lambda _: flood(),
    "stop": lambda _: stop(os.kill, os.getpid()),
    "stop group": lambda _: stop(os.killpg, 0),
    "kill all": lambda _: kill_all(),
    "signal parent": lambda number: signal_parent({number}),
    "signal parent variously": lambda _: signal_parent(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}),
    "descriptors": lambda _: descriptors(),
    "die": lambda number: os.kill(os.getpid(), number),
    "exit": sys.exit,
}
"""What else it may do, by its name."""


def main(way: str, argument: int) -> None:
    if way in LEFT:
        LEFT[way]()
        hold()
    else:
        WAYS[way](argument)
    sys.exit(ENDED)


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
