"""What comes of a siege, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from siege import KEEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from siege import Kept, SiegeFound


def tell_siege(found: SiegeFound) -> Iterator[str]:
    """What the hostile clients met, what the honest ones kept, and the verdict."""
    yield ""
    for kind, outcomes in found.hostile.items():
        met = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
        yield f"{kind:>17}: {met or 'nothing'}"
    yield ""
    yield f"{found.plan.connections} honest clients, calls a second: alone, beside as many honest, as many hostile"
    yield from map(_kept, found.kept)
    yield f"errors of honest clients: {found.errors}{f'; the first: {found.first_error}' if found.first_error else ''}"
    if found.idle:
        yield f"hostile clients that did nothing: {', '.join(found.idle)}"
    yield f"the verdict: {'held' if found.held else 'NOT held'} (at least {KEEPS:.0%} of the fair share)"


def _kept(kept: Kept) -> str:
    return (
        f"{kept.path:>20}: {kept.alone:8,.0f} {kept.fair:8,.0f} {kept.besieged:8,.0f}"
        f"  kept {kept.of_fair:.0%} of the fair share, {kept.of_alone:.0%} of what they have alone"
    )
