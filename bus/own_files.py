"""Files in a folder that others may write: each is opened as itself, and never as what a link of its name leads to.

Who may write the folder of the ledger may put a link there under any name that can be guessed, also between two steps
of ours; the bus's user may write more than he: the keys, the tokens, the overlays. So no link is followed (O_NOFOLLOW),
a file that is to be new is made and never opened (O_EXCL), and a folder within is kept open while its names are used.
A second name of a file (a hard link) is not told from the first: Linux lets nobody make one of a file that he may not
write (`fs.protected_hardlinks`).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


def open_own(path: str | Path, flags: int, mode: int = 0o600, *, folder: int | None = None) -> int:
    """The descriptor of a file, opened with `flags` of open(2); `mode` is for one that these have it make.

    A name without a path is looked up in `folder`, an open folder. Raises `OSError`; for a link it is ELOOP.
    """
    return os.open(path, flags | _FLAGS, mode, dir_fd=folder)


def make_own(path: str | Path, mode: int, *, folder: int | None = None) -> int:
    """The descriptor, to read and to write, of a new file that takes the place of what has the name.

    For names that one process at a time uses: what a killed one left is removed. `folder` as in `open_own`. Raises
    `OSError`; where somebody else makes one just then it is EEXIST.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path, dir_fd=folder)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, mode, dir_fd=folder)


def open_folder(path: Path) -> int:
    """The descriptor of a folder, to look names up in. Raises `OSError`; for a link it is ENOTDIR or ELOOP."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
