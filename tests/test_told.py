"""What an overlay is told of the machine: that it may have a graphics processor, and how much its KV cache may hold."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bus import runes
from bus.degradation import memory_block
from bus.memory import MIB, Reading, Room
from bus.model import Degradation
from bus.replay import replay
from bus.stress import StressMonitor
from tests.cli_fixtures import aal, plain_environment
from tests.support import FixedStress, InProcessRunner, a_call, add_native, misfits, running_bus, write_overlay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus.dispatch import Bus
    from bus.settings import Settings
    from tests.cli_fixtures import Ran

MEM = "MEM[SOFT=10,HARD=20,VOL=LOW]"
SHRINKING = f"{MEM};KV[CAP=0.2,POLICY=LRU,PURGE=ON_STRESS];PRIORITY=0;DEGRADE{{STEP1:SHRINK_KV(0.5)}}"
RESOURCES = {"prefers_gpu": True, "notes": "a card of 8 GiB"}

WORKER = """
import json, sys
for line in sys.stdin:
    call = json.loads(line)
    print(json.dumps({"request_id": call["request_id"], "result": call["resources"]}), flush=True)
"""
SERVICE = """
import http.server, os

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

http.server.HTTPServer(("127.0.0.1", int(os.environ["OVERLAY_PORT"])), Handler).serve_forever()
"""


def add_wish(root: Path, name: str, entrypoints: dict[str, Any], files: dict[str, str]) -> None:
    """An overlay that prefers a graphics processor."""
    manifest = {
        "name": name,
        "version": "1",
        "entrypoints": entrypoints,
        "capabilities": {"run": {"runner": next(iter(entrypoints))}},
        "resources": RESOURCES,
    }
    write_overlay(root, name, manifest, files)


@pytest.fixture
def wishes(settings: Settings) -> Path:
    """One overlay for each way to run."""
    root = settings.overlays
    worker = {"command": [sys.executable, "worker.py"], "mode": "worker"}
    add_wish(root, "once", {"proc": {"command": ["sh", "run.sh"]}}, {"run.sh": "exec cat"})
    add_wish(root, "worker", {"proc": worker}, {"worker.py": WORKER})
    add_wish(root, "service", {"http": {"command": [sys.executable, "service.py"]}}, {"service.py": SERVICE})
    return root


@pytest.mark.usefixtures("wishes")
@pytest.mark.parametrize("name", ["once", "worker", "service"])
async def test_the_wish_for_a_graphics_processor_reaches_the_overlay(settings: Settings, name: str) -> None:
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call(name))
    result = answer.body["result"]
    assert result.get("resources", result) == RESOURCES


@pytest.mark.usefixtures("wishes")
def test_people_and_programs_are_shown_the_wish_for_a_graphics_processor(
    aal: Callable[..., Ran], settings: Settings
) -> None:
    add_native(settings.overlays, "plain", {"run": {"runner": "proc"}})
    assert re.search(
        "^resources +prefers_gpu yes, notes a card of 8 GiB$", aal("overlays", "show", "once").out, re.MULTILINE
    )
    listed = aal("overlays", "list", "--json").json["overlays"]
    assert {one["name"]: one["prefers_gpu"] for one in listed} == {
        "once": True,
        "worker": True,
        "service": True,
        "plain": False,
    }
    assert aal("overlays", "show", "once", "--json").json["resources"] == RESOURCES


# KV


@pytest.mark.parametrize(
    ("cap", "total_mb", "told_mb"),
    [("0", 8192, 0), ("1", 8192, 8192), ("0.2", 8192, 1638), ("0.2", 0, 0)],
)
def test_a_kv_cache_may_hold_its_share_of_all_memory(cap: str, total_mb: int, told_mb: int) -> None:
    profile = runes.parse(f"{MEM};KV[CAP={cap},POLICY=LRU,PURGE=ON_EVENT]")
    block = memory_block(profile, 0.9, all_steps=False, degradation=Degradation(), total_mb=total_mb)
    assert block["kv"] == {"cap_mb": told_mb, "policy": "LRU", "purge": "ON_EVENT"}


@pytest.mark.parametrize(("machine_mb", "cgroup_mb"), [(8000, 2000), (2000, 8000)])
def test_all_memory_is_that_of_the_machine_or_the_cgroup_whichever_is_less(machine_mb: int, cgroup_mb: int) -> None:
    rooms = (Room(machine_mb * MIB, 0, "machine"), Room(cgroup_mb * MIB, 0, "cgroup"))
    monitor = StressMonitor({}, read=lambda: Reading(rooms))
    monitor.sample()
    assert monitor.total_mb == 2000


async def told_kv(bus: Bus) -> Any:
    answer = await bus.invoke(a_call("kv"))
    assert answer.body["ok"], answer.body
    assert misfits("overlay_request", answer.body["result"]) == []
    return answer.body["result"]["memory"]["kv"]["cap_mb"]


def become(bus: Bus, stress: FixedStress, value: float) -> None:
    stress.value = value
    for _ in range(5):
        bus.stress.sample()


async def test_a_budget_bounds_a_kv_cache_and_stress_shrinks_it(settings: Settings) -> None:
    stress = FixedStress()
    add_native(settings.overlays, "kv", {"run": {"runner": "proc", "memory": SHRINKING}})
    async with running_bus(dataclasses.replace(settings, memory_mb=1000), stress) as bus:
        assert await told_kv(bus) == 200
        become(bus, stress, 0.9)
        assert await told_kv(bus) == 100


async def test_without_a_budget_a_kv_cache_has_its_share_of_the_monitors_total(settings: Settings) -> None:
    add_native(settings.overlays, "kv", {"run": {"runner": "proc", "memory": SHRINKING}})
    async with running_bus(settings, FixedStress()) as bus:
        assert bus.stress.total_mb > 0
        assert await told_kv(bus) == round(0.2 * bus.stress.total_mb)


async def test_a_replay_gives_the_kv_block_that_was_recorded(settings: Settings) -> None:
    stress, runner = FixedStress(0.9), InProcessRunner()
    add_native(
        settings.overlays, "kv", {"run": {"runner": "proc", "memory": SHRINKING}}, policy={"deterministic": True}
    )
    async with running_bus(settings, stress, runner) as bus:
        await bus.invoke(a_call("kv"))
        become(bus, stress, 0.0)
        await replay(bus, 1)
        await bus.invoke(a_call("kv"))
    first, replayed, later = (orjson.loads(job.envelope)["memory"] for job in runner.jobs)
    assert replayed == first
    assert first["kv_shrink_factor"] == 0.5
    assert later["kv"]["cap_mb"] in range(2 * first["kv"]["cap_mb"] - 1, 2 * first["kv"]["cap_mb"] + 2)
