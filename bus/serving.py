"""Where the server of a folder is: a private file that `aal serve` writes and removes, for commands in that folder.

A server that was killed leaves it behind, and another program may listen there by now. So it is believed only as long
as the process that wrote it holds the lock of the folder, by what the kernel says of its locks (proc_locks(5)): to try
the lock would for a moment keep a server from starting.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus.private_file import PrivateFile

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "serve.lock"
"""The file in the state folder that a server has locked as long as it lives."""

LEDGER_LOCK = ".serving"
"""The same of the file beside the ledger, by its suffix."""

LOCKS = Path("/proc/locks")

_ADDRESS = re.compile(r"http://[^/\s]+:[0-9]+")
_LINE = re.compile(r"\d+: FLOCK +ADVISORY +WRITE +(\d+) +[0-9a-f]+:[0-9a-f]+:(\d+) ")


@dataclass(frozen=True, slots=True)
class Serving:
    """A server: the address that clients on this machine reach it by, and its process."""

    address: str
    pid: int


class _Form:
    name = "serving.json"
    allowed = '{"address": "http://HOST:PORT", "pid": N}'
    hint = "Remove it; the server writes it when it starts."

    def empty(self) -> Serving | None:
        return None

    def read(self, document: Any) -> Serving | None:  # noqa: ANN401
        if not isinstance(document, dict) or document.keys() != {"address", "pid"}:
            raise ValueError("something else")
        address, pid = document["address"], document["pid"]
        if not isinstance(address, str) or not isinstance(pid, int) or not _ADDRESS.fullmatch(address):
            raise ValueError("something else")
        return Serving(address, pid)

    def document(self, held: Serving | None) -> object:
        return None if held is None else asdict(held)


@contextmanager
def announced(state: Path, address: str) -> Iterator[None]:
    """Have the file say that this process serves the folder at `address`. For who holds the folder's lock.

    Raises `OperatorError` where it cannot be written.
    """
    file = state / _Form.name
    file.unlink(missing_ok=True)  # whatever a server before has left, be it damaged
    PrivateFile(state, _Form()).change(lambda _: Serving(address, os.getpid()))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def find(state: Path, locks: Path = LOCKS) -> Serving | None:
    """The server of the folder, None where there is none. Raises `SettingError` for a file that others can open."""
    found = PrivateFile(state, _Form()).get()
    return found if found is not None and _holds_lock(found.pid, state / LOCK, locks) else None


def _holds_lock(pid: int, lock: Path, locks: Path) -> bool:
    try:
        inode = lock.stat().st_ino
        lines = locks.read_text("ascii").splitlines()
    except OSError:
        return False
    held = (found.groups() for line in lines if (found := _LINE.match(line)))
    return (str(pid), str(inode)) in held
