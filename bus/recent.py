"""The roots of the log's tree at its latest sizes, without a look at the log.

Whoever signs a tree needs them to see whether what another process has just signed is in its own history.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bus.merkle import Frontier

GROUPS = 16
"""How many groups of lines it goes back."""


class RecentRoots:
    """Of a tree that grows by groups of leaves, from the first that it is told of."""

    def __init__(self) -> None:
        self._groups: deque[tuple[Frontier, Sequence[bytes]]] = deque(maxlen=GROUPS)

    def add(self, before: Frontier, leaves: Sequence[bytes]) -> None:
        """These leaves came behind the tree `before`, which does not change any more."""
        self._groups.append((before, leaves))

    def clear(self) -> None:
        """It is another tree from now on."""
        self._groups.clear()

    def at(self, size: int, more: Iterable[bytes] = ()) -> bytes | None:
        """The root of the first `size` leaves, 32 bytes; None where that cannot be told. `more` come behind all."""
        for before, leaves in reversed(self._groups):
            if before.size <= size:
                tree = before.copy()
                for leaf in itertools.islice(itertools.chain(leaves, more), size - before.size):
                    tree.append(leaf)
                return tree.root() if tree.size == size else None
        return None
