"""Attempts at the machine itself. Where the kernel lets them, most fail for their arguments: they do no harm."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from kernel import numbered, syscall  # type: ignore[import-not-found]  # a copy stands beside it

if TYPE_CHECKING:
    from tests.escape.programs.telling import Facts

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
SIGCHLD = 17
X32 = 0x40000000
"""Of a call with the numbers of x32, which the filters of x86-64 could overlook."""

GETPID = 39
I386_GETPID = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
"""mov eax, 20; int 0x80; ret"""

KEYCTL_GET_KEYRING_ID, KEYRING_OF_SESSION = 0, -3
PERSONALITY_READ_IMPLIES_EXEC = 0x0400000
CAPABILITY_VERSION = 0x20080522
ALL = 0xFFFFFFFF
TIOCSTI = 0x5412
NO_CLOCK, NO_COMMAND, NO_MAGIC = 99, 99, 0


def mount(_: Facts) -> None:
    syscall("mount", b"none", os.fsencode(os.environ["OVERLAY_SCRATCH"]), b"tmpfs", 0, None)


def unmount(_: Facts) -> None:
    """What covers the folder of the scratch folders."""
    syscall("umount2", os.fsencode(Path(os.environ["OVERLAY_SCRATCH"]).parent), 2)


def bind_mount(facts: Facts) -> None:
    syscall("mount", os.fsencode(facts["outside"]), os.fsencode(os.environ["OVERLAY_SCRATCH"]), None, 4096, None)


def clone_mount(facts: Facts) -> None:
    """By the newer calls (open_tree(2)): a mount with no place."""
    os.close(syscall("open_tree", -100, os.fsencode(facts["outside"]), 1))


def open_filesystem(_: Facts) -> None:
    os.close(syscall("fsopen", b"tmpfs", 0))


def user_namespace(_: Facts) -> None:
    """In which one has every capability."""
    syscall("unshare", CLONE_NEWUSER)


def network_namespace(_: Facts) -> None:
    syscall("unshare", CLONE_NEWNET)


def clone_namespace(_: Facts) -> None:
    """By clone3(2), whose flags lie in memory, where a filter cannot see them."""
    arguments = struct.pack("<8Q", CLONE_NEWUSER, 0, 0, 0, SIGCHLD, 0, 0, 0)
    child = syscall("clone3", arguments, len(arguments))
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def join_namespace(_: Facts) -> None:
    with Path("/proc/self/ns/net").open() as file:
        syscall("setns", file.fileno(), 0)


def change_root(_: Facts) -> None:
    syscall("chroot", os.fsencode(os.environ["OVERLAY_SCRATCH"]))


def pivot_root(_: Facts) -> None:
    syscall("pivot_root", b"/nowhere", b"/nowhere")


def bpf(_: Facts) -> None:
    syscall("bpf", NO_COMMAND, None, 0)


def keyring(_: Facts) -> None:
    syscall("keyctl", KEYCTL_GET_KEYRING_ID, KEYRING_OF_SESSION, 0)


def add_key(_: Facts) -> None:
    syscall("add_key", b"nothing", None, None, 0, 0)


def user_faults(_: Facts) -> None:
    os.close(syscall("userfaultfd", 1))


def performance_events(_: Facts) -> None:
    syscall("perf_event_open", None, 0, -1, -1, 0)


def file_events(_: Facts) -> None:
    os.close(syscall("fanotify_init", 0, 0))


def load_kernel(_: Facts) -> None:
    syscall("kexec_load", 0, 0, None, ALL)


def load_module(_: Facts) -> None:
    syscall("init_module", None, 0, None)


def load_module_file(_: Facts) -> None:
    syscall("finit_module", -1, b"", 0)


def rename_host(_: Facts) -> None:
    """To the name that it has."""
    name = socket.gethostname().encode()
    syscall("sethostname", name, len(name))


def set_time(_: Facts) -> None:
    """The kernel reads it first, and there is none at this address."""
    syscall("settimeofday", 1, None)


def set_clock(_: Facts) -> None:
    syscall("clock_settime", NO_CLOCK, None)


def swap(_: Facts) -> None:
    syscall("swapon", b"/nowhere", 0)


def reboot(_: Facts) -> None:
    """Without the numbers that it wants."""
    syscall("reboot", NO_MAGIC, NO_MAGIC, 0, None)


def account(_: Facts) -> None:
    syscall("acct", b"/nowhere")


def quota(_: Facts) -> None:
    syscall("quotactl", ALL, None, 0, None)


def personality(_: Facts) -> None:
    syscall("personality", PERSONALITY_READ_IMPLIES_EXEC)


def foreign_numbers(_: Facts) -> int:
    """By x32. A kernel without it says ENOSYS."""
    result: int = numbered(X32 | GETPID)
    return result


def type_for_terminal(_: Facts) -> None:
    """Characters for the terminal of whoever started the bus. A pipe says ENOTTY."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(1, ctypes.c_ulong(TIOCSTI), b"x") != 0:
        raise OSError(ctypes.get_errno(), "TIOCSTI")


def regain_capabilities(_: Facts) -> None:
    header = struct.pack("<Ii", CAPABILITY_VERSION, 0)
    effective = permitted = inheritable = 1 << 21  # CAP_SYS_ADMIN
    syscall("capset", header, struct.pack("<6I", effective, permitted, inheritable, 0, 0, 0))


def write_kernel_setting(_: Facts) -> None:
    """The value that it has."""
    path = Path("/proc/sys/kernel/hostname")
    path.write_text(path.read_text())


def become_root_by_program(_: Facts) -> str:
    """By whatever program would give rights that its caller lacks: the kernel was told to give none."""
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if status["NoNewPrivs"] != "0":
        raise PermissionError(1, "no new privileges")
    return status["NoNewPrivs"]


def foreign_abi(_: Facts) -> int:
    """By int 0x80, whose numbers are those of i386: getpid(2), in a child that may not survive it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(I386_GETPID)
        result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        os.write(writer, b"%d" % result)
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    result = int(os.read(reader, 20) or -errno.ENOSYS)
    if result < 0:
        raise OSError(-result, "int 0x80")
    return result
