"""A plot of figures from 0 to 1 in characters: one column a sample, the newest at the right, eighths of a row high."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

Sample = tuple[float, str]
"""A figure from 0 to 1, and the style of its column."""

EIGHTHS = " ▁▂▃▄▅▆▇█"
AXIS = 5
"""Columns that the scale takes, at the left."""


def plot(samples: Sequence[Sample], width: int, height: int) -> Text:
    """The last samples that fit into `width` columns, scale included, in `height` rows; at least one of either.

    A sample of 0 shows as the lowest eighth, so that it differs from none.
    """
    columns = max(1, width - AXIS)
    height = max(1, height)
    shown = samples[-columns:]
    found = Text(no_wrap=True, end="")
    for row in range(height - 1, -1, -1):
        found.append(f"{(row + 1) / height:4.2f}│" if _has_mark(row, height) else "    │", style="dim")
        found.append(" " * (columns - len(shown)))
        for value, style in shown:
            eighths = max(1, round(min(1.0, max(0.0, value)) * height * 8))
            found.append(EIGHTHS[min(8, max(0, eighths - 8 * row))], style=style)
        if row:
            found.append("\n")
    return found


def _has_mark(row: int, height: int) -> bool:
    """Whether the upper edge of a row is a quarter of the whole, or the row is the top one."""
    return row == height - 1 or ((row + 1) * 4) % height == 0
