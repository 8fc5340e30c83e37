"""Virtual memory: what all that runs has together, exact at any time, since all of it grows evenly between events."""

from __future__ import annotations

import math

TINY_MB = 1e-6
"""What sums of fractions may be off by, in MiB."""


class Machine:
    """`total_mb` of memory, of which others than calls have `others_mb`; in MiB. Times are seconds."""

    def __init__(self, total_mb: float, others_mb: float = 0.0) -> None:
        self.total_mb = total_mb
        self.others_mb = others_mb
        self.full_at = math.inf
        """When calls and others will have more than there is, if nothing changes."""
        self.area_mb_s = 0.0
        """What calls had so far, in MiB times seconds."""
        self.peak_mb = 0.0
        """The most that calls had at an event."""
        self._mb = 0.0
        self._slope = 0.0
        self._since = 0.0

    @property
    def room_mb(self) -> float:
        """What calls may have together."""
        return self.total_mb - self.others_mb

    def calls_mb(self, now: float) -> float:
        """What calls have."""
        return self._mb + self._slope * (now - self._since)

    def used_mb(self, now: float) -> float:
        return self.others_mb + self.calls_mb(now)

    def change(self, now: float, mb: float, slope: float) -> None:
        """Calls have so much more from now on, and from now on grow by so much more, in MiB a second."""
        elapsed = now - self._since
        before = self._mb
        self._mb += self._slope * elapsed
        self.area_mb_s += elapsed * (before + self._mb) / 2
        self.peak_mb = max(self.peak_mb, min(self._mb, self.room_mb))
        self._mb += mb
        self._slope += slope
        self._since = now
        left = self.room_mb + TINY_MB - self._mb
        if left < 0:
            self.full_at = now
        elif self._slope > TINY_MB:
            self.full_at = now + left / self._slope
        else:
            self.full_at = math.inf

    def empty(self, now: float) -> None:
        """Nothing runs: without what rounding left."""
        self.change(now, -self.calls_mb(now), -self._slope)
        self._mb = self._slope = 0.0
