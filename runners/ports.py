"""Which TCP ports are free, and who listens on one (proc(5), /proc/net/tcp)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
_UNSEEN = (FileNotFoundError, ProcessLookupError, PermissionError)
"""What reading of a process may end in: it has ended, or is not for us to see (hidepid, proc(5))."""
_LISTEN = "0A"  # TCP_LISTEN of <net/tcp_states.h>, as /proc/net/tcp has it


def free_port() -> int:
    """A TCP port that nobody has now, of those that the kernel gives to whoever asks for any."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def is_taken(port: int) -> bool:
    """Whether nobody can listen on a port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def holder_of(port: int, root: int) -> Literal["ours", "others", "nobody"]:
    """Whose socket listens on a TCP port: "ours" is that of a process below `root`.

    "ours" also where the kernel does not say: without /proc/net/tcp, or where a descendant may not be looked into.
    """
    try:
        sockets = _listening(port)
    except OSError:
        return "ours"
    if not sockets:
        return "nobody"
    return "ours" if any(_has(pid, sockets) for pid in _descendants(root)) else "others"


def _listening(port: int) -> set[str]:
    """What /proc/PID/fd calls the sockets that listen on a port. The columns are those of proc(5), /proc/net/tcp."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        rows += Path("/proc/net/tcp6").read_text().splitlines()[1:]
    ending = f":{port:04X}"
    columns = (row.split() for row in rows if ending in row)
    return {f"socket:[{at[9]}]" for at in columns if at[1].endswith(ending) and at[3] == _LISTEN}


def _has(pid: int, sockets: set[str]) -> bool:
    """Whether a process holds one of the sockets, or may."""
    folder = f"/proc/{pid}/fd"
    try:
        for fd in os.listdir(folder):  # noqa: PTH208  # half the time of pathlib, of which there is much
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"{folder}/{fd}") in sockets:  # noqa: PTH115
                    return True
    except PermissionError:
        return True
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False
    return False


def _descendants(root: int) -> Iterator[int]:
    """Every process below one, by the parents that /proc/PID/stat names."""
    children: dict[int, list[int]] = defaultdict(list)
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208  # as above
        with contextlib.suppress(*_UNSEEN), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
            parent = file.read().rpartition(b")")[2].split()[1]
            children[int(parent)].append(int(name))
    below = children[root]
    while below:
        pid = below.pop()
        yield pid
        below += children[pid]
