"""Admission control: which call runs now, which waits and for what, which is refused, and which has to go.

It has a clock and no event loop, so that a simulation runs the very same code; `scheduler` puts it behind one.

What a call needs is a slot, its capability's leave (`concurrency`) and memory. What has to wait is ordered thus: calls
of one capability by their `place`, the time of arrival less `AGING_S` for each point of priority; so priority counts
first, then age, and nothing starves. Of capabilities whose next call has the same priority those go first whose overlay
had the fewest turns since it began to wait (start-time fair queueing, Goyal et al. 1996). A capability at its limit
offers nothing, so it never holds up others.

What running calls claim of memory stands in `claims`. A call fits if the claims stay within the room: the memory that
is free, and what our calls hold of what is not. Where the first in line
does not fit, those that came up to `PASSING_S` after it may pass it; then the room is kept for it. What needs more than
there is runs alone.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from dataclasses import dataclass, field
from heapq import merge
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bus.claims import NO_NEED, Claim, Claims, Need, first_claim
from bus.errors import BusError, DeadlineError, OverloadError
from runners.base import Meter, Share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

AGING_S = 20.0
"""Seconds of waiting that weigh as much as one point of priority."""

FAIR_S = 2.0
"""Seconds of waiting that weigh as much as one turn which an overlay had and another has yet to have."""

PASSING_S = 5.0
"""How much later, in seconds of their places, calls may pass one that waits for memory."""

PASSING_LOOKS = 12
"""How many capabilities are looked at, at most, for one whose call fits beside what waits for memory."""

MARGIN = 0.08
"""The share of all memory that is never given away, so that calls alone do not bring the stress to refuse any."""

REFUSING_STRESS = 0.98
REFUSED_PRIORITY = 3
"""At `REFUSING_STRESS` calls of this priority or a lower one are refused."""

OVERRUN = 0.9
"""The part of the margin that is left where calls have grown so far beyond what was expected that one is ended."""

EVICTING_AFTER_S, EVICTING_AGAIN_S = 10.0, 1.0
"""How long the stress stays at `REFUSING_STRESS` before a call is ended, and after its end before the next is."""

RETRY_MIN_S = 1
RETRY_MAX_S = 60
RETRY_LATER_S = 5
"""Retry-After of a refusal that the queue has no part in."""

_RECENT = 64
"""Completions from which the rate is taken."""

Reason = Literal["slot", "concurrency", "memory", "turn", "stress"]


class Wish(NamedTuple):
    """A call that wants to run. `deadline` and `arrived` are times on the admission's clock, priority is 0 to 9.

    `key` is its capability, `concurrency` how many calls of that may run at once (None: any number).
    """

    key: str
    overlay: str
    priority: int
    deadline: float
    arrived: float
    concurrency: int | None = None
    need: Need = NO_NEED


@dataclass(slots=True, eq=False)
class _Lane:
    """The calls of one capability. `offer` stands in the scheduler's order while a call of it could start."""

    key: str
    overlay: str
    limit: int | None = None
    running: int = 0
    waiting: list[Ticket] = field(default_factory=list)
    offer: _Offer | None = None

    @property
    def has_room(self) -> bool:
        return self.limit is None or self.running < self.limit


@dataclass(slots=True, eq=False)
class Ticket:
    """A call that asked. `decided` is called once where it has to wait: with None for leave to run, or the refusal.

    `asked` and `started` are times on the admission's clock. `ahead` is how many waited when it came, `waited_for` what
    it waited for, in order; `claim` is what it claims.
    """

    wish: Wish
    lane: _Lane
    place: tuple[float, int]
    decided: Callable[[BusError | None], None]
    meter: Meter
    claim: Claim
    state: Literal["waiting", "running", "over"] = "waiting"
    asked: float = 0.0
    started: float = 0.0
    ahead: int = 0
    waited_for: list[Reason] = field(default_factory=list)

    def __lt__(self, other: Ticket) -> bool:
        return self.place < other.place

    @property
    def queued_s(self) -> float:
        """How long it waited, once it runs."""
        return self.started - self.asked

    @property
    def paused_s(self) -> float:
        """For how long it had not grown, at most, before it grew again; of one nobody looked at, how long it ran."""
        return self.meter.paused_s if self.meter.peak_mb else self.meter.quiet_s


_Offer = tuple[float, int, Ticket]
"""The first call of a lane, behind its place in the order of its priority, in which turns count."""


class AdmissionControl:
    """Slots, memory and a bounded queue. `stress` gives 0.0 to 1.0 and `clock` seconds.

    Whoever owns it calls `sampled` every now and then, and `expire` for a ticket whose deadline passes. `is_short` is
    called, at most once a decision, where a call waits for memory: somebody may have some to give back.
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
        self.running: dict[Ticket, None] = {}
        self.waiting = 0
        self.closed = False
        self.room_mb = math.inf
        self.held_mb = 0.0
        """What running calls were last seen to have, but for processes that they have in common."""
        self.evictions = 0
        self._slots = slots
        self._queue_limit = queue_limit
        self._stress = stress
        self._clock = clock
        self._is_short = is_short
        self._lanes: dict[str, _Lane] = {}
        self._offering: dict[tuple[str, int], set[_Lane]] = {}
        self._classes: dict[int, list[_Offer]] = {}
        self._turns: dict[tuple[str, int], float] = {}
        self._turn: dict[int, float] = {}
        self._waiting_of: Counter[str] = Counter()
        self._claims = Claims()
        self._margin_mb = 0.0
        self._held_then_mb = 0.0
        """What calls held at the last sample."""
        self._shared_mb = 0.0
        self._blocked_at = math.inf
        self._claimed_in_vain_mb = math.inf
        """What was claimed when nothing that waits could start for want of memory."""
        self._arrivals = 0
        self._started = 0
        self._refused: Counter[str] = Counter()
        self._completions = deque([clock()], maxlen=_RECENT)
        self._critical_since = math.inf
        self._evicting: Ticket | None = None
        self._evict_from = 0.0
        self._evicted_priority = -1

    # Asking and ending

    def ask(self, wish: Wish, decided: Callable[[BusError | None], None] = lambda _: None) -> Ticket:
        """Have it run now (`state` is then "running"), or wait; then `decided` is called, if it is not withdrawn.

        Nothing is decided of one that waits before this returns, so that `decided` may be set afterwards.

        Raises `OverloadError` (ERR_BUSY, ERR_STRESS, ERR_SHUTTING_DOWN) and `DeadlineError` (ERR_DEADLINE).
        """
        now = self._clock()
        refusal = self._refusal(wish, now)
        if refusal:
            raise self._counted(refusal)
        lane = self._lane(wish)
        self._arrivals += 1
        place = (wish.arrived - wish.priority * AGING_S, self._arrivals)
        meter = Meter(self._clock, self._take_use, wish.need.hard_mb or math.inf)
        ticket = Ticket(wish, lane, place, decided, meter, first_claim(wish.need), asked=now)
        reason = self._obstacle(ticket)
        if reason is None:
            self._start(ticket, now)
        else:
            self._enqueue(ticket, reason)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """A running call has ended."""
        ticket.state = "over"
        del self.running[ticket]
        ticket.meter.end()
        self.held_mb -= ticket.meter.used_mb
        lane = ticket.lane
        lane.running -= 1
        self._completions.append(self._clock())
        self._claims.remove(ticket, is_last=not self.running)
        if not self.running:
            self.held_mb = 0.0  # nothing of what rounding left
        if ticket is self._evicting:
            self._evicting = None
            self._evict_from = self._clock() + EVICTING_AGAIN_S
            self._look_at_growth()
        self._update(lane)
        if self.waiting:
            self.dispatch()

    def withdraw(self, ticket: Ticket) -> None:
        """A waiting call is not wanted any more; nothing happens where it waits no longer."""
        if ticket.state == "waiting":
            self._dequeue(ticket)
            ticket.state = "over"
            self.dispatch()  # what was kept for it is free

    def expire(self, ticket: Ticket) -> None:
        """The deadline of a waiting call has passed."""
        if ticket.state == "waiting":
            self._refuse(ticket, DeadlineError("ERR_DEADLINE", f"the deadline passed {self._waited(ticket)}"))
            self.dispatch()

    @property
    def claimed_mb(self) -> float:
        """What all running calls claim together."""
        return self._claims.mb

    @property
    def lacks_memory(self) -> bool:
        """Whether a call waits for memory."""
        return self._blocked_at < math.inf

    def close(self) -> None:
        """Refuse what waits and what comes. What runs goes on."""
        self.closed = True
        for lane in list(self._lanes.values()):
            for ticket in list(lane.waiting):
                self._refuse(ticket, _shutting_down())

    def _refusal(self, wish: Wish, now: float) -> BusError | None:
        """Why a call may not start at all; asked when it comes and again when its turn comes."""
        if self.closed:
            return _shutting_down()
        late_s = now - wish.deadline
        if late_s >= 0:
            return DeadlineError("ERR_DEADLINE", f"the deadline passed {late_s:.3f} s before the call could start")
        stress = self._stress()
        if stress >= REFUSING_STRESS and wish.priority <= REFUSED_PRIORITY:
            needed = f"from {REFUSING_STRESS} on only priority {REFUSED_PRIORITY + 1} and above is admitted"
            detail = f"stress is {stress:.3f}, and {needed}, not {wish.priority}"
            return OverloadError("ERR_STRESS", detail, retry_after_s=RETRY_LATER_S)
        return None

    def _counted(self, refusal: BusError) -> BusError:
        self._refused[refusal.code] += 1
        return refusal

    def _refuse(self, ticket: Ticket, refusal: BusError) -> None:
        self._dequeue(ticket)
        ticket.state = "over"
        ticket.decided(self._counted(refusal))

    def _waited(self, ticket: Ticket) -> str:
        """For what a call waits, in words and figures that go on from what became of it."""
        need, reason = ticket.wish.need, ticket.waited_for[-1]
        if reason == "memory":
            free_mb = max(0.0, self.room_mb - self.claimed_mb)
            needed = f"it needs {need.mb:.0f} MiB ({need.basis}), and of {self.room_mb:.0f} there were {free_mb:.0f}"
            return f"while the call waited for memory: {needed} that no running call claims"
        return f"while the call waited for {_AWAITED[reason]}"

    # The line

    def _lane(self, wish: Wish) -> _Lane:
        """The lane of a capability, with the limit that its newest call gives: a reload may change it."""
        lane = self._lanes.get(wish.key)
        if lane is None:
            return _Lane(wish.key, wish.overlay, wish.concurrency)
        if lane.limit != wish.concurrency:
            lane.limit = wish.concurrency
            self._update(lane)
            self.dispatch()
        return lane

    def _enqueue(self, ticket: Ticket, reason: Reason) -> None:
        if self.waiting >= self._queue_limit:
            raise self._counted(self._busy())
        if not self.waiting:
            self._completions.clear()
            self._completions.append(self._clock())
        ticket.ahead = self.waiting
        ticket.waited_for.append(reason)
        insort(ticket.lane.waiting, ticket)
        self.waiting += 1
        self._waiting_of[ticket.lane.overlay] += 1
        self._update(ticket.lane)
        if reason == "memory":
            self._blocked_at = min(self._blocked_at, ticket.place[0])
            self._claimed_in_vain_mb = self.claimed_mb
            self._is_short()

    def _dequeue(self, ticket: Ticket) -> None:
        lane = ticket.lane
        del lane.waiting[bisect_left(lane.waiting, ticket)]
        self.waiting -= 1
        self._waiting_of[lane.overlay] -= 1
        self._update(lane)
        if not self._waiting_of[lane.overlay]:  # it begins anew when it waits again
            del self._waiting_of[lane.overlay]
            for priority in self._classes:
                self._turns.pop((lane.overlay, priority), None)
        if not self.waiting:
            self._blocked_at = math.inf

    def _update(self, lane: _Lane) -> None:
        """After each change of a lane: keep it while it has calls, and offer its first one while it has room."""
        if lane.running or lane.waiting:
            self._lanes[lane.key] = lane
        else:
            self._lanes.pop(lane.key, None)
        best = lane.waiting[0] if lane.waiting and lane.has_room else None
        if best is not (lane.offer and lane.offer[2]):
            self._offer(lane, best)

    def _offer(self, lane: _Lane, best: Ticket | None) -> None:
        """Put a call in the place of the one that a lane offered, or none."""
        if lane.offer is not None:
            flow = lane.overlay, lane.offer[2].wish.priority
            _take_out(self._classes[flow[1]], lane.offer)
            self._offering[flow].remove(lane)
            if not self._offering[flow]:
                del self._offering[flow]
            lane.offer = None
        if best is not None:
            flow = lane.overlay, best.wish.priority
            self._offering.setdefault(flow, set()).add(lane)
            turns = self._turns[flow] = max(self._turns.get(flow, 0.0), self._turn.get(flow[1], 0.0))
            lane.offer = _offer_of(best, turns)
            insort(self._classes.setdefault(flow[1], []), lane.offer)

    def _count_turn(self, ticket: Ticket) -> None:
        """A call goes from the line to work: the next one of its overlay and priority stands further back."""
        flow = ticket.lane.overlay, ticket.wish.priority
        turns = self._turns.get(flow)
        if turns is None:
            return
        self._turn[flow[1]] = max(turns, self._turn.get(flow[1], 0.0))
        turns = self._turns[flow] = turns + 1
        offers = self._classes[flow[1]]
        for lane in self._offering.get(flow, ()):
            if lane.offer is not None:
                _take_out(offers, lane.offer)
                lane.offer = _offer_of(lane.offer[2], turns)
                insort(offers, lane.offer)

    def _in_order(self) -> Iterator[Ticket]:
        """The calls that are offered, best first: of each priority by turns, and of these by place."""
        for _, _, ticket in merge(*filter(None, self._classes.values()), key=_place_of):
            yield ticket

    def dispatch(self) -> None:
        """Start what may start."""
        while self.waiting and (ticket := self._next()) is not None:
            now = self._clock()
            refusal = self._refusal(ticket.wish, now)
            if refusal:
                self._refuse(ticket, refusal)
            else:
                self._count_turn(ticket)
                self._dequeue(ticket)
                self._start(ticket, now)
                ticket.decided(None)

    def _next(self) -> Ticket | None:
        """Who is to start now; None where nobody can."""
        self._blocked_at = math.inf
        if len(self.running) >= self._slots:
            return None
        looks = PASSING_LOOKS
        for ticket in self._in_order():
            reason = self._obstacle(ticket)
            if reason is None:
                return ticket
            if reason not in ticket.waited_for:
                ticket.waited_for.append(reason)
            if reason == "memory":
                self._blocked_at = min(self._blocked_at, ticket.place[0])
            looks -= reason in _OF_MEMORY
            if not looks:
                break
        if self._blocked_at < math.inf:
            self._claimed_in_vain_mb = self.claimed_mb
            self._is_short()
        return None

    def _obstacle(self, ticket: Ticket) -> Reason | None:
        """What a call has to wait for; None where it may start now."""
        wish = ticket.wish
        if not ticket.lane.has_room:
            return "concurrency"
        if len(self.running) >= self._slots:
            return "slot"
        if wish.priority <= self._evicted_priority:
            return "stress"
        if not wish.need.mb or self._claims.are_none:
            return None
        if not self._claims.leave_room(ticket, self.room_mb):
            return "memory"
        return "turn" if ticket.place[0] > self._blocked_at + PASSING_S else None

    # Memory

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.state = "running"
        ticket.started = now
        ticket.meter.begin(now)
        self.running[ticket] = None
        self._started += 1
        lane = ticket.lane
        lane.running += 1
        self._claims.add(ticket)
        self._update(lane)

    def sampled(self, free_mb: float, total_mb: float, shares: Mapping[str, Share]) -> None:
        """So much memory is free, of so much in all, in MiB; and these are all processes in common."""
        self._shared_mb = sum(share.used_mb for share in shares.values())
        self._margin_mb = MARGIN * total_mb
        self._held_then_mb = self.held_mb
        self.room_mb = max(0.0, free_mb + self.held_mb + self._shared_mb - self._margin_mb)
        self._claims.share(shares)
        self._look_at_stress()
        self._claims.make_anew(self.running, self._clock())
        self.dispatch()

    def refresh(self) -> None:
        """Claim anew what each running call has by now, and start what may start if that is less than before."""
        self._claims.make_anew(self.running, self._clock())
        if self.claimed_mb < self._claimed_in_vain_mb:
            self.dispatch()

    # Eviction

    def _look_at_stress(self) -> None:
        """Under lasting critical stress end one call, and admit nothing like it until the stress has passed."""
        now = self._clock()
        if self._stress() < REFUSING_STRESS:
            self._critical_since = math.inf
            self._evicted_priority = -1
            return
        self._critical_since = min(self._critical_since, now)
        lasted_s = now - self._critical_since
        if lasted_s < EVICTING_AFTER_S or now < self._evict_from or self._evicting is not None:
            return
        victim = self._evict(f"to free memory: the stress was {self._stress():.3f} for {lasted_s:.1f} s")
        if victim is not None:
            self._evicted_priority = max(self._evicted_priority, victim.wish.priority)

    def _take_use(self, more_mb: float) -> None:
        """A running call has so much more than before."""
        self.held_mb += more_mb
        if more_mb > 0:
            self._look_at_growth()

    def _look_at_growth(self) -> None:
        """Several calls that were admitted as small may turn out large together: then one is ended.

        The kernel would not wait ten seconds either, and it ends the largest, which has done the most.
        """
        left_mb = self.room_mb + self._margin_mb - self._shared_mb - self.held_mb
        lacking_mb = OVERRUN * self._margin_mb - left_mb
        if lacking_mb <= 0 or self._evicting is not None or not self._is_ours(lacking_mb):
            return
        if sum(ticket.meter.evict is not None for ticket in self.running) > 1:
            self._evict(
                f"to free memory: calls grew beyond what was expected, and {max(0.0, left_mb):.0f} MiB were left"
            )

    def _is_ours(self, lacking_mb: float) -> bool:
        """Whether our calls took what is lacking: since the last sample, or as they have half of all memory."""
        return self.held_mb - self._held_then_mb >= lacking_mb or 2 * self.held_mb >= self._margin_mb / MARGIN

    def _evict(self, why: str) -> Ticket | None:
        victim = self._victim()
        if victim is None or victim.meter.evict is None:
            return None
        self._evicting = victim
        self.evictions += 1
        victim.meter.evict(why)
        return victim

    def _victim(self) -> Ticket | None:
        """The youngest of the lowest priority, of those that can be ended; with it goes who shares its process."""
        able = [ticket for ticket in reversed(self.running) if ticket.meter.evict is not None]
        highest: dict[str | None, int] = {}
        for ticket in able:
            shared = ticket.wish.need.shared
            highest[shared] = max(ticket.wish.priority, highest.get(shared, 0))
        return min(able, key=lambda ticket: _rank(ticket, highest), default=None)

    # For people

    def report(self) -> dict[str, Any]:
        """For metrics and `GET /stress`. `refused` counts by error code, `keys` shows what runs and waits now."""
        return {
            "slots": self._slots,
            "queue_limit": self._queue_limit,
            "running": len(self.running),
            "waiting": self.waiting,
            "started": self._started,
            "evictions": self.evictions,
            "refused": dict(self._refused),
            "memory": {
                "room_mb": None if math.isinf(self.room_mb) else round(self.room_mb, 1),
                "claimed_mb": round(self.claimed_mb, 1),
            },
            "keys": {
                lane.key: {"running": lane.running, "waiting": len(lane.waiting), "limit": lane.limit}
                for lane in self._lanes.values()
            },
        }

    def _busy(self) -> OverloadError:
        detail = f"{len(self.running)} calls run and {self.waiting} wait, which is all that may"
        return OverloadError("ERR_BUSY", detail, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> int:
        """Seconds until the line will be gone at the rate of the last completions, counted since the line formed."""
        if not self.waiting:
            return RETRY_MIN_S
        between_s = (self._clock() - self._completions[0]) / max(1, len(self._completions) - 1)
        return max(RETRY_MIN_S, min(RETRY_MAX_S, math.ceil((self.waiting + 1) * between_s)))


def _offer_of(ticket: Ticket, turns: float) -> _Offer:
    return ticket.place[0] + FAIR_S * turns, ticket.place[1], ticket


def _place_of(offer: _Offer) -> tuple[float, int]:
    return offer[2].place


def _take_out(line: list[_Offer], offer: _Offer) -> None:
    del line[bisect_left(line, offer)]


def _rank(ticket: Ticket, highest: Mapping[str | None, int]) -> int:
    shared = ticket.wish.need.shared
    return ticket.wish.priority if shared is None else highest[shared]


_OF_MEMORY = frozenset({"memory", "turn"})

_AWAITED: dict[Reason, str] = {
    "slot": "a slot",
    "concurrency": "others of its capability to end",
    "memory": "memory",
    "turn": "its turn: memory was kept for one that had waited for longer",
    "stress": "the stress to pass",
}


def _shutting_down() -> OverloadError:
    return OverloadError("ERR_SHUTTING_DOWN", "the bus is shutting down", retry_after_s=RETRY_LATER_S)
