"""Hidden folders for what is not done yet: gone when it is done or fails, and swept where its maker was killed.

A maker holds a lock on its folder (flock) as long as it lives. By that a sweeper tells what was left behind from what
others are working in, with no guess by age or process id.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = ".making-"


@contextlib.contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A new folder in `parent` (None: the system's temporary folder), as long as the block lasts. Raises `OSError`."""
    folder, fd = _made(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def sweep(parent: Path) -> None:
    """Remove what was left in `parent` by makers that are no more."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is gone, is no folder, or is in use
            fd = _opened(folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)


def _made(parent: Path | None) -> tuple[Path, int]:
    """A folder and its lock. One that was swept before it was locked is made again."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            fd = _opened(folder)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if folder.stat().st_ino == os.fstat(fd).st_ino:
                    return folder, fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
