"""Locks of all processes and threads, which nobody waits for without end.

`flock` has no deadline and no order. That who has just released a lock is the first to have it again is as it should
be: it knows what is there now, and the others wait anyhow; a lock that went from one to the next each time would make
most patches stale. But nobody is to starve. So there is a second lock beside each, its turnstile: who has waited for
`PATIENT_S` holds it until it has the lock, and whoever comes then stands behind it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import threading
import time
from typing import TYPE_CHECKING

from aos_context.errors import BusyError
from aos_context.files import FILE_MODE, make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK_WAIT_S = 10.0
"""How long a call waits for a lock that others hold: a change takes milliseconds, a large pack seconds."""
PATIENT_S = 0.5
"""How long it waits before the others have to let it pass."""
PAUSE_LEAST_S, PAUSE_MOST_S = 0.0002, 0.02
"""Between two looks whether the lock is free; they grow by random parts, lest those who wait keep step."""
TURN_PAUSE_S = 0.001
"""The longest of these of the one at the turnstile, and of those behind it."""
TURNSTILE = ".turn"
"""What the turnstile's name has behind that of its lock."""


class _Held(threading.local):
    """The lock files that this thread has locked, by device and inode."""

    def __init__(self) -> None:
        self.files: set[tuple[int, int]] = set()


_held = _Held()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of all processes and threads on a file of its own (flock); it ends with the process.

    A thread that has it may take it again. So nothing is awaited meanwhile: another task would be the same thread.
    Raises `BusyError` where others, or one that was stopped, hold it for `LOCK_WAIT_S`.
    """
    make_folder(path.parent)
    fd = _opened(path)
    try:
        found = os.fstat(fd)
        file = (found.st_dev, found.st_ino)
        if file in _held.files:
            yield
            return
        _take(fd, path)
        _held.files.add(file)
        try:
            yield
        finally:
            _held.files.discard(file)
    finally:
        os.close(fd)


def _take(fd: int, path: Path) -> None:
    began = time.monotonic()
    deadline = began + LOCK_WAIT_S
    turnstile = _opened(path.with_name(path.name + TURNSTILE))
    try:
        if _got(turnstile, fcntl.LOCK_SH, deadline, TURN_PAUSE_S):
            fcntl.flock(turnstile, fcntl.LOCK_UN)
            if _got(fd, fcntl.LOCK_EX, min(began + PATIENT_S, deadline), PAUSE_MOST_S):
                return
            if _got(turnstile, fcntl.LOCK_EX, deadline, TURN_PAUSE_S) and _got(
                fd, fcntl.LOCK_EX, deadline, TURN_PAUSE_S
            ):
                return
    finally:
        os.close(turnstile)
    hint = "Try again: many may wait for it. If it stays so, see who holds it (lslocks): a stopped process keeps it."
    raise BusyError(f"{path} has been held by others for {LOCK_WAIT_S:g} s", hint=hint, file=str(path))


def _got(fd: int, kind: int, deadline: float, most_s: float) -> bool:
    """Lock it, shared or not; False where others have it until the deadline. flock has none, so it is tried."""
    pause_s = PAUSE_LEAST_S
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        else:
            return True
        time.sleep(pause_s)
        pause_s = min(pause_s * random.uniform(1, 2), most_s)  # noqa: S311  # nothing secret


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
