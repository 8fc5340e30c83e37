"""Purges: whose workers and services are told to let go of what they keep in memory, and when.

A manifest says that they take it; the runes of the capabilities say when, with PURGE in KV. Where none of them has KV,
the manifest alone decides, and both occasions count. What is told is one process for all of its capabilities, so one
rune is enough.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from bus.errors import DeniedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bus.model import Manifest
    from bus.runes import Purge
    from bus.stress import Band

Occasion = Literal["stress", "event"]
"""Memory is short; the operator asks."""

AGAIN_S = 30.0
"""How long, in seconds, the highest band of stress lasts until those that may help are told once more."""

_ON: Mapping[Purge, tuple[Occasion, ...]] = {
    "ON_STRESS": ("stress",),
    "ON_EVENT": ("event",),
    "ON_STRESS_OR_EVENT": ("stress", "event"),
}
_RANK: Mapping[Band, int] = {"LOW": 0, "MODERATE": 0, "HIGH": 1, "CRITICAL": 2}


def occasions(manifest: Manifest) -> list[Occasion]:
    """When the workers or the service of an overlay are told; never where it does not say that they take it."""
    if not manifest.takes_purges:
        return []
    rules = [offered.memory.kv.purge for offered in manifest.capabilities.values() if offered.memory.kv]
    told = {occasion for rule in rules for occasion in _ON[rule]}
    both = _ON["ON_STRESS_OR_EVENT"]
    return [occasion for occasion in both if occasion in told or not rules]


def require_on_event(manifest: Manifest) -> None:
    """Raises `DeniedError` (ERR_NO_PURGE) for an overlay that is not told when the operator asks."""
    told = occasions(manifest)
    if "event" in told:
        return
    why = "its runes say PURGE=ON_STRESS" if told else "neither its workers nor its service take a purge"
    raise DeniedError("ERR_NO_PURGE", f"{manifest.name} is not told: {why}")


class UnderStress:
    """When memory is so short that it is told: at each rise to HIGH or CRITICAL, and again while CRITICAL lasts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is monotonic, in seconds."""
        self._clock = clock
        self._rank = 0
        self._told_at = -math.inf

    def is_due(self, band: Band) -> bool:
        """Whether it is to be told now; to be asked after every sample, and then taken as done."""
        before, self._rank = self._rank, _RANK[band]
        now = self._clock()
        if self._rank > before or (band == "CRITICAL" and now - self._told_at >= AGAIN_S):
            self._told_at = now
            return True
        return False
