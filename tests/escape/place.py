"""The folder of a server, and what the attempts aim at: files, sockets, memory that others share."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import secrets
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.escape import overlays

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.escape.attempts import Attempt
    from tests.escape.overlays import Mode

SCRATCH_MB = 4
MAX_PROCESSES = 24
IPPROTO_MPTCP = 262
IPC_CREAT, IPC_RMID = 0o1000, 0
"""Of <linux/ipc.h>."""

IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
LOADERS = {
    "x86_64": "/lib64/ld-linux-x86-64.so.2",
    "aarch64": "/lib/ld-linux-aarch64.so.1",
}
_FILES = ("file", "readable", "truncated", "removed", "renamed", "mine")
_SECRET_TEXT = "nothing for overlays"


_libc = ctypes.CDLL(None, use_errno=True)


class Place:
    """`facts` is what every attempt is told, `lacks` what this machine has not to aim at, `secret` the bus's own.

    All of it belongs to `owner`, and modes keep nobody out of `outside`. Nothing is left of it.
    """

    def __init__(self, owner: int) -> None:
        self._owner = owner
        self._held = contextlib.ExitStack()
        self.secret = secrets.token_hex(16)
        self.facts: dict[str, Any] = {}
        self.lacks: set[str] = set()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as held:
            name = held.enter_context(tempfile.TemporaryDirectory(prefix="aal-", ignore_cleanup_errors=True))
            self.folder = Path(name)
            self.folder.chmod(0o755)
            self._write_files()
            self._open_sockets(held)
            self._share_memory(held)
            self._look_around()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def overlays(self) -> Path:
        return self.folder / "overlays"

    @property
    def ledger(self) -> Path:
        return self.folder / "logs" / "provenance.jsonl"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    def write_overlays(self, attempts: Iterable[tuple[Attempt, Mode]]) -> None:
        programs = self.folder / "programs"
        overlays.compile_programs(programs)
        for attempt, mode in attempts:
            overlays.write(self.overlays, programs, attempt, mode, self.facts)
        overlays.write_sibling(self.overlays, programs)
        self._hand_over()

    def seen_outside(self) -> dict[str, tuple[int, str | None]]:
        """Every entry that must not change, with its mode, and what a file holds."""
        return {
            str(path.relative_to(self.outside)): (path.lstat().st_mode, path.read_text() if path.is_file() else None)
            for path in sorted(self.outside.rglob("*"))
        }

    def marked_processes(self) -> list[str]:
        """What runs under the name that a program can give itself (`processes.run_on`)."""
        found = []
        for file in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if file.read_text().strip() == self.facts["mark"]:
                    found.append(file.parent.name)
        return found

    def _write_files(self) -> None:
        (self.outside / "removed-folder").mkdir(parents=True)
        for name in _FILES:
            (self.outside / name).write_text(_SECRET_TEXT)
            (self.outside / name).chmod(0o666)
        self.outside.chmod(0o777)
        key = self.folder / "home" / ".ssh" / "id_ed25519"
        settings = self.folder / "aal.toml"
        for path in (key, settings):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {_SECRET_TEXT}\n")
        granted = self.folder / "granted"
        granted.mkdir()
        self.facts |= {
            "secret": self.secret,
            "mark": f"aal-{self.secret[:8]}",
            "outside": str(self.outside),
            "home": str(self.folder / "home"),
            "another": str(self.overlays / overlays.SIBLING),
            "anothers_state": str(self.folder / ".aal" / "state" / overlays.SIBLING / "runs"),
            "ledger": str(self.ledger),
            "settings": str(settings),
            "granted": str(granted),
            "program": str(Path("/bin/sh").resolve()),
            "scratch_mb": SCRATCH_MB,
            "max_processes": MAX_PROCESSES,
            "hard_mb": overlays.HARD_MB,
        }

    def _open_sockets(self, held: contextlib.ExitStack) -> None:
        """That listen, or take what is sent; nobody answers, as the kernel does so."""
        abstract = f"aal-escape-{self.secret}"
        paths = {name: str(self.outside / name) for name in ("unix", "unix_datagram", "fifo")}
        for name in ("tcp", "another_tcp"):
            self.facts[name] = _port(held, socket.AF_INET, socket.SOCK_STREAM)
        self.facts["udp"] = _port(held, socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self.facts["tcp6"] = _port(held, socket.AF_INET6, socket.SOCK_STREAM)
        except OSError:
            self.facts["tcp6"] = 0
            self.lacks.add("ipv6")
        _bound(held, socket.AF_UNIX, socket.SOCK_STREAM, paths["unix"])
        _bound(held, socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}")
        _bound(held, socket.AF_UNIX, socket.SOCK_DGRAM, paths["unix_datagram"])
        os.mkfifo(paths["fifo"])
        held.callback(os.close, os.open(paths["fifo"], os.O_RDWR))
        for path in paths.values():
            Path(path).chmod(0o777)
        self.facts |= {"abstract": abstract, **paths}

    def _share_memory(self, held: contextlib.ExitStack) -> None:
        shared = Path("/dev/shm") / f"aal-escape-{self.secret}"
        shared.write_text(_SECRET_TEXT)
        held.callback(shared.unlink)
        key = secrets.randbits(31) | 1
        held.callback(_libc.shmctl, _libc.shmget(key, 1, IPC_CREAT | 0o666), IPC_RMID, None)
        self.facts |= {"shared": str(shared), "shared_key": key}

    def _look_around(self) -> None:
        machine = platform.machine()
        loader = self.facts["loader"] = LOADERS.get(machine, "")
        has = {
            "loader": bool(loader) and Path(loader).exists(),
            "multipath": _makes(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP),
            "io_uring": not IO_URING_DISABLED.exists() or IO_URING_DISABLED.read_text().strip() == "0",
            "i386": machine == "x86_64",
        }
        self.lacks |= {name for name, there in has.items() if not there}

    def _hand_over(self) -> None:
        if self._owner != os.geteuid():
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, self._owner, self._owner, follow_symlinks=False)


@contextlib.contextmanager
def a_folder_for_root() -> Iterator[str]:
    """An empty one, for a mount that only another namespace sees."""
    name = tempfile.mkdtemp(prefix="aal-root-")
    try:
        yield name
    finally:
        shutil.rmtree(name)


def _bound(held: contextlib.ExitStack, family: int, kind: int, address: Any) -> socket.socket:
    bound = held.enter_context(socket.socket(family, kind))
    bound.bind(address)
    if kind == socket.SOCK_STREAM:
        bound.listen(128)
    return bound


def _port(held: contextlib.ExitStack, family: int, kind: int) -> int:
    address = ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0)
    port: int = _bound(held, family, kind, address).getsockname()[1]
    return port


def _makes(family: int, kind: int, protocol: int) -> bool:
    """Whether this kernel has such sockets."""
    try:
        socket.socket(family, kind, protocol).close()
    except OSError as error:
        return error.errno not in {errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOPROTOOPT}
    return True
