"""What comes of the samples: medians, ratios within each round, and tables of them for people."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import goals
from rich.table import Table
from samples import median, median_ratio
from targets import RATIOS, TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crowd import Crowd
    from goals import Verdict
    from rich.console import Console
    from samples import Sample, Samples
    from targets import Plan


@dataclass(frozen=True, slots=True)
class Row:
    """One target at one number of connections: medians over the rounds, and the sum of the errors."""

    target: str
    connections: int
    calls_s: float | None
    p50_ms: float | None
    p99_ms: float | None
    cpu_ms: float | None
    errors: int
    first_error: str | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """`target` over `against` at one number of connections: medians of the ratios within each round."""

    target: str
    against: str
    connections: int
    calls_s: float | None
    cpu_ms: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of the bench found; `notes` say what was left out and why."""

    machine: str
    seconds: float
    runs: int
    rows: Sequence[Row]
    ratios: Sequence[Ratio]
    notes: Sequence[str] = ()
    crowd: Crowd | None = None
    crowd_error: str | None = None
    goals: Sequence[Verdict] = ()

    @property
    def errors(self) -> int:
        return sum(row.errors for row in self.rows) + (self.crowd_error is not None)


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table as plain text, whatever it is shown in."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def summarise(plan: Plan, samples: Samples, crowd: Crowd | str | None = None) -> Report:
    """Rows in the order of the targets, ratios where both sides were measured, the goals where they are asked for.

    Of a crowd that could not be measured, `crowd` says why.
    """
    there, failed = (None, crowd) if isinstance(crowd, str) else (crowd, None)
    rows = [_row(t.name, n, samples[t.name, n]) for t in plan.targets for n in plan.connections]
    names = {target.name for target in plan.targets}
    ratios = [
        Ratio(
            target,
            against,
            n,
            median_ratio([s.calls_s for s in samples[target, n]], [s.calls_s for s in samples[against, n]]),
            median_ratio([s.cpu_ms for s in samples[target, n]], [s.cpu_ms for s in samples[against, n]]),
        )
        for target, against in RATIOS
        if {target, against} <= names
        for n in plan.connections
    ]
    judged = goals.judge(samples, there) if plan.judged else []
    notes = list(plan.notes)
    return Report(machine(), plan.seconds, plan.runs, rows, ratios, notes, there, failed, judged)


def _row(target: str, connections: int, samples: Sequence[Sample]) -> Row:
    return Row(
        target,
        connections,
        calls_s=median([s.calls_s for s in samples]),
        p50_ms=median([s.p50_ms for s in samples]),
        p99_ms=median([s.p99_ms for s in samples]),
        cpu_ms=median([s.cpu_ms for s in samples]),
        errors=sum(s.errors for s in samples),
        first_error=next((s.first_error for s in samples if s.first_error), None),
    )


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, {platform.system()} {platform.release()} {platform.machine()}, "
        f"Python {platform.python_version()}"
    )


def sheets(report: Report) -> list[Sheet]:
    """The figures; the ratios, the crowd and the goals where there are any."""
    at = list(dict.fromkeys(row.connections for row in report.rows))
    what = {target.name: target.what for target in TARGETS}
    figures = tuple(
        (what[name], *(_figures(report.rows, name, n) for n in at), str(_errors(report.rows, name)))
        for name in dict.fromkeys(row.target for row in report.rows)
    )
    ratios = tuple(
        (f"{target} / {against}", *(_ratio(report.ratios, target, against, n) for n in at))
        for target, against in dict.fromkeys((ratio.target, ratio.against) for ratio in report.ratios)
    )
    counts = [f"{n} connection{'s' * (n > 1)}" for n in at]
    found = [
        Sheet("Calls a second · p50 / p99 in ms · CPU ms a call", ("path", *counts, "errors"), figures),
        Sheet("Ratios: calls a second · CPU a call", ("ratio", *counts), ratios),
        _crowd_sheet(report.crowd),
        _goals_sheet(report.goals),
    ]
    return [sheet for sheet in found if sheet.lines]


def _crowd_sheet(crowd: Crowd | None) -> Sheet:
    header = ("moment", "RSS of the bus, MB", "PSS of all, MB", "processes beside the bus", "descriptors of the bus")
    if crowd is None:
        return Sheet("", header, ())
    moments = (("each called once", crowd.called), ("idle", crowd.idle))
    lines = tuple(
        (name, _number(now.rss_mb), _number(now.pss_mb), str(now.children), str(now.fds)) for name, now in moments
    )
    return Sheet(f"The bus with {crowd.overlays} overlays, ready {crowd.ready_s:.2g} s after its start", header, lines)


def _goals_sheet(verdicts: Sequence[Verdict]) -> Sheet:
    lines = tuple(
        (v.what, _marked(v.found, v.unit), _marked(v.bound, v.unit, at_most=v.at_most), _marked(v.aim, v.unit), v.words)
        for v in verdicts
    )
    title = f"Goals, at {goals.CONNECTIONS} connections where nothing else is said"
    return Sheet(title, ("goal", "found", "must be", "aim", "verdict"), lines)


def _marked(value: float | None, unit: str, *, at_most: bool | None = None) -> str:
    if value is None:
        return "-"
    sign = {None: "", True: "<= ", False: ">= "}[at_most]
    return f"{sign}{_number(value)} {unit}".rstrip()


def _figures(rows: Sequence[Row], target: str, connections: int) -> str:
    row = next(row for row in rows if (row.target, row.connections) == (target, connections))
    return f"{_number(row.calls_s)} · {_number(row.p50_ms)} / {_number(row.p99_ms)} · {_number(row.cpu_ms)}"


def _errors(rows: Sequence[Row], target: str) -> int:
    return sum(row.errors for row in rows if row.target == target)


def _ratio(ratios: Sequence[Ratio], target: str, against: str, connections: int) -> str:
    ratio = next(r for r in ratios if (r.target, r.against, r.connections) == (target, against, connections))
    return f"x {_number(ratio.calls_s)} · x {_number(ratio.cpu_ms)}"


def _number(value: float | None) -> str:
    """Three figures, and whole numbers from 100 on."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004  # as the docstring says


def show(report: Report, console: Console) -> None:
    for sheet in sheets(report):
        table = Table(title=sheet.title, title_justify="left")
        for index, name in enumerate(sheet.header):
            table.add_column(name, justify="right" if index else "left")
        for line in sheet.lines:
            table.add_row(*line)
        console.print(table)
    for note in footnotes(report):
        console.print(note, highlight=False, markup=False)


def markdown(report: Report) -> str:
    notes = "\n".join(f"- {note}" for note in footnotes(report))
    return "\n\n".join([*map(_markdown, sheets(report)), notes]) + "\n"


def _markdown(sheet: Sheet) -> str:
    rule = ("---", *["---:"] * (len(sheet.header) - 1))
    return "\n".join(
        [f"{sheet.title}:", "", *(f"| {' | '.join(line)} |" for line in (sheet.header, rule, *sheet.lines))]
    )


def footnotes(report: Report) -> list[str]:
    """The machine, the notes, and the first error of each target."""
    errors = [f"{row.target} at {row.connections}: {row.first_error}" for row in report.rows if row.first_error]
    length = f"medians of {report.runs} rounds of {report.seconds:g} s"
    crowd = [f"the crowd was not measured: {report.crowd_error}"] if report.crowd_error else []
    return [f"{report.machine}; {length}", *report.notes, *errors, *crowd]
