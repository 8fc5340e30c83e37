"""A memory behind the gate, for stores that have transactions: its rules hold for all of them, and none has its own.

A store that derives from `GatedMemoryStore` says what a transaction is, and what it keeps in one. Its changes of
memories are numbered in the order of their commits; a follower, which brings them to another place, keeps here the
number up to which it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from aos_context.artifacts import Document, decode, described, now
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.errors import NotFoundError, SchemaError
from aos_context.memory_compared import Compared, Comparing
from aos_context.memory_filters import Filters
from aos_context.memory_gate import ID_PATTERN, Proposer, check_name, judge, ordered_id, settle
from aos_context.memory_store import Batch, CommitResult, ProposeResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from aos_context.memory_shelf import Change, Shelf
    from aos_context.memory_store import Hit, Waiting


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
        with self.transaction(writes=False) as shelf:
            before = Comparing(shelf)
            judge(mcrs, proposer, before, self.config)  # what costs most is done while others may write
        with self.transaction(writes=True) as shelf:
            judgement = judge(mcrs, proposer, Compared(shelf, before), self.config)
            staged = [one.mcr for one in judgement.staged]
            state: Literal["proposed", "empty"] = "proposed" if staged else "empty"
            batch = Batch(ordered_id("batch"), state, proposer.run_id, proposer.task_id, staged, now())
            shelf.stage(batch, judgement.staged)
        return ProposeResult(batch.batch_id, len(staged), judgement.duplicates, judgement.conflicts)

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

    def waiting(self, run_id: str, most: int) -> list[Waiting]:
        with self.transaction(writes=False) as shelf:
            return shelf.waiting(run_id, most)

    def recorded(self, batch_id: str) -> list[Document]:
        with self.transaction(writes=False) as shelf:
            return shelf.recorded(batch_id) if _found(shelf, batch_id).state == "committed" else []

    def item(self, item_id: str) -> Document | None:
        with self.transaction(writes=False) as shelf:
            return shelf.item(item_id)

    def items(self, *, run_id: str | None = None, batch_id: str | None = None) -> list[Document]:
        with self.transaction(writes=False) as shelf:
            return shelf.items(run_id, batch_id)

    @abstractmethod
    def following(self) -> AbstractContextManager[None]:
        """As long as the block lasts nobody else, in any process, is in such a block. Raises `BusyError`."""

    def changed(self, after: int, limit: int) -> list[Change]:
        """The first changes behind number `after`, in their order, `limit` at most."""
        with self.transaction(writes=False) as shelf:
            return shelf.changed(after, limit)

    def followed(self, follower: str) -> int:
        """Up to which change this follower has brought all; 0 for one that is not known."""
        with self.transaction(writes=False) as shelf:
            return shelf.followed(follower)

    def follow(self, follower: str, number: int) -> None:
        """Keep that this follower has brought all changes up to this one."""
        with self.transaction(writes=True) as shelf:
            shelf.follow(follower, number)

    def checked(self, query: str, top_k: int | None) -> int:
        """`top_k`, or what it is by default. Raises `SchemaError`."""
        if not isinstance(query, str):
            raise SchemaError("search", [{"path": "$.query", "message": f"{described(query)} is not a string"}])
        wanted = self.config.search_top_k if top_k is None else top_k
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= self.config.search_max_hits:
            message = f"{described(top_k)} is not a whole number from 1 to {self.config.search_max_hits}"
            raise SchemaError("search", [{"path": "$.top_k", "message": message}])
        return wanted


def item_of(text: bytes) -> Document:
    """A memory as a store keeps it. Raises `BrokenError`."""
    return decode("memory_item", text, "a memory")


def _found(shelf: Shelf, batch_id: str) -> Batch:
    known = isinstance(batch_id, str) and ID_PATTERN.fullmatch(batch_id)
    batch = shelf.batch(batch_id) if known else None
    if batch is None:
        raise NotFoundError(f"there is no batch {batch_id!r}", batch_id=batch_id)
    return batch
