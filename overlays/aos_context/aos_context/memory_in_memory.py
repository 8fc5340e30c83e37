"""A memory that ends with its process."""

from __future__ import annotations

import math
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from aos_context.artifacts import Document, days_ago, decode, encode
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.memory_filters import Filters, beside
from aos_context.memory_gate import Draft, Staged, draft_of
from aos_context.memory_gated import GatedMemoryStore, item_of
from aos_context.memory_shelf import Change
from aos_context.memory_store import Batch, Hit, Waiting
from aos_context.memory_words import similarity, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from aos_context.memory_shelf import Shelf

K1, B = 1.2, 0.75
"""Of BM25, as SQLite's FTS5 has them."""
LABELS = 3
"""Words of a memory that are no part of its content, and count in its length: status and place, type, writer."""
IDF_LEAST = 1e-6
"""As in FTS5: a word that is in half of the memories or more says next to nothing, but nothing against one."""


class InMemoryMemoryStore(GatedMemoryStore):
    """Ends with its process. For tests and for what is not to be kept; it behaves as the others do."""

    def __init__(self, config: Config = DEFAULT_CONFIG) -> None:
        super().__init__(config)
        self._mutex = threading.RLock()
        self._data = _Data(config)
        self._following = threading.Lock()

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Shelf]:
        """`_Data` checks whatever could fail before it writes, so there is nothing to take back."""
        del writes
        with self._mutex:
            yield self._data

    @contextmanager
    def following(self) -> Iterator[None]:
        with self._following:
            yield

    def close(self) -> None:
        """There is nothing to let go."""


@dataclass(slots=True)
class _Data:
    """The shelf of a store in memory. Documents are kept as bytes, so that no caller can change them."""

    _config: Config
    _items: dict[str, bytes] = field(default_factory=dict)
    _words: dict[str, Counter[str]] = field(default_factory=dict)
    _active: dict[str, str] = field(default_factory=dict)
    _batches: dict[str, Batch] = field(default_factory=dict)
    _mcrs: dict[str, list[bytes]] = field(default_factory=dict)
    _identities: dict[str, list[str]] = field(default_factory=dict)
    _records: dict[str, list[bytes]] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list)
    _followed: dict[str, int] = field(default_factory=dict)

    def item(self, item_id: str) -> Document | None:
        return item_of(self._items[item_id]) if item_id in self._items else None

    def active(self, key: str) -> str | None:
        return self._active.get(key)

    def proposed(self, identity: str) -> str | None:
        return next((one for one in self._waiting() if identity in self._identities[one]), None)

    def targeted(self, item_id: str) -> str | None:
        for one in self._waiting():
            if any(mcr.get("target_id") == item_id for mcr in self._batch(one).mcrs):
                return one
        return None

    def alike(self, draft: Draft, least: float) -> Iterable[tuple[float, Document]]:
        own, filters = set(words(draft.content)), beside(draft)
        shares = ((similarity(own, set(self._words[item["id"]])), item) for item in map(item_of, self._items.values()))
        return [(share, item) for share, item in shares if share >= least and filters.allow(item)]

    def stage(self, batch: Batch, staged: Sequence[Staged]) -> None:
        mcrs = [encode("mcr", one.mcr) for one in staged]
        self._mcrs[batch.batch_id] = mcrs
        self._identities[batch.batch_id] = [one.identity for one in staged]
        self._batches[batch.batch_id] = replace(batch, mcrs=[])

    def record(self, batch: Batch, items: Sequence[Document]) -> None:
        encoded = [encode("memory_item", item) for item in items]
        for item in items:
            before = self.item(item["id"])
            if before is not None and before["status"] == "active":
                del self._active[draft_of(before).key]
        for item, text in zip(items, encoded, strict=True):
            self._items[item["id"]] = text
            self._words[item["id"]] = Counter(words(item["content"]))
            self._changes.append(Change(len(self._changes) + 1, item["id"]))
            if item["status"] == "active":
                self._active[draft_of(item).key] = item["id"]
        self._records[batch.batch_id] = encoded
        self._batches[batch.batch_id] = replace(batch, mcrs=[])

    def batch(self, batch_id: str) -> Batch | None:
        return self._batch(batch_id) if batch_id in self._batches else None

    def recorded(self, batch_id: str) -> list[Document]:
        return [item_of(text) for text in self._records[batch_id]]

    def find(self, query: str, filters: Filters, top_k: int) -> list[Hit]:
        allowed = [item for item in map(item_of, self._items.values()) if filters.allow(item)]
        if not query.strip():
            return [Hit(item, 0.0) for item in reversed(allowed[-top_k:])]
        rarity = {word: self._idf(word) for word in sorted(set(words(query)))}
        mean = self._mean()
        counted = ((item, self._words[item["id"]]) for item in allowed)
        hits = [
            Hit(item, _bm25(counts, rarity, mean)) for item, counts in counted if not rarity.keys().isdisjoint(counts)
        ]
        return sorted(hits, key=lambda hit: -hit.score)[:top_k]

    def batches(self, run_id: str) -> list[Batch]:
        return [self._batch(one.batch_id) for one in self._batches.values() if one.run_id == run_id]

    def waiting(self, run_id: str, most: int) -> list[Waiting]:
        mine = [one for one in self._batches.values() if one.run_id == run_id and one.state == "proposed"]
        counted = ((one, self._mcrs[one.batch_id]) for one in mine[-most:])
        return [
            Waiting(one.batch_id, one.proposed_at, len(mcrs), decode("mcr", mcrs[0], one.batch_id))
            for one, mcrs in counted
        ]

    def items(self, run_id: str | None, batch_id: str | None) -> list[Document]:
        if run_id is None and batch_id is None:
            return [item_of(text) for text in self._items.values()]
        last: dict[str, Document] = {}
        for one in self._records:  # in the order of their commits
            if run_id in {None, self._batches[one].run_id} and batch_id in {None, one}:
                last |= {item["id"]: item for item in self.recorded(one)}
        return [last[item_id] for item_id in self._items if item_id in last]

    def last_change(self) -> int:
        return len(self._changes)

    def changed(self, after: int, limit: int) -> list[Change]:
        return self._changes[after : after + limit]

    def followed(self, follower: str) -> int:
        return self._followed.get(follower, 0)

    def follow(self, follower: str, number: int) -> None:
        self._followed[follower] = number

    def _waiting(self) -> list[str]:
        since = days_ago(self._config.proposal_max_age_days)
        batches = self._batches.values()
        return [one.batch_id for one in batches if one.state == "proposed" and one.proposed_at > since]

    def _batch(self, batch_id: str) -> Batch:
        mcrs = [decode("mcr", text, batch_id) for text in self._mcrs[batch_id]]
        return replace(self._batches[batch_id], mcrs=mcrs)

    def _idf(self, word: str) -> float:
        having = sum(1 for counts in self._words.values() if word in counts)
        return max(math.log((len(self._words) - having + 0.5) / (having + 0.5)), IDF_LEAST)

    def _mean(self) -> float:
        """Words of a memory, with its labels."""
        return LABELS + sum(counts.total() for counts in self._words.values()) / max(1, len(self._words))


def _bm25(counts: Counter[str], rarity: Mapping[str, float], mean: float) -> float:
    """Robertson and Zaragoza, The Probabilistic Relevance Framework (2009), with the parameters of FTS5."""
    length = K1 * (1 - B + B * (counts.total() + LABELS) / mean)
    return sum(idf * counts[word] * (K1 + 1) / (counts[word] + length) for word, idf in rarity.items())
