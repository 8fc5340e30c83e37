"""The goals that the bus is held to beside its peers, and whether what was measured meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from samples import median, median_ratio
from targets import SLEEPERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crowd import Crowd
    from samples import Sample, Samples
    from tree import Tree

    Read = Callable[[Samples, Crowd | None], float | None]

CONNECTIONS = 16
RIVALS = ("webhook-python", "lighttpd-python", "plain-python")


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure, with what it must be (`bound`) and what it should be (`aim`): at least, or `at_most`."""

    what: str
    unit: str
    read: Read
    bound: float | None = None
    aim: float | None = None
    at_most: bool = False

    def judge(self, samples: Samples, crowd: Crowd | None) -> Verdict:
        found = self.read(samples, crowd)
        return Verdict(
            self.what,
            self.unit,
            found,
            self.bound,
            self.aim,
            self.at_most,
            met=self._reaches(found, self.bound),
            aim_met=self._reaches(found, self.aim),
        )

    def _reaches(self, found: float | None, mark: float | None) -> bool | None:
        if found is None or mark is None:
            return None
        return found <= mark if self.at_most else found >= mark


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what was found; `met` and `aim_met` are None where it was not measured, or there is no such mark."""

    what: str
    unit: str
    found: float | None
    bound: float | None
    aim: float | None
    at_most: bool
    met: bool | None
    aim_met: bool | None

    @property
    def words(self) -> str:
        if self.found is None:
            return "not measured"
        bound = [] if self.met is None else ["met" if self.met else "NOT met"]
        aim = [] if self.aim_met is None else ["aim met" if self.aim_met else "aim not met"]
        return ", ".join(bound + aim)


def judge(samples: Samples, crowd: Crowd | None) -> list[Verdict]:
    return [goal.judge(samples, crowd) for goal in GOALS]


def _rates(samples: Samples, target: str) -> list[float | None]:
    return [sample.calls_s for sample in samples.get((target, CONNECTIONS), ())]


def _over(target: str, *rivals: str) -> Read:
    """Calls a second of a target over those of the best rival of each round; the median over the rounds."""

    def read(samples: Samples, _: Crowd | None) -> float | None:
        there = [rates for rival in rivals if (rates := _rates(samples, rival))]
        best = [max((rate for rate in at if rate is not None), default=None) for at in zip(*there, strict=True)]
        return median_ratio(_rates(samples, target), best) if best else None

    return read


def _rate(target: str) -> Read:
    return lambda samples, _: median(_rates(samples, target))


def _p50_alone(samples: Samples, _: Crowd | None) -> float | None:
    alone: Sequence[Sample] = samples.get(("bus-python", 1), ())
    return median([sample.p50_ms for sample in alone])


def _called(read: Callable[[Tree], float]) -> Read:
    return lambda _, crowd: None if crowd is None else read(crowd.called)


def _idle(read: Callable[[Tree], float]) -> Read:
    return lambda _, crowd: None if crowd is None else read(crowd.idle)


GOALS = (
    Goal("an unmodified Python script / the best rival", "x", _over("bus-python", *RIVALS), bound=8, aim=10),
    Goal("p50 of it at 1 connection", "ms", _p50_alone, bound=2.5, at_most=True),
    Goal("a C program / webhook", "x", _over("bus-c", "webhook-c"), bound=0.75, aim=1),
    Goal("a worker / the same path bare", "x", _over("bus-worker", "bare-worker"), bound=0.5),
    Goal("a worker, calls a second", "", _rate("bus-worker"), aim=7500),
    Goal("an HTTP service / the same path bare", "x", _over("bus-http", "aiohttp-proxy"), bound=0.6),
    Goal("an HTTP service, calls a second", "", _rate("bus-http"), aim=4900),
    Goal(f"GET / beside {SLEEPERS} sleeping calls / alone", "x", _over("bus-root-sleepers", "bus-root"), bound=0.9),
    Goal("the bus process, each overlay called", "MB", _called(lambda tree: tree.rss_mb), bound=80, at_most=True),
    Goal("the bus process, helpers gone", "MB", _idle(lambda tree: tree.rss_mb), bound=80, at_most=True),
    Goal("helpers left when idle", "", _idle(lambda tree: tree.children), bound=0, at_most=True),
)
