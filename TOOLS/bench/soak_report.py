"""What comes of a soak, for people: the verdict, small plots, and the rows of a CSV."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flat import Flatness
    from soak import Moment, Soak

WIDTH = 60
"""The most characters of a plot."""
BARS = "▁▂▃▄▅▆▇█"


def tell(soak: Soak) -> Iterator[str]:
    """The plots, how flat each figure was, and the verdict."""
    yield ""
    for name, values in _series(soak.moments).items():
        yield f"{name:>12} {sparkline(values)} {_range(values)}"
    yield ""
    yield from map(_flatness, soak.flat)
    due = soak.rate * soak.seconds
    yield f"calls answered: {soak.calls:,} of {due:,.0f}: {'kept up' if soak.keeps_up else 'did NOT keep up'}"
    yield f"errors: {soak.errors}{_first_error(soak)}"
    yield "the verdict: held" if soak.held else "the verdict: NOT held"


def rows(soak: Soak) -> Iterator[Sequence[object]]:
    """A header and a row for each interval."""
    flat = [_flat(moment) for moment in soak.moments]
    yield from map(tuple, flat[:1])
    yield from (tuple(row.values()) for row in flat)


def sparkline(values: Sequence[float | None], width: int = WIDTH) -> str:
    """A bar for each value from the lowest to the highest; a blank where there is none.

    More values than `width` are drawn as the highest of each of so many equal parts.
    """
    shown = [_highest(values[at * len(values) // width : (at + 1) * len(values) // width]) for at in range(width)]
    points = list(values) if len(values) <= width else shown
    there = [value for value in points if value is not None]
    low, spread = min(there, default=0.0), max(there, default=0.0) - min(there, default=0.0)
    top = len(BARS) - 1
    return "".join(" " if v is None else BARS[round((v - low) / spread * top) if spread else 0] for v in points)


def _highest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _series(moments: Sequence[Moment]) -> dict[str, list[float | None]]:
    ends_s = [0.0, *(moment.at_s for moment in moments)]
    lasting = [end_s - start_s for start_s, end_s in itertools.pairwise(ends_s)]
    return {
        "calls/s": [m.calls / s for m, s in zip(moments, lasting, strict=True)],
        "p99 ms": [m.p99_ms for m in moments],
        "bus RSS MB": [m.tree.rss_mb for m in moments],
        "tree PSS MB": [m.tree.pss_mb for m in moments],
        "bus fds": [m.tree.fds for m in moments],
        "processes": [m.tree.processes for m in moments],
    }


def _range(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{min(there):,.4g} to {max(there):,.4g}" if there else "-"


def _flatness(found: Flatness) -> str:
    if found.before is None or found.after is None or found.allowed is None:
        return f"{found.what}: not known; too few lines, or the kernel does not show it"
    unit = f" {found.unit}".rstrip()
    return (
        f"{found.what}: {found.before:.4g} -> {found.after:.4g}{unit}, {found.after - found.before:+.3g} "
        f"(second to last quarter; at most {found.allowed:+.3g}): {'flat' if found.is_flat else 'NOT flat'}"
    )


def _first_error(soak: Soak) -> str:
    first = next((moment.first_error for moment in soak.moments if moment.first_error), None)
    return f"; the first: {first}" if first else ""


def _flat(moment: Moment) -> dict[str, object]:
    own = {name: value for name, value in asdict(moment).items() if name != "tree"}
    return own | asdict(moment.tree)
