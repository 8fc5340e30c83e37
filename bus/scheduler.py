"""The scheduler: admission control (`admission`) behind an event loop.

A call enters a context and waits there for leave to run; its slot and its memory are given back when the context ends.
A timer ends a wait whose deadline passes.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from bus.admission import AdmissionControl, Ticket, Wish
from bus.claims import NO_NEED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bus.claims import Need
    from bus.errors import BusError
    from runners.base import Share

REFRESH_S = 0.1
"""How often, in seconds, the claims of running calls are looked at anew while a call waits for memory."""


class Scheduler:
    """Admission control on one event loop, without threads.

    `stress` gives 0.0 to 1.0; deadlines are on `clock`, in seconds. `is_short` is called where a call waits for memory.
    """

    def __init__(
        self,
        *,
        slots: int,
        queue_limit: int,
        stress: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        is_short: Callable[[], None] = lambda: None,
    ) -> None:
        self._is_short = is_short
        self._control = AdmissionControl(
            slots=slots, queue_limit=queue_limit, stress=stress, clock=clock, is_short=self._wait_for_memory
        )
        self._clock = clock
        self._idle = asyncio.Event()
        self._idle.set()
        self._refreshing: asyncio.TimerHandle | None = None

    def admit(
        self,
        key: str,
        priority: int,
        deadline: float,
        concurrency: int | None = None,
        *,
        overlay: str | None = None,
        need: Need = NO_NEED,
        arrived: float | None = None,
    ) -> Admission:
        """Wait, on entering the context, for leave to run a call of `key`; what it was given goes back when it ends.

        `priority` is 0 to 9, `deadline` a time on the scheduler's clock, `concurrency` the most calls of `key` that may
        run at once (None: any number), `need` its memory; `arrived` is when a call came that had to begin anew. The
        context gives the call's `Ticket`. Raises `OverloadError` (ERR_BUSY, ERR_STRESS, ERR_SHUTTING_DOWN) and
        `DeadlineError` (ERR_DEADLINE).
        """
        now = self._clock() if arrived is None else arrived
        return Admission(self, Wish(key, overlay or key, priority, deadline, now, concurrency, need))

    @property
    def running(self) -> int:
        return len(self._control.running)

    @property
    def waiting(self) -> int:
        return self._control.waiting

    @property
    def closed(self) -> bool:
        return self._control.closed

    def close(self) -> None:
        """Refuse what waits and what comes. What runs goes on."""
        self._control.close()
        if self._refreshing is not None:
            self._refreshing.cancel()

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing runs, `timeout_s` seconds at most; says whether nothing does."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @property
    def held_mb(self) -> float:
        """What running calls were last seen to have, but for processes that they have in common."""
        return self._control.held_mb

    @property
    def room_mb(self) -> float:
        """The memory that calls may claim together, in MiB; infinite before the first sample."""
        return self._control.room_mb

    @property
    def claimed_mb(self) -> float:
        """What running calls claim of it."""
        return self._control.claimed_mb

    @property
    def evictions(self) -> int:
        """How many calls were ended to free memory."""
        return self._control.evictions

    def sampled(self, free_mb: float, total_mb: float, shares: Mapping[str, Share]) -> None:
        """As `AdmissionControl.sampled`."""
        self._control.sampled(free_mb, total_mb, shares)

    def retry_after_s(self) -> int:
        """When one that could not stay might come again, by the rate at which the line moves."""
        return self._control.retry_after_s()

    def report(self) -> dict[str, Any]:
        """As `AdmissionControl.report`."""
        return self._control.report()

    async def _wait(self, ticket: Ticket) -> None:
        """Leave to run in turn. However it ends (a cancellation may follow upon leave), nothing is lost."""
        loop = asyncio.get_running_loop()
        verdict: asyncio.Future[BusError | None] = loop.create_future()

        def decide(refusal: BusError | None) -> None:
            if refusal is None:
                self._idle.clear()
            if not verdict.done():
                verdict.set_result(refusal)

        ticket.decided = decide
        left_s = max(0.0, ticket.wish.deadline - self._clock())
        timer = loop.call_later(left_s, self._control.expire, ticket)
        entered = False
        try:
            refusal = await verdict
            if refusal:
                raise refusal
            entered = True
        finally:
            timer.cancel()
            self._control.withdraw(ticket)
            if ticket.state == "running" and not entered:
                self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        self._control.leave(ticket)
        if not self._control.running:
            self._idle.set()

    def _wait_for_memory(self) -> None:
        """A call waits for memory: look again soon, as those that run may turn out to need less."""
        self._is_short()
        self._refresh_soon()

    def _refresh_soon(self) -> None:
        if self._refreshing is None and not self.closed:
            self._refreshing = asyncio.get_running_loop().call_later(REFRESH_S, self._refresh)

    def _refresh(self) -> None:
        self._refreshing = None
        self._control.refresh()
        if self._control.lacks_memory:
            self._refresh_soon()


class Admission:
    """The context of one call in `Scheduler.admit`; `ticket` is None until it has asked, and where it was refused then.

    A class, as a generator's context costs three times as much.
    """

    __slots__ = ("_scheduler", "ticket", "wish")

    def __init__(self, scheduler: Scheduler, wish: Wish) -> None:
        self._scheduler = scheduler
        self.wish = wish
        self.ticket: Ticket | None = None

    async def __aenter__(self) -> Ticket:
        scheduler = self._scheduler
        ticket = self.ticket = scheduler._control.ask(self.wish)
        if ticket.state == "waiting":
            await scheduler._wait(ticket)
        else:
            scheduler._idle.clear()
        return ticket

    async def __aexit__(self, *_: object) -> None:
        if self.ticket is not None:
            self._scheduler._leave(self.ticket)
