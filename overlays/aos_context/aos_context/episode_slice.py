"""The part of a run's ledger that an episode stands for: a file beside it with the very bytes of these lines.

Lines are copied and hashed as they pass, and not parsed: `seq` and type are read off the end of a line, where the
ledger's sorted keys put them (`event_type`, `run_id`, `seq`, `timestamp`), so an episode costs what its lines weigh.

The slices follow each other without a gap, and an episode also has the hash of the chain of them (`chained`): so one
episode shows whether any line before its end was changed, for those who have the ledger and no episode before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from aos_context.artifacts import decode, sha256
from aos_context.errors import BrokenError
from aos_context.files import CHUNK_BYTES, temporary_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from aos_context.artifacts import Document

SLICE_MODE = 0o444
CHAIN_START = "0" * 64
"""What the chain begins with."""

_END_BYTES = 512
"""Of a line, in which the four members of `_LAST_MEMBERS` are."""
_LAST_MEMBERS = re.compile(
    rb'"event_type":"([A-Z][A-Z0-9_]{0,63})","run_id":"[A-Za-z0-9._-]{1,128}","seq":([0-9]{1,16}),'
    rb'"timestamp":"[^"\\]{1,40}"\}\n'
)


class Passing:
    """What lines were, once they have passed."""

    def __init__(self, first_seq: int) -> None:
        self._first_seq, self._last_seq = first_seq, first_seq - 1
        self._bytes, self._digest = 0, hashlib.sha256()
        self.counts: Counter[str] = Counter()
        """How many events of each type."""

    def through(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """The lines, as they are. Raises `BrokenError` where they are not the events from `first_seq` on."""
        for line in lines:
            type_, seq = _type_and_seq(line)
            if seq != self._last_seq + 1:
                raise BrokenError(f"event {seq} follows event {self._last_seq} in the ledger")
            self.counts[type_] += 1
            self._last_seq, self._bytes = seq, self._bytes + len(line)
            self._digest.update(line)
            yield line

    def document(self, chain_before: str = CHAIN_START) -> Document:
        """The member `ledger` of their episode; `chain_before` is the `chain_sha256` of the episode before."""
        sum_ = self._digest.hexdigest()
        return {
            "first_seq": self._first_seq,
            "last_seq": self._last_seq,
            "bytes": self._bytes,
            "sha256": sum_,
            "chain_sha256": chained(chain_before, sum_),
        }


class Part(NamedTuple):
    """What a ledger has where a slice was taken from: as the members of the same names in the episode's `ledger`."""

    bytes: int
    sha256: str
    chain_sha256: str

    def is_of(self, ledger: Document) -> bool:
        """Whether it is what the episode's member `ledger` says."""
        return self == tuple(ledger[name] for name in self._fields)


def parts(lines: Iterable[bytes], ends: Iterable[int]) -> Iterator[Part]:
    """Of the lines of a ledger from the first on, those up to each of `ends` (seq, ascending) behind the one before."""
    left, before, chain = iter(lines), 0, CHAIN_START
    for end in ends:
        digest, size = hashlib.sha256(), 0
        for line in islice(left, max(0, end - before)):
            digest.update(line)
            size += len(line)
        before, chain = end, chained(chain, digest.hexdigest())
        yield Part(size, digest.hexdigest(), chain)


def chained(before: str, sum_: str) -> str:
    """SHA-256 of the chain up to the slice before and of the slice's own SHA-256, both as 64 hexadecimal digits."""
    return sha256(f"{before}{sum_}".encode())


def _type_and_seq(line: bytes) -> tuple[str, int]:
    """Raises `BrokenError`."""
    end = line[-_END_BYTES:]
    match = _LAST_MEMBERS.fullmatch(end, max(end.rfind(b'"event_type":"'), 0))
    if match:
        return match[1].decode(), int(match[2])
    event = decode("ledger_event", line, "a line of the ledger")  # another program wrote it with other spaces
    return event["event_type"], event["seq"]


@contextlib.contextmanager
def temporary_slice(path: Path, lines: Iterable[bytes], first_seq: int) -> Iterator[tuple[Path, Passing]]:
    """The slice as `files.temporary_file` has one, and what its lines were. Raises `BrokenError`, `OSError`."""
    passing = Passing(first_seq)
    with temporary_file(path, passing.through(lines), SLICE_MODE) as temporary:
        yield temporary, passing


def check_slice(path: Path, ledger: Document) -> None:
    """Raises `BrokenError` that names the file, where it is not what the episode's member `ledger` says."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        raise BrokenError(f"{path.name} is not there, and its episode is", file=path.name) from None
    if (size, digest.hexdigest()) != (ledger["bytes"], ledger["sha256"]):
        raise BrokenError(f"{path.name} was changed: it is not what its episode says", file=path.name)
