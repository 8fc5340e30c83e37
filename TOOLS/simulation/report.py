"""What comes of many runs: medians with the least and the most over the seeds, and tables of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Ran:
    """One policy on one trace: `figures` as `Tally` gives them, and the seconds that it really took."""

    policy: str
    figures: dict[str, float | None]
    decisions: int
    took_s: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Over the seeds; None of figures that a policy has none of."""

    median: float | None
    least: float | None
    most: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on the traces of one scenario. `best` is set for the best number of slots.

    `times_real` is how many times faster than real time it ran, `decisions_s` how many decisions it made in a real
    second, the work of the whole simulation included.
    """

    policy: str
    figures: dict[str, Spread]
    times_real: float
    decisions_s: float
    best: bool = False


@dataclass(frozen=True, slots=True)
class Sheet:
    """What one scenario came to. `calls` is the mean number of calls of a trace."""

    scenario: str
    calls: float
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything found; `setup` says in words what was simulated, `notes` what was left out."""

    setup: str
    seeds: int
    sheets: Sequence[Sheet]
    notes: Sequence[str] = ()


HEADER = (
    "policy", "finished a minute", "lost (priority 8)", "p50 / p99 wait, s", "OOM kills", "evicted", "refused",
    "memory used", "reserved, unused", "work lost", "x real time",
)  # fmt: skip


def sheet(scenario: str, calls: Sequence[int], runs: Sequence[Ran]) -> Sheet:
    """The runs of one scenario, as a row for each policy in the order of their coming."""
    names = list(dict.fromkeys(ran.policy for ran in runs))
    rows = [_row(name, [ran for ran in runs if ran.policy == name]) for name in names]
    return Sheet(scenario, statistics.mean(calls), _with_best(rows))


def _row(policy: str, runs: Sequence[Ran]) -> Row:
    took_s = sum(ran.took_s for ran in runs)
    virtual_s = sum(ran.figures["makespan_s"] or 0.0 for ran in runs)
    names = dict.fromkeys(name for ran in runs for name in ran.figures)
    return Row(
        policy,
        {name: _spread([ran.figures.get(name) for ran in runs]) for name in names},
        virtual_s / took_s,
        sum(ran.decisions for ran in runs) / took_s,
    )


def _spread(values: Sequence[float | None]) -> Spread:
    there = [value for value in values if value is not None]
    return Spread(statistics.median(there), min(there), max(there)) if there else Spread(None, None, None)


def _with_best(rows: Sequence[Row]) -> list[Row]:
    """Marks the number of slots that loses the fewest calls, and of such the one with the shortest waits."""
    slots = [row for row in rows if row.policy.startswith("slots")]
    if len(slots) < 2:  # noqa: PLR2004  # one is no choice
        return list(rows)
    best = min(slots, key=lambda row: (_median(row, "lost"), _median(row, "wait_p99_s")))
    return [Row(r.policy, r.figures, r.times_real, r.decisions_s, best=r is best) for r in rows]


def _median(row: Row, name: str) -> float:
    found = row.figures[name].median
    return float("inf") if found is None else found


def lines(sheet: Sheet) -> list[tuple[str, ...]]:
    """The rows as text."""
    return [_line(row, sheet.calls) for row in sheet.rows]


def _line(row: Row, calls: float) -> tuple[str, ...]:
    def text(name: str, pattern: str = "{:,.0f}", times: float = 1.0) -> str:
        value = row.figures[name].median
        return "-" if value is None else pattern.format(value * times)

    return (
        f"{row.policy} (best)" if row.best else row.policy,
        text("throughput", "{:.1f}", 60.0),
        f"{text('lost')} ({text('lost_high_priority')}), {text('lost', '{:.1%}', 1 / calls)}",
        f"{text('wait_p50_s', '{:.1f}')} / {text('wait_p99_s', '{:.1f}')}",
        text("kills"),
        text("evictions"),
        text("refusals"),
        text("used", "{:.0%}"),
        text("reserved_unused", "{:.0%}"),
        text("work_lost", "{:.1%}"),
        f"{row.times_real:,.0f}",
    )


def title(sheet: Sheet) -> str:
    return f"{sheet.scenario}, {sheet.calls:,.0f} calls"


def show(report: Report, console: Console) -> None:
    for found in report.sheets:
        table = Table(title=title(found), title_justify="left")
        for index, name in enumerate(HEADER):
            table.add_column(name, justify="right" if index else "left")
        for line in lines(found):
            table.add_row(*line)
        console.print(table)
    for note in (report.setup, *report.notes):
        console.print(note, highlight=False, markup=False)


def markdown(report: Report) -> str:
    """The tables, and under them what was simulated."""
    rule = ("---", *["---:"] * (len(HEADER) - 1))
    tables = [
        "\n".join([f"{title(found)}:", "", *(f"| {' | '.join(line)} |" for line in (HEADER, rule, *lines(found)))])
        for found in report.sheets
    ]
    return "\n\n".join([*tables, "\n".join([report.setup, *report.notes])]) + "\n"
