"""The command. It prints the seed first: the same seed draws the same sample, and the same moments to kill at.

Exit codes: 0 all was as promised, 1 something was not, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tests.faults import damage, disks, kills, pairs, scenario, syscalls

if TYPE_CHECKING:
    from collections.abc import Iterator

KILLS, SAMPLED_KILLS = 500, 20
TRUNCATED_STEP = 13
FULL_STEP_KIB, SAMPLED_FULL_STEP_KIB = 1, 40


@dataclass(slots=True)
class Part:
    """What came of one kind of fault: how many were made, why none could be, and what was wrong."""

    name: str
    runs: int = 0
    skipped: str | None = None
    faults: list[str] = field(default_factory=list)
    took_s: float = 0.0


def main() -> int:
    options = _options()
    logging.disable(logging.CRITICAL)  # the ledger tells of every fault that is made here
    seed = random.randrange(2**32) if options.seed is None else options.seed
    out = sys.stderr if options.json else sys.stdout
    print(f"seed {seed}, {'all' if options.all else 'a sample'}", file=out, flush=True)
    _warm_up()
    parts = []
    for part in _parts(Random(seed), everything=options.all):
        parts.append(part)
        told = f"skipped: {part.skipped}" if part.skipped else f"{part.runs} runs, {part.took_s:.1f} s"
        print(f"{part.name:<12} {told}", file=out, flush=True)
        for fault in part.faults:
            print(f"    FAULT {fault}", file=out, flush=True)
    if options.json:
        print(json.dumps({"seed": seed, "parts": [asdict(part) for part in parts]}))
    return 1 if any(part.faults for part in parts) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults against the ledger.")
    parser.add_argument("--all", action="store_true", help="every fault, which takes minutes (default: a sample)")
    parser.add_argument("--seed", type=int, help="what is drawn by (default: a new one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, the progress to stderr")
    return parser.parse_args()


def _warm_up() -> None:
    """Import and load all that a writer does, before anything is counted or forked."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scenario.every_way(Path(folder) / "logs" / "provenance.jsonl", "batch", lambda _: None)


def _parts(rng: Random, *, everything: bool) -> Iterator[Part]:
    sampling = None if everything else rng
    kills_ = KILLS if everything else SAMPLED_KILLS
    yield _part("syscalls", syscalls.play(sampling), syscalls.lacking())
    yield _part("pairs", pairs.play(sampling), syscalls.lacking())
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        yield _part("kills", kills.play(Path(folder) / "logs" / "provenance.jsonl", rng, kills_))
    why = disks.lacking()
    yield _part("full disk", disks.full(FULL_STEP_KIB if everything else SAMPLED_FULL_STEP_KIB), why)
    yield _part("read-only", disks.read_only(), why)
    yield _part("truncated", damage.truncated(1 if everything else TRUNCATED_STEP))
    yield _part("flipped bits", damage.flipped(sampling))


def _part(name: str, runs: Iterator[list[str]], lacking: str | None = None) -> Part:
    part = Part(name, skipped=lacking)
    start = time.monotonic()
    if lacking is None:
        for faults in runs:
            part.runs += 1
            part.faults += faults
    part.took_s = round(time.monotonic() - start, 3)
    return part


if __name__ == "__main__":
    sys.exit(main())
