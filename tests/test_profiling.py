"""The figures of some runs, the rune that they propose, and the histogram as text."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import runes
from bus.needs import LEARNED, quantile, verdict
from bus.profiling import (
    BAR_CHARS,
    BARS,
    LEAST_HARD_MB,
    LEAST_SOFT_MB,
    TRIED,
    Run,
    chart,
    counted,
    histogram,
    lower_hards,
    proposal,
    report,
    to_try,
)

DECLARED = runes.parse(
    "MEM[SOFT=512,HARD=1024,VOL=MED];KV[CAP=0.2,POLICY=LRU,PURGE=ON_EVENT];TIER=COLD;PRIORITY=8;DEGRADE{STEP1:CONTEXT(64)}"
)


def a_run(peak_mb: float | None = 20.0, code: str = "OK", **members: Any) -> Run:
    values: dict[str, Any] = {
        "payload": 1,
        "phase": "CLEAR",
        "seq": 1,
        "code": code,
        "replied": code in {"OK", "ERR_OVERLAY_FAILED"},
        "is_limited": code == "ERR_MEMORY_LIMIT",
        "error": None if code == "OK" else f"it was {code}",
        "floor_mb": 9.0,
        "run_ms": 5.0,
        "cpu_ms": 2.0,
        "applied": (),
    }
    return Run(peak_mb=peak_mb, **values | members)


def proposed(*runs: Run) -> runes.MemoryProfile:
    found = proposal(DECLARED, runs)
    assert found is not None
    return found


peaks = st.lists(st.floats(0.8, 10**6), min_size=1, max_size=60)


# --- The proposal ------------------------------------------------------------------------------------------------


@given(peaks)
def test_a_proposal_is_a_rune_that_covers_what_was_measured_and_keeps_the_rest(peaks_mb: list[float]) -> None:
    found = proposed(*map(a_run, peaks_mb))
    assert runes.parse(runes.format(found)) == found
    assert found.hard_mb >= found.soft_mb >= median(peaks_mb)
    assert found.soft_mb >= quantile(peaks_mb)
    assert found.hard_mb >= 2 * max(peaks_mb)
    assert replace(found, soft_mb=512, hard_mb=1024, volatility="MED") == DECLARED


@given(peaks)
def test_a_proposal_wastes_little(peaks_mb: list[float]) -> None:
    found = proposed(*map(a_run, peaks_mb))
    assert found.soft_mb <= max(LEAST_SOFT_MB, math.ceil(1.1 * 1.125 * quantile(peaks_mb)) + 1)
    assert found.hard_mb <= max(LEAST_HARD_MB, math.ceil(2 * 1.125 * max(peaks_mb)) + 1)


@given(st.lists(st.floats(0.8, 10**6), min_size=LEARNED, max_size=60))
def test_who_takes_a_proposal_hears_of_no_finding(peaks_mb: list[float]) -> None:
    assert verdict(peaks_mb, proposed(*map(a_run, peaks_mb)).soft_mb) is None


def test_memory_beyond_what_a_rune_can_say_is_proposed_as_the_most_it_can() -> None:
    found = proposed(a_run(1e12))
    assert (found.soft_mb, found.hard_mb) == (runes.MAX_MB, runes.MAX_MB)


@pytest.mark.parametrize(
    ("peaks_mb", "rune"),
    [
        ([9.0, 9.1], "MEM[SOFT=11,HARD=64,VOL=LOW]"),
        ([1.0], "MEM[SOFT=8,HARD=64,VOL=LOW]"),
        ([100.0], "MEM[SOFT=112,HARD=208,VOL=LOW]"),
        ([100.0, 100.0, 140.0], "MEM[SOFT=160,HARD=288,VOL=MED]"),
        ([100.0, 100.0, 160.0], "MEM[SOFT=176,HARD=320,VOL=HIGH]"),
        ([1000.0] * 20 + [1800.0], "MEM[SOFT=1152,HARD=3840,VOL=LOW]"),
    ],
)
def test_figures_have_head_room_and_are_round(peaks_mb: list[float], rune: str) -> None:
    assert runes.format(proposed(*map(a_run, peaks_mb))).split(";")[0] == rune


def test_a_run_that_was_ended_at_its_hard_raises_it() -> None:
    for code in ("ERR_MEMORY_LIMIT", "ERR_OVERLAY_CRASH"):
        found = proposed(a_run(30.0), a_run(70.0, code, is_limited=True))
        assert found.hard_mb == 2 * DECLARED.hard_mb  # though its peak was last seen below
        assert found.soft_mb >= DECLARED.hard_mb


def test_a_run_that_failed_does_not_bring_the_proposal_down_and_may_raise_its_hard() -> None:
    runs = [a_run(300.0), a_run(2.0, "ERR_OVERLAY_CRASH"), a_run(450.0, "ERR_TIMEOUT"), a_run(None)]
    assert counted(DECLARED, runs) == [300.0]
    assert proposed(*runs).hard_mb >= 900
    assert proposal(DECLARED, [a_run(300.0, "ERR_TIMEOUT"), a_run(None)]) is None
    assert counted(DECLARED, [a_run(4.0, "ERR_OVERLAY_FAILED")]) == [4.0]


def test_degraded_runs_count_only_where_all_were() -> None:
    degraded = a_run(5.0, applied=("CONTEXT(64)",))
    assert counted(DECLARED, [a_run(20.0), degraded]) == [20.0]
    assert counted(DECLARED, [degraded]) == [5.0]


# --- A lower HARD ------------------------------------------------------------------------------------------------


def test_a_lower_hard_is_tried_up_to_the_declared_one() -> None:
    tried = [profile.hard_mb for profile in lower_hards(DECLARED, replace(DECLARED, soft_mb=16, hard_mb=192))]
    assert tried == [192, 384, 768]
    assert list(lower_hards(DECLARED, replace(DECLARED, hard_mb=1024))) == []


def test_it_is_tried_with_the_largest_run_of_each_payload_that_the_overlay_replied_to() -> None:
    runs = [a_run(float(10 * n + m), payload=n) for m in range(2) for n in range(1, TRIED + 3)]
    runs += [a_run(900.0, "ERR_MEMORY_LIMIT", payload=20), a_run(None, payload=21)]
    assert [(run.payload, run.peak_mb) for run in to_try(runs)] == [(3, 31), (4, 41), (5, 51)]


# --- The histogram -----------------------------------------------------------------------------------------------


@given(peaks)
def test_every_run_stands_in_one_bar(peaks_mb: list[float]) -> None:
    bars = histogram(peaks_mb)
    assert len(bars) == BARS
    assert sum(bar["runs"] for bar in bars) == len(peaks_mb)
    assert bars[0]["from_mb"] <= round(min(peaks_mb), 3)
    assert round(max(peaks_mb), 3) <= bars[-1]["to_mb"]


@given(peaks, st.integers(1, 10**6), st.integers(1, 10**6))
def test_every_mark_stands_in_the_chart_once(peaks_mb: list[float], soft_mb: int, hard_mb: int) -> None:
    marks = {"median": round(median(peaks_mb), 3), "most": round(max(peaks_mb), 3), "SOFT": soft_mb, "HARD": hard_mb}
    rows = chart(histogram(peaks_mb), marks)
    assert sorted(name for row in rows for name in row[3].split(", ") if name) == sorted(marks)
    assert max(len(row[1]) for row in rows) == BAR_CHARS


def test_the_chart_is_text_with_its_marks_in_their_place() -> None:
    peaks_mb = [10.0] * 80 + [12.0] * 20 + [20.0]
    rows = chart(histogram(peaks_mb), {"median": 10.0, "p95": 12.0, "most": 20.0, "SOFT": 4, "HARD": 2048})
    assert rows[:4] == [
        ("4", "", "", "SOFT"),
        ("10.0 to 11.0", "█" * 40, "80", "median"),
        ("11.0 to 12.0", "", "0", ""),
        ("12.0 to 13.0", "█" * 10, "20", "p95"),
    ]
    assert rows[-2:] == [("19.0 to 20.0", "▏", "1", "most"), ("2,048", "", "", "HARD")]
    assert len(rows) == 12


def test_nothing_measured_is_no_chart() -> None:
    assert chart(histogram([]), {"SOFT": 4}) == []


# --- The report --------------------------------------------------------------------------------------------------


def test_failures_are_told_apart_with_what_the_first_said() -> None:
    runs = [a_run(), a_run(code="ERR_TIMEOUT", error="a"), a_run(code="ERR_TIMEOUT", error="b"), a_run(code="ERR_X")]
    assert report(DECLARED, runs, None)["failures"] == [
        {"code": "ERR_TIMEOUT", "runs": 2, "error": "a"},
        {"code": "ERR_X", "runs": 1, "error": "it was ERR_X"},
    ]


def test_figures_are_of_runs_that_the_overlay_replied_to() -> None:
    told = report(DECLARED, [a_run(run_ms=4.0), a_run(run_ms=6.0), a_run(None, "ERR_TIMEOUT", run_ms=900.0)], None)
    assert told["measured"]["run_ms"] == {"least": 4, "median": 5, "p95": 6, "most": 6}
    assert (told["runs"], told["counted"], told["proposed"]) == (3, 2, None)


def test_what_makes_the_figures_doubtful_is_said() -> None:
    told = report(DECLARED, [a_run(code="ERR_MEMORY_LIMIT"), a_run(applied=("CONTEXT(64)",))], DECLARED, [64, 128])
    limited, degraded, few, too_low = told["notes"]
    assert limited.startswith("1 run had too little with the HARD of 1024 MiB")
    assert degraded.startswith("memory is short: 1 run was degraded")
    assert few.startswith("1 run counts")
    assert too_low.startswith("with a HARD of 64, 128 MiB runs did not end as before")
    assert report(DECLARED, [a_run()] * LEARNED, DECLARED)["notes"] == []
