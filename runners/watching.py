"""When to look at the calls that run, at their memory and how many processes they have, and what was seen.

Part of the helper (`launcher.py`), under the same rules. A call that ends soon is never looked at. One that stays is
looked at soon after its start and as long as it grows, then more and more rarely, and the sooner the nearer it is to
its limit.
"""

from __future__ import annotations

from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FIRST_S, RARELY_S = 0.05, 0.25
"""Seconds from the start of a call to the first look at it, which is also the least between two; and the most."""

GROWTH_KIB_S = 4 << 20
"""By how many KiB a second a call is expected to grow at most."""

WORTH_TELLING_KIB = 1024
"""By how much a call's memory must have changed for the bus to hear of it."""

NEVER = float("inf")


class Seen:
    """What was seen of a call: its memory at the last look and the most so far, with all that it started; in KiB.

    `most_kib` is what it may have, 0 for any amount; `due` is when to look at it, on the clock of `time.monotonic`.
    """

    __slots__ = ("_born", "_told_kib", "due", "most_kib", "peak_kib")

    def __init__(self, now: float, most_kib: int) -> None:
        self._born = now
        self._told_kib = 0
        self.due = now + FIRST_S
        self.most_kib = most_kib
        self.peak_kib = 0

    def take(self, kib: int, now: float) -> bool:
        """What it has now. True where the bus is to be told."""
        is_growing = kib - self.peak_kib > self.peak_kib // 8
        self.peak_kib = max(self.peak_kib, kib)
        wait_s = 0.0 if is_growing else min((now - self._born) / 2, RARELY_S)
        if self.most_kib:
            wait_s = min(wait_s, (self.most_kib - kib) / GROWTH_KIB_S)
        self.due = now + max(wait_s, FIRST_S)
        if abs(kib - self._told_kib) < WORTH_TELLING_KIB:
            return False
        self._told_kib = kib
        return True


class Watch:
    """The calls that run, by their numbers. `due` is when to look next at any of them."""

    def __init__(self) -> None:
        self.due = NEVER
        self._calls = {}  # type: dict[int, Seen]

    def begin(self, number: int, most_kib: int) -> None:
        seen = self._calls[number] = Seen(monotonic(), most_kib)
        self.due = min(self.due, seen.due)

    def end(self, number: int) -> int:
        """The most that was seen of it, in KiB; 0 where nobody looked."""
        return self._calls.pop(number).peak_kib

    def left_ms(self) -> float | None:
        """How long there is nothing to look at; None for ever."""
        return max(0.0, (self.due - monotonic()) * 1000) if self._calls else None

    def look(self) -> tuple[float, dict[int, Seen]]:
        """The time, and the calls that are to be looked at now."""
        now = monotonic()
        if now < self.due:
            return now, {}
        found = {number: seen for number, seen in self._calls.items() if seen.due <= now}
        if not found:
            self.rest()
        return now, found

    def rest(self) -> None:
        """All were looked at that were due."""
        self.due = _first(seen.due for seen in self._calls.values())


def _first(times: Iterable[float]) -> float:
    return min(times, default=NEVER)
