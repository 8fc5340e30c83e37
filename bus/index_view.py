"""Reading the ledger's index: line N, the lines that a filter may name, and the hash of a subtree.

`index` writes what is read here, and says what may be trusted of it: numbers, places and hashes are as the index has
them, and nothing here holds them against the log, but that the last line it holds stands where it stood, and that it
names as many lines of a block as there are. What makes no sense is an `UnfitError`.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.merkle import HASH_BYTES, node_hash, root_of
from bus.records import BrokenLineError, check, hash_in, parse
from bus.segments import Packed, lines_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterator

    from bus.merkle import Subtree
    from bus.model import Record
    from bus.segments import Content, Segments

EVERY = 64
"""Of so many lines, the place of one is kept."""

BLOCK_LINES = 8192
"""So many lines, side by side, are one block."""

TILE_LEVELS = 8
TILE = 1 << TILE_LEVELS
"""So many hashes, side by side in one level of the tree, are one tile."""

_BLOCKS_AT_ONCE = 64
_NEAR = 1 << 16
_KEPT = 4
_KIND_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Filter:
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


class UnfitError(Exception):
    """The index does not say what is in the log."""


class State(NamedTuple):
    """The last line that the index holds: its number, hash, segment, and the bytes it has there, unpacked."""

    seq: int
    hash: bytes
    first: int
    place: int
    after: int


class _Stretch(NamedTuple):
    """Lines that stand together, the first of which has the number `first`."""

    first: int
    lines: list[bytes]

    @property
    def seqs(self) -> range:
        return range(self.first, self.first + len(self.lines))


class View:
    """What an index holds of its log, while nobody changes it. Raises `UnfitError` where it is wrong."""

    def __init__(self, base: sqlite3.Connection, log: Segments, state: State) -> None:
        self._base = base
        self.log = log
        self._state = state
        self.size = state.seq
        """How many lines, from line 1 on."""
        self.head = state.hash.hex()
        """The hash of the last of them."""
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
        return (line for line, _, _ in lines_behind(self.log, self._state))

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
        return _Stretch(known[0], list(itertools.islice(lines_of(content.chunks_from(known[1], _NEAR)), EVERY)))

    def newest(self, wanted: Filter) -> Iterator[int]:
        """The numbers of the lines that may be wanted, the last first; all that are wanted are among them."""
        last = (self.size - 1) // BLOCK_LINES
        condition, values = _condition(wanted)
        self._base.create_function("may_be_among", 1, cache(partial(_may_be_among, wanted)), deterministic=True)
        query = f"SELECT block, lines FROM runs WHERE {condition}"  # noqa: S608  # of our own texts
        for end in range(last, -1, -_BLOCKS_AT_ONCE):
            self._require_all_named(end - _BLOCKS_AT_ONCE + 1, end)
            blocks: dict[int, list[int]] = {}
            for block, lines in self._base.execute(query, (*values, end - _BLOCKS_AT_ONCE + 1, end)):
                blocks.setdefault(block, []).extend(numbers_in(lines))
            for block in sorted(blocks, reverse=True):
                numbers = sorted(blocks[block], reverse=True)
                if len(set(numbers)) < len(numbers) or any(number >= BLOCK_LINES for number in numbers[:1]):
                    raise UnfitError("a block of it names a line twice, or one that is not in it")
                yield from (block * BLOCK_LINES + number + 1 for number in numbers)

    def _require_all_named(self, first: int, last: int) -> None:
        """Raises `UnfitError` unless the kinds of each of these blocks have as many lines as the block has."""
        query = (
            "SELECT block, sum(length(lines)) FROM runs WHERE kind IN (SELECT id FROM kinds) AND block BETWEEN ? AND ? "
            "GROUP BY block ORDER BY block"
        )
        blocks = range(max(0, first), last + 1)
        lines = [min(BLOCK_LINES, self.size - block * BLOCK_LINES) for block in blocks]
        if self._base.execute(query, (blocks.start, last)).fetchall() != [
            *zip(blocks, (2 * n for n in lines), strict=True)
        ]:
            raise UnfitError("it does not name all lines")

    def hash_of(self, part: Subtree) -> bytes:
        """Of a perfect subtree whose leaves it holds. Raises `BrokenLineError` as well."""
        if (part.number + 1) << part.level > self.size:
            raise ValueError(f"the index holds {self.size} lines")
        if part.level < TILE_LEVELS:
            tile, start = divmod(part.number << part.level, TILE)
            return root_of(self._leaves_of(tile)[start : start + (1 << part.level)])
        above = part.level % TILE_LEVELS
        level = part.level - above
        n, start = divmod(part.number << above, TILE)
        row = self._base.execute("SELECT hashes FROM tiles WHERE level = ? AND n = ?", (level, n)).fetchone()
        hashes = blob_in(row)[start * HASH_BYTES : (start + (1 << above)) * HASH_BYTES]
        if len(hashes) != HASH_BYTES << above:
            raise UnfitError(f"its tree lacks hashes of level {level}")
        return root_over(hashes)

    def _leaves_of(self, tile: int) -> list[bytes]:
        if tile not in self._leaves:
            start = tile << TILE_LEVELS
            lines = self.lines(start + 1, min(TILE, self.size - start))
            self._leaves[tile] = [hash_in(line) for line in lines]
            if len(self._leaves) > _KEPT:
                self._leaves.popitem(last=False)
        return self._leaves[tile]

    def record_hash(self, seq: int) -> bytes:
        """The 32 bytes of the hash of line `seq`, which has it. Raises `BrokenLineError` as well."""
        return bytes.fromhex(check(self.line(seq), seq)["hash"])


def _member_of(content: Packed, first: int, seq: int) -> _Stretch | None:
    """What is in the member that a line is in, of the segment that begins with `first`; None where none is ours."""
    for member in content.members:
        if member.lines < 0:
            return None
        if seq < first + member.lines:
            return _Stretch(first, list(lines_of([content.unpack(member)])))
        first += member.lines
    return None


def state_of(base: sqlite3.Connection) -> State:
    """What the index says that it holds. Raises `UnfitError` where that makes no sense."""
    row = base.execute("SELECT seq, hash, first, place, after FROM state").fetchone()
    if row is None:
        raise UnfitError("it does not say what it holds")
    state = State(*row)
    numbers = (state.seq, state.first, state.place, state.after)
    if not isinstance(state.hash, bytes) or any(not isinstance(one, int) or one < 0 for one in numbers):
        raise UnfitError("what it says that it holds makes no sense")
    return state


def is_of(log: Segments, state: State) -> bool:
    """Whether the last line that the index holds stands where it stood."""
    if state.seq == 0:
        return True
    if state.first not in log.firsts:
        return False
    number = log.firsts.index(state.first)
    try:
        with log.content(number) as content:
            line = _at(content, state)
        return hash_in(line) == state.hash and parse(line)["seq"] == state.seq
    except BrokenLineError:
        return False


def _at(content: Content, state: State) -> bytes:
    """The line where the last one that is held stood; `b""` where there is none."""
    line = next(lines_of(content.chunks_from(state.place, _NEAR)), b"")
    return line if len(line) == state.after - state.place else b""


def lines_behind(log: Segments, state: State) -> Iterator[tuple[bytes, int, int]]:
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


def numbers_in(lines: object) -> array[int]:
    """The numbers of lines in their block, of a run as the index has it. Raises `UnfitError`."""
    if not isinstance(lines, bytes) or len(lines) % 2:
        raise UnfitError("a block of it does not say which lines are in it")
    return array("H", lines)


def blob_in(row: tuple[Any, ...] | None) -> bytes:
    """The one value of a row; none where there is no row, or it is of another type."""
    return row[0] if row and isinstance(row[0], bytes) else b""


def root_over(hashes: bytes) -> bytes:
    """The hash over a row of as many as a power of 2."""
    nodes = [hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)]
    while len(nodes) > 1:
        nodes = [node_hash(left, right) for left, right in zip(nodes[::2], nodes[1::2], strict=True)]
    return nodes[0]


def plain(value: Any) -> Any:  # noqa: ANN401
    """As SQLite can hold it and compare it: nobody says that a line's members are of the types that they should be."""
    if value is None:
        return ""
    return (value if isinstance(value, str) else repr(value))[:_KIND_CHARACTERS]


def _may_be_among(wanted: Filter, overlay: str) -> bool:
    """Whether a kind, by its overlay as `plain` has it, may hold lines of the overlays that are wanted."""
    return not overlay or len(overlay) >= _KIND_CHARACTERS or wanted.has_overlay(overlay)


def _condition(wanted: Filter) -> tuple[str, list[Any]]:
    """Of the kinds, the times and the blocks from one to another, and its values but these two."""
    parts, values = [], []
    for name, value in wanted.named().items():
        parts.append(f"{name} = ?")
        values.append(plain(value))
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
