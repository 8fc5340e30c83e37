"""The command line; `../simulate_load.py` says what it does."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bus.errors import OperatorError
from simulation import calls as traces
from simulation import recorded
from simulation.calls import TraceError
from simulation.machine import Machine
from simulation.oracle import Oracle
from simulation.policies import Ancestor, Nobody, Slots, SoftOnly
from simulation.report import Ran, Report, Sheet, markdown, sheet, show
from simulation.synthetic import SCENARIOS, make
from simulation.this_bus import LearnedBus, ThisBus
from simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from simulation.calls import Call
    from simulation.policies import MakePolicy

POLICIES: Mapping[str, MakePolicy] = {
    "this bus": LearnedBus,
    "this bus (new)": ThisBus,
    "no admission": Nobody,
    **{f"slots {n}": partial(Slots, slots=n) for n in (4, 8, 16, 32)},
    "soft only": SoftOnly,
    "the ancestor": Ancestor,
    "oracle": Oracle,
}
WIDTH = 168
"""Columns of the table, also where the terminal has fewer: a wrapped line can be read, and a cut figure cannot."""

QUICK_MINUTES, QUICK_SEEDS = 5.0, 1


class Trace(NamedTuple):
    """Calls, the seed for what chance has to do with the clients, and calls that came before, where such are known."""

    calls: Sequence[Call]
    seed: int
    before: Sequence[Call] = ()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="simulate_load.py", description="Play a trace of calls against policies of admission, in virtual time."
    )
    parser.add_argument("--scenario", type=_names(SCENARIOS), default=["mixed"], help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--load", type=_above_zero, default=0.5, help="mean demand, as a share of the memory for calls")
    parser.add_argument("--minutes", type=_above_zero, default=60.0, help="length of a trace in virtual minutes")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=_count, default=5, help="how many seeds")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MINUTES:g} minutes and {QUICK_SEEDS} seed")
    parser.add_argument("--memory-mb", type=_above_zero, default=4096.0, help="memory of the machine, in MiB")
    parser.add_argument("--others-mb", type=_at_least_zero, default=1024.0, help="what others than calls have of it")
    parser.add_argument("--only", type=_names(POLICIES), default=list(POLICIES), help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="play this trace, as --save writes it")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="play the measured calls of this ledger")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the trace of the first seed, and simulate nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found as JSON; - prints it")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    given = parser.parse_args(argv)
    if given.quick:
        given.minutes, given.seeds = QUICK_MINUTES, QUICK_SEEDS
    if given.others_mb >= given.memory_mb:
        parser.error(f"--others-mb {given.others_mb:g} leaves nothing of --memory-mb {given.memory_mb:g}")
    if given.trace and given.ledger:
        parser.error("--trace and --ledger are two traces: give one of them")
    return given


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown, allowed: {', '.join(known)}")
        return names

    return read


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}, allowed: above 0")
    return value


def _at_least_zero(text: str) -> float:
    return 0.0 if float(text) == 0 else _above_zero(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}, allowed: 1 or more")
    return value


def simulate(trace: Trace, policy: str, given: argparse.Namespace, progress: Callable[[int], None]) -> Ran:
    """One policy on one trace, on a machine of its own."""
    machine = Machine(given.memory_mb, given.others_mb)
    began = time.process_time()
    world = World(trace.calls, machine, POLICIES[policy], seed=trace.seed, before=trace.before, progress=progress)
    tally = world.run()
    return Ran(policy, tally.figures(), tally.decisions, time.process_time() - began)


def traces_of(given: argparse.Namespace) -> tuple[dict[str, list[Trace]], list[str]]:
    """The traces of each scenario, and notes on them. Raises `TraceError`, `OSError`, `OperatorError`."""
    if given.trace:
        return {given.trace.name: [Trace(traces.read(given.trace), given.seed)]}, []
    if given.ledger:
        found = recorded.read(given.ledger)
        notes = [f"{found.left_out} calls of the ledger were left out, as nothing was measured"] * bool(found.left_out)
        return {given.ledger.name: [Trace(found.calls, given.seed)]}, notes
    room_mb = given.memory_mb - given.others_mb
    seeds = range(given.seed, given.seed + given.seeds)
    seconds = given.minutes * 60

    def trace(name: str, seed: int) -> Trace:
        """The second half of a trace of twice the length, whose first half came before."""
        calls = make(SCENARIOS[name], seed, load=given.load, seconds=2 * seconds, room_mb=room_mb)
        first = next((number for number, call in enumerate(calls) if call.at_s >= seconds), len(calls))
        later = [dataclasses.replace(call, at_s=round(call.at_s - seconds, 4)) for call in calls[first:]]
        if not later:
            raise TraceError(f"no call comes in {seconds:g} s at a load of {given.load:g}: take more time or more load")
        return Trace(later, seed, calls[:first])

    return {name: [trace(name, seed) for seed in seeds] for name in given.scenario}, []


def setup_of(given: argparse.Namespace) -> str:
    """What is simulated, in words."""
    machine = f"{given.memory_mb:g} MiB of memory, {given.others_mb:g} of it others'"
    if given.trace or given.ledger:
        return f"a recorded trace; {machine}"
    seeds = (
        f"medians over seeds {given.seed} to {given.seed + given.seeds - 1}"
        if given.seeds > 1
        else f"seed {given.seed}"
    )
    return f"{given.minutes:g} minutes of calls at a load of {given.load:g}; {machine}; {seeds}"


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """A bar on stderr. What it gives begins a run, and gives what tells of the calls of that."""
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def begin(description: str) -> Callable[[int], None]:
            bar.update(task, description=description, advance=1, refresh=True)
            return lambda come: bar.update(task, description=f"{description}, {come:,} calls", refresh=True)

        yield begin


def run(given: argparse.Namespace) -> Report:
    found, notes = traces_of(given)
    sheets: list[Sheet] = []
    total = len(given.only) * sum(map(len, found.values()))
    with progress_bar(total) as begin:
        for name, several in found.items():
            runs = [
                simulate(trace, policy, given, begin(f"{name} {trace.seed}, {policy}"))
                for policy in given.only
                for trace in several
            ]
            sheets.append(sheet(name, [len(trace.calls) for trace in several], runs))
    return Report(setup_of(given), given.seeds, sheets, notes)


def save(given: argparse.Namespace) -> None:
    found, _ = traces_of(given)
    traces.write(next(iter(found.values()))[0].calls, given.save)


def tell(report: Report, given: argparse.Namespace) -> None:
    if given.json:
        text = json.dumps(asdict(report), indent=2) + "\n"
        if str(given.json) == "-":
            print(text, end="")
            return
        given.json.write_text(text, "utf-8")
    if given.markdown:
        print(markdown(report), end="")
    else:
        show(report, Console(width=max(WIDTH, Console().width)))


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    try:
        if given.save:
            save(given)
        else:
            tell(run(given), given)
    except (TraceError, OperatorError, OSError) as error:
        print(f"simulate_load: {error}", file=sys.stderr)
        return 2
    return 0
