"""Is a figure flat over time?

The first quarter of the time is warm-up. Of the other three, the median of the last quarter is held against that of
the second: medians, since one look may fall on a moment with more calls under way than another. What grows by no more
than 5 % of the second quarter, or by no more than a few descriptors, processes or MB where 5 % are less, is flat.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tree import Tree

SHARE = 0.05
QUARTERS = 4


@dataclass(frozen=True, slots=True)
class Flatness:
    """One figure over time; `before` and `after` are the medians of the second and the last quarter.

    They are None where there are too few looks for quarters, or the figure could not be read: then it is not flat.
    """

    what: str
    unit: str
    before: float | None
    after: float | None
    allowed: float | None

    @property
    def is_flat(self) -> bool:
        return self.before is not None and self.after is not None and self.after - self.before <= (self.allowed or 0)


@dataclass(frozen=True, slots=True)
class _Figure:
    what: str
    unit: str
    read: Callable[[Tree], float | None]
    least: float


_FIGURES = (
    _Figure("memory of the bus (RSS)", "MB", lambda tree: tree.rss_mb, least=4),
    _Figure("memory of the tree (PSS)", "MB", lambda tree: tree.pss_mb, least=8),
    _Figure("descriptors of the bus", "", lambda tree: tree.fds, least=8),
    _Figure("descriptors of the tree", "", lambda tree: tree.tree_fds, least=64),
    _Figure("processes", "", lambda tree: tree.processes, least=16),
)
"""`least` is a growth that is always allowed: 16 calls under way are as many processes, with four descriptors each."""


def flatness(trees: Sequence[Tree]) -> tuple[Flatness, ...]:
    return tuple(_judge(figure, trees) for figure in _FIGURES)


def _judge(figure: _Figure, trees: Sequence[Tree]) -> Flatness:
    values = [value for tree in trees if (value := figure.read(tree)) is not None]
    quarter = len(values) // QUARTERS
    if not quarter or len(values) < len(trees):
        return Flatness(figure.what, figure.unit, None, None, None)
    before = statistics.median(values[quarter : 2 * quarter])
    after = statistics.median(values[-quarter:])
    return Flatness(figure.what, figure.unit, before, after, max(SHARE * before, figure.least))
