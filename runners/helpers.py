"""The bus's side of the helpers: small processes that start an overlay's programs, reap and kill them.

The bus itself is big, threaded and busy, so it starts nothing but `launcher.py`: one helper for each `Home` and way of
starting that is in use, a second one where two cores have work for it, none that was idle for long. `Helper.launch` is
the door for a call, `Helpers.start` for what keeps running; both give a `Process`.

A helper that ends takes its processes with it. They end with `Exit.lost`, and the next call gets a new helper.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import marshal
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from runners.base import Rights
from runners.output import Log, Output, close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

LAUNCH = Path(__file__).with_name("launch.py")
MESSAGE_BYTES = 128 * 1024
"""The longest message that `launcher.py` takes."""

MARSHAL = 2
"""The version of the format that `launcher.py` reads."""

REPLY_BYTES = 64 * 1024
"""The longest message from it."""

IDLE_S = 60.0
"""Seconds that a helper without a process is kept."""

KEPT_IDLE = 32
"""Idle helpers that are kept when another is started: each holds some 5 to 10 MB."""

START_S = 120.0
"""How long, in seconds, a helper may take to load a script's imports before it is given up."""

TRIES = 2
"""How often a helper is started that ends before it is ready: the first may have been killed for want of memory."""

GONE_S = 5.0
"""How long, in seconds, a helper and what it killed may take to be gone before the helper itself is killed."""

LOG_BYTES = 8 * 1024
"""What is kept of what a helper writes: the words of an interpreter that does not start, of a module that prints."""

SPAWNER = (sys.executable, "-I", "-S")
"""The interpreter of a helper that runs nobody's Python: the bus's own, without site-packages."""

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETOOMANYREFS})
"""What fails to start for want of these may start a moment later."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a process belongs. Processes with equal homes are started by the same helper, with the same rights.

    `env` is made anew for each reading of the manifest. Another one, though it says the same, is of another folder: a
    helper stands in the folder that it was started in, even if that was replaced.
    """

    overlay: str
    phase: str
    rights: Rights
    folder: Path = field(compare=False)
    env: Mapping[str, str] = field(compare=False)
    code_hash: str = ""


@dataclass(frozen=True, slots=True)
class Script:
    """A Python script that is forked for calls: the interpreter with its options, and `run.py` or `-m`, `module`."""

    interpreter: tuple[str, ...]
    arguments: tuple[str, ...]
    preload: tuple[str, ...] = ()
    stdin: Literal["file", "pipe"] = "file"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended.

    `code` is negative for a signal, as in `subprocess`; None where nobody can tell. `failed` says why it did not start
    at all. `lost` says what ended it from outside, where that was its helper's doing.
    """

    code: int | None
    cpu_ms: float | None = None
    peak_mb: float | None = None
    peak_floor_mb: float | None = None
    """The helper's own size, below which the kernel puts no peak."""
    lost: str | None = None
    failed: OSError | None = None


class Process:
    """A program that was started, leader of its own session and group, until nothing of it is left.

    `ended` holds its exit once it was reaped and all that it had started is gone. It never fails, nor is it cancelled.
    """

    def __init__(self, number: int, helper: Helper, loop: asyncio.AbstractEventLoop) -> None:
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self._number = number
        self._helper = helper

    @property
    def helper_pid(self) -> int:
        """The process that everything of this one's overlay and phase is below, as this process sees it."""
        return self._helper.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its group. KILL ends also what left the group. Nothing happens once it has ended."""
        if not self.ended.done():
            self._helper.signal(self._number, number)

    async def memory_mb(self) -> float | None:
        """The resident memory of the process now, in MiB; None once it has ended."""
        return None if self.ended.done() else await self._helper.measure(self._number)


_TELLS = {"no_namespace": str, "unfit": str, "unclean": dict}


class _Told(Exception):  # noqa: N818
    """Instead of being ready a helper told that it has to be started another way: `verb` as in `launcher.py`.

    Raises TypeError or KeyError for what no helper tells.
    """

    def __init__(self, verb: str, given: Any) -> None:  # noqa: ANN401
        if not isinstance(given, _TELLS[verb]):
            raise TypeError(verb)
        super().__init__(f"{verb}: {given}")
        self.verb: str = verb
        self.given: Any = given


class GoneError(OSError):
    """The helper ended before it could be given a program. Nothing was started: ask its pool for another helper."""

    def __init__(self) -> None:
        super().__init__(errno.ESRCH, "the helper has ended")


class Helper:
    """One helper, from its start until nothing of it is left; then `gone` is done."""

    def __init__(self, pool: Pool, config: Mapping[str, Any], learn: Callable[[_Told], None]) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._pool = pool
        self.ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.processes: dict[int, Process] = {}
        self.idle_since = time.monotonic()
        self.log = Log(LOG_BYTES)
        self._learn = learn
        self._floor_mb = 0.0
        self._numbers = itertools.count(1)
        self._measured: dict[int, asyncio.Future[float | None]] = {}
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._pidfds: set[int] = set()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        interpreter = SPAWNER if pool.script is None else pool.script.interpreter
        try:
            with theirs:
                self._socket.send(marshal.dumps(("begin", dict(config)), MARSHAL))
                self._popen, said = self._begin([*interpreter, str(LAUNCH), str(theirs.fileno())], theirs)
        except BaseException:
            self._socket.close()
            raise
        self._said = Output(loop, said, self.log.add)
        loop.add_reader(self._socket.fileno(), self._receive)
        late = loop.call_later(START_S, self._give_up)
        self.ready.add_done_callback(lambda _: late.cancel())

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_idle(self) -> bool:
        return not self.processes and self.is_open and self.ready.done()

    @property
    def is_open(self) -> bool:
        """Whether programs can be given to it, as far as is known."""
        return self._socket.fileno() >= 0

    def _begin(self, argv: list[str], theirs: socket.socket) -> tuple[subprocess.Popen[bytes], int]:
        """The process, watched, and our end of the pipe for what it says.

        Its stdin is of the kind that a call gets, since Python looks at that once, at its start.
        """
        said, says = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(says, True)
        stdin = -1
        try:
            stdin = self._empty_stdin()
            popen = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=says,
                stderr=says,
                cwd=self._pool.home.folder,
                env=self._pool.home.env,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            try:
                self._watch(os.pidfd_open(popen.pid))
            except OSError:
                popen.kill()
                popen.wait()
                raise
        except BaseException:
            os.close(said)
            raise
        finally:
            os.close(says)
            if stdin >= 0:
                os.close(stdin)
        return popen, said

    def _empty_stdin(self) -> int:
        if self._pool.script is None or self._pool.script.stdin == "file":
            return os.memfd_create("nothing", os.MFD_CLOEXEC)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.close(writer)
        return reader

    def launch(self, argv: Sequence[str], fds: tuple[int, int, int], env: Mapping[str, str]) -> Process:
        """Have a program started: `Process.ended` tells if it could not be.

        Raises OSError where the command is too long, `GoneError` where the helper has ended.
        """
        number = next(self._numbers)
        message = marshal.dumps(("run", (number, list(self._pool.argv(argv)), dict(env))), MARSHAL)
        if len(message) > MESSAGE_BYTES:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        if not self.is_open:
            raise GoneError
        try:
            self._send(message, fds)
        except (BrokenPipeError, ConnectionResetError):
            self._receive_all()
            raise GoneError from None
        process = self.processes[number] = Process(number, self, self._loop)
        return process

    def signal(self, number: int, signal_number: signal.Signals) -> None:
        with contextlib.suppress(OSError):  # it is gone, and its processes with it
            self._send(marshal.dumps(("kill", (number, int(signal_number))), MARSHAL))
        if signal_number == signal.SIGKILL:
            self._loop.call_later(GONE_S, self._insist, number)

    async def measure(self, number: int) -> float | None:
        waiting = self._measured.get(number)
        if waiting is None:
            try:
                self._send(marshal.dumps(("measure", number), MARSHAL))
            except OSError:  # it is gone, and its processes with it
                return None
            waiting = self._measured[number] = self._loop.create_future()
        return await asyncio.shield(waiting)

    def close(self) -> None:
        """Let it end, and all that it started. `gone` tells when."""
        if self.is_open:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._drop_outbox()
            if self in self._pool.helpers:
                self._pool.helpers.remove(self)
            self._loop.call_later(GONE_S, self.kill)

    def kill(self) -> None:
        """End it, though it be stopped or stuck, and all that it started: TERM, then after `GONE_S` KILL."""
        if not self.gone.done():
            self._popen.send_signal(signal.SIGTERM)
            self._signal_both(signal.SIGCONT)
            self._loop.call_later(GONE_S, self._signal_both, signal.SIGKILL)

    def _signal_both(self, signal_number: int) -> None:
        """To the process that the bus started, and to the one that does its work."""
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal_number)

    def _give_up(self) -> None:
        if not self.ready.done():
            self.ready.set_exception(OSError(errno.EBUSY, f"its helper was not ready within {START_S:g} s"))
            self.close()
            self.kill()

    def _insist(self, number: int) -> None:
        """A process that was killed is still not reported: the helper is stopped, stuck or out of its mind."""
        if number in self.processes:
            log.warning("the helper of %s does not end call %d; it is killed", self._pool.home.overlay, number)
            self.kill()

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        if self._outbox:
            self._outbox.append((message, _copies(fds)))
            return
        try:
            self._socket.sendmsg([message], _rights(fds))
        except BlockingIOError:
            self._outbox.append((message, _copies(fds)))
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def _flush(self) -> None:
        while self._outbox:
            message, fds = self._outbox[0]
            try:
                self._socket.sendmsg([message], _rights(fds))
            except BlockingIOError:
                return
            except OSError:  # it is gone; the reader sees that, too
                self._drop_outbox()
                break
            self._outbox.popleft()
            close_all(fds)
        self._loop.remove_writer(self._socket.fileno())

    def _drop_outbox(self) -> None:
        for _, fds in self._outbox:
            close_all(fds)
        self._outbox.clear()

    def _receive(self) -> bool:
        """Take one message. False where none is there."""
        try:
            message, fds = self._first_message() if not self.ready.done() else (self._socket.recv(REPLY_BYTES), ())
        except BlockingIOError:
            return False
        except ConnectionResetError:
            message, fds = b"", []
        for fd in fds:
            self._watch(fd)
        if message:
            self._read(message)
        else:
            self.close()
        return bool(message)

    def _receive_all(self) -> None:
        """Take what it said before it ended."""
        while self.is_open and self._receive():
            pass

    def _first_message(self) -> tuple[bytes, Sequence[int]]:
        """The only one that has a descriptor."""
        message, fds, _, _ = socket.recv_fds(self._socket, REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        for fd in fds:
            if not _is_pidfd_of_child(fd, self._popen.pid):
                close_all(fds)
                log.warning("the helper of %s sent a descriptor that is not its own", self._pool.home.overlay)
                self.kill()
                return message, ()
        return message, fds

    def _read(self, message: bytes) -> None:
        """A helper that says what no helper says runs an overlay's library that speaks in its place: it ends."""
        try:
            self._take(*orjson.loads(message))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            log.warning("the helper of %s said what cannot be: %s", self._pool.home.overlay, error)
            self.kill()

    def _take(self, verb: str, given: Any) -> None:  # noqa: ANN401
        if verb == "ended":
            for number, status, cpu_ms, peak_kib, lost in given:
                code = os.waitstatus_to_exitcode(status)
                peak_mb = round(peak_kib / 1024, 3)
                self._end(number, Exit(code, cpu_ms, peak_mb, min(peak_mb, self._floor_mb), lost))
        elif verb == "failed":
            number, error_number, words = given
            self._end(number, Exit(None, failed=OSError(error_number or errno.EINVAL, words)))
        elif verb == "memory":
            number, kib = given
            mb = None if kib is None else kib / 1024
            self._measured.pop(number).set_result(mb)
        elif self.ready.done():
            raise ValueError(verb)
        elif verb == "ready":
            self._become_ready(**given)
        else:
            told = _Told(verb, given)
            self._learn(told)
            self.ready.set_exception(told)

    def _become_ready(self, *, namespace: bool, floor_kib: int, loaded: list[str], left: dict[str, str]) -> None:
        self.idle_since = time.monotonic()
        self._floor_mb = round(floor_kib / 1024, 3)
        self.ready.set_result({"namespace": bool(namespace), "loaded": list(loaded), "left": dict(left)})

    def _end(self, number: int, exit_: Exit) -> None:
        process = self.processes.pop(number, None)
        if process is not None:
            process.ended.set_result(exit_)
        if not self.processes:
            self.idle_since = time.monotonic()
            if self._pool.retired:
                self.close()

    def _watch(self, pidfd: int) -> None:
        self._pidfds.add(pidfd)
        self._loop.add_reader(pidfd, partial(self._exited, pidfd))

    def _exited(self, pidfd: int) -> None:
        """Of the process that the bus started, or of the one that does its work. With the last, everything is gone."""
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        self._pidfds.discard(pidfd)
        self._receive_all()
        self.close()
        if not self._pidfds:
            self._settle()

    def _settle(self) -> None:
        self._popen.wait()
        self._said.drain()
        lost = f"the helper that ran it {_end_of(self._popen.returncode)}"
        if not self.ready.done():
            said = self.log.kept().decode("utf-8", "replace").strip()
            self.ready.set_exception(OSError(errno.ECHILD, f"{lost} before it was ready: {said}"))
        if not self.ready.cancelled():
            self.ready.exception()  # seen, whether or not somebody waits for it
        for future in self._measured.values():
            future.set_result(None)
        for number in list(self.processes):
            self._end(number, Exit(None, lost=lost))
        self.gone.set_result(None)


def _rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []


def _copies(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))  # noqa: PERF401  # so that those are known that were made
    except OSError:
        close_all(copies)
        raise
    return copies


def _is_pidfd_of_child(fd: int, parent: int) -> bool:
    """Whether it is a pidfd (pidfd_open(2)) of a child of that process: what it says of itself is not believed."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        status = Path(f"/proc/{int(fields['Pid'])}/status").read_text()
    except (OSError, KeyError, ValueError):
        return False
    return f"PPid:\t{parent}\n" in status


def _end_of(code: int) -> str:
    """Of `Popen.returncode`. The process that waits for one in a namespace says 128 + signal, as shells do."""
    number = -code if code < 0 else code - 128
    try:
        return f"was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with status {code}"


class UnfitError(Exception):
    """A script that cannot be run by fork; the message says why. Spawn it."""


class Pool:
    """The helpers of one home and way of starting, and what is known of how to start them."""

    def __init__(self, home: Home, script: Script | None, most: int, begin: Callable[[Pool], Helper]) -> None:
        self.home = home
        self.script = script
        self.helpers: list[Helper] = []
        self.skip: dict[str, str] = {}
        self.unfit: str | None = None
        self.namespace = True
        self.retired = False
        self._most = most
        self._begin = begin
        self._starting: asyncio.Task[Helper] | None = None

    def free(self) -> Helper | None:
        """The helper with the fewest processes; None where none is ready. Another is begun where all have work."""
        helper = self.any()
        if helper is not None and helper.processes and len(self.helpers) < self._most:
            self._start()
        return helper

    def any(self) -> Helper | None:
        return min(self.helpers, key=_load, default=None)

    async def ready(self) -> Helper:
        """Wait for a helper that is ready. One that is starting goes on if the caller is cancelled.

        Raises `UnfitError`, or OSError where no helper can be had.
        """
        helper = self.free()
        return await asyncio.shield(self._start()) if helper is None else helper

    def argv(self, argv: Sequence[str]) -> Sequence[str]:
        """What of a command its helper needs: of a script that is forked not the interpreter, which it is itself."""
        return argv if self.script is None else argv[len(self.script.interpreter) :]

    def retire(self) -> None:
        """Let the helpers end as soon as their processes have."""
        self.retired = True
        for helper in [helper for helper in self.helpers if not helper.processes]:
            helper.close()

    def close(self) -> None:
        """Let the helpers end. Who waits for one that starts is told that it ended."""
        self.retired = True
        for helper in list(self.helpers):
            helper.close()

    def _start(self) -> asyncio.Task[Helper]:
        if self._starting is None:
            self._starting = asyncio.create_task(self._until_ready(), name=f"helper of {self.home.overlay}")
            self._starting.add_done_callback(self._started)
        return self._starting

    def _started(self, task: asyncio.Task[Helper]) -> None:
        self._starting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("no helper for %s: %s", self.home.overlay, error)

    async def _until_ready(self) -> Helper:
        """Each try that fails teaches something, so that they are few: no namespace, one more module to leave alone."""
        tries = itertools.count(1)
        while True:
            try:
                helper = self._begin(self)
                await helper.ready
            except _Told as told:
                self._learn(told)
            except OSError as error:
                if error.errno == errno.ECHILD and not self.retired and next(tries) < TRIES:
                    continue
                if self.script is None or self.retired or error.errno in SHORTAGES:
                    raise
                log.warning("%s cannot be forked for calls, so it is spawned: %s", self.home.overlay, error)
                self._learn(_Told("unfit", str(error)))
            else:
                if helper.is_open:
                    self.helpers.append(helper)
                    return helper
            if self.unfit is not None:
                raise UnfitError(self.unfit)

    def _learn(self, told: _Told) -> None:
        if told.verb == "unclean" and told.given.keys() - self.skip.keys():
            self.skip |= told.given
        elif told.verb == "no_namespace" and self.namespace:
            self.namespace = False
        else:
            self.unfit = str(told.given)


def _load(helper: Helper) -> int:
    return len(helper.processes)


class Helpers:
    """Every helper of a bus. Used in one event loop only."""

    def __init__(self, *, idle_s: float = IDLE_S, most: int | None = None, namespace: bool = True) -> None:
        self._idle_s = idle_s
        self._most = most or min(2, len(os.sched_getaffinity(0)))
        self._namespace = namespace
        self._mark = f"aal-{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)
        self._pools: dict[tuple[Home, Script | None], Pool] = {}
        self._alive: set[Helper] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._closed = False

    def pool(self, home: Home, script: Script | None = None) -> Pool:
        """The pool for calls of this home: of forks where `script` is given and fit for it, else of spawns."""
        pool = self._pools.get((home, script))
        if pool is None or pool.home.env is not home.env:
            pool = self._new_pool(home, script)
        return pool if pool.unfit is None else self.pool(home)

    async def start(
        self, home: Home, argv: Sequence[str], fds: tuple[int, int, int], env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program that keeps running, in the folder and environment of its home, with `env` added.

        `fds` become its stdin, stdout and stderr; they stay the caller's to close. Raises OSError, with the errno and
        the words of the program's failure to start.
        """
        process = None
        while process is None:
            pool = self.pool(home)
            helper = pool.any() or await pool.ready()
            with contextlib.suppress(GoneError):
                process = helper.launch(argv, fds, env or {})
        await process.memory_mb()  # it answers after it has started the program, or told that it could not
        if process.ended.done() and (failed := process.ended.result().failed) is not None:
            raise failed
        return process

    def state(self, overlay: str) -> list[dict[str, Any]]:
        """The helpers of an overlay, as JSON for people."""
        return [
            _as_json(pool, helper)
            for pool in self._pools.values()
            if pool.home.overlay == overlay
            for helper in pool.helpers
        ]

    async def close(self) -> None:
        """End every helper and with them everything that was started."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
        for pool in self._pools.values():
            pool.close()
        for helper in list(self._alive):
            helper.close()
        if self._alive:
            await asyncio.wait([helper.gone for helper in self._alive])

    def _new_pool(self, home: Home, script: Script | None) -> Pool:
        for key, pool in list(self._pools.items()):
            other = pool.home
            if other.overlay == home.overlay and (other.code_hash, id(other.env)) != (home.code_hash, id(home.env)):
                del self._pools[key]
                pool.retire()
        pool = self._pools[home, script] = Pool(home, script, self._most, self._begin)
        return pool

    def _begin(self, pool: Pool) -> Helper:
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the bus is shutting down")
        script = pool.script
        config = {
            "mark": f"{self._mark}-{next(self._numbers)}",
            "namespace": self._namespace and pool.namespace,
            "arguments": None if script is None else script.arguments,
            "preload": () if script is None else script.preload,
            "skip": list(pool.skip),
        }
        self._make_room()
        helper = Helper(pool, config, partial(self._learn_of, pool))
        self._alive.add(helper)
        helper.gone.add_done_callback(lambda _: self._alive.discard(helper))
        if self._looking is None:
            self._look()
        return helper

    def _make_room(self) -> None:
        """Of too many helpers that are idle those end that were idle for longest."""
        idle = sorted((helper for helper in self._alive if helper.is_idle), key=attrgetter("idle_since"))
        for helper in idle[: max(0, len(idle) - KEPT_IDLE + 1)]:
            helper.close()

    def _learn_of(self, pool: Pool, told: _Told) -> None:
        """Of a helper that runs nobody's Python it holds for all; another may speak for an overlay's library."""
        if told.verb == "no_namespace" and pool.script is None:
            log.warning("programs run without a pid namespace: %s", told.given)
            self._namespace = False

    def _look(self) -> None:
        """End the helpers that were idle for long."""
        since = time.monotonic() - self._idle_s
        for helper in list(self._alive):
            if helper.is_idle and helper.idle_since <= since:
                helper.close()
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self._idle_s / 2, self._look) if self._alive else None


def _as_json(pool: Pool, helper: Helper) -> dict[str, Any]:
    ready = helper.ready.result()
    return {
        "pid": helper.pid,
        "phase": pool.home.phase,
        "mode": "spawn" if pool.script is None else "fork",
        "running": len(helper.processes),
        "pid_namespace": ready["namespace"],
        "preloaded": ready["loaded"],
        "not_preloaded": {**ready["left"], **pool.skip},
    }


async def has_namespace(folder: Path) -> bool:
    """Whether the kernel gives helpers a pid namespace, by starting one in `folder`. Raises OSError."""
    helpers = Helpers(most=1)
    home = Home("none", "", Rights(), folder, {"PATH": os.defpath})
    try:
        helper = await helpers.pool(home).ready()
        return bool(helper.ready.result()["namespace"])
    finally:
        await helpers.close()
