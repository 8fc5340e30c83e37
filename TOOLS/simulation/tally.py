"""What came of a trace under one policy."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from runners.base import Code

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simulation.calls import Call
    from simulation.machine import Machine

Loss = Literal["deadline", "gave up", "over HARD"]
"""Its deadline passed; its client tried it often enough; it had more memory than its HARD."""

HIGH_PRIORITY = 7
"""From which priority on a missed deadline is counted by itself."""

BIG_MB = 200.0
"""From which peak on a call counts as big."""


class Wait(NamedTuple):
    """How long, from its first coming, a call waited for the start of the run that finished; in seconds."""

    wait_s: float
    priority: int
    is_big: bool


@dataclass(slots=True)
class Tally:
    """Counts of one run of the simulation; `calls` is how many calls the trace has. Memory is in MiB."""

    calls: int
    started: int = 0
    refusals: int = 0
    decisions: int = 0
    kills: int = 0
    evictions: int = 0
    high_priority_lost: int = 0
    big_lost: int = 0
    losses: Counter[Loss] = field(default_factory=Counter)
    waits: list[Wait] = field(default_factory=list)
    makespan_s: float = 0.0
    room_mb: float = 0.0
    peak_mb: float = 0.0
    area_mb_s: float = 0.0
    lost_area_mb_s: float = 0.0
    samples: int = 0
    unused_mb: float | None = 0.0
    """The sum over the samples of what was reserved and not used; None under a policy that reserves nothing."""

    def ended(self, code: str, area_mb_s: float) -> None:
        """A run ended; of one that was for nothing `area_mb_s` is what it had, over time."""
        self.lost_area_mb_s += area_mb_s
        self.kills += code == Code.CRASH
        self.evictions += code == Code.EVICTED

    def finished(self, call: Call, wait_s: float) -> None:
        self.waits.append(Wait(wait_s, call.profile.priority, call.peak_mb >= BIG_MB))

    def lost(self, call: Call, loss: Loss) -> None:
        self.losses[loss] += 1
        self.high_priority_lost += call.profile.priority >= HIGH_PRIORITY
        self.big_lost += call.peak_mb >= BIG_MB

    def sampled(self, used_mb: float, reserved_mb: float | None) -> None:
        self.samples += 1
        if reserved_mb is None or self.unused_mb is None:
            self.unused_mb = None
        else:
            self.unused_mb += max(0.0, reserved_mb - used_mb)

    def close(self, now: float, machine: Machine) -> None:
        machine.change(now, 0.0, 0.0)
        self.makespan_s, self.room_mb = now, machine.room_mb
        self.peak_mb, self.area_mb_s = machine.peak_mb, machine.area_mb_s

    def figures(self) -> dict[str, float | None]:
        """For tables. Shares are of the memory that calls may have, but for `work_lost`: of what calls had."""
        span_mb_s = self.room_mb * self.makespan_s
        unused = None if self.unused_mb is None else self.unused_mb / (self.samples * self.room_mb)
        return {
            "finished": len(self.waits),
            "lost": self.losses.total(),
            **{f"lost_{loss.replace(' ', '_').lower()}": self.losses[loss] for loss in _LOSSES},
            "lost_high_priority": self.high_priority_lost,
            "lost_big": self.big_lost,
            "throughput": len(self.waits) / self.makespan_s,
            "makespan_s": self.makespan_s,
            **self._waited(),
            "kills": self.kills,
            "evictions": self.evictions,
            "refusals": self.refusals,
            "started": self.started,
            "used": self.area_mb_s / span_mb_s,
            "peak_used": self.peak_mb / self.room_mb,
            "reserved_unused": unused,
            "work_lost": self.lost_area_mb_s / self.area_mb_s if self.area_mb_s else 0.0,
        }

    def _waited(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        kinds = {"": self.waits, "_big": [wait for wait in self.waits if wait.is_big]}
        kinds |= {f"_priority_{p}": [w for w in self.waits if w.priority == p] for p in _priorities(self.waits)}
        for kind, waits in kinds.items():
            for name, share in (("p50", 0.5), ("p99", 0.99)):
                found[f"wait_{name}{kind}_s"] = percentile((wait.wait_s for wait in waits), share)
        return found


_LOSSES: tuple[Loss, ...] = ("deadline", "gave up", "over HARD")


def _priorities(waits: Iterable[Wait]) -> list[int]:
    return sorted({wait.priority for wait in waits})


def percentile(figures: Iterable[float], share: float) -> float | None:
    """That of the nearest rank; None of nothing."""
    ordered = sorted(figures)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
