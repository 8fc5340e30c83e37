from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

import pytest

from bus import stress
from bus.stress import MachineMemory, StressMonitor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIB_KB = 2**20
MIB = 2**20


class Kernel:
    """A tree of files as the kernel shows them."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.cgroups = folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "pressure").mkdir()
        self.cgroups.mkdir()

    def machine(self, total_kb: int, available_kb: int) -> None:
        text = f"MemTotal: {total_kb} kB\nMemFree: 1 kB\nMemAvailable: {available_kb} kB\nHugePages_Total: 0\n"
        (self.proc / "meminfo").write_text(text)

    def own_cgroup(self, name: str) -> None:
        (self.proc / "self" / "cgroup").write_text(f"4:memory:/other\n0::{name}\n")

    def cgroup(self, name: str, limit: str, current: int, cache: int = 0) -> None:
        folder = self.cgroups / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text(f"anon 5\nactive_file {cache // 2}\ninactive_file {cache - cache // 2}\n")

    def pressure(self, avg10: str) -> None:
        text = f"some avg10={avg10} avg60=99.00 avg300=99.00 total=1\nfull avg10=98.00 avg60=0 avg300=0 total=0\n"
        (self.proc / "pressure" / "memory").write_text(text)

    def memory_stress(self) -> float:
        return stress.memory_stress(self.proc, self.cgroups)

    def read(self) -> MachineMemory:
        return stress.read_machine(self.proc, self.cgroups)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path)
    kernel.machine(8 * GIB_KB, 4 * GIB_KB)
    return kernel


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, 0.0), (0.3, 0.15), (0.6, 0.3), (0.775, 0.65), (0.95, 1.0), (0.99, 1.0), (1.5, 1.0)],
)
def test_stress_rises_gently_at_first_and_steeply_then(share: float, expected: float) -> None:
    assert stress.stress_of_share(share) == pytest.approx(expected)


def test_without_a_cgroup_the_machine_decides(kernel: Kernel) -> None:
    assert kernel.memory_stress() == pytest.approx(0.25)
    assert kernel.read() == MachineMemory(8192, 4096)


def test_page_cache_of_a_cgroup_does_not_count(kernel: Kernel) -> None:
    kernel.own_cgroup("/a")
    kernel.cgroup("a", str(1000 * MIB), 900 * MIB, cache=300 * MIB)
    assert kernel.memory_stress() == pytest.approx(0.3)
    assert kernel.read() == MachineMemory(8192, 4096, 1000, 600)


def test_the_limit_of_a_cgroup_above_ours_counts(kernel: Kernel) -> None:
    kernel.own_cgroup("/a/b")
    kernel.cgroup("a/b", "max", 1)
    kernel.cgroup("a", str(1000 * MIB), 950 * MIB)
    assert kernel.memory_stress() == pytest.approx(1.0)


def test_the_limit_at_the_root_of_a_containers_mount_counts(kernel: Kernel) -> None:
    kernel.own_cgroup("/runtime/a-name-outside")
    kernel.cgroup("", str(1000 * MIB), 950 * MIB)
    assert kernel.memory_stress() == pytest.approx(1.0)


def test_the_fullest_bound_decides_and_the_smallest_is_shown(kernel: Kernel) -> None:
    kernel.own_cgroup("/a/b")
    kernel.cgroup("a/b", str(1000 * MIB), 100 * MIB)
    kernel.cgroup("a", str(2000 * MIB), 1900 * MIB)
    assert kernel.memory_stress() == pytest.approx(1.0)
    assert kernel.read().usable_mb == 1000


def test_a_full_machine_counts_though_our_cgroup_has_room(kernel: Kernel) -> None:
    kernel.machine(8 * GIB_KB, 0)
    kernel.own_cgroup("/a")
    kernel.cgroup("a", str(1000 * MIB), 1 * MIB)
    assert kernel.memory_stress() == 1.0


def test_a_limit_above_the_machines_memory_is_none(kernel: Kernel) -> None:
    kernel.own_cgroup("/a")
    kernel.cgroup("a", str(2**60), 2**60)
    assert kernel.memory_stress() == pytest.approx(0.25)
    assert kernel.read().limit_mb is None


@pytest.mark.parametrize("name", ["/gone", "/../outside", "/"])
def test_a_cgroup_that_cannot_be_seen_is_left_out(kernel: Kernel, name: str) -> None:
    kernel.own_cgroup(name)
    assert kernel.memory_stress() == pytest.approx(0.25)


@pytest.mark.parametrize(("avg10", "expected"), [("0.00", 0.0), ("10.00", 0.25), ("40.00", 1.0), ("95.50", 1.0)])
def test_pressure_is_the_share_of_time_that_some_task_waited(kernel: Kernel, avg10: str, expected: float) -> None:
    kernel.pressure(avg10)
    assert stress.pressure_stress(kernel.proc) == pytest.approx(expected)


def test_a_kernel_without_pressure_figures_says_nothing(kernel: Kernel) -> None:
    assert stress.pressure_stress(kernel.proc) is None


def test_the_real_machine_can_be_read() -> None:
    assert 0.0 <= stress.memory_stress() <= 1.0
    machine = stress.read_machine()
    assert 0 < machine.usable_mb <= machine.total_mb
    assert 0.0 <= (stress.pressure_stress() or 0.0) <= 1.0


def replayed(*values: float) -> Callable[[], float]:
    return iter(values).__next__


def fixed_machine() -> MachineMemory:
    return MachineMemory(8000, 2000, 4000, 1000)


def test_there_is_no_stress_before_a_sample() -> None:
    assert StressMonitor({"fixed": lambda: 1.0}).value == 0.0


def test_a_single_sample_decides_nothing() -> None:
    monitor = StressMonitor({"spiky": replayed(1.0, 0.1, 0.1, 1.0, 0.1)})
    assert [monitor.sample() for _ in range(5)] == [0.0, 0.0, 0.1, pytest.approx(0.55), 0.1]


def test_priming_takes_what_the_signal_needs_and_no_more() -> None:
    monitor = StressMonitor({"rising": replayed(0.1, 0.2, 0.3)})
    monitor.prime()
    monitor.prime()
    assert monitor.value == 0.2


def test_the_largest_source_counts_and_a_silent_one_does_not() -> None:
    monitor = StressMonitor({"low": lambda: 0.2, "high": lambda: 0.6, "silent": lambda: None})
    monitor.prime()
    assert monitor.value == 0.6


def test_without_a_source_there_is_no_stress() -> None:
    monitor = StressMonitor({})
    monitor.prime()
    assert monitor.value == 0.0


def test_old_samples_leave_the_window() -> None:
    monitor = StressMonitor({"falling": replayed(*[0.9] * 5, *[0.1] * 3)})
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
def test_bands_begin_at_their_lower_bound(value: float, band: str) -> None:
    monitor = StressMonitor({"fixed": lambda: value})
    monitor.prime()
    assert monitor.band == band


@pytest.mark.parametrize(("given", "counted"), [(7.0, 1.0), (-3.0, 0.0), (float("inf"), 1.0), (float("nan"), 0.0)])
def test_a_value_out_of_range_is_bent_into_it(given: float, counted: float) -> None:
    monitor = StressMonitor({"wild": lambda: given})
    monitor.prime()
    assert monitor.value == counted


def test_a_source_that_fails_is_logged_once_and_the_others_count(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> float:
        raise RuntimeError("no sensor")

    monitor = StressMonitor({"broken": broken, "sound": lambda: 0.4}, machine=fixed_machine)
    with caplog.at_level(logging.ERROR):
        monitor.prime()
    assert monitor.value == 0.4
    assert monitor.report()["sources"] == {"broken": None, "sound": 0.4}
    assert [record.getMessage() for record in caplog.records] == [
        "the stress source 'broken' failed and does not count; further failures are not logged"
    ]
    assert "no sensor" in caplog.text


def test_the_report_shows_the_signal_its_sources_and_the_machine() -> None:
    monitor = StressMonitor({"memory": lambda: 0.61239, "pressure": lambda: None}, machine=fixed_machine)
    monitor.prime()
    assert monitor.report() == {
        "stress": 0.612,
        "band": "HIGH",
        "sources": {"memory": 0.612, "pressure": None},
        "machine": {"total_mb": 8000, "used_mb": 2000, "limit_mb": 4000, "limit_used_mb": 1000},
    }


def test_the_memory_that_may_be_used_is_the_smaller_of_limit_and_machine() -> None:
    assert StressMonitor({}, machine=fixed_machine).total_mb == 4000
    assert StressMonitor({}, machine=lambda: MachineMemory(8000, 1)).total_mb == 8000


async def test_it_samples_until_cancelled() -> None:
    seen = asyncio.Event()
    taken = 0

    def counting() -> float:
        nonlocal taken
        taken += 1
        if taken == 6:
            seen.set()
        return 0.5

    task = asyncio.create_task(StressMonitor({"counting": counting}).run(period_s=0.0))
    await seen.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
