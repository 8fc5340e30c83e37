"""A folder that scratch folders of calls are in, as the bus sees it. Each tier may have its own.

A helper whose scratch is not memory of its own keeps the folders of its calls in `<root>/<mark>` and removes them
itself; where it was killed, the bus does. Of a bus that was killed too, the next one does: each bus holds a lock
(flock(2)) on `<root>/<the bus's mark>.lock` as long as it lives, and what belongs to no held lock is nobody's. Buses of
several users may share a root, and each removes what is its own user's.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from typing import TYPE_CHECKING

from runners.scratch import remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

_OURS = re.compile(r"(aal-[0-9a-f]{16})(?:-[0-9]+|\.lock)")
"""The name of a helper's folder or of a lock, and in it the mark of the bus."""


class ScratchRoot:
    """The root of one bus, which is known by `mark`. Made at once where it is not there. Raises OSError."""

    def __init__(self, path: Path, mark: str) -> None:
        self._path = path
        self._mark = mark
        self.provide()
        self._lock = self._take_lock()

    def provide(self) -> None:
        """Have the folder there. Raises OSError."""
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sweep(self) -> None:
        """As the function, for the other buses."""
        sweep(self._path, but=self._mark)

    def close(self) -> None:
        """Nothing of this bus is there any more."""
        with contextlib.suppress(FileNotFoundError):
            _lock_of(self._path, self._mark).unlink()
        os.close(self._lock)

    def _take_lock(self) -> int:
        """A sweep may remove it between its making and its locking: then it is another file than that at its path."""
        path = _lock_of(self._path, self._mark)
        while True:
            fd = _open_lock(path)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_at(fd, path):
                return fd
            os.close(fd)


def sweep(root: Path, *, but: str = "") -> None:
    """Remove what buses have left that are gone. It blocks; what cannot be removed is logged."""
    try:
        marks = {found[1] for name in _names(root) if (found := _OURS.fullmatch(name)) and _is_own(root / name)}
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("what was left in %s cannot be looked for: %s", root, error)
        return
    for mark in sorted(marks - {but}):
        try:
            _sweep_after(root, mark)
        except OSError as error:
            log.warning("what was left in %s of %s cannot be removed: %s", root, mark, error)


def _sweep_after(root: Path, mark: str) -> None:
    """Remove all of a bus, if it is gone. Raises OSError."""
    with _held(_lock_of(root, mark)) as is_held:
        if not is_held:
            return
        for name in _names(root):
            if name.startswith(f"{mark}-"):
                remove_tree(str(root / name))
        _lock_of(root, mark).unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:  # another bus has just removed it
        return False


def _lock_of(root: Path, mark: str) -> Path:
    return root / f"{mark}.lock"


def _names(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return [entry.name for entry in entries]


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[bool]:
    """Have the lock, or False where another has. Raises OSError."""
    fd = _open_lock(lock)
    try:
        yield _lock_now(fd)
    finally:
        os.close(fd)


def _lock_now(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
