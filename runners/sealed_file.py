"""Files in memory that a program is given to read.

A program must not be able to execute one: Landlock does not hold what is on no mounted file system, so it would be a
way round the right to execute. Where the kernel can make one that stays without the permission (Linux 6.3), it is
such a one; elsewhere it cannot be written to any more, and what was written is no program.
"""

from __future__ import annotations

import errno
import fcntl
import os
from functools import cache

MFD_NOEXEC_SEAL = 0x0008
"""Of <linux/memfd.h>; memfd_create(2)."""

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


def sealed_file(content: bytes) -> int:
    """A descriptor of a new file, at its start, with the content. Raises OSError."""
    never_executed = _can_forbid_execution()
    fd = os.memfd_create("envelope", os.MFD_CLOEXEC | (MFD_NOEXEC_SEAL if never_executed else os.MFD_ALLOW_SEALING))
    try:
        written = 0
        while written < len(content):
            written += os.pwrite(fd, memoryview(content)[written:], written)
        if not never_executed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


@cache
def _can_forbid_execution() -> bool:
    try:
        os.close(os.memfd_create("envelope", os.MFD_CLOEXEC | MFD_NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
