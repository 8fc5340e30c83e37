"""The command line of the bench; `../bench.py` says what it does."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from measure import measure
from report import Report, Samples, markdown, show, summarise
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from servers import BenchError, Servers, free_port, lay_out
from targets import COMMANDS, TARGETS, Plan, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def run(plan: Plan, progress: Callable[[str], None]) -> Report:
    """The whole bench: lay out, start, measure every target in turn in every round, end."""
    samples: Samples = {}
    with tempfile.TemporaryDirectory(prefix="aal-bench-") as name, Servers(Path(name)) as servers:
        servers.ports["http-service"] = free_port()
        lay_out(
            servers.folder,
            [p for p in COMMANDS if any(t.program == p for t in plan.targets)],
            servers.ports["http-service"],
        )
        progress("starting the servers")
        servers.start(plan.servers)
        for target, connections in turns(plan):
            progress(f"{target.name} at {connections}")
            samples.setdefault((target.name, connections), []).append(measure(target, connections, plan, servers))
    return summarise(plan, samples)


def turns(plan: Plan) -> Iterator[tuple[Target, int]]:
    for connections in plan.connections:
        for _ in range(plan.runs):
            for target in plan.targets:
                yield target, connections


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Measure the bus beside what people would use instead."
    )
    parser.add_argument("--seconds", type=_above_zero(float), default=3.0, help="length of one measurement")
    parser.add_argument("--runs", type=_above_zero(int), default=3, help="rounds")
    parser.add_argument("--connections", type=_counts, default=(1, 16, 64), help="as 1,16,64")
    parser.add_argument("--only", type=_names, default=None, help=f"some of {', '.join(t.name for t in TARGETS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    return parser.parse_args(argv)


def _above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}, allowed: above 0")
        return value

    return read


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(_above_zero(int)(part)) for part in text.split(",")))


def _names(text: str) -> frozenset[str]:
    names = frozenset(text.split(","))
    known = {target.name for target in TARGETS}
    if unknown := sorted(names - known):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown, allowed: {', '.join(sorted(known))}")
    return names


def plan_of(given: argparse.Namespace) -> Plan:
    """What to measure; what this machine cannot run is left out with a note."""
    chosen = [target for target in TARGETS if given.only is None or target.name in given.only]
    has_cc = shutil.which("cc") is not None
    targets = [target for target in chosen if has_cc or target.program != "c"]
    if not targets:
        raise BenchError("nothing to measure: there is no C compiler (cc)")
    notes = [f"{target.name} was left out: there is no C compiler (cc)" for target in chosen if target not in targets]
    return Plan(targets, given.connections, given.seconds, given.runs, notes)


@contextlib.contextmanager
def progress_bar(plan: Plan) -> Iterator[Callable[[str], None]]:
    """A bar on stderr. It refreshes in this thread only: servers are forked from it."""
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=1 + plan.runs * len(plan.connections) * len(plan.targets), completed=-1)

        def step(description: str) -> None:
            bar.update(task, description=description, advance=1, refresh=True)

        yield step


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        plan = plan_of(given)
        with progress_bar(plan) as progress:
            report = run(plan, progress)
    except (BenchError, subprocess.TimeoutExpired) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if given.json:
        given.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if given.markdown:
        print(markdown(report), end="")
    else:
        show(report, Console())
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
