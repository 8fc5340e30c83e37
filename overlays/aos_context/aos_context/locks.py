"""Locks of all processes and threads, which are taken in turns.

`flock` has no deadline and no order: who has just released a lock is faster than all who wait for it. So there is a
second lock beside each, its turnstile: who wants the lock holds the turnstile until it has the lock. Who has just
released it has to pass there, too, behind the one that waits already. Within a process threads stand in line, so that
one of them competes with other processes, and each process has its share, however many its threads are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from aos_context.errors import BusyError
from aos_context.files import FILE_MODE, make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    File = tuple[int, int]

LOCK_WAIT_S = 10.0
"""How long a call waits for a lock that others hold: a change takes milliseconds, a large pack seconds."""
TURN_PAUSE_LEAST_S, TURN_PAUSE_MOST_S = 0.0001, 0.0005
"""Between two looks whether the turnstile is free. It never grows: who has waited longer is not to look less often."""
LOCK_PAUSE_LEAST_S, LOCK_PAUSE_MOST_S, LOCK_PAUSE_SHARE = 0.00005, 0.001, 0.1
"""Between two looks of the one at the turnstile, whose turn nobody can take: a share of what it has waited."""
TURNSTILE = ".turn"
"""What the turnstile's name has behind that of its lock."""


class _Held(threading.local):
    """The lock files that this thread has locked, by device and inode."""

    def __init__(self) -> None:
        self.files: set[File] = set()


_held = _Held()
_lines: dict[File, deque[threading.Event]] = {}
"""The threads that have a lock or want it, in the order in which they came; the first has its turn."""
_mutex = threading.Lock()


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
        deadline = time.monotonic() + LOCK_WAIT_S
        with _turn(file, path, deadline):
            _take(fd, path, deadline)
            _held.files.add(file)
            try:
                yield
            finally:
                _held.files.discard(file)
                fcntl.flock(fd, fcntl.LOCK_UN)  # before the next thread has its turn
    finally:
        os.close(fd)


@contextlib.contextmanager
def _turn(file: File, path: Path, deadline: float) -> Iterator[None]:
    """Be the first of this process's threads that want the file."""
    mine = threading.Event()
    with _mutex:
        line = _lines.setdefault(file, deque())
        line.append(mine)
        line[0].set()
    try:
        if not mine.wait(max(0.0, deadline - time.monotonic())):
            raise _busy(path)
        yield
    finally:
        with _mutex:
            line.remove(mine)
            if line:
                line[0].set()
            elif _lines.get(file) is line:
                del _lines[file]


def _take(fd: int, path: Path, deadline: float) -> None:
    """flock has no deadline, so it is tried."""
    turnstile = _opened(path.with_name(path.name + TURNSTILE))
    try:
        while not _tried(turnstile, path, deadline):  # by random pauses, lest those who wait keep step
            time.sleep(random.uniform(TURN_PAUSE_LEAST_S, TURN_PAUSE_MOST_S))  # noqa: S311  # nothing secret
        began = time.monotonic()
        while not _tried(fd, path, deadline):
            waited = time.monotonic() - began
            time.sleep(min(max(waited * LOCK_PAUSE_SHARE, LOCK_PAUSE_LEAST_S), LOCK_PAUSE_MOST_S))
    finally:
        os.close(turnstile)


def _tried(fd: int, path: Path, deadline: float) -> bool:
    """Whether it is locked now. Raises `BusyError` where it is not at the deadline."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if time.monotonic() >= deadline:
            raise _busy(path) from None
        return False
    return True


def _busy(path: Path) -> BusyError:
    hint = "Try again: many may wait for it. If it stays so, see who holds it (lslocks): a stopped process keeps it."
    return BusyError(f"{path} has been held by others for {LOCK_WAIT_S:g} s", hint=hint, file=str(path))


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)


def _forget_lines() -> None:
    """In a process that was forked: none of those who stood in line is there."""
    global _mutex  # noqa: PLW0603  # the old one may be held by a thread that is not there
    _mutex = threading.Lock()
    _lines.clear()


os.register_at_fork(after_in_child=_forget_lines)
