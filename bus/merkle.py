"""The Merkle tree of RFC 9162, section 2.1, over SHA-256: its root, and proofs that a leaf is in, that it only grew.

A perfect subtree of 2^level leaves that begins at leaf i x 2^level is named (level, i). Every tree is a row of perfect
subtrees, the largest first, one for each bit of its size; their hashes are all that appending needs, and proofs are
made of hashes that somebody else gives by these names.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

HASH_BYTES = 32
EMPTY_ROOT = sha256().digest()
"""Of a tree without leaves."""


class ProofError(ValueError):
    """A proof does not show what it is said to show."""


class Subtree(NamedTuple):
    """The perfect subtree over the leaves from `number << level` on, as many as `1 << level`."""

    level: int
    number: int


def leaf_hash(leaf: bytes) -> bytes:
    """Of a leaf's bytes."""
    return sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Of two subtrees' hashes."""
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """A tree as far as appending needs it: its size, and the hashes of its perfect subtrees, the largest first."""

    __slots__ = ("nodes", "size")

    def __init__(self, size: int = 0, nodes: Iterable[bytes] = ()) -> None:
        """Raises `ValueError` for another number of hashes than a tree of this size has, or of another length."""
        self.size = size
        self.nodes = list(nodes)
        if size < 0 or len(self.nodes) != size.bit_count() or any(len(node) != HASH_BYTES for node in self.nodes):
            raise ValueError(
                f"a tree of {size} leaves is not {len(self.nodes)} subtrees with hashes of {HASH_BYTES} bytes"
            )

    def copy(self) -> Frontier:
        """One that grows apart."""
        twin = Frontier()
        twin.size, twin.nodes = self.size, self.nodes.copy()
        return twin

    def append(self, leaf: bytes) -> None:
        """Add a leaf, given as its bytes."""
        nodes = self.nodes
        node = sha256(b"\x00" + leaf).digest()
        full = self.size
        while full & 1:
            node = sha256(b"\x01" + nodes.pop() + node).digest()
            full >>= 1
        nodes.append(node)
        self.size += 1

    def root(self) -> bytes:
        """The hash of the tree."""
        return _joined(self.nodes)


def root_of(leaves: Iterable[bytes]) -> bytes:
    """The hash of the tree of these leaves."""
    tree = Frontier()
    for leaf in leaves:
        tree.append(leaf)
    return tree.root()


def inclusion_proof(index: int, size: int, hash_of: Callable[[Subtree], bytes]) -> list[bytes]:
    """That the leaf `index` (from 0) is in the tree of the first `size` leaves: section 2.1.3.1.

    Raises `ValueError` where there is no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    return [hash_over(part, hash_of) for part in _path(index, 0, size)]


def consistency_proof(old: int, new: int, hash_of: Callable[[Subtree], bytes]) -> list[bytes]:
    """That the tree of the first `new` leaves begins with that of the first `old`: section 2.1.4.1.

    Raises `ValueError` where that is larger.
    """
    if not 0 <= old <= new:
        raise ValueError(f"a tree of {new} leaves does not begin with one of {old}")
    if old in (0, new):
        return []
    return [hash_over(part, hash_of) for part in _growth(old, 0, new, is_whole=True)]


def check_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes) -> None:
    """Raise `ProofError` unless it shows that the leaf is in the tree with this root: section 2.1.3.2."""
    if not 0 <= index < size:
        raise ProofError(f"a tree of {size} leaves has no leaf {index}")
    _, found = _climb(index, size - 1, leaf_hash(leaf), proof)
    if found != root:
        raise ProofError("the proof leads to another root")


def check_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Raise `ProofError` unless it shows that the one tree grew out of the other: section 2.1.4.2."""
    if not 0 <= old <= new:
        raise ProofError(f"a tree of {new} leaves does not begin with one of {old}")
    if old in (0, new):
        if proof:
            raise ProofError("the proof is too long")
        if old_root != (new_root if old else EMPTY_ROOT):
            raise ProofError("a tree of the same size has another root")
        return
    path = [old_root, *proof] if old.bit_count() == 1 else proof
    if not path:
        raise ProofError("the proof is too short")
    first, last = old - 1, new - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    before, after = _climb(first, last, path[0], path[1:])
    if before != old_root:
        raise ProofError("the proof leads to another root of the old tree")
    if after != new_root:
        raise ProofError("the proof leads to another root of the new tree")


def _climb(first: int, last: int, node: bytes, proof: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The hashes that a proof leads to from a node: of the tree that ends with it, and of the whole tree.

    `first` is its index on its level, `last` that of the last node there.
    """
    before = after = node
    for sibling in proof:
        if last == 0:
            raise ProofError("the proof is too long")
        if first & 1 or first == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        first, last = first >> 1, last >> 1
    if last:
        raise ProofError("the proof is too short")
    return before, after


def subtrees(start: int, end: int) -> Iterator[Subtree]:
    """The perfect subtrees that leaves from `start` up to `end` are made of, where `start` can begin the largest."""
    while start < end:
        level = (end - start).bit_length() - 1
        yield Subtree(level, start >> level)
        start += 1 << level


def _path(index: int, start: int, end: int) -> list[range]:
    """PATH of section 2.1.3.1, of the tree over these leaves: what each hash of the proof is over, from the leaf up."""
    if end - start == 1:
        return []
    middle = start + _split(end - start)
    if index < middle:
        return [*_path(index, start, middle), range(middle, end)]
    return [*_path(index, middle, end), range(start, middle)]


def _growth(old: int, start: int, end: int, *, is_whole: bool) -> list[range]:
    """SUBPROOF of section 2.1.4.1; `old` counts from leaf 0. `is_whole` where the old tree's root is known itself."""
    if old == end:
        return [] if is_whole else [range(start, end)]
    middle = start + _split(end - start)
    if old <= middle:
        return [*_growth(old, start, middle, is_whole=is_whole), range(middle, end)]
    return [*_growth(old, middle, end, is_whole=False), range(start, middle)]


def _split(count: int) -> int:
    """The largest power of 2 below `count`."""
    return 1 << (count - 1).bit_length() - 1


def hash_over(leaves: range, hash_of: Callable[[Subtree], bytes]) -> bytes:
    """The hash of the tree over these leaves, which begin where the largest of its subtrees can begin."""
    return _joined([hash_of(part) for part in subtrees(leaves.start, leaves.stop)])


def _joined(nodes: Sequence[bytes]) -> bytes:
    """The hash over perfect subtrees that stand in a row, the largest first."""
    if not nodes:
        return EMPTY_ROOT
    joined = nodes[-1]
    for node in reversed(nodes[:-1]):
        joined = node_hash(node, joined)
    return joined
