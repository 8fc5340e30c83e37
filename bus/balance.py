"""The balance of memory: what the monitor finds goes to the scheduler, and where it is short the runners let go.

What is kept and idle is ended; what goes on is told to let go of its caches, where its overlay says that it can.

Between two samples of the stress nothing is read anew; the scheduler keeps account of what it has given away.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from bus.memory import MIB, Room
from bus.plugins import spared
from bus.purges import UnderStress
from runners.base import HELPERS, Share

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from bus.scheduler import Scheduler
    from bus.settings import Settings
    from bus.stress import StressMonitor
    from runners.base import Runner

log = logging.getLogger(__name__)

CRITICAL = "CRITICAL"
"""The band of stress in which everything goes that is kept and idle."""

IDLE_S = 2.0
"""How long, in seconds, what is kept must be idle to go where a call waits for memory: it may be between two calls."""

AGAIN_S = 1.0
"""How often, in seconds, the runners are asked at most."""


class Balance:
    """Of one bus. `sampled` is to be called after each sample of the monitor, `is_short` where a call waits.

    `purged` gives the overlays that are to let go of their caches while memory is short.
    """

    def __init__(
        self,
        settings: Settings,
        runners: Mapping[str, Runner],
        purged: Callable[[], Collection[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._runners = runners
        self._purged = purged
        self._under_stress = UnderStress(clock)
        self._clock = clock
        self._monitor: StressMonitor | None = None
        self._scheduler: Scheduler | None = None
        self._relieved_at = -AGAIN_S

    def between(self, monitor: StressMonitor, scheduler: Scheduler) -> None:
        """Which two it is between."""
        self._monitor, self._scheduler = monitor, scheduler

    def rooms(self) -> Iterator[Room]:
        """What the operator gives to all overlays together (`AAL_MEMORY_MB`), as a further bound of the monitor."""
        if self._settings.memory_mb and self._scheduler is not None:
            used_mb = self._scheduler.held_mb + sum(share.used_mb for share in self._shares().values())
            yield Room(self._settings.memory_mb * MIB, round(used_mb * MIB), "AAL_MEMORY_MB")

    def sampled(self) -> None:
        """There is a new sample."""
        if self._monitor is None or self._scheduler is None:
            return
        shares = self._shares()
        shares.pop(HELPERS, None)  # nobody's calls give those back
        self._scheduler.sampled(self._monitor.free_mb, self._monitor.total_mb, shares)
        if self._monitor.band == CRITICAL:
            self._relieve(0.0)
        if self._under_stress.is_due(self._monitor.band) and (overlays := self._purged()):
            told = self.purge(overlays)
            log.info("stress is %s: told to let go of their caches: %s", self._monitor.band, told)

    def is_short(self) -> None:
        """A call waits for memory."""
        self._relieve(IDLE_S)

    def purge(self, overlays: Collection[str]) -> dict[str, dict[str, int]]:
        """Have the runners tell these overlays: how many workers or services of each, by overlay and runner."""
        told: dict[str, dict[str, int]] = {}
        for runner in self._runners.values():
            with spared(runner, "tell of a purge"):
                for overlay, count in runner.purge(overlays).items():
                    told.setdefault(overlay, {})[runner.name] = count
        return told

    def _relieve(self, idle_s: float) -> None:
        now = self._clock()
        if now - self._relieved_at < AGAIN_S:
            return
        self._relieved_at = now
        for runner in self._runners.values():
            with spared(runner, "give back memory"):
                runner.relieve(idle_s)

    def _shares(self) -> dict[str, Share]:
        found: dict[str, Share] = {}
        for runner in self._runners.values():
            with spared(runner, "say what it keeps"):  # which then counts as used by somebody else
                found.update(_added(found, runner.shares()))
        return found


def _added(found: Mapping[str, Share], shares: Mapping[str, Share]) -> dict[str, Share]:
    """The shares of one runner, with what others have by the same name."""
    return {
        name: Share(share.processes + before.processes, share.used_mb + before.used_mb)
        for name, share in shares.items()
        for before in (found.get(name, Share(0, 0.0)),)
    }
