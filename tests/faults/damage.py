"""What somebody, or a failing disk, does to the file: all of it is healed or found."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bus.verification import verify
from tests.faults import facts, scenario

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random


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
    """What is not found in a small log with one bit flipped: every bit of every byte; with `rng`, one of each byte."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path, _ = _small_log(Path(folder))
        whole = path.read_bytes()
        for index in range(len(whole)):
            for bit in range(8) if rng is None else (rng.randrange(8),):
                changed = bytearray(whole)
                changed[index] ^= 1 << bit
                path.write_bytes(changed)
                bad = verify(path).first_bad
                line = whole.count(b"\n", 0, index) + 1
                wrong = f"bit {bit} of byte {index} is flipped, in line {line}: verifying names {bad}"
                yield [] if bad == line else [wrong]


def _small_log(folder: Path) -> tuple[Path, list[str]]:
    """One of each kind of line, without a large one, and what was answered for them."""
    path = folder / "logs" / "provenance.jsonl"
    said: list[str] = []
    scenario.every_way(path, "never", said.append, large=False)
    return path, facts.stands(said)
