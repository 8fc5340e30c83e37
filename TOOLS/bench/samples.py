"""Samples, and what is taken over the rounds: medians, and ratios within each round."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. `cpu_ms` is per call; None where nothing was answered."""

    calls_s: float
    p50_ms: float | None
    p99_ms: float | None
    cpu_ms: float | None
    errors: int
    first_error: str | None

    @classmethod
    def failed(cls, reason: str) -> Sample:
        """A measurement that could not be made: one error."""
        return cls(0.0, None, None, None, 1, reason)


Samples = dict[tuple[str, int], list[Sample]]
"""Samples by target and connections, one for each round, so that equal places are of one round."""


def median(values: Sequence[float | None]) -> float | None:
    """The median of what is there; None of nothing."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def median_ratio(values: Sequence[float | None], against: Sequence[float | None]) -> float | None:
    """The median of the ratios within each round; a round with nothing on either side is left out."""
    return median([a / b if a is not None and b else None for a, b in zip(values, against, strict=True)])
