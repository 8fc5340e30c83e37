"""What a hostile program does when it is told to. Whatever returns is followed by an ordinary reply."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading

TYPE_CHECKING = False  # typing is slow to import, and every call would do it
if TYPE_CHECKING:
    from typing import NoReturn

LARGEST_FILE = 4 * 2**20
BLOCK = b"x" * 65536


def answer(_: int) -> None:
    """Do no harm."""


def sleep(_: int) -> NoReturn:
    while True:
        signal.pause()


def deaf(_: int) -> NoReturn:
    """Ignore every signal that can be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sleep(0)


def stop(_: int) -> None:
    """A stopped process handles no TERM."""
    os.kill(os.getpid(), signal.SIGSTOP)


def threads(_: int) -> NoReturn:
    for _ in range(8):
        threading.Thread(target=threading.Event().wait).start()
    sleep(0)


def mute(_: int) -> NoReturn:
    os.closerange(0, 3)
    sleep(0)


def fork(_: int) -> None:
    """Leave a child behind that holds every descriptor."""
    if os.fork() == 0:
        sleep(0)


def detach() -> bool:
    """Fork twice. True in a process that has lost its parent and its session."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    return True


def double_fork(_: int) -> None:
    """Leave a process behind that has lost its parent and its session."""
    if detach():
        sleep(0)


def daemonise(_: int) -> None:
    """As daemon(7) has it, and with an empty environment: nothing tells whose it was."""
    if not detach():
        return
    os.chdir("/")
    os.closerange(0, 1024)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.execve("/bin/sleep", ["sleep", "600"], {})


def run_away(_: int) -> None:
    """Leave a process behind that forks and ends for ever: whoever kills it by its number comes too late."""
    if os.fork():
        return
    os.closerange(0, 3)
    while True:
        os.setsid()
        if os.fork():
            os._exit(0)


def fill(_: int) -> None:
    """Write to the state folder until the disk is full, or the file may not grow. Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, hard))
    file = os.open(os.path.join(os.environ["OVERLAY_STATE"], "fill"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # noqa: PTH118
    try:
        with contextlib.suppress(OSError):
            while True:
                os.write(file, BLOCK)
    finally:
        os.close(file)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leave(status: int) -> NoReturn:
    """End with a status, and without a word."""
    os._exit(status)


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def flood(_: int) -> NoReturn:
    while True:
        os.write(1, BLOCK)


def parricide(_: int) -> None:
    """Kill whoever started this program."""
    os.kill(os.getppid(), signal.SIGKILL)


def do(payload: dict[str, int | str]) -> int | str:
    """Do what the payload says under `do`, with the number under `with`, and give back its `nonce`."""
    sys.stderr.write(f"{payload['do']}\n")
    sys.stderr.flush()
    globals()[str(payload["do"])](payload["with"])
    return payload["nonce"]
