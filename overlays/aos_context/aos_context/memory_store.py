"""What every memory is, a protocol, with the values that it takes and gives.

`propose` stages a batch, `commit` makes it part of memory, whole or not at all; that only a milestone commits is the
rule of `run`, not of a store. A commit that is repeated, say after a lost answer, gives the first one's answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aos_context.artifacts import Document
    from aos_context.memory_gate import Conflict, Duplicate


@dataclass(frozen=True, slots=True)
class Hit:
    """`score` is the store's own (BM25, or a similarity of vectors), higher is better; 0 where nothing was asked."""

    item: Document
    score: float


@dataclass(frozen=True, slots=True)
class ProposeResult:
    """`staged` changes wait in the batch: all that its commit makes, those included that wait in another batch, too.

    Duplicates and conflicts are no errors: the caller decides what to make of them.
    """

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


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch that can be committed: how many changes it has, and the first. Of those a plain store tells no more."""

    batch_id: str
    proposed_at: str | None = None
    changes: int | None = None
    first: Document | None = None


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

    def waiting(self, run_id: str, most: int) -> list[Waiting]:
        """The last batches of a run that have changes and are not committed, at most so many, oldest first."""

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
