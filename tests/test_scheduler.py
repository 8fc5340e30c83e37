from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import runes
from bus.admission import AGING_S
from bus.degradation import memory_block
from bus.errors import DeadlineError, OverloadError
from bus.model import Degradation
from bus.scheduler import Scheduler

NEVER = 1e9


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """A scheduler with its clock, its stress and the names of the calls it started, in order."""

    slots: int = 1
    queue_limit: int = 100
    stress: float = 0.0
    clock: Clock = field(default_factory=Clock)
    started: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            slots=self.slots, queue_limit=self.queue_limit, stress=lambda: self.stress, clock=self.clock
        )

    def call(
        self,
        name: str = "call",
        *,
        key: str = "k",
        priority: int = 5,
        deadline: float = NEVER,
        limit: int | None = None,
    ) -> Call:
        return Call(self, name, key, priority=priority, deadline=deadline, limit=limit)


class Call:
    """A call that runs until it is told to end."""

    def __init__(self, world: World, name: str, key: str, *, priority: int, deadline: float, limit: int | None) -> None:
        self.name, self.key = name, key
        self.running = False
        self.queued_s = -1.0
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._run(world, priority, deadline, limit))

    async def _run(self, world: World, priority: int, deadline: float, limit: int | None) -> None:
        async with world.scheduler.admit(self.key, priority, deadline, limit) as grant:
            self.running = True
            self.queued_s = grant.queued_s
            world.started.append(self.name)
            try:
                await self._end.wait()
            finally:
                self.running = False

    async def end(self) -> None:
        self._end.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def settle() -> None:
    """Let every task go on until it waits for something that only the test can give."""
    for _ in range(6):
        await asyncio.sleep(0)


async def running(world: World, **options: int) -> Call:
    call = world.call("first", **options)  # type: ignore[arg-type]
    await settle()
    assert call.running
    return call


async def test_a_call_starts_at_once_while_a_slot_is_free() -> None:
    world = World(slots=2)
    first, second = world.call("a"), world.call("b")
    await settle()
    assert world.started == ["a", "b"]
    assert (first.queued_s, world.scheduler.running, world.scheduler.waiting) == (0.0, 2, 0)
    await first.end()
    await second.end()
    assert world.scheduler.running == 0


async def test_a_call_waits_for_a_slot_and_is_told_how_long_it_did() -> None:
    world = World()
    first = await running(world)
    second = world.call("second")
    await settle()
    assert (second.running, world.scheduler.waiting) == (False, 1)
    world.clock.now += 1.5
    await first.end()
    await settle()
    assert (second.running, second.queued_s, world.scheduler.waiting) == (True, 1.5, 0)
    await second.end()


async def test_what_fails_inside_its_slot_gives_it_back() -> None:
    world = World()
    with pytest.raises(ZeroDivisionError):
        async with world.scheduler.admit("k", 5, NEVER):
            raise ZeroDivisionError
    assert world.scheduler.running == 0


async def order_of_starts(world: World, arrivals: list[tuple[int, float]]) -> list[str]:
    """Calls of these priorities arrive behind a running one, so many seconds apart; one slot lets them out in turn."""
    first = await running(world)
    calls = {}
    for number, (priority, gap_s) in enumerate(arrivals):
        world.clock.now += gap_s
        calls[str(number)] = world.call(str(number), priority=priority)
        await asyncio.sleep(0)
    await first.end()
    for _ in arrivals:
        await settle()
        await calls[world.started[-1]].end()
    return world.started[1:]


async def test_priority_goes_first_and_then_age() -> None:
    assert await order_of_starts(World(), [(2, 0), (9, 0), (5, 0), (9, 0)]) == ["1", "3", "2", "0"]


async def test_age_outweighs_priority_in_the_end() -> None:
    late_s = 9 * AGING_S
    assert await order_of_starts(World(), [(0, 0), (9, late_s - 0.1)]) == ["1", "0"]
    assert await order_of_starts(World(), [(0, 0), (9, late_s + 0.1)]) == ["0", "1"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.5, 3.0])), max_size=12))
def test_calls_start_in_the_order_of_arrival_less_priority(arrivals: list[tuple[int, float]]) -> None:
    world, now, places = World(), 0.0, []
    for number, (priority, gap_s) in enumerate(arrivals):
        now += gap_s
        places.append((now - priority * AGING_S, number))
    assert asyncio.run(order_of_starts(world, arrivals)) == [str(number) for _, number in sorted(places)]


async def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    world = World(queue_limit=2)
    first = await running(world)
    second, third = world.call("second"), world.call("third")
    await settle()
    world.clock.now += 3
    await first.end()
    fourth = world.call("fourth")
    await settle()
    with pytest.raises(OverloadError) as caught:
        await world.call().task
    assert caught.value.code == "ERR_BUSY"
    assert caught.value.retry_after_s == 9  # one call ended in 3 s; two wait, and this one
    assert world.scheduler.report()["refused"] == {"ERR_BUSY": 1}
    for call in (second, third, fourth):
        await settle()
        await call.end()


@pytest.mark.parametrize(("waited_s", "expected"), [(0.0, 1), (1000.0, 60)])
async def test_the_time_to_come_again_has_bounds(waited_s: float, expected: int) -> None:
    world = World(queue_limit=1)
    first = await running(world)
    second = world.call()
    await settle()
    world.clock.now += waited_s
    with pytest.raises(OverloadError) as caught:
        await world.call().task
    assert caught.value.retry_after_s == expected
    await second.cancel()
    await first.end()


async def test_a_queue_of_none_refuses_what_cannot_start() -> None:
    world = World(queue_limit=0)
    first = await running(world)
    with pytest.raises(OverloadError) as caught:
        await world.call(key="other").task
    assert caught.value.code == "ERR_BUSY"
    assert list(world.scheduler.report()["keys"]) == ["k"]
    await first.end()


@pytest.mark.parametrize(("stress", "priority", "admitted"), [(0.98, 3, False), (0.98, 4, True), (0.979, 0, True)])
async def test_high_stress_refuses_low_priority(stress: float, priority: int, admitted: bool) -> None:
    world = World(stress=stress)
    call = world.call(priority=priority)
    await settle()
    assert call.running is admitted
    if admitted:
        await call.end()
    else:
        with pytest.raises(OverloadError, match=rf"stress is 0.980.*not {priority}") as caught:
            await call.task
        assert caught.value.code == "ERR_STRESS"
        assert caught.value.retry_after_s


async def test_a_waiting_call_of_low_priority_is_refused_when_its_turn_comes_under_high_stress() -> None:
    world = World()
    first = await running(world)
    low, high = world.call(priority=3), world.call(priority=4, deadline=NEVER)
    await settle()
    world.stress = 1.0
    await first.end()
    await settle()
    await high.end()
    with pytest.raises(OverloadError) as caught:
        await low.task
    assert caught.value.code == "ERR_STRESS"
    assert world.scheduler.running == 0


async def test_a_deadline_that_has_passed_is_refused_at_the_door() -> None:
    world = World()
    with pytest.raises(DeadlineError) as caught:
        await world.call(deadline=world.clock.now).task
    assert caught.value.code == "ERR_DEADLINE"


async def test_a_deadline_that_passes_in_the_queue_ends_the_wait() -> None:
    scheduler = Scheduler(slots=1, queue_limit=1, stress=lambda: 0.0)
    async with scheduler.admit("k", 5, NEVER):
        with pytest.raises(DeadlineError):
            async with scheduler.admit("k", 5, time.monotonic() + 0.01):
                pass
        assert (scheduler.running, scheduler.waiting) == (1, 0)


async def test_a_call_whose_deadline_has_passed_is_not_started_and_the_next_one_is() -> None:
    world = World()
    first = await running(world)
    late, good = world.call(priority=9, deadline=world.clock.now + 500), world.call("good")
    await settle()
    world.clock.now += 501
    await first.end()
    await settle()
    with pytest.raises(DeadlineError):
        await late.task
    assert good.running
    await good.end()


async def test_a_cancelled_wait_leaves_no_trace() -> None:
    world = World()
    first = await running(world)
    waiting = world.call(key="other")
    await settle()
    await waiting.cancel()
    assert world.scheduler.waiting == 0
    assert list(world.scheduler.report()["keys"]) == ["k"]
    await first.end()
    assert world.scheduler.report()["keys"] == {}


async def test_a_cancellation_after_the_grant_gives_the_slot_to_the_next() -> None:
    world = World()
    async with world.scheduler.admit("k", 5, NEVER):
        granted, following = world.call("granted"), world.call("following")
        await settle()
    assert world.scheduler.running == 1, "the slot has gone to a call that has not gone on yet"
    await granted.cancel()
    await settle()
    assert world.started == ["following"]
    await following.end()
    assert world.scheduler.running == 0


async def test_a_cancellation_just_before_the_grant_passes_the_call_over() -> None:
    world = World()
    async with world.scheduler.admit("k", 5, NEVER):
        cancelled, following = world.call("cancelled"), world.call("following")
        await settle()
        cancelled.task.cancel()
    await settle()
    assert world.started == ["following"]
    assert cancelled.task.cancelled()
    await following.end()
    assert (world.scheduler.running, world.scheduler.waiting) == (0, 0)


async def test_a_key_at_its_limit_does_not_hold_up_others() -> None:
    world = World(slots=2)
    first = await running(world, limit=1)
    second = world.call("second", priority=9, limit=1)
    other = world.call("other", key="other", priority=0)
    await settle()
    assert world.started == ["first", "other"]
    await other.end()
    await settle()
    assert not second.running, "a free slot does not lift the limit of the key"
    await first.end()
    await settle()
    assert second.running
    await second.end()


async def test_a_limit_that_is_raised_lets_waiting_calls_start() -> None:
    world = World(slots=3)
    calls = [world.call(limit=1), world.call(limit=1)]
    await settle()
    assert [call.running for call in calls] == [True, False]
    calls.append(world.call(limit=3))
    await settle()
    assert [call.running for call in calls] == [True, True, True]
    for call in calls:
        await call.end()


async def test_a_lane_begun_anew_survives_the_end_of_the_old_one() -> None:
    world = World()
    first = await running(world)
    refused = [world.call(key="x", deadline=world.clock.now + 10, priority=9) for _ in range(2)]
    await settle()
    world.clock.now += 20
    await first.end()
    fresh = world.call("fresh", key="x")
    await settle()
    assert world.scheduler.report()["keys"] == {"x": {"running": 1, "waiting": 0, "limit": None}}
    for call in refused:
        with pytest.raises(DeadlineError):
            await call.task
    await fresh.end()


async def test_closing_refuses_what_waits_and_what_comes_but_not_what_runs() -> None:
    world = World()
    first = await running(world)
    waiting = world.call()
    await settle()
    world.scheduler.close()
    for call in (waiting, world.call()):
        with pytest.raises(OverloadError) as caught:
            await call.task
        assert caught.value.code == "ERR_SHUTTING_DOWN"
        assert caught.value.retry_after_s
    assert first.running
    await first.end()


async def test_draining_waits_for_what_runs() -> None:
    world = World()
    assert await world.scheduler.drain(0)
    first = await running(world)
    world.scheduler.close()
    assert not await world.scheduler.drain(0)
    draining = asyncio.create_task(world.scheduler.drain(60))
    await settle()
    assert not draining.done()
    await first.end()
    assert await draining


async def test_the_report_shows_what_runs_waits_and_was_refused() -> None:
    world = World(queue_limit=1)
    first = await running(world, limit=1)
    second = world.call(limit=1)
    await settle()
    assert orjson.loads(orjson.dumps(world.scheduler.report())) == {
        "slots": 1,
        "queue_limit": 1,
        "running": 1,
        "waiting": 1,
        "started": 1,
        "evictions": 0,
        "refused": {},
        "memory": {"room_mb": None, "claimed_mb": 0},
        "keys": {"k": {"running": 1, "waiting": 1, "limit": 1}},
    }
    await second.cancel()
    await first.end()


LIMITS = {"free": None, "two": 2, "one": 1}
MOVES = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from(sorted(LIMITS)), st.integers(0, 9)),
    st.tuples(st.sampled_from(["end", "cancel"]), st.integers(0, 30), st.booleans()),
)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 4), st.lists(MOVES, max_size=40))
def test_no_slot_is_lost_or_given_twice_whatever_happens(slots: int, moves: list[tuple[str, str | int, int]]) -> None:
    asyncio.run(play(World(slots=slots, queue_limit=8), moves))


async def play(world: World, moves: list[tuple[str, str | int, int]]) -> None:
    calls: list[Call] = []
    for move, which, detail in moves:
        if move == "arrive":
            calls.append(world.call(key=str(which), priority=detail, limit=LIMITS[str(which)]))
        elif calls and move == "end":
            calls[int(which) % len(calls)]._end.set()
        elif calls:
            calls[int(which) % len(calls)].task.cancel()
        if move == "arrive" or detail:  # else the next move comes before any task has noticed this one
            await settle()
            check(world, calls)
    for call in calls:
        call.task.cancel()
    await asyncio.gather(*(call.task for call in calls), return_exceptions=True)
    assert (
        world.scheduler.report() | {"started": 0, "refused": {}}
        == Scheduler(slots=world.slots, queue_limit=8, stress=lambda: 0.0).report()
    )


def check(world: World, calls: list[Call]) -> None:
    alive = [call for call in calls if not call.task.done()]
    active = [call for call in alive if call.running]
    idle_keys = {call.key for call in alive if not call.running}
    assert len(active) == world.scheduler.running <= world.slots
    assert len(alive) - len(active) == world.scheduler.waiting <= world.queue_limit
    for key, limit in LIMITS.items():
        count = sum(call.key == key for call in active)
        assert limit is None or count <= limit
        could_start = key in idle_keys and len(active) < world.slots and (limit is None or count < limit)
        assert not could_start, f"a call of {key!r} waits beside a free slot"


FULL = runes.parse(
    "MEM[SOFT=2048,HARD=4096,VOL=MED];KV[CAP=0.2,POLICY=WINDOW,PURGE=ON_STRESS];TIER=EXTENDED;PRIORITY=7;"
    "DEGRADE{STEP1:SHRINK_KV(0.75),STEP2:CONTEXT(4096),STEP3:DISABLE(HIGH_COST_METRICS),STEP4:BATCH(ASYNC),"
    "STEP5:OFFLOAD(COLD)}"
)


def block(stress: float, rune: str = "", **options: object) -> dict[str, object]:
    given = {"all_steps": False, "degradation": Degradation(), "total_mb": 10_000} | options
    profile = runes.parse("MEM[SOFT=1,HARD=2,VOL=LOW];" + rune) if rune else FULL
    return memory_block(profile, stress, **given)  # type: ignore[arg-type]


def test_without_stress_the_block_is_what_was_declared() -> None:
    assert block(0.0) == {
        "profile": "custom",
        "soft_mb": 2048,
        "hard_mb": 4096,
        "tier": "EXTENDED",
        "stress": 0,
        "applied": [],
        "kv": {"cap_mb": 2000, "policy": "WINDOW", "purge": "ON_STRESS"},
    }


def test_at_full_stress_every_step_reaches_the_overlay() -> None:
    assert block(1.0, degradation=Degradation(max_fraction=0.7, disable_nonessential=True)) == {
        "profile": "custom",
        "soft_mb": 2048,
        "hard_mb": 4096,
        "tier": "EXTENDED",
        "stress": 1,
        "applied": [
            "SHRINK_KV(0.75)",
            "CONTEXT(4096)",
            "DISABLE(HIGH_COST_METRICS)",
            "BATCH(ASYNC)",
            "OFFLOAD(COLD)",
        ],
        "kv_shrink_factor": 0.75,
        "max_context_tokens": 4096,
        "disabled_features": ["HIGH_COST_METRICS"],
        "batch_mode": "ASYNC",
        "offload_tier": "COLD",
        "max_fraction": 0.7,
        "disable_nonessential": True,
        "kv": {"cap_mb": 1500, "policy": "WINDOW", "purge": "ON_STRESS"},
    }


@pytest.mark.parametrize(
    ("stress", "steps"), [(0.65, 0), (0.651, 1), (0.72, 1), (0.721, 2), (0.79, 2), (0.93, 4), (0.931, 5), (1.0, 5)]
)
def test_more_steps_apply_as_stress_rises_above_the_threshold(stress: float, steps: int) -> None:
    assert len(block(stress)["applied"]) == steps  # type: ignore[arg-type]


def test_all_steps_apply_at_once_where_so_set() -> None:
    assert len(block(0.651, all_steps=True)["applied"]) == 5  # type: ignore[arg-type]
    assert block(0.65, all_steps=True)["applied"] == []


@pytest.mark.parametrize("priority", range(10))
def test_a_higher_priority_degrades_later(priority: int) -> None:
    rune = f"PRIORITY={priority};DEGRADE{{STEP1:CONTEXT(9)}}"
    threshold = 0.3 + 0.05 * priority
    assert "max_context_tokens" not in block(threshold, rune)
    assert "max_context_tokens" in block(threshold + 0.001, rune)


def test_steps_of_one_kind_add_up() -> None:
    told = block(
        1.0,
        "KV[CAP=0.5,POLICY=LRU,PURGE=ON_EVENT];DEGRADE{STEP1:SHRINK_KV(0.5),STEP2:SHRINK_KV(0.333),STEP3:CONTEXT(10),"
        "STEP4:CONTEXT(20),STEP5:DISABLE(b),STEP6:DISABLE(a),STEP7:DISABLE(b)}",
    )
    assert told["kv_shrink_factor"] == 0.167
    assert told["max_context_tokens"] == 10
    assert told["disabled_features"] == ["b", "a"]
    assert told["kv"] == {"cap_mb": 835, "policy": "LRU", "purge": "ON_EVENT"}


def test_a_manifest_degrades_a_profile_without_steps() -> None:
    told = block(0.9, "PRIORITY=3", degradation=Degradation(max_fraction=1.0))
    assert (told["applied"], told["max_fraction"]) == ([], 1)
    assert "disable_nonessential" not in told
    assert "max_fraction" not in block(0.2, "PRIORITY=3", degradation=Degradation(max_fraction=1.0))


def test_a_shipped_profile_is_called_by_its_name() -> None:
    told = memory_block(runes.profiles()["MINIMAL"], 0.1234567, all_steps=False, degradation=Degradation(), total_mb=1)
    assert (told["profile"], told["stress"], "kv" in told) == ("MINIMAL", 0.123, False)


def test_a_vanishing_factor_keeps_three_decimals_and_is_not_nought() -> None:
    assert block(1.0, "DEGRADE{STEP1:SHRINK_KV(0.0001)}")["kv_shrink_factor"] == 0.001
