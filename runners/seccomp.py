"""What a process may ask of the kernel at all: the filter of its system calls, compiled for seccomp(2).

What is not named is allowed, except for calls that are newer than the tables in `syscalls`: those do not exist here
(ENOSYS), so that programs fall back as on the kernel of their day, and no new way round a right is open before somebody
has looked at it. What is refused gets EPERM; so does every call by another ABI of the machine, whose numbers mean
something else. Of a call that is allowed the program looks only at the machine and the number, by bisection: the kernel
finds that out when it takes the filter, and from then on does not run it for that call (Linux 5.11).

A filter sees numbers, not what pointers lead to: addresses, paths and structures are Landlock's to judge. It is the
kernel that says what each call does: the manual pages of section 2, and seccomp(2) for the filter.
"""

from __future__ import annotations

import errno
import functools
import platform
import socket
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from runners import bpf
from runners.bpf import Branch, Compare, Load, Node, Return
from runners.syscalls import MACHINES, NEWEST

_ALLOWED = Return(0x7FFF0000)
"""SECCOMP_RET_ALLOW of <linux/seccomp.h>."""


def _error(number: int) -> Return:
    """SECCOMP_RET_ERRNO: the call is not made and fails so."""
    return Return(0x00050000 | number)


_REFUSED = _error(errno.EPERM)
_UNKNOWN = _error(errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a filter is to leave open.

    `network`: True any, or the TCP ports that Landlock lets it connect to; none of them is none. `serve`: it may wait
    for TCP connections, whatever `network` says. `clear`: nothing may be changed but the content of files that Landlock
    leaves writable. `exec`: other programs may be executed; else memory that can be executed as a program is refused.
    """

    network: bool | tuple[int, ...] = False
    serve: bool = False
    clear: bool = False
    exec: bool = False


def machines() -> tuple[str, ...]:
    """Those that filters can be made for, as `platform.machine` calls them."""
    return tuple(MACHINES)


def lacks(machine: str) -> str | None:
    """Why there is no filter for a machine; None where there is one."""
    if machine in MACHINES:
        return None
    return f"no table of the system calls of {machine or 'this machine'}; known are {', '.join(MACHINES)}"


@functools.cache
def compile(rules: Rules, machine: str | None = None) -> bytes:  # noqa: A001  # called as `seccomp.compile`, like re's
    """The filter that holds these rules on a machine (None: this one), as an array of `struct sock_filter`.

    Raises ValueError where `lacks` has a reason.
    """
    decisions = {**_EVERYWHERE, **_files(rules), **_programs(rules), **_watches(rules), **_sockets(rules)}
    return _assemble(decisions, machine)


@functools.cache
def late(machine: str | None = None) -> bytes:
    """A second filter: no program is executed any more, whatever the first one leaves open. Raises like `compile`."""
    return _assemble(_all(("execve", "execveat"), _REFUSED), machine)


@functools.cache
def others(machine: str | None = None) -> bytes:
    """A filter for where processes share their numbers, and those of what the kernel keeps: nothing is done by them.

    Landlock holds signals and ptrace(2), and these it does not. Raises like `compile`.
    """
    return _assemble(_TO_OTHERS, machine)


def _all(names: tuple[str, ...], decision: Node) -> dict[str, Node]:
    return dict.fromkeys(names, decision)


# --- what is asked of a call ---


def _one_of(argument: int, cases: dict[int, Node], otherwise: Node, mask: int = bpf.ALL) -> Node:
    """The decision of the case that the lower half of an argument is."""
    chain = otherwise
    for value in reversed(cases):
        chain = Branch(Compare.EQUAL, value, cases[value], chain)
    return Load(bpf.low(argument), chain, mask)


def _without(argument: int, bits: int, otherwise: Node) -> Node:
    """Refused where the lower half of an argument has any of the bits."""
    return Load(bpf.low(argument), Branch(Compare.ANY_BIT, bits, _REFUSED, otherwise))


def _without_pointer(argument: int, otherwise: Node) -> Node:
    """Refused where an argument is not NULL."""
    upper = Load(bpf.high(argument), Branch(Compare.EQUAL, 0, otherwise, _REFUSED))
    return Load(bpf.low(argument), Branch(Compare.EQUAL, 0, upper, _REFUSED))


# --- to other processes ---

_ITSELF: dict[int, Node] = {0: _ALLOWED}
"""What a process calls itself where a call wants a number."""

PRIO_PROCESS, PRIO_PGRP = 0, 1
IOPRIO_WHO_PROCESS, IOPRIO_WHO_PGRP = 1, 2
"""Of <linux/resource.h> and <linux/ioprio.h>; the third is all processes of a user."""

_KEPT_BY_THE_KERNEL = (
    *("shmget", "shmat", "shmctl", "semget", "semop", "semtimedop", "semctl", "msgget", "msgsnd", "msgrcv", "msgctl"),
    *("mq_open", "mq_unlink"),
)
"""Memory, semaphores and queues that are found by a number or a name and outlive the process: a way to leave
something, and to change what others have left."""

_TO_OTHERS: dict[str, Node] = {
    "prlimit64": Load(bpf.low(0), Branch(Compare.EQUAL, 0, _ALLOWED, _without_pointer(2, _ALLOWED))),
    "setpriority": _one_of(0, dict.fromkeys((PRIO_PROCESS, PRIO_PGRP), _one_of(1, _ITSELF, _REFUSED)), _REFUSED),
    "ioprio_set": _one_of(
        0, dict.fromkeys((IOPRIO_WHO_PROCESS, IOPRIO_WHO_PGRP), _one_of(1, _ITSELF, _REFUSED)), _REFUSED
    ),
    **dict.fromkeys(
        ("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "migrate_pages", "move_pages"),
        _one_of(0, _ITSELF, _REFUSED),
    ),
    **_all(("process_madvise", "process_mrelease", *_KEPT_BY_THE_KERNEL), _REFUSED),
}

# --- in every phase ---

_OTHER_PROCESSES = ("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd")

_MOUNTS = (
    *("mount", "umount2", "pivot_root", "chroot", "mount_setattr", "move_mount", "setns"),
    *("open_tree", "open_tree_attr", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("swapon", "swapoff", "quotactl", "quotactl_fd", "acct"),
)

_BY_HANDLE = ("name_to_handle_at", "open_by_handle_at", "fanotify_init", "lookup_dcookie", "nfsservctl")
"""Ways to files that are not named by a path, or to learn of those of others."""

_KERNEL = (
    *("reboot", "kexec_load", "kexec_file_load", "syslog", "sethostname", "setdomainname"),
    *("init_module", "finit_module", "delete_module", "create_module", "query_module", "get_kernel_syms"),
    *("settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "_sysctl", "uselib"),
    *("iopl", "ioperm", "modify_ldt"),
)

_WIDE_INTERFACES = (
    *("bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),
)
"""Where most ways into the kernel were found; io_uring makes calls that no filter sees."""

CLONE_NEWTIME = 0x00000080
CLONE_NEW = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""All namespaces of <linux/sched.h> that clone(2) can make: NS, CGROUP, UTS, IPC, USER, PID, NET. TIME is for
unshare(2) alone: in clone(2) its bit is part of a signal's number."""

PERSONALITY_QUERY = 0xFFFFFFFF

TIOCSTI, TIOCLINUX = 0x5412, 0x541C
"""Of <asm-generic/ioctls.h>: they type on a terminal what its owner did not type."""

_EVERYWHERE: dict[str, Node] = {
    **_all(_OTHER_PROCESSES + _MOUNTS + _BY_HANDLE + _KERNEL + _WIDE_INTERFACES, _REFUSED),
    "unshare": _without(0, CLONE_NEW | CLONE_NEWTIME, _ALLOWED),
    "clone": _without(0, CLONE_NEW, _ALLOWED),
    "clone3": _UNKNOWN,  # its flags lie behind a pointer; the C libraries fall back to clone
    "personality": _one_of(0, dict.fromkeys((0, PERSONALITY_QUERY), _ALLOWED), _REFUSED),
}


# --- files and programs ---

FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_SETVERSION = 0x40086602, 0x40046602, 0x40087602
FS_IOC_FSSETXATTR, FAT_IOCTL_SET_ATTRIBUTES = 0x401C5820, 0x40047211
"""Of <linux/fs.h> and <linux/msdos_fs.h>, as both machines encode them."""

_TERMINALS = (TIOCSTI, TIOCLINUX)
_ATTRIBUTES = (FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_SETVERSION, FS_IOC_FSSETXATTR, FAT_IOCTL_SET_ATTRIBUTES)

_MODES_AND_TIMES = (
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "file_setattr"),
    *("utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "setxattrat"),
    *("removexattr", "lremovexattr", "fremovexattr", "removexattrat"),
)
"""What Landlock leaves to whoever owns a file."""

_OWNER = 0o700

_OPEN_TO_THEIR_OWNER: dict[str, Node] = {
    "mkdir": _one_of(1, {_OWNER: _ALLOWED}, _REFUSED, _OWNER),
    "mkdirat": _one_of(2, {_OWNER: _ALLOWED}, _REFUSED, _OWNER),
    "umask": _without(0, _OWNER, _ALLOWED),
}
"""A folder that its owner may not list could not be emptied after the call: the helper is under the filter too, and
where modes cannot be changed it cannot open what was made shut."""


def _files(rules: Rules) -> dict[str, Node]:
    if not rules.clear:
        return _without_commands(_TERMINALS)
    refused = _all(_MODES_AND_TIMES + _KEPT_BY_THE_KERNEL, _REFUSED)
    return refused | _OPEN_TO_THEIR_OWNER | _without_commands(_TERMINALS + _ATTRIBUTES)


def _without_commands(commands: tuple[int, ...]) -> dict[str, Node]:
    return {"ioctl": _one_of(1, dict.fromkeys(commands, _REFUSED), _ALLOWED)}


def _programs(rules: Rules) -> dict[str, Node]:
    """A file in memory has no path that Landlock could refuse to execute."""
    return {} if rules.exec else _all(("memfd_create", "memfd_secret"), _REFUSED)


def _watches(rules: Rules) -> dict[str, Node]:
    """Landlock lets any folder be watched, and who watches one learns the names in it."""
    return {} if rules.network else _all(("inotify_add_watch", "fanotify_mark"), _REFUSED)


# --- sockets ---

IPPROTO_MPTCP = 262  # `socket` has the name only where it was built with headers that have it
NETLINK_ROUTE = 0
MSG_FASTOPEN = 0x20000000
"""A connect within a send, which Landlock does not see. Of <linux/socket.h>."""

SOCK_TYPE_MASK = 0xF
"""The rest of a type are flags (<linux/net.h>)."""

DNS_PORT = 53

_TCP = (0, socket.IPPROTO_TCP)

_Types = dict[int, tuple[int, ...]]
"""From a socket's type to the protocols that it may have."""

_UNIX_TYPES: _Types = dict.fromkeys((socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET), (0, socket.AF_UNIX))
_UNIX_PAIR: _Types = dict.fromkeys((socket.SOCK_STREAM, socket.SOCK_SEQPACKET), (0, socket.AF_UNIX))
"""Of a pair without network: those that are connected to each other for good."""

_ROUTES: _Types = dict.fromkeys((socket.SOCK_RAW, socket.SOCK_DGRAM), (NETLINK_ROUTE,))
"""getaddrinfo(3) asks there which addresses the machine has; changes need a capability."""

_INET_ANY: _Types = {
    socket.SOCK_STREAM: (*_TCP, IPPROTO_MPTCP),
    socket.SOCK_DGRAM: (0, socket.IPPROTO_UDP, socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6),
}
_INET_TCP: _Types = {socket.SOCK_STREAM: _TCP}
"""What Landlock's rules of ports hold: not MPTCP, SCTP or SMC, which carry a stream to a port as well."""

_INET_TCP_AND_NAMES: _Types = {**_INET_TCP, socket.SOCK_DGRAM: (0, socket.IPPROTO_UDP)}
"""Names are asked for by UDP: who may connect to port 53 may send datagrams, and no filter sees to where."""

_Families = dict[int, _Types]

_LOCAL: _Families = {socket.AF_UNIX: _UNIX_TYPES, socket.AF_NETLINK: _ROUTES}

_NO_FASTOPEN: dict[str, Node] = {
    name: _without(flags, MSG_FASTOPEN, _ALLOWED) for name, flags in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3))
}


def _sockets(rules: Rules) -> dict[str, Node]:
    if rules.network is True:
        return _make(_internet(_INET_ANY) | _LOCAL, _UNIX_TYPES)
    if rules.network:
        types = _INET_TCP_AND_NAMES if DNS_PORT in rules.network else _INET_TCP
        # Who listens without an address gets a port that Landlock was not asked about.
        listen: dict[str, Node] = {} if rules.serve else {"listen": _REFUSED}
        return _make(_internet(types) | _LOCAL, _UNIX_TYPES) | _NO_FASTOPEN | listen
    waiting: dict[str, Node] = {} if rules.serve else _all(("bind", "listen", "accept", "accept4"), _REFUSED)
    unaddressed = {"connect": _REFUSED, "sendto": _without_pointer(4, _NO_FASTOPEN["sendto"])}
    return _make(_internet(_INET_TCP) if rules.serve else {}, _UNIX_PAIR) | _NO_FASTOPEN | unaddressed | waiting


def _internet(types: _Types) -> _Families:
    return dict.fromkeys((socket.AF_INET, socket.AF_INET6), types)


def _make(families: _Families, pairs: _Types) -> dict[str, Node]:
    """The two calls that make sockets; without a family left, `socket` is refused whatever its arguments."""
    return {
        "socket": _family(families) if families else _REFUSED,
        "socketpair": _family({socket.AF_UNIX: pairs}),
    }


def _family(families: _Families) -> Node:
    return _one_of(0, {family: _type(types) for family, types in families.items()}, _REFUSED)


def _type(types: _Types) -> Node:
    cases = {kind: _one_of(2, dict.fromkeys(protocols, _ALLOWED), _REFUSED) for kind, protocols in types.items()}
    return _one_of(1, cases, _REFUSED, SOCK_TYPE_MASK)


# --- from the number to the decision ---


class _Span(NamedTuple):
    """From this number to the next span's, one decision."""

    first: int
    decision: Node


def _assemble(decisions: dict[str, Node], name: str | None) -> bytes:
    name = platform.machine() if name is None else name
    if reason := lacks(name):
        raise ValueError(reason)
    machine = MACHINES[name]
    known = {machine.numbers[call]: decision for call, decision in decisions.items() if call in machine.numbers}
    by_number = Load(bpf.NUMBER, _search(_spans(known, machine.foreign_bit)))
    return bpf.assemble(Load(bpf.ARCH, Branch(Compare.EQUAL, machine.audit, by_number, _REFUSED)))


def _spans(known: dict[int, Node], foreign_bit: int) -> list[_Span]:
    """All numbers in order, neighbours of one decision together."""
    starts: dict[int, Node] = {0: _ALLOWED}
    starts |= {number + 1: _ALLOWED for number in known}
    starts |= known
    starts[NEWEST + 1] = _UNKNOWN
    if foreign_bit:
        starts[foreign_bit] = _REFUSED
    spans = [_Span(first, starts[first]) for first in sorted(starts)]
    return spans[:1] + [span for before, span in pairwise(spans) if span.decision != before.decision]


def _search(spans: list[_Span]) -> Node:
    """By halves: as many steps as the number of spans has binary digits."""
    if len(spans) == 1:
        return spans[0].decision
    middle = len(spans) // 2
    return Branch(Compare.AT_LEAST, spans[middle].first, _search(spans[middle:]), _search(spans[:middle]))
