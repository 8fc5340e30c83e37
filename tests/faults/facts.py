"""The four facts: what was answered for is there, nothing is double, the chain and its tree verify, and no note that
was answered with is contradicted."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from bus import provenance
from bus.errors import BusError
from bus.ledger import LedgerError
from bus.merkle import Frontier
from bus.records import CALL_TYPES
from bus.starts import Starts
from bus.verification import verify
from tests.chaos.verdicts import of_starts
from tests.ledgers import appended, call, iter_hashes, opened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import Any

    from bus.ledger import Ledger
    from bus.notary import Notary

AFTER = "after"
"""The call that is written to the ledger that was opened again."""


def after_reopening(path: Path, said: Iterable[str], notary: Notary | None = None) -> Iterator[str]:
    """What is wrong, in words for people, once the next process has opened the ledger and written to it.

    With the key's `notary` that process signs.
    """
    with opened(path, notary=notary) as ledger:
        try:
            asyncio.run(_next_start(ledger))
        except LedgerError as error:
            yield f"the ledger cannot be written any more: {error}"
        if ledger.unsigned is not None:
            yield f"the ledger is not signed any more: {ledger.unsigned}"
    yield from of_file(path, said)


async def _next_start(ledger: Ledger) -> None:
    await Starts(ledger).close_left()
    await appended(ledger, call(AFTER))


def of_file(path: Path, said: Iterable[str], *, closed: bool = True) -> Iterator[str]:
    """As the file stands. `closed`: nobody has a call under way, and what was cut off is marked."""
    report = verify(path)
    if not report.ok:
        yield f"line {report.first_bad} is bad ({report.fault}): {report.reason}"
        return
    try:
        lines = list(provenance.iter_lines(path))
    except BusError as error:
        yield f"the ledger cannot be read: {error}"
        return
    said = list(said)
    yield from of_lines(lines, stands(said))
    yield from of_notes(path, said)
    if closed:
        yield from of_starts(lines)


def of_lines(lines: Iterable[Mapping[str, Any]], said: Iterable[str]) -> Iterator[str]:
    """Of those of a ledger that anything was said of: missing or other than was answered, and double."""
    by_seq = {line["seq"]: line for line in lines}
    for receipt in said:
        seq, hash_, name, *_ = receipt.split(" ")[1:]
        line = by_seq.get(int(seq))
        if line is None:
            yield f"{name} was answered with line {seq}, which is not there"
        elif (line["hash"], line.get("request_id")) != (hash_, name):
            yield f"{name} was answered with line {seq}, which is of {line.get('request_id') or line['type']}"
    names = Counter(line["request_id"] for line in by_seq.values() if line["type"] in CALL_TYPES)
    yield from (f"{name} is there {count} times" for name, count in names.items() if count > 1)


def of_notes(path: Path, said: Iterable[str]) -> Iterator[str]:
    """Of the notes that were answered with: those that name another tree than the log has."""
    noted = {(int(size), root) for size, root in map(_note, said) if root}
    roots = _roots(path, {size for size, _ in noted})
    for size, root in sorted(noted):
        if roots.get(size) != root:
            yield f"a note of {size} lines with the root {root} was answered with, and their root is {roots.get(size)}"


def _roots(path: Path, sizes: set[int]) -> dict[int, str]:
    """Of the trees of so many first lines, in hex digits; those that there are."""
    tree, roots = Frontier(), {}
    for leaf in iter_hashes(path):
        tree.append(leaf)
        if tree.size in sizes:
            roots[tree.size] = tree.root().hex()
    return roots


def stands(said: Iterable[str]) -> list[str]:
    """The lines by which a writer has said that the ledger answered for a call."""
    return [line for line in said if line.startswith("stands ")]


def noted(said: Iterable[str]) -> list[str]:
    """The lines by which a process has said that it has a note of the ledger, without a call."""
    return [line for line in said if line.startswith("noted ")]


def _note(line: str) -> tuple[int, str]:
    """The size and the root of the note that was answered with, or that was asked for; no root where none was."""
    words = line.split(" ")
    size, root = [*words[1 if words[0] == "noted" else 4 :], "0", ""][:2]
    return int(size), root
