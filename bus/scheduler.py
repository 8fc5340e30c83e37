"""Admission: which call runs now, which waits, which is refused; and what a call is told about memory.

What waits is ordered by one static figure, so that a decision is a few bisections: time of arrival less `AGING_S` for
each point of priority. Thus priority counts first, then age, and nothing starves: a call that has waited `AGING_S`
longer per point goes before one of higher priority.

Calls of one key (a capability) form a lane. A lane at its concurrency limit offers nothing, so it never holds up
others. Between two events of the loop this holds: either all slots are taken, or no lane has a call that could start.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.canonical import figure
from bus.errors import BusError, DeadlineError, OverloadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus.model import Degradation
    from bus.runes import KvRule, MemoryProfile, Step

AGING_S = 2.0
"""Seconds of waiting that weigh as much as one point of priority."""

REFUSING_STRESS = 0.98
REFUSED_PRIORITY = 3
"""At `REFUSING_STRESS` calls of this priority or a lower one are refused."""

RETRY_MIN_S = 1
RETRY_MAX_S = 60
RETRY_LATER_S = 5
"""Retry-After of a refusal that the queue has no part in."""

_RECENT = 64
"""Completions from which the rate is taken."""

_LEAST = 0.001
"""The smallest shrink factor that three decimals can say; a factor of 0 would leave nothing to shrink."""


class Grant(NamedTuple):
    """Leave to run, held while the context of `Scheduler.admit` is open."""

    queued_s: float


@dataclass(slots=True, eq=False)
class _Lane:
    """The calls of one key. `offered` is the waiting call that stands for the lane in the scheduler's order."""

    key: str
    limit: int | None = None
    running: int = 0
    waiting: list[_Waiter] = field(default_factory=list)
    offered: _Waiter | None = None

    @property
    def has_room(self) -> bool:
        return self.limit is None or self.running < self.limit


@dataclass(slots=True, eq=False)
class _Waiter:
    """A call that waits. `verdict` becomes None for leave to run, else the refusal."""

    place: tuple[float, int]
    lane: _Lane
    priority: int
    deadline: float
    verdict: asyncio.Future[BusError | None]
    queued: bool = True
    granted: bool = False

    def __lt__(self, other: _Waiter) -> bool:
        return self.place < other.place


class Scheduler:
    """Slots and a bounded queue, on one event loop and without threads. A slot is all that a call needs to start.

    `stress` gives 0.0 to 1.0 and `clock` seconds; deadlines are on that clock. A timer ends a wait whose deadline
    passes, and no call whose deadline has passed on `clock` is started.
    """

    def __init__(
        self,
        *,
        slots: int,
        queue_limit: int,
        stress: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.running = 0
        self.waiting = 0
        self._slots = slots
        self._queue_limit = queue_limit
        self._stress = stress
        self._clock = clock
        self._lanes: dict[str, _Lane] = {}
        self._offers: list[_Waiter] = []
        self._arrivals = 0
        self._started = 0
        self._refused: Counter[str] = Counter()
        self._completions = deque([clock()], maxlen=_RECENT)
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def admit(self, key: str, priority: int, deadline: float, concurrency: int | None = None) -> Admission:
        """Wait, on entering the context, for leave to run a call of `key`; the slot is given back when it ends.

        `priority` is 0 to 9, `deadline` a time on the scheduler's clock, `concurrency` the most calls of `key` that may
        run at once (None: any number). Raises `OverloadError` (ERR_BUSY, ERR_STRESS, ERR_SHUTTING_DOWN) and
        `DeadlineError` (ERR_DEADLINE).
        """
        return Admission(self, key, priority, deadline, concurrency)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Refuse what waits and what comes. What runs goes on."""
        self._closed = True
        for lane in list(self._lanes.values()):
            for waiter in list(lane.waiting):
                self._refuse(waiter, self._shutting_down())

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing runs, `timeout_s` seconds at most; says whether nothing does."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def report(self) -> dict[str, Any]:
        """For metrics and `GET /stress`. `refused` counts by error code, `keys` shows what runs and waits now."""
        return {
            "slots": self._slots,
            "queue_limit": self._queue_limit,
            "running": self.running,
            "waiting": self.waiting,
            "started": self._started,
            "refused": dict(self._refused),
            "keys": {
                lane.key: {"running": lane.running, "waiting": len(lane.waiting), "limit": lane.limit}
                for lane in self._lanes.values()
            },
        }

    async def _enter(self, key: str, priority: int, deadline: float, concurrency: int | None) -> _Lane:
        """Take a slot, now or in turn. `Admission` gives it back."""
        refusal = self._refusal(priority, deadline)
        if refusal:
            raise self._counted(refusal)
        lane = self._lane(key, concurrency)
        if self.running < self._slots and lane.has_room:
            self._take(lane)
        else:
            await self._wait(lane, priority, deadline)
        return lane

    async def _wait(self, lane: _Lane, priority: int, deadline: float) -> None:
        """Wait in line. However this ends (a cancellation may follow upon a grant), no slot is lost."""
        waiter = self._enqueue(lane, priority, deadline)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, deadline - self._clock()), self._expire, waiter)
        entered = False
        try:
            refusal = await waiter.verdict
            if refusal:
                raise refusal
            entered = True
        finally:
            timer.cancel()
            self._dequeue(waiter)
            if waiter.granted and not entered:
                self._leave(lane)

    def _refusal(self, priority: int, deadline: float) -> BusError | None:
        """Why a call may not start at all; asked when it comes and again when its turn comes."""
        if self._closed:
            return self._shutting_down()
        late_s = self._clock() - deadline
        if late_s >= 0:
            return DeadlineError("ERR_DEADLINE", f"the deadline passed {late_s:.3f} s before the call could start")
        stress = self._stress()
        if stress >= REFUSING_STRESS and priority <= REFUSED_PRIORITY:
            needed = f"from {REFUSING_STRESS} on only priority {REFUSED_PRIORITY + 1} and above is admitted"
            detail = f"stress is {stress:.3f}, and {needed}, not {priority}"
            return OverloadError("ERR_STRESS", detail, retry_after_s=RETRY_LATER_S)
        return None

    @staticmethod
    def _shutting_down() -> OverloadError:
        return OverloadError("ERR_SHUTTING_DOWN", "the bus is shutting down", retry_after_s=RETRY_LATER_S)

    def _counted(self, refusal: BusError) -> BusError:
        self._refused[refusal.code] += 1
        return refusal

    def _lane(self, key: str, limit: int | None) -> _Lane:
        """The lane of `key`, with the limit that its newest call gives: a reload may change it."""
        lane = self._lanes.get(key)
        if lane is None:
            return _Lane(key, limit)
        if lane.limit != limit:
            lane.limit = limit
            self._update(lane)
            self._dispatch()
        return lane

    def _enqueue(self, lane: _Lane, priority: int, deadline: float) -> _Waiter:
        if self.waiting >= self._queue_limit:
            raise self._counted(self._busy())
        now = self._clock()
        if not self.waiting:
            self._completions.clear()
            self._completions.append(now)
        self._arrivals += 1
        place = (now - priority * AGING_S, self._arrivals)
        waiter = _Waiter(place, lane, priority, deadline, asyncio.get_running_loop().create_future())
        insort(lane.waiting, waiter)
        self.waiting += 1
        self._update(lane)
        return waiter

    def _dequeue(self, waiter: _Waiter) -> None:
        """Take a call out of the line; nothing happens if it has left it already."""
        if not waiter.queued:
            return
        waiter.queued = False
        lane = waiter.lane
        del lane.waiting[bisect_left(lane.waiting, waiter)]
        self.waiting -= 1
        self._update(lane)

    def _update(self, lane: _Lane) -> None:
        """After each change of a lane: keep it while it has calls, and offer its first one while it has room."""
        if lane.running or lane.waiting:
            self._lanes[lane.key] = lane
        else:
            self._lanes.pop(lane.key, None)
        best = lane.waiting[0] if lane.waiting and lane.has_room else None
        if best is lane.offered:
            return
        if lane.offered:
            del self._offers[bisect_left(self._offers, lane.offered)]
        if best:
            insort(self._offers, best)
        lane.offered = best

    def _dispatch(self) -> None:
        """Start what may start, best first. A waiter whose task was cancelled may still stand in line: pass it over."""
        while self._offers and self.running < self._slots:
            waiter = self._offers[0]
            self._dequeue(waiter)
            if waiter.verdict.done():
                continue
            refusal = self._refusal(waiter.priority, waiter.deadline)
            if refusal:
                self._refuse(waiter, refusal)
            else:
                self._take(waiter.lane)
                waiter.granted = True
                waiter.verdict.set_result(None)

    def _refuse(self, waiter: _Waiter, refusal: BusError) -> None:
        self._dequeue(waiter)
        if not waiter.verdict.done():
            waiter.verdict.set_result(self._counted(refusal))

    def _expire(self, waiter: _Waiter) -> None:
        self._refuse(waiter, DeadlineError("ERR_DEADLINE", "the deadline passed while the call waited for a slot"))

    def _take(self, lane: _Lane) -> None:
        lane.running += 1
        self.running += 1
        self._started += 1
        self._idle.clear()
        self._update(lane)

    def _leave(self, lane: _Lane) -> None:
        lane.running -= 1
        self.running -= 1
        self._completions.append(self._clock())
        self._update(lane)
        self._dispatch()
        if not self.running:
            self._idle.set()

    def _busy(self) -> OverloadError:
        detail = f"{self.running} calls run and {self.waiting} wait, which is all that may"
        return OverloadError("ERR_BUSY", detail, retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> int:
        """Seconds until the line will be gone at the rate of the last completions, counted since the line formed."""
        between_s = (self._clock() - self._completions[0]) / max(1, len(self._completions) - 1)
        return max(RETRY_MIN_S, min(RETRY_MAX_S, math.ceil((self.waiting + 1) * between_s)))


class Admission:
    """The context of one call in `Scheduler.admit`. A class, as a generator's context costs three times as much."""

    __slots__ = ("_asked", "_lane", "_scheduler")

    def __init__(self, scheduler: Scheduler, *asked: Any) -> None:  # noqa: ANN401
        self._scheduler = scheduler
        self._asked = asked

    async def __aenter__(self) -> Grant:
        arrived = self._scheduler._clock()
        self._lane = await self._scheduler._enter(*self._asked)
        return Grant(self._scheduler._clock() - arrived)

    async def __aexit__(self, *_: object) -> None:
        self._scheduler._leave(self._lane)


def memory_block(
    profile: MemoryProfile, stress: float, *, all_steps: bool, degradation: Degradation, total_mb: int
) -> dict[str, Any]:
    """The envelope's `memory` for a call admitted at this stress. Pure: the same figures give the same block.

    Above a stress of 0.3 + 0.05 x priority the profile's steps apply in order, the more of them the nearer stress is to
    1.0, or at once with `all_steps`; `degradation` is what the manifest adds then. `total_mb` is the memory that
    `kv.cap_mb` is a share of. Figures are whole or have at most three decimals.
    """
    level = _thousandths(stress)
    is_degraded = level > _threshold(profile)
    steps = _steps_at(profile, level, all_steps=all_steps) if is_degraded else ()
    effects = _effects(steps) if steps else {}
    block: dict[str, Any] = {
        "profile": profile.name or "custom",
        "soft_mb": profile.soft_mb,
        "hard_mb": profile.hard_mb,
        "tier": profile.tier,
        "stress": figure(level / 1000),
        "applied": [str(step) for step in steps],
        **effects,
    }
    if is_degraded:
        block |= _manifest_effects(degradation)
    if profile.kv:
        block["kv"] = _kv_block(profile.kv, total_mb, effects.get("kv_shrink_factor", 1))
    return block


def _thousandths(stress: float) -> int:
    """Stress as it will stand in the record, whole, so that counting steps has no rounding of its own."""
    return round(1000 * min(1.0, max(0.0, stress)))


def _threshold(profile: MemoryProfile) -> int:
    """The stress above which a profile degrades, in thousandths."""
    return 300 + 50 * profile.priority


def _steps_at(profile: MemoryProfile, level: int, *, all_steps: bool) -> tuple[Step, ...]:
    """The steps that apply above the threshold: the first ceil(n x (stress - threshold) / (1 - threshold)) of n."""
    if all_steps:
        return profile.steps
    threshold = _threshold(profile)
    return profile.steps[: -(-len(profile.steps) * (level - threshold) // (1000 - threshold))]


def _effects(steps: tuple[Step, ...]) -> dict[str, Any]:
    """What the overlay is told of the steps: factors multiply, the smallest context counts, features add up."""
    by_action: dict[str, list[Any]] = {}
    for step in steps:
        by_action.setdefault(step.action, []).append(step.value)
    effects: dict[str, Any] = {}
    if factors := by_action.get("SHRINK_KV"):
        effects["kv_shrink_factor"] = figure(max(_LEAST, math.prod(factors)))
    if contexts := by_action.get("CONTEXT"):
        effects["max_context_tokens"] = min(contexts)
    if features := by_action.get("DISABLE"):
        effects["disabled_features"] = list(dict.fromkeys(features))
    if modes := by_action.get("BATCH"):
        effects["batch_mode"] = modes[-1]
    if tiers := by_action.get("OFFLOAD"):
        effects["offload_tier"] = tiers[-1]
    return effects


def _manifest_effects(degradation: Degradation) -> dict[str, Any]:
    effects: dict[str, Any] = {}
    if degradation.max_fraction is not None:
        effects["max_fraction"] = figure(degradation.max_fraction)
    if degradation.disable_nonessential:
        effects["disable_nonessential"] = True
    return effects


def _kv_block(rule: KvRule, total_mb: int, factor: float) -> dict[str, Any]:
    return {"cap_mb": round(rule.cap * total_mb * factor), "policy": rule.policy, "purge": rule.purge}
