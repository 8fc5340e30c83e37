"""Proofs from the ledger: that a line is in it, and that it only grew. `merkle` has what they are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bus import provenance
from bus.errors import NotFoundError
from bus.merkle import consistency_proof, hash_over, inclusion_proof, root_of

if TYPE_CHECKING:
    from pathlib import Path

    from bus.merkle import Subtree
    from bus.notes import Signer


@dataclass(frozen=True, slots=True)
class Inclusion:
    """That line `seq` with this hash is in the tree of the first `tree_size` lines; hashes are 64 hex digits.

    `checkpoint` is the signed note of that tree, None without a key.
    """

    seq: int
    hash: str
    tree_size: int
    root: str
    inclusion: list[str]
    checkpoint: str | None

    def body(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tree:
    """What the ledger is now; the members as in `Inclusion`."""

    tree_size: int
    root: str
    checkpoint: str | None

    def body(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Consistency:
    """That the tree of the first `new_size` lines begins with that of the first `old_size`; the rest as `Inclusion`."""

    old_size: int
    old_root: str
    new_size: int
    new_root: str
    consistency: list[str]
    checkpoint: str | None

    def body(self) -> dict[str, Any]:
        return asdict(self)


class Prover:
    """Makes proofs from the ledger as it is now, of the hashes of all lines. Raises as `provenance.iter_hashes`."""

    def __init__(self, path: Path, signer: Signer | None = None) -> None:
        self._leaves = list(provenance.iter_hashes(path))
        self._signer = signer
        self.size = len(self._leaves)

    def checkpoint(self) -> Tree:
        """Of all lines."""
        root = self._root(self.size)
        return Tree(self.size, root.hex(), self._note(self.size, root))

    def inclusion(self, seq: int, size: int | None = None) -> Inclusion:
        """Of line `seq` in the tree of the first `size` lines, or of all. Raises `NotFoundError`."""
        size = self._known(size)
        if not 1 <= seq <= size:
            raise NotFoundError("ERR_NOT_FOUND", f"the first {size} lines of the ledger have no line {seq}")
        proof = inclusion_proof(seq - 1, size, self._hash_of)
        root = self._root(size)
        return Inclusion(seq, self._leaves[seq - 1].hex(), size, root.hex(), _hex(proof), self._note(size, root))

    def consistency(self, old: int, new: int | None = None) -> Consistency:
        """Between the trees of the first `old` and the first `new` lines, or all. Raises `NotFoundError`."""
        new = self._known(new)
        if not 0 <= old <= new:
            raise NotFoundError("ERR_NOT_FOUND", f"the first {new} lines of the ledger do not begin with {old}")
        proof = consistency_proof(old, new, self._hash_of)
        root = self._root(new)
        return Consistency(old, self._root(old).hex(), new, root.hex(), _hex(proof), self._note(new, root))

    def _known(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise NotFoundError("ERR_NOT_FOUND", f"the ledger has {self.size} lines, not {size}")
        return size

    def _root(self, size: int) -> bytes:
        return hash_over(range(size), self._hash_of)

    def _hash_of(self, part: Subtree) -> bytes:
        return root_of(self._leaves[part.number << part.level : part.number + 1 << part.level])

    def _note(self, size: int, root: bytes) -> str | None:
        return None if self._signer is None or not size else self._signer.checkpoint(size, root)


def _hex(proof: list[bytes]) -> list[str]:
    return [node.hex() for node in proof]
