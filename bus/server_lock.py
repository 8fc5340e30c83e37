"""The lock of what one server serves: a file that it has locked, and whose name shows the next one that it is there.

The kernel frees it however the process ends. Whoever removes the file, or moves its folder away, takes the lock from
under its holder, and another server would get it. So the holder looks at the name every second and locks the file that
bears it by then. Where another server was quicker, both go on and say so: the ledger's chain is safe with several
writers, but who signs, who compresses and where the commands find the server is meant for one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from typing import TYPE_CHECKING

from bus import serving
from bus.errors import OperatorError
from bus.own_files import open_own
from bus.segments import identity, identity_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOOK_S = 1.0
"""How often the holder looks at the name."""

_PID_BYTES = 32
_log = logging.getLogger(__name__)


class ServerLock:
    """Of `what` is served, by the file `path`. For one thread at a time."""

    def __init__(self, path: Path, what: str, mode: int) -> None:
        self.path = path
        self._what = what
        self._mode = mode
        self._fd = -1
        self._told: str | None = None

    def take(self) -> None:
        """Lock the file that bears the name, and leave this process's number in it; what was locked before is let go.

        Raises `OperatorError` that names the process which has it, `OSError` where there can be no such file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while (fd := self._locked()) is None:
            continue
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self.close()
        self._fd = fd

    def _locked(self) -> int | None:
        """The descriptor of the file that bears the name, locked; None where that was removed between the two."""
        with contextlib.ExitStack() as undo:
            fd = open_own(self.path, os.O_RDWR | os.O_CREAT, self._mode)
            undo.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, _PID_BYTES, 0).decode("ascii", "replace").strip() or "unknown"
                raise OperatorError("ERR_IN_USE", f"process {holder} serves {self._what}") from None
            if identity(os.fstat(fd)) != identity_at(self.path):
                return None
            undo.pop_all()
            return fd

    def look(self) -> None:
        """Take it anew where another file bears the name, or none does. Tells in the log what came of that, once."""
        try:
            if self._fd >= 0 and identity(os.fstat(self._fd)) == identity_at(self.path):
                return
            self.take()
        except (OSError, OperatorError) as error:
            if str(error) != self._told:
                _log.error("the lock of %s (%s) was lost: %s", self._what, self.path, error)
            self._told = str(error)
        else:
            _log.warning("%s was removed, moved or replaced; the lock of %s is taken anew", self.path, self._what)
            self._told = None

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def folder_lock(state: Path) -> Iterator[ServerLock]:
    """Hold the lock that only one server of a folder can have.

    Raises `OperatorError` that names the process which has it, or says why there can be none.
    """
    lock = ServerLock(state / serving.LOCK, str(state.parent), 0o644)
    try:
        lock.take()
    except OSError as error:
        raise OperatorError("ERR_FILES", f"cannot lock {lock.path}: {error.strerror}") from None
    with contextlib.closing(lock):
        yield lock


@contextlib.contextmanager
def ledger_lock(ledger: Path) -> Iterator[ServerLock]:
    """Hold the lock that only one server of a ledger can have, whatever the folders of their states, as `folder_lock`.

    Beside a ledger that cannot be written there may be no lock; then there is nothing that two servers could write.
    """
    lock = ServerLock(ledger.with_suffix(serving.LEDGER_LOCK), f"the ledger in {ledger.parent}", 0o640)
    try:
        lock.take()
    except OSError as error:
        _log.warning("cannot lock %s: %s", lock.path, error.strerror)
    with contextlib.closing(lock):
        yield lock


@contextlib.contextmanager
def looked_after(*locks: ServerLock, period_s: float = LOOK_S) -> Iterator[None]:
    """Have a thread look at them, for as long as this lasts."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(period_s):
            for lock in locks:
                lock.look()

    thread = threading.Thread(target=look, name="server locks", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
