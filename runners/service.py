"""HTTP services that the bus starts and watches: one for each overlay, for all of its phases and capabilities.

A service starts at its first call, which waits for it together with all that come meanwhile; the start goes on when
their deadlines pass. Its port stands in OVERLAY_PORT, and in PORT, where many frameworks look. It is ended when it was
idle for long; when its overlay's code changes (new calls then get a new one at once); when it is unhealthy or too big
(new calls wait until it is gone, so that no two hold the same memory); and at the end of the bus. It always ends in
this order: no new call, `drain_s` for the running ones, TERM to its group, `kill_grace_s`, KILL. Where nobody asked for
its end, the next start backs off.

Two decisions that a reader could not guess. What answers on the port is trusted only once the kernel says that a
process of this overlay listens there: another program may have taken the port first. And a busy service is not a
sick one: silence to a look at its health does not count while calls run, since many services serve one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import aiohttp

from runners.base import Code, Outcome
from runners.helpers import SHORTAGES, Home
from runners.output import Output, describe
from runners.ports import HOST, free_port, holder_of, is_taken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping

    from runners.base import Job, ServiceTarget
    from runners.helpers import Helpers, Process
    from runners.logs import OverlayLogs

log = logging.getLogger(__name__)


FIRST_WAIT_S, LONGEST_WAIT_S = 0.01, 0.25
"""Seconds between two questions whether a service is ready; each wait is twice the one before."""

STRANGERS = 2
"""How often in a row a port must be seen in the hands of others: a look at processes that come and go may miss ours."""

TAIL_BYTES = 2048
"""How much of the end of its log stands in the outcome where a service does not come up."""

ANSWER_BYTES = 64 * 1024
"""How much of an answer of `ready_path` is read; a connection with more is dropped."""

SILENT = "did not answer in time"

_IN_USE = re.compile(rb"address (is )?already in use|EADDRINUSE", re.IGNORECASE)

State = Literal["starting", "ready", "draining", "gone"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often. Times are in seconds."""

    check_s: float = 5.0
    """Between two looks at a service that is up: at its health, its memory."""
    answer_s: float = 5.0
    """That `ready_path` may take to answer."""
    misses: int = 3
    """Looks in a row at which a service is not healthy, until it is replaced."""
    first_backoff_s: float = 0.5
    """From a failure to the next start; twice as long after each further one."""
    longest_backoff_s: float = 30.0
    steady_s: float = 10.0
    """That a service must be ready so that the failures before it are forgotten."""
    patience_s: float = 1.0
    """That a call waits for a start that backs off. One that waited longer would hold a slot of the bus for nothing."""


class ServiceError(Exception):
    """The service cannot be had in time. `outcome` is that of the call, of which nothing was sent."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.error)
        self.outcome = outcome


class _FaultError(Exception):
    """Why a service must end though nobody asked for that. The words go on from "the service"."""

    def __init__(self, words: str, *, retryable: bool = True) -> None:
        super().__init__(words)
        self.retryable = retryable


class _PortTakenError(_FaultError):
    """Another program has the port."""


class Services:
    """Every service of a bus. Used in one event loop only; `clock` is that of the jobs' deadlines."""

    def __init__(
        self,
        helpers: Helpers,
        logs: OverlayLogs | None,
        *,
        kill_grace_s: float,
        drain_s: float,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._house = _House(helpers, logs, kill_grace_s, drain_s, pace or Pace(), clock)
        self._keepers: dict[str, _Keeper] = {}
        self._closing = asyncio.Event()

    @contextlib.asynccontextmanager
    async def use(self, job: Job, target: ServiceTarget) -> AsyncIterator[str]:
        """The base URL of the service, once it is ready. Until the exit the call counts as running.

        Raises `ServiceError`: START where it does not come up or backs off, TIMEOUT, or CANCELLED after `close`.
        """
        service = await self._ready(job, target)
        service.enter(job.hard_mb)
        try:
            yield service.url
        finally:
            service.leave()

    def state(self, overlay: str) -> dict[str, Any]:
        """`{}`, or `{"service": {"state", "starts", "failures", ...}}` once there was a call."""
        keeper = self._keepers.get(overlay)
        return {} if keeper is None else {"service": keeper.state()}

    async def close(self) -> None:
        """End every service and the helpers that started them, and start no more. Nothing is left of them then."""
        self._closing.set()
        await self._house.close()
        await self._house.helpers.close()
        if self._house.logs is not None:
            self._house.logs.close()

    async def _ready(self, job: Job, target: ServiceTarget) -> _Service:
        keeper = self._keeper(job, target.env)
        while not self._closing.is_set():
            if self._keepers[job.overlay] is not keeper:
                error = "the overlay's code changed while the call waited for its service"
                raise ServiceError(Outcome(Code.START, error=error, retryable=True))
            service = keeper.service
            if service is None or service.state == "gone":
                await self._start(keeper, job, target)
            elif service.state == "ready":
                return service
            else:
                await self._wait_for(service, keeper, job)
        raise ServiceError(Outcome(Code.CANCELLED, error="the runner was closed before the service was ready"))

    def _keeper(self, job: Job, env: Mapping[str, str]) -> _Keeper:
        """That of the job's overlay. New code gets a new one, and the service of the old code is ended.

        So does another environment, though it says the same: it is of another folder, made anew in the old one's place.
        """
        keeper = self._keepers.get(job.overlay)
        if keeper is None or keeper.code_hash != job.code_hash or keeper.env is not env:
            if keeper is not None and keeper.service is not None:
                keeper.service.retire()
            keeper = self._keepers[job.overlay] = _Keeper(job.code_hash, env, self._house)
        return keeper

    async def _start(self, keeper: _Keeper, job: Job, target: ServiceTarget) -> None:
        """Let a service start, or wait until it may. Raises `ServiceError` where that is too long."""
        wait_s = keeper.backoff_s()
        if wait_s <= 0:
            keeper.start(job, target)
        elif wait_s > self._house.pace.patience_s or self._house.clock() + wait_s >= job.deadline:
            raise ServiceError(keeper.refusal())
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), wait_s)

    async def _wait_for(self, service: _Service, keeper: _Keeper, job: Job) -> None:
        """Until it is ready, or gone where it is about to be. Raises `ServiceError` where that fails or takes long."""
        state, event = service.state, service.up if service.state == "starting" else service.gone
        began = self._house.clock()
        await asyncio.wait({event}, timeout=max(0.0, job.deadline - began))
        if not event.done():
            waited_s = self._house.clock() - began
            error = f"the service was still {state} after {waited_s:.3f} s"
            raise ServiceError(Outcome(Code.TIMEOUT, error=error, retryable=True))
        if state == "starting" and service.has_failed:
            raise ServiceError(keeper.refusal())


@dataclass(slots=True)
class _House:
    """What all services share, and those that live."""

    helpers: Helpers
    logs: OverlayLogs | None
    kill_grace_s: float
    drain_s: float
    pace: Pace
    clock: Callable[[], float]
    lives: dict[_Service, asyncio.Task[None]] = field(default_factory=dict)
    ports: set[int] = field(default_factory=set)
    _client: aiohttp.ClientSession | None = None

    def let_live(self, service: _Service) -> None:
        task = self.lives[service] = asyncio.create_task(service.live())
        task.add_done_callback(lambda _: self.lives.pop(service))

    def take_port(self) -> int:
        """A port that nobody has now, and that no service here was given."""
        while (port := free_port()) in self.ports:
            pass
        self.ports.add(port)
        return port

    @property
    def client(self) -> aiohttp.ClientSession:
        """What asks for health. A connection for each question: what is asked is whether one can be had."""
        if self._client is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._client = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"User-Agent": "aal-core"},
            )
        return self._client

    async def close(self) -> None:
        for service in self.lives:
            service.retire()
        if self.lives:
            await asyncio.wait(self.lives.values())
        if self._client is not None:
            await self._client.close()


class _Keeper:
    """Keeps the service of one overlay's code: starts it, remembers how often it failed, says when it may start again.

    `service` is the last that was started.
    """

    def __init__(self, code_hash: str, env: Mapping[str, str], house: _House) -> None:
        self.code_hash = code_hash
        self.env = env
        self.service: _Service | None = None
        self._house = house
        self._starts = 0
        self._failures = 0
        self._fault: _FaultError | None = None
        self._log = ""
        self._again_at = 0.0

    def start(self, job: Job, target: ServiceTarget) -> None:
        self._starts += 1
        self.service = _Service(job, target, self._house, self._failed)
        self._house.let_live(self.service)

    def backoff_s(self) -> float:
        """How long it may not start yet."""
        return max(0.0, self._again_at - self._house.clock()) if self._failures else 0.0

    def refusal(self) -> Outcome:
        """What a call gets that would need it now, after it failed."""
        error = f"the service {self._fault or 'ended before it was ready'}"
        if wait_s := self.backoff_s():
            error += f"; it may start again in {wait_s:.1f} s"
        retryable = self._fault is None or self._fault.retryable
        return Outcome(Code.START, error=error, log=self._log, retryable=retryable)

    def state(self) -> dict[str, Any]:
        """What has become of it, as JSON for people."""
        backoff_s = self.backoff_s()
        alive = self.service is not None and self.service.state != "gone"
        told: dict[str, Any] = {"state": "backing off" if backoff_s else "stopped"}
        if self.service is not None and alive:
            told = self.service.told()
        elif backoff_s:
            told["retry_in_s"] = round(backoff_s, 3)
        last_error = None if self._fault is None else str(self._fault)
        return told | {"starts": self._starts, "failures": self._failures, "last_error": last_error}

    def _failed(self, fault: _FaultError, ready_s: float, tail: str) -> None:
        """`ready_s`: how long it had been ready. After a steady time a failure is the first again."""
        pace = self._house.pace
        self._failures = 1 if ready_s >= pace.steady_s else self._failures + 1
        wait_s = min(pace.longest_backoff_s, pace.first_backoff_s * 2 ** min(self._failures - 1, 32))
        self._again_at = self._house.clock() + wait_s
        self._fault, self._log = fault, tail


class _Voice:
    """What a service says: it goes to its overlay's log, and the end of it is at hand."""

    def __init__(self, overlay: str, logs: OverlayLogs | None) -> None:
        self.tail = b""
        self._overlay = overlay
        self._logs = logs

    def take(self, data: bytes) -> None:
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        if self._logs is not None:
            self._logs.append(self._overlay, data, self)

    def end(self) -> None:
        if self._logs is not None:
            self._logs.end(self._overlay, self)

    def note(self, words: str) -> None:
        """A line of the bus between its own. The words go on from "the service"."""
        if self._logs is not None:
            self._logs.append(self._overlay, f"aal: the service {words}\n".encode())

    def last_words(self) -> str:
        """The end of what it said, in whole lines where there are several."""
        text = self.tail
        if len(text) == TAIL_BYTES:
            text = text.partition(b"\n")[2] or text
        return text.decode("utf-8", "replace").strip()


@dataclass(frozen=True, slots=True)
class _Program:
    """The process of a service, our end of the pipe that it writes to, and the port that it was given."""

    process: Process
    output: Output
    port: int


class _Service:
    """One service, from its start until nothing of it is left.

    `up` tells whether it came up, `gone` that nothing of it is left. Its rights should be the union of those of the
    overlay's phases; they are those of the job that it was started for.
    """

    def __init__(
        self, job: Job, target: ServiceTarget, house: _House, on_fault: Callable[[_FaultError, float, str], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.state: State = "starting"
        self.url = ""
        self.up: asyncio.Future[bool] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._overlay = job.overlay
        self._home = Home(job.overlay, "", job.rights, job.folder, target.env, job.code_hash)
        self._target = target
        self._house = house
        self._on_fault = on_fault
        self._voice = _Voice(job.overlay, house.logs)
        self._program: _Program | None = None
        self._retired: asyncio.Future[None] = loop.create_future()
        self._empty: asyncio.Future[None] = loop.create_future()
        self._calls = 0
        self._hard_mb = job.hard_mb
        self._memory_mb: float | None = None
        self._ready_at = self._idle_since = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether it did not come up, though nobody had retired it."""
        return self.up.done() and not self.up.result() and not self._retired.done()

    def enter(self, hard_mb: int) -> None:
        """A call begins. Without a cap of its own, the service may hold what the largest of its calls may."""
        self._calls += 1
        self._hard_mb = max(self._hard_mb, hard_mb)

    def leave(self) -> None:
        self._calls -= 1
        self._idle_since = self._house.clock()
        if self._calls == 0 and self.state == "draining" and not self._empty.done():
            self._empty.set_result(None)

    def retire(self) -> None:
        """Take no new call, and end."""
        if not self._retired.done():
            self._retired.set_result(None)
            self.state = "draining" if self.state == "ready" else self.state

    def told(self) -> dict[str, Any]:
        """What it is and does, as JSON for people."""
        told: dict[str, Any] = {"state": self.state, "calls": self._calls}
        if self._program is not None:
            told["port"] = self._program.port
        if self._memory_mb is not None:
            told["memory_mb"] = round(self._memory_mb, 1)
        return told

    async def live(self) -> None:
        """Start, serve, end. Whatever goes wrong is told to the keeper and in the logs."""
        try:
            program = await self._come_up()
            if self.state == "ready":
                await self._attend(program, self._watch(program))
        except _FaultError as fault:
            self._voice.note(str(fault))
            log.warning("overlay %s: the service %s", self._overlay, fault)
            ready_s = self._house.clock() - self._ready_at if self.up.done() else 0.0
            self._on_fault(fault, ready_s, self._voice.last_words())
        finally:
            self.state = "draining"
            if not self.up.done():
                self.up.set_result(False)
            await self._end()
            self.state = "gone"
            self.gone.set_result(None)

    async def _come_up(self) -> _Program:
        """Start it and wait until it is ready, on another port where the first turns out taken. Raises `_FaultError`.

        It is not ready where it was retired meanwhile.
        """
        give_up = self._house.clock() + self._target.start_timeout_s
        program = self._program = await self._spawn()
        try:
            await self._attend(program, self._become_ready(program, give_up))
        except _PortTakenError as fault:
            self._voice.note(f"{fault}; it gets another one")
            await self._stop(program)
            program = self._program = await self._spawn()
            await self._attend(program, self._become_ready(program, give_up))
        return program

    async def _spawn(self) -> _Program:
        port = self._house.take_port()
        ports = {"OVERLAY_PORT": str(port), "PORT": str(port)}
        argv = [part.replace("{port}", str(port)) for part in self._target.argv]
        self._voice.tail = b""
        try:
            with _descriptors() as (nothing, reader, writer):
                output = Output(asyncio.get_running_loop(), os.dup(reader), self._voice.take, self._voice.end)
                fds = nothing, writer, writer
                try:
                    process = await self._house.helpers.start(self._home, argv, fds, ports)
                except BaseException:
                    output.close()
                    raise
        except (OSError, ValueError) as error:
            self._house.ports.discard(port)
            short = isinstance(error, OSError) and error.errno in SHORTAGES
            words = (isinstance(error, OSError) and error.strerror) or str(error)
            raise _FaultError(f"could not start {self._target.argv[0]!r}: {words}", retryable=short) from error
        self._voice.note(f"starts on port {port}")
        return _Program(process, output, port)

    async def _attend(self, program: _Program, work: Coroutine[Any, Any, None]) -> None:
        """Do the work until it is done, or until the service was retired.

        Raises `_FaultError`: that of the work, or that the program has ended.
        """
        task = asyncio.ensure_future(work)
        ends: set[asyncio.Future[Any]] = {task, program.process.ended, self._retired}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            await asyncio.wait({task})
        fault = None if task.cancelled() else task.exception()
        if self._retired.done():
            return
        if program.process.ended.done():
            raise self._death(program)
        if fault is not None:
            raise fault

    async def _become_ready(self, program: _Program, give_up: float) -> None:
        """Ask until it is. Raises `_FaultError`."""
        wait_s, strangers = FIRST_WAIT_S, 0
        while True:
            left_s = give_up - self._house.clock()
            lack = await self._lack(program, min(self._house.pace.answer_s, max(left_s, LONGEST_WAIT_S)))
            if lack is None:
                holder = await asyncio.to_thread(holder_of, program.port, program.process.helper_pid)
                if holder == "ours":
                    break
                strangers = strangers + 1 if holder == "others" else 0
                lack = "belongs to another program"
                if strangers == STRANGERS:
                    raise _PortTakenError(f"was not ready: port {program.port} {lack}")
            if left_s <= wait_s:
                words = f"was not ready within {self._target.start_timeout_s:g} s"
                raise _FaultError(f"{words}: {self._asked(program)} {lack}")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self._ready_at = self._idle_since = self._house.clock()
        self.url = f"http://{HOST}:{program.port}"
        self.state = "ready"
        self.up.set_result(True)

    async def _watch(self, program: _Program) -> None:
        """Look at it every now and then, until it was idle for long. Raises `_FaultError`."""
        pace = self._house.pace
        misses = 0
        try:
            while (idle_left_s := self._idle_left_s()) > 0:
                await asyncio.sleep(min(pace.check_s, idle_left_s))
                await self._check_memory(program)
                lack = await self._lack(program, pace.answer_s) if self._target.ready_path else None
                if lack == SILENT and self._calls:
                    continue
                misses = 0 if lack is None else misses + 1
                if misses == pace.misses:
                    raise _FaultError(f"was unhealthy {misses} times in a row: {self._asked(program)} {lack}")
            self._voice.note(f"is stopped: no call for {self._target.idle_s:g} s")
        finally:
            self.state = "draining"  # in the same turn of the loop, so that no call slips in

    def _idle_left_s(self) -> float:
        idle_s = 0.0 if self._calls else self._house.clock() - self._idle_since
        return self._target.idle_s - idle_s

    async def _check_memory(self, program: _Program) -> None:
        self._memory_mb = await program.process.memory_mb()
        cap_mb = self._target.max_mb or self._hard_mb
        if self._memory_mb is not None and self._memory_mb > cap_mb:
            raise _FaultError(f"used {self._memory_mb:.0f} MiB, more than the {cap_mb} that it may")

    def _asked(self, program: _Program) -> str:
        """What is asked to see whether it is ready, for people."""
        place = f"{HOST}:{program.port} (OVERLAY_PORT)"
        return f"GET {self._target.ready_path} on {place}" if self._target.ready_path else place

    async def _lack(self, program: _Program, timeout_s: float) -> str | None:
        """What it lacks to be ready, in words that go on from `_asked`; None where it is."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._target.ready_path is None:
                    _, writer = await asyncio.open_connection(HOST, program.port)
                    writer.close()
                    return None
                url = f"http://{HOST}:{program.port}{self._target.ready_path}"
                async with self._house.client.get(url, allow_redirects=False) as response:
                    await response.content.read(ANSWER_BYTES)
                    return None if response.status // 100 == 2 else f"answered HTTP {response.status}"  # noqa: PLR2004
        except TimeoutError:
            return SILENT
        except (aiohttp.ClientConnectorError, ConnectionRefusedError):
            return "refused the connection"
        except (aiohttp.ClientError, OSError) as error:
            return f"gave no answer in HTTP: {error}"

    def _death(self, program: _Program) -> _FaultError:
        """Its end as a fault, after its last words were read."""
        program.output.drain()
        exit_ = program.process.ended.result()
        words = exit_.lost or ("ended" if exit_.code is None else describe(exit_.code))
        if self.up.done():
            return _FaultError(words)
        if _IN_USE.search(self._voice.tail) or is_taken(program.port):
            return _PortTakenError(f"{words} before it was ready: port {program.port} was taken")
        return _FaultError(f"{words} before it was ready")

    async def _end(self) -> None:
        """Let the running calls end while they have time, then end the program."""
        if self._program is None:
            return
        if self._calls:
            ends: set[asyncio.Future[Any]] = {self._empty, self._program.process.ended}
            await asyncio.wait(ends, timeout=self._house.drain_s, return_when=asyncio.FIRST_COMPLETED)
        await self._stop(self._program)

    async def _stop(self, program: _Program) -> None:
        """TERM to its group, KILL after the grace. Then nothing of it is left."""
        process = program.process
        process.signal(signal.SIGTERM)
        await asyncio.wait({process.ended}, timeout=self._house.kill_grace_s)
        process.signal(signal.SIGKILL)
        await asyncio.wait({process.ended})
        program.output.drain()
        self._voice.end()
        self._house.ports.discard(program.port)


@contextlib.contextmanager
def _descriptors() -> Iterator[tuple[int, int, int]]:
    """The null device to read, and the two ends of a pipe, of which the first does not block."""
    with contextlib.ExitStack() as stack:
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, nothing)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        os.set_blocking(reader, False)
        yield nothing, reader, writer
