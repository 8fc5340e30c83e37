"""Mode `worker`: the overlay's program loops, and a pool of its processes serves many calls.

The contract: for each call the program reads one line from stdin, the JSON envelope, and writes one line to stdout
(and flushes it), the JSON reply: the protocol reply with the call's `request_id` beside its members. `ok` may be left
out beside `result`, and is then true. It never writes anything else to stdout, and ends when stdin does:

    {"request_id": "0190...", "ok": true, "result": 42}

A worker has one call at a time. What it says without being asked, or for another call, ends it, so that no result can
go to another caller; so does a call that times out or is cancelled, as its reply may still come. Such a call is
answered once its worker has ended. The call of a worker that ended by itself without having read any of it goes on to
another; where any of it was read, it may have done its work, and fails.

A call costs no task, no timer and no thread: a write, one callback when the reply is there, and a future.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import signal
import termios
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runners.base import LARGE_BYTES, Code, JsonError, Outcome, ProcessTarget, parse_json
from runners.helpers import SHORTAGES, Home
from runners.output import READ_SIZE, Log, describe, preview

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from runners.base import Job
    from runners.helpers import Exit, Helpers, Process
    from runners.logs import OverlayLogs

MEMORY_EVERY_S = 1.0
"""A worker's memory is looked at after its first call, and then after a call at most once in so many seconds."""

EXIT_GRACE_S = 0.25
"""How long, in seconds, a worker that has closed its stdin or stdout has to end by itself."""

FIRST_BACKOFF_S = 0.25
"""How long no worker is started once two in a row have ended before they ever answered; doubled for each further."""

LONGEST_BACKOFF_S = 15.0
"""The doubling stops here, in seconds."""

LAST_READS = 16
"""Reads from each pipe of an ended worker: a full megabyte, the largest that an ordinary user may give a pipe."""

_TICK_S = 0.001
"""The clocks of event loops are that coarse, in seconds: a timer may fire so much too early."""

_STARTLESS = frozenset({Code.START, Code.CRASH, Code.PROTOCOL})
_CLOSED = -1


class ReplyError(ValueError):
    """A worker's line that is no reply to its call. The message goes on after "the worker"."""


def read_reply(line: bytes, request_id: str) -> dict[str, Any]:
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


def _lying_in(pipe: int) -> int:
    """How many bytes were written to a pipe and not yet read, told by either of its ends: FIONREAD, pipe(7)."""
    size = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, size)
    return size[0]


class WorkerPools:
    """The workers of every overlay: one pool for each phase, rights, command and code. Used in one event loop only."""

    def __init__(self, helpers: Helpers, logs: OverlayLogs | None, *, kill_grace_s: float, idle_s: float) -> None:
        self._means = _Means(helpers, logs, kill_grace_s, idle_s)
        self._pools: dict[Any, _Pool] = {}
        self._editions: dict[str, tuple[str, int]] = {}
        self._closed = False

    async def run(self, job: Job) -> Outcome:
        """Have a worker answer, or end it at `job.deadline`. Raises nothing but `asyncio.CancelledError`."""
        if self._closed:
            return Outcome(Code.CANCELLED, error="the runner was closed before the call could start")
        if job.deadline <= (now := time.monotonic()):
            return Outcome(Code.TIMEOUT, error="the deadline had passed before the call could start")
        pool = self._pool(job)
        call = _Call(job, now, pool.loop.create_future())
        pool.submit(call)
        try:
            return await call.answer
        except asyncio.CancelledError:
            await pool.abandon(call)
            raise

    def state(self, overlay: str) -> dict[str, Any]:
        """The workers of an overlay that serve or will: phase, state, calls answered, memory in MiB once known."""
        pools = [pool for pool in self._pools.values() if pool.home.overlay == overlay]
        workers = [worker.state() for pool in pools for worker in pool.workers]
        return {"workers": workers} if workers else {}

    async def close(self) -> None:
        """End every worker, and start no more. Calls that wait or run get ERR_CANCELLED."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()
        workers = list(self._means.alive)
        for worker in workers:
            worker.stop(Code.CANCELLED, "still had the call when the runner was closed, and was ended")
        if workers:
            await asyncio.wait([worker.ended for worker in workers])
        if self._means.tasks:
            await asyncio.wait(self._means.tasks)

    def _pool(self, job: Job) -> _Pool:
        target = job.target
        if not isinstance(target, ProcessTarget):
            raise TypeError(f"a worker cannot carry {target!r}")
        # An environment is made anew with each reading of the manifest; a pool holds its own, so that the id stays.
        edition = (job.code_hash, id(target.env))
        key = (job.overlay, job.phase, job.rights, target.argv, edition)
        pool = self._pools.get(key)
        if pool is None:
            forget = functools.partial(self._pools.pop, key, None)
            pool = self._pools[key] = _Pool(self._means, job, target, forget)
        if self._editions.get(job.overlay) != edition:
            self._turn_to(job.overlay, edition)
        return pool

    def _turn_to(self, overlay: str, edition: tuple[str, int]) -> None:
        """The newest call says which code is current; pools of any other keep no worker that has nothing to do."""
        self._editions[overlay] = edition
        for pool in self._pools.values():
            if pool.home.overlay == overlay:
                pool.drain((pool.home.code_hash, id(pool.home.env)) != edition)


@dataclass(frozen=True, slots=True)
class _Means:
    """What all pools share. `alive` holds every worker from before its start until nothing of it is left."""

    helpers: Helpers
    logs: OverlayLogs | None
    kill_grace_s: float
    idle_s: float
    alive: set[_Worker] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class _Call:
    """A job on its way. `worker` is the one that has it; None while it waits, and once it is answered."""

    __slots__ = ("answer", "job", "since", "worker")

    def __init__(self, job: Job, since: float, answer: asyncio.Future[Outcome]) -> None:
        self.job = job
        self.since = since
        self.answer = answer
        self.worker: _Worker | None = None

    def finish(self, outcome: Outcome) -> None:
        self.worker = None
        if not self.answer.done():  # cancelled, and its task has not run since
            self.answer.set_result(outcome)

    @property
    def allowed_s(self) -> float:
        return self.job.deadline - self.since


class _Pool:
    """Workers of one kind and the calls that wait for them, first come first served.

    One timer stands for the deadlines of all its calls: it is set to the earliest, and when it fires, to the next.
    """

    def __init__(self, means: _Means, job: Job, target: ProcessTarget, forget: Callable[[], object]) -> None:
        self.means = means
        self.loop = asyncio.get_running_loop()
        self.home = Home(job.overlay, job.phase, job.rights, job.folder, target.env, job.code_hash)
        self.argv = target.argv
        self.log_limit = job.max_log_bytes
        self.workers: list[_Worker] = []
        self.failures = 0
        self._limits = target.workers
        self._forget = forget
        self._free: list[_Worker] = []
        self._waiting: deque[_Call] = deque()
        self._stopping: set[_Worker] = set()
        self._draining = False
        self._last_failure = Outcome(Code.START)
        self._not_before = -math.inf
        self._used = self.loop.time()
        self._due = math.inf
        self._due_timer: asyncio.TimerHandle | None = None
        self._idle_timer = self.loop.call_later(means.idle_s, self._look_if_idle)

    # Calls

    def submit(self, call: _Call) -> None:
        """Give the call to a free worker, or let it wait for one."""
        if call.job.deadline < self._due:
            self._watch(call.job.deadline)
        if self._free:
            self._free.pop().take(call)
            return
        self._waiting.append(call)
        if len(self.workers) < self._limits.count:
            self._grow()

    async def abandon(self, call: _Call) -> None:
        """Take back a call whose caller has gone. Returns once its worker has ended, however often it is cancelled."""
        worker = call.worker
        if worker is None:
            with contextlib.suppress(ValueError):
                self._waiting.remove(call)
            return
        worker.stop(Code.CANCELLED, "was ended, as the caller went away")
        while not worker.ended.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(worker.ended)

    def again(self, call: _Call) -> None:
        """Take back, to the front, a call whose worker has ended without reading it."""
        call.worker = None
        self._waiting.appendleft(call)

    def _next(self) -> _Call | None:
        while self._waiting:
            call = self._waiting.popleft()
            if not call.answer.done():
                return call
        return None

    def _refuse(self, outcome: Outcome) -> None:
        while (call := self._next()) is not None:
            call.finish(outcome)

    # Deadlines

    def _watch(self, deadline: float) -> None:
        if self._due_timer is not None:
            self._due_timer.cancel()
        self._due = deadline
        self._due_timer = self.loop.call_later(deadline - time.monotonic(), self._expire)

    def _expire(self) -> None:
        now = time.monotonic() + _TICK_S
        for worker in list(self.workers):
            if worker.call is not None and worker.call.job.deadline <= now:
                hint = "" if worker.calls else "; its reply is to be one line, and flushed"
                what = f"had not answered within the call's {worker.call.allowed_s:.3f} s, and was ended{hint}"
                worker.stop(Code.TIMEOUT, what)
        overdue = [call for call in self._waiting if call.job.deadline <= now]
        self._waiting = deque(call for call in self._waiting if call.job.deadline > now)
        for call in overdue:
            error = f"none of {self._limits.count} workers was free within the call's {call.allowed_s:.3f} s"
            call.finish(Outcome(Code.TIMEOUT, error=error))
        self._due = math.inf
        if (due := min(self._deadlines(), default=math.inf)) < math.inf:
            self._watch(due)

    def _deadlines(self) -> Iterator[float]:
        yield from (call.job.deadline for call in self._waiting)
        yield from (worker.call.job.deadline for worker in self.workers if worker.call is not None)

    # Workers come and go

    def _grow(self) -> None:
        """Start workers for the calls that wait. As many again as the pool may have may be on their way out."""
        if not self._waiting:
            return
        if (left_s := self._not_before - self.loop.time()) > _TICK_S:
            if not self.workers:
                self._refuse(self._backed_off(left_s))
            return
        count = self._limits.count
        starting = sum(worker.process is None for worker in self.workers)
        room = min(count - len(self.workers), 2 * count - len(self.workers) - len(self._stopping))
        for _ in range(min(room, len(self._waiting) - starting)):
            worker = _Worker(self)
            self.workers.append(worker)
            self.means.alive.add(worker)
            self.means.spawn(worker.start())

    def _backed_off(self, left_s: float) -> Outcome:
        last = self._last_failure
        error = f"{last.error}; {self.failures} in a row never answered, and the next is not started for {left_s:.3f} s"
        return dataclasses.replace(last, error=error, retryable=True)

    def free(self, worker: _Worker, job: Job) -> None:
        """A worker has answered: give it the next call, or let it rest, or let it go."""
        if self.failures:
            self.failures = 0
            self._not_before = -math.inf
        self._used = now = self.loop.time()
        if worker.calls >= self._limits.max_calls or worker.too_big:
            worker.end()
            return
        if now >= worker.measure_at:
            worker.measure_at = now + MEMORY_EVERY_S
            self.means.spawn(self._measure(worker, self._limits.max_mb or job.hard_mb))
        self.ready(worker)

    def ready(self, worker: _Worker) -> None:
        if (call := self._next()) is not None:
            worker.take(call)
        elif self._draining:
            worker.end()
        else:
            self._free.append(worker)

    async def _measure(self, worker: _Worker, max_mb: int) -> None:
        if worker.process is None or (memory_mb := await worker.process.memory_mb()) is None:
            return
        worker.memory_mb = memory_mb
        if memory_mb > max_mb and worker in self.workers:
            worker.too_big = True
            worker.note(f"has {memory_mb:.1f} MB of memory, more than {max_mb}, and is replaced")
            if worker in self._free:
                worker.end()

    def withdraw(self, worker: _Worker) -> None:
        """Give this worker no more calls."""
        if worker in self._free:
            self._free.remove(worker)

    def stopping(self, worker: _Worker) -> None:
        """This worker is on its way out, and another may take its place."""
        self.withdraw(worker)
        if worker in self.workers:
            self.workers.remove(worker)
            self._stopping.add(worker)
            self.loop.call_soon(self._grow)

    def unstarted(self, worker: _Worker, error: OSError | ValueError) -> None:
        """A worker could not be started: the call that has waited longest is told so."""
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        short = isinstance(error, OSError) and error.errno in SHORTAGES
        outcome = Outcome(Code.START, error=f"could not start {self.argv[0]!r}: {reason}", retryable=short)
        if (call := self._next()) is not None:
            call.finish(outcome)
        self.gone(worker, outcome)

    def gone(self, worker: _Worker, failure: Outcome) -> None:
        """Nothing of a worker is left. `failure` says why."""
        self.withdraw(worker)
        self._stopping.discard(worker)
        self.means.alive.discard(worker)
        if worker in self.workers:
            self.workers.remove(worker)
        if not worker.calls and failure.code in _STARTLESS:
            self._failed(failure)
        self._grow()

    def _failed(self, failure: Outcome) -> None:
        """A worker never answered. One alone may have met a bad call; with the second in a row the waits begin."""
        self._last_failure = failure
        self.failures += 1
        if self.failures > 1:
            wait_s = min(FIRST_BACKOFF_S * 2.0 ** min(self.failures - 2, 30), LONGEST_BACKOFF_S)
            self._not_before = self.loop.time() + wait_s
            self.loop.call_later(wait_s, self._grow)

    # Ends

    def drain(self, draining: bool) -> None:
        """Whether a worker without a call is let go at once."""
        self._draining = draining
        if draining:
            for worker in list(self._free):
                worker.end()

    def _look_if_idle(self) -> None:
        left_s = self._used + self.means.idle_s - self.loop.time()
        if self._waiting or len(self._free) < len(self.workers):
            left_s = self.means.idle_s
        if left_s > _TICK_S:
            self._idle_timer = self.loop.call_later(left_s, self._look_if_idle)
            return
        for worker in list(self._free):
            worker.end()
        self._cancel_timers()
        self._forget()

    def _cancel_timers(self) -> None:
        self._idle_timer.cancel()
        if self._due_timer is not None:
            self._due_timer.cancel()

    def close(self) -> None:
        self._cancel_timers()
        self._refuse(Outcome(Code.CANCELLED, error="the runner was closed before a worker was free"))


class _Worker:
    """One process that loops, from before its start until nothing of it is left; then `ended` is done."""

    def __init__(self, pool: _Pool) -> None:
        self.process: Process | None = None
        self.call: _Call | None = None
        self.calls = 0
        self.memory_mb: float | None = None
        self.measure_at = -math.inf
        self.too_big = False
        self.ended: asyncio.Future[None] = pool.loop.create_future()
        self._pool = pool
        self._loop = pool.loop
        self._stdin = self._stdout = self._stderr = _CLOSED
        self._rest = memoryview(b"")
        self._written = 0
        self._chunks: list[bytes] = []
        self._size = 0
        self._extra = b""
        self._log: Log | None = None
        self._parsing = False
        self._leaving = False
        self._signalled = False
        self._fault: tuple[Code, str] | None = None
        self._exit: Exit | None = None
        self._timer: asyncio.TimerHandle | None = None

    def state(self) -> dict[str, Any]:
        state = "starting" if self.process is None else "idle" if self.call is None else "busy"
        about = {"phase": self._pool.home.phase, "state": state, "calls": self.calls}
        return about if self.memory_mb is None else about | {"memory_mb": round(self.memory_mb, 1)}

    def note(self, text: str) -> None:
        """Keep, among what the overlay itself logs, what became of a worker."""
        if self._pool.means.logs is not None:
            self._pool.means.logs.append(self._pool.home.overlay, f"the worker {text}\n".encode())

    # Start

    async def start(self) -> None:
        """Start the process. Where that fails the pool is told, and this worker has ended."""
        theirs: list[int] = []
        try:
            self._open(theirs)
            stdin, stdout, stderr = theirs
            process = await self._pool.means.helpers.start(self._pool.home, self._pool.argv, (stdin, stdout, stderr))
        except BaseException as error:
            self._close_pipes()
            self.ended.set_result(None)
            if not isinstance(error, OSError | ValueError):
                raise
            self._pool.unstarted(self, error)
        else:
            self._started(process)
        finally:
            for fd in theirs:
                os.close(fd)

    def _open(self, theirs: list[int]) -> None:
        reader, self._stdin = os.pipe2(os.O_CLOEXEC)
        theirs.append(reader)
        self._stdout, writer = os.pipe2(os.O_CLOEXEC)
        theirs.append(writer)
        self._stderr, writer = os.pipe2(os.O_CLOEXEC)
        theirs.append(writer)
        for fd in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(fd, False)

    def _started(self, process: Process) -> None:
        self.process = process
        process.ended.add_done_callback(self._exited)
        self._loop.add_reader(self._stderr, self._read_stderr)
        if self._fault is not None:
            self._signal_to_end()
            return
        self._loop.add_reader(self._stdout, self._read_stdout)
        self._pool.ready(self)

    # A call

    def take(self, call: _Call) -> None:
        """Send a call to this worker, which must be free."""
        self.call = call
        call.worker = self
        self._log = None
        self._size = self._written = 0
        line = call.job.envelope + b"\n"
        done = self._write(line)
        if done < len(line):
            self._rest = memoryview(line)[done:]
            self._loop.add_writer(self._stdin, self._write_on)

    def _write(self, data: bytes | memoryview) -> int:
        """Write as much as the pipe takes. How much is done with: all of it where nobody can read it any more."""
        try:
            written = os.write(self._stdin, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            self._let_exit("closed its stdin")
            return len(data)
        self._written += written
        return written

    def _write_on(self) -> None:
        self._rest = self._rest[self._write(self._rest) :]
        if not self._rest:
            self._loop.remove_writer(self._stdin)

    def _read_stdout(self) -> bool:
        """One read for each event, so that a flood keeps nobody waiting. Whether there may be more."""
        if self._stdout == _CLOSED:
            return False
        try:
            data = os.read(self._stdout, READ_SIZE)
        except BlockingIOError:
            return False
        if data:
            self._take_output(data)
        else:
            self._stdout = self._closed_reader(self._stdout)
            self._let_exit("closed its stdout")
        return bool(data)

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

    def _take_line(self, call: _Call, line: bytes) -> None:
        if self._chunks:
            line = b"".join((*self._chunks, line))
            self._chunks.clear()
        if self._rest:
            self.stop(Code.PROTOCOL, f"wrote a line before it had read its call: {preview(line)}")
        elif len(line) > LARGE_BYTES:
            self._parsing = True
            reading = self._loop.run_in_executor(None, read_reply, line, call.job.request_id)
            reading.add_done_callback(functools.partial(self._parsed, call))
        else:
            self._judge(call, read_reply, line, call.job.request_id)

    def _parsed(self, call: _Call, reading: asyncio.Future[dict[str, Any]]) -> None:
        """A reply was read in a thread; its call may have come to an end meanwhile, and so may the process."""
        self._parsing = False
        known = not reading.cancelled() and isinstance(reading.exception(), ReplyError | None)
        if known and self.call is call and self._fault is None:
            self._judge(call, reading.result)
        if self._exit is not None and not self.ended.done():
            self._finish(self._exit)

    def _judge(self, call: _Call, read: Callable[..., dict[str, Any]], *arguments: object) -> None:
        try:
            reply = read(*arguments)
        except ReplyError as error:
            self.stop(Code.PROTOCOL, str(error))
        else:
            self._answer(call, reply)

    def _answer(self, call: _Call, reply: dict[str, Any]) -> None:
        """Give the call its reply, after the worker has been given the next."""
        if self._stderr != _CLOSED and _lying_in(self._stderr):  # it was written before the reply
            self._read_stderr()
        log, size = self._kept_log(), self._size
        self.call = None
        self.calls += 1
        if self._extra:
            self._stop_for_extra()
        elif not self._leaving:
            self._pool.free(self, call.job)
        call.finish(Outcome(result=reply, log=log, output_bytes=size))

    # The log

    def _read_stderr(self) -> bool:
        if self._stderr == _CLOSED:
            return False
        try:
            data = os.read(self._stderr, READ_SIZE)
        except BlockingIOError:
            return False
        if data:
            self._take_log(data)
        else:
            self._stderr = self._closed_reader(self._stderr)
        return bool(data)

    def _take_log(self, data: bytes) -> None:
        if self._log is None:
            self._log = Log(self._pool.log_limit if self.call is None else self.call.job.max_log_bytes)
        self._log.add(data)
        if self._pool.means.logs is not None:
            self._pool.means.logs.append(self._pool.home.overlay, data, self)

    def _kept_log(self) -> str:
        return "" if self._log is None else self._log.kept().decode("utf-8", "replace")

    # The end

    def end(self) -> None:
        """Let a worker without a call go: its stdin ends now, TERM follows after the grace, KILL after another."""
        self._leave(Code.CANCELLED, "was not needed any more")
        self._set_timer(self._pool.means.kill_grace_s, self._signal_to_end)

    def stop(self, code: Code, what: str) -> None:
        """TERM to the group now, KILL after the grace. Its call gets this outcome once it has ended.

        `what` goes on after "the worker". Where it is on its way out already, the first reason stays.
        """
        if self._signalled or self.ended.done():
            return
        if self._fault is None:
            self._leave(code, what)
        self._stdout = self._closed_reader(self._stdout)
        self._signal_to_end()

    def _leave(self, code: Code, what: str) -> None:
        self._fault = code, what
        self._leaving = True
        self._pool.stopping(self)
        self._stdin = self._closed_writer(self._stdin)

    def _signal_to_end(self) -> None:
        """What is still being started gets its signal as soon as it is."""
        if self.process is not None:
            self._signalled = True
            self.process.signal(signal.SIGTERM)
            self._set_timer(self._pool.means.kill_grace_s, self.process.signal, signal.SIGKILL)

    def _let_exit(self, how: str) -> None:
        """It has closed a pipe, so it is about to end: wait for that, as its exit tells more."""
        if not self._leaving:
            self._leaving = True
            self._pool.withdraw(self)
            self._set_timer(EXIT_GRACE_S, self.stop, Code.PROTOCOL, f"{how} and went on, and was ended")

    def _set_timer(self, delay_s: float, act: Callable[..., None], *arguments: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, act, *arguments)

    def _exited(self, ended: asyncio.Future[Exit]) -> None:
        """The process has ended: take what it has left in its pipes, a reply perhaps."""
        self._leaving = True
        self._exit = exit_ = ended.result()
        # Whether all that was written of the call still lies there.
        unread = self.call is not None and self._stdin != _CLOSED and _lying_in(self._stdin) == self._written
        for read in (self._read_stderr, self._read_stdout):
            for _ in range(LAST_READS):
                if not read():
                    break
        self._close_pipes()
        if self._timer is not None:
            self._timer.cancel()
        if unread and self.calls and self.call is not None and self._fault is None and not self._parsing:
            self._pool.again(self.call)
            self.call = None
        if not self._parsing or self._fault is not None:
            self._finish(exit_)

    def _finish(self, exit_: Exit) -> None:
        code, what = self._fault or (Code.CRASH, self._say(exit_))
        failure = Outcome(code, None, f"the worker {what}", exit_.code, log=self._kept_log(), output_bytes=self._size)
        if self._pool.means.logs is not None:
            self._pool.means.logs.end(self._pool.home.overlay, self)
        call, self.call = self.call, None
        if call is not None:
            call.finish(failure)
        elif code in _STARTLESS:
            self.note(f"{what}, without a call")
        self._pool.gone(self, failure)
        self.ended.set_result(None)

    def _say(self, exit_: Exit) -> str:
        if exit_.lost is not None:
            how = f"was ended from outside ({exit_.lost})"
        elif exit_.code is None:
            how = "ended"
        else:
            how = describe(exit_.code)
        if self.call is None:
            return how
        return f"{how} {'in the middle of a line' if self._chunks else 'before it answered'}"

    # Pipes

    def _close_pipes(self) -> None:
        self._stdin = self._closed_writer(self._stdin)
        self._stdout = self._closed_reader(self._stdout)
        self._stderr = self._closed_reader(self._stderr)

    def _closed_reader(self, fd: int) -> int:
        if fd != _CLOSED:
            self._loop.remove_reader(fd)
            os.close(fd)
        return _CLOSED

    def _closed_writer(self, fd: int) -> int:
        if fd != _CLOSED:
            self._loop.remove_writer(fd)
            os.close(fd)
        return _CLOSED
