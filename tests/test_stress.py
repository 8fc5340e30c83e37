"""The stress signal: its formulas, its bands, its sources, and what is free."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bus import stress
from bus.memory import MIB, Reading, Room
from bus.stress import HYSTERESIS, StressMonitor, band_after
from bus.stress_sources import STALE_S, PluggedSource
from tests.support import misfits, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from typing import Any

    from bus.stress import Band
    from bus.stress_sources import Source

BANDS = ("LOW", "MODERATE", "HIGH", "CRITICAL")
BOUNDS = (0.25, 0.5, 0.75)


def idle() -> Reading:
    """A machine of 8000 MiB that uses nothing, of which we may have 4000."""
    return Reading((Room(8000 * MIB, 0, "machine"), Room(4000 * MIB, 0, "cgroup /a")))


def a_monitor(sources: Mapping[str, Source] | None = None, **options: Any) -> StressMonitor:
    return StressMonitor(sources or {}, **{"read": idle} | options)


def used(*shares: float) -> Callable[[], Reading]:
    """Readings of a machine, of which so much is used."""
    return iter([Reading((Room(1000 * MIB, int(share * 1000) * MIB, "machine"),)) for share in shares]).__next__


@contextlib.asynccontextmanager
async def running(monitor: StressMonitor, on_sample: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
    task = asyncio.create_task(monitor.run(0.0, on_sample))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, 0.0), (0.3, 0.15), (0.6, 0.3), (0.775, 0.65), (0.95, 1.0), (0.99, 1.0), (1.5, 1.0)],
)
def test_stress_rises_gently_at_first_and_steeply_then(share: float, expected: float) -> None:
    assert stress.stress_of_share(share) == pytest.approx(expected)


@pytest.mark.parametrize(("waiting", "expected"), [(0.0, 0.0), (10.0, 0.25), (40.0, 1.0), (95.5, 1.0), (None, None)])
def test_pressure_counts_in_full_where_some_task_waits_two_fifths_of_the_time(
    waiting: float | None, expected: float | None
) -> None:
    assert stress.pressure_stress(waiting) == expected


def replayed(*values: float) -> Callable[[], float]:
    return iter(values).__next__


def test_there_is_no_stress_before_a_sample() -> None:
    monitor = a_monitor({"fixed": lambda: 1.0})
    assert (monitor.value, monitor.band, monitor.sampled) == (0.0, "LOW", 0)


def test_a_single_sample_decides_nothing() -> None:
    monitor = a_monitor({"spiky": replayed(1.0, 0.1, 0.1, 1.0, 0.1)})
    assert [monitor.sample() for _ in range(5)] == [0.0, 0.0, 0.1, pytest.approx(0.55), 0.1]


def test_priming_takes_what_the_signal_needs_and_no_more() -> None:
    monitor = a_monitor({"rising": replayed(0.1, 0.2, 0.3)})
    monitor.prime()
    monitor.prime()
    assert (monitor.value, monitor.sampled) == (0.2, 3)


def test_the_largest_source_counts_and_a_silent_one_does_not() -> None:
    monitor = a_monitor({"low": lambda: 0.2, "high": lambda: 0.6, "silent": lambda: None})
    monitor.prime()
    assert monitor.value == 0.6


def test_memory_and_pressure_are_sources_of_its_own() -> None:
    monitor = StressMonitor({}, read=lambda: Reading((Room(100, 60, "machine"),), waiting=30.0))
    monitor.prime()
    assert monitor.report()["sources"] == {"memory": 0.3, "pressure": 0.75}
    assert monitor.value == 0.75


def test_a_source_of_the_name_of_an_own_one_takes_its_place() -> None:
    monitor = StressMonitor(
        {"memory": lambda: 0.1, "pressure": lambda: None}, read=lambda: Reading((Room(100, 100, "machine"),), 90.0)
    )
    monitor.prime()
    assert monitor.report()["sources"] == {"memory": 0.1, "pressure": None}
    assert monitor.value == 0.1


def test_old_samples_leave_the_window() -> None:
    monitor = a_monitor({"falling": replayed(*[0.9] * 5, *[0.1] * 3)})
    for _ in range(8):
        monitor.sample()
    assert monitor.value == 0.1


@pytest.mark.parametrize(
    ("value", "band"),
    [
        (0.0, "LOW"),
        (0.249, "LOW"),
        (0.25, "MODERATE"),
        (0.5, "HIGH"),
        (0.749, "HIGH"),
        (0.75, "CRITICAL"),
        (1.0, "CRITICAL"),
    ],
)
def test_bands_are_entered_at_their_bound(value: float, band: str) -> None:
    monitor = a_monitor({"fixed": lambda: value})
    monitor.prime()
    assert (monitor.band, monitor.changed) == (band, band != "LOW")
    monitor.sample()
    assert not monitor.changed


@given(before=st.sampled_from(BANDS), value=st.floats(0, 1))
@example(before="MODERATE", value=0.2)
@example(before="HIGH", value=0.45)
@example(before="CRITICAL", value=0.7)
@example(before="CRITICAL", value=0.0)
@example(before="LOW", value=1.0)
def test_a_band_is_entered_at_its_bound_and_left_only_well_below_it(before: Band, value: float) -> None:
    after = BANDS.index(band_after(before, value))
    rank = BANDS.index(before)
    if after > rank:  # by as many as the value has reached
        assert BOUNDS[after - 1] <= value
        assert all(value < bound for bound in BOUNDS[after:])
    else:  # each that was left is one that the value is well below; that which stays is not
        assert all(value < bound - HYSTERESIS for bound in BOUNDS[after:rank])
        assert after == 0 or value >= BOUNDS[after - 1] - HYSTERESIS - 1e-9
        assert all(value < bound for bound in BOUNDS[rank:])


@given(
    bound=st.sampled_from(BOUNDS),
    around=st.lists(st.floats(-HYSTERESIS + 1e-6, HYSTERESIS), min_size=2),
    start=st.sampled_from(BANDS),
)
def test_a_value_that_trembles_about_a_bound_changes_the_band_once_and_never_back(
    bound: float, around: list[float], start: Band
) -> None:
    bands = [band_after(start, bound + around[0])]
    for offset in around[1:]:
        bands.append(band_after(bands[-1], bound + offset))
    ranks = [BANDS.index(band) for band in bands]
    assert ranks == sorted(ranks)


def test_the_monitors_band_does_not_flutter_and_says_when_it_changes() -> None:
    monitor = a_monitor({"trembling": replayed(0.5, 0.46, 0.45, 0.449, 0.49, 0.5)}, window=1)
    seen = [(monitor.sample(), monitor.band, monitor.changed)[1:] for _ in range(6)]
    assert seen == [
        ("HIGH", True),
        ("HIGH", False),
        ("HIGH", False),
        ("MODERATE", True),
        ("MODERATE", False),
        ("HIGH", True),
    ]


@pytest.mark.parametrize(("given_", "counted"), [(7.0, 1.0), (-3.0, 0.0), (math.inf, 1.0), (math.nan, 0.0)])
def test_a_value_out_of_range_is_bent_into_it(given_: float, counted: float) -> None:
    monitor = a_monitor({"wild": lambda: given_})
    monitor.prime()
    assert monitor.value == counted


def test_a_source_that_fails_is_logged_once_and_the_others_count(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> float:
        raise RuntimeError("no sensor")

    monitor = a_monitor({"broken": broken, "sound": lambda: 0.4})
    with caplog.at_level(logging.ERROR):
        monitor.prime()
    assert monitor.value == 0.4
    assert monitor.report()["sources"] == {"memory": 0.0, "pressure": None, "broken": None, "sound": 0.4}
    assert [record.getMessage() for record in caplog.records] == [
        "the stress source 'broken' failed and does not count; further failures are not logged"
    ]
    assert "no sensor" in caplog.text


async def test_a_source_that_blocks_stalls_neither_the_loop_nor_the_other_sources() -> None:
    release, asked = threading.Event(), 0

    def blocking() -> float:
        nonlocal asked
        asked += 1
        release.wait()
        return 0.9

    monitor = a_monitor({"blocking": blocking, "sound": lambda: 0.4}, answer_s=0.0)
    try:
        async with running(monitor):
            await until(lambda: monitor.value == 0.4)
            assert monitor.report()["sources"]["blocking"] is None
            assert asked == 1
            release.set()
            await until(lambda: monitor.value == 0.9)
    finally:
        release.set()


def test_the_last_answer_of_a_source_counts_until_it_has_been_waited_for_too_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now, release = 0.0, threading.Event()
    answers = iter([lambda: True, release.wait])

    def read() -> float:
        next(answers)()
        return 0.5

    source = PluggedSource("slow", read, clock=lambda: now)
    source.ask()
    source.wait(20.0)
    source.ask()
    try:
        now = STALE_S
        assert source.value == 0.5
        now = STALE_S + 0.1
        assert source.value is None
        assert source.value is None
        assert [record.getMessage() for record in caplog.records] == [
            "the stress source 'slow' takes too long to answer and does not count; this is not logged again"
        ]
    finally:
        release.set()
    source.wait(20.0)
    assert source.value == 0.5


def test_a_source_that_gets_no_thread_does_not_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("can't start new thread")

    source = PluggedSource("poor", lambda: 0.5)
    monkeypatch.setattr(threading.Thread, "start", fail)
    source.ask()
    source.wait(0.0)
    assert source.value is None
    assert "could not be asked" in caplog.text


def test_what_is_free_is_the_least_of_all_rooms_and_further_ones_count_as_the_kernels_do() -> None:
    further = [Room(3000 * MIB, 500 * MIB, "budget"), Room(5000 * MIB, 4900 * MIB)]
    monitor = a_monitor(rooms=lambda: further)
    monitor.prime()
    assert (monitor.free_mb, monitor.total_mb) == (100.0, 3000)
    assert monitor.report()["sources"]["memory"] == 1.0
    further[:] = [Room(3000 * MIB, 3500 * MIB, "budget")]
    monitor.sample()
    assert monitor.free_mb == 0
    further[:] = []
    monitor.sample()
    assert (monitor.free_mb, monitor.total_mb) == (4000.0, 4000)


def test_priming_says_what_is_free() -> None:
    monitor = StressMonitor({}, read=used(0.5, 0.5, 0.75))
    monitor.prime()
    assert (monitor.free_mb, monitor.total_mb, monitor.sampled) == (250.0, 1000, 3)


def test_one_sample_reads_the_kernels_files_once() -> None:
    monitor = StressMonitor({}, read=used(0.1, 0.2))
    monitor.sample()
    monitor.report()
    monitor.sample()
    assert monitor.free_mb == 800.0


def test_where_the_kernel_cannot_be_read_the_last_reading_counts(caplog: pytest.LogCaptureFixture) -> None:
    monitor = StressMonitor({}, read=used(0.6, 0.6, 0.6))  # and no more
    for _ in range(5):
        monitor.sample()
    assert (monitor.value, monitor.free_mb) == (0.3, 400.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the kernel's files cannot be read for the stress; further failures are not logged"
    ]


def test_where_nothing_is_known_of_memory_nothing_is_held_against_anybody() -> None:
    monitor = StressMonitor({}, read=used())
    monitor.prime()
    assert (monitor.value, monitor.free_mb, monitor.total_mb) == (0.0, math.inf, 0)
    assert misfits("stress", monitor.report()) == []


def test_further_rooms_that_fail_keep_the_signal_alive() -> None:
    def failing() -> Iterable[Room]:
        raise ZeroDivisionError

    monitor = a_monitor({"sound": lambda: 0.4}, rooms=failing)
    monitor.prime()
    assert (monitor.value, monitor.free_mb) == (0.4, 4000.0)


def test_the_report_shows_the_signal_its_sources_and_the_rooms() -> None:
    rooms = Room(8000 * MIB, 2000 * MIB, "machine"), Room(4000 * MIB, 1000 * MIB, "cgroup /a")
    monitor = StressMonitor({"gpu": lambda: 0.61239}, read=lambda: Reading(rooms))
    monitor.prime()
    report = monitor.report()
    assert report | {"timestamp_ms": 0, "thresholds": {}} == {
        "timestamp_ms": 0,
        "sampled": 3,
        "stress": 0.612,
        "band": "HIGH",
        "changed": True,
        "sources": {"memory": 0.125, "pressure": None, "gpu": 0.612},
        "free_mb": 3000.0,
        "total_mb": 4000,
        "rooms": [
            {"name": "machine", "total_mb": 8000, "used_mb": 2000},
            {"name": "cgroup /a", "total_mb": 4000, "used_mb": 1000},
        ],
        "machine": {"total_mb": 8000, "used_mb": 2000, "limit_mb": 4000, "limit_used_mb": 1000},
        "thresholds": {},
    }
    assert report["thresholds"]["HIGH"] == {"entered_at": 0.5, "left_below": 0.45}
    assert misfits("stress", report) == []


def test_the_history_reaches_two_minutes_back_and_is_small_however_often_it_samples() -> None:
    now = 0.0
    monitor = a_monitor(clock=lambda: now)
    for _ in range(2000):
        monitor.sample()
        now += 0.25
    found = monitor.history()
    assert len(found) == stress.HISTORY
    assert set(found[0]) == {"timestamp_ms", "stress", "band", "free_mb"}
    assert misfits("stress", monitor.report() | {"history": found}) == []


def test_the_history_forgets_what_is_older_than_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "time_ns", lambda: int(now * 1e9))
    monitor = a_monitor(clock=lambda: now)
    for _ in range(10):
        monitor.sample()
        now += 50
    assert [point["timestamp_ms"] for point in monitor.history()] == [350_000, 400_000, 450_000]


async def test_it_samples_until_cancelled_and_tells_of_each_sample() -> None:
    monitor, told = a_monitor(), []
    async with running(monitor, lambda: told.append(monitor.sampled)):
        await until(lambda: len(told) >= 3)
    assert told[:3] == [4, 5, 6]
    after = monitor.sampled
    await asyncio.sleep(0)
    assert monitor.sampled == after


async def test_a_listener_that_fails_does_not_end_the_sampling(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> None:
        raise ZeroDivisionError

    monitor = a_monitor()
    async with running(monitor, failing):
        await until(lambda: monitor.sampled >= 6)
    assert "ZeroDivisionError" in caplog.text
