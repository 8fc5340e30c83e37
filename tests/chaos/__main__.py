"""The command. It prints the seed first: the same seed draws the same rounds.

Exit codes: 0 all was as promised, 1 something was not, 2 usage, 130 it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos import game
from tests.chaos.game import Game, Round
from tests.chaos.place import Place

ROUNDS = 200
INTERRUPTED = 130


@dataclass(slots=True)
class Summary:
    """What all rounds came to."""

    seed: int
    rounds: list[dict[str, Any]] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)

    def add(self, played: Round) -> None:
        self.rounds.append(game.as_json(played))
        self.codes.update(call.code for call in played.calls)

    @property
    def faults(self) -> int:
        return sum(len(played["faults"]) for played in self.rounds)

    def total(self, what: str) -> int:
        return sum(played[what] for played in self.rounds)

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "rounds": len(self.rounds),
            "faults": self.faults,
            **{what: self.total(what) for what in ("answered", "left", "cut")},
            "slowest_gone_s": max((played["gone_s"] for played in self.rounds), default=0.0),
            "codes": dict(self.codes.most_common()),
            "played": self.rounds,
        }


def main() -> int:
    options = _options()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    summary = Summary(seed)
    _say(f"seed {seed}, {options.rounds} rounds", options.json)
    for wish in (signal.SIGTERM, signal.SIGHUP):  # they end it as Ctrl-C does: nothing is left behind
        signal.signal(wish, lambda *_: signal.raise_signal(signal.SIGINT))

    def report(played: Round) -> None:
        summary.add(played)
        _say(_line(summary.rounds[-1], options.rounds), options.json)

    start = time.monotonic()
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch, Place(options.folder or Path(scratch)) as place:
        chaos = Game(place, report)
        try:
            chaos.play(Random(seed), options.rounds)
        except KeyboardInterrupt:
            interrupted = True
    about = {"namespaces": chaos.namespaces, "disks": place.has_disks, "took_s": round(time.monotonic() - start, 1)}
    _print_summary(summary.as_json() | about, options.json)
    return INTERRUPTED if interrupted else 1 if summary.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Rounds of chaos against aal serve.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how many (default: {ROUNDS})")
    parser.add_argument("--seed", type=int, help="what the rounds are drawn from (default: a new one)")
    parser.add_argument("--folder", type=Path, help="work in this new folder, and keep it (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, the progress to stderr")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    if options.folder and options.folder.exists():
        parser.error(f"--folder {options.folder} is already there")
    return options


def _line(played: dict[str, Any], rounds: int) -> str:
    counts = ", ".join(f"{played[end]} {end}" for end in ("answered", "left", "cut"))
    head = f"{played['round']:>4}/{rounds}  {played['strike']:<24} {counts}; gone in {played['gone_s']:.2f} s"
    return "\n".join([head, *(f"      FAULT {fault}" for fault in played["faults"])])


def _print_summary(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    for name, value in summary.items():
        if name != "played":
            print(f"{name:<15} {value}")


def _say(text: str, as_json: bool) -> None:
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
