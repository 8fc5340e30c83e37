"""Ledgers for tests: a record, an open ledger, a written one."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from bus.ledger import Fsync, Ledger, Receipt
from bus.provenance import raw_lines
from bus.records import GENESIS, draft_call, hash_in
from bus.segments import closed_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from bus.notary import Notary

ENVIRONMENT = {
    "python": "CPython 3.11.9",
    "platform": "Linux 6.1",
    "machine": "x86_64",
    "git_commit": None,
    "bus_version": "0.1.0",
}
HASH = "ab" * 32


def call(request_id: str = "r", **members: Any) -> dict[str, Any]:
    return {"type": "invoke", "timestamp_ms": 1, "request_id": request_id, "ok": True, "code": "OK", **members}


@contextlib.contextmanager
def opened(
    path: Path,
    fsync: Fsync = "never",
    *,
    environment: dict[str, Any] = ENVIRONMENT,
    more: Callable[[], bool] = lambda: True,
    segment_bytes: int = 0,
    serves: bool = False,
    notary: Notary | None = None,
) -> Iterator[Ledger]:
    ledger = Ledger(path, fsync=fsync, environment=environment, more=more, segment_bytes=segment_bytes, notary=notary)
    ledger.open(serves=serves)
    try:
        yield ledger
    finally:
        ledger.close()


async def appended(ledger: Ledger, record: dict[str, Any]) -> Receipt:
    """One record, once it is in the file."""
    return await ledger.submit(record)


def append(ledger: Ledger, record: dict[str, Any]) -> Receipt:
    """One record, for a caller without an event loop."""
    return asyncio.run(appended(ledger, record))


def write(path: Path, *records: dict[str, Any], segment_bytes: int = 0) -> list[Receipt]:
    with opened(path, segment_bytes=segment_bytes) as ledger:
        return [append(ledger, record) for record in records]


def iter_hashes(path: Path) -> Iterator[bytes]:
    """The 32 bytes of each whole line's hash, from line 1 on."""
    yield from (hash_in(line) for line in raw_lines(path) if line.endswith(b"\n"))


def synthesize(path: Path, records: Iterable[dict[str, Any]], segment_lines: int) -> int:
    """A ledger of these calls in closed segments of so many lines, and an open one; gives the number of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prev, seq, first = GENESIS, 0, 1
    text = bytearray()
    for record in records:
        if seq - first + 1 == segment_lines:
            closed_path(path, first).write_bytes(text)
            text, first = bytearray(), seq + 1
        seq += 1
        line, digest = draft_call(record).line(seq, prev)
        text += line
        prev = digest.hex()
    path.write_bytes(text)
    return seq
