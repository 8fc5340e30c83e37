"""What the kernel says of memory, read from fakes of its files."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from bus import memory
from bus.memory import MIB, MachineMemory, Reading, Room

if TYPE_CHECKING:
    from pathlib import Path

GIB_KB = 2**20


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

    def cgroup(self, name: str, limit: str, current: int, *, high: str = "max", **stat: int) -> None:
        folder = self.cgroups / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.high").write_text(f"{high}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text("".join(f"{of} {size}\n" for of, size in {"anon": 5, **stat}.items()))

    def pressure(self, avg10: str, cgroup: str | None = None) -> None:
        text = f"some avg10={avg10} avg60=99.00 avg300=99.00 total=1\nfull avg10=98.00 avg60=0 avg300=0 total=0\n"
        file = self.proc / "pressure" / "memory" if cgroup is None else self.cgroups / cgroup / "memory.pressure"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def read(self) -> Reading:
        return memory.read(self.proc, self.cgroups)

    def limits(self) -> dict[str, tuple[int, int]]:
        """Total and used of each cgroup that bounds us, in MiB, by the name that people see."""
        return {room.name: (room.total // MIB, room.used // MIB) for room in self.read().rooms[1:]}


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path)
    kernel.machine(8 * GIB_KB, 4 * GIB_KB)
    return kernel


def test_without_a_cgroup_there_is_the_machine_alone(kernel: Kernel) -> None:
    assert kernel.read() == Reading((Room(8 * 1024 * MIB, 4 * 1024 * MIB, "machine"),))
    assert kernel.read().machine == MachineMemory(8192, 4096)


def test_what_the_kernel_can_give_back_does_not_count_for_a_cgroup_but_shared_memory_does(kernel: Kernel) -> None:
    kernel.own_cgroup("/a")
    kernel.cgroup(
        "a",
        str(1000 * MIB),
        900 * MIB,
        file=600 * MIB,  # with 300 MiB of tmpfs
        shmem=300 * MIB,
        inactive_anon=300 * MIB,
        active_file=100 * MIB,
        inactive_file=200 * MIB,
        slab_reclaimable=50 * MIB,
        slab_unreclaimable=25 * MIB,
    )
    assert kernel.limits() == {"cgroup /a": (1000, 550)}
    assert kernel.read().machine == MachineMemory(8192, 4096, 1000, 550)


@pytest.mark.parametrize(
    ("limit", "high", "total"), [(1000, "max", 1000), (1000, "600", 600), (600, "1000", 600), ("max", "600", 600)]
)
def test_the_lower_of_the_limit_and_of_where_the_kernel_throttles_counts(
    kernel: Kernel, limit: object, high: str, total: int
) -> None:
    kernel.own_cgroup("/a")
    in_bytes = [str(int(size) * MIB) if size != "max" else "max" for size in map(str, (limit, high))]
    kernel.cgroup("a", in_bytes[0], 500 * MIB, high=in_bytes[1])
    assert kernel.limits() == {"cgroup /a": (total, 500)}


def test_a_kernel_that_throttles_nothing_has_its_limit_counted(kernel: Kernel) -> None:
    kernel.own_cgroup("/a")
    kernel.cgroup("a", str(1000 * MIB), 500 * MIB)
    (kernel.cgroups / "a/memory.high").unlink()
    assert kernel.limits() == {"cgroup /a": (1000, 500)}


def test_the_limits_of_all_cgroups_above_ours_count(kernel: Kernel) -> None:
    kernel.own_cgroup("/a/b/c")
    kernel.cgroup("a/b/c", str(1000 * MIB), 100 * MIB)
    kernel.cgroup("a/b", "max", 1)
    kernel.cgroup("a", str(2000 * MIB), 1900 * MIB)
    assert kernel.limits() == {"cgroup /a/b/c": (1000, 100), "cgroup /a": (2000, 1900)}
    assert kernel.read().machine.usable_mb == 1000


def test_the_limit_at_the_root_of_a_containers_mount_counts(kernel: Kernel) -> None:
    kernel.own_cgroup("/runtime/a-name-outside")
    kernel.cgroup("", str(1000 * MIB), 950 * MIB)
    assert kernel.limits() == {"cgroup /": (1000, 950)}


def test_a_limit_above_the_machines_memory_is_none(kernel: Kernel) -> None:
    kernel.own_cgroup("/a")
    kernel.cgroup("a", str(2**60), 2**60)
    assert kernel.limits() == {}
    assert kernel.read().machine.limit_mb is None


@pytest.mark.parametrize("name", ["/gone", "/../outside", "/"])
def test_a_cgroup_that_cannot_be_seen_is_left_out(kernel: Kernel, name: str) -> None:
    kernel.own_cgroup(name)
    assert kernel.limits() == {}


def test_a_limit_is_not_taken_for_lifted_while_descriptors_are_short(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.own_cgroup("/a")
    kernel.cgroup("a", str(1000 * MIB), 500 * MIB)
    open_file = os.open

    def short(path: str, flags: int) -> int:
        if path.endswith("memory.max"):
            raise OSError(errno.EMFILE, "too many open files")
        return open_file(path, flags)

    monkeypatch.setattr(os, "open", short)
    with pytest.raises(OSError, match="too many"):
        kernel.read()


@pytest.mark.parametrize("avg10", ["0.00", "10.00", "95.50"])
def test_pressure_is_the_share_of_time_that_some_task_waited(kernel: Kernel, avg10: str) -> None:
    kernel.pressure(avg10)
    assert kernel.read().waiting == float(avg10)


@pytest.mark.parametrize(
    ("machine", "own", "expected"), [("10.00", "30.00", 30), ("30.00", "10.00", 30), (None, "5.00", 5)]
)
def test_the_pressure_of_our_own_cgroup_counts_where_it_is_larger(
    kernel: Kernel, machine: str | None, own: str, expected: float
) -> None:
    kernel.own_cgroup("/a/b")
    kernel.pressure("99.00", cgroup="a")  # of the inmost alone
    kernel.pressure(own, cgroup="a/b")
    if machine:
        kernel.pressure(machine)
    assert kernel.read().waiting == expected


def test_the_pressure_of_calls_counts_where_the_bus_has_a_cgroup_beside_theirs(kernel: Kernel) -> None:
    kernel.own_cgroup("/a/aal-0123456789abcdef-bus")
    kernel.pressure("5.00", cgroup="a/aal-0123456789abcdef-bus")
    kernel.pressure("20.00", cgroup="a")
    assert kernel.read().waiting == 20


def test_the_pressure_of_a_container_stands_at_its_root(kernel: Kernel) -> None:
    kernel.own_cgroup("/runtime/a-name-outside")
    kernel.pressure("20.00", cgroup="")
    assert kernel.read().waiting == 20


def test_a_kernel_without_pressure_figures_says_nothing(kernel: Kernel) -> None:
    assert kernel.read().waiting is None


def test_what_is_left_is_never_less_than_nothing() -> None:
    assert Room(10 * MIB, 4 * MIB).free_mb == 6
    assert Room(10 * MIB, 40 * MIB).free_mb == 0
    assert Room(0, 0).share == 1


def test_the_real_machine_can_be_read() -> None:
    reading = memory.read()
    assert 0 < reading.machine.usable_mb <= reading.machine.total_mb
    assert 0.0 <= (reading.waiting or 0.0) <= 100.0
