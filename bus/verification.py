"""Verifying the ledger: every line's form, hash, number and predecessor, the tree over all, and what checkpoints say.

From line 1 on nothing is taken for granted. From a later one on the first line is believed to have the right
predecessor, and the first checkpoint to tell the right tree of what comes before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus import provenance
from bus.checkpoints import TYPE, tree_in
from bus.errors import NotFoundError, OperatorError
from bus.merkle import Frontier
from bus.notes import NoteError
from bus.records import GENESIS, BrokenLineError, check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from bus.model import Record
    from bus.notes import Checkpoint, Verifier
    from bus.records import FaultKind

PROGRESS_LINES = 10_000


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found: the good lines, the number and hash of the last of them, and what ended them.

    `root` is of the tree up to the last good line, None where it is not known; `checkpoints` counts those that were
    held against it, `signed` of these the notes whose signature was checked.
    """

    lines: int
    last: int
    head_hash: str
    root: str | None
    checkpoints: int
    signed: int
    first_bad: int | None = None
    fault: FaultKind | None = None
    reason: str | None = None

    @property
    def ok(self) -> bool:
        return self.first_bad is None


class _Walk:
    """What is known after each line."""

    def __init__(self, start: int, verifier: Verifier | None, against: Checkpoint | None) -> None:
        self.seq = start - 1
        self.prev: str | None = GENESIS if start == 1 else None
        self.tree: Frontier | None = Frontier() if start == 1 else None
        self.checkpoints = self.signed = 0
        self.compared = False
        self._verifier = verifier
        self._against = against

    def take(self, line: bytes) -> None:
        """Raises `BrokenLineError`."""
        record = check(line, self.seq + 1, self.prev)
        if record["type"] == TYPE:
            self._hold_to(record)
        if self.tree is not None:
            self.tree.append(bytes.fromhex(record["hash"]))
            if self._against is not None and self.tree.size == self._against.size:
                self._compare(self._against, self.tree)
        self.seq, self.prev = record["seq"], record["hash"]

    def _hold_to(self, record: Record) -> None:
        tree = tree_in(record)
        if self.tree is None:
            self.tree = tree
        elif (tree.size, tree.nodes) != (self.tree.size, self.tree.nodes):
            raise BrokenLineError("tree", "it names another root than the lines before it have")
        self.checkpoints += 1
        if record["note"] is not None and self._verifier is not None:
            self._check_note(self._verifier, record["note"], tree)

    def _check_note(self, verifier: Verifier, text: str, tree: Frontier) -> None:
        try:
            note = verifier.open(text)
        except NoteError as error:
            raise BrokenLineError("signature", f"its note is not signed with the key: {error}") from None
        if (note.size, note.root) != (tree.size, tree.root()):
            raise BrokenLineError("signature", "its note tells of another tree than the line")
        self.signed += 1

    def _compare(self, against: Checkpoint, tree: Frontier) -> None:
        self.compared = True
        if tree.root() != against.root:
            raise BrokenLineError("tree", f"the checkpoint of {against.size} lines has another root than these lines")


def verify(
    path: Path,
    *,
    start: int = 1,
    end: int | None = None,
    verifier: Verifier | None = None,
    against: Checkpoint | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check the lines from `start` to `end`, each included; stops at the first that is bad.

    `verifier` checks the notes of checkpoints, and `against` is one that somebody kept: the tree of so many lines must
    have its root. `progress` is called with the number of good lines now and then. Raises `NotFoundError` without a
    ledger or without line `start`, and `OperatorError` where the tree of `against` cannot be known from these lines.
    """
    walk = _Walk(start, verifier, against)
    if not provenance.exists(path):
        raise NotFoundError("ERR_NOT_FOUND", f"there is no ledger {path}", hint="No call was made here yet.")
    fault: BrokenLineError | None = None
    try:
        _walk(walk, provenance.raw_lines(path, start), end, progress)
    except BrokenLineError as error:
        fault = error
    lines = walk.seq - start + 1
    if fault is None and lines == 0 and start > 1:
        raise NotFoundError("ERR_NOT_FOUND", f"the ledger has no line {start}")
    if fault is None and against is not None and not walk.compared:
        fault = _missing(walk, against, is_whole=end is None)
    return VerifyReport(
        lines,
        walk.seq,
        walk.prev or GENESIS,
        None if walk.tree is None else walk.tree.root().hex(),
        walk.checkpoints,
        walk.signed,
        None if fault is None else walk.seq + 1,
        None if fault is None else fault.fault,
        None if fault is None else fault.detail,
    )


def _walk(walk: _Walk, lines: Iterable[bytes], end: int | None, progress: Callable[[int], None] | None) -> None:
    first = walk.seq
    for line in lines:
        if walk.seq == end:
            return
        walk.take(line)
        if progress and (walk.seq - first) % PROGRESS_LINES == 0:
            progress(walk.seq - first)


def _missing(walk: _Walk, against: Checkpoint, *, is_whole: bool) -> BrokenLineError:
    """Why a checkpoint was not held against the lines. Raises `OperatorError` where that is not the ledger's fault."""
    if is_whole and walk.seq < against.size:
        return BrokenLineError("tree", f"the checkpoint has seen {against.size} lines, and there are {walk.seq}")
    hint = f"Verify from line 1 to {against.size} at least."
    raise OperatorError("ERR_NOT_FOUND", f"these lines do not tell the tree of {against.size} lines", hint=hint)
