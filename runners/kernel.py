"""What this kernel can hold a process to, asked without taking anything: Landlock and its ABI, and seccomp filters.

The bits are those of <linux/landlock.h>. Each came with a version of the interface (Landlock(7), VERSIONS), and a
kernel refuses a ruleset with one that it does not know, so every set of bits goes through `Kernel.known`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
from typing import NamedTuple

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

BIND_TCP = 1 << 0
CONNECT_TCP = 1 << 1

ABSTRACT_UNIX_SOCKET = 1 << 0
SIGNAL = 1 << 1

FS_ABI = {1: MAKE_SYM * 2 - 1, 2: REFER, 3: TRUNCATE, 5: IOCTL_DEV}
NET_ABI = {4: BIND_TCP | CONNECT_TCP}
SCOPE_ABI = {6: ABSTRACT_UNIX_SOCKET | SIGNAL}
"""The bits that came with each ABI of Landlock. (ABI 7 brought the logging of refusals, and nothing to be refused.)"""

ABI_OF_TRUNCATE, ABI_OF_TCP, ABI_OF_SCOPES = 3, 4, 6

READ = READ_FILE | READ_DIR
DEVICE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
CHANGE_FOLDER = REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM | REFER
WRITE = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV | CHANGE_FOLDER
"""All but to execute, and to make device nodes."""

ALL = IOCTL_DEV * 2 - 1
TCP = BIND_TCP | CONNECT_TCP
SCOPES = ABSTRACT_UNIX_SOCKET | SIGNAL

_CREATE_RULESET = 444
_CREATE_RULESET_VERSION = 1 << 0
"""landlock_create_ruleset(2), which has this number on every architecture but Alpha."""

_SECCOMP = {"x86_64": 317, "aarch64": 277}
_GET_ACTION_AVAIL = 2
_RET_ERRNO = 0x00050000
"""seccomp(2)."""


class Kernel(NamedTuple):
    """What there is. `landlock_abi` is 0 without Landlock; `no_landlock`, `no_seccomp` say why, None where there is."""

    landlock_abi: int
    no_landlock: str | None
    no_seccomp: str | None

    def known(self, bits: int, by_abi: dict[int, int] = FS_ABI) -> int:
        """Those of the bits that it knows."""
        return bits & functools.reduce(int.__or__, (new for abi, new in by_abi.items() if abi <= self.landlock_abi), 0)


@functools.cache
def this_kernel() -> Kernel:
    """The one that this process runs on. It is asked once."""
    abi, why = landlock()
    return Kernel(abi, why, no_seccomp(platform.machine()))


def landlock() -> tuple[int, str | None]:
    abi, number = _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    if abi > 0:
        return abi, None
    if number == errno.EOPNOTSUPP:
        return 0, "Landlock is switched off at boot (lsm=)"
    return 0, _why(number, "this kernel has no Landlock", "Landlock is refused")


def no_seccomp(machine: str) -> str | None:
    if machine not in _SECCOMP:
        return f"no seccomp filter is known for {machine}"
    action = ctypes.c_uint32(_RET_ERRNO)
    done, number = _call(_SECCOMP[machine], ctypes.c_uint(_GET_ACTION_AVAIL), ctypes.c_uint(0), ctypes.byref(action))
    return None if done == 0 else _why(number, "this kernel has no seccomp filters", "seccomp is refused")


def _why(number: int, absent: str, refused: str) -> str:
    """A container's own filter answers for the kernel, mostly with EPERM."""
    return absent if number == errno.ENOSYS else f"{refused}: {os.strerror(number)}"


def _call(number: int, *arguments: object) -> tuple[int, int]:
    """syscall(2): the result, and errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return result, ctypes.get_errno() if result < 0 else 0
