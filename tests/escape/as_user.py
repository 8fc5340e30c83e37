"""Go on as an ordinary user: `python -m tests.escape.as_user UID FOLDER PROGRAM ARGUMENT...`, started by root.

The interpreter may lie in a folder that only root can enter, as its home. Then this process and its children see in
that folder's place one with the interpreter only. With a FOLDER other than "" all is seen below it, by chroot(2): to
who lives in a part of the tree the kernel gives no user namespace (user_namespaces(7)), as some machines to nobody.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
"""Of <linux/sched.h> and <linux/mount.h>."""

_libc = ctypes.CDLL(None, use_errno=True)


def main(uid: int, below: str, command: list[str]) -> None:
    _check(_libc.unshare(CLONE_NEWNS))
    _mount(b"none", Path("/"), None, MS_REC | MS_PRIVATE)
    _open_the_way_to([Path(sys.prefix), Path(sys.base_prefix)])
    if below:
        folder = Path.cwd()
        _mount(b"/", Path(below), None, MS_BIND | MS_REC)
        os.chroot(below)
        os.chdir(folder)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execv(command[0], command)


def _open_the_way_to(folders: list[Path]) -> None:
    """Each that lies in a closed folder is put alone into an open one in its place."""
    held = [(folder, closed, os.open(folder, os.O_PATH)) for folder in folders if (closed := _closed_above(folder))]
    for closed in {closed for _, closed, _ in held}:
        _mount(b"none", closed, b"tmpfs", 0, b"mode=755")
    for folder, _, fd in held:
        folder.mkdir(parents=True)
        _mount(b"/proc/self/fd/%d" % fd, folder, None, MS_BIND)


def _closed_above(folder: Path) -> Path | None:
    """The topmost folder on the way there that others cannot enter."""
    return next((above for above in reversed(folder.parents) if not above.stat().st_mode & stat.S_IXOTH), None)


def _mount(source: bytes, target: Path, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    _check(_libc.mount(source, os.fsencode(target), kind, flags, data))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
