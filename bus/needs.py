"""What calls really needed of memory, by their peaks: what the next one reserves, and what degradation bought.

A capability is known by `overlay.capability`. Until `LEARNED` of its calls were measured its next one reserves its
SOFT; then the 95th percentile of the last peaks, times the factor of its VOL, and never more than its HARD. What was
learned outlives the process, as it stands in the ledger: `Needs.recall` reads the last lines.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from bus.admission import Need

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bus.model import Record
    from bus.runes import MemoryProfile, Volatility

LEARNED = 20
"""Measured calls from which on the reservation is learned."""

KEPT = 100
"""The last measured calls of a capability that count."""

AFTER = 10
"""Calls after which what was learned is looked at anew."""

QUANTILE = 0.95

SPARE: dict[Volatility, float] = {"LOW": 1.1, "MED": 1.25, "HIGH": 1.5}
"""By what the volatility (VOL) of a rune multiplies what was measured."""

QUIET_FACTOR, QUIET_MORE_S = 1.25, 0.05
"""By what the longest pause of calls before they grew again is multiplied, and what is added: looks are apart."""

TENTH = 0.1

_LOWER_BOUNDS = frozenset({"ERR_TIMEOUT", "ERR_CANCELLED", "ERR_EVICTED", "ERR_SHUTTING_DOWN", "ERR_OUTPUT_TOO_LARGE"})
"""Calls that were ended before their time: they might have needed more than was measured."""

Verdict = Literal["above soft", "below a tenth of soft"]


@dataclass(frozen=True, slots=True)
class _Measured:
    """One call: its peak in MiB, its longest pause before it grew again, and the degradation steps in force."""

    peak_mb: float
    paused_s: float
    applied: tuple[str, ...]


@dataclass(slots=True)
class _History:
    """The last measured calls of a capability. `p95_mb` and `quiet_s` are what they come to; None before that."""

    calls: deque[_Measured] = field(default_factory=lambda: deque(maxlen=KEPT))
    p95_mb: float | None = None
    quiet_s: float = math.inf
    _new: int = 0

    def add(self, measured: _Measured) -> None:
        """A larger one than expected counts at once, the others together with some more: sorting takes its time."""
        self.calls.append(measured)
        self._new += 1
        is_due = self.p95_mb is None or self._new >= AFTER or measured.peak_mb > self.p95_mb
        if len(self.calls) >= LEARNED and is_due:
            self._new = 0
            self.p95_mb = quantile(call.peak_mb for call in self.calls)
            self.quiet_s = QUIET_FACTOR * quantile(call.paused_s for call in self.calls) + QUIET_MORE_S


class Needs:
    """The histories of a bus."""

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}

    def of(self, key: str, profile: MemoryProfile, *, shared: str | None = None, processes: int = 1) -> Need:
        """What the next call of a capability needs; `shared` and `processes` are those of `Need`."""
        history = self._histories.get(key)
        spare = SPARE[profile.volatility]
        if history is None or history.p95_mb is None:
            return Need(profile.soft_mb, profile.hard_mb, "declared", math.inf, spare, shared, processes)
        mb = min(profile.hard_mb, history.p95_mb * spare)
        return Need(mb, profile.hard_mb, "measured", history.quiet_s, spare, shared, processes)

    def learn(self, key: str, peak_mb: float, code: str, applied: Iterable[str], paused_s: float) -> None:
        """A call ended with `code`; it had `peak_mb` at most, and after `paused_s` without growing it never grew."""
        history = self._histories.setdefault(key, _History())
        if code in _LOWER_BOUNDS and peak_mb <= (history.p95_mb or 0.0):
            return
        history.add(_Measured(peak_mb, paused_s, tuple(applied)))

    def recall(self, records: Iterable[Record]) -> None:
        """Learn from lines of the ledger, oldest first."""
        for record in records:
            memory = record.get("memory") or {}
            if record.get("type") == "invoke" and memory.get("peak_mb") is not None:
                key = f"{record['overlay']}.{record['capability']}"
                self.learn(key, memory["peak_mb"], record["code"], memory["applied"], record["duration_ms"] / 1000)

    def forget(self, overlay: str) -> None:
        """Nothing of an overlay is known any more."""
        for key in [key for key in self._histories if key.partition(".")[0] == overlay]:
            del self._histories[key]

    def peaks_mb(self, key: str) -> list[float]:
        """Those of the last measured calls, in MiB, oldest first."""
        history = self._histories.get(key)
        return [] if history is None else [call.peak_mb for call in history.calls]

    def report(self, key: str, profile: MemoryProfile) -> dict[str, Any]:
        """What is known of a capability, as JSON: figures in MiB, and what each degradation step bought."""
        history = self._histories.get(key) or _History()
        peaks = [call.peak_mb for call in history.calls]
        need = self.of(key, profile)
        return {
            "measured_calls": len(peaks),
            "median_mb": _rounded(median(peaks)) if peaks else None,
            "p95_mb": _rounded(quantile(peaks)) if peaks else None,
            "peak_mb": _rounded(max(peaks)) if peaks else None,
            "reserved_mb": _rounded(need.mb),
            "basis": need.basis,
            "finding": verdict(peaks, profile.soft_mb),
            "degradation": _bought(history.calls, profile),
        }


def quantile(figures: Iterable[float]) -> float:
    """The nearest-rank 95th percentile: the smallest figure that no more than a twentieth of them exceed."""
    ordered = sorted(figures)
    return ordered[math.ceil(QUANTILE * len(ordered)) - 1]


def verdict(peaks_mb: list[float], soft_mb: int) -> Verdict | None:
    """Whether what is declared is far from what is measured: of no call, where too few were measured."""
    if len(peaks_mb) < LEARNED:
        return None
    if median(peaks_mb) > soft_mb:
        return "above soft"
    return "below a tenth of soft" if quantile(peaks_mb) < TENTH * soft_mb else None


def _bought(calls: Iterable[_Measured], profile: MemoryProfile) -> list[dict[str, Any]]:
    """For each step of the rune: of how many calls it was in force, and the median peaks with and without it."""
    told = []
    for step in map(str, profile.steps):
        peaks: Mapping[bool, list[float]] = {True: [], False: []}
        for call in calls:
            peaks[step in call.applied].append(call.peak_mb)
        told.append(
            {
                "step": step,
                "calls": len(peaks[True]),
                "median_with_mb": _rounded(median(peaks[True])) if peaks[True] else None,
                "median_without_mb": _rounded(median(peaks[False])) if peaks[False] else None,
            }
        )
    return told


def _rounded(mb: float) -> float:
    return round(mb, 1)
