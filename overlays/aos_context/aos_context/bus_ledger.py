"""The ledger of a bus, as far as a reader needs it: its files, its lines, and what holds them together.

Nothing of the bus is needed for that; `FORM` is all that is known of it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib
from typing import TYPE_CHECKING, Any

from aos_context.errors import BrokenError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

LEDGER_NAME = "provenance.jsonl"
GENESIS = "0" * 64
"""`prev` of line 1."""

FORM = """\
A line is a JSON object. Its `hash` is the SHA-256 of its bytes, without the newline and without the member
`"hash":"<64 hex>",` at its first occurrence; its `prev` is the hash of the line before, and 64 zeros in line 1; its
`seq` is its number. Lines that came first lie in segments beside the file, `<name>-<first seq>.jsonl`, which may be
compressed with gzip, with `.gz` behind their name."""

_HASH_START = b'"hash":"'
_HASH_MEMBER_BYTES = len(_HASH_START) + 64 + len('",')
_MOST_LINE_BYTES = 64 << 20


def hash_of(line: bytes) -> str | None:
    """See `FORM`; None where it has no such member."""
    start = line.find(_HASH_START)
    end = start + _HASH_MEMBER_BYTES
    if start < 0 or line[end - 2 : end] != b'",' or not line.endswith(b"\n"):
        return None
    return hashlib.sha256(line[:start] + line[end:-1]).hexdigest()


def record_of(line: bytes) -> dict[str, Any]:
    """Empty where the line is no JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def link_fault(record: dict[str, Any], before: bytes | None, line: bytes, after: bytes | None) -> str | None:
    """What is wrong between a line and its neighbours, None at the ends; None where nothing is."""
    hash_ = hash_of(line)
    if hash_ is None or record.get("hash") != hash_:
        return "the line's bytes do not have the hash that it holds"
    if before is None and record.get("seq") != 1:
        return "the line before it is not there, so its link to that cannot be seen"
    prev = GENESIS if before is None or record.get("seq") == 1 else hash_of(before)
    if prev is None or record.get("prev") != prev:
        return "its prev is not the hash of the line before it"
    # The last line may be torn while it is written; it is no witness then.
    if after is not None and after.endswith(b"\n") and record_of(after).get("prev") != hash_:
        return "the line after it does not have its hash as prev"
    return None


# --- Its files ---


def lines(ledger_path: Path) -> Iterator[bytes]:
    """Of all segments, with their newlines; the last may have none. Raises `NotFoundError`; `BrokenError`."""
    path = ledger_path / LEDGER_NAME if ledger_path.is_dir() else ledger_path
    closed, file = _listed(path)
    with file or contextlib.nullcontext():
        if not closed and file is None:
            raise NotFoundError(f"there is no ledger {path}", path=str(path))
        for plain in closed:
            yield from _segment_lines(plain)
        if file is not None:
            yield from _bounded(file, path)


def _listed(path: Path) -> tuple[list[Path], BinaryIO | None]:
    """The closed segments, and the open one if it is there: none twice and none left out, whatever the bus closes."""
    while True:
        file = _open(path)
        closed = _closed(path)
        again = _open(path)  # it had this name all the while, or a segment was closed meanwhile
        with again or contextlib.nullcontext():
            if _identity(file) == _identity(again):
                return closed, file
        if file is not None:
            file.close()


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None


def _identity(file: BinaryIO | None) -> tuple[int, int] | None:
    if file is None:
        return None
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _closed(path: Path) -> list[Path]:
    """The closed segments in order, each by the name of its plain form."""
    pattern = re.compile(rf"{re.escape(path.stem)}-([0-9]{{12,20}}){re.escape(path.suffix)}(\.gz)?")
    matches: Iterable[re.Match[str] | None] = ()
    if path.parent.is_dir():
        matches = [pattern.fullmatch(one.name) for one in path.parent.iterdir()]
    return [
        path.with_name(name)
        for _, name in sorted({(int(one[1]), one[0].removesuffix(".gz")) for one in matches if one})
    ]


def _segment_lines(plain: Path) -> Iterator[bytes]:
    """While a segment has both forms the plain one counts; compressed meanwhile, it has the other."""
    packed = plain.with_name(plain.name + ".gz")
    try:
        file = plain.open("rb")
    except FileNotFoundError:
        try:
            with gzip.open(packed) as unpacked:
                yield from _bounded(unpacked, packed)
        except (EOFError, OSError, zlib.error) as error:
            raise BrokenError(f"{packed.name} cannot be unpacked: {error}", file=packed.name) from None
        return
    with file:
        yield from _bounded(file, plain)


def _bounded(file: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    while line := file.readline(_MOST_LINE_BYTES):
        if len(line) == _MOST_LINE_BYTES:
            raise BrokenError(f"{path.name} has a line of more than {_MOST_LINE_BYTES} bytes", file=path.name)
        yield line
