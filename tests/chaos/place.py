"""The working folder of all rounds, and small disks that programs may fill.

The disks exist only in a mount namespace of this process and its children, so the kernel takes them away even if
nobody else comes to it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.chaos.overlays import OVERLAYS

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH = 2
"""Of <linux/sched.h>, <linux/mount.h> and <sys/mount.h>."""

DISK = b"size=1m"
SHARED_MEMORY = Path("/dev/shm")
OF_THE_BUS = frozenset({"serve.lock", "serving.json", "overlays.lock", "state", "scratch"})
"""What may lie in the folder of the bus's own state."""

_libc = ctypes.CDLL(None, use_errno=True)


class Place:
    """A folder with the overlays, `logs`, `.aal` and `tmp`.

    `has_disks`: whether the state folders lie on disks of their own, and /dev/shm is nobody else's. It takes root.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = folder / "tmp"
        self.log = folder / "server.log"
        self.ledger = folder / "logs" / "provenance.jsonl"
        self.has_disks = False
        self._mounted: list[Path] = []

    def __enter__(self) -> Self:
        self.tmp.mkdir(parents=True)
        self.has_disks = _own_mounts()
        try:
            self._disk(SHARED_MEMORY)
            for overlay in OVERLAYS:
                overlay.write(self.overlay(overlay.name))
                self.state(overlay.name).mkdir(parents=True)
                self._disk(self.state(overlay.name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._mounted:
            _check(_libc.umount2(os.fsencode(self._mounted.pop()), MNT_DETACH))

    def overlay(self, name: str) -> Path:
        return self.folder / "overlays" / name

    def state(self, overlay: str) -> Path:
        """The folder that an overlay may write to."""
        return self.folder / ".aal" / "state" / overlay

    def log_of(self, overlay: str) -> Path:
        """Where the bus keeps what an overlay logs."""
        return self.folder / "logs" / "overlays" / f"{overlay}.log"

    def empty_disks(self) -> None:
        """Make room again for what programs write."""
        for overlay in OVERLAYS:
            for file in self.state(overlay.name).iterdir():
                file.unlink()

    @property
    def scratch(self) -> Path:
        """Where calls may leave files while they run; each bus has a lock there under a name of its own."""
        return self.folder / ".aal" / "scratch"

    def leftovers(self) -> Iterator[str]:
        """What the bus has made and not taken away, where nothing may lie."""
        yield from map(str, self.tmp.iterdir())
        yield from (str(entry) for entry in (self.folder / ".aal").iterdir() if entry.name not in OF_THE_BUS)
        yield from (str(entry) for entry in self.scratch.iterdir() if not _is_held(entry))
        if self.has_disks:
            yield from map(str, SHARED_MEMORY.iterdir())

    def _disk(self, path: Path) -> None:
        if self.has_disks:
            _check(_libc.mount(b"chaos", os.fsencode(path), b"tmpfs", 0, DISK))
            self._mounted.append(path)


def _is_held(path: Path) -> bool:
    """Whether it is the lock of a bus that lives."""
    if path.suffix != ".lock":
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _own_mounts() -> bool:
    """Go on in a mount namespace of one's own. False where that is not allowed."""
    if os.geteuid() != 0 or _libc.unshare(CLONE_NEWNS) != 0:
        return False
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    return True


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
