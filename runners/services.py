"""The services of a bus: one for each overlay, for all of its phases and capabilities.

A service starts at its first call, which waits for it together with all that come meanwhile; the start goes on when
their deadlines pass. It belongs to one edition of its overlay: the first call of a newer one gets a new service at
once, while the old one drains. A call of an older edition is refused, since the code that it was meant for is not there
any more. Where a service is unhealthy or too big, new calls wait until it is gone, so that no two hold the same memory.
Where nobody asked for its end, the next start backs off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from runners.base import HELPERS, Code, Outcome, Share, shared_by
from runners.faults import ServiceError
from runners.service import House, Pace, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from runners.base import Job, ServiceTarget
    from runners.faults import FaultError
    from runners.helpers import Helpers
    from runners.logs import OverlayLogs


class Services:
    """Every service of a bus. Used in one event loop only; `clock` is that of the jobs' deadlines."""

    def __init__(
        self,
        helpers: Helpers,
        logs: OverlayLogs | None,
        *,
        kill_grace_s: float,
        drain_s: float,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._house = House(helpers, logs, kill_grace_s, drain_s, pace or Pace(), clock)
        self._places: dict[str, _Place] = {}
        self._closing = asyncio.Event()

    @contextlib.asynccontextmanager
    async def use(self, job: Job, target: ServiceTarget) -> AsyncIterator[Service]:
        """The service, once it is ready: its `url` is where to send the call, its `end` why that failed.

        Until the exit the call counts as running. Raises `ServiceError`: START where it does not come up or backs off,
        or the overlay has changed since the job was made, SANDBOX, TIMEOUT, or CANCELLED after `close`.
        """
        service = await self._ready(job, target)
        service.enter(job.hard_mb)
        if job.meter is not None:
            job.meter.evict = service.evict
        try:
            yield service
        finally:
            service.leave()
            if job.meter is not None:
                job.meter.evict = None

    def state(self, overlay: str) -> dict[str, Any]:
        """`{}`, or `{"service": {"state", "starts", "failures", "last_error", ...}}` once there was a call.

        Of one that lives also `calls`, `pid`, `port`, `uptime_s`, `sandbox`, and `memory_mb` (MiB) once it was looked
        at; of one that backs off `retry_in_s`.
        """
        place = self._places.get(overlay)
        return {} if place is None else {"service": place.state()}

    def shares(self) -> dict[str, Share]:
        """The services that live and their helpers, as `Runner.shares`."""
        services = ((overlay, place.service) for overlay, place in self._places.items())
        return {HELPERS: self._house.helpers.share} | {
            shared_by(overlay): Share(1, service.memory_mb or 0.0)
            for overlay, service in services
            if service is not None and service.state != "gone"
        }

    def relieve(self, idle_s: float) -> None:
        """End the services that were idle for so many seconds."""
        for place in self._places.values():
            if place.service is not None and place.service.idle_for_s() >= idle_s:
                place.retire("is stopped: memory is short")
        self._house.helpers.relieve(idle_s)

    def ready(self, overlay: str) -> Service | None:
        """The overlay's service, while it can be called; this starts none."""
        place = self._places.get(overlay)
        service = None if place is None else place.service
        return service if service is not None and service.state == "ready" else None

    def forget(self, overlay: str) -> None:
        """Let the overlay's service end as soon as its calls have. A later call has a new one."""
        if (place := self._places.pop(overlay, None)) is not None:
            place.retire("is stopped: its overlay was removed or disabled")
        self._house.helpers.forget(overlay)

    async def close(self, *, at_once: bool = False) -> None:
        """End every service and the helpers that started them, and start no more. Nothing is left of them then.

        Running calls have `drain_s`, or no time `at_once`; a second call may so hurry the first.
        """
        self._closing.set()
        await self._house.close(at_once=at_once)
        await self._house.helpers.close(at_once=at_once)
        if self._house.logs is not None:
            self._house.logs.close()

    async def _ready(self, job: Job, target: ServiceTarget) -> Service:
        place = self._place(job)
        while not self._closing.is_set():
            if self._places.get(job.overlay) is not place:
                error = "the overlay was changed, disabled or removed while the call waited for its service"
                raise ServiceError(Outcome(Code.START, error=error, retryable=True))
            service = place.service
            if service is None or service.state == "gone":
                await self._start(place, job, target)
            elif service.state == "ready":
                return service
            else:
                await self._wait_for(service, place, job)
        raise ServiceError(Outcome(Code.CANCELLED, error="the runner was closed before the service was ready"))

    def _place(self, job: Job) -> _Place:
        """That of the job's overlay. A newer edition gets a new one, and the service of the older is ended."""
        place = self._places.get(job.overlay)
        if place is not None and place.edition > job.edition:
            error = "the overlay has changed since the call came in, and its service is another one now"
            raise ServiceError(Outcome(Code.START, error=error, retryable=True))
        if place is None or place.edition < job.edition:
            if place is not None:
                place.retire("is replaced: its overlay has changed")
            place = self._places[job.overlay] = _Place(job.edition, self._house)
        return place

    async def _start(self, place: _Place, job: Job, target: ServiceTarget) -> None:
        """Let a service start, or wait until it may. Raises `ServiceError` where that is too long."""
        wait_s = place.backoff_s()
        if wait_s <= 0:
            place.start(job, target)
        elif wait_s > self._house.pace.patience_s or self._house.clock() + wait_s >= job.deadline:
            raise ServiceError(place.refusal())
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), wait_s)

    async def _wait_for(self, service: Service, place: _Place, job: Job) -> None:
        """Until it is ready, or gone where it is about to be. Raises `ServiceError` where that fails or takes long."""
        state, event = service.state, service.up if service.state == "starting" else service.gone
        began = self._house.clock()
        await asyncio.wait({event}, timeout=max(0.0, job.deadline - began))
        if not event.done():
            waited_s = self._house.clock() - began
            error = f"the service was still {state} after {waited_s:.3f} s"
            raise ServiceError(Outcome(Code.TIMEOUT, error=error, retryable=True))
        if state == "starting" and service.has_failed:
            raise ServiceError(place.refusal())


class _Place:
    """Where the service of one edition of an overlay stands: starts it, remembers how often that failed, and paces it.

    `service` is the last that was started.
    """

    def __init__(self, edition: int, house: House) -> None:
        self.edition = edition
        self.service: Service | None = None
        self._house = house
        self._starts = 0
        self._failures = 0
        self._fault: FaultError | None = None
        self._log = ""
        self._again_at = 0.0

    def start(self, job: Job, target: ServiceTarget) -> None:
        self._starts += 1
        self.service = Service(job, target, self._house, self._failed)
        self._house.let_live(self.service)

    def retire(self, why: str) -> None:
        """`why` goes on from "the service"."""
        if self.service is not None and self.service.state != "gone":
            self.service.retire(why)

    def backoff_s(self) -> float:
        """How long it may not start yet."""
        return max(0.0, self._again_at - self._house.clock()) if self._failures else 0.0

    def refusal(self) -> Outcome:
        """What a call gets that would need it now, after it failed."""
        error = f"the service {self._fault or 'ended before it was ready'}"
        if wait_s := self.backoff_s():
            error += f"; it may start again in {wait_s:.1f} s"
        retryable = self._fault is None or self._fault.retryable
        unheld = self._fault is not None and self._fault.code is Code.SANDBOX
        return Outcome(Code.SANDBOX if unheld else Code.START, error=error, log=self._log, retryable=retryable)

    def state(self) -> dict[str, Any]:
        """What has become of it, as JSON for people."""
        backoff_s = self.backoff_s()
        told: dict[str, Any] = {"state": "backing off" if backoff_s else "stopped"}
        if self.service is not None and self.service.state != "gone":
            told = self.service.told()
        elif backoff_s:
            told["retry_in_s"] = round(backoff_s, 3)
        last_error = None if self._fault is None else str(self._fault)
        return told | {"starts": self._starts, "failures": self._failures, "last_error": last_error}

    def _failed(self, fault: FaultError, ready_s: float, last_words: str) -> None:
        """`ready_s`: how long it had been ready. After a steady time a failure is the first again."""
        pace = self._house.pace
        self._failures = 1 if ready_s >= pace.steady_s else self._failures + 1
        wait_s = min(pace.longest_backoff_s, pace.first_backoff_s * 2 ** min(self._failures - 1, 32))
        self._again_at = self._house.clock() + wait_s
        self._fault, self._log = fault, last_words
