"""The stress signal, 0.0 to 1.0: how short memory is. The largest of its sources, smoothed over a window.

A source is a plain callable that gives 0.0 to 1.0, or None where it has nothing to say. The two built in read `/proc`
and the cgroup v2 files that bound this process; page cache is not counted, since the kernel gives it back when asked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
from bisect import bisect_right
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Source = Callable[[], float | None]

log = logging.getLogger(__name__)

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
MIN_SAMPLES = 3
"""Samples before the signal says anything: a single one decides nothing."""

PSI_FULL_SCALE = 40.0
"""Share of time, in percent, that some task waited for memory, at which pressure counts as 1.0."""

KNEE = 0.6
FULL = 0.95
"""Used shares of memory at which stress begins to rise steeply, and at which it is 1.0."""

Band = Literal["LOW", "MODERATE", "HIGH", "CRITICAL"]

_MIB = 2**20
_BOUNDS = (0.25, 0.50, 0.75)
_BANDS: tuple[Band, ...] = ("LOW", "MODERATE", "HIGH", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Room:
    """One bound on memory and what is used of it, in bytes, page cache not counted."""

    total: int
    used: int

    @property
    def share(self) -> float:
        return self.used / self.total if self.total else 1.0


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """For people, in MiB. `limit_mb` is the smallest cgroup limit below the machine's memory, None without one."""

    total_mb: int
    used_mb: int
    limit_mb: int | None = None
    limit_used_mb: int | None = None

    @property
    def usable_mb(self) -> int:
        return self.total_mb if self.limit_mb is None else self.limit_mb


def memory_stress(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Stress from the used share of memory: of the machine or of a cgroup that bounds us, whichever is fuller.

    Raises `OSError` or `ValueError` where `/proc/meminfo` cannot be read.
    """
    return stress_of_share(max(room.share for room in _rooms(proc, cgroups)))


def stress_of_share(used: float) -> float:
    """0.5u up to a used share u of `KNEE`, then a straight line to 1.0 at `FULL`, and 1.0 above."""
    if used <= KNEE:
        return 0.5 * used
    rise = (used - KNEE) / (FULL - KNEE)
    return min(1.0, 0.5 * KNEE + (1.0 - 0.5 * KNEE) * rise)


def pressure_stress(proc: Path = PROC) -> float | None:
    """Stress from the kernel's pressure stall information: memory, `some avg10`. None where the kernel has none."""
    try:
        text = (proc / "pressure" / "memory").read_text("ascii")
    except OSError:  # an old kernel has no such file, and one with psi=0 refuses to read it
        return None
    some = next(line for line in text.splitlines() if line.startswith("some "))
    fields = dict(field.split("=", 1) for field in some.split()[1:])
    return min(1.0, float(fields["avg10"]) / PSI_FULL_SCALE)


def read_machine(proc: Path = PROC, cgroups: Path = CGROUPS) -> MachineMemory:
    """What the machine has and what bounds us, now."""
    machine, *limits = _rooms(proc, cgroups)
    tightest = min(limits, key=lambda room: room.total, default=None)
    if tightest is None:
        return MachineMemory(machine.total // _MIB, machine.used // _MIB)
    return MachineMemory(machine.total // _MIB, machine.used // _MIB, tightest.total // _MIB, tightest.used // _MIB)


def _rooms(proc: Path, cgroups: Path) -> Iterator[Room]:
    """The machine, then each cgroup of ours, inmost first, whose limit is below the machine's memory."""
    machine = _machine_room(proc)
    yield machine
    for folder in _own_cgroups(proc, cgroups):
        room = _cgroup_room(folder)
        if room and room.total < machine.total:
            yield room


def _machine_room(proc: Path) -> Room:
    figures = _figures(proc / "meminfo")
    total = figures["MemTotal:"] * 1024
    return Room(total, total - figures["MemAvailable:"] * 1024)


def _own_cgroups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Our cgroup v2 folder and those above it. One that a namespace hides is left out; the root stands last."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    names = [name for line in lines if line.startswith("0::") for name in line[3:].split("/") if name]
    for depth in range(0 if ".." in names else len(names), -1, -1):
        yield cgroups.joinpath(*names[:depth])


def _cgroup_room(folder: Path) -> Room | None:
    """The room under this cgroup's `memory.max`; None where it sets none or is gone by now."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        current = int((folder / "memory.current").read_text())
        figures = _figures(folder / "memory.stat")
    except OSError:
        return None
    cache = sum(figures.get(name, 0) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    return Room(int(limit), max(0, current - cache))


def _figures(file: Path) -> dict[str, int]:
    """The lines `name number ...` of a kernel file."""
    rows = (line.split(maxsplit=2) for line in file.read_text("ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


class StressMonitor:
    """Samples the sources and keeps the smoothed signal: the median over the window of the largest of the sources.

    The value is 0.0 until `MIN_SAMPLES` were taken (fewer in a smaller window). For one event loop; no locks.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        window: int = 5,
        machine: Callable[[], MachineMemory] = read_machine,
    ) -> None:
        self.value = 0.0
        self._sources = dict(sources)
        self._last: dict[str, float | None] = dict.fromkeys(self._sources)
        self._window: deque[float] = deque(maxlen=window)
        self._needed = min(MIN_SAMPLES, window)
        self._failed: set[str] = set()
        self._machine = machine
        self._total_mb: int | None = None

    @property
    def band(self) -> Band:
        return _BANDS[bisect_right(_BOUNDS, self.value)]

    @property
    def total_mb(self) -> int:
        """Memory that this process may use, in MiB; read once, since a bound is set before the process starts."""
        if self._total_mb is None:
            self._total_mb = self._machine().usable_mb
        return self._total_mb

    def sample(self) -> float:
        """Take one sample of each source; gives the smoothed value."""
        self._last = {name: self._ask(name, source) for name, source in self._sources.items()}
        self._window.append(max((value for value in self._last.values() if value is not None), default=0.0))
        if len(self._window) >= self._needed:
            self.value = statistics.median(self._window)
        return self.value

    def prime(self) -> None:
        """Take as many samples as the signal needs before it says anything."""
        while len(self._window) < self._needed:
            self.sample()

    async def run(self, period_s: float) -> None:
        """Sample every `period_s` seconds until cancelled. A sample is microseconds of reading, so no thread."""
        self.prime()
        while True:
            await asyncio.sleep(period_s)
            self.sample()

    def report(self) -> dict[str, Any]:
        """For `GET /stress`: `{stress, band, sources: {name: value}, machine: {total_mb, used_mb, limit_mb, ...}}`."""
        sources = {name: None if value is None else round(value, 3) for name, value in self._last.items()}
        return {
            "stress": round(self.value, 3),
            "band": self.band,
            "sources": sources,
            "machine": asdict(self._machine()),
        }

    def _ask(self, name: str, source: Source) -> float | None:
        """One source's value. It may be a plugin's: whatever it does, the others still count."""
        try:
            return _within_unit(source())
        except Exception:
            if name not in self._failed:
                self._failed.add(name)
                log.exception("the stress source %r failed and does not count; further failures are not logged", name)
            return None


def _within_unit(value: float | None) -> float | None:
    if value is None:
        return None
    if math.isnan(value):
        raise ValueError("NaN is no stress")
    return min(1.0, max(0.0, float(value)))
