"""Verifying the ledger: every line's form, hash, number and predecessor, the tree over all, and what checkpoints say.

`TOOLS/verify.py` finds the same with code of its own, but for a line's form (`form`), which it does not ask for. From
line 1 on nothing is taken for granted. From a later one on the first line is believed to have the right predecessor,
and the first checkpoint to tell the right tree of what comes before it.

The lines are those that the files have at one moment in which no writer holds the lock. A group is synced without it,
so the last lines may not be on the disk yet, and nobody be answered for them: a power loss can take them. Where an
end of the file is cut off while it is read (a torn tail that a writer heals; a failed write, where the reader may not
open the lock) and others go on there, what is read can look broken: so a fault in the open segment is looked at once
more.
"""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus import provenance
from bus.checkpoints import TYPE, tree_in
from bus.errors import NotFoundError, OperatorError
from bus.merkle import Frontier
from bus.notes import NoteError, read_signed
from bus.records import GENESIS, BrokenLineError, check, is_hash
from bus.segments import Segments, lines_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from bus.model import Record
    from bus.notes import Checkpoint, Verifier
    from bus.records import FaultKind

PROGRESS_LINES = 10_000


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found: the good lines, the number and hash of the last of them, and what ended them.

    `root` is of the tree up to the last good line, None where it is not known; `checkpoints` counts those that were
    held against it, `signed` of these the notes that one of the keys signed. `signed_size` is of how many lines, from
    line 1 on, the largest tree is that one of the keys signed, None where none did: for what came later nobody vouches.
    `first_bad` is None where all is right, and where no line is wrong but a signature is missing.
    """

    lines: int
    last: int
    head_hash: str
    root: str | None
    checkpoints: int
    signed: int
    signed_size: int | None = None
    first_bad: int | None = None
    fault: FaultKind | None = None
    reason: str | None = None

    @property
    def ok(self) -> bool:
        return self.fault is None


class Walk:
    """What is known after each line from line `start` on; `prev` is the hash of the line before, if that is known."""

    def __init__(
        self,
        start: int = 1,
        verifiers: Collection[Verifier] = (),
        against: Checkpoint | None = None,
        *,
        prev: str | None = None,
    ) -> None:
        self.start = start
        self.seq = start - 1
        self.prev = GENESIS if start == 1 else prev
        self.tree: Frontier | None = Frontier() if start == 1 else None
        self.checkpoints = self.signed = 0
        self.signed_size: int | None = None
        self.compared = False
        self._verifiers = verifiers
        self._against = against

    def copy(self) -> Walk:
        """One that goes on apart."""
        twin = copy.copy(self)
        twin.tree = None if self.tree is None else self.tree.copy()
        return twin

    def take(self, line: bytes) -> None:
        """Raises `BrokenLineError`."""
        record = check(line, self.seq + 1, self.prev)
        if self.prev is None and not is_hash(record.get("prev")):
            raise BrokenLineError("chain", "its member prev is no hash")
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
        if record.get("note") is not None:
            self._check_note(record["note"], tree)
        self.checkpoints += 1

    def _check_note(self, text: object, tree: Frontier) -> None:
        if not isinstance(text, str):
            raise BrokenLineError("signature", "its note is not text")
        try:
            note, is_signed = read_signed(text, self._verifiers)
        except NoteError as error:
            raise BrokenLineError("signature", f"its note is wrong: {error}") from None
        if (note.size, note.root) != (tree.size, tree.root()):
            raise BrokenLineError("signature", "its note tells of another tree than the line")
        if is_signed:
            self.signed += 1
            self.signed_size = tree.size

    def _compare(self, against: Checkpoint, tree: Frontier) -> None:
        self.compared = True
        if tree.root() != against.root:
            raise BrokenLineError("tree", f"the checkpoint of {against.size} lines has another root than these lines")

    def report(self, fault: BrokenLineError | None, *, is_line: bool = True) -> VerifyReport:
        """What is known so far. `is_line` is whether the fault is one of the next line."""
        return VerifyReport(
            self.seq - self.start + 1,
            self.seq,
            self.prev or GENESIS,
            None if self.tree is None else self.tree.root().hex(),
            self.checkpoints,
            self.signed,
            self.signed_size,
            None if fault is None or not is_line else self.seq + 1,
            None if fault is None else fault.fault,
            None if fault is None else fault.detail,
        )


def verify(
    path: Path,
    *,
    start: int = 1,
    end: int | None = None,
    verifiers: Collection[Verifier] = (),
    signed: bool = False,
    against: Checkpoint | None = None,
    against_signed: bool = False,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check the lines from `start` to `end`, each included; stops at the first that is bad.

    `verifiers` check the notes of checkpoints: a note that none of them is said to have signed is held against its line
    and no more. With `signed` it is a fault, though of no line, where they signed nothing of what was read. `against`
    is a checkpoint that somebody kept: the tree of so many lines must have its root; `against_signed` says that its
    signature was checked, and counts as one. `progress` is called with the number of good lines now and then. Raises
    `NotFoundError` without a ledger or without line `start`, and `OperatorError` where the tree of `against` cannot be
    known from these lines.
    """
    if not provenance.exists(path):
        raise NotFoundError("ERR_NOT_FOUND", f"there is no ledger {path}", hint="No call was made here yet.")
    walk, fault = _walked(Walk(start, verifiers, against), path, end, progress)
    if fault is None and walk.seq < start and start > 1:
        raise NotFoundError("ERR_NOT_FOUND", f"the ledger has no line {start}")
    if fault is None and against is not None and not walk.compared:
        fault = _missing(walk, against, is_whole=end is None)
    if fault is None and against is not None and against_signed:
        walk.signed_size = max(walk.signed_size or 0, against.size)
    if fault is None and signed and walk.signed_size is None:
        unsigned = BrokenLineError("signature", "no checkpoint in these lines is signed with the key that was given")
        return walk.report(unsigned, is_line=False)
    return walk.report(fault)


def _walked(
    walk: Walk, path: Path, end: int | None, progress: Callable[[int], None] | None
) -> tuple[Walk, BrokenLineError | None]:
    """What is known after the last good line, and what is wrong with the next.

    Where that is in the open segment, it is read once more: what was cut off meanwhile is no fault.
    """
    again, fault = _take_lines(walk, path, end, progress)
    if fault is None or again is None:
        return walk, fault
    return again, _take_lines(again, path, end, progress)[1]


def _take_lines(
    walk: Walk, path: Path, end: int | None, progress: Callable[[int], None] | None
) -> tuple[Walk | None, BrokenLineError | None]:
    """Take the lines that come next, as the files are now, and give the fault that ends them.

    Also gives what was known before the first line of the open segment, None where none of it was read.
    """
    again: Walk | None = None
    try:
        with Segments(path, at_rest=True) as segments:
            first_of_open = _first_of_open(segments)
            for line in _lines_behind(walk, segments):
                if walk.seq == end:
                    break
                if again is None and walk.seq + 1 >= first_of_open:
                    again = walk.copy()
                walk.take(line)
                lines = walk.seq - walk.start + 1
                if progress and lines % PROGRESS_LINES == 0:
                    progress(lines)
    except BrokenLineError as error:
        return again, error
    return again, None


def _lines_behind(walk: Walk, segments: Segments) -> Iterator[bytes]:
    """The lines that come next, each to be taken before the next one is asked for.

    Raises `BrokenLineError` before a segment whose name has another number.
    """
    start = walk.seq + 1
    for number in range(segments.number_of(start) if start > 1 else 0, segments.count):
        skipped = max(0, start - segments.firsts[number]) if start > 1 else 0
        if number < len(segments.closed) and segments.closed[number] + skipped != walk.seq + 1:
            first = segments.closed[number]
            raise BrokenLineError("seq", f"its segment is named for line {first}, as if there were others before it")
        with segments.content(number) as content:
            yield from lines_of(content.chunks(skipped))
        start = 1


def _first_of_open(segments: Segments) -> float:
    """The number of its first line; no line has the number that is given where that is not known."""
    with contextlib.suppress(BrokenLineError):
        return segments.firsts[-1] if segments.open is not None else math.inf
    return math.inf


def _missing(walk: Walk, against: Checkpoint, *, is_whole: bool) -> BrokenLineError:
    """Why a checkpoint was not held against the lines. Raises `OperatorError` where that is not the ledger's fault."""
    if is_whole and walk.seq < against.size:
        return BrokenLineError("tree", f"the checkpoint has seen {against.size} lines, and there are {walk.seq}")
    hint = f"Verify from line 1 to {against.size} at least."
    raise OperatorError("ERR_NOT_FOUND", f"these lines do not tell the tree of {against.size} lines", hint=hint)
