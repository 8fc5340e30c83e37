"""Takes rights from this process for ever, and so from all that it will start: what the bus has planned.

A plan is a dict of plain values, as the bus makes it from the rights of a phase:

    "landlock"      None, or {"fs", "net", "scoped": the accesses that are denied but for the rules (bits), "paths":
                    [[path, bits], ...], "ports": [[port, bits], ...]}
    "seccomp"       a filter, as an array of struct sock_filter; b"" for none
    "others"        a second one against system calls on other processes by their numbers, taken where there is no pid
                    namespace that has only the helper's own
    "late"          the same, taken once the overlay's interpreter has started in mode fork (`launcher.py`)
    "limits"        [[resource number, value], ...], hard as soft; none is raised
    "capabilities"  the bits of those that stay; None: as they are
    "scratch"       {"root": folder, "mounts": whether a helper in a namespace covers it with memory of its own, "mb":
                    MiB that a call may have there, "bits": Landlock's for what is in it}
    "processes"     how many processes and threads a call may have at once; 0: any number
    "strict"        whether a helper ends that cannot take all of it

Part of the helper (`launcher.py`), under the same rules. Sources: landlock(7) and <linux/landlock.h>, seccomp(2),
capabilities(7), capset(2), prctl(2), setrlimit(2), mount(2), tmpfs(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from stat import S_ISDIR, S_ISLNK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
"""The numbers of the system calls, on every architecture but alpha."""

OPENAT2 = 437
"""The same, since Linux 5.6."""

AT_FDCWD = -100
RESOLVE_NO_SYMLINKS = 0x04
"""Of <linux/fcntl.h> and <linux/openat2.h>."""

NO_OPENAT2 = (errno.ENOSYS, errno.EPERM)
"""What an older kernel says, and the filter of a container that was made before it."""

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH, LANDLOCK_RULE_NET_PORT = 1, 2

ACCESS_FS = ((1, (1 << 13) - 1), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
ACCESS_NET = ((4, 0b11),)
SCOPES = ((6, 0b11),)
"""Bits that came with an ABI of Landlock: EXECUTE to MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV; TCP; abstract sockets and
signals."""

ACCESS_FILE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
"""Those that a file can have: EXECUTE, WRITE_FILE, READ_FILE, TRUNCATE, IOCTL_DEV. More are an error."""

PR_SET_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 23, 24, 38
SECCOMP_MODE_FILTER = 2

CAPABILITY_VERSION = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3, of two sets of 32 bits each (capget(2))."""

MS_NOSUID, MS_NODEV = 2, 4

INODES_PER_MB = 256
"""Of a mount in memory: files of a page each would fill it, and each is about 1 KiB of the kernel's own besides."""

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class OpenHow(ctypes.Structure):
    """struct open_how."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr. An older kernel takes it, where what it does not know is 0."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class PathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr, which is packed: here the same with four bytes that nobody reads."""

    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class NetPortAttr(ctypes.Structure):
    """struct landlock_net_port_attr."""

    _fields_ = (("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64))


class CapabilityHeader(ctypes.Structure):
    """struct __user_cap_header_struct; 0 is this process."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class CapabilityData(ctypes.Structure):
    """struct __user_cap_data_struct."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


FILTER_BYTES = 8
"""Of a struct sock_filter."""


def take(plan: Any, places: Iterable[str], in_namespace: bool) -> tuple[list[str], dict[str, str]]:
    """Take what a plan holds. `places` are the scratch folders that this process has, as only it knows.

    Returns the mechanisms that hold now (`capabilities`, `limits`, `landlock`, `seccomp`), and those that do not, with
    the reason; what the plan does not ask for is in neither.
    """
    taken = []  # type: list[str]
    failed = {}  # type: dict[str, str]
    filters = [plan["seccomp"], b"" if in_namespace else plan["others"]]
    own = [(os.path.realpath(place), plan["scratch"]["bits"]) for place in places]
    steps: tuple[tuple[str, object, Callable[[], None]], ...] = (
        ("capabilities", plan["capabilities"] is not None, lambda: drop_capabilities(plan["capabilities"])),
        ("limits", plan["limits"], lambda: limit(plan["limits"])),
        ("landlock", plan["landlock"], lambda: restrict(plan["landlock"], own)),
        ("seccomp", plan["seccomp"], lambda: take_filters(filters)),
    )
    for mechanism, wanted, take_it in steps:
        if wanted:
            try:
                take_it()
                taken.append(mechanism)
            except OSError as error:
                failed[mechanism] = error.strerror or str(error)
    return taken, failed


def check(result: int) -> int:
    """What a C function returned. Raises OSError where that is -1."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _prctl(option: int, first: int, second: Any = 0) -> int:
    """What the kernel returns; -1 is an error."""
    zero = ctypes.c_ulong(0)
    return int(_libc.prctl(option, ctypes.c_ulong(first), second or zero, zero, zero))


def _renounce_privileges() -> None:
    """No program gives any from now on (no_new_privs). Without capabilities Landlock and seccomp ask for it."""
    check(_prctl(PR_SET_NO_NEW_PRIVS, 1))


# Capabilities


def drop_capabilities(keep: int) -> None:
    """Have no capability but those of `keep`, and get none by what is executed. Raises OSError."""
    header = CapabilityHeader(CAPABILITY_VERSION, 0)
    data = (CapabilityData * 2)()
    check(_libc.capget(ctypes.byref(header), data))
    _bound(keep)
    for number, part in enumerate(data):
        kept = keep >> 32 * number & 0xFFFFFFFF
        part.effective &= kept
        part.permitted &= kept
        part.inheritable &= kept  # and with it the ambient set
    check(_libc.capset(ctypes.byref(header), data))
    _renounce_privileges()


def _bound(keep: int) -> None:
    """Take the others from the bounding set, too, where this process may: no_new_privs holds as well."""
    number = 0
    while _prctl(PR_CAPBSET_READ, number) >= 0:  # beyond the last that the kernel knows it is an error
        if not keep >> number & 1:
            _prctl(PR_CAPBSET_DROP, number)
        number += 1


# Limits


def limit(limits: Sequence[Sequence[int]]) -> None:
    """Raises OSError with the numbers of those that could not be set, once all were tried."""
    refused = []
    for number, value in limits:
        try:
            _, hard = resource.getrlimit(number)
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (most, most))
        except (OSError, ValueError):  # ValueError: EPERM
            refused.append(str(number))
    if refused:
        raise OSError(None, "resource " + ", ".join(refused))


# Landlock


def restrict(rules: Any, more: Sequence[Sequence[Any]]) -> None:
    """Have only the accesses of the rules and of `more` paths with bits, as far as the kernel can.

    The paths are resolved: one with a link in it gives nothing. Raises OSError.
    """
    abi = _create_ruleset(None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    fs, net = rules["fs"] & known(ACCESS_FS, abi), rules["net"] & known(ACCESS_NET, abi)
    attr = RulesetAttr(fs, net, rules["scoped"] & known(SCOPES, abi))
    ruleset = _create_ruleset(ctypes.byref(attr), ctypes.sizeof(attr), 0)
    try:
        for path, bits in [*rules["paths"], *more]:
            _allow_path(ruleset, path, bits & fs)
        for port, bits in rules["ports"]:
            if bits & net:
                _add_rule(ruleset, LANDLOCK_RULE_NET_PORT, NetPortAttr(bits & net, port))
        _renounce_privileges()
        check(_syscall(LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0)))
    finally:
        os.close(ruleset)


def _create_ruleset(attr: Any, size: int, flags: int) -> int:
    return check(_syscall(LANDLOCK_CREATE_RULESET, attr, ctypes.c_size_t(size), ctypes.c_uint(flags)))


def known(bits: Iterable[tuple[int, int]], abi: int) -> int:
    return sum(some for since, some in bits if since <= abi)


def _allow_path(ruleset: int, path: str, bits: int) -> None:
    """What is not there, is out of reach or was made a link since it was resolved gets no rule."""
    try:
        fd = _open_resolved(path)
    except OSError:
        return
    try:
        mode = os.fstat(fd).st_mode
        if not S_ISDIR(mode):
            bits &= ACCESS_FILE
        if bits and not S_ISLNK(mode):
            _add_rule(ruleset, LANDLOCK_RULE_PATH_BENEATH, PathBeneathAttr(bits, fd))
    finally:
        os.close(fd)


def _open_resolved(path: str) -> int:
    """An O_PATH descriptor of what a path leads to without any link. Raises OSError where it leads through one."""
    how = OpenHow(os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS)
    at, name, size = ctypes.c_int(AT_FDCWD), os.fsencode(path), ctypes.c_size_t(ctypes.sizeof(how))
    try:
        return check(_syscall(ctypes.c_long(OPENAT2), at, name, ctypes.byref(how), size))
    except OSError as error:
        if error.errno not in NO_OPENAT2:
            raise
    return _open_and_compare(path)


def _open_and_compare(path: str) -> int:
    """The same by looking afterwards where it led."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if _path_of(fd) != path:
        os.close(fd)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return fd


def _path_of(fd: int) -> str | None:
    """Where a descriptor led; None where that is not to be learned."""
    try:
        return os.readlink("/proc/self/fd/%d" % fd)
    except OSError:
        return None


def _add_rule(ruleset: int, kind: int, attr: Any) -> None:
    check(_syscall(LANDLOCK_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(kind), ctypes.byref(attr), ctypes.c_uint(0)))


# seccomp


def take_filter(instructions: bytes) -> None:
    """Have each system call from now on judged by a filter, and by those that were taken before. Raises OSError."""
    _renounce_privileges()
    program = FilterProgram(len(instructions) // FILTER_BYTES, instructions)
    check(_prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)))


def take_filters(filters: Iterable[bytes]) -> None:
    """Those that are not empty, each as above."""
    for instructions in filters:
        if instructions:
            take_filter(instructions)


# Mounts


def mount_in_memory(folder: str, mb: int) -> None:
    """Cover a folder with an empty one of at most `mb` MiB, which goes with the mount namespace. Raises OSError."""
    options = "size=%dm,nr_inodes=%d,mode=0700" % (mb, mb * INODES_PER_MB)
    check(_libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), options.encode()))
