"""How the programs end that helpers start."""

from __future__ import annotations

from dataclasses import dataclass

TOO_MANY, TOO_MUCH, TOO_FULL = "too many processes", "too much memory", "too much in scratch"
"""How `Exit.lost` begins of what had more of any than it may."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended.

    `code` is negative for a signal, as in `subprocess`; None where nobody can tell. `failed` says why it did not start
    at all. `lost` says what ended it from outside, where that was its helper's doing, or that it left too much in
    scratch.
    """

    code: int | None
    cpu_ms: float | None = None
    peak_mb: float | None = None
    peak_floor_mb: float | None = None
    """The helper's own size, below which the kernel puts no peak."""
    lost: str | None = None
    failed: OSError | None = None
    at_limit: bool = False
    """Whether the kernel ended it, as it needed more than the limit of its cgroup."""

    @property
    def had_too_much(self) -> bool:
        """Whether it was ended since it had more memory than it may, or needed it: then `peak_mb` is what it had."""
        return self.at_limit or (self.lost is not None and self.lost.startswith(TOO_MUCH))

    @property
    def had_too_many(self) -> bool:
        """Whether it was ended since it had more processes than it may."""
        return self.lost is not None and self.lost.startswith(TOO_MANY)

    @property
    def was_too_full(self) -> bool:
        """Whether its scratch folder had more than it may: then it was ended, or had ended by itself."""
        return self.lost is not None and self.lost.startswith(TOO_FULL)
