"""Admission control without an event loop: memory, turns, passing and eviction, on a clock that the test moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import runes
from bus.admission import (
    EVICTING_AFTER_S,
    EVICTING_AGAIN_S,
    MARGIN,
    PASSING_LOOKS,
    PASSING_S,
    REFUSING_STRESS,
    AdmissionControl,
    Ticket,
    Wish,
)
from bus.claims import Need
from bus.errors import BusError, DeadlineError, OverloadError
from bus.needs import Needs
from runners.base import Share

TOTAL_MB = 1000.0
ROOM_MB = TOTAL_MB * (1 - MARGIN)
LARGE = runes.parse("MEM[SOFT=2048,HARD=4096,VOL=MED]")


@dataclass
class World:
    """AdmissionControl with a clock and a stress that tests set. `said` has what became of waiting calls, by name."""

    slots: int = 64
    queue_limit: int = 1000
    now: float = 100.0
    stress: float = 0.0
    said: dict[str, BusError | None] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    shortages: int = 0

    def __post_init__(self) -> None:
        self.control = AdmissionControl(
            slots=self.slots,
            queue_limit=self.queue_limit,
            stress=lambda: self.stress,
            clock=lambda: self.now,
            is_short=self._is_short,
        )
        self.sample()

    def _is_short(self) -> None:
        self.shortages += 1

    def sample(self, free_mb: float | None = None, shares: dict[str, Share] | None = None) -> None:
        """The machine has `TOTAL_MB`, of which all is free that calls do not hold, or `free_mb`."""
        held_mb = self.control.held_mb + sum(share.used_mb for share in (shares or {}).values())
        self.control.sampled(TOTAL_MB - held_mb if free_mb is None else free_mb, TOTAL_MB, shares or {})

    def ask(
        self,
        name: str,
        mb: float = 0.0,
        *,
        key: str | None = None,
        overlay: str | None = None,
        priority: int = 5,
        deadline: float = math.inf,
        need: Need | None = None,
        limit: int | None = None,
    ) -> Ticket:
        def decided(refusal: BusError | None) -> None:
            assert name not in self.said, "a call is decided once"
            self.said[name] = refusal
            if refusal is None:
                self.started.append(name)

        need = need or Need(mb, 2 * mb, mb, "declared")
        wish = Wish(key or name, overlay or key or name, priority, deadline, self.now, limit, need)
        ticket = self.control.ask(wish, decided)
        if ticket.state == "running":
            self.started.append(name)
        return ticket


def running(*tickets: Ticket) -> list[bool]:
    return [ticket.state == "running" for ticket in tickets]


# Reservations


def test_calls_start_while_their_reservations_fit_into_the_room() -> None:
    world = World()
    tickets = [world.ask(str(number), 300) for number in range(4)]
    assert running(*tickets) == [True, True, True, False]
    assert (tickets[3].waited_for, tickets[3].ahead, world.shortages) == (["memory"], 0, 1)
    world.now += 1.5
    world.control.leave(tickets[0])
    assert running(tickets[3]) == [True]
    assert tickets[3].queued_s == 1.5


def test_a_margin_is_never_given_away() -> None:
    world = World()
    assert running(world.ask("a", ROOM_MB - 1), world.ask("b", 2)) == [True, False]
    assert running(world.ask("c", 1)) == [True]


def test_what_others_use_is_no_room_of_ours() -> None:
    world = World()
    world.sample(free_mb=380)
    assert running(world.ask("a", 200), world.ask("b", 200)) == [True, False]


def test_what_our_calls_hold_is_room_that_they_claim_already() -> None:
    world = World()
    first = world.ask("a", 400)
    first.meter.see(350)
    world.sample()
    assert world.control.room_mb == pytest.approx(ROOM_MB)
    assert running(world.ask("b", ROOM_MB - 400), world.ask("c", 10)) == [True, False]


def test_a_call_that_has_more_than_it_reserved_claims_what_it_has() -> None:
    world = World()
    first = world.ask("a", 200, need=Need(200, 700, 200, "measured"))
    first.meter.see(600)
    world.sample()
    assert running(world.ask("b", 350)) == [False]
    assert world.control.claimed_mb == 600


def test_who_looks_may_be_the_overlay_itself_so_that_no_more_is_believed_than_a_call_can_have() -> None:
    world = World()
    first = world.ask("a", 200, need=Need(200, 300, 200, "measured"))
    first.meter.see(1e9)
    world.sample(free_mb=700)
    assert world.control.held_mb == 300
    assert world.control.claimed_mb == 300


def test_a_call_that_has_stopped_to_grow_claims_what_it_has_with_some_to_spare() -> None:
    world = World()
    need = Need(500, 600, 500, "measured", settled_after_s=2.0, factor=1.25)
    first, second = world.ask("a", need=need), world.ask("b", 500)
    first.meter.see(40)
    world.now += 2.0
    world.control.refresh()
    assert running(second) == [False], "it may still grow"
    world.now += 0.1
    world.control.refresh()
    assert running(second) == [True]
    assert first.claim == (40, 10)


def test_a_call_that_nobody_looked_at_claims_what_it_reserved() -> None:
    world = World()
    first = world.ask("a", need=Need(500, 600, 500, "measured", settled_after_s=1.0))
    world.now += 100
    world.sample()
    assert first.claim == (500, 0)


def test_growing_again_after_a_pause_is_remembered_and_keeps_the_claim() -> None:
    world = World()
    first = world.ask("a", need=Need(500, 600, 500, "measured", settled_after_s=2.0, factor=1.0))
    for at_s, mb in ((0.5, 100.0), (1.9, 200.0), (1.0, 205.0)):
        world.now += at_s
        first.meter.see(mb)
    assert first.paused_s == pytest.approx(1.9), "205 is no growth worth the name"
    world.now += 0.9
    world.control.refresh()
    assert first.claim == (500, 0), "1.9 s since it grew"
    world.now += 0.2
    world.control.refresh()
    assert first.claim == (205, 0)


def test_what_needs_more_than_there_is_runs_alone() -> None:
    world = World()
    small, large = world.ask("small", 10), world.ask("large", 5 * TOTAL_MB)
    assert running(large) == [False]
    world.control.leave(small)
    assert running(large) == [True]
    assert running(world.ask("next", 10)) == [False]


def test_a_call_without_a_need_waits_for_no_memory() -> None:
    world = World()
    world.ask("large", 5 * TOTAL_MB)
    assert running(world.ask("external", need=Need())) == [True]


def test_nothing_is_left_of_claims_once_nothing_runs() -> None:
    world = World()
    tickets = [world.ask(str(number), 0.1) for number in range(50)]
    for ticket in tickets:
        world.control.leave(ticket)
    assert world.control.claimed_mb == 0


def test_what_calls_may_have_beyond_what_they_usually_have_adds_up_as_of_independent_figures() -> None:
    world = World()
    need = Need(200, 400, 100, "measured")
    tickets = [world.ask(str(number), need=need) for number in range(7)]
    assert running(*tickets) == [True] * 6 + [False]
    assert world.control.claimed_mb == pytest.approx(6 * 100 + 100 * math.sqrt(6))
    world.control.leave(tickets[0])
    assert world.control.claimed_mb == pytest.approx(6 * 100 + 100 * math.sqrt(6))
    for ticket in tickets[1:]:
        world.control.leave(ticket)
    assert world.control.claimed_mb == 0


# Passing


def test_smaller_ones_pass_one_that_waits_for_memory_for_a_while_and_then_the_room_is_kept_for_it() -> None:
    world = World()
    world.ask("running", 500)
    large = world.ask("large", 800)
    world.now += PASSING_S
    passing = world.ask("passing", 100)
    world.now += 0.01
    late = world.ask("late", 100)
    assert running(large, passing, late) == [False, True, False]
    assert late.waited_for == ["turn"]


def test_what_was_kept_is_free_once_the_one_that_waited_has_gone() -> None:
    world = World()
    world.ask("running", 500)
    large = world.ask("large", 800)
    world.now += PASSING_S + 1
    late = world.ask("late", 100)
    assert running(late) == [False]
    world.control.withdraw(large)
    assert running(late) == [True]


def test_a_deadline_in_the_line_says_what_the_call_waited_for_and_lets_others_go() -> None:
    world = World()
    world.ask("running", 500)
    large = world.ask("large", 800, deadline=world.now + 2 * PASSING_S)
    world.now += 2 * PASSING_S
    late = world.ask("late", 100)
    world.control.expire(large)
    refusal = world.said["large"]
    assert isinstance(refusal, DeadlineError)
    needed = (
        "the deadline passed while the call waited for memory: it needs 800 MiB (declared), and of 920 there were 420"
    )
    assert refusal.detail == f"{needed} that no running call claims"
    assert running(late) == [True]


# Processes in common


def workers(count: int = 2, mb: float = 300) -> Need:
    return Need(mb, 2 * mb, mb, "declared", shared="overlay OPEN", processes=count)


def test_workers_reserve_once_a_process_however_many_calls_they_have() -> None:
    world = World()
    calls = [world.ask(f"call {number}", key="overlay", need=workers()) for number in range(5)]
    assert all(running(*calls))
    assert world.control.claimed_mb == 600


def test_workers_that_stay_keep_their_claim_and_those_that_go_give_it_back() -> None:
    world = World()
    call = world.ask("call", need=workers())
    world.sample(shares={"overlay OPEN": Share(1, 250)})
    world.control.leave(call)
    other = world.ask("other", 700)
    assert running(other) == [False]
    world.sample(shares={"overlay OPEN": Share(1, 250)})
    assert running(other) == [False]
    world.sample()
    assert running(other) == [True]


def test_a_call_for_a_worker_that_is_there_needs_no_more_memory() -> None:
    world = World()
    world.control.leave(world.ask("first", need=workers()))
    world.ask("first again", need=workers())
    world.sample(shares={"overlay OPEN": Share(2, 500)})
    world.ask("full", ROOM_MB)
    assert running(world.ask("second", need=workers())) == [True]


# Turns


def test_overlays_that_wait_take_turns_however_many_calls_each_has() -> None:
    world = World(slots=1)
    first = world.ask("running")
    crowd = [world.ask(f"crowd {number}", key="crowd") for number in range(6)]
    few = [world.ask(f"few {number}", key="few") for number in range(2)]
    tickets = {ticket.place: ticket for ticket in (*crowd, *few)}
    world.control.leave(first)
    for _ in range(5):
        (current,) = world.control.running
        assert current in tickets.values()
        world.control.leave(current)
    assert world.started[1:6] == ["crowd 0", "few 0", "crowd 1", "few 1", "crowd 2"]


def test_turns_do_not_count_beyond_a_priority() -> None:
    world = World(slots=1)
    first = world.ask("running")
    for number in range(3):
        world.ask(f"high {number}", key="high", priority=9)
    world.ask("low", priority=2)
    world.control.leave(first)
    for _ in range(3):
        (current,) = world.control.running
        world.control.leave(current)
    assert world.started[1:] == ["high 0", "high 1", "high 2", "low"]


def test_an_overlay_that_comes_back_has_no_debt() -> None:
    world = World(slots=1)
    first = world.ask("running")
    for number in range(4):
        world.ask(f"a {number}", key="a")
    world.control.leave(first)
    for _ in range(4):
        (current,) = world.control.running
        world.control.leave(current)
    blocking = world.ask("blocking")
    world.ask("a again", key="a")
    world.ask("b", key="b")
    world.control.leave(blocking)
    assert world.started[-1] == "a again", "it came first"


# Eviction


@dataclass
class Evicted:
    why: list[str] = field(default_factory=list)

    def __call__(self, why: str) -> None:
        self.why.append(why)


def evictable(ticket: Ticket) -> Evicted:
    evicted = ticket.meter.evict = Evicted()
    return evicted


def test_lasting_critical_stress_ends_the_youngest_of_the_lowest_priority_one_at_a_time() -> None:
    world = World()
    names = (("old low", 2), ("young low", 2), ("high", 9))
    tickets = {}
    for name, priority in names:
        world.now += 1
        tickets[name] = world.ask(name, 10, priority=priority)
    evicted = {name: evictable(ticket) for name, ticket in tickets.items()}
    world.stress = REFUSING_STRESS
    world.sample()
    world.now += EVICTING_AFTER_S - 0.1
    world.sample()
    assert not any(call.why for call in evicted.values()), "it has not lasted"
    world.now += 0.1
    world.sample()
    world.sample()
    assert evicted["young low"].why == ["to free memory: the stress was 0.980 for 10.0 s"]
    assert not evicted["old low"].why, "one at a time"
    world.control.leave(tickets["young low"])
    world.sample()
    assert not evicted["old low"].why, "what was freed has to show first"
    world.now += EVICTING_AGAIN_S
    world.sample()
    assert evicted["old low"].why
    world.stress = REFUSING_STRESS - 0.01
    world.control.leave(tickets["old low"])
    world.now += EVICTING_AGAIN_S
    world.sample()
    assert not evicted["high"].why
    assert world.control.evictions == 2


def test_meanwhile_nothing_of_equal_or_lower_priority_starts() -> None:
    world = World()
    victim = world.ask("victim", 10, priority=5)
    evictable(victim)
    world.stress = 1.0
    world.sample()
    world.now += EVICTING_AFTER_S
    world.sample()
    equal, higher = world.ask("equal", 10, priority=5), world.ask("higher", 10, priority=6)
    assert running(equal, higher) == [False, True]
    assert equal.waited_for == ["stress"]
    world.stress = 0.5
    world.sample()
    assert running(equal) == [True]


def test_calls_that_grow_beyond_what_was_expected_are_ended_before_the_kernel_does_it() -> None:
    world = World()
    tickets = [world.ask(str(number), 90, need=Need(90, 400, 90, "measured")) for number in range(10)]
    evicted = [evictable(ticket) for ticket in tickets]
    for ticket in tickets:
        ticket.meter.see(90)
    world.sample()
    for ticket in tickets[:3]:
        assert not any(call.why for call in evicted)
        ticket.meter.see(92)
    tickets[3].meter.see(115)
    assert evicted[-1].why == ["to free memory: calls grew beyond what was expected, and 69 MiB were left"]
    assert sum(len(call.why) for call in evicted) == 1


def test_a_call_alone_is_not_ended_for_what_it_has() -> None:
    world = World()
    alone = world.ask("alone", 2 * TOTAL_MB)
    evicted = evictable(alone)
    alone.meter.see(990)
    assert not evicted.why


def test_memory_that_others_take_ends_no_call_of_ours_for_its_growth() -> None:
    world = World()
    tickets = [world.ask(str(number), 100, need=Need(100, 400, 100, "measured")) for number in range(2)]
    evicted = [evictable(ticket) for ticket in tickets]
    for ticket in tickets:
        ticket.meter.see(40)
    world.sample(free_mb=20)
    tickets[0].meter.see(41)
    assert not any(call.why for call in evicted)


def test_a_call_alone_with_memory_is_not_ended_for_one_that_has_none() -> None:
    world = World()
    local = world.ask("local", 950)
    world.ask("external", need=Need())
    evicted = evictable(local)
    local.meter.see(990)
    assert not evicted.why


def test_a_process_in_common_goes_no_sooner_than_the_highest_priority_in_it() -> None:
    world = World()
    service = Need(10, 20, 10, "declared", shared="service")
    evicted = {
        name: evictable(world.ask(name, priority=priority, need=need))
        for name, priority, need in (
            ("alone", 3, Need(10, 20, 10, "declared")),
            ("high in it", 9, service),
            ("low in it", 1, service),
        )
    }
    world.stress = 1.0
    world.sample()
    world.now += EVICTING_AFTER_S
    world.sample()
    assert [name for name, call in evicted.items() if call.why] == ["alone"]


# Where it is tight


def test_in_no_room_at_all_one_call_runs_at_a_time() -> None:
    world = World()
    world.sample(free_mb=0)
    tickets = [world.ask(str(number), need=Needs().of("k", LARGE, room_mb=0.0)) for number in range(5)]
    assert running(*tickets) == [True, False, False, False, False]


def test_what_runs_alone_is_let_in_beside_a_busy_service_too() -> None:
    world = World()
    service = Need(50, 100, 50, "declared", shared="service")
    first = world.ask("first", key="service", need=service)
    large = world.ask("large", 2 * TOTAL_MB, priority=9)
    world.now += 200
    second = world.ask("second", key="service", priority=0, need=service)
    assert running(large, second) == [False, False]
    world.control.leave(first)
    world.sample()
    assert running(large, second) == [True, False]


def test_processes_in_common_reserve_what_the_largest_of_their_calls_needs() -> None:
    world = World()
    world.ask("large", key="s", need=Need(700, 900, 700, "declared", shared="s"))
    small = world.ask("small", key="s", need=Need(10, 20, 10, "declared", shared="s"))
    assert world.control.claimed_mb == 700
    other = world.ask("other", need=Need(5, 10, 5, "declared", shared="o"))
    larger = world.ask("larger", need=Need(800, 900, 800, "declared", shared="o"))
    assert running(small, other, larger) == [True, True, False]


def test_what_was_measured_takes_the_place_of_what_was_declared_while_calls_run() -> None:
    world = World()
    world.ask("first", key="s", need=Need(700, 900, 700, "declared", shared="s"))
    world.ask("second", key="s", need=Need(20, 900, 20, "measured", shared="s"))
    assert world.control.claimed_mb == 20


def test_a_place_that_was_kept_is_nobodys_once_nobody_waits() -> None:
    world = World()
    world.ask("running", 500)
    world.control.withdraw(world.ask("large", 800))
    world.now += 10 * PASSING_S
    assert running(world.ask("small", 10)) == [True]


def test_calls_that_wait_for_the_stress_to_pass_hide_nobody_behind_them() -> None:
    world = World()
    evictable(world.ask("victim", 10, priority=5))
    world.ask("long", 900, priority=9)
    world.stress = 1.0
    world.sample()
    world.now += EVICTING_AFTER_S
    world.sample()
    for number in range(2 * PASSING_LOOKS):
        world.ask(f"equal {number}", 10, priority=5)
    world.now += 100
    higher = world.ask("higher", 100, priority=6)
    assert running(higher) == [False]
    world.control.leave(next(iter(world.control.running)))
    world.control.leave(next(iter(world.control.running)))
    assert running(higher) == [True]


def test_turns_that_were_had_while_others_expired_do_not_come_back() -> None:
    world = World(slots=1)
    blocking = world.ask("blocking")
    for number in range(3):
        world.control.withdraw(world.ask(f"x gone {number}", key="x"))
    for number in range(20):
        world.ask(f"y {number}", key="y")
    world.control.leave(blocking)
    for _ in range(10):
        world.control.leave(next(iter(world.control.running)))
    for number in range(4):
        world.ask(f"x {number}", key="x")
    for _ in range(6):
        world.control.leave(next(iter(world.control.running)))
    assert sum(name.startswith("x") for name in world.started[-6:]) <= 4
    assert sum(name.startswith("y") for name in world.started[-6:]) >= 2


def test_one_that_cannot_stay_may_come_again_at_once_where_nobody_waits() -> None:
    world = World()
    world.now += 3600
    assert world.control.retry_after_s() == 1


# Whatever happens


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 3), st.integers(0, 9), st.integers(0, 700)),
        st.tuples(st.just("leave"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("withdraw"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("see"), st.integers(0, 30), st.just(0), st.integers(1, 500)),
        st.tuples(st.just("pass"), st.integers(0, 5), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=200)
@given(MOVES)
def test_claims_stay_within_the_room_and_nobody_is_forgotten(moves: list[tuple[str, int, int, int]]) -> None:
    world = World(slots=6, queue_limit=20)
    tickets: list[Ticket] = []
    for move, which, priority, mb in moves:
        if move == "ask":
            try:
                tickets.append(
                    world.ask(f"call {len(world.said)}-{len(tickets)}", mb, key=f"key {which}", priority=priority)
                )
            except OverloadError:
                assert world.control.waiting == 20
        elif move == "pass":
            world.now += which
            world.sample()
        elif tickets:
            ticket = tickets[which % len(tickets)]
            if move == "leave" and ticket.state == "running":
                world.control.leave(ticket)
            elif move == "withdraw":
                world.control.withdraw(ticket)
            elif move == "see" and ticket.state == "running":
                ticket.meter.see(float(mb))
        check(world, tickets)
    for ticket in tickets:
        world.control.withdraw(ticket)
    while world.control.running:
        world.control.leave(next(iter(world.control.running)))
    assert (world.control.waiting, world.control.claimed_mb) == (0, 0)
    assert world.control.report()["keys"] == {}


def check(world: World, tickets: list[Ticket]) -> None:
    control = world.control
    active = [ticket for ticket in tickets if ticket.state == "running"]
    assert list(control.running) == sorted(active, key=lambda ticket: list(control.running).index(ticket))
    assert len(active) <= 6
    assert control.waiting == sum(ticket.state == "waiting" for ticket in tickets)
    assert control.claimed_mb == pytest.approx(sum(ticket.claim.mb for ticket in active))
    reserved_mb = [ticket.wish.need.mb for ticket in active if ticket.wish.need.mb >= 1]
    grown = any(ticket.meter.used_mb > ticket.wish.need.mb for ticket in active)
    assert grown or len(reserved_mb) <= 1 or sum(reserved_mb) <= control.room_mb + 1
    if not active:
        assert not control.waiting, "nothing runs, and yet somebody waits"
