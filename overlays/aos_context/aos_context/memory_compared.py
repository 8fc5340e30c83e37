"""The comparison of a proposal with memories, which costs far more than all else at the gate, made before the lock.

A proposal is judged twice. The first time others may write meanwhile, and what is alike is kept with the number of the
last change that this moment had. The second time nobody else writes; only what was changed since is compared then, each
with its own words, so the answer is that of the second moment. All else is asked for anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aos_context.memory_filters import beside
from aos_context.memory_gate import CONFLICTS_MOST
from aos_context.memory_words import similarity, words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aos_context.artifacts import Document
    from aos_context.memory_gate import Draft
    from aos_context.memory_shelf import Shelf

CHANGED_MOST = 500
"""Memories that were changed meanwhile, beyond which a shelf's own comparison with all is as cheap."""


class Comparing:
    """The view of a shelf, which keeps what it finds alike."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.last_change = shelf.last_change()
        self.found: dict[tuple[Draft, float], list[tuple[float, Document]]] = {}
        self.item, self.active = shelf.item, shelf.active
        self.proposed, self.targeted = shelf.proposed, shelf.targeted

    def alike(self, draft: Draft, least: float) -> Iterable[tuple[float, Document]]:
        found = self.found[draft, least] = list(self._shelf.alike(draft, least))
        return found


class Compared:
    """The view of a later shelf, which compares only what has changed since."""

    def __init__(self, shelf: Shelf, before: Comparing) -> None:
        self._shelf = shelf
        self._found = before.found
        changes = shelf.changed(before.last_change, CHANGED_MOST + 1)
        self._is_much = len(changes) > CHANGED_MOST
        ids = () if self._is_much else {change.item_id for change in changes}
        self._changed = [(item, set(words(item["content"]))) for item in map(shelf.item, ids) if item is not None]
        self.item, self.active = shelf.item, shelf.active
        self.proposed, self.targeted = shelf.proposed, shelf.targeted

    def alike(self, draft: Draft, least: float) -> Iterable[tuple[float, Document]]:
        before = self._found.get((draft, least))
        if before is None or self._is_much:
            return self._shelf.alike(draft, least)
        gone = {item["id"] for item, _ in self._changed}
        kept = [(share, item) for share, item in before if item["id"] not in gone]
        if len(kept) < len(before) > CONFLICTS_MOST:  # what has more was cut off, and the next best would come up
            return self._shelf.alike(draft, least)
        own, filters = set(words(draft.content)), beside(draft)
        shares = ((similarity(own, theirs), item) for item, theirs in self._changed if filters.allow(item))
        return [*kept, *((share, item) for share, item in shares if share >= least)]
