"""Long-term memory, as a program names it: what outlives a run, proposed at any time, committed only at a milestone.

Nothing is defined here: the protocol and its values are in `memory_store`, and each store has a file of its own. Stores
that need a file or a package are named where they are: `memory_sqlite`, `memory_mem0`.
"""

from __future__ import annotations

from aos_context.memory_filters import Filters
from aos_context.memory_in_memory import InMemoryMemoryStore
from aos_context.memory_store import Batch, CommitResult, Hit, MemoryStore, ProposeResult, RecordingMemoryStore

__all__ = [
    "Batch",
    "CommitResult",
    "Filters",
    "Hit",
    "InMemoryMemoryStore",
    "MemoryStore",
    "ProposeResult",
    "RecordingMemoryStore",
]
