"""An HTTP service that the bus starts and watches: one of them, from its start until nothing of it is left.

Its port stands in OVERLAY_PORT, and in PORT, where many frameworks look. It is ended when it was idle for long; when
its overlay has changed, is disabled or gone; when it is unhealthy or too big; and at the end of the bus. It ends in
this order: no new call, `drain_s` for the running ones, TERM to its group, `kill_grace_s`, KILL. One that has too much
memory gets no time to drain: its calls are told the figure.

Three decisions that a reader could not guess. What answers on the port is trusted only once the kernel says that a
process of this overlay listens there: another program may have taken the port first. A busy service is not a sick one:
silence to a look at its health does not count while calls run, since many services serve one at a time. And others can
reach its port as well: it finds in OVERLAY_TOKEN what each request of the bus brings, but the looks at its health.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from runners.base import Code, Outcome
from runners.faults import End, FaultError, PortTakenError, cut_off, death
from runners.helpers import SHORTAGES
from runners.logs import Voice
from runners.output import MEMORY_EVERY_S, Output, data_limit, excess
from runners.ports import HOST, free_port, holder_of, is_taken
from runners.probe import SILENT, Probe, ProbeClient
from runners.processes import Home
from runners.unstarted import unstarted

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from runners.base import Job, Sandbox, ServiceTarget
    from runners.helpers import Helpers
    from runners.logs import OverlayLogs
    from runners.processes import Process

log = logging.getLogger(__name__)


FIRST_WAIT_S, LONGEST_WAIT_S = 0.01, 0.25
"""Seconds between two questions whether a service is ready; each wait is twice the one before."""

TOKEN_BYTES = 32
"""Random ones, of the token that calls bring."""

STRANGERS = 2
"""How often in a row a port must be seen in the hands of others: a look at processes that come and go may miss ours."""

TAIL_BYTES = 2048
"""How much of the end of its log stands in the outcome where a service does not come up."""

_IN_USE = re.compile(rb"address (is )?already in use|EADDRINUSE", re.IGNORECASE)

State = Literal["starting", "ready", "draining", "gone"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often. Times are in seconds."""

    check_s: float = 5.0
    """Between two looks at the health of a service that is up."""
    memory_s: float = MEMORY_EVERY_S
    """Between two looks at its memory, from its start on."""
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


@dataclass(slots=True)
class House:
    """What all services share, and those that live."""

    helpers: Helpers
    logs: OverlayLogs | None
    kill_grace_s: float
    drain_s: float
    pace: Pace
    clock: Callable[[], float]
    client: ProbeClient = field(default_factory=ProbeClient)
    lives: dict[Service, asyncio.Task[None]] = field(default_factory=dict)
    ports: set[int] = field(default_factory=set)

    def let_live(self, service: Service) -> None:
        task = self.lives[service] = asyncio.create_task(service.live())
        task.add_done_callback(lambda _: self.lives.pop(service))

    def take_port(self) -> int:
        """A port that nobody has now, and that no service here was given."""
        while (port := free_port()) in self.ports:
            pass
        self.ports.add(port)
        return port

    async def close(self, *, at_once: bool) -> None:
        for service in self.lives:
            service.close(at_once=at_once)
        if self.lives:
            await asyncio.wait(self.lives.values())
        await self.client.close()


@dataclass(frozen=True, slots=True)
class _Program:
    """The process of a service, our end of the pipe that it writes to, the port that it was given, and who asks it.

    `home` is where it was started.
    """

    home: Home
    process: Process
    output: Output
    port: int
    probe: Probe


class Service:
    """One service. `up` tells whether it came up, `gone` that nothing of it is left; `memory_mb` is what it has.

    Its rights are those of its target, whatever call it is started for. Without a right to the network it may listen on
    its port, and so has a home of its own with each port.

    `on_fault` is told of the fault, for how many seconds it had been ready, and its last words.
    """

    def __init__(
        self, job: Job, target: ServiceTarget, house: House, on_fault: Callable[[FaultError, float, str], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.state: State = "starting"
        self.url = ""
        self.token = secrets.token_urlsafe(TOKEN_BYTES)
        self.up: asyncio.Future[bool] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        edition, program = job.edition, target.argv[0]
        self._home = Home(job.overlay, "", target.rights, job.folder, target.env, edition, program, tier=target.tier)
        self._target = target
        self._house = house
        self._on_fault = on_fault
        self._voice = Voice(house.logs, job.overlay, "the service")
        self._tail = b""
        self._starting: asyncio.Task[Process] | None = None
        self._program: _Program | None = None
        self._retired: asyncio.Future[None] = loop.create_future()
        self._at_once: asyncio.Future[None] = loop.create_future()
        self._empty: asyncio.Future[None] = loop.create_future()
        self._ending: Outcome | None = None  # what its calls get, should it be us who end it
        self._signalled = False
        self._calls = 0
        self._hard_mb = job.hard_mb
        self.memory_mb: float | None = None
        self._began = house.clock()
        self._ready_at = self._idle_since = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether it did not come up, though nobody had retired it."""
        return self.up.done() and not self.up.result() and not self._retired.done()

    @property
    def sandbox(self) -> Sandbox | None:
        """What the kernel holds it to; None before it was started."""
        return None if self._program is None else self._program.process.sandbox_for("service")

    def idle_for_s(self) -> float:
        """For how many seconds it is up and without a call; negative where it is not."""
        if self.state != "ready" or self._calls:
            return -1.0
        return self._house.clock() - self._idle_since

    def evict(self, why: str) -> None:
        """End it at once, as memory is short. `why` goes on from "was ended"."""
        self._ending = Outcome(Code.EVICTED, error=f"the service was ended {why}", log=self._last_words())
        self.retire(f"is ended {why}", Code.EVICTED)
        if not self._at_once.done():
            self._at_once.set_result(None)

    def enter(self, hard_mb: int) -> None:
        """A call begins. Without a cap of its own, the service may hold what the largest of its calls may."""
        self._calls += 1
        if hard_mb > self._hard_mb:
            self._hard_mb = hard_mb
            if self._program is not None:
                self._program.process.raise_limit(self._may_mb)

    @property
    def _may_mb(self) -> int:
        return self._target.max_mb or self._hard_mb

    def leave(self) -> None:
        self._calls -= 1
        self._idle_since = self._house.clock()
        if self._calls == 0 and self.state == "draining" and not self._empty.done():
            self._empty.set_result(None)

    def end(self) -> End | None:
        """For a call whose exchange with it failed: why the service was ended, or has ended, meanwhile.

        None while it runs, as far as is known: the news of a process's end may come after that of its connections'.
        """
        ended = None if self._program is None else self._program.process.ended
        if ended is not None and ended.done() and not self._signalled:
            return End(cut_off(death(ended.result()), self._last_words()), by_bus=False)
        return End(self._ending, by_bus=True) if self._signalled and self._ending is not None else None

    def retire(self, why: str, code: Code = Code.CRASH) -> None:
        """Take no new call, and end. `why` goes on from "the service"; `code` is for the calls that it cuts off."""
        if not self._retired.done():
            self._voice.note(why)
            if self._ending is None:
                error = f"the service {why}, and was ended before it answered"
                self._ending = Outcome(code, error=error, log=self._last_words(), retryable=True)
            self._retired.set_result(None)
            self.state = "draining" if self.state == "ready" else self.state

    def close(self, *, at_once: bool) -> None:
        """Retire, and do not wait for what only starts, nor, `at_once`, for what runs."""
        self.retire("is ended with the bus", Code.CANCELLED)
        if self._starting is not None:  # what may have been started ends with its helper
            self._starting.cancel()
        if at_once and not self._at_once.done():
            self._at_once.set_result(None)

    def told(self) -> dict[str, Any]:
        """What it is and does, as JSON for people. `pid` is that of the helper that it runs below."""
        told: dict[str, Any] = {"state": self.state, "calls": self._calls}
        if self._program is not None:
            told |= {"pid": self._program.process.helper_pid, "port": self._program.port}
            told["uptime_s"] = round(self._house.clock() - self._began, 3)
        if (held := self.sandbox) is not None:
            told["sandbox"] = {"enforced": list(held.enforced), "missing": list(held.missing)}
        if self.memory_mb is not None:
            told["memory_mb"] = round(self.memory_mb, 1)
        return told

    async def live(self) -> None:
        """Start, serve, end. Whatever goes wrong is told to `on_fault` and in the logs."""
        drain_s = self._house.drain_s
        try:
            await self._come_up()
            if self._program is not None and self.state == "ready":
                await self._while_it_runs(self._program, self._serve(self._program))
        except FaultError as fault:
            self._take_fault(fault)
            drain_s = 0.0 if fault.code is Code.MEMORY_LIMIT else drain_s
        except OSError as error:  # of the bus itself: it is short of descriptors, say
            words = f"could not be looked after: {error.strerror or error}"
            self._take_fault(FaultError(words, retryable=error.errno in SHORTAGES))
        finally:
            self.state = "draining"
            if not self.up.done():
                self.up.set_result(False)
            if self._program is not None:
                if self._calls and drain_s:
                    await self._drain(self._program, drain_s)
                await self._stop(self._program)
            self.state = "gone"
            self.gone.set_result(None)

    def _take_fault(self, fault: FaultError) -> None:
        self._voice.note(str(fault))
        log.warning("overlay %s: the service %s", self._home.overlay, fault)
        self._ending = cut_off(fault, self._last_words())
        ready_s = self._house.clock() - self._ready_at if self.up.done() else 0.0
        self._on_fault(fault, ready_s, self._last_words())

    # Start

    async def _come_up(self) -> None:
        """Start it and wait until it is ready, on another port where the first turns out taken. Raises `FaultError`.

        It is not ready, or not even started, where it was retired meanwhile.
        """
        give_up = self._house.clock() + self._target.start_timeout_s
        try:
            await self._try_a_port(give_up)
        except PortTakenError as fault:
            self._voice.note(f"{fault}; it gets another one")
            if self._program is not None:
                await self._stop(self._program)
            await self._try_a_port(give_up)

    async def _try_a_port(self, give_up: float) -> None:
        self._program = None
        program = self._program = await self._spawn()
        if program is not None:
            self._signalled = False
            await self._while_it_runs(program, self._become_ready(program, give_up))

    async def _spawn(self) -> _Program | None:
        """Raises `FaultError`. None where it was retired first."""
        if self._retired.done():
            return None
        try:
            port = self._house.take_port()
        except OSError as error:
            raise self._unstarted(error) from error
        home = self._home_at(port)
        try:
            process, output = await self._start_process(home, port)
        except asyncio.CancelledError:
            self._leave_port(home, port)
            if self._retired.done():
                return None
            raise
        except (OSError, ValueError) as error:
            self._leave_port(home, port)
            raise self._unstarted(error) from error
        process.raise_limit(self._may_mb)  # a call may have come meanwhile
        self._began = self._house.clock()
        self._voice.note(f"starts on port {port} (edition {home.edition})")
        return _Program(home, process, output, port, Probe(self._house.client, port, self._target.ready_path))

    def _unstarted(self, error: OSError | ValueError) -> FaultError:
        words, retryable, code = unstarted(self._target.argv, self._target.env, self._home.folder, error)
        return FaultError(words, code=code, retryable=retryable)

    def _home_at(self, port: int) -> Home:
        return self._home if self._home.rights.network is True else replace(self._home, listen=(port,))

    def _leave_port(self, home: Home, port: int) -> None:
        """Another may have it. What was made for it alone is let go."""
        self._house.ports.discard(port)
        if home.listen:
            self._house.helpers.let_go(home)

    async def _start_process(self, home: Home, port: int) -> tuple[Process, Output]:
        given = {"OVERLAY_PORT": str(port), "PORT": str(port), "OVERLAY_TOKEN": self.token}
        argv = [part.replace("{port}", str(port)) for part in self._target.argv]
        data_bytes = data_limit(self._target.max_mb)
        self._tail = b""
        with _descriptors() as (nothing, reader, writer):
            output = Output(asyncio.get_running_loop(), os.dup(reader), self._hear, self._voice.end)
            fds = nothing, writer, writer
            start = self._house.helpers.start(home, argv, fds, given, data_bytes, held_mb=self._may_mb)
            starting = self._starting = asyncio.ensure_future(start)
            try:
                return await starting, output
            except BaseException:
                output.close()
                raise
            finally:
                self._starting = None

    def _hear(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        self._voice.say(data)

    def _last_words(self) -> str:
        """The end of what it said, in whole lines where there are several."""
        text = self._tail
        if len(text) == TAIL_BYTES:
            text = text.partition(b"\n")[2] or text
        return text.decode("utf-8", "replace").strip()

    async def _become_ready(self, program: _Program, give_up: float) -> None:
        """Ask until it is. Raises `FaultError`."""
        wait_s, strangers = FIRST_WAIT_S, 0
        while True:
            left_s = give_up - self._house.clock()
            lack = await program.probe.lack(min(self._house.pace.answer_s, max(left_s, LONGEST_WAIT_S)))
            if lack is None:
                holder = await asyncio.to_thread(holder_of, program.port, program.process.helper_pid)
                if holder == "ours":
                    break
                strangers = strangers + 1 if holder == "others" else 0
                lack = "belongs to another program" if strangers else "does not listen"
                if strangers == STRANGERS:
                    raise PortTakenError(f"was not ready: port {program.port} {lack}")
            if left_s <= wait_s:
                words = f"was not ready within {self._target.start_timeout_s:g} s"
                raise FaultError(f"{words}: {program.probe} {lack}")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        self._ready_at = self._idle_since = self._house.clock()
        self.url = f"http://{HOST}:{program.port}"
        self.state = "ready"
        self.up.set_result(True)

    # Service

    async def _while_it_runs(self, program: _Program, work: Coroutine[Any, Any, None]) -> None:
        """Do the work until it is done, the service is retired, or it has ended, and look at its memory meanwhile.

        Raises `FaultError`: that of the work, of its memory, or that the program has ended.
        """
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(self._weigh(program))
        ends: set[asyncio.Future[Any]] = {*tasks, program.process.ended, self._retired}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        faults = [task.exception() for task in tasks if not task.cancelled()]
        if self._retired.done():
            return
        if program.process.ended.done():
            raise self._fault_of_death(program)
        for fault in faults:
            if fault is not None:
                raise fault

    async def _serve(self, program: _Program) -> None:
        """Look at its health every now and then, until it was idle for long. Raises `FaultError`."""
        pace = self._house.pace
        misses = 0
        try:
            while (idle_left_s := self._idle_left_s()) > 0:
                await asyncio.sleep(min(pace.check_s, idle_left_s))
                lack = await program.probe.lack(pace.answer_s) if program.probe.path else None
                if lack == SILENT and self._calls:
                    continue
                misses = 0 if lack is None else misses + 1
                if misses == pace.misses:
                    words = f"was unhealthy {misses} times in a row: {program.probe} {lack}"
                    raise FaultError(words, code=Code.UNREACHABLE)
            self._voice.note(f"is stopped: no call for {self._target.idle_s:g} s")
        finally:
            self.state = "draining"  # in the same turn of the loop, so that no call slips in

    def _idle_left_s(self) -> float:
        idle_s = 0.0 if self._calls else self._house.clock() - self._idle_since
        return self._target.idle_s - idle_s

    async def _weigh(self, program: _Program) -> None:
        """Look at its memory every now and then. Raises `FaultError` where it has too much."""
        while True:
            await asyncio.sleep(self._house.pace.memory_s)
            memory_mb = await program.process.memory_mb()
            if memory_mb is not None:
                self.memory_mb = memory_mb
                if memory_mb > self._may_mb:
                    self.state = "draining"  # as above
                    raise FaultError(excess(memory_mb, self._may_mb), code=Code.MEMORY_LIMIT)

    # End

    def _fault_of_death(self, program: _Program) -> FaultError:
        """Its end as a fault, after its last words were read."""
        program.output.drain()
        fault = death(program.process.ended.result())
        if self.up.done():
            return fault
        words = f"{fault} before it was ready"
        if is_taken(program.port):
            return PortTakenError(f"{words}: port {program.port} was taken")
        if _IN_USE.search(self._tail):
            return PortTakenError(f"{words}: it found an address in use, though OVERLAY_PORT={program.port} is free")
        return FaultError(words, retryable=fault.retryable)

    async def _drain(self, program: _Program, drain_s: float) -> None:
        """Let the running calls end while they have time, and while its memory allows."""
        weighing = asyncio.ensure_future(self._weigh(program))
        ends: set[asyncio.Future[Any]] = {self._empty, program.process.ended, self._at_once, weighing}
        await asyncio.wait(ends, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        weighing.cancel()
        await asyncio.wait({weighing})
        if not weighing.cancelled() and isinstance(fault := weighing.exception(), FaultError):
            self._voice.note(str(fault))
            self._ending = cut_off(fault, self._last_words())

    async def _stop(self, program: _Program) -> None:
        """TERM to its group, KILL after the grace. Then nothing of it is left."""
        process = program.process
        by_itself = process.ended.done()
        self._signalled = not by_itself
        if not self._at_once.done():
            process.signal(signal.SIGTERM)
            ends: set[asyncio.Future[Any]] = {process.ended, self._at_once}
            await asyncio.wait(ends, timeout=self._house.kill_grace_s, return_when=asyncio.FIRST_COMPLETED)
        process.signal(signal.SIGKILL)
        await asyncio.wait({process.ended})
        program.output.drain()
        self._voice.end()
        if not by_itself:
            self._voice.note(str(death(process.ended.result())))
        self._leave_port(program.home, program.port)


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
