"""Targets, and running many cases of one. The cases come from hypothesis: a failure is reported at its smallest."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

    from hypothesis.strategies import SearchStrategy

HANG_S = 20.0
"""How long one case may take before it counts as a hang: far beyond the slowest on a busy machine."""

ENOUGH = 100
"""From so many cases on each outcome that a target names must have come out."""

SHOWN = 3000
"""Characters that are kept of the beginning of a failure, and of its end."""


class HangError(Exception):
    """A case took longer than `HANG_S`."""


class Probe(NamedTuple):
    """An opened target. `check` says in a word what came out of a case, and raises where that may not come out."""

    cases: SearchStrategy[Any]
    check: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Target:
    """One reader of foreign input. `weight` is its part of all cases; `must` are the outcomes that have to be seen."""

    name: str
    what: str
    weight: int
    open: Callable[[], AbstractContextManager[Probe]]
    must: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one target. `failure` is the text of what may not be, with the smallest case that shows it."""

    target: Target
    seed: int
    asked: int
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)
    failure: str | None = None

    @property
    def cases(self) -> int:
        return self.counts.total()

    @property
    def unseen(self) -> list[str]:
        """The outcomes that had to be seen and were not."""
        return sorted(self.target.must - self.counts.keys()) if self.asked >= ENOUGH else []

    @property
    def held(self) -> bool:
        return self.failure is None and not self.unseen and self.cases >= self.asked


def run(target: Target, cases: int, seed: int) -> Result:
    """So many cases of one target. A failure ends it, and is in the result."""
    counts: Counter[str] = Counter()
    failure = None
    began = time.monotonic()
    try:
        with target.open() as probe:
            _body(probe, cases, seed, counts)()
    except Exception as error:  # noqa: BLE001  # whatever a reader lets out is what is looked for
        failure = _shortened("".join(traceback.format_exception(error, chain=False)))
    return Result(target, seed, cases, time.monotonic() - began, counts, failure)


def share(targets: Sequence[Target], cases: int) -> list[int]:
    """The cases of each target by its weight; together `cases`, and each at least one."""
    left, weights = cases, sum(target.weight for target in targets)
    parts = []
    for target in targets:
        parts.append(max(1, round(left * target.weight / weights)))
        left, weights = left - parts[-1], weights - target.weight
    return parts


@contextlib.contextmanager
def limit(seconds: float = HANG_S) -> Iterator[None]:
    """Raise `HangError` in this, the main thread, once it has taken so long."""

    def ring(_: int, __: FrameType | None) -> None:
        raise HangError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _shortened(text: str) -> str:
    """Its beginning and its end: a case can be a hundred thousand brackets."""
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}\n[...]\n{text[-SHOWN:]}"


def _body(probe: Probe, cases: int, seed: int, counts: Counter[str]) -> Callable[[], None]:
    """The test that hypothesis runs: its database is off, and no case is too slow or too large for it."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(probe.cases)
    def one(sample: Any) -> None:
        try:
            with limit():
                counts[probe.check(sample)] += 1
        except Exception as error:
            error.add_note(f"the case: {sample!r}")
            raise

    return one
