"""What a trace is made of: calls, how their memory grows, and a trace as a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from bus import runes
from bus.errors import BusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from bus.runes import MemoryProfile

Growth = Literal["ramp", "linear", "late"]
"""Quickly to a plateau; evenly over the whole life; little for most of it, and then all at once."""

FIRST_MB = 8.0
"""What a process has as soon as it runs, in MiB; less where its peak is less."""

RAMP_S, RAMP_SHARE = 0.5, 0.1
"""A ramp takes so many seconds, or this share of the call's time where that is less."""

LATE_FROM, LATE_TO, LATE_BEFORE = 0.85, 0.9, 0.3
"""A late spike rises between these shares of the call's time, from this share of its peak."""


class TraceError(Exception):
    """There is no such trace; the message is for people."""


class Point(NamedTuple):
    """So much memory, in MiB, at so many seconds after the start of a call; between two points it grows evenly."""

    age_s: float
    mb: float


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `at_s` is when it comes, in seconds from the start of the trace, `rune` the text of its profile.

    Alone it takes `hold_s` seconds and `peak_mb` MiB, of which `kv_share` (0 to 1) is a cache that shrinks by the
    `kv_shrink_factor` that it is told. Whoever calls has no use for it `timeout_s` seconds after `at_s`. With
    `repeatable` the bus may run it twice.
    """

    at_s: float
    overlay: str
    capability: str
    rune: str
    hold_s: float
    peak_mb: float
    timeout_s: float
    growth: Growth = "ramp"
    kv_share: float = 0.0
    repeatable: bool = False

    @property
    def key(self) -> str:
        """What its needs are learned by."""
        return f"{self.overlay}.{self.capability}"

    @property
    def profile(self) -> MemoryProfile:
        return runes.resolve(self.rune)

    @property
    def deadline_s(self) -> float:
        return self.at_s + self.timeout_s

    def curve(self, kv_factor: float = 1.0) -> tuple[Point, ...]:
        """Its memory from start to end; it never shrinks."""
        peak_mb = self.peak_mb * (1 - self.kv_share * (1 - kv_factor))
        first_mb = min(FIRST_MB, peak_mb)
        hold_s = self.hold_s
        if self.growth == "linear":
            return Point(0.0, first_mb), Point(hold_s, peak_mb)
        ramp_s = min(RAMP_S, RAMP_SHARE * hold_s)
        if self.growth == "ramp":
            return Point(0.0, first_mb), Point(ramp_s, peak_mb), Point(hold_s, peak_mb)
        before_mb = max(first_mb, LATE_BEFORE * peak_mb)
        rising = Point(LATE_FROM * hold_s, before_mb), Point(LATE_TO * hold_s, peak_mb)
        return Point(0.0, first_mb), Point(ramp_s, before_mb), *rising, Point(hold_s, peak_mb)


def area_mb_s(curve: Sequence[Point]) -> float:
    """What a call takes of memory over its life, in MiB times seconds."""
    return sum((after.age_s - before.age_s) * (before.mb + after.mb) / 2 for before, after in pairwise(curve))


def write(calls: Iterable[Call], file: Path) -> None:
    """One call a line, as JSON."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(call)) + "\n" for call in calls)


def read(file: Path) -> list[Call]:
    """The calls of a file that `write` wrote, by the time at which they come. Raises `TraceError`, `OSError`."""
    with file.open(encoding="utf-8") as lines:
        calls = [_call(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return in_order(calls, str(file))


def in_order(calls: Iterable[Call], where: str) -> list[Call]:
    """By the time at which they come, the first at 0. Raises `TraceError` where there is none."""
    ordered = sorted(calls, key=lambda call: call.at_s)
    if not ordered:
        raise TraceError(f"{where} has no call to simulate")
    return ordered


def _call(line: str, where: str) -> Call:
    try:
        members = json.loads(line)
        call = Call(**members)
        _check(call)
    except (ValueError, TypeError, BusError) as error:
        raise TraceError(f"{where} is not a call of a trace: {error}") from None
    return call


def _check(call: Call) -> None:
    """Raises `ValueError`, `TypeError` or `RuneError`."""
    _ = call.profile
    allowed: dict[str, Any] = {
        "at_s": 0 <= call.at_s < math.inf,
        "hold_s": 0 < call.hold_s < math.inf,
        "peak_mb": 0 < call.peak_mb < math.inf,
        "timeout_s": 0 < call.timeout_s < math.inf,
        "kv_share": 0 <= call.kv_share <= 1,
        "growth": call.growth in get_args(Growth),
    }
    if wrong := [f"{name} is {getattr(call, name)!r}" for name, is_allowed in allowed.items() if not is_allowed]:
        raise ValueError(", ".join(wrong))
