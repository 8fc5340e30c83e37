"""Which commands run a Python script."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class PythonCommand:
    """The interpreter with its options, and what stands after them."""

    interpreter: tuple[str, ...]
    arguments: tuple[str, ...]


def split(argv: Sequence[str]) -> PythonCommand | None:
    return None
