"""Writing the ledger: whatever waits is written as a group, synced, and answered.

The event loop itself writes a group where that takes a few microseconds: the lock is free and the file as we left it.
The fsync is then the kernel's, or where it takes none, a thread's. All else (waiting for the lock, reading, healing,
large groups) is the thread's as well. One that wrote everything would want the interpreter back from the loop after
each of its system calls, which costs far more than the calls themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import queue
import threading
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.chain import PROBE_BYTES, Chain, Fsync, write_all
from bus.checkpoints import Checkpoints
from bus.errors import OverloadError
from bus.filesync import FileSync
from bus.groups import Group, Receipt
from bus.own_files import make_own
from bus.records import BrokenLineError, draft_record
from bus.segments import FILE_MODE, make_folder
from bus.upkeep import Upkeep
from runners.base import running_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from bus.model import Record
    from bus.notary import Notary
    from bus.records import Draft

__all__ = ["Fsync", "Ledger", "LedgerError", "Receipt"]

RETRY_S = 1
"""How often an idle writer tries again to write a ledger that could not be written; refusals say so in Retry-After."""

TURNS_ALONE, TURNS_AMONG_MANY = 8, 64
"""Turns of the loop that a group waits for more, at most. Where calls come quickly each turn brings some, so that one
write and one sync are for many: after a group of several it is worth waiting for. A loop that has nothing else to do
turns in a few microseconds."""

_log = logging.getLogger(__name__)
_GROUP_LIMIT = 1024
_SMALL_BYTES = 1 << 18
"""What the event loop may write by itself, in bytes."""
_SHORTAGES = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_BROKEN_HINT = (
    "aal provenance verify names the first bad line; with all files of the log moved away, a new chain begins."
)


class LedgerError(OverloadError):
    """The ledger cannot be written now."""

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__("ERR_LEDGER", detail, hint=hint, retry_after_s=RETRY_S)


class _Waiting(NamedTuple):
    """A record on its way, and its caller, in whichever loop that is."""

    draft: Draft
    future: asyncio.Future[Receipt]
    placed: Callable[[Receipt], object] | None
    written: Callable[[Receipt], object] | None


_Answers = list[tuple[_Waiting, "Receipt | LedgerError"]]


class _Flight(NamedTuple):
    """A group that is written, and that the kernel syncs."""

    waiting: list[_Waiting]
    written: Group


class _Ear(NamedTuple):
    """Where a loop hears that a flight has ended."""

    loop: asyncio.AbstractEventLoop
    eventfd: int

    def close(self) -> None:
        """In its loop, so that the number of the descriptor is not given to another while that still reads it."""
        if running_loop() is self.loop:
            self.loop.remove_reader(self.eventfd)
            os.close(self.eventfd)
            return
        try:
            self.loop.call_soon_threadsafe(self.close)
        except RuntimeError:  # it is closed, and reads no more
            os.close(self.eventfd)


class Ledger:
    """The one writer of a process. `open` it, append from any loop, `close` it.

    `reason` is a sentence on why it cannot be written, None while it can; `hint` what to do, None for the catalogue's.
    """

    def __init__(
        self,
        path: Path,
        *,
        fsync: Fsync,
        environment: Mapping[str, Any],
        more: Callable[[], bool] = lambda: True,
        notary: Notary | None = None,
        segment_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`more` says whether records may be on their way: where none are, a group is not kept waiting for any.

        With a `notary` every answer's receipt has a signed note of the tree that its line is in, unless `fsync` is
        never. A file of `segment_bytes` or more is closed, compressed, and followed by another; 0 is never. `clock`
        gives seconds; checkpoints are due by it.
        """
        self.path = path
        self.reason: str | None = "the ledger is not open"
        self.hint: str | None = None
        self._fsync = fsync
        self._more = more
        self._notary = notary
        self._checkpoints = Checkpoints(path, notary, clock=clock)
        self._chain = Chain(path, fsync, environment, self._checkpoints, segment_bytes=segment_bytes)
        self._upkeep = Upkeep(path)
        self._writing = threading.Lock()
        self._gate = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._steps: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._kernel: FileSync | None = None
        self._ear: _Ear | None = None
        self._flight: _Flight | None = None
        self._seen: _Flight | None = None
        self._gathers = False
        self._pid = 0

    @property
    def healthy(self) -> bool:
        """Whether the last that was tried succeeded; `reason` says what did not."""
        return self.reason is None

    @property
    def size(self) -> int:
        """Lines in the ledger, as far as this process knows: others may have appended since its last write."""
        return self._chain.seq

    @property
    def unsigned(self) -> str | None:
        """Why nothing is signed though there is a key; None where it is, and without a key."""
        return None if self._notary is None or self._notary.refusal is None else self._notary.refusal.detail

    def open(self, *, serves: bool = False) -> None:
        """Make the folder and the file, heal a torn tail, move another program's log aside, start the writer.

        A failure leaves it unhealthy, and trying. A forked child opens a ledger of its own. One that `serves` writes
        checkpoints also when time has passed, and when it is closed; and it compresses closed segments.
        """
        self._pid = os.getpid()
        self._checkpoints.serves = serves
        if self._fsync == "batch":
            with contextlib.suppress(OSError):  # the thread syncs then
                self._kernel = FileSync()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._attempt(self._recover)
        self._thread.start()
        if serves:
            self._upkeep.open()

    def close(self) -> None:
        """Write what still waits, answer it, and let go of the file. Blocks until then."""
        with self._gate:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._steps.put(self._write_rest)  # behind the sync that may be under way
            self._steps.put(None)
        thread.join()
        self._upkeep.close()
        with self._writing:
            self._chain.close()
            if self._notary is not None:
                self._notary.close()
            self._close_ear()
            if self._kernel is not None:
                self._kernel.close()
                self._kernel = None
            self.reason, self.hint = "the ledger is closed", None

    def submit(
        self,
        record: Record,
        *,
        placed: Callable[[Receipt], object] | None = None,
        written: Callable[[Receipt], object] | None = None,
    ) -> asyncio.Future[Receipt]:
        """Have one record written; the future is done once it is in the file. Needs a running event loop.

        `record` has the members of a call in `schemas/record.schema.json`; those it leaves out are null; `v`, `seq`,
        `prev` and `hash` are the ledger's. One of another type has all its members. A caller that is cancelled while it
        waits does not lose the line: `written` is called all the same once it stands, in the loop and before the future
        is done. `placed` may be called before that, while the disk is waited for: what can be prepared is best prepared
        then, but the line may come to nothing. Neither raises anything. Raises `LedgerError` where it cannot be
        written, `ValueError` for an unknown member or a value that is not JSON.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Receipt] = loop.create_future()
        if self._enqueue(_Waiting(draft_record(record), future, placed, written)):
            self._plan(loop)
        return future

    def probe(self) -> bool:
        """Try whether the ledger can be written now; blocks for as long as the disk takes. Sets `healthy`.

        A healthy ledger is tried with a small file beside it; one that failed also by a write at its own end. One that
        is not open is not tried.
        """
        self._attempt(self._rehearse)
        self._flush()
        return self.healthy

    def _attempt(self, step: Callable[[], None]) -> None:
        """Do something with the file, unless it was closed, and note whether that went well."""
        with self._writing:
            if self._thread is not None:
                self._do(step)

    def _do(self, step: Callable[[], None]) -> None:
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

    def _checkpoint(self, *, at_end: bool = False) -> None:
        """Unless another process has written one meanwhile."""
        with self._chain.locked():
            if self._chain.wants_checkpoint(at_end=at_end):
                self._chain.extend((), with_checkpoint=True)

    def _remember(self) -> None:
        self._chain.remember()

    def _try_beside(self) -> None:
        path = self.path.with_name(f"{self.path.name}.probe-{os.getpid()}")
        make_folder(path.parent, sync=True)
        fd = make_own(path, FILE_MODE)
        try:
            write_all(fd, b" " * PROBE_BYTES)
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

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write what waits, some turns of the loop from now."""
        self._turn(loop, TURNS_AMONG_MANY if self._gathers else TURNS_ALONE)

    def _turn(self, loop: asyncio.AbstractEventLoop, left: int) -> None:
        if left and self._more():
            loop.call_soon(self._turn, loop, left - 1)
        else:
            self._flush()

    def _flush(self) -> None:
        """Begin to write what waits. Somebody who writes already is not waited for: he comes here when he is done."""
        with self._gate:  # so that no step comes behind the last one
            if self._thread is None or not self._waiting or not self._writing.acquire(blocking=False):
                return
            group = self._take()
            self._gathers = len(group) > 1
            written = self._write_here(group)
            if written is None:
                self._steps.put(partial(self._write, group))
                return
            wants_sync = self._chain.fd_to_sync(written) is not None
            if wants_sync and not self._sync_by_kernel(group, written):
                self._steps.put(partial(self._commit_after, partial(self._chain.sync, written), group, written))
        if wants_sync:
            _tell_places(group, written)
        else:
            self._finish(group, written)

    def _take(self) -> list[_Waiting]:
        group, self._waiting = self._waiting[:_GROUP_LIMIT], self._waiting[_GROUP_LIMIT:]
        return group

    def _write_here(self, group: list[_Waiting]) -> Group | None:
        """Write a group if that is quick; None where it was not done. Then `_write` does it, or says what is wrong."""
        drafts = [one.draft for one in group]
        is_small = sum(one.size for one in drafts) <= _SMALL_BYTES
        if not is_small or self._fsync == "always" or not self._chain.try_lock():
            return None
        try:
            return self._chain.write(drafts)
        except Exception:  # noqa: BLE001  # the thread tries again, and says what is wrong
            return None
        finally:
            self._chain.unlock()

    def _sync_by_kernel(self, group: list[_Waiting], written: Group) -> bool:
        """Have a group synced that the loop wrote. False where a thread has to."""
        loop, fd = running_loop(), self._chain.fd_to_sync(written)
        if self._kernel is None or loop is None or fd is None:
            return False
        try:
            self._kernel.begin(fd, self._ear_of(loop).eventfd)
        except Exception as error:  # noqa: BLE001  # who holds the lock and does not go on would stop every writer
            self._do_without(self._kernel, error)
            return False
        self._flight = _Flight(group, written)
        return True

    def _do_without(self, kernel: FileSync, error: Exception) -> None:
        """The thread syncs this group; where it is not for want of something, all the others, too."""
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            return
        _log.info("a thread syncs the ledger, as the kernel does not: %s", error)
        self._kernel = None
        kernel.close()

    def _ear_of(self, loop: asyncio.AbstractEventLoop) -> _Ear:
        if self._ear is None or self._ear.loop is not loop:
            self._close_ear()
            self._ear = _Ear(loop, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            loop.add_reader(self._ear.eventfd, self._hear, self._ear)
        return self._ear

    def _close_ear(self) -> None:
        if self._ear is not None:
            self._ear.close()
            self._ear = None

    def _hear(self, ear: _Ear) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(ear.eventfd)
        self._land(self._flight)

    def _land(self, flight: _Flight | None) -> None:
        """The kernel has synced a group; or the thread waits for that, for a loop that does not run any more."""
        with self._gate:
            kernel = self._kernel
            if flight is None or kernel is None or flight is not self._flight:
                return
            self._flight = None
        self._commit_after(kernel.end, flight.waiting, flight.written)

    def _commit_after(self, sync: Callable[[], None], group: list[_Waiting], written: Group) -> None:
        """Have a group that the loop wrote synced, then let it count."""
        error = None
        try:
            sync()
        except Exception as failed:  # noqa: BLE001  # as above
            self._chain.abandon()
            error = failed
        self._finish(group, written, error)

    def _finish(self, group: list[_Waiting], written: Group, error: Exception | None = None) -> None:
        """Let a group count that the loop wrote, and answer it; with an `error` nobody is answered for it."""
        answers: Sequence[Receipt | LedgerError]
        if error is None:
            answers = self._chain.commit(written)
            if not written.is_told:
                self._aside(partial(self._vouch, group, written))
                return
            self._keep(written)
            self.reason = self.hint = None
        else:
            answers = self._failures(error, len(group))
        self._conclude(group, answers)

    def _vouch(self, group: list[_Waiting], written: Group) -> None:
        """Answer a group that counts, once it is known whether its note may be handed out."""
        answers = self._chain.vouch(written)
        self._keep(written)
        self.reason = self.hint = None
        self._conclude(group, answers)

    def _conclude(self, group: list[_Waiting], answers: Sequence[Receipt | LedgerError]) -> None:
        self._writing.release()
        if not self._answer(group, answers):
            self._flush()

    def _keep(self, written: Group) -> None:
        """Have the note of a group's checkpoint kept: not in the loop, which would wait for the disk."""
        if written.checkpoint_seq is not None:
            self._aside(partial(self._checkpoints.keep, written.checkpoint_note))

    def _aside(self, step: Callable[[], None]) -> None:
        """Do it in the thread where it would hold up a loop; now where there is none, or no thread any more."""
        with self._gate:  # so that no step comes behind the last one
            if self._thread is not None and running_loop() is not None:
                self._steps.put(step)
                return
        step()

    def _write(self, group: list[_Waiting]) -> None:
        """Write, sync and answer a group; waits for whoever has the lock, and heals what is to be healed."""
        size = 1 if self._fsync == "always" else _GROUP_LIMIT
        parts = [group[start : start + size] for start in range(0, len(group), size)]
        try:
            while parts:
                receipts = self._chain.append([one.draft for one in parts[0]])
                self.reason = self.hint = None
                self._answer(parts.pop(0), receipts)
        except Exception as error:  # noqa: BLE001  # a dead writer would leave every caller waiting for ever
            rest = [one for part in parts for one in part]
            self._answer(rest, self._failures(error, len(rest)))
        self._writing.release()
        self._flush()

    def _write_rest(self) -> None:
        """The last groups: nothing comes any more."""
        self._land(self._flight)
        while self._waiting:
            self._writing.acquire()
            self._write(self._take())
        if self.healthy and self._chain.wants_checkpoint(at_end=True):
            with self._writing:
                self._do(partial(self._checkpoint, at_end=True))
        if self.healthy:
            with self._writing:
                self._do(self._remember)

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
        """Now and then: try to get well again, and finish what a loop left that ended before it came to it."""
        left, self._seen = self._seen, self._flight
        if left is self._flight:
            self._land(left)
        if not self._writing.locked():  # else a loop writes; or it ended before it came to the end of that
            if not self.healthy:
                self.probe()
            elif self._chain.wants_checkpoint() or self._checkpoints.is_time_to_look():
                self._attempt(self._checkpoint)
        self._flush()

    def _answer(self, group: Sequence[_Waiting], answers: Sequence[Receipt | LedgerError]) -> bool:
        """Wake each loop once for all of its callers, in the order of the file; says whether one was there to wake."""
        by_loop: dict[asyncio.AbstractEventLoop, _Answers] = defaultdict(list)
        for one, answer in zip(group, answers, strict=True):
            by_loop[one.future.get_loop()].append((one, answer))
        woken, here = False, running_loop()
        for loop, answered in by_loop.items():
            if loop is here:
                self._resolve(answered)
                woken = True
                continue
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(self._resolve, answered)
                woken = True
        return woken

    def _resolve(self, answers: _Answers) -> None:
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
        if self._waiting:
            self._plan(asyncio.get_running_loop())

    def _failures(self, error: Exception, count: int) -> list[LedgerError]:
        """Note what failed, and give each caller an exception of its own."""
        self._note_failure(error)
        return [LedgerError(str(self.reason), self.hint) for _ in range(count)]

    def _note_failure(self, error: Exception) -> None:
        if isinstance(error, BrokenLineError):
            line = "the last line" if error.seq is None else f"line {error.seq}"
            reason, hint = f"{line} of the ledger {self.path} is broken: {error.detail}", _BROKEN_HINT
        else:
            reason, hint = f"the ledger {self.path} cannot be written: {error}", None
        if reason != self.reason:
            expected = isinstance(error, OSError | BrokenLineError)
            _log.error(reason, exc_info=None if expected else error)
        self.reason, self.hint = reason, hint


def _tell_places(group: Sequence[_Waiting], written: Group) -> None:
    """Let the callers of this loop use the time in which their group is synced."""
    here = running_loop()
    for one, receipt in zip(group, written.receipts(), strict=True):
        if one.placed and one.future.get_loop() is here and not one.future.done():
            one.placed(receipt)
