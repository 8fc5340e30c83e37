"""Two writers under load on one ledger and a process that only signs, all killed at random moments, many times over.

The history stays one.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, get_args

from bus import provenance
from bus.ledger import Fsync
from tests.faults import facts, scenario
from tests.faults.children import Child

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from random import Random

    from bus.model import Record

LONGEST_S = 0.06
"""How long a pair of writers lives after its first answer, at most."""


def play(path: Path, rng: Random, kills: int) -> Iterator[list[str]]:
    """For each pair of kills what is wrong after it; at last what is wrong in the whole history."""
    history: list[str] = []
    seen = 0
    for number in range(0, kills, 2):
        said = _kill_two(path, rng, number)
        lines = list(provenance.iter_lines(path, seen + 1))
        yield [f"after kill {number + 2}: {fault}" for fault in _wrong(lines, said)]
        seen += len(lines)
        history += facts.stands(said) + facts.noted(said)
    yield list(facts.after_reopening(path, history, scenario.notary(path)))


def _wrong(lines: list[Record], said: list[str]) -> Iterator[str]:
    yield from facts.of_lines(lines, facts.stands(said))
    yield from (f"who only signs is told {line}" for line in said if line.startswith("refused to sign"))


def _kill_two(path: Path, rng: Random, number: int) -> list[str]:
    """What two writers and who signs had been answered before their ends."""
    moments = sorted(rng.uniform(0, LONGEST_S) for _ in range(2))
    works = [
        functools.partial(scenario.crowd, path, rng.choice(get_args(Fsync)), f"{number}-{which}") for which in range(2)
    ]
    sign = functools.partial(scenario.sign, path)
    with Child(works[0]) as first, Child(works[1]) as second, Child(sign) as signer:
        for child in (first, second, signer):
            child.go()
        second.first_line()
        time.sleep(moments[0])  # a moment at random, not an event
        said = first.kill()
        time.sleep(moments[1] - moments[0])
        said += second.kill()
        return said + signer.kill()
