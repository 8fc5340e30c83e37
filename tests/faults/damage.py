"""What somebody, or a failing disk, does to the file: all of it is healed or found."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bus.ledger import LedgerError
from bus.verification import verify
from tests.faults import facts, scenario
from tests.ledgers import append, call, opened

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

_NEWLINE = 0x0A
OPENED = 16
"""In a sample one log of so many is opened again, which takes longer than all else."""


def truncated(step: int) -> Iterator[list[str]]:
    """What is wrong with a log cut off at every `step`th byte of its last two lines, and opened again."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path, said = _small_log(Path(folder))
        whole = path.read_bytes()
        ends = [index + 1 for index, byte in enumerate(whole) if byte == 0x0A]
        for size in range(ends[-3], len(whole) + 1, step):
            shutil.rmtree(path.parent)
            path.parent.mkdir()
            path.write_bytes(whole[:size])
            kept = sum(end <= size for end in ends)
            left = [line for line in said if int(line.split(" ")[1]) <= kept]
            yield [f"cut off at byte {size}: {fault}" for fault in facts.after_reopening(path, left)]


def flipped(rng: Random | None) -> Iterator[list[str]]:
    """What is not found in a small log with one bit flipped, or is healed by who opens it again.

    Every bit of every byte; with `rng` one of each byte, all of a newline, and of the lines before the last two only
    some are opened.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path, _ = _small_log(Path(folder))
        whole = path.read_bytes()
        lines = whole.count(b"\n")
        for index in range(len(whole)):
            line = whole.count(b"\n", 0, index) + 1
            for bit in range(8) if rng is None or whole[index] == _NEWLINE else (rng.randrange(8),):
                changed = bytearray(whole)
                changed[index] ^= 1 << bit
                _put(path, changed)
                faults = list(_not_found(path, line))
                if rng is None or line > lines - 2 or not rng.randrange(OPENED):
                    faults += _after_opening(path, bytes(changed), line, is_last=line == lines)
                yield [f"bit {bit} of byte {index} is flipped, in line {line}: {fault}" for fault in faults]


def _put(path: Path, text: bytearray) -> None:
    """Without emptying the file, which takes a file system longer than all else here."""
    with path.open("r+b") as file:
        file.write(text)
        file.truncate()


def _not_found(path: Path, line: int) -> Iterator[str]:
    bad = verify(path).first_bad
    if bad != line:
        yield f"verifying names {bad}"


def _after_opening(path: Path, changed: bytes, line: int, *, is_last: bool) -> Iterator[str]:
    """What is wrong once the next process has opened a log of which a `line` is damaged, and written to it.

    To a damaged last line nothing can be chained.
    """
    with opened(path) as ledger:
        try:
            append(ledger, call(facts.AFTER))
        except LedgerError as error:
            if "is broken" not in error.detail:
                yield f"the ledger says: {error.detail}"
        else:
            if is_last:
                yield "it is written to"
            yield from _not_found(path, line)
    if not path.read_bytes().startswith(changed):
        yield "what was damaged is cut off"
    for kept in path.parent.glob("*.torn*"):
        yield f"it is kept as {kept.name}"
        kept.unlink()


def _small_log(folder: Path) -> tuple[Path, list[str]]:
    """One of each kind of line, without a large one, and what was answered for them."""
    path = folder / "logs" / "provenance.jsonl"
    said: list[str] = []
    scenario.every_way(path, "never", said.append, large=False)
    return path, facts.stands(said)
