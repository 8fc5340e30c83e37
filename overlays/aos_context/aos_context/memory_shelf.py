"""What a store keeps, and is asked for, within one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from aos_context.memory_gate import View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aos_context.artifacts import Document
    from aos_context.memory_filters import Filters
    from aos_context.memory_gate import Staged
    from aos_context.memory_store import Batch, Hit, Waiting


class Change(NamedTuple):
    """That a memory was added or changed."""

    number: int
    """From 1 on, greater than those of all commits before; numbers may be left out."""
    item_id: str


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

    def waiting(self, run_id: str, most: int) -> list[Waiting]: ...

    def items(self, run_id: str | None, batch_id: str | None) -> list[Document]: ...

    def last_change(self) -> int:
        """The greatest number of a change; 0 without any."""

    def changed(self, after: int, limit: int) -> list[Change]: ...

    def followed(self, follower: str) -> int: ...

    def follow(self, follower: str, number: int) -> None: ...
