"""Programs that run for one call: the envelope on stdin, the reply on stdout, the log on stderr.

The bus starts none of them itself: a helper does (`helpers.py`), by spawning the command or by forking an interpreter
that has the script loaded. `_Run` is the bus's side: a small state machine of callbacks on the process, the pipes and
a timer. It ends by itself, whoever waits for it, so a cancellation at any moment leaves nothing behind.

A call that is over before its program ends in this order: TERM to the group, `kill_grace_s`, KILL. Its process has
ended only when all that it started is gone, so the pipes have then no writer left and are read to their end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from runners import python_command
from runners.base import HELPERS, LARGE_BYTES, Code, Outcome, ProcessTarget
from runners.helper_errors import GoneError
from runners.helpers import IDLE_S, Helpers, UnfitError
from runners.output import (
    Input,
    Log,
    Output,
    Reply,
    close_all,
    data_limit,
    excess,
    excess_at_end,
    join_log,
    judge,
    read_reply,
    with_hint,
)
from runners.processes import KIB, Home, Script
from runners.sealed_file import sealed_file
from runners.unstarted import unstarted
from runners.workers import WorkerPools

if TYPE_CHECKING:
    from collections.abc import Collection

    from runners.base import Job, Sandbox, Share
    from runners.exits import Exit
    from runners.helper import Helper
    from runners.logs import OverlayLogs
    from runners.processes import Process

QUICK_S = 0.02
"""How long, in seconds, a call runs before its pipes are watched. Most have ended by then, and are read once."""


_REFUSED = Outcome(Code.CANCELLED, error="the runner was closed before the program could start")


class ProcessRunner:
    """Runs a program for each job. Used in one event loop only."""

    name = "proc"

    def __init__(
        self,
        helpers: Helpers | None = None,
        logs: OverlayLogs | None = None,
        *,
        kill_grace_s: float = 2.0,
        idle_s: float = IDLE_S,
    ) -> None:
        self._helpers = helpers or Helpers(idle_s=idle_s)
        self._logs = logs
        self._workers = WorkerPools(self._helpers, logs, kill_grace_s=kill_grace_s, idle_s=idle_s)
        self._kill_grace_s = kill_grace_s
        self._runs: set[_Run] = set()
        self._closed = False
        self._at_once = False

    async def run(self, job: Job) -> Outcome:
        """Start the program and wait for its end, or end it at `job.deadline`."""
        target = job.target
        if not isinstance(target, ProcessTarget):
            raise TypeError(f"the runner {self.name} cannot carry {target!r}")
        if target.mode == "worker":
            return await self._workers.run(job)
        if self._closed:
            return _REFUSED
        try:
            run = await self._start(job, target)
        except TimeoutError:
            return Outcome(Code.TIMEOUT, error="the deadline had passed before the program could start")
        except OSError as error:
            return _REFUSED if self._closed else _unstarted(job, target, error)
        self._runs.add(run)
        try:
            exit_ = await run.wait()
        finally:
            self._runs.discard(run)
            self._keep_log(job, run.log.kept())
        if exit_.failed is not None:
            return _unstarted(job, target, exit_.failed)
        return await _outcome(run, exit_)

    def _keep_log(self, job: Job, text: bytes) -> None:
        if self._logs is not None and text:
            self._logs.append(job.overlay, text, job.request_id)
            self._logs.end(job.overlay, job.request_id)

    def state(self, overlay: str) -> dict[str, Any]:
        helpers = self._helpers.state(overlay)
        return ({"helpers": helpers} if helpers else {}) | self._workers.state(overlay)

    def shares(self) -> dict[str, Share]:
        return {HELPERS: self._helpers.share} | self._workers.shares()

    def relieve(self, idle_s: float) -> None:
        self._workers.relieve(idle_s)
        self._helpers.relieve(idle_s)

    def purge(self, overlays: Collection[str] | None) -> dict[str, int]:
        """Only workers outlast a call."""
        return self._workers.purge(overlays)

    def forget(self, overlay: str) -> None:
        self._workers.forget(overlay)
        self._helpers.forget(overlay)

    async def close(self, *, at_once: bool = False) -> None:
        """End every call that still runs, and start no more. A second with `at_once` ends the grace of the first."""
        self._closed = True
        self._at_once = self._at_once or at_once
        for run in self._runs:
            run.stop(Code.CANCELLED, at_once=at_once)
        ends = [run.ended for run in self._runs]
        await asyncio.gather(self._workers.close(at_once=self._at_once), *map(asyncio.shield, ends))
        await self._helpers.close(at_once=self._at_once)
        if self._logs is not None:
            self._logs.close()

    async def _start(self, job: Job, target: ProcessTarget) -> _Run:
        """Raises OSError (no such folder, too many files, ...) or TimeoutError, and then leaves nothing behind."""
        if job.deadline <= time.monotonic():
            raise TimeoutError
        edition, program = job.edition, target.argv[0]
        home = Home(job.overlay, job.phase, job.rights, job.folder, target.env, edition, program, tier=job.tier)
        script = _script(target.argv, target.preload, target.stdin) if target.mode in ("auto", "fork") else None
        while True:
            with contextlib.suppress(GoneError, UnfitError):  # then its pool has, or is, another
                pool = self._helpers.pool(home, script)
                helper = pool.free()
                if helper is None:
                    async with asyncio.timeout(job.deadline - time.monotonic()):
                        helper = await pool.ready()
                    if self._closed:
                        raise OSError(errno.ESHUTDOWN, "the runner was closed")
                return _start(helper, job, target, self._kill_grace_s)


@lru_cache(1024)
def _script(argv: tuple[str, ...], preload: tuple[str, ...], stdin: Any) -> Script | None:  # noqa: ANN401
    """What is forked for a command: None where that is no Python script."""
    command = python_command.split(argv)
    if command is None:
        return None
    length = 2 if command.arguments[0] == "-m" else 1
    return Script(command.interpreter, command.arguments[:length], preload, stdin)


def _unstarted(job: Job, target: ProcessTarget, error: OSError) -> Outcome:
    return unstarted(target.argv, target.env, job.folder, error).outcome


def _start(helper: Helper, job: Job, target: ProcessTarget, kill_grace_s: float) -> _Run:
    ours: list[int] = []
    theirs: list[int] = []
    try:
        stdin = None
        if target.stdin == "pipe":
            reader, stdin = os.pipe2(os.O_CLOEXEC)
            theirs.append(reader)
            _own(stdin, ours)
        else:
            theirs.append(sealed_file(job.envelope))
        stdout, stderr = _output_pipe(ours, theirs), _output_pipe(ours, theirs)
        fds = theirs[0], theirs[1], theirs[2]
        hard_kib = job.hard_mb * KIB
        process = helper.launch(target.argv, fds, {}, data_limit(job.hard_mb), hard_kib, held_kib=hard_kib)
        return _Run(process, _Pipes(stdin, stdout, stderr), job, kill_grace_s)
    except BaseException:
        close_all(ours)
        raise
    finally:
        close_all(theirs)


def _output_pipe(ours: list[int], theirs: list[int]) -> int:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    theirs.append(writer)
    _own(reader, ours)
    return reader


def _own(fd: int, ours: list[int]) -> None:
    ours.append(fd)
    os.set_blocking(fd, False)


class _Pipes(NamedTuple):
    """Our ends, nonblocking. `stdin` is None where the envelope was given as a file."""

    stdin: int | None
    stdout: int
    stderr: int


class _Run:
    """One running program, from its start until nothing of it is left; then `ended` holds how it ended.

    `reason` says why it was ended from outside: TIMEOUT, OUTPUT_TOO_LARGE, CANCELLED or EVICTED, and `why` of the last
    for what; None where it ended by itself. `size` counts the bytes that it wrote to stdout.
    """

    def __init__(self, process: Process, pipes: _Pipes, job: Job, kill_grace_s: float) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._deadline = job.deadline
        self.hard_mb = job.hard_mb
        self.tier = job.tier
        self.allowed_s = job.deadline - time.monotonic()
        self.reason: Code | None = None
        self.why = ""
        self.log = Log(job.max_log_bytes)
        self.max_output_bytes = job.max_output_bytes
        self.size = 0
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self._process = process
        self._kill_grace_s = kill_grace_s
        self._chunks: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._stdout = Output(loop, pipes.stdout, self._take, watched=False)
        self._stderr = Output(loop, pipes.stderr, self.log.add, watched=False)
        self._stdin = None if pipes.stdin is None else Input(loop, pipes.stdin, job.envelope)
        self._timer = loop.call_later(min(QUICK_S, self.allowed_s), self._attend)
        process.ended.add_done_callback(self._end)
        self._meter = job.meter
        if job.meter is not None:
            process.watch(job.meter.see)
            job.meter.evict = self._evict

    @property
    def sandbox(self) -> Sandbox:
        return self._process.sandbox_for("call")

    @property
    def may_write(self) -> str:
        """To its scratch folder, in words."""
        return f"tier {self.tier} has {self._process.scratch_mb} MiB a call"

    @property
    def stdout(self) -> bytes:
        return b"".join(self._chunks)

    async def wait(self) -> Exit:
        """Wait until nothing is left. A cancellation ends the program first, however often it comes."""
        cancelled: asyncio.CancelledError | None = None
        while not self.ended.done():
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError as error:
                cancelled = error
                self.stop(Code.CANCELLED)
        if cancelled is not None:
            raise cancelled
        return self.ended.result()

    def _attend(self) -> None:
        """It is not a quick one: its output has to be taken while it runs, and its time may be over."""
        self._stdout.watch()
        self._stderr.watch()
        self._timer = self._loop.call_later(self._deadline - time.monotonic(), self.stop, Code.TIMEOUT)

    def stop(self, reason: Code, *, at_once: bool = False) -> None:
        """TERM to the group now, KILL after the grace; `at_once` KILL now. The first reason stays."""
        if self.ended.done() or (self.reason is not None and not at_once):
            return
        self.reason = self.reason or reason
        self._timer.cancel()
        self._stdout.watch()  # it may have something to say while it stops
        self._stderr.watch()
        if at_once:
            self._process.signal(signal.SIGKILL)
            return
        self._process.signal(signal.SIGTERM)
        self._timer = self._loop.call_later(self._kill_grace_s, self._process.signal, signal.SIGKILL)

    def _evict(self, why: str) -> None:
        """Its memory is needed at once, so there is no grace."""
        self.why = self.why or why
        self.stop(Code.EVICTED, at_once=True)

    def _take(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= self.max_output_bytes:
            self._chunks.append(data)
            return
        self.reason = self.reason or Code.OUTPUT_TOO_LARGE
        self._chunks.clear()
        self._stdout.close()
        self._process.signal(signal.SIGKILL)

    def _end(self, ended: asyncio.Future[Exit]) -> None:
        self._timer.cancel()
        if self._meter is not None:
            self._meter.evict = None
        if self._stdin is not None:
            self._stdin.close()
        self._stdout.drain()
        self._stderr.drain()
        self.ended.set_result(ended.result())
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def _outcome(run: _Run, exit_: Exit) -> Outcome:
    if run.reason is not None:
        return _outcome_of(run, exit_, run.reason, _ended_early(run, run.reason))
    if exit_.had_too_many:
        return _outcome_of(run, exit_, Code.PROCESS_LIMIT, exit_.lost)
    if exit_.was_too_full:
        return _outcome_of(run, exit_, Code.SCRATCH_LIMIT, f"{exit_.lost} ({run.may_write})")
    if exit_.lost is not None and not exit_.had_too_much:
        return _outcome_of(run, exit_, Code.CRASH, exit_.lost)._replace(retryable=True)
    if why := _too_much(run, exit_):
        return _outcome_of(run, exit_, Code.MEMORY_LIMIT, f"the program {why}")
    stdout = run.stdout
    reply = read_reply(stdout) if len(stdout) <= LARGE_BYTES else await asyncio.to_thread(read_reply, stdout)
    code, error = judge(reply, exit_.code or 0)
    return with_hint(_outcome_of(run, exit_, code, error, reply), run.hard_mb, run.may_write)


def _too_much(run: _Run, exit_: Exit) -> str | None:
    """What it had more than it may: when it was looked at, or by the kernel's account, whoever looked."""
    peak_mb = exit_.peak_mb or 0.0
    if exit_.had_too_much:
        return f"{excess(peak_mb, run.hard_mb)}, and was ended"
    return excess_at_end(peak_mb, exit_.peak_floor_mb or 0.0, run.hard_mb)


def _outcome_of(run: _Run, exit_: Exit, code: Code, error: str | None, reply: Reply | None = None) -> Outcome:
    reply = reply or Reply()
    return Outcome(
        code=code,
        result=reply.value,
        error=error,
        exit_code=exit_.code,
        cpu_ms=exit_.cpu_ms,
        peak_mb=exit_.peak_mb,
        peak_floor_mb=exit_.peak_floor_mb,
        log=join_log(reply.noise, run.log),
        output_bytes=run.size,
        sandbox=run.sandbox,
    )


def _ended_early(run: _Run, reason: Code) -> str:
    if reason == Code.OUTPUT_TOO_LARGE:
        return f"the program wrote more than {run.max_output_bytes} bytes to stdout, and was ended"
    if reason == Code.EVICTED:
        return f"the program was ended {run.why}"
    if reason == Code.TIMEOUT:
        return f"the program had not ended within its {run.allowed_s:.3f} s, and was ended"
    return "the program still ran when the runner was closed, and was ended"
