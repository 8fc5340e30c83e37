"""Long-term memory: what outlives a run. It is proposed at any time and committed only at a milestone.

`propose` stages a batch, `commit` makes it part of memory, whole or not at all; that only a milestone commits is the
rule of `runs`, not of a store. A commit that is repeated, say after a lost answer, gives the first one's answer.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from aos_context.artifacts import Document, days_ago, decode, encode, now
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.errors import NotFoundError, SchemaError
from aos_context.memory_gate import (
    ID_PATTERN,
    Conflict,
    Draft,
    Duplicate,
    Proposer,
    Staged,
    View,
    check_members,
    check_name,
    draft_of,
    holds,
    judge,
    ordered_id,
    settle,
)
from aos_context.memory_words import similarity, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

SCOPES = ("global", "task", "run")
STATUSES = ("active", "superseded", "deleted")
TYPES = ("fact", "preference", "decision", "constraint", "procedure", "observation")
K1, B = 1.2, 0.75
"""Of BM25, as SQLite's FTS5 has them."""
LABELS = 3
"""Words of a memory that are no part of its content, and count in its length: status and place, type, writer."""
IDF_LEAST = 1e-6
"""As in FTS5: a word that is in half of the memories or more says next to nothing, but nothing against one."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which memories a search sees: global ones, and those of the task and of the run that are named.

    `scope` narrows that to one scope, `status` "any" widens it to those that no longer hold.
    """

    scope: str | None = None
    status: str = "active"
    type: str | None = None
    task_id: str | None = None
    run_id: str | None = None
    min_confidence: float = 0.0
    writer: str | None = None

    @classmethod
    def parse(cls, filters: Mapping[str, Any] | None) -> Filters:
        """None is as good as left out. Raises `SchemaError`."""
        allowed = tuple(cls.__dataclass_fields__)
        check_members("filters", {} if filters is None else filters, allowed)
        given = {name: value for name, value in (filters or {}).items() if value is not None}
        choices = {"scope": SCOPES, "status": (*STATUSES, "any"), "type": TYPES}
        faults = [
            {"path": f"$.{name}", "message": f"{given[name]!r} is not one of {', '.join(values)}"}
            for name, values in choices.items()
            if name in given and given[name] not in values
        ]
        least = given.get("min_confidence", 0.0)
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
            faults.append({"path": "$.min_confidence", "message": f"{least!r} is not a number from 0 to 1"})
        if faults:
            raise SchemaError("filters", faults)
        return cls(**given)

    def allow(self, item: Document) -> bool:
        return (
            holds(item, task_id=self.task_id, run_id=self.run_id)
            and self.scope in {None, item["scope"]}
            and self.status in {"any", item["status"]}
            and self.type in {None, item["type"]}
            and self.writer in {None, item["writer"]}
            and item["confidence"] >= self.min_confidence
        )


def beside(draft: Draft) -> Filters:
    """Active memories of the draft's type, scope and place."""
    return Filters(scope=draft.scope, type=draft.type, task_id=draft.task_id, run_id=draft.run_id)


@dataclass(frozen=True, slots=True)
class Hit:
    """`score` is the store's own (BM25, or a similarity of vectors), higher is better; 0 where nothing was asked."""

    item: Document
    score: float


@dataclass(frozen=True, slots=True)
class ProposeResult:
    """`staged` new changes wait. Duplicates and conflicts are no errors: the caller decides what to make of them."""

    batch_id: str
    staged: int
    duplicates: tuple[Duplicate, ...] = ()
    conflicts: tuple[Conflict, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`items` are what the batch added or changed, as it was then; `already` if it was committed before."""

    batch_id: str
    items: list[Document]
    already: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What was proposed together: `mcrs` without what was there already, each with its writer; "empty" without any."""

    batch_id: str
    state: Literal["proposed", "empty", "committed"]
    run_id: str | None
    task_id: str | None
    mcrs: list[Document]
    proposed_at: str
    committed_at: str | None = None
    committed_by: str | None = None


class MemoryStore(Protocol):
    """All that a memory must be. Whose batches are whose, and what became of them, is in the ledgers of the runs."""

    def search(self, query: str, filters: Mapping[str, Any] | None = None, top_k: int | None = None) -> list[Hit]:
        """The best matches of any of the query's words, best first, equals as they came; of an empty query the newest.

        Every query is words: there is no syntax in it. `filters` are those of `Filters`, `top_k` is 1 to
        `Config.search_max_hits`. Raises `SchemaError`.
        """

    def propose(self, mcrs: Sequence[Document], scope_filters: Mapping[str, Any] | None = None) -> ProposeResult:
        """Stage changes as a batch; `scope_filters` are those of `Proposer`. Raises `SchemaError`, staging nothing."""

    def commit(self, batch_id: str) -> CommitResult:
        """Make a batch part of memory; one that was committed before gives that commit's answer.

        Raises `NotFoundError`, and `ConflictError` where it can no longer be made.
        """


@runtime_checkable
class RecordingMemoryStore(MemoryStore, Protocol):
    """A memory that can also say what it holds: what a crash cut off is found in it, and who committed stands in it."""

    def commit(self, batch_id: str, *, committed_by: str | None = None) -> CommitResult:
        """As `MemoryStore`; each item carries `committed_by`."""

    def batch(self, batch_id: str) -> Batch:
        """Raises `NotFoundError`."""

    def batches(self, run_id: str) -> list[Batch]:
        """Those that a run proposed, oldest first."""

    def recorded(self, batch_id: str) -> list[Document]:
        """What a batch added or changed, as it was then; nothing before its commit. Raises `NotFoundError`."""

    def item(self, item_id: str) -> Document | None:
        """As it is now."""

    def items(self, *, run_id: str | None = None, batch_id: str | None = None) -> list[Document]:
        """The memories as they are now, oldest first.

        Of a run, or of one batch, those that it added or changed, as its own last change of each had made them: what
        others have made of them since is theirs.
        """

    def close(self) -> None:
        """Nothing is asked of it after this."""


class Shelf(View, Protocol):
    """A store within one transaction."""

    def stage(self, batch: Batch, staged: Sequence[Staged]) -> None: ...

    def record(self, batch: Batch, items: Sequence[Document]) -> None:
        """The batch as it is once committed, and the memories that it adds or changes."""

    def batch(self, batch_id: str) -> Batch | None: ...

    def recorded(self, batch_id: str) -> list[Document]:
        """The items of `record`, as they were."""

    def find(self, query: str, filters: Filters, top_k: int) -> list[Hit]: ...

    def batches(self, run_id: str) -> list[Batch]: ...

    def items(self, run_id: str | None, batch_id: str | None) -> list[Document]: ...


class GatedMemoryStore(ABC):
    """A store with the gate before it: one derives from it and says what a transaction is."""

    def __init__(self, config: Config = DEFAULT_CONFIG) -> None:
        self.config = config

    @abstractmethod
    def transaction(self, *, writes: bool) -> AbstractContextManager[Shelf]:
        """One moment of the store; what is written is kept if the block ends without an error, and else not at all."""

    @abstractmethod
    def close(self) -> None:
        """Nothing is asked of it after this."""

    def search(self, query: str, filters: Mapping[str, Any] | None = None, top_k: int | None = None) -> list[Hit]:
        wanted, parsed = self.checked(query, top_k), Filters.parse(filters)
        with self.transaction(writes=False) as shelf:
            return shelf.find(query, parsed, wanted)

    def propose(self, mcrs: Sequence[Document], scope_filters: Mapping[str, Any] | None = None) -> ProposeResult:
        proposer = Proposer.parse(scope_filters)
        with self.transaction(writes=True) as shelf:
            judgement = judge(mcrs, proposer, shelf, self.config)
            staged = [one.mcr for one in judgement.staged]
            state: Literal["proposed", "empty"] = "proposed" if staged else "empty"
            batch = Batch(ordered_id("batch"), state, proposer.run_id, proposer.task_id, staged, now())
            shelf.stage(batch, judgement.staged)
        return ProposeResult(batch.batch_id, judgement.new, judgement.duplicates, judgement.conflicts)

    def commit(self, batch_id: str, *, committed_by: str | None = None) -> CommitResult:
        check_name("commit", "committed_by", committed_by)
        with self.transaction(writes=True) as shelf:
            batch = _found(shelf, batch_id)
            if batch.state == "committed":
                return CommitResult(batch_id, shelf.recorded(batch_id), already=True)
            proposer = Proposer(task_id=batch.task_id, run_id=batch.run_id)
            items = settle(batch.mcrs, proposer, shelf, batch_id=batch_id, committed_by=committed_by)
            shelf.record(replace(batch, state="committed", committed_at=now(), committed_by=committed_by), items)
        return CommitResult(batch_id, items, already=False)

    def batch(self, batch_id: str) -> Batch:
        with self.transaction(writes=False) as shelf:
            return _found(shelf, batch_id)

    def batches(self, run_id: str) -> list[Batch]:
        with self.transaction(writes=False) as shelf:
            return shelf.batches(run_id)

    def recorded(self, batch_id: str) -> list[Document]:
        with self.transaction(writes=False) as shelf:
            return shelf.recorded(batch_id) if _found(shelf, batch_id).state == "committed" else []

    def item(self, item_id: str) -> Document | None:
        with self.transaction(writes=False) as shelf:
            return shelf.item(item_id)

    def items(self, *, run_id: str | None = None, batch_id: str | None = None) -> list[Document]:
        with self.transaction(writes=False) as shelf:
            return shelf.items(run_id, batch_id)

    def checked(self, query: str, top_k: int | None) -> int:
        """`top_k`, or what it is by default. Raises `SchemaError`."""
        if not isinstance(query, str):
            raise SchemaError("search", [{"path": "$.query", "message": f"{query!r} is not a string"}])
        wanted = self.config.search_top_k if top_k is None else top_k
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= self.config.search_max_hits:
            message = f"{top_k!r} is not a whole number from 1 to {self.config.search_max_hits}"
            raise SchemaError("search", [{"path": "$.top_k", "message": message}])
        return wanted


class InMemoryMemoryStore(GatedMemoryStore):
    """Ends with its process. For tests and for what is not to be kept; it behaves as the others do."""

    def __init__(self, config: Config = DEFAULT_CONFIG) -> None:
        super().__init__(config)
        self._mutex = threading.RLock()
        self._data = _Data(config)

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Shelf]:
        """`_Data` checks whatever could fail before it writes, so there is nothing to take back."""
        del writes
        with self._mutex:
            yield self._data

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

    def items(self, run_id: str | None, batch_id: str | None) -> list[Document]:
        if run_id is None and batch_id is None:
            return [item_of(text) for text in self._items.values()]
        last: dict[str, Document] = {}
        for one in self._records:  # in the order of their commits
            if run_id in {None, self._batches[one].run_id} and batch_id in {None, one}:
                last |= {item["id"]: item for item in self.recorded(one)}
        return [last[item_id] for item_id in self._items if item_id in last]

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


def item_of(text: bytes) -> Document:
    """A memory as a store keeps it. Raises `BrokenError`."""
    return decode("memory_item", text, "a memory")


def _found(shelf: Shelf, batch_id: str) -> Batch:
    known = isinstance(batch_id, str) and ID_PATTERN.fullmatch(batch_id)
    batch = shelf.batch(batch_id) if known else None
    if batch is None:
        raise NotFoundError(f"there is no batch {batch_id!r}", batch_id=batch_id)
    return batch
