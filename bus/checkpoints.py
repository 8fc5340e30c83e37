"""Checkpoints: now and then the ledger says how many lines it has and what the root of their Merkle tree is.

A checkpoint is a line of the ledger, and with a key it is signed as well: then it also lies in a folder beside the
ledger, as a signed note (C2SP signed-note and tlog-checkpoint), to be kept where nobody who can write the ledger can.
The line holds the hashes of the tree's perfect subtrees too: who opens the ledger reads back to the last of these
lines and no further.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.merkle import Frontier
from bus.model import now_ms
from bus.own_files import make_own, open_folder, open_own
from bus.records import BrokenLineError, check, draft, hash_in, parse
from bus.segments import make_folder
from bus.signed import Signed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from bus.model import Record
    from bus.notary import Notary
    from bus.records import Draft

TYPE = "checkpoint"
FOLDER = "checkpoints"
LINES = 1000
"""After so many lines a checkpoint is written."""

AFTER_S = 60.0
"""After so many seconds a server writes one, if there was a line since the last."""

KEPT = 1000
"""How many signed notes the folder keeps, the newest; all of them stand in the ledger."""

_DIGITS = 12
_LEAF_BYTES = 32
_NOTE_MODE = 0o644
_log = logging.getLogger(__name__)


class Note(NamedTuple):
    """A signed note, and the tree that it is of."""

    signed: Signed
    text: str


class Checkpoints:
    """When the ledger at `path` gets a checkpoint, and what stands in it. `notary` is None where there is no key."""

    def __init__(
        self, path: Path, notary: Notary | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = path.parent / FOLDER
        self.notary = notary
        self.serves = False
        """Whether this is a server's ledger."""
        self._clock = clock
        self._last_seq = 0
        self._due_at = self._look_at = clock() + AFTER_S

    def note(self, tree: Frontier) -> Note | None:
        """The signed note of a tree; None without a key, where nothing is signed, and of a tree without lines."""
        if self.notary is None or not tree.size:
            return None
        signed = Signed(tree.size, tree.root())
        text = self.notary.note(signed)
        return None if text is None else Note(signed, text)

    def is_time_to_look(self) -> bool:
        """Whether a server is to look if others have appended, which they do not tell it: once in `AFTER_S` seconds."""
        if not self.serves or self._clock() < self._look_at:
            return False
        self._look_at = self._clock() + AFTER_S
        return True

    def are_due(self, size: int, *, at_end: bool = False) -> bool:
        """Whether a ledger of so many lines is to get one; never where nothing came since the last.

        For their number; of a server also for the time that has passed, and `at_end`.
        """
        more = size - self._last_seq
        if more < LINES and self.serves:
            return more > 0 and (at_end or self._clock() >= self._due_at)
        return more >= LINES

    def draft(self, tree: Frontier, note: str | None) -> Draft:
        """The line that says what comes before it, with its signed note."""
        return draft({
            "type": TYPE,
            "timestamp_ms": now_ms(),
            "size": tree.size,
            "root": tree.root().hex(),
            "nodes": [node.hex() for node in tree.nodes],
            "note": note,
        })  # fmt: skip

    def stands(self, seq: int) -> None:
        """The line of the last one stands in the ledger, at `seq`: the next is due some time from when that is new."""
        if seq == self._last_seq:
            return
        self._last_seq = seq
        self._due_at = self._look_at = self._clock() + AFTER_S

    def keep(self, note: Note | None) -> None:
        """What is remembered is made last, and then a checkpoint's note put into the folder.

        Where that cannot be, it stands in the ledger all the same. None where nothing was signed.
        """
        if self.notary is None:
            return
        if note is None:
            self.notary.try_again()
            return
        self.notary.remember()
        self._put(note.signed.size, note.text)

    def _put(self, size: int, note: str) -> None:
        try:
            make_folder(self._folder, sync=True)
            with _opened(self._folder) as folder:
                _write(folder, f"{size:0{_DIGITS}}", note)
                _prune(folder)
        except OSError as error:
            _log.warning("the note of %d lines is not in %s: %s", size, self._folder, error)

    def is_kept(self, record: Record) -> bool:
        """Whether the signed note of a checkpoint's line lies in the folder, as it does once the line is synced."""
        try:
            with _opened(self._folder) as folder:
                fd = open_own(f"{_whole(record['size']):0{_DIGITS}}", os.O_RDONLY, folder=folder)
            with open(fd, encoding="utf-8") as file:  # noqa: PTH123  # a descriptor, not a path
                return bool(file.read() == record["note"])
        except (OSError, ValueError, KeyError, TypeError):
            return False


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor to look names up in."""
    fd = open_folder(folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _write(folder: int, name: str, note: str) -> None:
    """Put a note into the open folder, whole, and to last.

    Whoever heals the log after a power loss takes it for a sign that its line was synced.
    """
    temporary = f".{name}-{os.getpid()}"
    with open(make_own(temporary, _NOTE_MODE, folder=folder), "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(note)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def _prune(folder: int) -> None:
    notes = sorted(name for name in os.listdir(folder) if name.isdecimal())
    for name in notes[:-KEPT]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def tree_of(lines_backwards: Iterable[Record]) -> tuple[Frontier, int]:
    """The tree of all lines, given the last first, and the seq of the last checkpoint; 0 where there is none.

    No line before that is asked for. Raises `BrokenLineError` for a checkpoint whose subtrees have another root.
    """
    later: list[bytes] = []
    tree, last_seq = Frontier(), 0
    for record in lines_backwards:
        later.append(_leaf(record))
        if record["type"] == TYPE:
            tree, last_seq = tree_in(record), record["seq"]
            break
    for leaf in reversed(later):
        tree.append(leaf)
    return tree, last_seq


def _leaf(record: Record) -> bytes:
    with contextlib.suppress(ValueError):
        leaf = bytes.fromhex(record["hash"])
        if len(leaf) == _LEAF_BYTES:
            return leaf
    raise BrokenLineError("hash", f"its hash is not {_LEAF_BYTES} bytes in hex digits", record["seq"])


def chained(lines_backwards: Iterable[bytes], later: Record) -> Iterator[Record]:
    """The records of the lines before `later`, the last first, each held against its hash and the line behind it.

    Raises `BrokenLineError`, which says which line.
    """
    for line in lines_backwards:
        seq = later["seq"] - 1
        try:
            record = check(line, seq)
        except BrokenLineError as error:
            raise BrokenLineError(error.fault, error.detail, seq) from None
        if record["hash"] != later.get("prev"):
            detail = f"prev is {later.get('prev')}, and the line before has the hash {record['hash']}"
            raise BrokenLineError("chain", detail, later["seq"])
        yield record
        later = record


def told(line: bytes) -> Record:
    """The record of a line, its hash checked where it is a checkpoint's: much is built on that.

    Raises `BrokenLineError`.
    """
    record = parse(line)
    return check(line) if record["type"] == TYPE else record


def tree_in(record: Record) -> Frontier:
    """The tree that a checkpoint's line tells of. Raises `BrokenLineError` where it does not make sense."""
    try:
        nodes = record["nodes"]
        tree = Frontier(_whole(record["size"]), map(bytes.fromhex, nodes))
        is_so_spelled = nodes == [node.hex() for node in tree.nodes]
        if is_so_spelled and tree.root().hex() == record["root"] and tree.size == record["seq"] - 1:
            return tree
    except (KeyError, TypeError, ValueError):
        pass
    detail = "its subtrees do not make the root that it names, of the lines before it"
    raise BrokenLineError("tree", detail, record["seq"])


def root_at(size: int, whole: Frontier, lines_backwards: Iterator[bytes]) -> bytes | None:
    """The root of the first `size` lines of a log, whose tree is `whole` and whose lines come the last first.

    None where there are not so many, where a line cannot be read, and where `whole` did not grow out of that tree.
    """
    if size >= whole.size:
        return whole.root() if size == whole.size else None
    try:
        later = [hash_in(line) for line in itertools.islice(lines_backwards, whole.size - size)]
        tree, _ = tree_of(map(told, lines_backwards))
    except BrokenLineError:
        return None
    if tree.size != size:
        return None
    root = tree.root()
    for leaf in reversed(later):
        tree.append(leaf)
    return root if tree.root() == whole.root() else None


def _whole(size: Any) -> int:  # noqa: ANN401
    if type(size) is not int:
        raise TypeError(size)
    return size
