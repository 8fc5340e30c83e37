"""Mode `worker`: the overlay's program loops, and one process of it, a worker, serves call after call.

The contract: for each call the program reads one line from stdin, the JSON envelope, and writes one line to stdout
(and flushes it), the JSON reply: the protocol reply with the call's `request_id` beside its members. `ok` may be left
out beside `result`, and is then true. It never writes anything else to stdout, and ends when stdin does:

    {"request_id": "0190...", "ok": true, "result": 42}

A worker has one call at a time. A call that times out or is cancelled is answered at once. Where its caller allowed
less time than the overlay's own timeout, or the worker is still loading (it has `start_timeout_s` for its first reply),
that leaves the worker *late*: it keeps its place and takes no call until its reply has come, which is read, checked and
dropped. So an impatient caller costs nobody a warm worker, nor one that is still loading. Once its time is over as well
the worker is ended, and its group with it. So is one that says something without being asked, or for another call, so
that no result can go to another caller. Where a worker that has answered before ends by itself without having read any
of its call, that goes on to another; where any of it was read, the work may have been done, and the call fails.

One that declares it is told of a purge, by a line which it does not answer: at once where it is free, else after its
reply and before the next call. So a call is always the last in its pipe, and what lies before it is no part of it.

    {"event":"purge"}

A call costs no task, no timer and no thread: a write, one callback when the reply is there, and a future.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol

from runners.alarm import TICK_S
from runners.base import LARGE_BYTES, PURGE, Code, JsonError, Outcome, parse_json
from runners.logs import Voice
from runners.output import Log, close_all, describe, excess, preview
from runners.unstarted import unstarted
from runners.worker_pipes import Pipes

if TYPE_CHECKING:
    from collections.abc import Callable

    from runners.base import Job, Sandbox
    from runners.exits import Exit
    from runners.processes import Home, Process
    from runners.worker_pool import Means

log = logging.getLogger(__name__)

_PURGE_LINE = PURGE + b"\n"
"""Shorter than PIPE_BUF, so a pipe takes it whole or not at all."""

State = Literal["loading", "idle", "busy", "late", "ending"]
"""What a worker does. `loading`: it has never answered; `late`: nobody waits any more for the reply that it owes."""


class ReplyError(ValueError):
    """A worker's line that is no reply to its call. The message goes on after "the worker"."""


def reply_on(line: bytes, request_id: str) -> dict[str, Any]:
    """The protocol reply on a worker's line, with `ok` and without the `request_id`. Raises `ReplyError`."""
    try:
        reply = parse_json(line)
    except JsonError as error:
        raise ReplyError(f"wrote a line that is not JSON ({error}): {preview(line)}") from None
    if type(reply) is not dict:
        raise ReplyError(f"wrote a line that is not an object: {preview(line)}")
    named = reply.pop("request_id", None)
    if named != request_id:
        raise ReplyError(f"wrote a line whose request_id is not the call's, {request_id!r}: {preview(line)}")
    if "ok" not in reply:
        if "result" not in reply:
            raise ReplyError(f"wrote a line with neither ok nor result: {preview(line)}")
        reply["ok"] = True
    return reply


class WorkerCall:
    """A job on its way. `worker` is the one that has it; None while it waits, and once it is answered."""

    __slots__ = ("answer", "job", "since", "worker")

    def __init__(self, job: Job, since: float, answer: asyncio.Future[Outcome]) -> None:
        self.job = job
        self.since = since
        self.answer = answer
        self.worker: Worker | None = None

    def finish(self, outcome: Outcome) -> None:
        """Answer it. Nothing happens where that was done, or nobody waits any more."""
        self.worker = None
        if not self.answer.done():
            self.answer.set_result(outcome)

    @property
    def allowed_s(self) -> float:
        return self.job.deadline - self.since


class Owner(Protocol):
    """Who gives a worker its calls: its pool."""

    home: Home
    argv: tuple[str, ...]
    log_limit: int
    start_timeout_s: float
    data_bytes: int

    @property
    def may_mb(self) -> int:
        """What a worker may have of memory, in MiB."""

    def ready(self, worker: Worker) -> None:
        """It has started: give it a call, or let it rest."""

    def free(self, worker: Worker) -> None:
        """It has answered: give it the next call, let it rest, or let it go."""

    def withdraw(self, worker: Worker) -> None:
        """Give it no more calls."""

    def stopping(self, worker: Worker) -> None:
        """It is on its way out, and another may take its place."""

    def again(self, call: WorkerCall) -> None:
        """Take back, to the front, a call that no worker has read."""

    def unstarted(self, worker: Worker, failure: Outcome) -> None:
        """It could not be started."""

    def gone(self, worker: Worker, failure: Outcome) -> None:
        """Nothing of it is left. `failure` says why."""


class Worker:
    """One process that loops, from before its start until nothing of it is left; then `ended` is done.

    `calls` counts its replies, `purges` how often it was told to let go of its caches, `memory_mb` is what it had when
    it was last looked at, `peak_mb` the most of all looks, `sandbox` what the kernel holds it to once it has started.
    `number` is how the overlay's log calls it.
    """

    def __init__(self, number: int, owner: Owner, means: Means) -> None:
        self.overlay = owner.home.overlay
        self.phase = owner.home.phase
        self.process: Process | None = None
        self.call: WorkerCall | None = None
        self.calls = 0
        self.purges = 0
        self.memory_mb: float | None = None
        self.peak_mb: float | None = None
        self.sandbox: Sandbox | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._owner = owner
        self._means = means
        self._voice = Voice(means.logs, self.overlay, f"worker {number}")
        self._began = time.monotonic()
        self._pipes = Pipes(
            self._loop, take_output=self._take_output, take_log=self._take_log, closed=self._closed_a_pipe
        )
        self._chunks: list[bytes] = []
        self._size = 0
        self._extra = b""
        self._log: Log | None = None
        self._parsing = False
        self._purge_is_due = False
        self._last_purge_ms = 0
        self._leaving = False
        self._signalled = False
        self._at_once = False
        self._fault: tuple[Code, str] | None = None
        self._exit: Exit | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def awaited(self) -> WorkerCall | None:
        """Its call, where somebody waits for the reply."""
        return self.call if self.call is not None and not self.call.answer.done() else None

    @property
    def doing(self) -> State:
        if self._leaving:
            return "ending"
        if self.call is not None and self.awaited is None:
            return "late"
        if not self.calls:
            return "loading"
        return "idle" if self.call is None else "busy"

    def told(self) -> dict[str, Any]:
        """What it is and does, as JSON for people. `pid` is that of the helper that it runs below."""
        told: dict[str, Any] = {"phase": self._owner.home.phase, "state": self.doing, "calls": self.calls}
        if self.process is not None:
            told |= {"pid": self.process.helper_pid, "uptime_s": round(time.monotonic() - self._began, 3)}
        if self.purges:
            told |= {"purges": self.purges, "last_purge_ms": self._last_purge_ms}
        return told if self.memory_mb is None else told | {"memory_mb": round(self.memory_mb, 1)}

    async def measure(self) -> float | None:
        """Look at the memory that it and all below it have, in MiB; None where there is nothing to see."""
        if self.process is None or (memory_mb := await self.process.memory_mb()) is None:
            return None
        self.memory_mb = memory_mb
        self.peak_mb = max(memory_mb, self.peak_mb or 0.0)
        return memory_mb

    def raise_limit(self, mb: int) -> None:
        if self.process is not None:
            self.process.raise_limit(mb)

    # Start

    def start(self) -> None:
        """Start the process. Where that fails, or is cancelled, its owner is told, and this worker has ended."""
        self._means.spawn(self._begin()).add_done_callback(self._begun)

    async def _begin(self) -> Process:
        theirs: list[int] = []
        try:
            self._pipes.open(theirs)
            stdin, stdout, stderr = theirs
            fds = stdin, stdout, stderr
            owner = self._owner
            return await self._means.helpers.start(
                owner.home, owner.argv, fds, data_bytes=owner.data_bytes, held_mb=owner.may_mb
            )
        finally:
            close_all(theirs)

    def _begun(self, beginning: asyncio.Task[Process]) -> None:
        if beginning.cancelled():  # the pools were closed; what may have been started ends with its helper
            self._not_started(Outcome(Code.CANCELLED, error="the runner was closed before the worker was started"))
        elif (error := beginning.exception()) is None:
            self._started(beginning.result())
        else:
            home = self._owner.home
            self._not_started(unstarted(self._owner.argv, home.env, home.folder, error).outcome)
            if not isinstance(error, OSError | ValueError):
                raise error

    def _not_started(self, failure: Outcome) -> None:
        self._leaving = True
        self._pipes.close()
        self._set_timer(None)
        self._voice.note(f"was not started: {failure.error}")
        self._owner.unstarted(self, failure)
        self.ended.set_result(None)

    def _started(self, process: Process) -> None:
        self.process = process
        self.raise_limit(self._owner.may_mb)  # which may have grown while it was started
        self.sandbox = process.sandbox_for("pool")
        self._began = time.monotonic()
        home = self._owner.home
        self._voice.note(f"starts (phase {home.phase}, edition {home.edition})")
        process.ended.add_done_callback(self._exited)
        self._pipes.watch_log()
        if self._fault is not None:
            self._signal_to_end()
            return
        self._pipes.watch_output()
        self._owner.ready(self)

    # A call

    def take(self, call: WorkerCall) -> None:
        """Send a call to this worker, which must be free."""
        self.call = call
        call.worker = self
        if call.job.meter is not None:
            call.job.meter.evict = functools.partial(self._evict, call)
        self._log = None
        self._size = 0
        self._pipes.send(call.job.envelope + b"\n")

    def _evict(self, call: WorkerCall, why: str) -> None:
        if self.call is call:
            self.stop(Code.EVICTED, f"was ended {why}", at_once=True)

    def _take_output(self, data: bytes) -> None:
        call = self.call
        if call is None or self._parsing:
            self._extra = self._extra or data
            if not self._parsing:
                self._stop_for_extra()
            return
        end = data.find(b"\n")
        self._size += len(data) if end < 0 else end
        if self._size > call.job.max_output_bytes:
            limit = call.job.max_output_bytes
            self.stop(Code.OUTPUT_TOO_LARGE, f"wrote more than {limit} bytes for one call, and was ended")
        elif end < 0:
            self._chunks.append(data)
        else:
            self._extra = data[end + 1 :]
            self._take_line(call, data[:end])

    def _stop_for_extra(self) -> None:
        self.stop(Code.PROTOCOL, f"wrote what nobody had asked for: {preview(self._extra)}")

    def _take_line(self, call: WorkerCall, line: bytes) -> None:
        if self._chunks:
            line = b"".join((*self._chunks, line))
            self._chunks.clear()
        if self._pipes.is_sending:
            self.stop(Code.PROTOCOL, f"wrote a line before it had read its call: {preview(line)}")
        elif len(line) > LARGE_BYTES:
            self._parsing = True
            reading = self._loop.run_in_executor(None, reply_on, line, call.job.request_id)
            reading.add_done_callback(functools.partial(self._parsed, call))
        else:
            self._judge(call, reply_on, line, call.job.request_id)

    def _parsed(self, call: WorkerCall, reading: asyncio.Future[dict[str, Any]]) -> None:
        """A reply was read in a thread; its process may have come to an end meanwhile."""
        self._parsing = False
        error = None if reading.cancelled() else reading.exception()
        if self.call is call and self._fault is None and not reading.cancelled():
            if isinstance(error, ReplyError | None):
                self._judge(call, reading.result)
            else:
                log.error("overlay %s: the reply of a worker could not be read", self.overlay, exc_info=error)
                self.stop(Code.PROTOCOL, f"wrote a line that could not be read: {error!r}")
        if self._exit is not None and not self.ended.done():
            self._finish(self._exit)

    def _judge(self, call: WorkerCall, read: Callable[..., dict[str, Any]], *arguments: object) -> None:
        try:
            reply = read(*arguments)
        except ReplyError as error:
            self.stop(Code.PROTOCOL, str(error))
        else:
            self._answer(call, reply)

    def _answer(self, call: WorkerCall, reply: dict[str, Any]) -> None:
        """Give the call its reply, after the worker has been given the next. A late reply goes nowhere."""
        log, size = self.log_of_call(), self._size
        self.call = None
        self.calls += 1
        if self._extra:
            self._stop_for_extra()
        elif not self._leaving:
            if self._timer is not None:
                self._set_timer(None)
            if self._purge_is_due:
                self._tell_purge()
            if not self._leaving:  # its stdin may have turned out closed
                self._owner.free(self)
        peak_mb = self.peak_mb
        call.finish(Outcome(result=reply, log=log, output_bytes=size, sandbox=self.sandbox, peak_mb=peak_mb))

    # A purge

    def purge(self) -> bool:
        """Tell it now, or once it has answered its call. Whether it is: not while it only starts or is about to end."""
        if self.process is None or self._leaving:
            return False
        if self.call is None:
            self._tell_purge()
        else:
            self._purge_is_due = True
        return not self._leaving

    def _tell_purge(self) -> None:
        """It must have no call. One that has yet to read of the last purge reads of this one with it."""
        self._purge_is_due = False
        if self._pipes.unread < len(_PURGE_LINE) and self._pipes.write(_PURGE_LINE) and not self._leaving:
            self.purges += 1
            self._last_purge_ms = time.time_ns() // 1_000_000

    def _patience_s(self) -> float:
        """Seconds for which its reply is worth waiting for, though its caller may not: 0 where it has had its time."""
        if self.call is None or self._leaving:
            return 0.0
        until = max(self.call.job.deadline, self.call.job.limit)
        if not self.calls:
            until = max(until, self._began + self._owner.start_timeout_s)
        left_s = until - time.monotonic()
        return left_s if left_s > TICK_S else 0.0

    def be_late(self) -> float:
        """Nobody waits for its reply any more: end it where that does not come in its time. How much that is yet."""
        left_s = self._patience_s()
        what = "had not answered in the time that it may take, and was ended"
        if left_s:
            self._set_timer(left_s, self.stop, Code.TIMEOUT, what)
        else:
            self.stop(Code.TIMEOUT, what)
        return left_s

    # The log

    def log_of_call(self) -> str:
        """What it has written to stderr since it was given its call."""
        self._pipes.read_log()  # it was written before the reply
        return self._kept_log()

    def _take_log(self, data: bytes) -> None:
        if self._log is None:
            self._log = Log(self._owner.log_limit if self.call is None else self.call.job.max_log_bytes)
        self._log.add(data)
        self._voice.say(data)

    def _kept_log(self) -> str:
        return "" if self._log is None else self._log.kept().decode("utf-8", "replace")

    # The end

    def end(self, why: str) -> None:
        """Let a worker that nobody waits for go: its stdin ends now, TERM follows after the grace, KILL after another.

        `why` goes on after its name.
        """
        if not self._leaving and not self.ended.done():
            self._leave(Code.CANCELLED, why)
            self._set_timer(self._means.kill_grace_s, self._signal_to_end)

    def stop(self, code: Code, what: str, *, at_once: bool = False) -> None:
        """TERM to the group now, KILL after the grace, or `at_once`. Its call gets this outcome once it has ended.

        `what` goes on after "the worker". Where it is on its way out already, the first reason stays.
        """
        if self.ended.done() or (self._signalled and not at_once):
            return
        self._at_once |= at_once
        if self._fault is None:
            self._leave(code, what)
        self._pipes.close_output()
        self._signal_to_end()

    def _leave(self, code: Code, what: str) -> None:
        self._fault = code, what
        self._leaving = True
        self._voice.note(what)
        self._owner.stopping(self)
        self._pipes.close_input()

    def _signal_to_end(self) -> None:
        """What is still being started gets its signal as soon as it is."""
        if self.process is None:
            return
        self._signalled = True
        if self._at_once:
            self._set_timer(None)
            self.process.signal(signal.SIGKILL)
        else:
            self.process.signal(signal.SIGTERM)
            self._set_timer(self._means.kill_grace_s, self.process.signal, signal.SIGKILL)

    def _closed_a_pipe(self, name: str) -> None:
        """It is about to end, then: wait for that, as its exit tells more."""
        if not self._leaving:
            self._leaving = True
            self._owner.withdraw(self)
            what = f"closed its {name} and went on, and was ended"
            self._set_timer(self._means.pace.exit_grace_s, self.stop, Code.PROTOCOL, what)

    def _set_timer(self, delay_s: float | None, act: Callable[..., None] | None = None, *arguments: object) -> None:
        """What is to be done later, in place of what was; nothing without a delay."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if delay_s is None or act is None else self._loop.call_later(delay_s, act, *arguments)

    def _exited(self, ended: asyncio.Future[Exit]) -> None:
        """The process has ended: take what it has left in its pipes, a reply perhaps."""
        self._leaving = True
        self._exit = exit_ = ended.result()
        call = self.awaited
        untouched = call is not None and self._pipes.is_untouched  # before the call may lie a purge, behind it nothing
        self._pipes.read_last()
        self._pipes.close()
        self._set_timer(None)
        if (
            call is not None
            and untouched
            and call is self.call
            and self.calls
            and self._fault is None
            and not self._parsing
        ):
            self._owner.again(call)
            self.call = None
        if not self._parsing or self._fault is not None:
            self._finish(exit_)

    def _finish(self, exit_: Exit) -> None:
        how = self._say(exit_)
        code, what = self._fault or (_code_of(exit_), how)
        failure = Outcome(
            code,
            error=f"the worker {what}",
            exit_code=exit_.code,
            peak_mb=exit_.peak_mb if exit_.had_too_much else self.peak_mb,
            log=self._kept_log(),
            output_bytes=self._size,
            retryable=True if code is Code.CRASH and exit_.lost is not None else None,
            sandbox=self.sandbox,
        )
        self._voice.end()
        self._voice.note(how)
        call, self.call = self.call, None
        if call is not None:
            call.finish(failure)
        self._owner.gone(self, failure)
        self.ended.set_result(None)

    def _say(self, exit_: Exit) -> str:
        if exit_.had_too_much:
            how = f"{excess(exit_.peak_mb or 0.0, self._owner.may_mb)}, and was ended"
        elif exit_.lost is not None:
            how = f"was ended from outside ({exit_.lost})"
        elif exit_.code is None:
            how = "ended"
        else:
            how = describe(exit_.code)
        if self.call is None:
            return how
        return f"{how} {'in the middle of a line' if self._chunks else 'before it answered'}"


def _code_of(exit_: Exit) -> Code:
    """What it was ended for, where nobody here had it ended, but its helper or the kernel perhaps."""
    if exit_.had_too_much:
        return Code.MEMORY_LIMIT
    if exit_.had_too_many:
        return Code.PROCESS_LIMIT
    return Code.SCRATCH_LIMIT if exit_.was_too_full else Code.CRASH
