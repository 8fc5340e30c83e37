"""The scratch folders of the calls of one helper, and the removal of whatever a program leaves in one.

Part of the helper (`launcher.py`), under the same rules; of the bus only `remove_tree` is used. `shutil.rmtree` is not
for trees that somebody has built to break it: thousands of levels, folders that nobody may enter.
"""

from __future__ import annotations

import errno
import os
from stat import S_ISDIR

SHARED_MEMORY = "/dev/shm"  # noqa: S108  # it is mounted anew for each helper
"""Where POSIX semaphores and shared memory lie (shm_overview(7))."""

NAMES = ("OVERLAY_SCRATCH", "TMPDIR")
"""The environment variables that tell a program its folder."""

OWNER = 0o700
"""The mode of a folder that its owner can list, enter and change."""


def folder_of(root: str, mark: str, private: bool) -> str:
    """Where the folders of the calls of a helper lie: `root` where it is mounted for that helper alone."""
    return root if private else "%s/%s" % (root, mark)


class Scratch:
    """Makes a folder for each call in `folder`, which no other helper uses.

    The programs of the same rights may do there whatever they like. With `shared_memory` that is the helper's own, too.
    Paths are of the type of `folder`: str or bytes.
    """

    def __init__(self, folder: str | bytes, shared_memory: bool) -> None:
        self._folder = folder
        self._folder_of = b"%s/%d" if isinstance(folder, bytes) else "%s/%d"
        self._shared = SHARED_MEMORY if shared_memory and os.path.isdir(SHARED_MEMORY) else None

    def make(self, call: int) -> str | bytes:
        """The new and empty folder of a call. Raises OSError."""
        path = self._path(call)
        try:
            os.mkdir(path, OWNER)
        except OSError:  # another program has put something there, or made the place one that cannot be written
            os.close(_enter(self._folder))
            remove_tree(path)
            os.mkdir(path, OWNER)
        return path

    def remove(self, call: int) -> None:
        """What cannot be removed is so with all, when the helper has ended."""
        path = self._path(call)
        try:
            os.rmdir(path)
        except OSError:
            try:
                remove_tree(path)
            except OSError:
                pass

    def empty_shared_memory(self) -> None:
        """What calls left there, when none runs."""
        if self._shared is not None and os.listdir(self._shared):
            try:
                _empty(self._shared)
            except OSError:
                pass

    def _path(self, call: int) -> str | bytes:
        return self._folder_of % (self._folder, call)


def remove_tree(path: str | bytes) -> None:
    """Remove what is at a path, if anything is: of a folder all that is in it, of a link the link.

    The folders may be of any depth and, where this process owns them, of any mode. It holds two descriptors at a time.
    Raises OSError where something cannot be removed, or is moved meanwhile.
    """
    try:
        if _is_folder(path):
            _empty(path)
            os.rmdir(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def _is_folder(path: str | bytes) -> bool:
    return S_ISDIR(os.lstat(path).st_mode)


class _Level:
    """A folder on the way down: which it is, and the names of the folders in it that are still to be removed."""

    def __init__(self, fd: int) -> None:
        self.identity = _identity(fd)
        self.left = _remove_most(fd)


def _empty(path: str | bytes) -> None:
    fd = _enter(path)
    try:
        levels = [_Level(fd)]
        while levels:
            if levels[-1].left:
                fd = _go(fd, _enter(levels[-1].left[-1], fd))
                levels.append(_Level(fd))
            else:
                levels.pop()
                if levels:
                    fd = _go(fd, _enter("..", fd))
                    _remove_below(fd, levels[-1])
    finally:
        os.close(fd)


def _go(here: int, there: int) -> int:
    os.close(here)
    return there


def _remove_below(fd: int, level: _Level) -> None:
    """Remove the folder that was just emptied. The one above it must be that from which it was entered."""
    if _identity(fd) != level.identity:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    os.rmdir(level.left.pop(), dir_fd=fd)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _remove_most(fd: int) -> list[str]:
    """Remove from a folder what is no folder, and folders that are empty. Returns the names of the others."""
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    return [name for name, is_folder in found if not _removed(name, is_folder, fd)]


def _removed(name: str, is_folder: bool, fd: int) -> bool:
    try:
        (os.rmdir if is_folder else os.unlink)(name, dir_fd=fd)
    except FileNotFoundError:
        pass
    except OSError:
        if not is_folder:
            raise
        return False
    return True


def _enter(name: str | bytes, above: int | None = None) -> int:
    """Open a folder, and no link to one, that its owner can use then. A path leads to any, a descriptor to this one."""
    held = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    try:
        itself = "/proc/self/fd/%d" % held
        if os.fstat(held).st_mode & OWNER != OWNER:
            os.chmod(itself, OWNER)
        return os.open(itself, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(held)
