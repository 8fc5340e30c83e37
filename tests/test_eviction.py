"""Calls that are ended to free memory, in a whole bus with real programs: who goes, what is told, what runs again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from bus import admission, needs
from bus.dispatch import Bus
from tests.support import FixedStress, a_call, add_native, calls, misfits, settings_in, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from bus.course import Answer
    from bus.settings import Settings

HOLD = "echo began >> $OVERLAY_STATE/log; exec sleep 600"
HOLD_ONCE = f'test -e $OVERLAY_STATE/log && exec echo \'{{"ok": true, "result": 2}}\'; {HOLD}'
LOW, HIGH = "MEM[SOFT=8,HARD=64,VOL=LOW];PRIORITY=2", "MEM[SOFT=8,HARD=64,VOL=LOW];PRIORITY=9"


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path, stress_period_s=0.01)


@pytest.fixture
def stress(monkeypatch: pytest.MonkeyPatch) -> FixedStress:
    """As long as it is critical calls go, without the wait of seconds that tells whether it lasts."""
    monkeypatch.setattr(admission, "EVICTING_AFTER_S", 0.0)
    return FixedStress()


@pytest.fixture
async def bus(settings: Settings, stress: FixedStress) -> AsyncIterator[Bus]:
    async with Bus(settings, plugins=[stress]) as made:
        yield made


def add(settings: Settings, name: str, script: str, **capability: Any) -> None:
    folder = add_native(settings.overlays, name, {"run": {"runner": "proc", "timeout_s": 600} | capability})
    (folder / "run.sh").write_text(script)


async def begun(bus: Bus, settings: Settings, name: str, profile: str, **request: Any) -> asyncio.Task[Answer]:
    """A call that is made, once its program runs."""
    log = settings.state_of(name) / "log"
    task = asyncio.create_task(bus.invoke(a_call(name, profile=profile, **request)))
    await until(log.exists)
    return task


async def test_the_lowest_priority_is_ended_and_told_when_to_come_again_and_a_higher_one_runs_on(
    bus: Bus, settings: Settings, stress: FixedStress
) -> None:
    for name in ("low", "high"):
        add(settings, name, HOLD)
    low = await begun(bus, settings, "low", LOW)
    high = await begun(bus, settings, "high", HIGH)
    stress.value = 1.0
    answer = await low
    stress.value = 0.0
    assert (answer.http_status, answer.body["code"], answer.body["retryable"]) == (503, "ERR_EVICTED", True)
    assert answer.retry_after_s
    assert answer.body["error"].startswith("the program was ended to free memory: the stress was 1.000 for ")
    assert answer.body["admission"]["evictions"] == 1
    assert misfits("outcome", answer.body) == []
    assert not high.done()
    high.cancel()
    with pytest.raises(asyncio.CancelledError):
        await high
    low_line, high_line = calls(settings)
    assert (low_line["code"], high_line["code"]) == ("ERR_EVICTED", "ERR_CANCELLED")
    assert low_line["memory"]["peak_mb"] > 0
    assert misfits("record", low_line) == []


@pytest.mark.parametrize(
    ("capability", "request_"),
    [({"idempotent": True}, {"phase": "OPEN"}), ({}, {"phase": "CLEAR"})],
    ids=["idempotent", "CLEAR"],
)
async def test_what_does_no_harm_twice_is_run_again_and_its_evictions_are_counted(
    bus: Bus, settings: Settings, stress: FixedStress, capability: dict[str, Any], request_: dict[str, Any]
) -> None:
    add(settings, "twice", HOLD_ONCE, **capability)
    call = await begun(bus, settings, "twice", HIGH, **request_)
    stress.value = 1.0
    await until(lambda: bus.scheduler.report()["evictions"] == 1)
    stress.value = 0.0
    answer = await call
    assert (answer.ok, answer.body["result"]) == (True, 2)
    assert answer.body["admission"]["evictions"] == 1
    (line,) = calls(settings)
    assert line["admission"]["evictions"] == 1


async def test_it_is_not_run_again_for_ever(bus: Bus, settings: Settings, stress: FixedStress) -> None:
    add(settings, "held", HOLD, idempotent=True)
    call = await begun(bus, settings, "held", HIGH)
    for number in range(1, settings.eviction_retries + 2):
        await until(lambda number=number: starts(settings, "held") == number)  # type: ignore[misc]
        stress.value = 1.0
        await until(lambda number=number: bus.scheduler.report()["evictions"] == number)  # type: ignore[misc]
        stress.value = 0.0
    answer = await call
    assert answer.body["code"] == "ERR_EVICTED"
    assert answer.body["admission"]["evictions"] == settings.eviction_retries + 1


def starts(settings: Settings, name: str) -> int:
    return (settings.state_of(name) / "log").read_text().count("began")


async def test_a_call_that_waits_says_what_it_waited_for_and_what_it_reserved(
    bus: Bus, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of which nothing is known fill the room, until one of them ends."""
    monkeypatch.setattr(needs, "UNLEARNED_SETTLED_S", 3600.0)  # else it is seen how little they have
    all_mb = bus.stress.total_mb
    add(settings, "held", HOLD)
    add(settings, "quick", "echo 1")
    all_of_it = f"MEM[SOFT={all_mb},HARD={all_mb},VOL=LOW]"
    held = [await begun(bus, settings, "held", all_of_it) for _ in range(4)]
    await until(lambda: starts(settings, "held") == len(held))
    waits = asyncio.create_task(bus.invoke(a_call("quick")))
    await until(lambda: bus.scheduler.waiting == 1)
    held[0].cancel()
    answer = await waits
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    assert answer.ok
    assert answer.body["queue_ms"] > 0
    assert answer.body["admission"] == {
        "reserved_mb": 512,
        "basis": "declared",
        "waited_for": ["memory"],
        "ahead": 0,
        "evictions": 0,
    }
