"""Writing the ledger: one thread, one lock that every process takes, one write and one fsync for a group of records.

The writer takes all records that wait at once and answers only when they are in the file. What a failed write left is
cut off again, so the file holds whole lines that were answered, and at most one group that was not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import queue
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bus.errors import OverloadError
from bus.model import now_ms
from bus.provenance import end_of_lines, first_line, lines_backwards, lock_path
from bus.records import (
    GENESIS,
    BrokenLineError,
    check,
    draft,
    draft_call,
    environment_hash,
    is_foreign,
    parse_or_none,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from bus.model import Record
    from bus.records import Draft

RETRY_S = 1
"""How often an idle writer tries again to write a ledger that could not be written; refusals say so in Retry-After."""

_log = logging.getLogger(__name__)
_RECENT_BYTES = 1 << 18
_GROUP_LIMIT = 1024
_PROBE_BYTES = 4096
_FILE_MODE = 0o640
_BROKEN_HINT = "aal provenance verify names the first bad line; with the log moved away, a new chain begins."

Fsync = Literal["always", "batch", "never"]


class LedgerError(OverloadError):
    """The ledger cannot be written now."""

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__("ERR_LEDGER", detail, hint=hint, retry_after_s=RETRY_S)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a record stands. `tree_size` is the number of lines in the ledger once its group was written."""

    seq: int
    hash: str
    tree_size: int


class _Group:
    """Lines for one write, chained to what is in the file."""

    def __init__(self, seq: int, prev: str) -> None:
        self.seq = seq
        self.prev = prev
        self.lines: list[bytes] = []

    def add(self, draft: Draft) -> tuple[int, str]:
        """Chain one more; gives its seq and hash."""
        self.seq += 1
        line, self.prev = draft.line(self.seq, self.prev)
        self.lines.append(line)
        return self.seq, self.prev


class _Chain:
    """The file, and what this process knows of it: its identity, size, last line. For one thread at a time.

    Every method raises `OSError` where the file system refuses, and leaves what it knows right, or unknown.
    """

    def __init__(self, path: Path, fsync: Fsync, environment: Mapping[str, Any]) -> None:
        self.seq = 0
        self._path = path
        self._fsync = fsync
        self._environment_hash = environment_hash(environment)
        self._environment = draft({
            "type": "environment",
            "timestamp_ms": now_ms(),
            "environment": dict(environment),
            "environment_hash": self._environment_hash,
        })  # fmt: skip
        self._fd = -1
        self._lock_fd = -1
        self._identity: tuple[int, int] | None = None
        self._size = 0
        self._prev = GENESIS
        self._environment_stands = False
        self._owed: list[Draft] = []

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of all processes, with the file open and its end known.

        Raises `BrokenLineError` where the last line is not one that another can be chained to.
        """
        self._lock()
        try:
            self._catch_up()
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def extend(self, drafts: Sequence[Draft]) -> list[Receipt]:
        """Write a group (one write, one fsync) and give where each stands. All of it is in the file, or nothing."""
        group = _Group(self.seq, self._prev)
        for owed in self._owed:
            group.add(owed)
        places = []
        stands = self._environment_stands
        for one in drafts:
            places.append(group.add(one))
            if not stands and one.environment_hash == self._environment_hash:
                group.add(self._environment)
                stands = True
        if group.lines:
            self._write(b"".join(group.lines))
        self.seq, self._prev, self._environment_stands = group.seq, group.prev, stands
        self._owed.clear()
        return [Receipt(seq, hash_, group.seq) for seq, hash_ in places]

    def rehearse(self) -> None:
        """Write at the end of the file as a record would be, and cut it off again."""
        try:
            _write_all(self._fd, b" " * _PROBE_BYTES)
            if self._fsync != "never":
                os.fdatasync(self._fd)
        finally:
            self._cut_back()

    def close(self) -> None:
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1
        self._identity = None

    def _lock(self) -> None:
        """Take the lock on the file that bears the lock's name now: somebody may have removed the folder since."""
        path = lock_path(self._path)
        while True:
            if self._lock_fd < 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            if _identity(os.fstat(self._lock_fd)) == _identity_at(path):
                return
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _catch_up(self) -> None:
        """Learn what others did since: appended, died in the middle of a write, moved the file away."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            status = None
        if status is None or _identity(status) != self._identity:
            status = self._open()
        if status.st_size != self._size:
            self._read_end(status.st_size)

    def _open(self) -> os.stat_result:
        if self._identity is not None:
            _log.warning("%s was removed or replaced; its name now holds a new chain", self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._identity = -1, None
        if is_foreign(first_line(self._path)):
            self._move_aside()
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        status = os.fstat(self._fd)
        self._identity = _identity(status)
        self._size, self.seq, self._prev = 0, 0, GENESIS
        self._environment_stands = False
        return status

    def _move_aside(self) -> None:
        """Keep what another program logged under this name beside the new chain; a record says so."""
        names = (f"{self._path.name}.before-{number}" for number in itertools.count(1))
        kept = next(name for name in names if not os.path.lexists(self._path.with_name(name)))
        size = self._path.stat().st_size
        self._path.rename(self._path.with_name(kept))
        _log.warning("%s was another program's log; it is kept as %s, and a new chain begins", self._path, kept)
        self._owe_recovered(size, kept)

    def _read_end(self, size: int) -> None:
        end = self._sound_end(size)
        seq, prev = 0, GENESIS
        if end > 0:
            last = check(next(lines_backwards(self._fd, end)))
            seq, prev = last["seq"], last["hash"]
        if end < size:
            self._cut_tail(end, size, seq + 1)
        self._size, self.seq, self._prev = end, seq, prev
        self._environment_stands = self._environment_stands or self._finds_environment(end)

    def _sound_end(self, size: int) -> int:
        """The end of the last whole line. After a power loss, a block that never reached the disk reads as NULs."""
        end = end_of_lines(self._fd, size)
        for line in lines_backwards(self._fd, end):
            if b"\x00" not in line:
                break
            end -= len(line)
        return end

    def _cut_tail(self, end: int, size: int, seq: int) -> None:
        """Cut off what a writer that is no more left behind; the bytes stay beside the log, and a record says so."""
        kept = self._keep(os.pread(self._fd, size - end, end), seq)
        os.ftruncate(self._fd, end)
        _log.warning("cut %d bytes of an unfinished line off %s; they are in %s", size - end, self._path, kept)
        self._owe_recovered(size - end, kept)

    def _owe_recovered(self, size: int, kept: str) -> None:
        """Have the next group begin with a record of the `size` bytes that lie in the file `kept`."""
        members = {"type": "recovered", "timestamp_ms": now_ms(), "cut_bytes": size, "kept_as": kept}
        self._owed.append(draft(members))

    def _keep(self, tail_: bytes, seq: int) -> str:
        name = f"{self._path.name}.torn-{seq}"
        number = 1
        while (path := self._path.with_name(name)).exists():
            number += 1
            name = f"{self._path.name}.torn-{seq}-{number}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        try:
            _write_all(fd, tail_)
            if self._fsync != "never":
                os.fsync(fd)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return name

    def _finds_environment(self, end: int) -> bool:
        """Whether the end of the log holds this environment, so that many short-lived writers do not repeat it."""
        start = max(0, end - _RECENT_BYTES)
        lines = os.pread(self._fd, end - start, start).split(b"\n")
        named = (parse_or_none(line) for line in lines if line.startswith(b'{"environment":{'))
        return any(record and record.get("environment_hash") == self._environment_hash for record in named)

    def _write(self, lines: bytes) -> None:
        try:
            _write_all(self._fd, lines)
            if self._fsync != "never":
                os.fdatasync(self._fd)
                if self._size == 0:
                    _sync_folder(self._path.parent)
        except OSError:
            self._cut_back()
            raise
        self._size += len(lines)

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._identity = None  # what the file holds is unknown: open it anew and read its end
            raise


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _identity_at(path: Path) -> tuple[int, int] | None:
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A record on its way, and its caller, in whichever loop that is."""

    draft: Draft
    future: asyncio.Future[Receipt]


_Answers = list[tuple[_Waiting, "Receipt | LedgerError"]]


def _answer(answers: _Answers) -> None:
    """Wake each loop once for all of its callers, in the order of the file."""
    by_loop: dict[asyncio.AbstractEventLoop, _Answers] = defaultdict(list)
    for answer in answers:
        by_loop[answer[0].future.get_loop()].append(answer)
    for loop, group in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_settle, group)


def _settle(answers: _Answers) -> None:
    for waiting, answer in answers:
        if waiting.future.done():
            continue
        if isinstance(answer, Receipt):
            waiting.future.set_result(answer)
        else:
            waiting.future.set_exception(answer)


class Ledger:
    """The one writer of a process. `open` it, append from any loop, `close` it.

    `reason` is a sentence on why it cannot be written, None while it can; `hint` what to do, None for the catalogue's.
    """

    def __init__(self, path: Path, *, fsync: Fsync, environment: Mapping[str, Any]) -> None:
        self.path = path
        self.reason: str | None = "the ledger is not open"
        self.hint: str | None = None
        self._fsync = fsync
        self._chain = _Chain(path, fsync, environment)
        self._writing = threading.Lock()
        self._gate = threading.Lock()
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pid = 0

    @property
    def healthy(self) -> bool:
        """Whether the last that was tried succeeded; `reason` says what did not."""
        return self.reason is None

    @property
    def size(self) -> int:
        """Lines in the ledger, as far as this process knows: others may have appended since its last write."""
        return self._chain.seq

    def open(self) -> None:
        """Make the folder and the file, heal a torn tail, move another program's log aside, start the writer.

        A failure leaves it unhealthy, and trying. A forked child opens a ledger of its own.
        """
        self._pid = os.getpid()
        self._attempt(self._recover)
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what still waits, answer it, and let go of the file. Blocks until then."""
        with self._gate:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._queue.put(None)
        thread.join()
        with self._writing:
            self._chain.close()
            self.reason, self.hint = "the ledger is closed", None

    async def append(self, record: Record) -> Receipt:
        """Write one record, and return once it is in the file, as safely as `fsync` asks; see `submit`."""
        return await self.submit(record)

    def submit(self, record: Record) -> asyncio.Future[Receipt]:
        """Give one record to the writer; the future is done once it is in the file. Needs a running event loop.

        `record` has the members of a call in `schemas/record.schema.json`; those it leaves out are null; `v`, `seq`,
        `prev` and `hash` are the ledger's. A caller that is cancelled while it waits does not lose the line. Raises
        `LedgerError` where it cannot be written, `ValueError` for an unknown member or a value that is not JSON.
        """
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._enqueue(_Waiting(draft_call(record), future))
        return future

    def probe(self) -> bool:
        """Try whether the ledger can be written now; blocks for as long as the disk takes. Sets `healthy`.

        A healthy ledger is tried with a small file beside it; one that failed also by a write at its own end. One that
        is not open is not tried.
        """
        if self._thread is not None:
            self._attempt(self._rehearse)
        return self.healthy

    def _attempt(self, step: Callable[[], None]) -> None:
        with self._writing:
            try:
                step()
            except (OSError, BrokenLineError) as error:
                self._note_failure(error)
            else:
                self.reason = self.hint = None

    def _recover(self) -> None:
        """Also tries to write: a process that makes one call has no line before it that would have told."""
        with self._chain.locked():
            self._chain.extend(())
            self._chain.rehearse()

    def _rehearse(self) -> None:
        self._try_beside()
        with self._chain.locked():
            if not self.healthy:
                self._chain.rehearse()
            self._chain.extend(())

    def _try_beside(self) -> None:
        path = self.path.with_name(f"{self.path.name}.probe-{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        try:
            _write_all(fd, b" " * _PROBE_BYTES)
            os.fsync(fd)
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)

    def _enqueue(self, waiting: _Waiting) -> None:
        with self._gate:  # so that nothing comes behind the None that ends the writer
            if self._thread is None:
                raise LedgerError("the ledger is not open")
            if self._pid != os.getpid():
                raise LedgerError("the ledger was opened by another process; its writer is not in this one")
            self._queue.put(waiting)

    def _run(self) -> None:
        ended = False
        while not ended:
            group = self._take()
            ended = bool(group) and group[-1] is None
            self._write([waiting for waiting in group if waiting is not None])

    def _take(self) -> list[_Waiting | None]:
        """All that wait; nothing after `RETRY_S` without any, when an unwell ledger tries to get well again."""
        try:
            group = [self._queue.get(timeout=RETRY_S)]
        except queue.Empty:
            if not self.healthy:
                self.probe()
            return []
        with contextlib.suppress(queue.Empty):
            while len(group) < _GROUP_LIMIT:
                group.append(self._queue.get_nowait())
        return group

    def _write(self, group: list[_Waiting]) -> None:
        size = 1 if self._fsync == "always" else _GROUP_LIMIT
        parts = [group[start : start + size] for start in range(0, len(group), size)]
        with self._writing:
            try:
                with self._chain.locked() if parts else contextlib.nullcontext():
                    while parts:
                        receipts = self._chain.extend([waiting.draft for waiting in parts[0]])
                        self.reason = self.hint = None
                        _answer(list(zip(parts.pop(0), receipts, strict=True)))
            except Exception as error:  # noqa: BLE001  # a dead writer would leave every caller waiting for ever
                self._note_failure(error)
                _answer([(waiting, LedgerError(str(self.reason), self.hint)) for part in parts for waiting in part])

    def _note_failure(self, error: Exception) -> None:
        if isinstance(error, BrokenLineError):
            reason, hint = f"the last line of the ledger {self.path} is broken: {error.detail}", _BROKEN_HINT
        else:
            reason, hint = f"the ledger {self.path} cannot be written: {error}", None
        if reason != self.reason:
            expected = isinstance(error, OSError | BrokenLineError)
            _log.error(reason, exc_info=None if expected else error)
        self.reason, self.hint = reason, hint
