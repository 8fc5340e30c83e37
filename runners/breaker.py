"""The circuit breaker of one service: after failures in a row it is left alone for a while, not called in vain.

    closed      calls go through; `FAILURES` failures in a row open it
    open        calls are refused until a wait has passed; it doubles from opening to opening, up to `LONGEST_WAIT_S`
    half-open   one call, the trial, is on its way: its success closes the circuit, its failure opens it again

The decision a reader could not guess: nothing waits for a trial to end. A trial that is cancelled, or that ends in a
way that says nothing, gives its place to the next call; and one that is silent for the length of a wait lets another
through. Otherwise a single call that hangs would shut out all others for ever. And a call counts only in the round in
which it was admitted: what was sent before the circuit opened says nothing about the service of now.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

State = Literal["closed", "open", "half-open"]

FAILURES = 5
"""Failures in a row that open a circuit, as Envoy's outlier detection has it."""

FIRST_WAIT_S = 1.0
"""Short, since most outages are restarts: whoever comes back a second later is not kept waiting for long."""

LONGEST_WAIT_S = 30.0

FAIR_WAIT_S = 1.0
"""A time limit below this says nothing about a service: any caller may set one."""


class Breaker:
    """Not safe for threads; each call costs it well under a microsecond. `clock` gives seconds and never goes back."""

    def __init__(
        self,
        *,
        failures: int = FAILURES,
        first_wait_s: float = FIRST_WAIT_S,
        longest_wait_s: float = LONGEST_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = failures
        self._first_wait_s = self._wait_s = first_wait_s
        self._longest_wait_s = longest_wait_s
        self._clock = clock
        self._state: State = "closed"
        self._round = 0
        self._failures = 0
        self._last_error: str | None = None
        self._retry_at = 0.0
        self._slowest_s = 0.0

    @property
    def state(self) -> State:
        return self._state

    @property
    def failures(self) -> int:
        """How many calls have failed since the last good one."""
        return self._failures

    @property
    def last_error(self) -> str | None:
        """What the last failure was; None after a good call."""
        return self._last_error

    @property
    def retry_in_s(self) -> float | None:
        """Seconds until another call is let through, 0 where the next one is; None while the circuit is closed."""
        return None if self._state == "closed" else max(0.0, self._retry_at - self._clock())

    def admit(self) -> Admission | None:
        """Let a call through, or None: it is refused."""
        if self._state != "closed" and not self._trial():
            return None
        return Admission(self, self._round)

    def to_json(self) -> dict[str, Any]:
        """`{"state", "failures", "retry_in_s", "last_error"}`, for people."""
        retry_in_s = self.retry_in_s
        return {
            "state": self._state,
            "failures": self._failures,
            "retry_in_s": None if retry_in_s is None else round(retry_in_s, 3),
            "last_error": self._last_error,
        }

    def _trial(self) -> bool:
        """Whether it is time for a call that tries the service. A trial that has been silent so long counts as one."""
        now = self._clock()
        if now < self._retry_at:
            return False
        if self._state == "half-open":
            self._wait_longer()
        self._state = "half-open"
        self._retry_at = now + self._wait_s
        return True

    def _wait_longer(self) -> None:
        self._wait_s = min(2 * self._wait_s, self._longest_wait_s)

    def _open(self) -> None:
        self._state = "open"
        self._round += 1
        self._retry_at = self._clock() + self._wait_s

    def _close(self) -> None:
        if self._state != "closed":
            self._round += 1
        self._state = "closed"
        self._failures = 0
        self._last_error = None
        self._wait_s = self._first_wait_s

    def _succeeded(self, took_s: float) -> None:
        self._slowest_s = max(self._slowest_s, took_s)
        if self._failures:
            self._close()

    def _failed(self, why: str) -> None:
        self._failures += 1
        self._last_error = why
        if self._state == "half-open":
            self._wait_longer()
            self._open()
        elif self._failures >= self._limit:
            self._open()

    def _was_fair(self, waited_s: float) -> bool:
        return waited_s >= max(FAIR_WAIT_S, self._slowest_s)

    def _give_back(self) -> None:
        if self._state == "half-open":
            self._state = "open"
            self._retry_at = self._clock()


class Admission:
    """One call that was let through, and what it has to say at its end; the first word counts.

    A call that has ended without one is to be given back, best in a `finally`.
    """

    __slots__ = ("_breaker", "_round")

    def __init__(self, breaker: Breaker, round_: int) -> None:
        self._breaker = breaker
        self._round = round_

    def succeeded(self, took_s: float) -> None:
        """The service is well: it has answered, after so many seconds."""
        if breaker := self._take():
            breaker._succeeded(took_s)

    def failed(self, why: str) -> None:
        """The service is not well."""
        if breaker := self._take():
            breaker._failed(why)

    def timed_out(self, waited_s: float, why: str) -> None:
        """No answer came in so many seconds: a failure, unless the service is known to need longer for a good one.

        A caller who asks for less time than others must not shut them out.
        """
        if breaker := self._take():
            if breaker._was_fair(waited_s):
                breaker._failed(why)
            else:
                breaker._give_back()

    def give_back(self) -> None:
        """The call has ended, and said nothing about the service: it was cancelled, or never sent."""
        if breaker := self._take():
            breaker._give_back()

    def _take(self) -> Breaker | None:
        """The breaker, once, and only in the round in which it let this call through."""
        breaker, mine = self._breaker, self._round
        self._round = -1
        return breaker if breaker._round == mine else None
