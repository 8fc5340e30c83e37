"""A group of lines that is written at once, and where its records then stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bus.checkpoints import Note
    from bus.merkle import Frontier
    from bus.records import Draft


class Receipt(NamedTuple):
    """Where a record stands. `tree_size` is the number of lines in the ledger once its group was written.

    `checkpoint` is the signed note of the tree of that size; None without a key, with AAL_FSYNC=never, and where the
    log is not the one that the key has signed.
    """

    seq: int
    hash: str
    tree_size: int
    checkpoint: str | None = None


class Group:
    """Lines for one write, chained to what is in the file; `places` has where each of its records will stand."""

    def __init__(self, tree: Frontier, prev: str, *, environment_stands: bool) -> None:
        self.tree = tree
        self.prev = prev
        self.environment_stands = environment_stands
        self.places: list[tuple[int, str]] = []
        self.text = bytearray()
        self.leaves: list[bytes] = []
        self.is_told = False
        """Whether its note may be handed out, as far as could be told at once; `Chain.vouch` says it in the end."""
        self.checkpoint_seq: int | None = None
        self.note: Note | None = None
        self.checkpoint_note: Note | None = None

    @property
    def seq(self) -> int:
        """Of its last line."""
        return self.tree.size

    def add(self, draft: Draft) -> tuple[int, str]:
        """Chain one more; gives its seq and hash."""
        line, digest = draft.line(self.tree.size + 1, self.prev)
        self.tree.append(digest)
        self.leaves.append(digest)
        self.prev = digest.hex()
        self.text += line
        return self.tree.size, self.prev

    def receipts(self) -> list[Receipt]:
        note = None if self.note is None else self.note.text
        return [Receipt(seq, hash_, self.tree.size, note) for seq, hash_ in self.places]
