"""Proofs from the ledger: that a line is in it, and that it only grew. `merkle` has what they are made of."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar

from bus.checkpoints import root_at, told, tree_of
from bus.errors import NotFoundError
from bus.index import index_of
from bus.index_view import UnfitError
from bus.merkle import (
    HASH_BYTES,
    Frontier,
    ProofError,
    Subtree,
    check_consistency,
    check_inclusion,
    consistency_proof,
    hash_over,
    inclusion_proof,
    node_hash,
    root_of,
)
from bus.records import BrokenLineError
from bus.segments import Segments
from bus.signed import Signed
from bus.verification import Walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from bus.index_view import View
    from bus.notary import Notary

T = TypeVar("T")
_log = logging.getLogger(__name__)


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
class TreeHead:
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

    Of the hashes that its index holds, which it brings up to date first, and of those of the lines behind. Each line
    that is read for its hash is verified as `verification` does it: its bytes, number and predecessor, and the tree
    that a checkpoint tells. What the index says is held against the log before it is given out: the tree of all lines
    against the last checkpoint and the lines since, every other tree and every proof against that one, and the line
    that a proof is of against its hash. An index that is wrong is dropped, and all lines are read. So where lines are
    missing, or were changed, there is a proof only of what an index has seen before that, and of no such line. A
    context manager, for as long as nobody is to change that index; for one thread at a time. Raises `BrokenLineError`,
    which names the line, where the log cannot be read or a line is wrong; with a key `OperatorError` where it cannot be
    synced to be signed or is not the one that the key has signed, and whatever else `Notary` raises.
    """

    def __init__(
        self,
        path: Path,
        notary: Notary | None = None,
        *,
        progress: Callable[[int], None] | None = None,
        most_lines: int = sys.maxsize,
    ) -> None:
        """The index takes in at most `most_lines`; `progress` is called with the number of those that it holds."""
        self._path = path
        self._notary = notary
        known = [] if notary is None else notary.known()
        self._index = index_of(path)
        self._kept = ExitStack()
        self._view: View | None = None
        self._held = 0
        try:
            if self._index is not None:
                self._index.refresh(progress, most_lines=most_lines)
                reading = self._index.reading(at_rest=True, to_sign=notary is not None)
                self._view = self._kept.enter_context(reading)
            self._leaves = _Leaves()
            """Those of the lines that the index does not hold."""
            self._of_index(self._read_behind)
            if self._view is not None:
                self._of_index(lambda: self._whole)
            if notary is not None:
                self._of_index(lambda: notary.require(known, self.size, self._root_at))
        except BaseException:
            self.close()
            raise

    def _read_behind(self) -> None:
        if self._view is None:
            with Segments(self._path, at_rest=True, to_sign=self._notary is not None) as log:
                self._leaves, self._held = _whole_log(log), 0
        else:
            self._held = self._view.size
            self._leaves = _Leaves(self._view.lines_behind(), self._held, self._view.head)
        self.size = self._held + len(self._leaves)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index."""
        self._kept.close()

    def checkpoint(self) -> TreeHead:
        """Of all lines."""
        return self._of_index(lambda: TreeHead(self.size, self._whole.hex(), self._note(self.size, self._whole)))

    def inclusion(self, seq: int, size: int | None = None) -> Inclusion:
        """Of line `seq` in the tree of the first `size` lines, or of all. Raises `NotFoundError`."""
        size = self._known(size)
        if not 1 <= seq <= size:
            raise NotFoundError("ERR_NOT_FOUND", f"the first {size} lines of the ledger have no line {seq}")
        return self._of_index(lambda: self._inclusion(seq, size))

    def _inclusion(self, seq: int, size: int) -> Inclusion:
        leaf, root = self._leaf(seq), self._root(size)
        proof = inclusion_proof(seq - 1, size, self._hash_of)
        check_inclusion(seq - 1, size, leaf, proof, root)
        return Inclusion(seq, leaf.hex(), size, root.hex(), _hex(proof), self._note(size, root))

    def consistency(self, old: int, new: int | None = None) -> Consistency:
        """Between the trees of the first `old` and the first `new` lines, or all. Raises `NotFoundError`."""
        new = self._known(new)
        if not 0 <= old <= new:
            raise NotFoundError("ERR_NOT_FOUND", f"the first {new} lines of the ledger do not begin with {old}")
        return self._of_index(lambda: self._consistency(old, new))

    def _consistency(self, old: int, new: int) -> Consistency:
        old_root, new_root = self._root(old), self._root(new)
        proof = consistency_proof(old, new, self._hash_of)
        check_consistency(old, new, old_root, new_root, proof)
        return Consistency(old, old_root.hex(), new, new_root.hex(), _hex(proof), self._note(new, new_root))

    def _known(self, size: int | None) -> int:
        if size is None:
            return self.size
        if not 0 <= size <= self.size:
            raise NotFoundError("ERR_NOT_FOUND", f"the ledger has {self.size} lines, not {size}")
        return size

    @cached_property
    def _whole(self) -> bytes:
        """The root of all lines. Raises `UnfitError` where the index has another than the log; `_UntoldError`."""
        root = hash_over(range(self.size), self._hash_of)
        if self._view is not None:
            tree = _tree_told_in(self._view.log)
            if (tree.size, tree.root()) != (self.size, root):
                raise UnfitError("its tree is not that of the log")
        return root

    def _root(self, size: int) -> bytes:
        """Of the tree of the first `size` lines. Raises `ProofError` where the tree of all did not grow out of that."""
        if size == self.size:
            return self._whole
        root = hash_over(range(size), self._hash_of)
        if self._view is not None:
            grown = consistency_proof(size, self.size, self._hash_of)
            check_consistency(size, self.size, root, self._whole, grown)
        return root

    def _leaf(self, seq: int) -> bytes:
        if self._view is not None and seq <= self._held:
            return self._view.record_hash(seq)
        return self._leaves.one(seq - 1 - self._held)

    def _hash_of(self, part: Subtree) -> bytes:
        start, end = part.number << part.level, part.number + 1 << part.level
        if self._view is None or start >= self._held:
            return root_of(self._leaves.some(start - self._held, end - self._held))
        if end <= self._held:
            return self._view.hash_of(part)
        left = Subtree(part.level - 1, 2 * part.number)
        return node_hash(self._hash_of(left), self._hash_of(Subtree(left.level, left.number + 1)))

    def _of_index(self, step: Callable[[], T]) -> T:
        """What comes of a step; where the index turns out to be wrong, of the same with all lines read."""
        if self._view is None:
            return step()
        try:
            return step()
        except (UnfitError, ProofError, BrokenLineError, sqlite3.Error, _UntoldError) as error:
            _log.warning("the index of %s is done without: %s", self._path, error)
            self._read_all(self._view.log, is_wrong=not isinstance(error, _UntoldError))
        return step()

    def _read_all(self, log: Segments, *, is_wrong: bool) -> None:
        """Do without the index from now on, and drop it where it `is_wrong`. The lines stay those of the same moment.

        Raises `BrokenLineError` where it is the log that is broken.
        """
        self._leaves = _whole_log(log)
        self._view, self._held, self.size = None, 0, len(self._leaves)
        vars(self).pop("_whole", None)
        self._kept.close()  # who drops it must not read it
        if is_wrong and self._index is not None:
            self._index.drop()

    def _note(self, size: int, root: bytes) -> str | None:
        if self._notary is None or not size:
            return None
        return self._notary.sign(Signed(size, root), self.size, self._root_at)

    def _root_at(self, size: int) -> bytes | None:
        return self._root(size) if size <= self.size else self._root_since(size)

    def _root_since(self, size: int) -> bytes | None:
        """The same of what the log has grown to since it was read; None where it has not grown out of that."""
        with Segments(self._path, at_rest=True) as now:
            whole, _ = tree_of(map(told, now.backwards()))
            is_grown = root_at(self.size, whole, now.backwards()) == self._whole
            return root_at(size, whole, now.backwards()) if is_grown else None


class _UntoldError(Exception):
    """The end of the log does not tell its tree: there is nothing to hold the index against."""


def _tree_told_in(log: Segments) -> Frontier:
    """Of all lines, by the last checkpoint and the lines since. Raises `_UntoldError` where one of these is broken."""
    try:
        return tree_of(map(told, log.backwards()))[0]
    except BrokenLineError as error:
        raise _UntoldError(str(error)) from None


def _whole_log(log: Segments) -> _Leaves:
    """Those of all its lines. Where one is wrong all are read once more: an end may have been cut off and replaced."""
    with contextlib.suppress(BrokenLineError):
        return _Leaves(log.lines())
    return _Leaves(log.lines())


class _Leaves:
    """The hashes of whole lines, side by side: 32 bytes a line. Raises `BrokenLineError` for a line that is wrong."""

    def __init__(self, lines: Iterable[bytes] = (), before: int = 0, prev: str | None = None) -> None:
        """Of lines behind line `before`, which has the hash `prev`."""
        self._hashes = bytearray()
        walk = Walk(before + 1, prev=prev)
        for line in lines:
            if not line.endswith(b"\n"):  # of the last line, whose write is under way; no other follows such a one
                continue
            try:
                walk.take(line)
            except BrokenLineError as error:
                raise BrokenLineError(error.fault, f"line {walk.seq + 1}: {error.detail}") from None
            self._hashes += bytes.fromhex(walk.prev or "")

    def __len__(self) -> int:
        return len(self._hashes) // HASH_BYTES

    def one(self, number: int) -> bytes:
        """That of a line, the first of which is 0."""
        return bytes(self._hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES])

    def some(self, start: int, end: int) -> Iterator[bytes]:
        """Those from `start` up to `end`."""
        return map(self.one, range(start, end))


def _hex(proof: list[bytes]) -> list[str]:
    return [node.hex() for node in proof]
