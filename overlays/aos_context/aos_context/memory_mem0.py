"""A memory that is searched by meaning: Mem0 (https://docs.mem0.ai, the package `mem0ai` from 2.0 on).

Mem0 has no batches, no transactions and no history that a gate could ask. So another store of this package keeps what
was proposed and committed, and decides; Mem0 gets every memory that a commit adds or changes, as it is and without a
model that rewrites it (`infer=False`), and is asked at each search. What it finds is looked up in that store: a memory
that Mem0 still has in an old form, or that others wrote into it, is never shown as ours.

So what that store has committed is committed, whatever becomes of Mem0. That store also keeps up to which change Mem0
has all; what is behind it, whoever has committed it, is brought with the next commits, `BROUGHT_MOST` with each. `sync`
brings all of it, and what a Mem0 has lost.

This module needs no `mem0`: the caller makes the `mem0.Memory`, and with it chooses models and the vector store. Mem0
sends telemetry unless `MEM0_TELEMETRY=False` is in the environment before it is imported.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

from aos_context.errors import ContextError, UnreachableError
from aos_context.memory_filters import Filters
from aos_context.memory_store import Batch, CommitResult, Hit, ProposeResult, Waiting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aos_context.artifacts import Document
    from aos_context.memory_gated import GatedMemoryStore

USER_ID = "aos_context"
"""Mem0 wants one of a user, an agent or a run for each memory; ours are those of one user."""

BROUGHT_MOST = 100
"""Changes of former commits that one commit brings beside its own: it is to end soon."""

_log = logging.getLogger(__name__)


class Mem0(Protocol):
    """What is used of `mem0.Memory`."""

    def add(self, messages: str, *, user_id: str, metadata: Document, infer: bool) -> Any: ...

    def update(self, memory_id: str, text: str, metadata: Document) -> Any: ...

    def get_all(self, *, filters: Document, top_k: int) -> Any: ...

    def search(self, query: str, *, filters: Document, top_k: int, threshold: float) -> Any: ...


class Mem0MemoryStore:
    """A `MemoryStore` of a `mem0.Memory` and of the store that decides, which has to last as long as Mem0 does.

    The vector store of Mem0 has to know the filters `in` and `gte`, as Qdrant does. Scores are Mem0's.
    """

    def __init__(self, mem0: Mem0, store: GatedMemoryStore, *, user_id: str = USER_ID) -> None:
        self._mem0 = mem0
        self._store = store
        self._user_id = user_id

    def search(self, query: str, filters: Mapping[str, Any] | None = None, top_k: int | None = None) -> list[Hit]:
        """As the protocol says, but that a memory need not have any of the words. Raises `UnreachableError`, too."""
        parsed, wanted = Filters.parse(filters), self._store.checked(query, top_k)
        if not query.strip():
            return self._store.search("", filters, wanted)
        with _reached():
            found = self._mem0.search(query, filters=self._filters(parsed), top_k=wanted, threshold=0.0)["results"]
        hits = []
        for one in found:
            item = self._store.item(str((one.get("metadata") or {}).get("memory_id")))
            if item is not None and parsed.allow(item):
                hits.append(Hit(item, float(one["score"])))
        return sorted(hits, key=lambda hit: (-hit.score, hit.item["id"]))

    def propose(self, mcrs: Sequence[Document], scope_filters: Mapping[str, Any] | None = None) -> ProposeResult:
        return self._store.propose(mcrs, scope_filters)

    def commit(self, batch_id: str, *, committed_by: str | None = None) -> CommitResult:
        """As the protocol says. That Mem0 fails is in the log only: what was committed counts, and is brought later."""
        result = self._store.commit(batch_id, committed_by=committed_by)
        try:
            with self._store.following():
                self._bring_changes(self._store.followed(self._follower), [item["id"] for item in result.items])
        except ContextError:  # also of the store, which is to keep how far Mem0 is
            _log.warning("batch %s is committed, and Mem0 may not have all of it yet", batch_id, exc_info=True)
        return result

    def sync(self) -> None:
        """Bring all that was ever committed and that Mem0 has not got as it is.

        Raises `UnreachableError`; `BusyError` where others bring for longer than a call waits.
        """
        reached, before = 0, -1
        while reached > before:
            with self._store.following():  # others may come in between
                reached, before = self._bring_changes(reached), reached

    def batch(self, batch_id: str) -> Batch:
        return self._store.batch(batch_id)

    def batches(self, run_id: str) -> list[Batch]:
        return self._store.batches(run_id)

    def waiting(self, run_id: str, most: int) -> list[Waiting]:
        return self._store.waiting(run_id, most)

    def recorded(self, batch_id: str) -> list[Document]:
        return self._store.recorded(batch_id)

    def item(self, item_id: str) -> Document | None:
        return self._store.item(item_id)

    def items(self, *, run_id: str | None = None, batch_id: str | None = None) -> list[Document]:
        return self._store.items(run_id=run_id, batch_id=batch_id)

    def close(self) -> None:
        """Of the store that decides; Mem0 is its maker's."""
        self._store.close()

    @property
    def _follower(self) -> str:
        return f"mem0:{self._user_id}"

    def _bring_changes(self, after: int, first: Sequence[str] = ()) -> int:
        """Bring these memories first, then the first changes behind this number; gives the number of the last one.

        Each memory is brought in the form that it has now. Where that fails, what was brought before is kept in mind.
        """
        changes = self._store.changed(after, BROUGHT_MOST)  # before any is brought: none is older than its change then
        reached, brought = after, set[str]()
        try:
            for number, item_id in [*((after, item_id) for item_id in first), *changes]:
                item = None if item_id in brought else self._store.item(item_id)
                if item is not None:
                    with _reached():
                        self._bring(item)
                brought.add(item_id)
                reached = number
        finally:
            if reached > self._store.followed(self._follower):
                self._store.follow(self._follower, reached)
        return reached

    def _bring(self, item: Document) -> None:
        metadata = {
            "memory_id": item["id"],
            "place": _place(item["scope"], item),
            **{name: item[name] for name in ("status", "type", "writer", "confidence")},
        }
        known = {"user_id": self._user_id, "memory_id": item["id"]}
        there = self._mem0.get_all(filters=known, top_k=1)["results"]
        if not there:
            self._mem0.add(item["content"], user_id=self._user_id, metadata=metadata, infer=False)
        elif there[0]["memory"] != item["content"] or there[0].get("metadata") != metadata:
            self._mem0.update(there[0]["id"], item["content"], metadata)

    def _filters(self, filters: Filters) -> Document:
        """What `Filters.allow` does, for Mem0, so that what is not allowed takes no place among the best."""
        place = {"task_id": filters.task_id, "run_id": filters.run_id}
        scopes = [filters.scope] if filters.scope else ["global", "task", "run"]
        wanted: Document = {"user_id": self._user_id, "place": {"in": [_place(scope, place) for scope in scopes]}}
        if filters.status != "any":
            wanted["status"] = filters.status
        wanted |= {name: value for name in ("type", "writer") if (value := getattr(filters, name)) is not None}
        if filters.min_confidence > 0:
            wanted["confidence"] = {"gte": filters.min_confidence}
        return wanted


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Whatever Mem0, its vector store or its models raise, as what callers know."""
    try:
        yield
    except Exception as error:
        raise UnreachableError(f"Mem0 failed: {type(error).__name__}: {error}") from error


def _place(scope: str, place: Document) -> str:
    """One word, for Mem0 gives `task_id` no meaning, and `run_id` another one."""
    return "global" if scope == "global" else f"{scope}:{place[f'{scope}_id']}"
