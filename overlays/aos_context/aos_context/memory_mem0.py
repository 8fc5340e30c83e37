"""A memory that is searched by meaning: Mem0 (https://docs.mem0.ai, the package `mem0ai` from 2.0 on).

Mem0 has no batches, no transactions and no history that a gate could ask. So another store of this package keeps what
was proposed and committed, and decides; Mem0 gets every memory that a commit adds or changes, as it is and without a
model that rewrites it (`infer=False`), and is asked at each search. What it finds is looked up in that store: a memory
that Mem0 still has in an old form, or that others wrote into it, is never shown as ours.

So what that store has committed is committed, whatever becomes of Mem0. What could not be brought there is brought with
the next commit, or by `sync`, which also brings what a process that has ended since could not.

This module needs no `mem0`: the caller makes the `mem0.Memory`, and with it chooses models and the vector store. Mem0
sends telemetry unless `MEM0_TELEMETRY=False` is in the environment before it is imported.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any, Protocol

from aos_context.errors import UnreachableError
from aos_context.memory_filters import Filters
from aos_context.memory_store import Batch, CommitResult, Hit, ProposeResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aos_context.artifacts import Document
    from aos_context.memory_gated import GatedMemoryStore

USER_ID = "aos_context"
"""Mem0 wants one of a user, an agent or a run for each memory; ours are those of one user."""

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
        self._mutex = threading.Lock()
        self._behind: dict[str, None] = {}
        """Ids of what was committed here and is not known to be in Mem0, the oldest first."""

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
            self._bring_all(result.items)
        except UnreachableError:
            _log.warning("batch %s is committed, and Mem0 has not got all of it yet", batch_id, exc_info=True)
        return result

    def sync(self) -> None:
        """Bring all that was ever committed and that Mem0 has not got as it is. Raises `UnreachableError`."""
        self._bring_all(self._store.items())

    def batch(self, batch_id: str) -> Batch:
        return self._store.batch(batch_id)

    def batches(self, run_id: str) -> list[Batch]:
        return self._store.batches(run_id)

    def recorded(self, batch_id: str) -> list[Document]:
        return self._store.recorded(batch_id)

    def item(self, item_id: str) -> Document | None:
        return self._store.item(item_id)

    def items(self, *, run_id: str | None = None, batch_id: str | None = None) -> list[Document]:
        return self._store.items(run_id=run_id, batch_id=batch_id)

    def close(self) -> None:
        """Of the store that decides; Mem0 is its maker's."""
        self._store.close()

    def _bring_all(self, items: Sequence[Document]) -> None:
        """These, in the form that they have now, behind those that are still to be brought."""
        with self._mutex:
            self._behind |= dict.fromkeys(item["id"] for item in items)
            for item_id in list(self._behind):
                item = self._store.item(item_id)
                if item is not None:
                    with _reached():
                        self._bring(item)
                del self._behind[item_id]

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
