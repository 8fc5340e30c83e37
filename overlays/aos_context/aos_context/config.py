"""What can be set, in one table of numbers. Sizes are in bytes, context in tokens."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA_VERSION = "2.1"


@dataclass(frozen=True, slots=True)
class Config:
    """Limits of a run."""

    pinned_max_items: int = 32
    """Pinned context is never evicted, so there is only so much of it."""
    pinned_max_tokens: int = 8_000
    sliding_max_tokens: int = 32_000
    """What is beyond this is evicted: the lowest priority first, then the oldest, then by id."""
    working_set_max_bytes: int = 4 << 20
    """As it is written."""
    brief_max_tokens: int = 4_000
    search_top_k: int = 10
    search_max_hits: int = 100
    search_candidates: int = 5_000
    """Memories that one search scores. Common words do not choose them where rarer ones do, and else the newest do."""
    body_max_bytes: int = 4 << 20
    """Of one request."""
    pack_max_bytes: int = 1 << 30
    """Of a resume pack, unpacked, and of one that is uploaded."""
    pack_max_files: int = 1_000
    conflict_similarity: float = 0.5
    """How alike the words of two memories are (Jaccard, 0 to 1), so that one is named as a conflict of the other."""
    batch_max_changes: int = 1_000
    """Changes of memory in one batch."""
    proposal_max_age_days: float = 30.0
    """An older proposal that nobody has committed is not named to others any more. It can still be committed."""


DEFAULT_CONFIG = Config()
