"""Declared memory against measured: the figures of some runs of a capability, and the rune that they propose. Pure.

What is proposed, of the peaks that count (in MiB):

    SOFT    the 95th percentile times `HEAD_ROOM`, rounded up, so that the reservation covers nearly every call
    HARD    `HARD_FACTOR` times the largest peak, rounded up; more than the HARD that a run was ended at
    VOL     by the spread, the 95th percentile over the median: LOW up to `STEADY`, MED up to `WAVERING`, else HIGH

Everything else stays as it is declared. Rounding goes up to a multiple of a power of two, by an eighth at most; SOFT is
never below `LEAST_SOFT_MB` nor HARD below `LEAST_HARD_MB`, since less than that saves nothing and ends a program that
loads one more library.

A HARD below the declared one has to be tried: the kernel's backstop (RLIMIT_DATA, 2 x HARD) counts what a program maps
and never touches, as the stacks of its threads, which is in no peak.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from bus import runes
from bus.needs import LEARNED, quantile
from runners.base import Code

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from bus.course import Answer
    from bus.runes import MemoryProfile, Volatility

HEAD_ROOM = 1.1
HARD_FACTOR = 2.0
LEAST_SOFT_MB, LEAST_HARD_MB = 8, 64
STEADY, WAVERING = 1.1, 1.5
FINENESS = 8
"""Figures are rounded up by one part in so many at most."""

TRIED = 3
"""How many payloads a lower HARD is tried with at most, those with the largest peaks."""

LACKING = "It may have run out of memory"
"""How the hint begins (of `runners.output.with_hint`) on a program that failed since it was given no more memory."""

BARS = 10
BAR_LEAST_MB = 0.1
"""How wide a bar of the histogram is at least: below that it would show noise."""

BAR_CHARS = 40
_BAR, _THIN = "█", "▏"

Row = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """One call. `payload` is the number of its payload, from 1; `replied` whether the overlay itself had its say.

    `is_limited` is whether it was ended, or failed, since its HARD gave it no more memory. `run_ms` is without the time
    in the queue. `applied` are the degradation steps that were in force.
    """

    payload: int
    phase: str | None
    seq: int | None
    code: str
    replied: bool
    is_limited: bool
    error: str | None
    peak_mb: float | None
    floor_mb: float | None
    run_ms: float
    cpu_ms: float | None
    applied: tuple[str, ...]

    @classmethod
    def of(cls, answer: Answer, payload: int) -> Self:
        body, record, memory = answer.body, answer.record or {}, answer.body["memory"] or {}
        return cls(
            payload=payload,
            phase=body["phase"],
            seq=record.get("seq"),
            code=body["code"],
            replied=answer.http_status == 200,  # noqa: PLR2004  # an overlay's own `ok: false` is one, too
            is_limited=body["code"] == Code.MEMORY_LIMIT or str(body["hint"]).startswith(LACKING),
            error=body["error"],
            peak_mb=memory.get("peak_mb"),
            floor_mb=memory.get("peak_floor_mb"),
            run_ms=round(body["duration_ms"] - (body["queue_ms"] or 0), 3),
            cpu_ms=record.get("cpu_ms"),
            applied=tuple(memory.get("applied", ())),
        )


def counted(declared: MemoryProfile, runs: Iterable[Run]) -> list[float]:
    """The peaks that a proposal is made from: of runs that came to their end, or for which the HARD was too low.

    Such a one counts with that HARD at least, as it would have needed more. Degraded runs count only where all were; a
    run that failed otherwise might have needed more, and nobody knows how much.
    """
    whole = [run for run in runs if run.peak_mb is not None and (run.replied or run.is_limited)]
    return [_needed_mb(declared, run) for run in [run for run in whole if not run.applied] or whole]


def _needed_mb(declared: MemoryProfile, run: Run) -> float:
    """What is known that it needed, at least."""
    return max(_peak_mb(run), declared.hard_mb) if run.is_limited else _peak_mb(run)


def _peak_mb(run: Run) -> float:
    return run.peak_mb or 0.0


def proposal(declared: MemoryProfile, runs: Sequence[Run]) -> MemoryProfile | None:
    """The declared profile with SOFT, HARD and VOL by these runs; None where none of them counts."""
    peaks = counted(declared, runs)
    if not peaks:
        return None
    soft_mb = max(LEAST_SOFT_MB, _rounded_up(HEAD_ROOM * quantile(peaks)))
    most_mb = max(_needed_mb(declared, run) for run in runs)
    hard_mb = max(LEAST_HARD_MB, soft_mb, _rounded_up(HARD_FACTOR * most_mb))
    return replace(declared, soft_mb=soft_mb, hard_mb=hard_mb, volatility=_volatility(peaks), name=None)


def lower_hards(declared: MemoryProfile, proposed: MemoryProfile) -> Iterator[MemoryProfile]:
    """What is to be tried in turn until the runs end as they did: the proposed HARD, twice that, and so on.

    All are below the declared HARD; under that the runs did end so. None where HARD is not lowered.
    """
    hard_mb = proposed.hard_mb
    while hard_mb < declared.hard_mb:
        yield replace(proposed, hard_mb=hard_mb)
        hard_mb *= 2


def to_try(runs: Iterable[Run]) -> list[Run]:
    """Those that a lower HARD is tried with: of each payload the largest that the overlay replied to."""
    whole = (run for run in runs if run.replied and not run.is_limited and run.peak_mb is not None)
    measured = sorted(whole, key=_peak_mb)
    by_payload = {run.payload: run for run in measured}
    return sorted(by_payload.values(), key=_peak_mb)[-TRIED:]


def _rounded_up(mb: float) -> int:
    """To a multiple of a power of two that is an eighth of the figure or less."""
    step = 1 << max(0, math.floor(math.log2(max(1.0, mb) / FINENESS)))
    return min(runes.MAX_MB, math.ceil(mb / step) * step)


def _volatility(peaks: Sequence[float]) -> Volatility:
    spread = _spread(peaks)
    if spread <= STEADY:
        return "LOW"
    return "MED" if spread <= WAVERING else "HIGH"


def _spread(peaks: Sequence[float]) -> float:
    return quantile(peaks) / max(median(peaks), 1e-3)


# --- For people and programs -------------------------------------------------------------------------------------


def report(
    declared: MemoryProfile, runs: Sequence[Run], proposed: MemoryProfile | None, too_low_mb: Sequence[int] = ()
) -> dict[str, Any]:
    """All figures, as JSON: memory in MiB, times in milliseconds; null where nothing was measured.

    `too_low_mb` are the HARDs that were tried and under which runs did not end as they had.
    """
    peaks = counted(declared, runs)
    return {
        "runs": len(runs),
        "counted": len(peaks),
        "declared": _rune_as_json(declared),
        "measured": {
            "peak_mb": _figures(peaks),
            "spread": round(_spread(peaks), 3) if peaks else None,
            "floor_mb": _figures(run.floor_mb for run in runs),
            "run_ms": _figures(run.run_ms for run in runs if run.replied),
            "cpu_ms": _figures(run.cpu_ms for run in runs if run.replied),
        },
        "histogram": histogram(peaks),
        "failures": _failures(runs),
        "degraded": sum(bool(run.applied) for run in runs),
        "too_low_mb": list(too_low_mb),
        "notes": [*_notes(declared, runs, peaks), *_notes_on_hard(too_low_mb)],
        "proposed": None if proposed is None else _rune_as_json(proposed),
        "calls": [asdict(run) for run in runs],
    }


def _rune_as_json(profile: MemoryProfile) -> dict[str, Any]:
    return {
        "profile": profile.name,
        "rune": runes.format(profile),
        "soft_mb": profile.soft_mb,
        "hard_mb": profile.hard_mb,
        "volatility": profile.volatility,
    }


def _figures(figures: Iterable[float | None]) -> dict[str, float] | None:
    known = [figure for figure in figures if figure is not None]
    if not known:
        return None
    named = {"least": min(known), "median": median(known), "p95": quantile(known), "most": max(known)}
    return {name: round(float(figure), 3) for name, figure in named.items()}


def histogram(peaks_mb: Sequence[float]) -> list[dict[str, float]]:
    """`BARS` bars of one width, as `{from_mb, to_mb, runs}`; empty without figures. The last has its upper bound."""
    if not peaks_mb:
        return []
    low = min(peaks_mb)
    width = max(BAR_LEAST_MB, (max(peaks_mb) - low) / BARS)
    runs = Counter(min(BARS - 1, int((peak - low) / width)) for peak in peaks_mb)
    edges = [round(low + n * width, 3) for n in range(BARS + 1)]
    edges[-1] = max(edges[-1], round(max(peaks_mb), 3))
    return [{"from_mb": edges[n], "to_mb": edges[n + 1], "runs": runs[n]} for n in range(BARS)]


def chart(bars: Sequence[Mapping[str, float]], marks: Mapping[str, float]) -> list[Row]:
    """A histogram as rows of text: the range in MiB, a bar, how many runs, what is marked there.

    A mark outside of the bars has a row of its own, with its figure alone.
    """
    if not bars:
        return []
    most = max(bar["runs"] for bar in bars)
    low, high = bars[0]["from_mb"], bars[-1]["to_mb"]
    within: dict[int, list[str]] = {}
    for name, mb in marks.items():
        if low <= mb <= high:
            place = next((n for n, bar in enumerate(bars) if mb < bar["to_mb"]), len(bars) - 1)
            within.setdefault(place, []).append(name)
    rows = [
        (f"{bar['from_mb']:,.1f} to {bar['to_mb']:,.1f}", _bar(bar["runs"], most), f"{bar['runs']:.0f}", named)
        for n, bar in enumerate(bars)
        for named in (", ".join(within.get(n, ())),)
    ]
    beside = sorted((mb, name) for name, mb in marks.items() if not low <= mb <= high)
    below, above = ([(f"{mb:,.10g}", "", "", name) for mb, name in beside if (mb < low) is it] for it in (True, False))
    return [*below, *rows, *above]


def _bar(runs: float, most: float) -> str:
    return _BAR * round(BAR_CHARS * runs / most) or (_THIN if runs else "")


def _failures(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """What failed, by its code, the most frequent first: how many, and what the first of them said."""
    failed = [run for run in runs if run.code != Code.OK]
    first = {run.code: run.error for run in reversed(failed)}
    counts = Counter(run.code for run in failed).most_common()
    return [{"code": code, "runs": count, "error": first[code]} for code, count in counts]


def _notes(declared: MemoryProfile, runs: Sequence[Run], peaks: Sequence[float]) -> Iterable[str]:
    """What to know before the figures are believed."""
    limited, degraded = (sum(map(is_so, runs)) for is_so in (lambda run: run.is_limited, lambda run: bool(run.applied)))
    if limited:
        ended = f"{_count(limited, 'run', 'runs')} had too little with the HARD of {declared.hard_mb} MiB"
        yield f"{ended}, and counted as if that had been enough: take the proposed HARD for a try, and measure again"
    if degraded:
        some = f"memory is short: {_count(degraded, 'run was', 'runs were')} degraded"
        yield f"{some}, and counted only where all were; measure again under less stress"
    if 0 < len(peaks) < LEARNED:
        yield f"{_count(len(peaks), 'run counts', 'runs count')}: from {LEARNED} on the figures say something"


def _notes_on_hard(too_low_mb: Sequence[int]) -> Iterable[str]:
    if too_low_mb:
        tried = ", ".join(map(str, too_low_mb))
        why = "what it maps and never touches counts for the kernel's backstop of 2 x HARD"
        yield f"with a HARD of {tried} MiB runs did not end as before, though their peaks are below: {why}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
