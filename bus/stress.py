"""The stress signal, 0.0 to 1.0: how short memory is. The largest of its sources, smoothed over a window.

The monitor has two sources of its own: `memory`, the used share of the fullest room (the machine, the cgroups that
bound us, further bounds such as a budget), and `pressure`, how long tasks wait for memory. Both, what is free, and what
people are shown come from one reading of the kernel's files a sample. A plug-in's source of one of these two names
takes its place.

The kernel's files are read on the event loop: measured on one core of a virtual machine without a cgroup limit, a
sample takes 0.06 ms, which at two a second is 0.012 % of the core; a thread for it would cost as much again. What a
plug-in reads may be slow, so each such source has a thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from bisect import bisect_right
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from bus import memory
from bus.memory import MIB, Reading, Room
from bus.stress_sources import PluggedSource, within_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bus.stress_sources import Source

__all__ = ["Band", "Reading", "Room", "StressMonitor", "band_after", "pressure_stress", "stress_of_share"]

log = logging.getLogger(__name__)

MIN_SAMPLES = 3
"""Samples before the signal says anything: a single one decides nothing."""

PSI_FULL_SCALE = 40.0
"""Share of time, in percent, that some task waited for memory, at which pressure counts as 1.0."""

KNEE = 0.6
FULL = 0.95
"""Used shares of memory at which stress begins to rise steeply, and at which it is 1.0."""

HYSTERESIS = 0.05
"""How far below its bound the signal has to fall for its band to be left, so that a band does not flutter."""

HISTORY_S = 120.0
HISTORY = 240
"""How far back the samples that are kept reach, and how many there are at most; of more frequent ones not all are."""

ANSWER_S = 1.0
"""How long a plug-in's source is waited for where somebody waits for the sample, in seconds."""

Read = TypeVar("Read")
Band = Literal["LOW", "MODERATE", "HIGH", "CRITICAL"]

_TOLERANCE_S = 0.05
"""How much too early, in seconds, a sample is still kept: timers are not exact."""

_BANDS: tuple[Band, ...] = ("LOW", "MODERATE", "HIGH", "CRITICAL")
_ENTERED = (0.25, 0.50, 0.75)
_LEFT = tuple(round(bound - HYSTERESIS, 3) for bound in _ENTERED)
_THRESHOLDS = {
    band: {"entered_at": at, "left_below": below} for band, at, below in zip(_BANDS[1:], _ENTERED, _LEFT, strict=True)
}


def band_after(before: Band, value: float) -> Band:
    """The band of a value that follows on a band: entered at its bound, left only below that less `HYSTERESIS`."""
    highest = bisect_right(_LEFT, value)  # the highest that this value keeps
    return _BANDS[max(bisect_right(_ENTERED, value), min(_BANDS.index(before), highest))]


def stress_of_share(used: float) -> float:
    """0.5u up to a used share u of `KNEE`, then a straight line to 1.0 at `FULL`, and 1.0 above."""
    if used <= KNEE:
        return 0.5 * used
    rise = (used - KNEE) / (FULL - KNEE)
    return min(1.0, 0.5 * KNEE + (1.0 - 0.5 * KNEE) * rise)


def pressure_stress(waiting: float | None) -> float | None:
    """Stress from the share of time, in percent, that some task waited for memory; None where that is not known."""
    return None if waiting is None else min(1.0, waiting / PSI_FULL_SCALE)


@dataclass(frozen=True, slots=True)
class Point:
    """One sample that is kept. `timestamp_ms` is since the epoch, `free_mb` MiB, None where nothing is known of it."""

    timestamp_ms: int
    stress: float
    band: Band
    free_mb: float | None


def _nothing() -> None:
    pass


class StressMonitor:
    """Samples the sources and keeps the smoothed signal: the median over the window of the largest of the sources.

    `value` is 0.0 until `MIN_SAMPLES` were taken (fewer in a smaller window). After each sample, over all rooms:
    `free_mb` is the smallest of what is left, in MiB, 0 or more, infinite where no room is known; `total_mb` the
    smallest total, in MiB, 0 before the first sample; `sampled` counts samples; `changed` says whether the last one
    changed the `band`.

    `sources` are those of plug-ins, `read` gives what the kernel says, `rooms` further bounds, at every sample; `clock`
    is monotonic, in seconds. For one event loop; no locks.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        window: int = 5,
        *,
        read: Callable[[], Reading] = memory.read,
        rooms: Callable[[], Iterable[Room]] = tuple,
        answer_s: float = ANSWER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.value = 0.0
        self.band: Band = "LOW"
        self.changed = False
        self.sampled = 0
        self.free_mb = 0.0
        self.total_mb = 0
        self._plugged = [PluggedSource(name, source, clock) for name, source in sources.items()]
        self._read_kernel = read
        self._read_further = rooms
        self._answer_s = answer_s
        self._clock = clock
        self._reading = Reading(())
        self._further: tuple[Room, ...] = ()
        self._rooms: tuple[Room, ...] = ()
        self._last: dict[str, float | None] = {}
        self._window: deque[float] = deque(maxlen=window)
        self._needed = min(MIN_SAMPLES, window)
        self._failed: set[str] = set()
        self._timestamp_ms = 0
        self._history: deque[Point] = deque(maxlen=HISTORY)
        self._kept_at = -math.inf

    def sample(self) -> float:
        """Take one sample, for which plug-ins are waited for, up to `answer_s` each; gives the smoothed value.

        For where no call can be delayed: a start, and a program without an event loop.
        """
        for source in self._plugged:
            source.ask()
        for source in self._plugged:
            source.wait(self._answer_s)
        return self._take()

    def prime(self) -> None:
        """Take as many samples as the signal needs before it says anything."""
        while len(self._window) < self._needed:
            self.sample()

    async def run(self, period_s: float, on_sample: Callable[[], None] = _nothing) -> None:
        """Sample every `period_s` seconds until cancelled, and call `on_sample` after each.

        Nothing is waited for: of a plug-in's source the last answer counts, which is a period old or more.
        """
        self.prime()
        while True:
            await asyncio.sleep(period_s)
            self._take()
            for source in self._plugged:
                source.ask()
            try:
                on_sample()
            except Exception:  # whoever listens: the signal must not freeze, since admission hangs on it
                log.exception("what follows on a sample of the stress failed")

    def report(self) -> dict[str, Any]:
        """For `GET /stress` and its events, as `schemas/stress.schema.json` has it."""
        return {
            "timestamp_ms": self._timestamp_ms,
            "sampled": self.sampled,
            "stress": round(self.value, 3),
            "band": self.band,
            "changed": self.changed,
            "sources": {name: None if value is None else round(value, 3) for name, value in self._last.items()},
            "free_mb": _figure(self.free_mb),
            "total_mb": self.total_mb,
            "rooms": [
                {"name": room.name, "total_mb": room.total // MIB, "used_mb": room.used // MIB} for room in self._rooms
            ],
            "machine": asdict(self._reading.machine) if self._reading.rooms else None,
            "thresholds": _THRESHOLDS,
        }

    def history(self) -> list[dict[str, Any]]:
        """The samples of the last `HISTORY_S` seconds, oldest first, `HISTORY` at most."""
        return [asdict(point) for point in self._history]

    def _take(self) -> float:
        """Read the kernel's files, and make one sample of that and of what plug-ins said last."""
        self._read()
        self._last = self._own() | {source.name: source.value for source in self._plugged}
        self._window.append(max((value for value in self._last.values() if value is not None), default=0.0))
        if len(self._window) >= self._needed:
            self.value = statistics.median(self._window)
        before, self.band = self.band, band_after(self.band, self.value)
        self.changed = self.band != before
        self.sampled += 1
        self._timestamp_ms = time.time_ns() // 1_000_000
        self._keep()
        return self.value

    def _read(self) -> None:
        """What the rooms are now. Of what cannot be read, as when descriptors are short, the last reading counts."""
        self._reading = self._asked("the kernel's files", self._read_kernel, self._reading)
        self._further = self._asked("further rooms", lambda: tuple(self._read_further()), self._further)
        self._rooms = (*self._reading.rooms, *self._further)
        self.free_mb = min((room.free_mb for room in self._rooms), default=math.inf)
        self.total_mb = min((room.total for room in self._rooms), default=0) // MIB

    def _asked(self, what: str, read: Callable[[], Read], before: Read) -> Read:
        try:
            return read()
        except Exception:  # whatever it is, the signal must go on: admission hangs on it
            if what not in self._failed:
                self._failed.add(what)
                log.exception("%s cannot be read for the stress; further failures are not logged", what)
            return before

    def _own(self) -> dict[str, float | None]:
        fullest = max((room.share for room in self._rooms), default=None)
        return {
            "memory": None if fullest is None else within_unit(stress_of_share(fullest)),
            "pressure": pressure_stress(self._reading.waiting),
        }

    def _keep(self) -> None:
        """Add the sample to the history, unless the last there is too young, and drop what is too old."""
        now = self._clock()
        if now - self._kept_at < HISTORY_S / HISTORY - _TOLERANCE_S:
            return
        self._kept_at = now
        self._history.append(Point(self._timestamp_ms, round(self.value, 3), self.band, _figure(self.free_mb)))
        while self._timestamp_ms - self._history[0].timestamp_ms > HISTORY_S * 1000:
            self._history.popleft()


def _figure(size_mb: float) -> float | None:
    """For JSON, which has no infinity."""
    return round(size_mb, 3) if math.isfinite(size_mb) else None
