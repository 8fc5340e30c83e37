"""The scratch folders of the calls of one helper, their quota, and the removal of whatever a program leaves in one.

What a call has is counted from here, as ordinary users have no quotas of the kernel: a little at a time, while it runs
for long, and at its end, where its folder is not empty then. Memory that is mounted for the helper has room for twice
what one call may have; as long as it is less than half full, nothing is counted.

Part of the helper (`launcher.py`), under the same rules; of the bus only `remove_tree` is used. `shutil.rmtree` is not
for trees that somebody has built to break it: thousands of levels, folders that nobody may enter.
"""

from __future__ import annotations

import errno
import os
from stat import S_ISDIR
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SHARED_MEMORY = "/dev/shm"  # noqa: S108  # it is mounted anew for each helper
"""Where POSIX semaphores and shared memory lie (shm_overview(7))."""

NAMES = ("OVERLAY_SCRATCH", "TMPDIR")
"""The environment variables that tell a program its folder."""

OWNER = 0o700
"""The mode of a folder that its owner can list, enter and change."""


READABLE = 0o500
"""The mode of a folder whose owner can list it and look at what is in it."""

ENTRY_KIB = 4
"""What each entry counts at least, so that empty files are bounded, too: what a file of one byte takes in memory."""

MOST_ENTRIES = 1 << 17
"""Entries of a folder that are counted at most: a third of a second. One that has more has too much."""

STEP_S = 0.01
"""Seconds that are counted for at a time, while programs wait to be started."""

REST = 10
"""How many times as long as it was counted for a folder is left alone then, for each running call."""

TIDY_S = 1.0
"""Seconds between two looks at what programs have put beside their folders."""

BATCH = 64
"""Entries between two looks at the clock."""

TOO_FULL = "too much in scratch: %d KiB, where %d are allowed"
TOO_MANY = "too much in scratch: more than %d files and folders"
TOO_DEEP = "too much in scratch: folders in folders that no path leads to"
TOO_CLOSED = "too much in scratch: a folder that cannot be looked into"
"""What is said of a call that has more than it may."""


NEVER = float("inf")


def folder_of(root: str, mark: str, private: bool) -> str:
    """Where the folders of the calls of a helper lie: `root` where it is mounted for that helper alone."""
    return root if private else "%s/%s" % (root, mark)


class Count:
    """What is in a folder, counted in steps, in KiB of what the file system has given out for it (`st_blocks`).

    A file with several names counts once. No link is followed, not even one in the place of the folder. A program that
    moves what it has meanwhile may have it missed, or counted twice; at its end nobody does. `fault` says why it is too
    much whatever it is; None where nothing says so.
    """

    def __init__(self, folder: str | bytes) -> None:
        self.kib = 0
        self.fault = None  # type: str | None
        self._entries = 0
        self._folders = []  # type: list[Any]
        self._left = [folder]  # type: list[Any]  # paths that were listed and not looked at
        self._linked = set()  # type: set[tuple[int, int]]

    def go_on(self, until: float) -> bool:
        """Count until then, on the clock of `time.monotonic`. True once all is counted."""
        while (self._left or self._folders) and self.fault is None:
            if not self._left:
                self._list(self._folders.pop())
            for _ in range(min(BATCH, len(self._left))):
                self._add(self._left.pop())
            if monotonic() >= until:
                return False
        return True

    def _list(self, folder: Any) -> None:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._entries += 1
                    if self._entries > MOST_ENTRIES:
                        self.fault = TOO_MANY % MOST_ENTRIES
                        return
                    self._left.append(entry.path)
        except PermissionError:
            self.fault = TOO_CLOSED
        except OSError as error:  # it is gone, or has been made something else
            if error.errno == errno.ENAMETOOLONG:
                self.fault = TOO_DEEP

    def _add(self, path: Any) -> None:
        try:
            status = os.lstat(path)
            if S_ISDIR(status.st_mode):
                if status.st_mode & READABLE != READABLE:
                    _open_up(path)
                self._folders.append(path)
        except PermissionError:
            self.fault = TOO_CLOSED
            return
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fault = TOO_DEEP
            return
        if status.st_nlink > 1 and not S_ISDIR(status.st_mode):
            identity = status.st_dev, status.st_ino
            if identity in self._linked:
                self.kib += ENTRY_KIB
                return
            self._linked.add(identity)
        self.kib += max(ENTRY_KIB, status.st_blocks // 2)


class _Use:
    """Of the folder of one call: when it is looked at again at the earliest, and a count that is not yet done."""

    __slots__ = ("count", "rests_until")

    def __init__(self) -> None:
        self.count = None  # type: Count | None
        self.rests_until = 0.0


class Scratch:
    """Makes a folder for each call in `folder`, which no other helper uses, and in which a call may have `most_kib`.

    0 is any amount. The programs of the same rights may do there whatever they like. `mounted` says that it is memory
    of the helper's own. With `shared_memory` so is that. Paths are of the type of `folder`: str or bytes.
    """

    def __init__(self, folder: str | bytes, shared_memory: bool, most_kib: int = 0, mounted: bool = False) -> None:
        self._folder = folder
        self._folder_of = b"%s/%d" if isinstance(folder, bytes) else "%s/%d"
        self._shared = SHARED_MEMORY if shared_memory and os.path.isdir(SHARED_MEMORY) else None
        self._most_kib = most_kib
        self._mounted = mounted
        self._uses = {}  # type: dict[int, _Use]
        self._tidy_at = monotonic() + TIDY_S

    def make(self, call: int) -> str | bytes:
        """The new and empty folder of a call. Raises OSError."""
        path = self._path(call)
        try:
            os.mkdir(path, OWNER)
        except OSError:  # another program has put something there, or made the place one that cannot be written
            os.close(_enter(self._folder))
            remove_tree(path)
            os.mkdir(path, OWNER)
        self._uses[call] = _Use()
        return path

    def remove(self, call: int) -> str | None:
        """Remove the folder of a call that has ended. What it had in it beyond what it may, in words; None for nothing.

        What cannot be removed is so with all, when the helper has ended.
        """
        path = self._path(call)
        excess = None
        try:
            os.rmdir(path)
        except OSError:
            excess = self._excess_at_end(path)
            _remove(path)
        self._uses.pop(call, None)
        if monotonic() >= self._tidy_at:
            self._tidy()
        return excess

    def excess(self, call: int) -> str | None:
        """What a running call has beyond what it may, in words; None for nothing, as far as is known.

        It takes little more than `STEP_S`, and of a large folder is no answer yet.
        """
        now = monotonic()
        if now >= self._tidy_at:
            self._tidy()
        use = self._uses[call]
        if now < use.rests_until or not self._may_be_full():
            return None
        count = use.count or Count(self._path(call))
        use.count = None if count.go_on(now + STEP_S) else count
        done = monotonic()
        use.rests_until = done + REST * len(self._uses) * (done - now)
        return self._judge(count)

    def _may_be_full(self) -> bool:
        """Whether some call could have too much: memory that is mounted is asked as a whole."""
        if not self._most_kib or not self._mounted:
            return bool(self._most_kib)
        try:
            whole = os.statvfs(self._folder)
        except OSError:
            return True
        kib = (whole.f_blocks - whole.f_bfree) * whole.f_frsize // 1024
        return kib + ENTRY_KIB * (whole.f_files - whole.f_ffree) > self._most_kib

    def _excess_at_end(self, path: str | bytes) -> str | None:
        if not self._may_be_full():
            return None
        count = Count(path)
        count.go_on(NEVER)
        return self._judge(count)

    def _judge(self, count: Count) -> str | None:
        """A 64th more may be the file system's own: what it keeps of where the blocks of a file are."""
        if count.kib > self._most_kib + self._most_kib // 64:
            return TOO_FULL % (count.kib, self._most_kib)
        return count.fault

    def _tidy(self) -> None:
        """Remove what programs have put beside the folders of the calls: nobody would count it."""
        self._tidy_at = monotonic() + TIDY_S
        kept = {os.fsencode(self._path(call)) for call in self._uses}
        try:
            with os.scandir(self._folder) as entries:
                beside = [entry.path for entry in entries if os.fsencode(entry.path) not in kept]
        except OSError:
            return
        for path in beside:
            _remove(path)

    def empty_shared_memory(self) -> None:
        """What calls left there, when none runs."""
        if self._shared is not None and os.listdir(self._shared):
            try:
                _empty(self._shared)
            except OSError:
                pass

    def _path(self, call: int) -> str | bytes:
        return self._folder_of % (self._folder, call)


def _remove(path: str | bytes) -> None:
    """As far as that can be."""
    try:
        remove_tree(path)
    except OSError:
        pass


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


def _open_up(folder: str | bytes) -> None:
    """Where the helper's own rights allow to change modes; in CLEAR they do not."""
    try:
        os.close(_enter(folder))
    except OSError:
        pass


def _enter(name: str | bytes, above: int | None = None) -> int:
    """Open a folder, and no link to one, that its owner can use then. A path leads to any, a descriptor to this one.

    /proc is asked only where the folder cannot be listed: the process outside a namespace has none that it is in.
    """
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, os.O_RDONLY | flags, dir_fd=above)
    except PermissionError:
        held = os.open(name, os.O_PATH | flags, dir_fd=above)
        try:
            itself = "/proc/self/fd/%d" % held
            os.chmod(itself, OWNER)
            return os.open(itself, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(held)
    try:
        if os.fstat(fd).st_mode & OWNER != OWNER:
            os.chmod(fd, OWNER)
    except BaseException:
        os.close(fd)
        raise
    return fd
