"""The virtual clock, the clients that call and come again, and the OOM killer.

A client asks, and where its call was refused or killed it comes again after a while, until it was tried `MOST_TRIES`
times or its deadline passes; then the call is lost. Every call ends once: finished or lost.

Events stand in a heap by their times. Between two of them memory grows evenly, so the moment at which it is full is
computed, and not looked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Literal

from bus.settings import Settings
from runners.base import Code
from simulation.calls import Point, area_mb_s
from simulation.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulation.calls import Call
    from simulation.machine import Machine
    from simulation.policies import MakePolicy
    from simulation.tally import Loss

MOST_TRIES = 5
"""How often a client tries a call."""

BACKOFF_S, BACKOFF_TIMES = 1.0, 2.0
"""Seconds that a client waits after its call was killed for the first time, and how many times as long after each."""

JITTER = 0.5
"""By what share, at most, a client waits for longer than that or than it was told to, so that not all come at once."""

EVICTION_RETRIES = Settings().eviction_retries
SAMPLE_S = Settings().stress_period_s
"""As the bus has them where nobody sets them."""

TOLD_EVERY = 1000
"""Calls that come between two signs of progress."""

Do = Callable[..., None]


@dataclass(slots=True, eq=False)
class Request:
    """A call on its way. `asked_s` is when this try came, `started_s` when it began to run.

    `epoch` counts starts and ends, so that events of a run that is over are known as such. `grant` is the policy's.
    """

    call: Call
    state: Literal["away", "waiting", "running", "over"] = "away"
    tries: int = 0
    evictions: int = 0
    asked_s: float = 0.0
    started_s: float = 0.0
    epoch: int = 0
    grant: object = None
    curve: Sequence[Point] = ()
    part: int = -1
    part_mb: float = 0.0
    part_since: float = 0.0
    slope: float = 0.0

    def mb(self, now: float) -> float:
        """What it has of memory, in MiB."""
        return self.part_mb + self.slope * (now - self.part_since)

    @property
    def part_ends_s(self) -> float:
        """Until when it grows as it does now."""
        return self.started_s + self.curve[self.part + 1].age_s

    def begin(self, now: float, curve: Sequence[Point]) -> None:
        """It runs from now on, with this much memory."""
        self.state = "running"
        self.started_s = self.part_since = now
        self.epoch += 1
        self.curve, self.part = curve, -1
        self.part_mb = self.slope = 0.0

    def next_part(self) -> None:
        """It grows otherwise from here on. Raises `IndexError` at its end."""
        here, there = self.curve[self.part + 1], self.curve[self.part + 2]
        self.part += 1
        self.part_mb, self.part_since = here.mb, self.started_s + here.age_s
        self.slope = (there.mb - here.mb) / (there.age_s - here.age_s)

    def area_mb_s(self, now: float) -> float:
        """What it has had of memory since its start, in MiB times seconds."""
        return area_mb_s((*self.curve[: self.part + 1], Point(now - self.started_s, self.mb(now))))


class World:
    """A trace against one policy. `run` plays it to the end; what follows `clock` is for the policy.

    `progress` is told every now and then how many calls have come.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        machine: Machine,
        make_policy: MakePolicy,
        *,
        seed: int = 0,
        before: Sequence[Call] = (),
        progress: Callable[[int], None] = lambda come: None,
    ) -> None:
        self.now = 0.0
        self.machine = machine
        self.running: dict[Request, None] = {}
        self.tally = Tally(len(calls))
        self.calls = calls
        self.before = before
        self._come = 0
        self._open = len(calls)
        self._heap: list[tuple[float, int, Do, tuple[Any, ...]]] = []
        self._pushed = 0
        self._chance = random.Random(seed)
        self._progress = progress
        self.policy = make_policy(self)

    def run(self) -> Tally:
        """Play the trace until every call has ended."""
        self.at(self.calls[0].at_s, self._arrive)
        self.at(0.0, self._sample)
        heap, machine = self._heap, self.machine
        while self._open:
            if heap[0][0] <= machine.full_at:
                self.now, _, do, given = heappop(heap)
                do(*given)
            else:
                self.now = machine.full_at
                self._kill_largest()
        self.tally.close(self.now, self.machine)
        return self.tally

    def clock(self) -> float:
        """Seconds since the start of the trace."""
        return self.now

    def at(self, time_s: float, do: Do, *given: Any) -> None:  # noqa: ANN401  # what `do` takes
        """Call `do` then; what is to be called at the same time is called in the order of asking."""
        self._pushed += 1
        heappush(self._heap, (time_s, self._pushed, do, given))

    def start(self, request: Request, kv_factor: float = 1.0) -> None:
        """It runs from now on, told to shrink its cache by this factor."""
        request.begin(self.now, request.call.curve(kv_factor))
        self.running[request] = None
        self.tally.started += 1
        self._turn(request, request.epoch)

    def refuse(self, request: Request, retry_after_s: float) -> None:
        """It may not run, and is told to come again."""
        self.tally.refusals += 1
        self._come_again(request, retry_after_s)

    def lose(self, request: Request) -> None:
        """Its deadline has passed."""
        self._over(request, "deadline")

    def end(self, request: Request, epoch: int, code: str) -> None:
        """The run with this epoch ends with this code, if it is not over."""
        if request.epoch != epoch:
            return
        request.epoch += 1
        del self.running[request]
        self.machine.change(self.now, -request.mb(self.now), -request.slope)
        if not self.running:
            self.machine.empty(self.now)
        area_mb_s = 0.0 if code == Code.OK else request.area_mb_s(self.now)
        self.tally.ended(code, area_mb_s)
        request.state = "away"
        self.policy.ended(request, code)
        self._answered(request, code)

    # What happens by itself

    def _arrive(self) -> None:
        """The next call of the trace comes."""
        call = self.calls[self._come]
        self._come += 1
        if self._come < len(self.calls):
            self.at(self.calls[self._come].at_s, self._arrive)
        if self._come % TOLD_EVERY == 0:
            self._progress(self._come)
        request = Request(call)
        self.at(call.deadline_s, self._too_late, request)
        self._ask(request)

    def _ask(self, request: Request) -> None:
        if request.state != "away":
            return
        request.tries += 1
        request.evictions = 0
        request.asked_s = self.now
        self._admit(request)

    def _admit(self, request: Request) -> None:
        request.state = "waiting"
        self.tally.decisions += 1
        self.policy.ask(request)

    def _turn(self, request: Request, epoch: int) -> None:
        """A run begins, goes from one part of its curve to the next, or ends."""
        if request.epoch != epoch:
            return
        if request.part + 2 == len(request.curve):
            self.end(request, epoch, Code.OK)
            return
        before_mb, before_slope = request.mb(self.now), request.slope
        request.next_part()
        self.machine.change(self.now, request.part_mb - before_mb, request.slope - before_slope)
        self.at(request.part_ends_s, self._turn, request, epoch)

    def _kill_largest(self) -> None:
        """As the kernel's OOM killer chooses (oom_badness in mm/oom_kill.c): whoever has the most."""
        victim = max(self.running, key=lambda request: request.mb(self.now))
        self.end(victim, victim.epoch, Code.CRASH)

    def _sample(self) -> None:
        self.policy.sampled()
        self.tally.sampled(self.machine.calls_mb(self.now), self.policy.reserved_mb())
        self.at(self.now + SAMPLE_S, self._sample)

    # Clients

    def _answered(self, request: Request, code: str) -> None:
        """What a client, or the bus for it, does upon this end of a run."""
        self.tally.decisions += 1
        if code == Code.OK:
            self._over(request, None)
        elif code == Code.TIMEOUT:
            self._over(request, "deadline")
        elif code == Code.MEMORY_LIMIT:
            self._over(request, "over HARD")
        elif code == Code.EVICTED and request.call.repeatable and request.evictions < EVICTION_RETRIES:
            request.evictions += 1
            self._admit(request)
        else:
            self._come_again(request, BACKOFF_S * BACKOFF_TIMES ** (request.tries - 1))

    def _come_again(self, request: Request, after_s: float) -> None:
        request.state = "away"
        if request.tries >= MOST_TRIES:
            self._over(request, "gave up")
        else:
            after_s *= 1 + JITTER * self._chance.random()
            self.at(self.now + after_s, self._ask, request)

    def _too_late(self, request: Request) -> None:
        """The deadline of a call has passed, wherever it is. Its policy may know already."""
        if request.state == "running":
            self.end(request, request.epoch, Code.TIMEOUT)
        elif request.state == "waiting":
            self.policy.expire(request)
        if request.state in {"waiting", "away"}:
            self._over(request, "deadline")

    def _over(self, request: Request, loss: Loss | None) -> None:
        """The last that is heard of a call."""
        request.state = "over"
        self._open -= 1
        if loss is None:
            self.tally.finished(request.call, request.started_s - request.call.at_s)
        else:
            self.tally.lost(request.call, loss)
