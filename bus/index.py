"""The ledger's index: a cache that finds line N, the lines of a filter, and the hashes that proofs are made of.

`provenance.index` (SQLite) can be deleted at any time. It says where to look, and the log what is there: each line that
it names is held against what was asked, and `proofs` holds each hash that it gives against the log. So an index that is
wrong costs time, and leads to no wrong line and no wrong proof; but lines that it leaves out of a filter's are not
missed. One that does not fit the log deletes itself, and is built again by the next `refresh`. Lines of the same type,
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
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bus import segments
from bus.merkle import HASH_BYTES, Subtree, node_hash, root_of
from bus.records import BrokenLineError, hash_in, parse
from bus.segments import FILE_MODE, Packed, Segments, lines_of, taken

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from bus.model import Record
    from bus.segments import Content

SCHEMA = 1
WORTH_BYTES = 1 << 23
"""A log is read without an index until it is as large."""

BATCH_LINES = 16_384
"""How many lines are taken in at once, in which time nobody else uses the index."""

_EVERY = 64
"""Of so many lines, the place of one is kept."""

_BLOCK_LINES = 8192
_BLOCKS_AT_ONCE = 64
_TILE_LEVELS = 8
_TILE = 1 << _TILE_LEVELS
_NEAR = 1 << 16
_KEPT = 4
_KIND_CHARACTERS = 200
_WAIT_S = 5.0
_log = logging.getLogger(__name__)

_TABLES = """
CREATE TABLE state (seq INTEGER NOT NULL, hash BLOB NOT NULL, first INTEGER NOT NULL, place INTEGER NOT NULL,
                    after INTEGER NOT NULL);
CREATE TABLE places (seq INTEGER PRIMARY KEY, place INTEGER NOT NULL);
CREATE TABLE kinds (id INTEGER PRIMARY KEY, type, overlay, phase, ok, code, caller,
                    UNIQUE (type, overlay, phase, ok, code, caller));
CREATE TABLE runs (kind INTEGER, block INTEGER, oldest INTEGER, newest INTEGER, lines BLOB, PRIMARY KEY (kind, block))
    WITHOUT ROWID;
CREATE TABLE tiles (level INTEGER, n INTEGER, hashes BLOB, PRIMARY KEY (level, n)) WITHOUT ROWID;
INSERT INTO state VALUES (0, x'', 1, 0, 0);
"""
# `place` is a byte of the segment that begins with line `first`, unpacked: the last line's, and `after` its end.


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records are asked for; None is any. Times are in milliseconds since the epoch, both ends included.

    `among` are names and patterns of overlays, as those of a token: a record is of one of these, or of no overlay.
    """

    overlay: str | None = None
    phase: str | None = None
    ok: bool | None = None
    code: str | None = None
    caller: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    types: Collection[str] | None = None
    among: Collection[str] | None = None

    def fits(self, record: Record) -> bool:
        """Whether a record is one of them."""
        time_ms = record["timestamp_ms"]
        return (
            all(record.get(name) == value for name, value in self.named().items())
            and (self.types is None or record["type"] in self.types)
            and self.has_overlay(record.get("overlay"))
            and (self.since_ms is None or time_ms >= self.since_ms)
            and (self.until_ms is None or time_ms <= self.until_ms)
        )

    def has_overlay(self, overlay: Any) -> bool:  # noqa: ANN401  # a line that somebody else wrote may say anything
        """Whether the member `overlay` of a record, None of one that has none, is one of `among`."""
        if self.among is None or overlay is None:
            return True
        return isinstance(overlay, str) and any(fnmatchcase(overlay, pattern) for pattern in self.among)

    def named(self) -> dict[str, Any]:
        """The members that are asked for, and what they are to be."""
        pairs = (("overlay", self.overlay), ("phase", self.phase), ("ok", self.ok), ("code", self.code))
        return {name: value for name, value in (*pairs, ("caller", self.caller)) if value is not None}

    @property
    def is_narrow(self) -> bool:
        """Whether anything is asked for but the last lines."""
        narrowing = (*self.named().values(), self.since_ms, self.until_ms, self.types, self.among)
        return any(value is not None for value in narrowing)


class _State(NamedTuple):
    """The last line that the index holds: its number, hash, segment, and the bytes it has there, unpacked."""

    seq: int
    hash: bytes
    first: int
    place: int
    after: int


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
        with the number of lines after each batch. Stops at a line that is no record.
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
                self._unlink()

    def _view(self, stack: contextlib.ExitStack, *, at_rest: bool, to_sign: bool) -> View | None:
        log = stack.enter_context(Segments(self._path, at_rest=at_rest, to_sign=to_sign))
        base = stack.enter_context(contextlib.closing(self._connect()))
        if not _is_ours(base) or not (state := _state(base)).seq:
            return None
        return View(base, log, state) if _fits(log, state) else None

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
            lock = os.open(self._lock_path, os.O_RDONLY | (os.O_CREAT if exclusive else 0) | os.O_CLOEXEC, FILE_MODE)
        except OSError:
            yield False
            return
        try:
            yield taken(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        finally:
            os.close(lock)

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self._file.absolute().as_uri()}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)

    def _unlink(self) -> None:
        for suffix in ("", "-journal"):
            self._file.with_name(self._file.name + suffix).unlink(missing_ok=True)

    def _take_in(self, most_lines: int) -> tuple[int, int]:
        """One batch; gives how many lines the index held before and how many after. Only under the lock."""
        with Segments(self._path, at_rest=True) as log:
            try:
                return self._try_take_in(log, most_lines)
            except (sqlite3.DatabaseError, UnfitError) as error:
                if isinstance(error, sqlite3.OperationalError) and not _is_malformed(error):
                    raise  # no room on the disk, or no right to write
                _log.warning("the index of %s is built anew: %s", self._path, error)
                self._unlink()
                return self._try_take_in(log, most_lines)

    def _try_take_in(self, log: Segments, most_lines: int) -> tuple[int, int]:
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
        with contextlib.closing(self._connect()) as base:
            base.execute("PRAGMA synchronous = NORMAL")
            base.execute("BEGIN IMMEDIATE")
            if not base.execute("PRAGMA schema_version").fetchone()[0]:
                _make_tables(base)
            if not _is_ours(base):
                raise UnfitError("it has another form")
            state = _state(base)
            if not _fits(log, state):
                raise UnfitError("it is not of this log")
            if next(_lines_behind(log, state), None) is None:
                return state.seq, state.seq
            last = _Batch(base, state).add(log, most_lines)
            base.execute("COMMIT")
        return state.seq, last.seq


class UnfitError(Exception):
    """The index does not say what is in the log."""


class _Batch:
    """Lines on their way into the index, in one transaction."""

    def __init__(self, base: sqlite3.Connection, state: _State) -> None:
        self._base = base
        self._state = state
        self._block = state.seq // _BLOCK_LINES
        self._runs: dict[int, _Run] = {}
        self._kinds: dict[tuple[Any, ...], int] = {
            tuple(row[1:]): row[0]
            for row in base.execute("SELECT id, type, overlay, phase, ok, code, caller FROM kinds")
        }
        self._places: list[tuple[int, int]] = []
        self._tree = _Tiles(base, state.seq)

    def add(self, log: Segments, most_lines: int) -> _State:
        """At most so many of the lines behind the last that is held; gives the last that is held then."""
        self._tree.begin(log, self._state)
        self._runs = _runs_of(self._base, self._block)
        with contextlib.suppress(BrokenLineError):  # whoever reads that line will say so
            for line, first, place in itertools.islice(_lines_behind(log, self._state), most_lines):
                self._add(line, first, place)
        self._end_block()
        self._base.executemany("INSERT OR REPLACE INTO places VALUES (?, ?)", self._places)
        self._base.execute("UPDATE state SET seq = ?, hash = ?, first = ?, place = ?, after = ?", self._state)
        return self._state

    def _add(self, line: bytes, first: int, place: int) -> None:
        seq = self._state.seq + 1
        if not line.endswith(b"\n"):
            raise BrokenLineError("torn", "it has no end")
        record, digest = parse(line), hash_in(line)
        if record["seq"] != seq or not -(2**63) <= record["timestamp_ms"] < 2**63:
            raise BrokenLineError("seq", f"it is line {seq} and says seq {record['seq']}")
        kind = self._kind(record)
        block, number = divmod(seq - 1, _BLOCK_LINES)
        if block != self._block:
            self._end_block()
            self._block = block
        self._runs.setdefault(kind, _Run()).add(number, record["timestamp_ms"])
        if seq % _EVERY == 1 or place == 0:
            self._places.append((seq, place))
        self._tree.append(digest)
        self._state = _State(seq, digest, first, place, place + len(line))

    def _kind(self, record: Record) -> int:
        members = ("type", "overlay", "phase", "ok", "code", "caller")
        key = tuple(_plain(record.get(name)) for name in members)
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
        self.lines = _numbers(lines)

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

    def begin(self, log: Segments, state: _State) -> None:
        """Learn the leaves behind the last whole 256 anew: the index does not hold them."""
        held = state.seq % _TILE
        if held:
            lines = View(self._base, log, state).lines(state.seq - held + 1, held)
            self._leaves = [hash_in(line) for line in lines]

    def append(self, leaf: bytes) -> None:
        self._leaves.append(leaf)
        self._size += 1
        if len(self._leaves) == _TILE:
            self._put(_TILE_LEVELS, (self._size >> _TILE_LEVELS) - 1, root_of(self._leaves))
            self._leaves = []

    def _put(self, level: int, index: int, node: bytes) -> None:
        n, number = divmod(index, _TILE)
        row = self._base.execute("SELECT hashes FROM tiles WHERE level = ? AND n = ?", (level, n)).fetchone()
        hashes = _blob(row)[: number * HASH_BYTES] + node
        if len(hashes) != (number + 1) * HASH_BYTES:
            raise UnfitError(f"its tree lacks hashes of level {level}")
        self._base.execute("INSERT OR REPLACE INTO tiles VALUES (?, ?, ?)", (level, n, hashes))
        if number == _TILE - 1:
            self._put(level + _TILE_LEVELS, n, _root(hashes))


class _Stretch(NamedTuple):
    """Lines that stand together, the first of which has the number `first`."""

    first: int
    lines: list[bytes]

    @property
    def seqs(self) -> range:
        return range(self.first, self.first + len(self.lines))


def _member_of(content: Packed, first: int, seq: int) -> _Stretch | None:
    """What is in the member that a line is in, of the segment that begins with `first`; None where none is ours."""
    for member in content.members:
        if member.lines < 0:
            return None
        if seq < first + member.lines:
            return _Stretch(first, list(lines_of([content.unpack(member)])))
        first += member.lines
    return None


class View:
    """What an index holds of its log, while nobody changes it. Raises `UnfitError` where it is wrong."""

    def __init__(self, base: sqlite3.Connection, log: Segments, state: _State) -> None:
        self._base = base
        self.log = log
        self._state = state
        self.size = state.seq
        """How many lines, from line 1 on."""
        self._stretches: deque[_Stretch] = deque(maxlen=_KEPT)
        self._leaves: OrderedDict[int, list[bytes]] = OrderedDict()

    def line(self, seq: int) -> bytes:
        """Line `seq`, which it holds, as it stands in the log."""
        return next(self.lines(seq, 1))

    def lines(self, seq: int, count: int) -> Iterator[bytes]:
        """So many from line `seq` on. Raises `BrokenLineError` for a segment that cannot be read."""
        while count > 0:
            stretch = self._stretch_of(seq)
            found = stretch.lines[seq - stretch.first :][:count]
            yield from found
            seq, count = seq + len(found), count - len(found)

    def lines_behind(self) -> Iterator[bytes]:
        """Those of the log that it does not hold, the last perhaps torn."""
        return (line for line, _, _ in _lines_behind(self.log, self._state))

    def _stretch_of(self, seq: int) -> _Stretch:
        """Who asks for one line often asks for its neighbours next."""
        for kept in self._stretches:
            if seq in kept.seqs:
                return kept
        number = self.log.number_of(seq)
        first = self.log.firsts[number]
        with self.log.content(number) as content:
            found = _member_of(content, first, seq) if isinstance(content, Packed) else None
            found = found or self._behind_a_place(content, first, seq)
        if seq not in found.seqs:
            raise UnfitError(f"the log has no line {seq}")
        self._stretches.appendleft(found)
        return found

    def _behind_a_place(self, content: Content, first: int, seq: int) -> _Stretch:
        query = "SELECT seq, place FROM places WHERE seq <= ? AND seq >= ? ORDER BY seq DESC LIMIT 1"
        known = self._base.execute(query, (seq, first)).fetchone()
        if known is None or not isinstance(known[1], int) or known[1] < 0:
            raise UnfitError(f"it does not know where line {seq} is")
        return _Stretch(known[0], list(itertools.islice(lines_of(content.chunks_from(known[1], _NEAR)), _EVERY)))

    def newest(self, wanted: Wanted) -> Iterator[int]:
        """The numbers of the lines that may be wanted, the last first; all that are wanted are among them."""
        last = (self.size - 1) // _BLOCK_LINES
        condition, values = _condition(wanted)
        self._base.create_function("may_be_among", 1, cache(partial(_may_be_among, wanted)), deterministic=True)
        query = f"SELECT block, lines FROM runs WHERE {condition}"  # noqa: S608  # of our own texts
        for end in range(last, -1, -_BLOCKS_AT_ONCE):
            blocks: dict[int, list[int]] = {}
            for block, lines in self._base.execute(query, (*values, end - _BLOCKS_AT_ONCE + 1, end)):
                blocks.setdefault(block, []).extend(_numbers(lines))
            for block in sorted(blocks, reverse=True):
                yield from (block * _BLOCK_LINES + number + 1 for number in sorted(blocks[block], reverse=True))

    def hash_of(self, part: Subtree) -> bytes:
        """Of a perfect subtree whose leaves it holds. Raises `BrokenLineError` as well."""
        if (part.number + 1) << part.level > self.size:
            raise ValueError(f"the index holds {self.size} lines")
        if part.level < _TILE_LEVELS:
            tile, start = divmod(part.number << part.level, _TILE)
            return root_of(self._leaves_of(tile)[start : start + (1 << part.level)])
        above = part.level % _TILE_LEVELS
        level = part.level - above
        n, start = divmod(part.number << above, _TILE)
        row = self._base.execute("SELECT hashes FROM tiles WHERE level = ? AND n = ?", (level, n)).fetchone()
        hashes = _blob(row)[start * HASH_BYTES : (start + (1 << above)) * HASH_BYTES]
        if len(hashes) != HASH_BYTES << above:
            raise UnfitError(f"its tree lacks hashes of level {level}")
        return _root(hashes)

    def _leaves_of(self, tile: int) -> list[bytes]:
        if tile not in self._leaves:
            start = tile << _TILE_LEVELS
            lines = self.lines(start + 1, min(_TILE, self.size - start))
            self._leaves[tile] = [hash_in(line) for line in lines]
            if len(self._leaves) > _KEPT:
                self._leaves.popitem(last=False)
        return self._leaves[tile]

    def record_hash(self, seq: int) -> bytes:
        """The 32 bytes of the hash that line `seq` holds."""
        return hash_in(self.line(seq))


def _is_malformed(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", None) in {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,
    }


def _make_tables(base: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";")[:-1]:
        base.execute(statement)
    base.execute(f"PRAGMA user_version = {SCHEMA}")


def _is_ours(base: sqlite3.Connection) -> bool:
    return bool(base.execute("PRAGMA user_version").fetchone()[0] == SCHEMA)


def _state(base: sqlite3.Connection) -> _State:
    row = base.execute("SELECT seq, hash, first, place, after FROM state").fetchone()
    if row is None:
        raise UnfitError("it does not say what it holds")
    state = _State(*row)
    numbers = (state.seq, state.first, state.place, state.after)
    if not isinstance(state.hash, bytes) or any(not isinstance(one, int) or one < 0 for one in numbers):
        raise UnfitError("what it says that it holds makes no sense")
    return state


def _blob(row: tuple[Any, ...] | None) -> bytes:
    """The one value of a row; none where there is no row, or it is of another type."""
    return row[0] if row and isinstance(row[0], bytes) else b""


def _fits(log: Segments, state: _State) -> bool:
    """Whether the last line that the index holds stands where it stood."""
    if state.seq == 0:
        return True
    if state.first not in log.firsts:
        return False
    number = log.firsts.index(state.first)
    try:
        with log.content(number) as content:
            line = _at(content, state)
        return hash_in(line) == state.hash
    except BrokenLineError:
        return False


def _at(content: Content, state: _State) -> bytes:
    """The line where the last one that is held stood; `b""` where there is none."""
    line = next(lines_of(content.chunks_from(state.place, _NEAR)), b"")
    return line if len(line) == state.after - state.place else b""


def _lines_behind(log: Segments, state: _State) -> Iterator[tuple[bytes, int, int]]:
    """The lines behind the last that is held, each with its segment's first line and its place there, unpacked."""
    if state.seq == 0 and log.firsts[:1] != [1]:
        return  # the tree is of all lines, and the first are not there
    number, place = log.firsts.index(state.first), state.after
    for first in log.firsts[number:]:
        with log.content(log.firsts.index(first)) as content:
            for line in lines_of(content.chunks_from(place)):
                yield line, first, place
                place += len(line)
        place = 0


def _numbers(lines: object) -> array[int]:
    if not isinstance(lines, bytes) or len(lines) % 2:
        raise UnfitError("a block of it does not say which lines are in it")
    return array("H", lines)


def _runs_of(base: sqlite3.Connection, block: int) -> dict[int, _Run]:
    query = "SELECT kind, oldest, newest, lines FROM runs WHERE kind IN (SELECT id FROM kinds) AND block = ?"
    rows = base.execute(query, (block,))
    return {kind: _Run(oldest, newest, lines) for kind, oldest, newest, lines in rows}


def _plain(value: Any) -> Any:  # noqa: ANN401
    """As SQLite can hold it and compare it: nobody says that a line's members are of the types that they should be."""
    if value is None:
        return ""
    return (value if isinstance(value, str) else repr(value))[:_KIND_CHARACTERS]


def _may_be_among(wanted: Wanted, overlay: str) -> bool:
    """Whether a kind, by its overlay as `_plain` has it, may hold lines of the overlays that are wanted."""
    return not overlay or len(overlay) >= _KIND_CHARACTERS or wanted.has_overlay(overlay)


def _condition(wanted: Wanted) -> tuple[str, list[Any]]:
    """Of the kinds, the times and the blocks from one to another, and its values but these two."""
    parts, values = [], []
    for name, value in wanted.named().items():
        parts.append(f"{name} = ?")
        values.append(_plain(value))
    if wanted.types is not None:
        parts.append(f"type IN ({', '.join('?' * len(wanted.types))})")
        values.extend(wanted.types)
    if wanted.among is not None:
        parts.append("may_be_among(overlay)")
    kinds = f"kind IN (SELECT id FROM kinds WHERE {' AND '.join(parts) or '1'})"  # noqa: S608  # of our own texts
    times = []
    if wanted.since_ms is not None:
        times.append("newest >= ?")
        values.append(wanted.since_ms)
    if wanted.until_ms is not None:
        times.append("oldest <= ?")
        values.append(wanted.until_ms)
    return " AND ".join((kinds, *times, "block BETWEEN ? AND ?")), values


def _root(hashes: bytes) -> bytes:
    """The hash over a row of as many as a power of 2."""
    nodes = [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]
    while len(nodes) > 1:
        nodes = [node_hash(left, right) for left, right in zip(nodes[::2], nodes[1::2], strict=True)]
    return nodes[0]


def index_of(path: Path) -> Index | None:
    """The index of a ledger; None of one that has none and is too small to need any."""
    index = Index(path)
    return index if index.exists() or segments.total_bytes(path) >= WORTH_BYTES else None
