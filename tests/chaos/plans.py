"""What each round does, drawn before it begins: the timing of threads has no part in what is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

Target = Literal["bus", "helper", "zygote"]
"""`helper`: a process that the bus started. `zygote`: its child, which starts programs; process 1 of a namespace where
the kernel has them. Never both of one pair: without namespaces nobody is left then who could clean up."""

STRIKES: tuple[tuple[Target, ...], ...] = (
    (),
    ("bus",),
    ("helper",),
    ("zygote",),
    ("helper", "zygote"),
    ("bus", "helper"),
    ("bus", "zygote"),
    ("helper", "helper"),
    ("zygote", "zygote"),
)
"""What is killed at once by KILL. Nothing: the bus is asked to end, by TERM, while calls run."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One round. `before_s` and `after_s` are how long clients call before and after the strike, in seconds."""

    number: int
    strike: tuple[Target, ...]
    before_s: float
    after_s: float
    seed: int

    def __str__(self) -> str:
        return f"kill {' and '.join(self.strike)}" if self.strike else "end"

    @property
    def ends_bus(self) -> bool:
        return not self.strike or "bus" in self.strike


def draw(rng: Random, rounds: int) -> Iterator[Plan]:
    """So many plans. Every strike comes before one comes again."""
    deck: list[tuple[Target, ...]] = []
    for number in range(1, rounds + 1):
        if not deck:
            deck = rng.sample(STRIKES, len(STRIKES))
        yield Plan(number, deck.pop(), rng.triangular(0.0, 1.5, 0.0), rng.uniform(0.05, 1.0), rng.getrandbits(64))
