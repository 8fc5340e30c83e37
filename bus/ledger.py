"""Writing the ledger: one lock that every process takes, one write and one fsync for a group of records.

Whatever waits is written as a group and answered once it is in the file. What a failed write left is cut off again, so
the file holds whole lines that were answered, and at most one group that was not.

The event loop itself writes a group where that takes a few microseconds: the lock is free and the file as we left it.
Only the fsync is then a thread's. All else (waiting for the lock, reading, healing, large groups) is the thread's as
well. One that wrote everything would want the interpreter back from the loop after each of its system calls, which
costs far more than the calls themselves.
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
from functools import partial
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
_SMALL_BYTES = 1 << 18
"""What the event loop may write by itself, in bytes."""
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
    """Lines for one write, chained to what is in the file; `places` has where each of its records will stand."""

    def __init__(self, seq: int, prev: str, *, environment_stands: bool) -> None:
        self.seq = seq
        self.prev = prev
        self.environment_stands = environment_stands
        self.places: list[tuple[int, str]] = []
        self.text = bytearray()

    def add(self, draft: Draft) -> tuple[int, str]:
        """Chain one more; gives its seq and hash."""
        self.seq += 1
        line, self.prev = draft.line(self.seq, self.prev)
        self.text += line
        return self.seq, self.prev

    def receipts(self) -> list[Receipt]:
        return [Receipt(seq, hash_, self.seq) for seq, hash_ in self.places]


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
            self.unlock()

    def try_lock(self) -> bool:
        """Take the lock of all processes if nobody has it and the file is as we left it. Does not wait."""
        if self._lock_fd < 0:
            return False
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody has it; or it cannot be taken, which who waits for it will say
            return False
        if self._is_as_left():
            return True
        self.unlock()
        return False

    def unlock(self) -> None:
        fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def extend(self, drafts: Sequence[Draft]) -> list[Receipt]:
        """Write a group and make it last. All of it is in the file then, or nothing."""
        return self.settle(self.write(drafts))

    def write(self, drafts: Sequence[Draft]) -> _Group:
        """Write a group; it counts only once it is settled."""
        group = _Group(self.seq, self._prev, environment_stands=self._environment_stands)
        for owed in self._owed:
            group.add(owed)
        for one in drafts:
            group.places.append(group.add(one))
            if not group.environment_stands and one.environment_hash == self._environment_hash:
                group.add(self._environment)
                group.environment_stands = True
        with self._or_cut_back():
            _write_all(self._fd, group.text)
        return group

    def settle(self, group: _Group) -> list[Receipt]:
        """Sync what was written, as far as asked for, and give where each record stands."""
        if group.seq > self.seq:
            with self._or_cut_back():
                self._sync()
        self.seq, self._prev, self._environment_stands = group.seq, group.prev, group.environment_stands
        self._size += len(group.text)
        self._owed.clear()
        return group.receipts()

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

    def _is_as_left(self) -> bool:
        """Whether log and lock bear their names still, and nobody has appended."""
        try:
            status = self._path.stat()
            return (
                _identity(status) == self._identity
                and status.st_size == self._size
                and _identity(os.fstat(self._lock_fd)) == _identity_at(lock_path(self._path))
            )
        except OSError:
            return False

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

    def _sync(self) -> None:
        if self._fsync != "never":
            os.fdatasync(self._fd)
            if self._size == 0:
                _sync_folder(self._path.parent)

    @contextlib.contextmanager
    def _or_cut_back(self) -> Iterator[None]:
        """Where the file system refuses, leave the file as it was before the group."""
        try:
            yield
        except OSError:
            self._cut_back()
            raise

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


def _write_all(fd: int, data: bytes | bytearray) -> None:
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
    written: Callable[[Receipt], object] | None


_Answers = list[tuple[_Waiting, "Receipt | LedgerError"]]


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
        self._waiting: list[_Waiting] = []
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
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
            self._steps.put(self._write_rest)  # behind the sync that may be under way
            self._steps.put(None)
        thread.join()
        with self._writing:
            self._chain.close()
            self.reason, self.hint = "the ledger is closed", None

    async def append(self, record: Record) -> Receipt:
        """Write one record, and return once it is in the file, as safely as `fsync` asks; see `submit`."""
        return await self.submit(record)

    def submit(self, record: Record, written: Callable[[Receipt], object] | None = None) -> asyncio.Future[Receipt]:
        """Have one record written; the future is done once it is in the file. Needs a running event loop.

        `record` has the members of a call in `schemas/record.schema.json`; those it leaves out are null; `v`, `seq`,
        `prev` and `hash` are the ledger's. A caller that is cancelled while it waits does not lose the line: `written`
        is called all the same once it stands, in the loop and before the future is done; it raises nothing. Raises
        `LedgerError` where it cannot be written, `ValueError` for an unknown member or a value that is not JSON.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Receipt] = loop.create_future()
        if self._enqueue(_Waiting(draft_call(record), future, written)):
            loop.call_soon(self._flush)  # behind the other calls of this turn, so that one write takes them all
        return future

    def probe(self) -> bool:
        """Try whether the ledger can be written now; blocks for as long as the disk takes. Sets `healthy`.

        A healthy ledger is tried with a small file beside it; one that failed also by a write at its own end. One that
        is not open is not tried.
        """
        if self._thread is not None:
            self._attempt(self._rehearse)
            self._flush()
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

    def _enqueue(self, waiting: _Waiting) -> bool:
        """Says whether it is the first that waits; the others are written with it."""
        with self._gate:  # so that nothing comes behind the last group
            if self._thread is None:
                raise LedgerError("the ledger is not open")
            if self._pid != os.getpid():
                raise LedgerError("the ledger was opened by another process; its writer is not in this one")
            self._waiting.append(waiting)
            return len(self._waiting) == 1

    def _flush(self) -> None:
        """Begin to write what waits. Somebody who writes already is not waited for: he comes here when he is done."""
        with self._gate:
            if self._thread is None or not self._waiting or not self._writing.acquire(blocking=False):
                return
            self._steps.put(self._begin(self._take()))

    def _take(self) -> list[_Waiting]:
        group, self._waiting = self._waiting[:_GROUP_LIMIT], self._waiting[_GROUP_LIMIT:]
        return group

    def _begin(self, group: list[_Waiting]) -> Callable[[], None]:
        """Write a group here if that is quick, and give what is left to do; that lets go of `_writing` in the end."""
        drafts = [one.draft for one in group]
        is_small = sum(one.size for one in drafts) <= _SMALL_BYTES
        if is_small and self._fsync != "always" and self._chain.try_lock():
            try:
                return partial(self._complete, group, self._chain.write(drafts))
            except Exception:  # noqa: BLE001  # the thread tries again, and says what is wrong
                self._chain.unlock()
        return partial(self._write, group)

    def _complete(self, group: list[_Waiting], written: _Group) -> None:
        """Sync and answer a group that the loop wrote."""
        answers: Sequence[Receipt | LedgerError]
        try:
            answers = self._chain.settle(written)
            self.reason = self.hint = None
        except Exception as error:  # noqa: BLE001  # as in `_write`
            answers = self._failures(error, len(group))
        self._chain.unlock()
        self._writing.release()
        if not self._answer(group, answers):
            self._flush()

    def _write(self, group: list[_Waiting]) -> None:
        """Write, sync and answer a group; waits for whoever has the lock, and heals what is to be healed."""
        size = 1 if self._fsync == "always" else _GROUP_LIMIT
        parts = [group[start : start + size] for start in range(0, len(group), size)]
        try:
            with self._chain.locked():
                while parts:
                    receipts = self._chain.extend([one.draft for one in parts[0]])
                    self.reason = self.hint = None
                    self._answer(parts.pop(0), receipts)
        except Exception as error:  # noqa: BLE001  # a dead writer would leave every caller waiting for ever
            rest = [one for part in parts for one in part]
            self._answer(rest, self._failures(error, len(rest)))
        self._writing.release()
        self._flush()

    def _write_rest(self) -> None:
        """The last groups: nothing comes any more."""
        while self._waiting:
            self._writing.acquire()
            self._write(self._take())

    def _run(self) -> None:
        """The thread: one step after the other."""
        while True:
            try:
                step = self._steps.get(timeout=RETRY_S)
            except queue.Empty:
                step = self._look_after
            if step is None:
                return
            step()

    def _look_after(self) -> None:
        """Now and then: try to get well again, and write what a loop left that ended before it came to write."""
        if not self.healthy:
            self.probe()
        self._flush()

    def _answer(self, group: Sequence[_Waiting], answers: Sequence[Receipt | LedgerError]) -> bool:
        """Wake each loop once for all of its callers, in the order of the file; says whether one was there to wake."""
        by_loop: dict[asyncio.AbstractEventLoop, _Answers] = defaultdict(list)
        for one, answer in zip(group, answers, strict=True):
            by_loop[one.future.get_loop()].append((one, answer))
        woken = False
        for loop, settled in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(self._settle, settled)
                woken = True
        return woken

    def _settle(self, answers: _Answers) -> None:
        """In the callers' loop: let them go on, and begin with what came meanwhile."""
        for waiting, answer in answers:
            if isinstance(answer, Receipt) and waiting.written:
                waiting.written(answer)
            if waiting.future.done():  # cancelled
                continue
            if isinstance(answer, Receipt):
                waiting.future.set_result(answer)
            else:
                waiting.future.set_exception(answer)
        self._flush()

    def _failures(self, error: Exception, count: int) -> list[LedgerError]:
        """Note what failed, and give each caller an exception of its own."""
        self._note_failure(error)
        return [LedgerError(str(self.reason), self.hint) for _ in range(count)]

    def _note_failure(self, error: Exception) -> None:
        if isinstance(error, BrokenLineError):
            reason, hint = f"the last line of the ledger {self.path} is broken: {error.detail}", _BROKEN_HINT
        else:
            reason, hint = f"the ledger {self.path} cannot be written: {error}", None
        if reason != self.reason:
            expected = isinstance(error, OSError | BrokenLineError)
            _log.error(reason, exc_info=None if expected else error)
        self.reason, self.hint = reason, hint
