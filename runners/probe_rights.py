"""A program that tries what a process may do, and says what came of each attempt. `trial.py` starts it as an overlay.

On stdin it gets an object with what to try it on (`trial.py`), on stdout it gives the attempts of each right, such as
`{"network": {"TCP": null, "UDP": "EPERM", ...}, ...}`: null where one worked, else the name of the error. An attempt
that works does no harm: it sends a signal that is none, mounts nothing at nowhere.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Attempts = dict[str, Callable[[], object]]

HOST = "127.0.0.1"
IO_URING_SETUP = 425
KEYCTL = {"x86_64": 250, "aarch64": 219}
KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING = 0, -3
"""Of <asm/unistd.h> and <linux/keyctl.h>."""

_NOT_LOADED = 127
_FIELD_OF_START = 19
"""Of /proc/PID/stat, after the name in brackets: when the process started (proc(5), field 22)."""


def attempts(bait: dict[str, Any]) -> dict[str, Attempts]:
    """What is tried, by right."""
    scratch, outside = Path(os.environ["OVERLAY_SCRATCH"]), Path(bait["outside"])
    state = Path(os.environ["OVERLAY_STATE"])
    return {
        "read": {"elsewhere": (outside / "file").read_bytes},
        "write": {
            "scratch": lambda: (scratch / "new").write_bytes(b"x"),
            "state": lambda: (state / "new").write_bytes(b"x"),
            "elsewhere": lambda: (outside / "new").write_bytes(b"x"),
        },
        "network": _network(bait),
        "exec": {
            "program": lambda: _execute(bait["program"]),
            "by the loader": lambda: _execute(bait["loader"], bait["program"]),
            "in scratch": lambda: _execute(_program_in(scratch)),
        },
        "processes": {"signal": lambda: _signal(bait["pid"], bait["started"])},
        "system": _system(),
        "limits": {
            "files": lambda: _open_many(bait["files"]),
            "size": lambda: _grow(scratch / "large", bait["bytes"]),
        },
    }


def _network(bait: dict[str, Any]) -> Attempts:
    return {
        "TCP": lambda: _connect(socket.AF_INET, socket.SOCK_STREAM, (HOST, bait["tcp"])),
        "UDP": lambda: _connect(socket.AF_INET, socket.SOCK_DGRAM, (HOST, bait["udp"])),
        "unix": lambda: _connect(socket.AF_UNIX, socket.SOCK_STREAM, bait["unix"]),
        "listen": _listen,
        "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP).close(),
    }


def _system() -> Attempts:
    libc = ctypes.CDLL(None, use_errno=True)
    mount: Attempts = {"mount": lambda: _call(libc.mount, None, b"/nowhere", b"tmpfs", ctypes.c_ulong(0), None)}
    io_uring: Attempts = {"io_uring": lambda: _call(libc.syscall, IO_URING_SETUP, 1, None)}
    number = KEYCTL.get(platform.machine())
    if number is None:
        return mount | io_uring
    keys = ctypes.c_long(KEY_SPEC_SESSION_KEYRING)
    return mount | io_uring | {"keyctl": lambda: _call(libc.syscall, number, KEYCTL_GET_KEYRING_ID, keys, 0)}


def _call(function: Callable[..., int], *arguments: object) -> None:
    """What is refused fails with EPERM; what fails otherwise was looked at, and so allowed."""
    if function(*arguments) < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
        raise OSError(ctypes.get_errno(), "refused")


def _connect(family: int, kind: int, address: Any) -> None:  # noqa: ANN401
    with socket.socket(family, kind) as connection:
        connection.connect(address)
        if kind == socket.SOCK_DGRAM:
            connection.send(b"x")


def _listen() -> None:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()


def _execute(*words: str) -> None:
    """The loader itself is what every program needs; what it cannot read it says by its exit status."""
    _, status = os.waitpid(os.posix_spawn(words[0], words, {}), 0)
    if os.waitstatus_to_exitcode(status) == _NOT_LOADED:
        raise PermissionError(errno.EACCES, "not loaded")


def _program_in(folder: Path) -> str:
    """A program of our own making. (In CLEAR no mode can be changed.)"""
    path = str(folder / "program")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o700)
    os.write(fd, f"#!{sys.executable} -ISc0\n".encode())
    os.close(fd)
    return path


def _signal(pid: int, started: str) -> None:
    """Only to the one that is meant: in a namespace the number may be another's."""
    os.kill(pid, 0)
    if start_of(pid) != started:
        raise ProcessLookupError(errno.ESRCH, "another process")


def start_of(pid: int) -> str:
    """When a process started, in ticks since the boot. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[_FIELD_OF_START]


def _open_many(limit: int) -> None:
    fds: list[int] = []
    try:
        while len(fds) <= limit:
            fds.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for fd in fds:
            os.close(fd)


def _grow(path: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path.touch()
    os.truncate(path, limit + 1)
    path.unlink()


def outcome(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return None


def main() -> None:
    tried = attempts(json.load(sys.stdin))
    print(json.dumps({right: {name: outcome(attempt) for name, attempt in of.items()} for right, of in tried.items()}))


if __name__ == "__main__":
    main()
