"""What running calls claim of memory: of each what it is expected to have and how much more that may become; and all.

A call claims what such calls usually have, or what it has if that is more, and beyond that a spread, up to what it was
admitted with. Once it has not grown for longer than calls of its kind pause before they grow again, it claims what it
has, with some to spare. Not all calls are large at once: so spreads add up as those of independent figures do, to the
root of the sum of their squares, and the claims together are the 95th percentile of the sum where each alone is that of
a call (of normal distributions; others may turn out larger).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from runners.base import Share

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bus.admission import Ticket
    from runners.base import Meter

NOTHING_MB = 0.5
"""Claims below this are what rounding left."""

Basis = Literal["none", "declared", "measured"]


class Need(NamedTuple):
    """What a call takes of memory, in MiB, and how that is known.

    `mb` is reserved for it where it runs alone, `usual_mb` is what such calls have on average, and it may never have
    more than `hard_mb`. Where it has not grown for `settled_after_s` seconds it is taken to have grown as far as it
    will: then `factor` times what it has is reserved, where that is less. Calls with the same `shared` run in common
    processes, at most so many as `processes`, and each of these reserves `mb` once.
    """

    mb: float = 0.0
    hard_mb: float = 0.0
    usual_mb: float = 0.0
    basis: Basis = "none"
    settled_after_s: float = math.inf
    factor: float = 1.0
    shared: str | None = None
    processes: int = 1


NO_NEED = Need()


NOTHING_SHARED = Share(0, 0.0)


class Claim(NamedTuple):
    """What a running call claims, in MiB: what it is expected to have, and how much more that may become."""

    mb: float
    spread_mb: float


NO_CLAIM = Claim(0.0, 0.0)


@dataclass(slots=True, eq=False)
class _Common:
    """Processes that calls have in common: so many `processes` are claimed, and `claim_mb` for all of them."""

    need: Need
    running: int = 0
    share: Share = NOTHING_SHARED
    processes: int = 0
    claim_mb: float = 0.0

    def takes(self, need: Need) -> bool:
        """Whether a call's need counts from now on: that of the largest, and of what is known rather than declared."""
        if need is self.need:
            return False
        is_better = (need.basis, self.need.basis) == ("measured", "declared")
        return is_better or not self.running or need.mb > self.need.mb

    @property
    def are_enough(self) -> bool:
        """Whether one more call would have no more processes started."""
        return self.running < self.processes or self.processes >= self.need.processes

    def processes_with(self, running: int) -> int:
        return max(self.share.processes, min(running, self.need.processes))

    def claim_with(self, processes: int) -> float:
        return max(processes * self.need.mb, self.share.used_mb)


class Claims:
    """All claims of the calls that run. What a call claims by now stands in its ticket."""

    def __init__(self) -> None:
        self._expected_mb = 0.0
        self._squares = 0.0
        """Of the spreads of all claims."""
        self._common: dict[str, _Common] = {}

    @property
    def mb(self) -> float:
        """What all running calls claim together."""
        return self._expected_mb + math.sqrt(self._squares)

    @property
    def are_none(self) -> bool:
        return self._expected_mb < NOTHING_MB

    def leave_room(self, ticket: Ticket, room_mb: float) -> bool:
        """Whether a call fits into a room beside those that run."""
        need, (more_mb, spread_mb) = ticket.wish.need, ticket.claim
        if need.shared is not None:
            more_mb = self._more_in_common(need)
        return not more_mb or self._expected_mb + more_mb + math.sqrt(self._squares + spread_mb**2) <= room_mb

    def add(self, ticket: Ticket) -> None:
        """A call starts."""
        need = ticket.wish.need
        if need.shared is None:
            self._expected_mb += ticket.claim.mb
            self._squares += ticket.claim.spread_mb**2
        else:
            self._join(need.shared, need)

    def remove(self, ticket: Ticket, *, is_last: bool) -> None:
        """A call has ended. Processes in common may stay: what there is of them is told by `share`."""
        shared = ticket.wish.need.shared
        if shared is not None:
            self._common[shared].running -= 1
        self._expected_mb -= ticket.claim.mb
        self._squares = max(0.0, self._squares - ticket.claim.spread_mb**2)
        if is_last:  # nothing of what rounding left
            self._expected_mb = self._in_common_mb()
            self._squares = 0.0

    def share(self, shares: Mapping[str, Share]) -> None:
        """These are all processes in common that there are."""
        for name, common in list(self._common.items()):
            common.share = shares.get(name, NOTHING_SHARED)
            if not common.running and not common.share.processes:
                self._expected_mb -= common.claim_mb
                del self._common[name]
            else:
                self._reclaim(common)

    def make_anew(self, running: Iterable[Ticket], now: float) -> None:
        """Of each running call what it claims by now."""
        expected_mb = squares = 0.0
        for ticket in running:
            claim = ticket.claim = claim_of(ticket.wish.need, ticket.meter, now)
            expected_mb += claim.mb
            squares += claim.spread_mb**2
        self._expected_mb = expected_mb + self._in_common_mb()
        self._squares = squares

    def _in_common_mb(self) -> float:
        return sum(common.claim_mb for common in self._common.values())

    def _more_in_common(self, need: Need) -> float:
        """What one more call would add to what its processes in common claim."""
        common = self._common.get(need.shared or "")
        if common is None:
            return need.mb
        if common.are_enough and need.mb <= common.need.mb:
            return 0.0
        processes = common.processes_with(common.running + 1)
        return max(0.0, processes * max(need.mb, common.need.mb) - common.claim_mb)

    def _join(self, name: str, need: Need) -> None:
        """One more call for processes in common. More of them may be started for it."""
        common = self._common.get(name)
        if common is None:
            common = self._common[name] = _Common(need)
        if common.takes(need):
            common.need = need
            self._reclaim(common)
        grows = not common.are_enough
        common.running += 1
        if grows:
            self._reclaim(common)

    def _reclaim(self, common: _Common) -> None:
        common.processes = common.processes_with(common.running)
        claim_mb = common.claim_with(common.processes)
        self._expected_mb += claim_mb - common.claim_mb
        common.claim_mb = claim_mb


def first_claim(need: Need) -> Claim:
    """What a call claims at its start for itself: nothing where it runs in processes in common."""
    if need.shared is not None:
        return NO_CLAIM
    usual_mb = need.usual_mb or need.mb
    return Claim(usual_mb, need.mb - usual_mb)


def claim_of(need: Need, meter: Meter, now: float) -> Claim:
    """What a running call claims by now; nothing for itself where it runs in processes in common."""
    used_mb = meter.used_mb
    if need.shared is not None:
        return NO_CLAIM
    if used_mb > 0 and now - meter.grown_at > need.settled_after_s:
        return Claim(used_mb, max(0.0, min(need.mb, need.factor * used_mb) - used_mb))
    expected_mb = max(used_mb, need.usual_mb or need.mb)
    return Claim(expected_mb, max(0.0, need.mb - expected_mb))
