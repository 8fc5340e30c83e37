"""The command line of the bench; `../bench.py` says what it does."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from crowd import measure_crowd
from layout import BenchError, lay_out
from measure import measure
from options import CONNECTIONS_OF_A_SIEGE, parse, plan_of
from report import Report, markdown, show, summarise
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from servers import Servers, free_port
from shared_memory import MemoryPlan, markdown_memory, run_memory, tell_memory
from siege import SiegePlan, run_siege
from siege_report import tell_siege
from soak import SoakPlan, run_soak
from soak_report import rows, tell

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from samples import Samples
    from targets import Plan, Target


def run(plan: Plan, folder: Path, progress: Callable[[str], None]) -> Report:
    """The whole bench: lay out, start, measure every target in turn in every round, end; then the crowd."""
    samples: Samples = {}
    with Servers(folder, plan.found) as servers:
        servers.ports["http-service"] = free_port()
        lay_out(folder, plan.programs, servers.ports["http-service"])
        progress("starting the servers")
        servers.start(plan.servers)
        for target, connections in turns(plan):
            progress(f"{target.name} at {connections}")
            samples.setdefault((target.name, connections), []).append(measure(target, connections, plan, servers))
    if not plan.crowd:
        return summarise(plan, samples)
    progress(f"{plan.crowd} overlays")
    try:
        return summarise(plan, samples, measure_crowd(folder / "crowd", plan.crowd))
    except BenchError as error:  # minutes of figures should not go with it
        return summarise(plan, samples, str(error))


def turns(plan: Plan) -> Iterator[tuple[Target, int]]:
    for connections in plan.connections:
        for _ in range(plan.runs):
            for target in plan.targets:
                yield target, connections


@contextlib.contextmanager
def progress_bar(plan: Plan) -> Iterator[Callable[[str], None]]:
    """A bar on stderr. It refreshes in this thread only: servers are forked from it."""
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = 1 + plan.runs * len(plan.connections) * len(plan.targets) + bool(plan.crowd)
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def step(description: str) -> None:
            bar.update(task, description=description, advance=1, refresh=True)

        yield step


def bench(given: argparse.Namespace, folder: Path) -> int:
    plan = plan_of(given, folder)
    with progress_bar(plan) as progress:
        report = run(plan, folder, progress)
    if given.json:
        given.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if given.markdown:
        print(markdown(report), end="")
    else:
        show(report, Console())
    return 1 if report.errors else 0


def soak(given: argparse.Namespace, folder: Path) -> int:
    found = run_soak(SoakPlan(given.soak * 60, given.every, given.rate), folder, print_now)
    for line in tell(found):
        print(line)
    if given.json:
        given.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    if given.csv:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows(found))
    return 0 if found.held else 1


def hostile(given: argparse.Namespace, folder: Path) -> int:
    connections = (given.connections or (CONNECTIONS_OF_A_SIEGE,))[0]
    found = run_siege(SiegePlan(given.seconds, given.runs, connections), folder, print_now)
    for line in tell_siege(found):
        print(line)
    if given.json:
        given.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    return 0 if found.held else 1


def memory(given: argparse.Namespace, folder: Path) -> int:
    found = run_memory(MemoryPlan(seed=given.seed), folder, print_now)
    for line in [markdown_memory(found)] if given.markdown else tell_memory(found):
        print(line)
    if given.json:
        given.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    return 0 if found.held else 1


def print_now(line: str) -> None:
    print(line, flush=True)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        with tempfile.TemporaryDirectory(prefix="aal-bench-") as name:
            way = soak if given.soak else hostile if given.hostile else memory if given.memory else bench
            return way(given, Path(name))
    except (BenchError, subprocess.TimeoutExpired) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
