"""Programs started anew for each call: the envelope on stdin, the reply on stdout, the log on stderr.

Starting a program blocks the event loop for well under a millisecond (vfork, until the exec); all that follows is
callbacks on one pidfd, the pipes and a timer. `_Call` is that small state machine. It ends by itself, whoever waits for
it, so a cancellation at any moment leaves no process, descriptor or reader behind.

A call ends in this order, whatever the cause: (TERM to the group, `kill_grace_s`,) KILL to the group while its leader
is still a zombie, since until it is reaped nobody else can have its number; reap; the pipes read to their end, or for
`PIPE_GRACE_S` where a process that left the group holds them open.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runners.base import LARGE_BYTES, Code, Outcome, ProcessTarget
from runners.output import Input, Log, Output, Reply, join_log, judge, read_reply

if TYPE_CHECKING:
    from pathlib import Path

    from runners.base import Job

PIPE_GRACE_S = 0.25
"""How long, in seconds, output is still read after the program has ended, when another process holds its pipes open."""

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""What fails to start for want of these may start a moment later."""


class ProcessRunner:
    """Runs a program for each job. Used in one event loop only.

    `peak_mb` of an outcome has the bus's own peak as its floor: the kernel counts the memory that the child shared with
    its parent between vfork and exec.
    """

    name = "proc"

    def __init__(self, *, kill_grace_s: float = 2.0) -> None:
        self._kill_grace_s = kill_grace_s
        self._calls: set[_Call] = set()
        self._closed = False

    async def run(self, job: Job) -> Outcome:
        """Start the program and wait for its end, or end it at `job.deadline`."""
        target = job.target
        if not isinstance(target, ProcessTarget):
            raise TypeError(f"the runner {self.name} cannot carry {target!r}")
        if self._closed:
            return Outcome(Code.CANCELLED, error="the runner was closed before the program could start")
        if job.deadline <= time.monotonic():
            return Outcome(Code.TIMEOUT, error="the deadline had passed before the program could start")
        try:
            started = start(target, job.folder, job.envelope)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = _start_failure(error, target, job.folder)
            short = isinstance(error, OSError) and error.errno in SHORTAGES
            return Outcome(Code.START, error=f"could not start {target.argv[0]!r}: {reason}", retryable=short)
        call = _Call(started, job, self._kill_grace_s, asyncio.get_running_loop())
        self._calls.add(call)
        try:
            exit_ = await call.wait()
        finally:
            self._calls.discard(call)
        return await _outcome(call, exit_)

    def state(self, overlay: str) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        """End every call that still runs, and start no more."""
        self._closed = True
        calls = list(self._calls)
        for call in calls:
            call.stop(Code.CANCELLED)
        if calls:
            await asyncio.wait([call.ended for call in calls])


@dataclass(frozen=True, slots=True)
class Started:
    """A running program: its process (leader of its own session and group) and our ends of its pipes, nonblocking.

    `stdin` is None where the envelope was given as a file. `input` is what is still to be written to it.
    """

    process: subprocess.Popen[bytes]
    pidfd: int
    stdin: int | None
    stdout: int
    stderr: int
    input: bytes


def start(target: ProcessTarget, folder: Path, envelope: bytes) -> Started:
    """Start the program in `folder` with exactly the environment of the target.

    Raises OSError (no such program or folder, not executable, too many files, ...) or ValueError (a NUL in the command,
    ...), and then leaves nothing behind.
    """
    ours: list[int] = []
    theirs: list[int] = []
    try:
        stdin = None
        if target.stdin == "pipe":
            reader, stdin = os.pipe2(os.O_CLOEXEC)
            theirs.append(reader)
            _own(stdin, ours)
        else:
            _envelope_file(envelope, theirs)
        stdout = _output_pipe(ours, theirs)
        stderr = _output_pipe(ours, theirs)
        process = subprocess.Popen(
            target.argv,
            stdin=theirs[0],
            stdout=theirs[1],
            stderr=theirs[2],
            cwd=folder,
            env=target.env,
            start_new_session=True,
        )
        return Started(process, _watch(process), stdin, stdout, stderr, b"" if stdin is None else envelope)
    except BaseException:
        _close_all(ours)
        raise
    finally:
        _close_all(theirs)


def _output_pipe(ours: list[int], theirs: list[int]) -> int:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    theirs.append(writer)
    _own(reader, ours)
    return reader


def _own(fd: int, ours: list[int]) -> None:
    ours.append(fd)
    os.set_blocking(fd, False)


def _envelope_file(envelope: bytes, theirs: list[int]) -> None:
    """A file in memory; `pwrite` leaves its position at the start."""
    fd = os.memfd_create("envelope", os.MFD_CLOEXEC)
    theirs.append(fd)
    written = 0
    while written < len(envelope):
        written += os.pwrite(fd, memoryview(envelope)[written:], written)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _watch(process: subprocess.Popen[bytes]) -> int:
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise


def _start_failure(error: Exception, target: ProcessTarget, folder: Path) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if error.filename == folder:
        return f"its folder {str(folder)!r} cannot be entered: {error.strerror}"
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT and _is_there(target, folder):
        return f"{reason}: the file is there, but the interpreter or loader that it names is not"
    if error.errno == errno.ENOEXEC:
        return f"{reason}: a script needs a first line such as #!/bin/sh"
    return reason


def _is_there(target: ProcessTarget, folder: Path) -> bool:
    name = target.argv[0]
    if "/" in name:
        return (folder / name).exists()
    return shutil.which(name, path=target.env.get("PATH", os.defpath)) is not None


@dataclass(frozen=True, slots=True)
class _Exit:
    """How the program ended. `code` is negative for a signal; None where another part of this process reaped it."""

    code: int | None
    cpu_ms: float | None = None
    peak_mb: float | None = None


def _reap(process: subprocess.Popen[bytes]) -> _Exit:
    """Take the ended process off the kernel's table. `ru_maxrss` is in KiB on Linux (getrusage(2))."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except ChildProcessError:  # this process ignores SIGCHLD, so the kernel has reaped it already
        process.returncode = 0
        return _Exit(None)
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1000, 3)
    return _Exit(process.returncode, cpu_ms, round(usage.ru_maxrss / 1024, 3))


class _Call:
    """One running program, from its start until nothing of it is left; then `ended` holds how it ended.

    `reason` says why it was ended from outside: TIMEOUT, OUTPUT_TOO_LARGE or CANCELLED; None where it ended by itself.
    `size` counts the bytes that it wrote to stdout.
    """

    def __init__(self, started: Started, job: Job, kill_grace_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self.allowed_s = job.deadline - time.monotonic()
        self.reason: Code | None = None
        self.ended: asyncio.Future[_Exit] = loop.create_future()
        self.log = Log(job.max_log_bytes)
        self.max_output_bytes = job.max_output_bytes
        self._loop = loop
        self._started = started
        self._kill_grace_s = kill_grace_s
        self._chunks: list[bytes] = []
        self.size = 0
        self._exit: _Exit | None = None
        self._stdout = Output(loop, started.stdout, self._take, self._settle)
        self._stderr = Output(loop, started.stderr, self.log.add, self._settle)
        self._stdin = None if started.stdin is None else Input(loop, started.stdin, started.input)
        self._timer = loop.call_later(self.allowed_s, self.stop, Code.TIMEOUT)
        loop.add_reader(started.pidfd, self._exited)

    @property
    def stdout(self) -> bytes:
        return b"".join(self._chunks)

    async def wait(self) -> _Exit:
        """Wait until nothing is left. A cancellation ends the program first, however often it comes."""
        cancelled: asyncio.CancelledError | None = None
        while not self.ended.done():
            try:
                await asyncio.shield(self.ended)
            except asyncio.CancelledError as error:
                cancelled = error
                self.stop(Code.CANCELLED)
        if cancelled is not None:
            raise cancelled
        return self.ended.result()

    def stop(self, reason: Code) -> None:
        """TERM to the group now, KILL after the grace. The first reason stays."""
        if self.reason is not None or self._exit is not None:
            return
        self.reason = reason
        self._signal(signal.SIGTERM)
        self._timer.cancel()
        self._timer = self._loop.call_later(self._kill_grace_s, self._signal, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """Signal the group, unless its leader was reaped: from then on its number may be a stranger's."""
        if self._exit is not None:
            return
        # Nobody left; or nobody that is ours to signal: a set-user-ID program.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._started.process.pid, number)

    def _take(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= self.max_output_bytes:
            self._chunks.append(data)
            return
        self.reason = self.reason or Code.OUTPUT_TOO_LARGE
        self._chunks.clear()
        self._stdout.close()
        self._signal(signal.SIGKILL)
        self._settle()

    def _exited(self) -> None:
        self._signal(signal.SIGKILL)
        self._loop.remove_reader(self._started.pidfd)
        os.close(self._started.pidfd)
        self._exit = _reap(self._started.process)
        if self._stdin is not None:
            self._stdin.close()
        self._timer.cancel()
        self._timer = self._loop.call_later(PIPE_GRACE_S, self._end, self._exit)
        self._settle()

    def _settle(self) -> None:
        if self._exit is not None and self._stdout.closed and self._stderr.closed:
            self._end(self._exit)

    def _end(self, exit_: _Exit) -> None:
        self._timer.cancel()
        self._stdout.close()
        self._stderr.close()
        if not self.ended.done():
            self.ended.set_result(exit_)


async def _outcome(call: _Call, exit_: _Exit) -> Outcome:
    if call.reason is not None:
        return _outcome_of(call, exit_, call.reason, _ended_early(call, call.reason))
    stdout = call.stdout
    reply = read_reply(stdout) if len(stdout) <= LARGE_BYTES else await asyncio.to_thread(read_reply, stdout)
    code, error = judge(reply, exit_.code or 0)
    return _outcome_of(call, exit_, code, error, reply)


def _outcome_of(call: _Call, exit_: _Exit, code: Code, error: str | None, reply: Reply | None = None) -> Outcome:
    reply = reply or Reply()
    return Outcome(
        code=code,
        result=reply.value,
        error=error,
        exit_code=exit_.code,
        cpu_ms=exit_.cpu_ms,
        peak_mb=exit_.peak_mb,
        log=join_log(reply.noise, call.log),
        output_bytes=call.size,
    )


def _ended_early(call: _Call, reason: Code) -> str:
    if reason == Code.OUTPUT_TOO_LARGE:
        return f"the program wrote more than {call.max_output_bytes} bytes to stdout, and was ended"
    if reason == Code.TIMEOUT:
        return f"the program had not ended within its {call.allowed_s:.3f} s, and was ended"
    return "the program still ran when the runner was closed, and was ended"
