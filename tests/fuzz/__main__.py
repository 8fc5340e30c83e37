"""The command line: every target, or some, with the counts of each, and a verdict. Ends with 0, or 1 if one failed."""

from __future__ import annotations

import argparse
import secrets
import sys
from typing import TYPE_CHECKING

from tests.fuzz import campaign
from tests.fuzz.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.fuzz.campaign import Result


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    chosen = [target for target in TARGETS if not given.only or target.name in given.only]
    print(f"{given.cases:,} cases, seed {given.seed}")
    results = []
    for target, cases in zip(chosen, campaign.share(chosen, given.cases), strict=True):
        results.append(campaign.run(target, cases, given.seed))
        for line in tell(results[-1]):
            print(line, flush=True)
    total, held = sum(result.cases for result in results), all(result.held for result in results)
    print(f"{total:,} cases in {sum(result.seconds for result in results):,.0f} s: {'held' if held else 'NOT held'}")
    return 0 if held else 1


def tell(result: Result) -> Iterator[str]:
    """A line of counts; then what is wrong, and how to see it again."""
    counts = ", ".join(f"{outcome} {count:,}" for outcome, count in result.counts.most_common())
    name, verdict = result.target.name, "held" if result.held else "NOT held"
    yield f"{name:12} {result.cases:7,} cases {result.seconds:7.1f} s  {verdict}: {counts}"
    if result.unseen:
        yield f"  never seen: {', '.join(result.unseen)}"
    if result.failure is not None:
        yield result.failure
        yield f"  again: python -m tests.fuzz --only {name} --cases {result.asked} --seed {result.seed}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile input to every reader.")
    parser.add_argument("--cases", type=_count, default=50_000, help="of all targets together (50,000)")
    parser.add_argument("--only", type=_names, default=(), help=f"some of {', '.join(_known())}")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="of an earlier run, to repeat it")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}, allowed: 1 or more")
    return count


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(_known())):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown, allowed: {', '.join(_known())}")
    return names


def _known() -> list[str]:
    return [target.name for target in TARGETS]


if __name__ == "__main__":
    sys.exit(main())
