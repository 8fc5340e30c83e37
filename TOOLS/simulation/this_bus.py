"""The policy of this bus: its own classes, on the virtual clock.

What `dispatch`, `scheduler`, `balance` and the helper do around them is done here in a few lines each: a call asks with
what `Needs` says of it, the monitor is sampled every `AAL_STRESS_PERIOD_S`, claims are looked at anew every `REFRESH_S`
while a call waits for memory, a running call is looked at when the helper would (`Seen`) and ended above its HARD, and
at its end its peak is learned.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, cast

from bus.admission import AdmissionControl, Ticket, Wish
from bus.degradation import memory_block
from bus.errors import BusError, DeadlineError
from bus.memory import MIB, Reading, Room
from bus.needs import KEPT, Learned, Needs
from bus.scheduler import REFRESH_S
from bus.settings import Settings
from bus.stress import StressMonitor
from runners.base import Code, Meter
from runners.watching import RARELY_S, Seen
from simulation.policies import NOTHING_MORE
from simulation.world import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bus.claims import Need
    from simulation.calls import Call
    from simulation.world import World

KIB = 1024
DEFAULTS = Settings()


class ThisBus:
    """Admission by memory, with the settings that the bus has where nobody sets them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.needs = Needs()
        self.monitor = StressMonitor({}, read=self._reading, clock=world.clock)
        self.control = AdmissionControl(
            slots=DEFAULTS.slots,
            queue_limit=DEFAULTS.queue_limit,
            stress=self._stress,
            clock=world.clock,
            is_short=self._is_short,
        )
        self._is_refreshing = False
        self._applied: dict[Request, list[str]] = {}
        self.monitor.prime()
        self.control.sampled(self.monitor.free_mb, self.monitor.total_mb, {})

    def ask(self, request: Request) -> None:
        call = request.call
        profile = call.profile
        wish = Wish(
            call.key,
            call.overlay,
            profile.priority,
            call.deadline_s,
            request.asked_s,
            need=self._need(request),
        )
        try:
            ticket = self.control.ask(wish, lambda refusal: self._decided(request, refusal))
        except BusError as refusal:
            self._decided(request, refusal)
            return
        request.grant = ticket
        if ticket.state == "running":
            self._start(request)

    def ended(self, request: Request, code: str) -> None:
        ticket = _ticket(request)
        ticket.meter.evict = None
        applied = tuple(self._applied.pop(request))
        self.needs.learn(request.call.key, Learned(request.mb(self.world.now), code, ticket.paused_s, applied))
        self.control.leave(ticket)

    def expire(self, request: Request) -> None:
        self.control.expire(_ticket(request))

    def sampled(self) -> None:
        self.monitor.sample()
        self.control.sampled(self.monitor.free_mb, self.monitor.total_mb, {})

    def reserved_mb(self) -> float:
        return self.control.claimed_mb

    def _need(self, request: Request) -> Need:
        """As `Bus._need` of a call with a process of its own."""
        return self.needs.of(request.call.key, request.call.profile, room_mb=self.control.room_mb)

    def _stress(self) -> float:
        return self.monitor.value

    def _reading(self) -> Reading:
        machine = self.world.machine
        return Reading((Room(round(machine.total_mb * MIB), round(machine.used_mb(self.world.now) * MIB), "machine"),))

    def _decided(self, request: Request, refusal: BusError | None) -> None:
        if refusal is None:
            self._start(request)
        elif isinstance(refusal, DeadlineError):
            self.world.lose(request)
        else:
            self.world.refuse(request, refusal.retry_after_s or 0)

    def _start(self, request: Request) -> None:
        told = memory_block(
            request.call.profile,
            self.monitor.value,
            all_steps=False,
            degradation=NOTHING_MORE,
            total_mb=self.monitor.total_mb,
        )
        self._applied[request] = told["applied"]
        self.world.start(request, told.get("kv_shrink_factor", 1.0))
        epoch, now = request.epoch, self.world.now
        # Admission decides upon an eviction in the midst of other work: the runner ends the call a little later.
        _ticket(request).meter.evict = lambda _: self.world.at(
            self.world.now, self.world.end, request, epoch, Code.EVICTED
        )
        seen = Seen(now, request.call.profile.hard_mb * KIB)
        self.world.at(seen.due, self._look, request, epoch, seen)

    def _look(self, request: Request, epoch: int, seen: Seen) -> None:
        """As the helper looks, and as the bus hears of it."""
        if request.epoch != epoch:
            return
        now = self.world.now
        kib = int(request.mb(now) * KIB)
        if seen.take(kib, now):
            _ticket(request).meter.see(kib / KIB)
        if kib > seen.most_kib:
            self.world.end(request, epoch, Code.MEMORY_LIMIT)
            return
        self.world.at(self._next_look_s(request, seen), self._look, request, epoch, seen)

    def _next_look_s(self, request: Request, seen: Seen) -> float:
        """When it is looked at next, without looks that would see what the last one saw."""
        now, due = self.world.now, seen.due
        if request.slope or due >= request.part_ends_s or due - now < RARELY_S:
            return due
        looks = math.ceil((request.part_ends_s - due) / (due - now))
        return due + looks * (due - now)

    def _is_short(self) -> None:
        """As `Scheduler._wait_for_memory`."""
        if not self._is_refreshing:
            self._is_refreshing = True
            self.world.at(self.world.now + REFRESH_S, self._refresh)

    def _refresh(self) -> None:
        self._is_refreshing = False
        self.control.refresh()


class LearnedBus(ThisBus):
    """The same after some time of such calls: what it learned outlives the process, as it stands in the ledger.

    Of a trace that begins with nothing it learns from the trace itself.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        for call in _last(world.before or world.calls):
            self.needs.learn(call.key, Learned(call.peak_mb, Code.OK, paused_s(call)))


def _last(calls: Sequence[Call]) -> Iterator[Call]:
    """Of each capability the calls that its history would hold, oldest first."""
    by_key: dict[str, deque[Call]] = {}
    for call in calls:
        by_key.setdefault(call.key, deque(maxlen=KEPT)).append(call)
    return chain.from_iterable(by_key.values())


def paused_s(call: Call) -> float:
    """For how many seconds a call that runs alone is seen not to grow before it grows again; all its life unseen."""
    now = 0.0
    request = Request(call)
    request.begin(now, call.curve())
    request.next_part()
    meter = Meter(lambda: now)
    seen = Seen(now, call.profile.hard_mb * KIB)
    while seen.due < call.hold_s:
        now = seen.due
        while request.part_ends_s <= now:
            request.next_part()
        kib = int(request.mb(now) * KIB)
        if seen.take(kib, now):
            meter.see(kib / KIB)
    return meter.paused_s if meter.peak_mb else call.hold_s


def _ticket(request: Request) -> Ticket:
    return cast("Ticket", request.grant)
