"""What the filter of system calls is to refuse, as names and arguments."""

from __future__ import annotations

import itertools

from runners.seccomp import Rules
from runners.syscalls import MACHINES

INET, INET6, UNIX, NETLINK = 2, 10, 1, 16
STREAM, DGRAM, RAW, SEQPACKET = 1, 2, 3, 5
TCP, UDP, ICMP, ICMPV6, SCTP, MPTCP, SMC = 6, 17, 1, 58, 132, 262, 256
CLOEXEC = 0x80000
FASTOPEN = 0x20000000
UPPER = 1 << 32

EVERYWHERE = """
ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd
mount umount2 pivot_root chroot mount_setattr move_mount setns open_tree open_tree_attr fsopen fsconfig fsmount fspick
swapon swapoff quotactl quotactl_fd acct
name_to_handle_at open_by_handle_at fanotify_init lookup_dcookie nfsservctl
reboot kexec_load kexec_file_load syslog sethostname setdomainname
init_module finit_module delete_module create_module query_module get_kernel_syms
settimeofday clock_settime adjtimex clock_adjtime _sysctl uselib iopl ioperm modify_ldt
bpf perf_event_open userfaultfd keyctl add_key request_key io_uring_setup io_uring_enter io_uring_register
"""
CLEAR = """
chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat file_setattr utime utimes futimesat utimensat
setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat
shmget shmat shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open mq_unlink
"""
WATCHING = "inotify_add_watch fanotify_mark"
NO_EXEC = "memfd_create memfd_secret"
NO_NETWORK = "connect bind listen accept accept4"
SOMETIMES = """
unshare clone clone3 personality ioctl mkdir mkdirat umask socket socketpair sendto sendmsg sendmmsg
"""
"""What is decided by its arguments."""

ALL_RULES = [
    Rules(network=network, serve=serve, clear=clear, exec=exec_)
    for network in (False, True, (443,), (53, 443))
    for serve, clear, exec_ in itertools.product((False, True), repeat=3)
]

NONE, ANY, HTTPS, NAMES = Rules(), Rules(network=True), Rules(network=(443,)), Rules(network=(53, 443))
SERVE, NARROW_SERVE = Rules(serve=True), Rules(network=(443,), serve=True)
ONLY_CLEAR = Rules(clear=True)
EVERY = (NONE, ANY, HTTPS, NAMES, SERVE, NARROW_SERVE, ONLY_CLEAR)

SOCKETS = [
    # what is asked for, and who gets it
    ((INET, STREAM, 0), (ANY, HTTPS, NAMES, SERVE, NARROW_SERVE)),
    ((INET, STREAM | CLOEXEC, TCP), (ANY, HTTPS, NAMES, SERVE, NARROW_SERVE)),
    ((INET6, STREAM, TCP), (ANY, HTTPS, NAMES, SERVE, NARROW_SERVE)),
    ((INET, DGRAM, 0), (ANY, NAMES)),
    ((INET6, DGRAM | CLOEXEC, UDP), (ANY, NAMES)),
    ((INET, STREAM, MPTCP), (ANY,)),
    ((INET, DGRAM, ICMP), (ANY,)),
    ((INET6, DGRAM, ICMPV6), (ANY,)),
    ((INET, STREAM, SCTP), ()),
    ((INET, STREAM, SMC), ()),
    ((INET, SEQPACKET, SCTP), ()),
    ((INET, SEQPACKET, 0), ()),
    ((INET, DGRAM, TCP), ()),
    ((INET, RAW, ICMP), ()),
    ((INET6, RAW, 255), ()),
    ((INET, 10, 0x300), ()),  # SOCK_PACKET, which the kernel makes an AF_PACKET of
    ((UNIX, STREAM, 0), (ANY, HTTPS, NAMES, NARROW_SERVE)),
    ((UNIX, DGRAM | CLOEXEC, 0), (ANY, HTTPS, NAMES, NARROW_SERVE)),
    ((UNIX, SEQPACKET, 0), (ANY, HTTPS, NAMES, NARROW_SERVE)),
    ((UNIX, RAW, 0), ()),
    ((NETLINK, RAW | CLOEXEC, 0), (ANY, HTTPS, NAMES, NARROW_SERVE)),
    ((NETLINK, DGRAM, 0), (ANY, HTTPS, NAMES, NARROW_SERVE)),
    ((NETLINK, RAW, 12), ()),  # NETLINK_NETFILTER
    *(((family, kind, 0), ()) for family in range(47) for kind in (1, 2, 3, 4, 5) if family not in {1, 2, 10, 16}),
    ((UPPER - 1, STREAM, 0), ()),
]


def names(machine: str, *texts: str) -> set[str]:
    """Those of the names that the machine has a call for."""
    return {name for text in texts for name in text.split()} & MACHINES[machine].numbers.keys()
