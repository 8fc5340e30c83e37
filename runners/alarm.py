"""One timer for many deadlines: nearly all of what waits has ended long before its own."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

TICK_S = 0.001
"""The clocks of event loops are that coarse, in seconds: a timer may fire so much too early."""


class Alarm:
    """Deadlines are in seconds on the clock of `time.monotonic`.

    `expire` is told the time, ends what is due by then, and returns the earliest deadline that is left, inf for none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[float], float]) -> None:
        self._loop = loop
        self._expire = expire
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, deadline: float) -> None:
        """Go off by then, if not before."""
        if deadline < self._due:
            self.cancel()
            self._due = deadline
            self._timer = self._loop.call_later(deadline - time.monotonic(), self._go_off)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = None, math.inf

    def _go_off(self) -> None:
        self._timer, self._due = None, math.inf
        self.set(self._expire(time.monotonic() + TICK_S))
