"""Reading the ledger: one line, the last lines, all lines.

These functions take no part in writing and work while others write: a line without its newline is simply not yet one.
They read all segments of the ledger whose open one they are given, and use its index where that fits.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from typing import TYPE_CHECKING

from bus.errors import NotFoundError
from bus.index import index_of
from bus.index_view import Filter, UnfitError, View
from bus.records import BrokenLineError, check, parse, parse_or_none
from bus.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from bus.model import Record

CAUGHT_UP_LINES = 50_000
"""So many of the lines that an index lacks are taken in by who asks it, in some tenths of a second."""

_log = logging.getLogger(__name__)


def read_line(path: Path, seq: int) -> Record:
    """Line `seq`. Raises `NotFoundError` where there is none, `BrokenLineError` where it is not what was written."""
    record = _indexed_line(path, seq)
    if record is None:
        with Segments(path) as segments:
            is_late = seq > 0 and segments.are_there and (seq >= segments.firsts[0])
            line = next(segments.lines(seq), b"") if is_late else b""
        if line.endswith(b"\n"):
            return check(line, seq)
        raise NotFoundError(
            "ERR_NOT_FOUND", f"the ledger has no line {seq}", hint="aal provenance tail shows the last lines."
        )
    return record


def _indexed_line(path: Path, seq: int) -> Record | None:
    """Line `seq` as the index finds it, if it is that line."""
    index = index_of(path)
    if index is not None and seq > 0:
        with contextlib.suppress(UnfitError, BrokenLineError), index.reading() as view:
            if view is not None and seq <= view.size:
                return check(view.line(seq), seq)
    return None


def first_line(path: Path) -> bytes:
    """Line 1 as it stands in the file, without its newline where its write was cut off; `b""` where there is none."""
    with Segments(path) as segments:
        return next(segments.lines(), b"")


def raw_lines(path: Path, start: int = 1) -> Iterator[bytes]:
    """The lines from `start` on as they stand, the last perhaps without its newline; none where there is no ledger.

    As of a moment in which no writer holds the lock; the last lines may not be synced yet. Raises
    `BrokenLineError` for a segment that cannot be read.
    """
    with Segments(path, at_rest=True) as segments:
        yield from segments.lines(start)


def exists(path: Path) -> bool:
    """Whether there is a ledger."""
    with Segments(path) as segments:
        return segments.are_there


def iter_lines(path: Path, start: int = 1) -> Iterator[Record]:
    """The records from line `start` on that are whole now. Raises `BrokenLineError` at a line that is no record."""
    with Segments(path) as segments:
        yield from (parse(line) for line in segments.lines(start) if line.endswith(b"\n"))


def tail(
    path: Path,
    limit: int,
    *,
    overlay: str | None = None,
    phase: str | None = None,
    ok: bool | None = None,
    code: str | None = None,
    caller: str | None = None,
    since_ms: int | None = None,
    until_ms: int | None = None,
    types: Collection[str] | None = None,
    among: Collection[str] | None = None,
    shown: Callable[[Record], bool] = lambda _: True,
    most_bytes: int = sys.maxsize,
    most_lines: int = sys.maxsize,
) -> list[Record]:
    """The last `limit` records that fit and may be shown, oldest first. What is no record `verify` names.

    What is asked for is as `Filter` has it. No further line is read after `most_bytes` of those that no index names,
    nor after `most_lines`.
    """
    wanted = Filter(overlay, phase, ok, code, caller, since_ms, until_ms, types, among)
    index = index_of(path) if wanted.is_narrow else None
    if index is not None:
        index.refresh(most_lines=CAUGHT_UP_LINES)
        try:
            with index.reading() as view:
                if view is not None:
                    lines = itertools.islice(_indexed(view, wanted, most_bytes), most_lines)
                    return _last(lines, limit, wanted, shown)
        except (UnfitError, BrokenLineError) as error:
            _log.warning("the index of %s is built anew: %s", path, error)
            index.drop()
    return _last(itertools.islice(backwards(path, most_bytes), most_lines), limit, wanted, shown)


def backwards(path: Path, most_bytes: int = sys.maxsize) -> Iterator[bytes]:
    """The lines that are whole now, the last first. No further one is read after `most_bytes`."""
    with Segments(path) as segments:
        yield from _at_most(segments.backwards(), most_bytes)


def _at_most(lines: Iterator[bytes], most_bytes: int) -> Iterator[bytes]:
    """Lines, and no further one after so many bytes."""
    for line in lines:
        yield line
        most_bytes -= len(line)
        if most_bytes <= 0:
            return


def _last(
    lines_backwards: Iterator[bytes], limit: int, wanted: Filter, shown: Callable[[Record], bool]
) -> list[Record]:
    """Of lines, the last first, so many that fit and may be shown, oldest first."""
    records = (record for line in lines_backwards if (record := parse_or_none(line)) is not None)
    fitting = (record for record in records if wanted.fits(record) and shown(record))
    return list(itertools.islice(fitting, limit))[::-1]


def _indexed(view: View, wanted: Filter, most_bytes: int) -> Iterator[bytes]:
    """The lines that may be wanted, the last first: those behind the index, and those that it names.

    After `most_bytes` of those behind it nothing follows, so that no line between is left out.
    """
    for line in _at_most(view.log.backwards(), most_bytes):
        record = parse_or_none(line)
        if record is not None and record["seq"] <= view.size:
            break
        yield line
    else:
        if view.size and most_bytes < sys.maxsize:
            return
    for seq in view.newest(wanted):
        line = view.line(seq)
        record = parse_or_none(line)
        if record is None or record["seq"] != seq:
            raise UnfitError(f"line {seq} is not where it was")
        yield line
