"""What keeps running from call to call, as the bus has it: it is of one edition, and it goes when its overlay goes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import venv
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus import overlays
from bus.dispatch import Bus
from bus.local import LocalBus
from bus.overlays import Registry
from runners.base import Outcome
from tests.programs import running
from tests.support import InProcessRunner, a_call, add_overlay, running_bus, until, write_overlay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from bus.settings import Settings
    from runners.base import Job

TOKEN = "TOKEN = os.urandom(8).hex()"
"""What tells one process from the next in what it answers."""

WORKER = f"""
import json, os, sys
{TOKEN}
for line in sys.stdin:
    print(json.dumps({{"request_id": json.loads(line)["request_id"], "ok": True, "result": TOKEN}}), flush=True)
"""

SERVICE = f"""
import os
from wsgiref.simple_server import make_server
{TOKEN}

def answer(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    return [f'"{{TOKEN}}"'.encode()]

make_server("127.0.0.1", int(os.environ["OVERLAY_PORT"]), answer).serve_forever()
"""


def add_worker(root: Path) -> Path:
    command = [sys.executable, "worker.py"]
    return write_overlay(
        root,
        "kept",
        {
            "name": "kept",
            "version": "1",
            "entrypoints": {"proc": {"command": command, "mode": "worker"}},
            "capabilities": {"run": {"runner": "proc"}},
        },
        {"worker.py": WORKER},
    )


def add_service(root: Path) -> Path:
    return write_overlay(
        root,
        "kept",
        {
            "name": "kept",
            "version": "1",
            "entrypoints": {"http": {"command": [sys.executable, "service.py"]}},
            "capabilities": {"run": {"runner": "http"}},
        },
        {"service.py": SERVICE},
    )


@pytest.fixture(autouse=True)
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of disabled overlays sends no events, so that it is found by looking."""
    monkeypatch.setattr(overlays, "POLL_S", 0.05)


RESIDENTS = pytest.mark.parametrize("add", [add_worker, add_service])


@contextlib.asynccontextmanager
async def watching_bus(settings: Settings, *plugins: object) -> AsyncIterator[Bus]:
    """A bus that watches its overlays, as a server's does."""
    async with Bus(settings, plugins=plugins) as bus:
        yield bus


async def result(bus: Bus, overlay: str = "kept", **request: Any) -> Any:
    answer = await bus.invoke(a_call(overlay, **request))
    assert answer.ok, answer.body
    return answer.body["result"]


class Gate:
    """A runner's answer that waits until it is let go."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, job: Job) -> Outcome:
        await self.open.wait()
        return Outcome(result=job.edition)


def disable(settings: Settings) -> None:
    """As `aal overlays disable` does, in another process."""
    Registry(settings.overlays, settings.state).disable("kept")


def remove(settings: Settings) -> None:
    shutil.rmtree(settings.overlays / "kept")


def rename(settings: Settings) -> None:
    (settings.overlays / "kept").rename(settings.overlays / "other")


# --- Editions ----------------------------------------------------------------------------------------------------


async def test_a_job_carries_the_edition_that_its_call_found(settings: Settings) -> None:
    folder = add_overlay(settings.overlays, "kept")
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        for _ in range(2):
            await result(bus)
        (folder / "more.txt").write_text("x")
        await result(bus)
    first, same, changed = (job.edition for job in runner.jobs)
    assert first == same < changed


async def test_a_call_that_waited_while_the_overlay_changed_keeps_its_edition(settings: Settings) -> None:
    folder = add_overlay(settings.overlays, "kept")
    runner = InProcessRunner(gate := Gate())
    async with running_bus(replace(settings, slots=1), runner) as bus:
        tasks = [asyncio.create_task(result(bus)) for _ in range(2)]
        await until(lambda: bus.scheduler.waiting == 1)
        (folder / "more.txt").write_text("x")
        tasks.append(asyncio.create_task(result(bus)))
        await until(lambda: bus.scheduler.waiting == 2)
        gate.open.set()
        running_then, waiting_then, later = await asyncio.gather(*tasks)
    assert running_then == waiting_then < later


async def test_the_environment_of_an_edition_is_made_once(settings: Settings) -> None:
    folder = add_overlay(settings.overlays, "kept")
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        for _ in range(2):
            await result(bus)
        (folder / "more.txt").write_text("x")
        await result(bus)
    first, same, changed = (job.target.env for job in runner.jobs)  # type: ignore[union-attr]  # all are of programs
    assert first is same
    assert first is not changed


async def test_a_state_folder_that_was_removed_makes_another_edition(settings: Settings) -> None:
    add_overlay(settings.overlays, "kept")
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        await result(bus)
        shutil.rmtree(settings.state)
        for _ in range(3):
            await result(bus)
    editions = [job.edition for job in runner.jobs]
    assert editions[0] < editions[1] == editions[2] == editions[3]
    assert (settings.state / "state" / "kept").is_dir()


@pytest.mark.parametrize("mode", ["fork", "worker"])
async def test_a_module_that_comes_into_site_packages_is_there_for_the_next_call(settings: Settings, mode: str) -> None:
    script = """
import json, sys
try:
    import addon
    said = addon.SAID
except ImportError:
    said = "nothing"
"""
    once = script + "print(json.dumps(said))"
    looped = script + 'for line in sys.stdin:\n    request_id = json.loads(line)["request_id"]\n'
    looped += '    print(json.dumps({"request_id": request_id, "ok": True, "result": said}), flush=True)\n'
    folder = write_overlay(
        settings.overlays,
        "kept",
        {
            "name": "kept",
            "version": "1",
            "entrypoints": {"proc": {"command": ["python3", "run.py"], "mode": mode}},
            "capabilities": {"run": {"runner": "proc"}},
        },
        {"run.py": looped if mode == "worker" else once},
    )
    venv.create(folder / ".venv", symlinks=True)
    (packages,) = (folder / ".venv" / "lib").glob("python3*/site-packages")
    async with running_bus(settings) as bus:
        said = [await result(bus)]
        for version in ("one", "another"):  # not of one length: Python tells a .pyc by the seconds and the size
            (packages / "addon.py").unlink(missing_ok=True)
            (packages / "addon.py").write_text(f"SAID = {version!r}")
            said.append(await result(bus))
    assert said == ["nothing", "one", "another"]


# --- Forgetting --------------------------------------------------------------------------------------------------


@RESIDENTS
@pytest.mark.parametrize("withdraw", [disable, remove, rename])
async def test_what_an_overlay_keeps_ends_without_a_further_call_once_it_is_withdrawn(
    settings: Settings, add: Callable[[Path], Path], withdraw: Callable[[Settings], None]
) -> None:
    add(settings.overlays)
    async with watching_bus(settings) as bus:
        first = await result(bus)
        assert await result(bus) == first
        assert running(str(settings.state))
        withdraw(settings)
        await until(lambda: not running(str(settings.state)))


@RESIDENTS
async def test_an_overlay_that_is_enabled_again_starts_anew(settings: Settings, add: Callable[[Path], Path]) -> None:
    add(settings.overlays)
    async with watching_bus(settings) as bus:
        first = await result(bus)
        disable(settings)
        await until(lambda: not running(str(settings.state)))
        Registry(settings.overlays, settings.state).enable("kept")
        assert await result(bus) != first


@pytest.mark.parametrize("withdraw", [disable, remove])
async def test_a_refused_call_has_what_was_kept_forgotten_where_nobody_watches(
    settings: Settings, withdraw: Callable[[Settings], None]
) -> None:
    add_overlay(settings.overlays, "kept")
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        await result(bus)
        await bus.invoke(a_call("never-called"))
        await bus.invoke(a_call("kept", "no-such-capability"))
        assert runner.forgotten == []
        withdraw(settings)
        for _ in range(2):
            await bus.invoke(a_call("kept.run"))
    assert runner.forgotten == ["kept"]


async def test_what_a_late_call_started_is_forgotten_too(settings: Settings) -> None:
    add_overlay(settings.overlays, "kept")
    runner = InProcessRunner(gate := Gate())
    async with watching_bus(replace(settings, slots=1), runner) as bus:
        tasks = [asyncio.create_task(result(bus)) for _ in range(2)]
        await until(lambda: bus.scheduler.waiting == 1)
        disable(settings)
        await until(lambda: runner.forgotten == ["kept"])
        gate.open.set()
        await asyncio.gather(*tasks)
        await until(lambda: runner.forgotten == ["kept", "kept"])


async def test_an_overlay_that_is_half_edited_keeps_what_it_has(settings: Settings) -> None:
    broken = add_overlay(settings.overlays, "broken") / "manifest.json"
    add_overlay(settings.overlays, "kept")
    runner = InProcessRunner()
    async with watching_bus(settings, runner) as bus:
        for name in ("broken", "kept"):
            await result(bus, name)
        broken.write_text("{")
        remove(settings)
        await until(lambda: runner.forgotten != [])
    assert runner.forgotten == ["kept"]


async def test_a_runner_that_fails_to_forget_keeps_no_other_from_it(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(InProcessRunner):
        def forget(self, overlay: str) -> None:
            raise ZeroDivisionError(overlay)

    add_overlay(settings.overlays, "kept")
    other = InProcessRunner(name="other")
    async with running_bus(settings, Stubborn(), other) as bus:
        await result(bus)
        remove(settings)
        assert (await bus.invoke(a_call("kept"))).http_status == 404
    assert other.forgotten == ["kept"]
    assert "ZeroDivisionError: kept" in caplog.text


# --- Beside a server ---------------------------------------------------------------------------------------------


@RESIDENTS
def test_a_bus_for_one_call_starts_its_own_and_leaves_nothing(settings: Settings, add: Callable[[Path], Path]) -> None:
    add(settings.overlays)
    with LocalBus(settings) as server:
        kept = server.call("kept", {})["result"]
        before = sorted(running(str(settings.state)))
        with LocalBus(settings) as once:
            assert once.call("kept", {})["result"] not in (None, kept)
        assert sorted(running(str(settings.state))) == before != []
        assert server.call("kept", {})["result"] == kept
    assert not running(str(settings.state))


async def test_the_start_of_a_bus_removes_what_one_that_was_killed_has_left(settings: Settings) -> None:
    left = settings.scratch / "aal-0123456789abcdef-1" / "7"
    left.mkdir(parents=True)
    (settings.scratch / "aal-0123456789abcdef.lock").touch()
    async with running_bus(settings):
        assert list(settings.scratch.iterdir()) == []


async def test_scratch_that_cannot_be_looked_at_keeps_no_bus_from_starting(settings: Settings) -> None:
    settings.state.mkdir(exist_ok=True)
    settings.scratch.touch()
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, InProcessRunner()) as bus:
        assert (await bus.invoke(a_call("echo"))).ok
