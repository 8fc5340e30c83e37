"""Proofs from the ledger: that a line is in it, and that it only grew. `merkle` has what they are made of."""

from __future__ import annotations

import contextlib
import itertools
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from bus import provenance
from bus.errors import NotFoundError, OperatorError
from bus.index import UnfitError, index_of
from bus.merkle import Subtree, consistency_proof, hash_over, inclusion_proof, node_hash, root_of
from bus.records import hash_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus.index import View
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
    """Makes proofs from the ledger as it is now.

    Of the hashes that its index holds, which it brings up to date first, and of those of the lines behind. A context
    manager, for as long as nobody is to change that index. Raises as `provenance.iter_hashes`.
    """

    def __init__(
        self, path: Path, signer: Signer | None = None, *, progress: Callable[[int], None] | None = None
    ) -> None:
        """`progress` is called with the number of lines that the index holds, while it takes them in."""
        self._path = path
        self._signer = signer
        self._kept = ExitStack()
        index = index_of(path)
        if index is not None:
            index.refresh(progress)
        self._view = None if index is None else self._kept.enter_context(index.reading(at_rest=True))
        self._held = self._view.size if self._view else 0
        later = self._view.lines_behind() if self._view else provenance.raw_lines(path)
        self._leaves = [hash_in(line) for line in later if line.endswith(b"\n")]
        """Those of the lines that the index does not hold."""
        self.size = self._held + len(self._leaves)
        if signer is not None:
            _make_last(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index."""
        self._kept.close()

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
        return Inclusion(seq, self._leaf(seq).hex(), size, root.hex(), _hex(proof), self._note(size, root))

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

    def _leaf(self, seq: int) -> bytes:
        if seq > self._held:
            return self._leaves[seq - 1 - self._held]
        return self._of_index(lambda view: view.record_hash(seq), lambda: self._leaf(seq))

    def _hash_of(self, part: Subtree) -> bytes:
        start, end = part.number << part.level, part.number + 1 << part.level
        if start >= self._held:
            return root_of(self._leaves[start - self._held : end - self._held])
        if end <= self._held:
            return self._of_index(lambda view: view.hash_of(part), lambda: self._hash_of(part))
        left = Subtree(part.level - 1, 2 * part.number)
        return node_hash(self._hash_of(left), self._hash_of(Subtree(left.level, left.number + 1)))

    def _of_index(self, asked: Callable[[View], bytes], without: Callable[[], bytes]) -> bytes:
        """What the index says; where that turns out to be wrong, all lines are read."""
        try:
            if self._view is not None:
                return asked(self._view)
        except UnfitError:
            pass
        self._view, self._held = None, 0
        self._leaves = list(itertools.islice(provenance.iter_hashes(self._path), self.size))
        return without()

    def _note(self, size: int, root: bytes) -> str | None:
        return None if self._signer is None or not size else self._signer.checkpoint(size, root)


def _make_last(path: Path) -> None:
    """Sync lines that a writer may yet be syncing: what is signed must not be taken back. Raises `OperatorError`."""
    try:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            os.fdatasync(file.fileno())
    except OSError as error:
        raise OperatorError(
            "ERR_LEDGER", f"the ledger {path} cannot be synced, so nothing is signed: {error}"
        ) from None


def _hex(proof: list[bytes]) -> list[str]:
    return [node.hex() for node in proof]
