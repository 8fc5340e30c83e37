"""Services that the bus starts: they come up, are watched, replaced and stopped, and nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import os
import re
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from runners import ports, service
from runners.base import Code, HttpTarget, Job, ServiceTarget
from runners.faults import ServiceError
from runners.helpers import Helpers
from runners.logs import OverlayLogs
from runners.ports import free_port, holder_of
from runners.probe import Probe, ProbeClient
from runners.service import Pace
from runners.services import Services
from tests import programs
from tests.runner_fixtures import nothing_left
from tests.support import is_alive, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable
    from pathlib import Path

    from runners.base import Outcome

QUICK = Pace(
    check_s=0.01,
    memory_s=0.01,
    answer_s=5.0,
    misses=3,
    first_backoff_s=0.01,
    longest_backoff_s=1.0,
    steady_s=10.0,
    patience_s=10.0,
)
IMPATIENT = dataclasses.replace(QUICK, answer_s=0.02)
FAILS = ("sh", "-c", "echo no luck >&2; exit 3")


class Logs:
    """What was logged, in memory: everything, and what of it the bus noted."""

    def __init__(self) -> None:
        self.text = b""
        self.notes = b""

    def append(self, overlay: str, data: bytes, source: Hashable = None) -> None:
        self.text += data
        self.notes += data if source is None else b""

    def close(self) -> None:
        pass

    def end(self, overlay: str, source: Hashable = None) -> None:
        self.text += b"|"


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


class Bench:
    """Services with their helpers, and jobs for them."""

    def __init__(self, helpers: Helpers) -> None:
        self.helpers = helpers
        self.logs = Logs()
        self._made: list[Services] = []
        self.ended_by_bus = False
        self.services = self.new()

    def new(self, *, kill_grace_s: float = 5.0, drain_s: float = 5.0, pace: Pace = QUICK, **options: Any) -> Services:
        logs: Any = options.pop("logs", self.logs)
        self.services = Services(self.helpers, logs, kill_grace_s=kill_grace_s, drain_s=drain_s, pace=pace, **options)
        self._made.append(self.services)
        return self.services

    async def close(self) -> None:
        for services in self._made:
            await services.close()
        await self.helpers.close()

    @contextlib.asynccontextmanager
    async def use(self, target: ServiceTarget, **job: Any) -> AsyncIterator[str]:
        """The URL of the service."""
        async with self.services.use(a_job(target, **job), target) as used:
            yield used.url

    async def cut_off(self, target: ServiceTarget, path: str = "/wait", **job: Any) -> Outcome:
        """The outcome of a call that loses its service."""
        async with self.services.use(a_job(target, **job), target) as used:
            assert used.end() is None
            with pytest.raises(aiohttp.ClientError):
                await ask(used.url, path)
            await until(lambda: used.end() is not None)
            end = used.end()
        assert end is not None
        self.ended_by_bus = end.by_bus
        return end.outcome

    async def who(self, target: ServiceTarget, **job: Any) -> str:
        """What tells one service from the next."""
        async with self.use(target, **job) as url:
            return (await ask(url, "/who")).split()[0]

    async def refused(self, target: ServiceTarget, **job: Any) -> Any:
        """The outcome of a call that gets no service."""
        with pytest.raises(ServiceError) as error:
            await self.who(target, **job)
        return error.value.outcome

    @property
    def state(self) -> dict[str, Any]:
        state = self.services.state("test")["service"]
        assert isinstance(state, dict)
        return state

    def is_(self, state: str) -> Callable[[], bool]:
        return lambda: bool(self.state["state"] == state)


def a_service(*words: str, argv: tuple[str, ...] = (), env: str = "", **changes: Any) -> ServiceTarget:
    argv = argv or (sys.executable, "-I", "-S", str(programs.FOLDER / "service.py"), *words)
    return ServiceTarget(argv, programs.ENV | {"SERVICE": env}, **{"ready_path": "/health"} | changes)


def a_job(target: ServiceTarget, *, timeout_s: float = 60.0, **changes: Any) -> Job:
    job = programs.make_job(HttpTarget("/", service=target), timeout_s=timeout_s)
    return job._replace(**changes)


async def ask(url: str, path: str) -> str:
    async with aiohttp.request("GET", url + path) as response:
        return await response.text()


def is_listened_on(url: str) -> bool:
    return holder_of(int(url.rpartition(":")[2]), os.getpid()) != "nobody"


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    """The loop that the bus runs in."""
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
async def bench(nothing_left: None) -> AsyncIterator[Bench]:
    bench = Bench(Helpers())
    yield bench
    await bench.close()


@pytest.fixture
def gate(tmp_path: Path) -> str:
    """The path of a FIFO at which a service waits before it listens."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return str(path)


async def open_gate(path: str) -> None:
    """Let the service go on that waits there, or will."""
    fds: list[int] = []

    def opened() -> bool:
        try:
            fds.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads yet
            return False
        return True

    await until(opened)
    os.close(fds[0])


# Start


async def test_the_first_call_starts_the_service_and_the_next_finds_it(bench: Bench) -> None:
    target = a_service()
    assert await bench.who(target) == await bench.who(target)
    assert (bench.state["state"], bench.state["starts"], bench.state["failures"]) == ("ready", 1, 0)
    assert (bench.state["calls"], is_alive(bench.state["pid"]), bench.state["uptime_s"] >= 0) == (0, True, True)


async def test_the_port_stands_in_the_environment_by_two_names(bench: Bench) -> None:
    async with bench.use(a_service()) as url:
        port = (await ask(url, "/who")).split()[2]
    assert url == f"http://127.0.0.1:{port}"
    assert bench.state["port"] == int(port)


async def test_its_token_stands_in_the_environment_and_each_start_has_its_own(bench: Bench) -> None:
    seen = set()
    for edition in (1, 2):
        target = a_service()
        async with bench.services.use(a_job(target, edition=edition), target) as used:
            assert await ask(used.url, "/token") == used.token
            seen.add(used.token)
    assert len(seen) == 2
    assert all(len(token) >= 43 for token in seen)  # 32 bytes, 6 bits a character


async def test_calls_that_come_together_share_one_start(bench: Bench) -> None:
    target = a_service()
    assert len(set(await asyncio.gather(*(bench.who(target) for _ in range(5))))) == 1
    assert bench.state["starts"] == 1


async def test_a_service_is_ready_when_its_path_answers_2xx(bench: Bench) -> None:
    async with bench.use(a_service("be=-3")) as url:
        assert int((await ask(url, "/who")).split()[1]) >= 4


async def test_a_redirect_is_not_ready(bench: Bench) -> None:
    outcome = await bench.refused(a_service("be=302", start_timeout_s=0.3))
    assert "answered HTTP 302" in outcome.error


async def test_without_a_path_it_is_ready_when_it_listens(bench: Bench, gate: str) -> None:
    call = asyncio.create_task(bench.who(a_service(f"gate={gate}", ready_path=None)))
    await open_gate(gate)
    assert len(await call) == 16


async def test_a_start_goes_on_when_the_deadline_of_its_call_passes(bench: Bench, gate: str) -> None:
    target = a_service(f"gate={gate}")
    outcome = await bench.refused(target, timeout_s=0.05)
    assert (outcome.code, outcome.retryable) == (Code.TIMEOUT, True)
    assert "the service was still starting after" in outcome.error
    await open_gate(gate)
    await bench.who(target)
    assert bench.state["starts"] == 1


async def test_a_start_goes_on_when_its_call_is_cancelled(bench: Bench, gate: str) -> None:
    target = a_service(f"gate={gate}")
    call = asyncio.create_task(bench.who(target))
    await until(lambda: "port" in bench.services.state("test").get("service", {}))
    call.cancel()
    await asyncio.wait([call])
    await open_gate(gate)
    await bench.who(target)
    assert bench.state["starts"] == 1


async def test_a_program_that_is_not_there_is_named(bench: Bench) -> None:
    outcome = await bench.refused(a_service(argv=("./no-such-service",)))
    assert (outcome.code, outcome.retryable) == (Code.START, False)
    assert "no-such-service" in outcome.error
    assert "No such file" in outcome.error


async def test_a_service_that_ends_at_its_start_is_told_with_its_last_words(bench: Bench) -> None:
    outcome = await bench.refused(a_service(argv=FAILS))
    assert (outcome.code, outcome.retryable, outcome.log) == (Code.START, True, "no luck")
    assert "the service ended with exit status 3 before it was ready" in outcome.error


async def test_of_a_long_log_the_last_words_are_whole_lines(bench: Bench) -> None:
    outcome = await bench.refused(a_service(argv=("sh", "-c", "seq 10000 20000; exit 3")))
    lines = outcome.log.splitlines()
    assert (lines[0], lines[-1]) == (str(20000 - len(lines) + 1), "20000")


@pytest.mark.parametrize("what", ["free_port", "holder_of"])
async def test_a_bus_that_is_short_of_descriptors_fails_the_start_and_tries_again_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(service, what, fail)
        outcome = await bench.refused(a_service())
    assert (outcome.code, outcome.retryable) == (Code.START, True)
    assert "Too many open files" in outcome.error
    assert bench.state["failures"] == 1
    await bench.who(a_service())


async def test_a_service_that_never_listens_is_told_where_it_should(bench: Bench) -> None:
    outcome = await bench.refused(a_service("never", start_timeout_s=0.05, ready_path=None))
    assert "was not ready within 0.05 s: 127.0.0.1:" in outcome.error
    assert "(OVERLAY_PORT) refused the connection" in outcome.error


async def test_a_service_that_cannot_bind_gets_another_port(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        offer_first(occupant.getsockname()[1], monkeypatch)
        async with bench.use(a_service()) as url:
            assert url != f"http://127.0.0.1:{occupant.getsockname()[1]}"
        assert (bench.state["starts"], bench.state["failures"]) == (1, 0)
    assert b"was taken; it gets another one" in bench.logs.text


async def test_who_else_answers_on_the_port_is_not_taken_for_the_service(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupant:
        offer_first(occupant.getsockname()[1], monkeypatch)
        target = a_service(ready_path=None, env="stays")
        async with bench.use(target) as url:
            assert url != f"http://127.0.0.1:{occupant.getsockname()[1]}"
    assert b"belongs to another program; it gets another one" in bench.logs.text


def offer_first(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first port that a service gets be this one, as if somebody had been quicker."""
    ports = iter([port])
    monkeypatch.setattr(service, "free_port", lambda: next(ports, None) or free_port())


async def test_two_overlays_that_want_one_port_get_one_each(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    offers = iter([port, port])
    monkeypatch.setattr(service, "free_port", lambda: next(offers, None) or free_port())
    target = a_service()
    async with bench.use(target) as first, bench.use(target, overlay="other") as second:
        assert first == f"http://127.0.0.1:{port}"
        assert await ask(first, "/who") != await ask(second, "/who")


async def test_a_service_that_takes_another_overlays_port_for_its_own_is_told_so_and_harms_nobody(
    bench: Bench,
) -> None:
    async with bench.use(a_service()) as first:
        port = first.rpartition(":")[2]
        stubborn = ("sh", "-c", f"OVERLAY_PORT={port} exec '{sys.executable}' '{programs.FOLDER / 'service.py'}'")
        outcome = await bench.refused(a_service(argv=stubborn), overlay="other")
        assert "it found an address in use, though OVERLAY_PORT=" in outcome.error
        assert await ask(first, "/who")


# Failures


async def test_a_service_that_dies_is_started_again_by_the_next_call(bench: Bench) -> None:
    target = a_service()
    before = await bench.who(target)
    async with bench.use(target) as url:
        with pytest.raises(aiohttp.ClientError):
            await ask(url, "/die")
        await until(lambda: bench.state["failures"] == 1)
    assert await bench.who(target) != before
    assert bench.state["last_error"] == "ended with exit status 3"


async def test_a_call_waits_for_a_start_that_backs_off_for_a_moment(bench: Bench, tmp_path: Path) -> None:
    target = a_service(f"once={tmp_path / 'was'}")
    assert (await bench.refused(target)).log == "it went wrong the first time"
    assert await bench.who(target)
    assert (bench.state["starts"], bench.state["failures"]) == (2, 1)


async def test_a_call_does_not_wait_beyond_its_deadline_nor_for_long(bench: Bench) -> None:
    target = a_service(argv=FAILS)
    bench.new(pace=Pace(first_backoff_s=60.0, longest_backoff_s=60.0, patience_s=120.0))
    await bench.refused(target)
    assert (await bench.refused(target, timeout_s=30.0)).code is Code.START
    bench.new(pace=Pace(first_backoff_s=60.0, longest_backoff_s=60.0, patience_s=30.0))
    await bench.refused(target)
    outcome = await bench.refused(target, timeout_s=120.0)
    assert "it may start again in" in outcome.error
    assert (outcome.retryable, outcome.log, bench.state["starts"]) == (True, "no luck", 1)


async def test_each_failure_doubles_the_wait_up_to_a_limit(bench: Bench) -> None:
    clock = Clock()
    bench.new(pace=Pace(first_backoff_s=0.5, longest_backoff_s=3.0, patience_s=0.0), clock=clock)
    waits = []
    for _ in range(5):
        await bench.refused(a_service(argv=FAILS))
        await until(bench.is_("backing off"))
        waits.append(round(bench.state["retry_in_s"], 3))
        clock.now += bench.state["retry_in_s"]
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert bench.state == {"state": "stopped", "starts": 5, "failures": 5, "last_error": bench.state["last_error"]}


@pytest.mark.parametrize(("ready_s", "failures"), [(9.0, 2), (10.0, 1)])
async def test_a_steady_time_makes_the_failures_before_it_forgotten(
    bench: Bench, tmp_path: Path, ready_s: float, failures: int
) -> None:
    clock = Clock()
    bench.new(pace=dataclasses.replace(QUICK, patience_s=0.0, steady_s=10.0), clock=clock)
    target = a_service(f"once={tmp_path / 'was'}")
    await bench.refused(target)
    clock.now += 1
    async with bench.use(target) as url:
        clock.now += ready_s
        with pytest.raises(aiohttp.ClientError):
            await ask(url, "/die")
    await until(bench.is_("backing off"))
    assert bench.state["failures"] == failures


# Health and memory


@pytest.mark.parametrize(("health", "lack"), [("500", "answered HTTP 500"), ("mute", "did not answer in time")])
async def test_a_service_that_is_not_healthy_is_replaced(bench: Bench, health: str, lack: str) -> None:
    bench.new(pace=IMPATIENT)
    target = a_service()
    before = await bench.who(target)
    async with bench.use(target) as url:
        await ask(url, f"/be/{health}")
    await until(lambda: bench.state["failures"] == 1)
    assert bench.state["last_error"].startswith("was unhealthy 3 times in a row: GET /health on 127.0.0.1:")
    assert bench.state["last_error"].endswith(lack)
    assert await bench.who(target) != before


async def test_a_busy_service_that_does_not_answer_is_left_alone(bench: Bench) -> None:
    bench.new(pace=IMPATIENT)
    async with bench.use(a_service()) as url:
        await ask(url, "/be/mute")
        await until(lambda: bench.logs.text.count(b"asked in vain") > 2 * QUICK.misses)
        assert (bench.state["state"], bench.state["calls"]) == ("ready", 1)
    await until(lambda: bench.state["failures"] == 1)


async def test_a_lapse_is_no_sickness(bench: Bench) -> None:
    async with bench.use(a_service()) as url:
        for _ in range(4):
            await ask(url, "/be/-1")  # one 503
            asked = int((await ask(url, "/who")).split()[1])
            while int((await ask(url, "/who")).split()[1]) < asked + 2:
                pass
        assert bench.state["failures"] == 0


LIMITS = pytest.mark.parametrize(("max_mb", "hard_mb"), [(60, 256), (None, 60)])
TOO_MUCH = re.compile(r"the service used (\d+\.\d) MiB of memory, more than the 60 that it may")


@LIMITS
async def test_a_service_that_is_too_big_without_a_call_is_replaced(
    bench: Bench, max_mb: int | None, hard_mb: int
) -> None:
    target = a_service(max_mb=max_mb)
    before = await bench.who(target, hard_mb=hard_mb)
    async with bench.use(target, hard_mb=hard_mb) as url:
        await ask(url, "/grow_soon")
    await until(lambda: bench.state["failures"] == 1)
    assert TOO_MUCH.fullmatch(f"the service {bench.state['last_error']}")
    await until(lambda: "memory_mb" not in bench.state)
    assert await bench.who(target) != before


@LIMITS
@pytest.mark.parametrize("path", ["/grow", "/breed"])
async def test_a_service_that_gets_too_big_during_a_call_is_ended_at_once_and_the_call_told_the_figure(
    bench: Bench, max_mb: int | None, hard_mb: int, path: str
) -> None:
    """Whether it is the service itself that takes the memory, or a child of it. Its calls have no time to drain."""
    bench.new(drain_s=3600.0)
    target = a_service(max_mb=max_mb)
    outcome = await bench.cut_off(target, path, hard_mb=hard_mb)
    assert (outcome.code, outcome.retryable) == (Code.MEMORY_LIMIT, None)
    figure = TOO_MUCH.fullmatch(outcome.error or "")
    assert figure
    assert float(figure[1]) > 60
    assert await bench.who(target)


async def test_a_service_that_takes_too_much_memory_while_it_starts_does_not_come_up(bench: Bench, gate: str) -> None:
    outcome = await bench.refused(a_service("grow", f"gate={gate}", max_mb=60))
    assert outcome.code is Code.START
    assert TOO_MUCH.match(outcome.error)


async def test_a_service_that_drains_may_not_have_too_much_memory_either(bench: Bench) -> None:
    bench.new(drain_s=3600.0)
    target = a_service(max_mb=60)
    async with bench.services.use(a_job(target), target) as used:
        bench.services.forget("test")
        with pytest.raises(aiohttp.ClientError):
            await ask(used.url, "/grow")
        end = used.end()
    assert end is not None
    assert (end.by_bus, end.outcome.code) == (True, Code.MEMORY_LIMIT)


async def test_a_call_that_loses_its_service_to_a_crash_is_told_how_it_ended(bench: Bench) -> None:
    outcome = await bench.cut_off(a_service(), "/die")
    assert (outcome.code, outcome.error) == (Code.CRASH, "the service ended with exit status 3")
    assert (outcome.retryable, outcome.log) == (None, "last words")
    assert not bench.ended_by_bus


async def test_a_service_that_crashes_while_it_drains_is_not_said_to_be_ended_by_the_bus(bench: Bench) -> None:
    target = a_service()
    async with bench.services.use(a_job(target), target) as used:
        bench.services.forget("test")
        with pytest.raises(aiohttp.ClientError):
            await ask(used.url, "/die")
        await until(used.gone.done)
        end = used.end()
    assert end is not None
    assert (end.by_bus, end.outcome.error) == (False, "the service ended with exit status 3")


async def test_a_call_whose_service_drained_for_too_long_is_told_why_it_was_ended(bench: Bench) -> None:
    bench.new(drain_s=0.05)
    target = a_service()
    cut_off = asyncio.create_task(bench.cut_off(target, edition=1))
    await until(lambda: bench.services.state("test").get("service", {}).get("calls") == 1)
    await bench.who(target, edition=2)
    outcome = await cut_off
    assert (outcome.code, outcome.retryable, bench.ended_by_bus) == (Code.CRASH, True, True)
    assert outcome.error == "the service is replaced: its overlay has changed, and was ended before it answered"


async def test_the_largest_call_says_how_big_it_may_be(bench: Bench) -> None:
    target = a_service()
    async with bench.use(target, hard_mb=60), bench.use(target, hard_mb=256) as url:
        await ask(url, "/grow_soon")
        await until(lambda: bench.state.get("memory_mb", 0) > 60)
        assert bench.state["state"] == "ready"


# Stop


async def test_an_idle_service_is_stopped_and_started_again_when_called(bench: Bench) -> None:
    target = a_service(idle_s=0.05)
    before = await bench.who(target)
    await until(bench.is_("stopped"))
    assert b"aal: the service is stopped: no call for 0.05 s" in bench.logs.text
    assert await bench.who(target) != before
    assert bench.state["failures"] == 0


async def test_a_service_with_a_call_is_not_idle(bench: Bench) -> None:
    async with bench.use(a_service(idle_s=0.02)) as url:
        while int((await ask(url, "/who")).split()[1]) < 10:
            assert bench.state["state"] == "ready"
    await until(bench.is_("stopped"))


async def test_new_code_gets_a_new_service_at_once_and_the_old_one_ends_after_its_calls(bench: Bench) -> None:
    target = a_service()
    async with bench.use(target, edition=1) as old:
        async with bench.use(target, edition=2) as new:
            assert new != old
        assert await ask(old, "/who")
    await until(lambda: not is_listened_on(old))
    assert is_listened_on(new)
    assert (bench.state["state"], bench.state["starts"]) == ("ready", 1)


async def test_old_code_is_ended_when_its_calls_take_too_long(bench: Bench) -> None:
    bench.new(drain_s=0.05)
    target = a_service()
    async with bench.use(target, edition=1) as old:
        await bench.who(target, edition=2)
        await until(lambda: not is_listened_on(old))


async def test_a_call_of_an_older_edition_does_not_wait_for_a_service_that_will_not_come(
    bench: Bench, gate: str
) -> None:
    waits = asyncio.create_task(bench.refused(a_service(f"gate={gate}"), edition=1))
    await until(lambda: "port" in bench.services.state("test").get("service", {}))
    await bench.who(a_service(), edition=2)
    outcome = await waits
    assert (outcome.code, outcome.retryable) == (Code.START, True)
    assert "the overlay was changed, disabled or removed while the call waited" in outcome.error


async def test_a_late_call_of_an_older_edition_is_refused_and_the_newer_goes_on(bench: Bench) -> None:
    target = a_service()
    newer = await bench.who(target, edition=2)
    outcome = await bench.refused(target, edition=1)
    assert (outcome.code, outcome.retryable) == (Code.START, True)
    assert "the overlay has changed since the call came in" in outcome.error
    assert await bench.who(target, edition=2) == newer


async def test_an_overlay_that_is_disabled_while_its_service_runs_loses_it_after_its_calls(bench: Bench) -> None:
    target = a_service()
    async with bench.use(target) as url:
        bench.services.forget("test")
        bench.services.forget("another")
        assert bench.services.state("test") == {}
        assert await ask(url, "/who")
        other = await bench.who(target)
    await until(lambda: not is_listened_on(url))
    assert b"aal: the service is stopped: its overlay was removed or disabled\n" in bench.logs.text
    assert await bench.who(target) == other
    assert bench.state["starts"] == 1


async def test_a_service_that_only_starts_ends_at_once_when_its_overlay_is_disabled(bench: Bench, gate: str) -> None:
    waits = asyncio.create_task(bench.refused(a_service(f"gate={gate}")))
    await until(lambda: "port" in bench.services.state("test").get("service", {}))
    bench.services.forget("test")
    assert (await waits).code is Code.START


class NoHelpers:
    """Helpers of which none is ever ready."""

    async def start(self, *_: object, held_mb: int) -> None:
        await asyncio.get_running_loop().create_future()

    def let_go(self, home: object) -> None:
        pass

    async def close(self, *, at_once: bool) -> None:
        pass


async def test_closing_does_not_wait_for_a_helper_that_is_not_ready() -> None:
    helpers: Any = NoHelpers()
    services = Services(helpers, None, kill_grace_s=60.0, drain_s=60.0)
    bench = Bench(helpers)
    bench.services = services
    waits = asyncio.create_task(bench.refused(a_service()))
    await until(lambda: bool(services.state("test")))
    await asyncio.sleep(0)
    await services.close()
    assert (await waits).code is Code.CANCELLED


@pytest.mark.parametrize("words", [(), ("deaf",)])
async def test_a_second_close_at_once_ends_the_drain_and_the_grace_of_the_first(
    bench: Bench, words: tuple[str, ...]
) -> None:
    bench.new(drain_s=3600.0 if not words else 0.0, kill_grace_s=3600.0)
    target = a_service(*words)
    cut_off = asyncio.create_task(bench.cut_off(target))
    await until(lambda: bench.services.state("test").get("service", {}).get("calls") == 1)
    closing = asyncio.create_task(bench.services.close())
    await until(bench.is_("draining"))
    await bench.services.close(at_once=True)
    await closing
    outcome = await cut_off
    assert outcome.code is Code.CANCELLED
    assert outcome.error == "the service is ended with the bus, and was ended before it answered"


async def test_closing_lets_running_calls_end_and_takes_no_more(bench: Bench) -> None:
    target = a_service()
    async with bench.use(target) as url:
        closing = asyncio.create_task(bench.services.close())
        await until(bench.is_("draining"))
        assert (await bench.refused(target)).code is Code.CANCELLED
        assert await ask(url, "/who")
    await closing
    assert bench.state["state"] == "stopped"
    assert not is_listened_on(url)


async def test_closing_while_it_starts_ends_the_calls_that_wait(bench: Bench, gate: str) -> None:
    waits = asyncio.create_task(bench.refused(a_service(f"gate={gate}")))
    await until(lambda: "port" in bench.services.state("test").get("service", {}))
    await bench.services.close()
    assert (await waits).code is Code.CANCELLED


async def test_closing_while_it_backs_off_ends_the_calls_that_wait(bench: Bench) -> None:
    bench.new(pace=Pace(first_backoff_s=50.0, longest_backoff_s=50.0, patience_s=50.0))
    target = a_service(argv=FAILS)
    await bench.refused(target)
    waits = asyncio.create_task(bench.refused(target, timeout_s=100.0))
    await until(bench.is_("backing off"))
    await bench.services.close()
    assert (await waits).code is Code.CANCELLED


async def test_a_service_that_does_not_heed_term_is_killed(bench: Bench) -> None:
    bench.new(kill_grace_s=0.05)
    async with bench.use(a_service("deaf")) as url:
        pass
    await bench.services.close()
    assert not is_listened_on(url)


async def test_a_call_during_the_end_of_the_old_one_waits_for_it(bench: Bench) -> None:
    """So that no two of the same code hold the same memory."""
    bench.new(drain_s=60.0)
    target = a_service()
    async with bench.use(target) as url:
        await ask(url, "/be/500")
        await until(bench.is_("draining"))
        outcome = await bench.refused(target, timeout_s=0.05)
        assert (outcome.code, outcome.retryable) == (Code.TIMEOUT, True)
        assert "still draining" in outcome.error
    assert await bench.who(target)


# Logs


async def test_what_it_says_goes_to_the_log_with_a_line_for_what_happens_to_it(bench: Bench) -> None:
    async with bench.use(a_service("say=half a line")):
        pass
    await bench.services.close()
    assert b"half a line" in bench.logs.text
    assert b"|aal: the service was ended" in bench.logs.text
    assert bench.logs.notes.decode().splitlines() == [
        f"aal: the service starts on port {bench_port(bench)} (edition 0)",
        "aal: the service is ended with the bus",
        "aal: the service was ended by SIGTERM",
    ]


def bench_port(bench: Bench) -> int:
    return int(bench.logs.text.partition(b"port ")[2].split()[0])


async def test_a_flood_is_kept_to_the_size_of_the_log(bench: Bench, tmp_path: Path) -> None:
    logs = OverlayLogs(tmp_path, max_bytes=100_000)
    bench.new(logs=logs)
    await bench.who(a_service("flood=2000000"))
    await bench.services.close()
    assert sum(file.stat().st_size for file in logged(tmp_path)) <= 200_000


def logged(folder: Path) -> list[Path]:
    return [*folder.iterdir()]


# Who listens


async def test_a_port_without_a_listener_is_nobodys() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert holder_of(bound.getsockname()[1], os.getpid()) == "nobody"


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_a_port_of_a_process_that_we_did_not_start_is_anothers(family: socket.AddressFamily, host: str) -> None:
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {family.name} here: {error}")
    with listener:
        assert holder_of(listener.getsockname()[1], os.getpid()) == "others"


async def test_a_port_is_ours_only_where_it_is_held_below_the_process_that_is_asked_about() -> None:
    code = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    )
    start = functools.partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with start([sys.executable, "-c", code]) as one, start([sys.executable, "-c", code]) as other:
        assert one.stdout
        assert other.stdout
        port = int(one.stdout.readline())
        other.stdout.readline()
        assert holder_of(port, os.getpid()) == "ours"
        assert holder_of(port, other.pid) == "others"
        for process in (one, other):
            process.communicate("\n")


async def test_a_process_that_is_not_for_us_to_see_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: str) -> Any:
        if path == "/proc/1/stat":
            raise PermissionError
        return open(path, mode)  # noqa: PTH123  # as the caller does

    monkeypatch.setattr(ports, "open", refuse, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert holder_of(server.getsockname()[1], os.getpid()) == "others"


@pytest.mark.parametrize(
    ("answer", "lack"),
    [
        (b"", "closed the connection before it answered"),
        (b"HTTP/1.1 200 OK\r\nX-Token: secret\r\nContent-Le", "closed the connection before it answered"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "closed the connection in the middle of its answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "answered what is not HTTP: "),
    ],
)
async def test_what_a_service_lacks_is_said_without_the_head_of_its_answer(answer: bytes, lack: str) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server, client = await asyncio.start_server(converse, "127.0.0.1", 0), ProbeClient()
    async with server:
        found = await Probe(client, server.sockets[0].getsockname()[1], "/health").lack(60.0)
    await client.close()
    assert found is not None
    assert found.startswith(lack)
    assert "secret" not in found


async def test_no_service_is_known_of_an_overlay_that_was_not_called() -> None:
    assert Services(Helpers(), None, kill_grace_s=0, drain_s=0).state("test") == {}


async def test_where_a_service_is_is_known_while_it_can_be_called(bench: Bench) -> None:
    assert bench.services.ready("test") is None
    async with bench.use(a_service()) as url:
        assert getattr(bench.services.ready("test"), "url", None) == url
        assert bench.services.ready("another") is None
        bench.services.forget("test")
        assert bench.services.ready("test") is None


async def test_a_service_that_ends_is_not_asked_for_anything_more(bench: Bench) -> None:
    async with bench.use(a_service()):
        assert bench.services.ready("test") is not None
    bench.services.relieve(0.0)
    assert bench.services.ready("test") is None
