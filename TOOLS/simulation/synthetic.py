"""Traces from a seed: bursts of calls of a dozen capabilities, whose memory is heavy-tailed and badly declared.

Calls come from a Poisson process that switches between a slow and a fast rate (a Markov-modulated one with two states;
Fischer and Meier-Hellstern 1993). How long a call takes is lognormal; its memory is a bounded Pareto, or lognormal for
scripts, which all have about the same.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulation.calls import Call, Growth, TraceError, area_mb_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FAST_TIMES = 6.0
"""How many times as many calls come in a burst as between two."""

BURST_S, BETWEEN_S = 20.0, 60.0
"""How long, on average, a burst lasts, and the time between two, in seconds."""

TAIL = 1.1
"""The shape of the Pareto distributions: the smaller, the heavier the tail."""

DRAWS = 4000
"""Calls from which the mean demand is taken, that makes a load into a rate."""

HOLD_MOST_S = 120.0
PATIENCE_S: Mapping[int, float] = {2: 300.0, 5: 120.0, 8: 30.0}
"""How long, in seconds beyond twice the time that it takes, a caller waits, by priority."""

_STEPS = "DEGRADE{STEP1:SHRINK_KV(0.75),STEP2:SHRINK_KV(0.75),STEP3:SHRINK_KV(0.75)}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A capability: what it declares, in MiB, and how much it has, from the least to the most; `weight` is its share.

    `kv_share` is that of `Call`. `tight` means that all calls have about the same.
    """

    overlay: str
    weight: float
    soft_mb: int
    hard_mb: int
    least_mb: float
    most_mb: float
    hold_s: float
    priorities: tuple[int, ...] = (2, 5, 8)
    kv_share: float = 0.0
    tight: bool = False


KINDS = (
    Kind("script", 0.30, 2048, 4096, 7, 12, 1.0, tight=True),
    Kind("tool", 0.10, 512, 1024, 15, 40, 3.0, tight=True),
    Kind("careless", 0.15, 1024, 2048, 20, 150, 12.0),
    Kind("honest", 0.20, 128, 512, 30, 200, 12.0),
    Kind("modest", 0.10, 32, 512, 60, 400, 15.0),
    Kind("model", 0.10, 256, 768, 150, 400, 20.0, priorities=(5, 8), kv_share=0.5),
    Kind("batch", 0.05, 256, 512, 100, 400, 40.0, priorities=(2,)),
)
"""Scripts that declare far too much, overlays that declare too much, about enough, and too little."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Which of the three kinds of growth calls have, by their weights."""

    name: str
    growth: Mapping[Growth, float]


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("mixed", {"ramp": 0.6, "linear": 0.25, "late": 0.15}),
        Scenario("ramp", {"ramp": 1.0}),
        Scenario("linear", {"linear": 1.0}),
        Scenario("late", {"late": 1.0}),
    )
}


def make(scenario: Scenario, seed: int, *, load: float, seconds: float, room_mb: float) -> list[Call]:
    """Calls over so many seconds that ask for `load` times `room_mb` of memory on average. The same seed, the same.

    How a capability grows, and its priority, are its own and the same for all its calls. Raises `TraceError` where no
    call comes.
    """
    chance = random.Random(f"{scenario.name} {seed}")
    kinds = list(_capabilities(scenario, chance))
    demand = sum(area_mb_s(_draw(kinds, chance, 0.0).curve()) for _ in range(DRAWS)) / DRAWS
    rate = load * room_mb / demand
    calls = [_draw(kinds, chance, at_s) for at_s in _arrivals(chance, rate, seconds)]
    if not calls:
        raise TraceError(f"no call comes in {seconds:g} s at a load of {load:g}: take more time or a larger load")
    return calls


def _capabilities(scenario: Scenario, chance: random.Random) -> Iterator[tuple[Kind, int, Growth]]:
    """Four capabilities of each kind; scripts grow at once, whatever the scenario."""
    growths, weights = list(scenario.growth), list(scenario.growth.values())
    for kind in KINDS:
        for number in range(4):
            growth: Growth = "ramp" if kind.tight else chance.choices(growths, weights)[0]
            yield kind, number, growth


def _draw(kinds: list[tuple[Kind, int, Growth]], chance: random.Random, at_s: float) -> Call:
    kind, number, growth = chance.choices(kinds, [kind.weight for kind, _, _ in kinds])[0]
    priority = kind.priorities[number % len(kind.priorities)]
    hold_s = min(HOLD_MOST_S, max(0.05, chance.lognormvariate(math.log(kind.hold_s), 0.8)))
    steps = f";{_STEPS}" if kind.kv_share else ""
    return Call(
        at_s=round(at_s, 4),
        overlay=kind.overlay,
        capability=f"c{number}",
        rune=f"MEM[SOFT={kind.soft_mb},HARD={kind.hard_mb},VOL=MED];PRIORITY={priority}{steps}",
        hold_s=round(hold_s, 4),
        peak_mb=round(_peak_mb(kind, chance), 2),
        timeout_s=round(2 * hold_s + PATIENCE_S[priority], 2),
        growth=growth,
        kv_share=kind.kv_share,
        repeatable=number % 2 == 0,
    )


def _peak_mb(kind: Kind, chance: random.Random) -> float:
    if kind.tight:
        middle = math.sqrt(kind.least_mb * kind.most_mb)
        return min(kind.most_mb, max(kind.least_mb, chance.lognormvariate(math.log(middle), 0.1)))
    rest: float = 1 - chance.random() * (1 - (kind.least_mb / kind.most_mb) ** TAIL)
    return min(kind.most_mb, kind.least_mb * math.pow(rest, -1 / TAIL))


def _arrivals(chance: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """Times in seconds, `rate` a second on average: between bursts fewer, in bursts `FAST_TIMES` as many."""
    slow = rate * (BURST_S + BETWEEN_S) / (FAST_TIMES * BURST_S + BETWEEN_S)
    now, is_burst = 0.0, False
    until = chance.expovariate(1 / BETWEEN_S)
    while now < seconds:
        step = chance.expovariate(slow * FAST_TIMES if is_burst else slow)
        if now + step < until:
            now += step
            if now < seconds:
                yield now
        else:
            now = until  # the exponential distribution has no memory, so the rest of the step may be drawn anew
            is_burst = not is_burst
            until = now + chance.expovariate(1 / (BURST_S if is_burst else BETWEEN_S))
