"""`aal stress`: how short memory is, once or for as long as somebody looks."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bus.console import AsJson, err, out, print_json, print_table, printable, say, workplace
from bus.plot import Sample, plot
from bus.settings import TOKEN

if TYPE_CHECKING:
    from bus.stress_watch import Report, Watch

SAMPLES_KEPT = 1000
"""Samples that a plot may have: more than a terminal has columns."""

ROWS = 12
"""Rows of the plot, where the terminal has them."""

BESIDE = 34
"""Columns of the figures beside the plot; where less than twice as many are left for it, they stand below."""

PERIODS_S = (0.05, 3600.0)

_STYLE = {"LOW": "green", "MODERATE": "yellow", "HIGH": "dark_orange", "CRITICAL": "red"}


def _period(text: object) -> float:
    low, high = PERIODS_S
    try:
        found = float(str(text))
    except ValueError:
        found = -1.0
    if not low <= found <= high:
        raise typer.BadParameter(f"{str(text)[:80]!r} is not a number of seconds from {low:g} to {high:g}")
    return found


def stress(
    ctx: typer.Context,
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Until Ctrl-C, a plot or a line a sample.")] = False,
    period_s: Annotated[
        float | None, typer.Option("--period", parser=_period, metavar="SECONDS", help="Show no more than one in that.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How short memory is, from 0 to 1, and where that comes from.

    It is what the server of this folder says, where one runs; AAL_TOKEN is its token, where it needs one. Else it is
    sampled here. With --json --watch, one JSON object a line.

    Example: aal stress --watch
    """
    from bus.stress_watch import Watch

    if period_s is not None and not watch:
        raise typer.BadParameter("it goes with --watch", param_hint="--period")
    found = Watch(workplace(ctx).settings(), os.environ.get(TOKEN) or None, period_s)
    if not watch:
        _print_once(found.once(), as_json=as_json)
        return
    try:
        _print_for_ever(found, as_json=as_json)
    except KeyboardInterrupt:  # how a watch ends
        return


def _print_once(report: "Report", *, as_json: bool) -> None:
    if as_json:
        print_json(_for_programs(report))
        return
    body = report.body
    say(f"stress {body['stress']} {body['band']}")
    print_table(("source", "stress"), body["sources"].items())
    print_table(("", ""), [row for row in _figures(report) if row[0] not in body["sources"]])


def _print_for_ever(watch: "Watch", *, as_json: bool) -> None:
    console = out()
    if as_json:
        for report in watch.reports():
            print_json(_for_programs(report))
            sys.stdout.flush()
    elif console.is_terminal and not console.is_dumb_terminal:
        _plot_live(watch, console)
    else:
        _print_lines(watch)


def _for_programs(report: "Report") -> dict[str, Any]:
    return {**report.body, "server": report.server, "note": report.note}


def _print_lines(watch: "Watch") -> None:
    """One line a sample; on stderr why it is sampled here, whenever that changes."""
    noted: str | None = None
    for report in watch.reports():
        if report.note != noted:
            noted = report.note
            err().print(printable(noted or f"the server at {report.server}"), style="dim", soft_wrap=True)
        body = report.body
        at = datetime.fromtimestamp(body["timestamp_ms"] / 1000).astimezone().strftime("%H:%M:%S")
        figures = "  ".join(f"{name} {value}" for name, value in _figures(report) if name not in ("server", "samples"))
        say(f"{at}  stress {body['stress']:.3f} {body['band']}  {figures}")
        sys.stdout.flush()


def _plot_live(watch: "Watch", console: Console) -> None:
    from rich.live import Live

    screen = Screen()
    with Live(screen, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for report in watch.reports():
            screen.add(report)
            live.refresh()


@dataclass(slots=True)
class Screen:
    """The plot of what was reported, with the figures of the last report, as wide as there is room."""

    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES_KEPT))
    report: "Report | None" = None

    def add(self, report: "Report") -> None:
        if not self.samples:
            self.samples.extend(_sample(point) for point in report.history[:-1])
        self.samples.append(_sample(report.body))
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.report is None:
            return
        width, height = options.max_width, max(3, min(ROWS, (options.height or console.height) - 3))
        head = _head(self.report)
        if width >= 3 * BESIDE:
            grid = Table.grid(padding=(0, 2, 0, 0))
            chart = plot(list(self.samples), width - BESIDE - 2, height)
            grid.add_row(chart, _side(self.report))
            yield Group(head, grid)
        else:
            below = _side(self.report)
            yield Group(head, plot(list(self.samples), width, max(3, height - below.row_count)), Text(), below)


def _sample(point: Mapping[str, Any]) -> Sample:
    return point["stress"], _STYLE[point["band"]]


def _head(report: "Report") -> Text:
    body = report.body
    style = f"bold {_STYLE[body['band']]}"
    said = printable(report.note or f"the server at {report.server}")
    return Text.assemble(
        (f"stress {body['stress']:.3f} ", style), (body["band"], style), "  ", (said, "dim"), no_wrap=True
    )


def _side(report: "Report") -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in _figures(report):
        table.add_row(printable(name), printable(value))
    return table


def _figures(report: "Report") -> list[tuple[str, str]]:
    """The figures of a report for people, named."""
    body = report.body
    rows = [(name, "silent" if value is None else f"{value:.3f}") for name, value in body["sources"].items()]
    rows += [(room["name"], f"{room['used_mb']} of {room['total_mb']} MiB used") for room in body["rooms"]]
    if body["free_mb"] is not None:
        rows.append(("free", f"{body['free_mb']:.0f} MiB"))
    if scheduler := body.get("scheduler"):
        rows += [(name, str(scheduler[name])) for name in ("running", "waiting") if name in scheduler]
    return [*rows, ("samples", str(body["sampled"])), ("server", report.server or "none")]
