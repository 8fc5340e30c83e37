"""fdatasync(2) without a thread that waits for it: a worker of the kernel's does it, and an eventfd tells when it has.

Linux calls this asynchronous I/O (io_submit(2) with IOCB_CMD_FDSYNC of <linux/aio_abi.h>, from 4.18 on). What a thread
of Python would cost is not its own time but the interpreter's lock: each return from a system call has to wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import sys
from typing import NamedTuple

IOCB_CMD_FDSYNC = 3
IOCB_FLAG_RESFD = 1


class _Numbers(NamedTuple):
    """Of the system calls, which the C library does not offer (<asm/unistd.h>)."""

    io_setup: int
    io_destroy: int
    io_getevents: int
    io_submit: int


_NUMBERS = {
    "x86_64": _Numbers(io_setup=206, io_destroy=207, io_getevents=208, io_submit=209),
    "aarch64": _Numbers(io_setup=0, io_destroy=1, io_getevents=4, io_submit=2),
}


class _Request(ctypes.Structure):
    """`struct iocb` of <linux/aio_abi.h>, on a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """`struct io_event`; `result` is 0 or a negative errno."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("second", ctypes.c_int64),
    )


class FileSync:
    """Syncs files in the background, one at a time."""

    def __init__(self) -> None:
        """Raises OSError where the kernel has no asynchronous I/O to give: ENOSYS, EPERM in a sandbox, EAGAIN."""
        numbers = _NUMBERS.get(platform.machine()) if sys.byteorder == "little" else None
        if numbers is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._numbers = numbers
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._open()
        self._request = _Request(opcode=IOCB_CMD_FDSYNC, flags=IOCB_FLAG_RESFD)
        self._requests = (ctypes.POINTER(_Request) * 1)(ctypes.pointer(self._request))
        self._event = _Event()

    def begin(self, fd: int, eventfd: int) -> None:
        """Begin to sync `fd`; `eventfd` can be read once that has ended. Raises OSError where it did not begin."""
        self._request.fd, self._request.eventfd = fd, eventfd
        self._call(self._numbers.io_submit, self._context, 1, self._requests)

    def end(self) -> None:
        """Wait for what was begun, unless that is done. Raises OSError, as `os.fdatasync` does."""
        try:
            self._call(self._numbers.io_getevents, self._context, 1, 1, ctypes.byref(self._event), None)
        except OSError:  # what was begun would pass for the next sync, once it ends
            self.close()
            self._open()
            raise
        if self._event.result:
            raise OSError(-self._event.result, os.strerror(-self._event.result))

    def close(self) -> None:
        """Nothing that was begun may be left: it would be waited for here."""
        with contextlib.suppress(OSError):  # the end of the process gives it back, too
            self._call(self._numbers.io_destroy, self._context)

    def _open(self) -> None:
        self._context = ctypes.c_ulong(0)
        self._call(self._numbers.io_setup, 1, ctypes.byref(self._context))

    def _call(self, number: int, *arguments: object) -> int:
        while True:
            result: int = self._syscall(number, *arguments)
            if result >= 0:
                return result
            if (error := ctypes.get_errno()) != errno.EINTR:
                raise OSError(error, os.strerror(error))
