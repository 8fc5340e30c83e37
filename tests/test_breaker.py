"""The circuit breaker: what opens it, whom it lets through, and that nothing can leave it stuck."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.breaker import FAIR_WAIT_S, Breaker
from tests.runner_fixtures import Clock, clock

if TYPE_CHECKING:
    from runners.breaker import Admission


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(failures=3, first_wait_s=1.0, longest_wait_s=8.0, clock=clock)


def admitted(breaker: Breaker) -> Admission:
    admission = breaker.admit()
    assert admission is not None
    return admission


def fail(breaker: Breaker, times: int = 3) -> None:
    for _ in range(times):
        admitted(breaker).failed("connection refused")


# Closed


def test_a_new_circuit_is_closed(breaker: Breaker) -> None:
    assert breaker.to_json() == {"state": "closed", "failures": 0, "retry_in_s": None, "last_error": None}


def test_fewer_failures_than_the_limit_leave_it_closed(breaker: Breaker) -> None:
    fail(breaker, 2)
    assert breaker.to_json() == {
        "state": "closed",
        "failures": 2,
        "retry_in_s": None,
        "last_error": "connection refused",
    }


def test_only_failures_in_a_row_count(breaker: Breaker) -> None:
    for _ in range(4):
        fail(breaker, 2)
        admitted(breaker).succeeded(0.1)
    assert (breaker.state, breaker.failures, breaker.last_error) == ("closed", 0, None)


def test_a_call_that_says_nothing_neither_counts_nor_forgives(breaker: Breaker) -> None:
    fail(breaker, 2)
    admitted(breaker).give_back()
    assert breaker.failures == 2
    fail(breaker, 1)
    assert breaker.state == "open"


# Open


def test_as_many_failures_as_the_limit_open_it(breaker: Breaker) -> None:
    fail(breaker)
    assert breaker.to_json() == {
        "state": "open",
        "failures": 3,
        "retry_in_s": 1.0,
        "last_error": "connection refused",
    }
    assert breaker.admit() is None


def test_what_was_sent_before_it_opened_no_longer_counts(breaker: Breaker, clock: Clock) -> None:
    bad, good = admitted(breaker), admitted(breaker)
    fail(breaker)
    bad.failed("late")
    good.succeeded(0.1)
    assert (breaker.state, breaker.failures, breaker.last_error) == ("open", 3, "connection refused")
    clock.now_s += 1.0
    trial, late = admitted(breaker), good
    late.give_back()
    assert breaker.to_json()["state"] == "half-open"
    trial.succeeded(0.1)
    assert breaker.state == "closed"


def test_the_time_that_is_left_is_told(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 0.75
    assert breaker.retry_in_s == 0.25
    assert breaker.admit() is None
    clock.now_s += 10.0
    assert breaker.retry_in_s == 0.0


# Half-open


def test_after_the_wait_one_call_is_let_through(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 1.0
    assert breaker.admit() is not None
    assert breaker.state == "half-open"
    assert breaker.admit() is None


def test_a_good_trial_closes_it(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 1.0
    admitted(breaker).succeeded(0.1)
    assert breaker.to_json() == {"state": "closed", "failures": 0, "retry_in_s": None, "last_error": None}
    assert all(breaker.admit() for _ in range(10))


def test_each_failed_trial_doubles_the_wait_up_to_the_longest(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    waits = []
    for _ in range(6):
        waits.append(breaker.retry_in_s)
        clock.now_s += waits[-1] or 0.0
        fail(breaker, 1)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_after_a_good_trial_the_waits_begin_anew(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 1.0
    fail(breaker, 1)
    clock.now_s += 2.0
    admitted(breaker).succeeded(0.1)
    fail(breaker)
    assert breaker.retry_in_s == 1.0


def test_a_trial_that_is_given_back_makes_room_for_the_next_at_once(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 1.0
    admitted(breaker).give_back()
    assert breaker.to_json()["state"] == "open"
    assert breaker.retry_in_s == 0.0
    admitted(breaker).succeeded(0.1)
    assert breaker.state == "closed"


def test_a_trial_that_never_ends_does_not_keep_others_out_for_ever(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 1.0
    silent = admitted(breaker)
    waits = []
    for _ in range(5):
        assert breaker.admit() is None
        waits.append(breaker.retry_in_s)
        clock.now_s += waits[-1] or 0.0
        admitted(breaker)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    silent.succeeded(23.0)
    assert breaker.state == "closed"


def test_of_two_trials_the_first_word_counts(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 1.0
    first = admitted(breaker)
    clock.now_s += 1.0
    second = admitted(breaker)
    second.succeeded(0.1)
    first.failed("late")
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_a_call_counts_once_whatever_it_says_later(breaker: Breaker) -> None:
    admission = admitted(breaker)
    for _ in range(3):
        admission.failed("twice told")
    admission.succeeded(0.1)
    admission.give_back()
    assert (breaker.state, breaker.failures) == ("closed", 1)


# Calls that ran out of time


def test_calls_that_waited_for_long_without_an_answer_open_it(breaker: Breaker) -> None:
    for _ in range(3):
        admitted(breaker).timed_out(FAIR_WAIT_S, "silence")
    assert (breaker.state, breaker.last_error) == ("open", "silence")


def test_callers_in_a_hurry_shut_nobody_out(breaker: Breaker) -> None:
    for _ in range(10):
        admitted(breaker).timed_out(FAIR_WAIT_S / 2, "silence")
    assert (breaker.state, breaker.failures) == ("closed", 0)


def test_a_call_that_waited_less_than_a_good_answer_took_does_not_count(breaker: Breaker) -> None:
    admitted(breaker).succeeded(20.0)
    for _ in range(10):
        admitted(breaker).timed_out(19.0, "silence")
    assert breaker.failures == 0
    for _ in range(3):
        admitted(breaker).timed_out(20.0, "silence")
    assert breaker.state == "open"


def test_a_trial_in_a_hurry_gives_its_place_to_the_next(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now_s += 1.0
    admitted(breaker).timed_out(FAIR_WAIT_S / 2, "silence")
    assert (breaker.state, breaker.retry_in_s) == ("open", 0.0)


# Whatever happens

STEPS = st.lists(st.tuples(st.sampled_from(["admit", "good", "bad", "late", "nothing", "wait"]), st.integers(0, 7)))


@given(STEPS)
def test_a_service_that_is_well_again_is_called_again_within_the_longest_wait(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    breaker = Breaker(failures=2, first_wait_s=1.0, longest_wait_s=8.0, clock=clock)
    running: list[Admission] = []
    for step, number in steps:
        if step == "wait":
            clock.now_s += number
        elif step == "admit":
            running += filter(None, [breaker.admit()])
        elif running:
            _end(running.pop(number % len(running)), step, number)
    clock.now_s += 8.0
    admitted(breaker).succeeded(0.1)
    assert breaker.to_json() == {"state": "closed", "failures": 0, "retry_in_s": None, "last_error": None}


def _end(admission: Admission, how: str, number: int) -> None:
    match how:
        case "good":
            admission.succeeded(number)
        case "bad":
            admission.failed("bad")
        case "late":
            admission.timed_out(number, "late")
        case _:
            admission.give_back()
