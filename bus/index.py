"""The ledger's index: a cache that finds line N, the lines of a filter, and the hashes that proofs are made of.

`provenance.index` (SQLite) can be deleted at any time. It says where to look, and the log what is there: each line that
it names is held against what was asked, and `proofs` holds each hash that it gives against the log. So an index that is
wrong costs time, and leads to no wrong line and no wrong proof. The lines of a block that it names must be as many as
there are; but whoever can write it can have a filter miss lines, by calling them what they are not: who must not miss
any deletes it first, or reads all (`verify` and replays of a range do not ask it). One that does not fit the log
deletes itself, and is built again by the next `refresh`; it takes in only lines that are right. Lines of the same type,
overlay, phase, ok, code and caller are of one kind: a block of lines has for each kind their numbers, two bytes each.
Of the Merkle tree it holds what stands above 256 lines; what is below, their hashes give, which stand side by side in
the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import sqlite3
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from bus import index_file, index_view, segments
from bus.index_view import State, UnfitError, View, blob_in, is_of, lines_behind, numbers_in, plain, root_over, state_of
from bus.merkle import HASH_BYTES, root_of
from bus.own_files import open_own
from bus.records import GENESIS, BrokenLineError, check, hash_in
from bus.segments import FILE_MODE, Segments, taken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bus.model import Record

WORTH_BYTES = 1 << 23
"""A log is read without an index until it is as large."""

BATCH_LINES = 16_384
"""How many lines are taken in at once, in which time nobody else uses the index."""

_log = logging.getLogger(__name__)


class Index:
    """The index of the ledger at `path`. It never raises for what is wrong with the index."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.with_suffix(".index")
        self._lock_path = path.with_suffix(".indexing")

    def exists(self) -> bool:
        """Whether there is one, be it of this log or not."""
        return self._file.exists()

    def refresh(
        self,
        progress: Callable[[int], None] | None = None,
        *,
        most_lines: int = sys.maxsize,
        is_over: Callable[[], bool] = lambda: False,
    ) -> int:
        """Take in what the log has gained, in batches; gives how many lines the index holds then.

        Where another process does that already, or nothing can be written, it is left as it is. `progress` is called
        with the number of lines after each batch. Stops at a line that is not what was written.
        """
        held = 0
        while most_lines > 0 and not is_over():
            with self._locked(exclusive=True) as is_ours:
                count = min(BATCH_LINES, most_lines)
                before, after = (is_ours and self._guarded(partial(self._take_in, count))) or (0, 0)
            held = max(held, after)
            most_lines -= after - before
            if after - before <= 0:
                break
            if progress:
                progress(after)
        return held

    @contextlib.contextmanager
    def reading(self, *, at_rest: bool = False, to_sign: bool = False) -> Iterator[View | None]:
        """What it holds, for as long as this lasts; None where it is not there or does not fit the log.

        The log is as it is now, or as `Segments` has it `at_rest` or `to_sign`. Raises `UnfitError` where the index
        turns out to be damaged, and `OperatorError` where the log cannot be synced to be signed.
        """
        with contextlib.ExitStack() as stack:
            view = None
            if self.exists() and stack.enter_context(self._locked(exclusive=False)):
                view = self._guarded(lambda: self._view(stack, at_rest=at_rest, to_sign=to_sign))
            try:
                yield view
            except sqlite3.Error as error:  # damaged where it was not looked at before
                raise UnfitError(str(error)) from error

    def drop(self) -> None:
        """Delete it, unless somebody uses it: then they will."""
        with contextlib.suppress(OSError), self._locked(exclusive=True) as is_ours:
            if is_ours:
                index_file.unlink(self._file)

    def _view(self, stack: contextlib.ExitStack, *, at_rest: bool, to_sign: bool) -> View | None:
        log = stack.enter_context(Segments(self._path, at_rest=at_rest, to_sign=to_sign))
        if index_file.was_left(self._file):
            return None
        base = stack.enter_context(contextlib.closing(index_file.opened(self._file)))
        if not index_file.is_ours(base) or not (state := state_of(base)).seq:
            return None
        return View(base, log, state) if is_of(log, state) else None

    def _guarded(self, step: Callable[[], Any]) -> Any:  # noqa: ANN401  # whatever the step gives
        """Do something with it; None where that cannot be."""
        try:
            return step()
        except (sqlite3.Error, OSError, BrokenLineError, UnfitError) as error:
            _log.info("the index of %s is done without: %s", self._path, error)
            return None

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[bool]:
        """Who reads waits for a batch to end; who writes for nobody. False where the lock was not taken."""
        try:
            lock = open_own(self._lock_path, os.O_RDONLY | (os.O_CREAT if exclusive else 0), FILE_MODE)
        except OSError:
            yield False
            return
        try:
            yield taken(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        finally:
            os.close(lock)

    def _take_in(self, most_lines: int) -> tuple[int, int]:
        """One batch; gives how many lines the index held before and how many after. Only under the lock."""
        with Segments(self._path, at_rest=True) as log:
            try:
                return self._try_take_in(log, most_lines)
            except (sqlite3.DatabaseError, UnfitError) as error:
                if isinstance(error, sqlite3.OperationalError) and not index_file.is_malformed(error):
                    raise  # no room on the disk, or no right to write
                _log.warning("the index of %s is built anew: %s", self._path, error)
                index_file.unlink(self._file)
                return self._try_take_in(log, most_lines)

    def _try_take_in(self, log: Segments, most_lines: int) -> tuple[int, int]:
        if index_file.was_left(self._file):
            index_file.unlink(self._file)
        os.close(open_own(self._file, os.O_RDWR | os.O_CREAT, FILE_MODE))
        with contextlib.closing(index_file.opened(self._file, to_write=True)) as base:
            base.execute("PRAGMA synchronous = NORMAL")
            base.execute("BEGIN IMMEDIATE")
            if not base.execute("PRAGMA schema_version").fetchone()[0]:
                index_file.make_tables(base)
            if not index_file.is_ours(base):
                raise UnfitError("it has another form")
            state = state_of(base)
            if not is_of(log, state):
                raise UnfitError("it is not of this log")
            if next(lines_behind(log, state), None) is None:
                return state.seq, state.seq
            last = _Batch(base, state).add(log, most_lines)
            base.execute("COMMIT")
        return state.seq, last.seq


class _Batch:
    """Lines on their way into the index, in one transaction."""

    def __init__(self, base: sqlite3.Connection, state: State) -> None:
        self._base = base
        self._state = state
        self._block = state.seq // index_view.BLOCK_LINES
        self._runs: dict[int, _Run] = {}
        self._kinds: dict[tuple[Any, ...], int] = {
            tuple(row[1:]): row[0]
            for row in base.execute("SELECT id, type, overlay, phase, ok, code, caller FROM kinds")
        }
        self._places: list[tuple[int, int]] = []
        self._tree = _Tiles(base, state.seq)

    def add(self, log: Segments, most_lines: int) -> State:
        """At most so many of the lines behind the last that is held; gives the last that is held then."""
        self._tree.begin(log, self._state)
        self._runs = _runs_of(self._base, self._block)
        with contextlib.suppress(BrokenLineError):  # whoever reads that line will say so
            for line, first, place in itertools.islice(lines_behind(log, self._state), most_lines):
                self._add(line, first, place)
        self._end_block()
        self._base.executemany("INSERT OR REPLACE INTO places VALUES (?, ?)", self._places)
        self._base.execute("UPDATE state SET seq = ?, hash = ?, first = ?, place = ?, after = ?", self._state)
        return self._state

    def _add(self, line: bytes, first: int, place: int) -> None:
        seq = self._state.seq + 1
        record = check(line, seq, self._state.hash.hex() or GENESIS)
        digest = bytes.fromhex(record["hash"])
        if not -(2**63) <= record["timestamp_ms"] < 2**63:
            raise BrokenLineError("form", "its time is beyond what the index holds")
        kind = self._kind(record)
        block, number = divmod(seq - 1, index_view.BLOCK_LINES)
        if block != self._block:
            self._end_block()
            self._block = block
        self._runs.setdefault(kind, _Run()).add(number, record["timestamp_ms"])
        if seq % index_view.EVERY == 1 or place == 0:
            self._places.append((seq, place))
        self._tree.append(digest)
        self._state = State(seq, digest, first, place, place + len(line))

    def _kind(self, record: Record) -> int:
        members = ("type", "overlay", "phase", "ok", "code", "caller")
        key = tuple(plain(record.get(name)) for name in members)
        known = self._kinds.get(key)
        if known is None:
            added = self._base.execute("INSERT INTO kinds VALUES (NULL, ?, ?, ?, ?, ?, ?)", key).lastrowid
            known = self._kinds[key] = int(added or 0)
        return known

    def _end_block(self) -> None:
        rows = [(kind, self._block, run.oldest, run.newest, run.lines.tobytes()) for kind, run in self._runs.items()]
        self._base.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)", rows)
        self._runs = {}


class _Run:
    """The lines of one kind in one block: their numbers there, and their oldest and newest time in ms."""

    __slots__ = ("lines", "newest", "oldest")

    def __init__(self, oldest: int = 2**63 - 1, newest: int = -(2**63), lines: bytes = b"") -> None:
        self.oldest = oldest
        self.newest = newest
        self.lines = numbers_in(lines)

    def add(self, number: int, time_ms: int) -> None:
        self.lines.append(number)
        self.oldest = min(self.oldest, time_ms)
        self.newest = max(self.newest, time_ms)


class _Tiles:
    """Hashes of the tree on their way into the index: those of levels 8, 16 and so on, 256 in a row of the table."""

    def __init__(self, base: sqlite3.Connection, size: int) -> None:
        self._base = base
        self._size = size
        self._leaves: list[bytes] = []

    def begin(self, log: Segments, state: State) -> None:
        """Learn the leaves behind the last whole 256 anew: the index does not hold them."""
        held = state.seq % index_view.TILE
        if held:
            lines = View(self._base, log, state).lines(state.seq - held + 1, held)
            self._leaves = [hash_in(line) for line in lines]

    def append(self, leaf: bytes) -> None:
        self._leaves.append(leaf)
        self._size += 1
        if len(self._leaves) == index_view.TILE:
            self._put(index_view.TILE_LEVELS, (self._size >> index_view.TILE_LEVELS) - 1, root_of(self._leaves))
            self._leaves = []

    def _put(self, level: int, index: int, node: bytes) -> None:
        n, number = divmod(index, index_view.TILE)
        row = self._base.execute("SELECT hashes FROM tiles WHERE level = ? AND n = ?", (level, n)).fetchone()
        hashes = blob_in(row)[: number * HASH_BYTES] + node
        if len(hashes) != (number + 1) * HASH_BYTES:
            raise UnfitError(f"its tree lacks hashes of level {level}")
        self._base.execute("INSERT OR REPLACE INTO tiles VALUES (?, ?, ?)", (level, n, hashes))
        if number == index_view.TILE - 1:
            self._put(level + index_view.TILE_LEVELS, n, root_over(hashes))


def _runs_of(base: sqlite3.Connection, block: int) -> dict[int, _Run]:
    query = "SELECT kind, oldest, newest, lines FROM runs WHERE kind IN (SELECT id FROM kinds) AND block = ?"
    rows = base.execute(query, (block,))
    return {kind: _Run(oldest, newest, lines) for kind, oldest, newest, lines in rows}


def index_of(path: Path) -> Index | None:
    """The index of a ledger; None of one that has none and is too small to need any."""
    index = Index(path)
    return index if index.exists() or segments.total_bytes(path) >= WORTH_BYTES else None
