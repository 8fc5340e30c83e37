"""Attempts at the network, and at whatever else a socket reaches."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from kernel import syscall  # type: ignore[import-not-found]  # a copy stands beside it
from telling import NothingGainedError  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.escape.programs.telling import Facts

LOCAL, LOCAL6 = "127.0.0.1", "::1"
IPPROTO_SCTP, IPPROTO_MPTCP = 132, 262
AF_ALG, AF_VSOCK, AF_XDP = 38, 40, 44
NETLINK_ROUTE, NETLINK_AUDIT = 0, 9
ETH_P_ALL = 0x0300
"""In the order of bytes of the network."""

STREAMS = 3


def tcp(facts: Facts) -> None:
    with socket.socket() as client:
        client.connect((LOCAL, facts["tcp"]))


def tcp_elsewhere(facts: Facts) -> None:
    """To a port that the manifest does not name."""
    with socket.socket() as client:
        client.connect((LOCAL, facts["another_tcp"]))


def tcp6(facts: Facts) -> None:
    with socket.socket(socket.AF_INET6) as client:
        client.connect((LOCAL6, facts["tcp6"]))


def udp(facts: Facts) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.sendto(b"out", (LOCAL, facts["udp"]))


def udp6(facts: Facts) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
        client.sendto(b"out", (LOCAL6, facts["udp"]))


def multipath_tcp(facts: Facts) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as client:
        client.connect((LOCAL, facts["another_tcp"]))


def sctp(_: Facts) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SCTP).close()


def fast_open(facts: Facts) -> None:
    """TCP that connects by sending."""
    with socket.socket() as client:
        client.sendto(b"out", socket.MSG_FASTOPEN, (LOCAL, facts["another_tcp"]))


def fast_open_by_message(facts: Facts) -> None:
    with socket.socket() as client:
        client.sendmsg([b"out"], [], socket.MSG_FASTOPEN, (LOCAL, facts["another_tcp"]))


def unix_path(facts: Facts) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(facts["unix"])


def unix_datagram(facts: Facts) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.sendto(b"out", facts["unix_datagram"])


def unix_abstract(facts: Facts) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + facts["abstract"])


def pair_of_datagrams(facts: Facts) -> None:
    """A pair of sockets needs no connection, and one of datagrams can send to any path."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.sendmsg([b"out"], [], 0, facts["unix_datagram"])


def pair_of_streams(_: Facts) -> str:
    """Which every phase has: event loops are made of them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"within")
        return theirs.recv(6).decode()


def listen(_: Facts) -> None:
    with socket.socket() as server:
        server.bind((LOCAL, 0))
        server.listen()


def listen_unbound(_: Facts) -> None:
    """The kernel gives a port to who listens without one."""
    with socket.socket() as server:
        server.listen()


def raw(_: Facts) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def packet(_: Facts) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, ETH_P_ALL).close()


def netlink_audit(_: Facts) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT).close()


def netlink_route(_: Facts) -> None:
    """Which libraries ask for the machine's addresses."""
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE).close()


def virtual_machine(_: Facts) -> None:
    socket.socket(AF_VSOCK, socket.SOCK_STREAM).close()


def kernel_crypto(_: Facts) -> None:
    socket.socket(AF_ALG, socket.SOCK_SEQPACKET).close()


def express_path(_: Facts) -> None:
    socket.socket(AF_XDP, socket.SOCK_RAW).close()


def io_uring(_: Facts) -> None:
    """A ring does calls without calling, so none of them is seen."""
    os.close(syscall("io_uring_setup", 1, bytes(120)))


def inherited_sockets(_: Facts) -> list[str]:
    """One that was opened before the rights were taken would have none of them."""
    found = [f"{fd} is {_told(fd)}" for fd in _descriptors() if fd >= STREAMS or _is_socket(fd)]
    if not found:
        raise NothingGainedError("only the three streams, and none is a socket")
    return found


def _descriptors() -> Iterator[int]:
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        try:
            os.fstat(fd)
        except OSError:  # the listing's own
            continue
        yield fd


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def _told(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())
