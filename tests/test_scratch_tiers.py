"""The tier of a call through the whole bus: where its scratch folder lies, what it may hold, and that it goes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus.dispatch import Bus
from bus.local import LocalBus
from bus.replay import replay
from tests.support import (
    FixedStress,
    InProcessRunner,
    Server,
    a_call,
    add_native,
    add_script,
    calls,
    eventually,
    misfits,
    running_bus,
    write_overlay,
)

if TYPE_CHECKING:
    from pathlib import Path

    from bus.settings import Settings

MEM = "MEM[SOFT=16,HARD=256,VOL=LOW]"
TELLS = 'printf \'{"place": "%s"}\' "$OVERLAY_SCRATCH"'
FILLS = """
import os
for number in range(24):
    open(os.environ["OVERLAY_SCRATCH"] + "/%d" % number, "wb").write(os.urandom(64 * 1024))
print("{}")
"""


@pytest.fixture
def tiered(settings: Settings) -> Settings:
    """With a folder set for the tiers on the disk, each of which may hold a MiB."""
    home = settings.overlays.parent
    return replace(
        settings,
        scratch_extended=str(home / "extended"),
        scratch_cold=str(home / "cold"),
        scratch_extended_mb=1,
        scratch_cold_mb=2,
    )


def add_teller(root: Path, memory: str = MEM) -> None:
    """It answers with where its scratch folder is."""
    capability = {"runner": "proc", "memory": memory}
    write_overlay(
        root,
        "tells",
        {
            "name": "tells",
            "version": "1",
            "entrypoints": {"proc": {"command": ["sh", "run.sh"]}},
            "capabilities": {"run": capability},
        },
        {"run.sh": TELLS},
    )


def place_of(answer: Any) -> str:
    assert answer.ok, answer.body
    return str(answer.body["result"]["place"])


async def test_a_call_has_its_scratch_where_its_capability_or_its_profile_says(tiered: Settings) -> None:
    add_teller(tiered.overlays, f"{MEM};TIER=EXTENDED")
    async with running_bus(tiered) as bus:
        for profile, start in (
            (None, tiered.scratch_extended),
            (f"{MEM};TIER=COLD", tiered.scratch_cold),
            ("MINIMAL", str(tiered.scratch)),
        ):
            answer = await bus.invoke(a_call("tells", profile=profile) if profile else a_call("tells"))
            assert place_of(answer).startswith(f"{start}/")
            assert misfits("outcome", answer.body) == []
    assert not list(tiered.overlays.parent.glob("extended/*"))
    assert not list(tiered.overlays.parent.glob("cold/*"))


async def test_offload_under_stress_moves_the_scratch_of_a_call(tiered: Settings) -> None:
    add_teller(tiered.overlays, f"{MEM};DEGRADE{{STEP1:OFFLOAD(COLD)}}")
    stress = FixedStress(0.0)
    places = []
    async with running_bus(tiered, stress) as bus:
        for value in (0.0, 0.9):
            stress.value = value
            while bus.stress.value != value:
                bus.stress.sample()
            places.append(place_of(await bus.invoke(a_call("tells"))))
        answer = await bus.invoke(a_call("tells"))
    assert places[0].startswith(f"{tiered.scratch}/")
    assert places[1].startswith(f"{tiered.scratch_cold}/")
    assert (answer.body["memory"]["tier"], answer.body["memory"]["offload_tier"]) == ("LOCAL", "COLD")
    assert [line["memory"].get("offload_tier") for line in calls(tiered)] == [None, "COLD", "COLD"]


async def test_a_replay_has_its_scratch_where_the_call_had_it(tiered: Settings) -> None:
    add_teller(tiered.overlays, f"{MEM};DEGRADE{{STEP1:OFFLOAD(COLD)}}")
    async with running_bus(tiered, FixedStress(0.9)) as bus:
        assert place_of(await bus.invoke(a_call("tells"))).startswith(f"{tiered.scratch_cold}/")
    async with running_bus(tiered, FixedStress(0.0)) as bus:
        again = await replay(bus, 1, live=True)
    assert again.answer.body["result"]["place"].startswith(f"{tiered.scratch_cold}/")


async def test_a_job_has_the_tier_of_its_memory_block(settings: Settings) -> None:
    runner = InProcessRunner()
    add_native(settings.overlays, "one", {"run": {"runner": "proc", "memory": "BALANCED"}})
    async with running_bus(settings, runner, FixedStress(0.0)) as bus:
        await bus.invoke(a_call("one"))
        await bus.invoke(a_call("one", profile="MINIMAL"))
    assert [job.tier for job in runner.jobs] == ["EXTENDED", "LOCAL"]


@pytest.mark.parametrize(
    ("tiers", "kept"), [(("COLD", "COLD"), "COLD"), (("COLD", "EXTENDED"), "LOCAL"), (("LOCAL",), "LOCAL")]
)
async def test_what_keeps_running_has_the_tier_of_all_capabilities_else_local(
    settings: Settings, tiers: tuple[str, ...], kept: str
) -> None:
    runner = InProcessRunner()
    capabilities = {
        f"c{number}": {"runner": "proc", "memory": f"{MEM};TIER={tier}"} for number, tier in enumerate(tiers)
    }
    command = {"command": ["sh", "run.sh"], "mode": "worker"}
    add_native(settings.overlays, "one", capabilities, entrypoints={"proc": command})
    async with running_bus(settings, runner) as bus:
        await bus.invoke(a_call("one", "c0"))
        assert bus.registry.entry("one").detail()["workers"]["tier"] == kept
    (job,) = runner.jobs
    assert job.target.workers.tier == kept  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["spawn", "fork"])
async def test_a_call_that_had_too_much_is_answered_and_recorded_with_its_own_code(tiered: Settings, mode: str) -> None:
    capability = {"runner": "proc", "memory": f"{MEM};TIER=EXTENDED"}
    program = {"command": ["python3", "run.py"], "mode": mode}
    manifest = {"name": "fills", "version": "1", "entrypoints": {"proc": program}, "capabilities": {"run": capability}}
    write_overlay(tiered.overlays, "fills", manifest, {"run.py": FILLS})
    async with running_bus(tiered) as bus:
        answer = await bus.invoke(a_call("fills"))
    assert (answer.http_status, answer.body["code"]) == (502, "ERR_SCRATCH_LIMIT")
    assert answer.body["error"].endswith("where 1024 are allowed (tier EXTENDED has 1 MiB a call)")
    assert misfits("outcome", answer.body) == []
    (line,) = calls(tiered)
    assert line["code"] == "ERR_SCRATCH_LIMIT"
    assert misfits("record", line) == []


async def test_calls_of_every_tier_of_one_overlay_run_at_once(tiered: Settings) -> None:
    add_teller(tiered.overlays)
    profiles = [f"{MEM};TIER={tier}" for tier in ("LOCAL", "EXTENDED", "COLD")] * 3
    async with running_bus(tiered) as bus:
        answers = await asyncio.gather(*(bus.invoke(a_call("tells", profile=profile)) for profile in profiles))
    starts = (str(tiered.scratch), tiered.scratch_extended, tiered.scratch_cold)
    assert [next(start for start in starts if place_of(one).startswith(start)) for one in answers] == [*starts * 3]


def test_nothing_is_left_on_any_disk_of_a_server_that_is_killed(tmp_path: Path) -> None:
    folders = {tier: tmp_path / tier.lower() for tier in ("EXTENDED", "COLD")}
    add_script(tmp_path / "overlays", "waits", 'echo x > "$OVERLAY_SCRATCH/file"\nexec sleep 600')
    given = {f"scratch_{tier.lower()}": folder for tier, folder in folders.items()}
    with Server(tmp_path, sandbox="off", **given) as server:
        callers = [threading.Thread(target=_call_in_vain, args=(server, f"{MEM};TIER={tier}")) for tier in folders]
        for caller in callers:
            caller.start()
        for folder in folders.values():
            eventually(lambda folder=folder: bool(list(folder.glob("*/*/file"))), "the call has written")  # type: ignore[misc]
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        for folder in folders.values():
            eventually(lambda folder=folder: not list(folder.glob("aal-*-*")), "its helper has removed it")  # type: ignore[misc]
        for caller in callers:
            caller.join()


def _call_in_vain(server: Server, profile: str) -> None:
    with contextlib.suppress(OSError):
        server.invoke("waits", profile=profile)


async def test_the_start_of_a_bus_removes_what_a_killed_one_has_left_in_each_place(tiered: Settings) -> None:
    left = [tiered.overlays.parent / name / "aal-0123456789abcdef-1" / "7" for name in ("extended", "cold")]
    for folder in left:
        folder.mkdir(parents=True)
    async with running_bus(tiered):
        assert [list(folder.parent.parent.iterdir()) for folder in left] == [[], []]


async def test_a_place_that_cannot_be_made_is_named_and_the_other_tiers_work(tiered: Settings) -> None:
    add_teller(tiered.overlays)
    (tiered.overlays.parent / "cold").write_text("no folder")
    async with running_bus(tiered) as bus:
        answer = await bus.invoke(a_call("tells", profile=f"{MEM};TIER=COLD"))
        assert (answer.body["code"], f"scratch root {tiered.scratch_cold}" in answer.body["error"]) == (
            "ERR_OVERLAY_START",
            True,
        )
        assert (await bus.invoke(a_call("tells"))).ok


def test_a_local_bus_removes_what_its_calls_had(tiered: Settings) -> None:
    add_teller(tiered.overlays, f"{MEM};TIER=COLD")
    with LocalBus(tiered) as bus:
        assert bus.call("tells", {})["ok"]
    assert list((tiered.overlays.parent / "cold").iterdir()) == []


def test_a_bus_knows_its_places(tiered: Settings) -> None:
    assert set(Bus(tiered).confinement.tiers.roots()) >= {tiered.scratch, tiered.overlays.parent / "cold"}
