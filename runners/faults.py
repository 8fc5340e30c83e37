"""Why a service cannot be had, must end, or has ended, and what its calls get."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from runners.base import Code, Outcome
from runners.output import describe

if TYPE_CHECKING:
    from runners.exits import Exit


class ServiceError(Exception):
    """The service cannot be had in time. `outcome` is that of the call, of which nothing was sent."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.error)
        self.outcome = outcome


class FaultError(Exception):
    """Why a service must end though nobody asked for that. The words go on from "the service".

    `code` is that of the calls which it cuts off, `retryable` whether another start may go better, `from_outside` that
    the service itself had no part in it.
    """

    def __init__(
        self, words: str, *, code: Code = Code.CRASH, retryable: bool = True, from_outside: bool = False
    ) -> None:
        super().__init__(words)
        self.code = code
        self.retryable = retryable
        self.from_outside = from_outside


class End(NamedTuple):
    """How a service has ended, for the calls that it had. `by_bus`: it would run on, had the bus not ended it."""

    outcome: Outcome
    by_bus: bool


class PortTakenError(FaultError):
    """Another program has the port."""


def cut_off(fault: FaultError, last_words: str) -> Outcome:
    """What a call gets that a fault has cut off."""
    retryable = True if fault.from_outside else None
    return Outcome(fault.code, error=f"the service {fault}", log=last_words, retryable=retryable)


def death(exit_: Exit) -> FaultError:
    if exit_.at_limit:
        return FaultError(
            f"needed more memory than it may use, and was ended with {exit_.peak_mb:.1f} MiB", code=Code.MEMORY_LIMIT
        )
    if exit_.had_too_many:
        return FaultError(f"was ended: {exit_.lost}", code=Code.PROCESS_LIMIT)
    if exit_.was_too_full:
        return FaultError(f"was ended: {exit_.lost}", code=Code.SCRATCH_LIMIT)
    if exit_.lost is not None:
        return FaultError(f"was ended from outside ({exit_.lost})", from_outside=True)
    return FaultError("ended" if exit_.code is None else describe(exit_.code))
