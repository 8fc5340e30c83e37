"""Ledgers for tests: a record, an open ledger, a written one."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from bus.ledger import Fsync, Ledger, Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

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
    environment: dict[str, Any] = ENVIRONMENT,
    more: Callable[[], bool] = lambda: True,
) -> Iterator[Ledger]:
    ledger = Ledger(path, fsync=fsync, environment=environment, more=more)
    ledger.open()
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


def write(path: Path, *records: dict[str, Any]) -> list[Receipt]:
    with opened(path) as ledger:
        return [append(ledger, record) for record in records]
