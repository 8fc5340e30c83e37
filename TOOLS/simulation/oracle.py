"""A policy that knows of each call how its memory will grow and when it will end: what nobody can know.

It lets a call start only where memory is never full, now or later, so it never has one killed; it says how much could
be gained by knowing more. Calls go by the order of this bus: arrival less `AGING_S` for each point of priority. For the
first that does not fit it finds the earliest time at which it will, and lets others pass that do not delay it (EASY
backfilling, Lifka 1995). That is good, and not proved to be the best.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from bus.admission import AGING_S
from simulation.policies import Nobody

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from simulation.calls import Point
    from simulation.world import Request, World

BACKFILL_LOOKS = 64
"""How many calls are looked at, at most, for one that may pass."""

SPARE_MB = 1e-3
"""What is kept free for what rounding may add."""


SPARE_S = 1e-6
"""How much later than the end of a call, in seconds, another begins that waits for it."""


class Placed(NamedTuple):
    """A call that runs from `start_s` on."""

    start_s: float
    curve: Sequence[Point]

    @property
    def end_s(self) -> float:
        return self.start_s + self.curve[-1].age_s

    def turns(self) -> Iterator[tuple[float, float, float]]:
        """When it begins, turns and ends, by how much it has more then, and by how much more it grows then."""
        slope = 0.0
        before_mb = 0.0
        for here, there in pairwise(self.curve):
            new_slope = (there.mb - here.mb) / (there.age_s - here.age_s)
            yield self.start_s + here.age_s, here.mb - before_mb, new_slope - slope
            slope, before_mb = new_slope, there.mb
        yield self.end_s, -before_mb, -slope


class Moment(NamedTuple):
    """From `time_s` on there are `mb`, which grow by `slope` a second; just before there may have been more."""

    time_s: float
    mb: float
    slope: float
    most_mb: float


class Forecast:
    """What calls will have together. Between two moments it grows evenly."""

    def __init__(self, placed: Iterable[Placed]) -> None:
        self._moments = list(_moments(sorted(turn for call in placed for turn in call.turns())))

    def after(self, now: float) -> Sequence[Moment]:
        return self._moments[bisect_right(self._moments, now, key=_time) :]

    def fits(self, call: Placed, room_mb: float) -> bool:
        """Whether all of them with this one stay within the room for as long as it runs."""
        both = sorted([*self._parts(call.start_s, call.end_s), *call.turns()])
        return all(moment.most_mb <= room_mb for moment in _moments(both))

    def _parts(self, start_s: float, end_s: float) -> Iterator[tuple[float, float, float]]:
        """As `Placed.turns`, of all of them from `start_s` to `end_s`."""
        first = bisect_right(self._moments, start_s, key=_time)
        before = self._moments[first - 1] if first else Moment(start_s, 0.0, 0.0, 0.0)
        yield start_s, before.mb + before.slope * (start_s - before.time_s), before.slope
        for moment in self._moments[first : bisect_right(self._moments, end_s, key=_time)]:
            reached_mb = before.mb + before.slope * (moment.time_s - before.time_s)
            yield moment.time_s, moment.mb - reached_mb, moment.slope - before.slope
            before = moment


def _moments(turns: Iterable[tuple[float, float, float]]) -> Iterator[Moment]:
    """The sums at each turn. Of turns at one time the drops come first, so `most_mb` looks back as well."""
    now, mb, slope = 0.0, 0.0, 0.0
    for time_s, more_mb, more_slope in turns:
        reached_mb = mb + slope * (time_s - now)
        now, mb, slope = time_s, reached_mb + more_mb, slope + more_slope
        yield Moment(time_s, mb, slope, max(reached_mb, mb))


class Oracle(Nobody):
    """See the module."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._line: list[tuple[float, int, Request]] = []
        self._asked = 0
        self._room_mb = world.machine.room_mb - SPARE_MB

    def ask(self, request: Request) -> None:
        self._asked += 1
        place = request.asked_s - AGING_S * request.call.profile.priority
        insort(self._line, (place, self._asked, request))
        self._dispatch()

    def ended(self, request: Request, code: str) -> None:
        self._dispatch()

    def expire(self, request: Request) -> None:
        self._remove(request)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._line and (request := self._next()) is not None:
            self._remove(request)
            self.world.start(request)

    def _remove(self, request: Request) -> None:
        self._line = [waiting for waiting in self._line if waiting[2] is not request]

    def _next(self) -> Request | None:
        """The first, or one that does not delay it."""
        now, first = self.world.now, self._line[0][2]
        running = [Placed(request.started_s, request.curve) for request in self.world.running]
        forecast = Forecast(running)
        if forecast.fits(_now(first, now), self._room_mb):
            return first
        kept = self._earliest(forecast, first)
        if kept is not None:
            forecast = Forecast([*running, kept])
        for _, _, request in self._line[1 : BACKFILL_LOOKS + 1]:
            if forecast.fits(_now(request, now), self._room_mb):
                return request
        return None

    def _earliest(self, forecast: Forecast, request: Request) -> Placed | None:
        """Where it fits first, of the times at which anything turns; None where it needs more than there is."""
        curve = request.call.curve()
        places = (Placed(moment.time_s + SPARE_S, curve) for moment in forecast.after(self.world.now))
        return next((placed for placed in places if forecast.fits(placed, self._room_mb)), None)


def _now(request: Request, now: float) -> Placed:
    return Placed(now, request.call.curve())


def _time(moment: Moment) -> float:
    return moment.time_s
