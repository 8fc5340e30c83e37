"""`aal replay` runs lines of the ledger again; with `--against` it is the gate for another version of an overlay."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import contextlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bus.cli_ledger import broken, read_line
from bus.console import (
    AsJson,
    Exit,
    complain,
    err,
    mark,
    out,
    print_json,
    print_table,
    printable,
    say,
    tell,
    whole,
    workplace,
)
from bus.errors import NotFoundError, ReplayError
from bus.model import Record
from bus.settings import Settings

if TYPE_CHECKING:
    from bus.drift import Difference
    from bus.gate import Candidate
    from bus.local import LocalBus
    from bus.replay import Replay, Trial, Verdict

LAST_AGAINST = 200
"""How many of the last good calls a candidate is tried with where nobody says which."""

LOOKED_BACK_LINES = 1_000_000
"""How many lines are read at most for the last calls that fit; with an index those of other overlays do not count."""

CHANGES_SHOWN = 10
"""Changes of one result that people are shown; programs get more."""

JOBS_MOST = 1024

_MARK: dict["Verdict", Literal["ok", "warn", "fail"]] = {
    "MATCH": "ok",
    "DRIFT": "fail",
    "FAILED": "fail",
    "SKIPPED": "warn",
}
_STORE = "Make calls with AAL_DEV_LOG_PAYLOAD=1: then their lines hold what a replay needs."
_LIVE = "Say --live if they may be run again: they write to a state of their own, but may reach the network."
_INTERRUPTED = 130
"""The exit code of what SIGINT ended."""

_AGAINST = "--against"
_ONE_WAY = "give line numbers, --all or --last K, and one of these only"


@dataclass(frozen=True, slots=True)
class Wish:
    """Which lines are meant, in which way they are run, and how it is told."""

    ranges: list[range]
    every: bool
    last: int | None
    overlay: str | None
    live: bool
    jobs: int
    least: int
    as_json: bool

    def is_single(self) -> bool:
        """Whether one line is asked for, so that its whole outcome is shown."""
        if self.least > 1:
            return False
        asks_for_one = self.last == 1 and not self.as_json
        return asks_for_one or (len(self.ranges) == 1 and len(self.ranges[0]) == 1)


@dataclass(slots=True)
class Tally:
    """What came of several lines so far, in their own order. `least` is how many of them are to be run."""

    records: list[Record]
    least: int = 1
    trials: dict[int, "Trial"] = field(default_factory=dict)
    candidate: "Candidate | None" = None
    is_interrupted: bool = False

    def add(self, trial: "Trial") -> None:
        self.trials[trial.record["seq"]] = trial

    def begin(self, candidate: "Candidate") -> None:
        self.candidate = candidate

    def in_order(self) -> list["Trial"]:
        return [self.trials[record["seq"]] for record in self.records if record["seq"] in self.trials]

    @property
    def tried(self) -> int:
        """How many lines were run, so were not skipped."""
        return sum(trial.verdict != "SKIPPED" for trial in self.trials.values())

    def totals(self) -> dict[str, int]:
        counts = Counter(trial.verdict for trial in self.trials.values())
        return {verdict.lower(): counts[verdict] for verdict in _MARK}

    def body(self) -> dict[str, Any]:
        against = {} if self.candidate is None else {"against": self.candidate.body()}
        told = {"replays": [trial.body() for trial in self.in_order()], "totals": self.totals()}
        tried = {"tried": self.tried, "of": len(self.records), "least": self.least}
        return against | told | tried | {"interrupted": self.is_interrupted}

    def exit_code(self) -> int:
        totals = self.totals()
        if self.is_interrupted:
            return _INTERRUPTED
        if totals["drift"] or totals["failed"]:
            return Exit.FAILED
        return Exit.OK if self.tried >= self.least else Exit.NOT_REPLAYABLE


def replay(
    ctx: typer.Context,
    *,
    lines: Annotated[list[str] | None, typer.Argument(metavar="N|A-B", help="Numbers of lines.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every recorded call.")] = False,
    last: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="K", help="The last K calls that can be replayed.")
    ] = None,
    overlay: Annotated[str | None, typer.Option(metavar="NAME", help="Only this overlay's.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Try another version of an overlay with the good calls, apart from all else."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            parser=whole(1, JOBS_MOST),
            metavar="N",
            help="How many at once. Default: one after the other; with --against as many as there are CPUs.",
        ),
    ] = None,
    least: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="Exit with 3 where fewer lines than this could be run.")
    ] = 1,
    live: Annotated[bool, typer.Option("--live", help="Also what could change something.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run recorded calls again, and say whether the same came of them.

    Needs lines with a stored payload: set AAL_DEV_LOG_PAYLOAD=1 when calling. With --against DIR the calls that
    succeeded run against the overlay in DIR, with a ledger and a state of their own; by default the last 200. For the
    last calls no more than 1,000,000 lines are read.

    \b
    Exit codes: 0 all MATCH, 1 a DRIFT or a failure, 2 usage or no such line,
    3 nothing that can be replayed, or less than --least, 4 the ledger is broken.

    Example: aal replay 1, or aal replay 3-9 12, or aal replay --last 200 --against ../psyfi-2
    """
    ranges = [_range(text) for text in lines or ()]
    ways = bool(ranges) + every + (last is not None)
    if ways > 1 or (ways == 0 and against is None):
        raise typer.BadParameter(_ONE_WAY)
    settings = workplace(ctx).settings()
    at_once = min(jobs or (1 if against is None else len(os.sched_getaffinity(0))), settings.slots)
    wish = Wish(ranges, every, last, overlay, live, at_once, least, as_json)
    try:
        code = _replay(settings, wish) if against is None else _gate(settings, wish, against)
    except NotFoundError as error:
        tell(error, as_json=as_json)
        raise typer.Exit(Exit.USAGE) from None
    raise typer.Exit(code)


# --- Which lines -------------------------------------------------------------------------------------------------


def _range(text: str) -> range:
    """`3` or `3-9`, as written on the command line."""
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    first = int(match[1]) if match else 0
    final = int(match[2] or first) if match else 0
    if not 1 <= first <= final:
        raise typer.BadParameter(f"{text!r} is no line number and no range A-B of them", param_hint="N|A-B")
    return range(first, final + 1)


def _select(path: Path, wish: Wish, fits: Callable[[Record], bool]) -> Iterator[Record]:
    """The records to run; `fits` is for those that are counted. Raises `NotFoundError` beyond the last line."""
    if wish.last is not None:
        yield from _last(path, wish.last, wish.overlay, fits)
        return
    chosen: Iterator[Record] = (record for record in _iter_lines(path) if record["type"] == "invoke")
    if wish.ranges:
        chosen = itertools.chain.from_iterable(_read_range(path, wanted) for wanted in wish.ranges)
    seen: set[int] = set()
    for record in chosen:
        if wish.overlay in (None, record.get("overlay")) and record["seq"] not in seen:
            seen.add(record["seq"])
            yield record


def _iter_lines(path: Path, start: int = 1) -> Iterator[Record]:
    """The lines from `start` on. Raises as `read_line`."""
    from bus import provenance
    from bus.records import BrokenLineError

    seq = start
    try:
        for record in provenance.iter_lines(path, start):
            yield record
            seq += 1
    except BrokenLineError as error:
        raise broken(seq, error) from None


def _read_range(path: Path, wanted: range) -> Iterator[Record]:
    yield read_line(path, wanted[0])
    rest = _iter_lines(path, wanted[0] + 1)
    for seq in wanted[1:]:
        if (record := next(rest, None)) is None:
            raise NotFoundError("ERR_NOT_FOUND", f"the ledger has no line {seq}")
        yield record


def _last(path: Path, count: int, overlay: str | None, fits: Callable[[Record], bool]) -> list[Record]:
    """The last `count` calls that fit, oldest first; fewer, and a word on stderr, where too many lines lie between."""
    from bus import provenance

    most = LOOKED_BACK_LINES
    found = provenance.tail(path, count, overlay=overlay, types=("invoke",), shown=fits, most_lines=most)
    newest = provenance.tail(path, 1) if len(found) < count else []
    if newest and newest[0]["seq"] > most:
        text = f"note: {len(found)} of {count} calls were found; no more than {most:,} lines are read for them"
        err().print(text, style="dim", soft_wrap=True)
    return found


def _can_be_replayed(record: Record) -> bool:
    from bus.replay import invocation_of

    try:
        invocation_of(record)
    except ReplayError:
        return False
    return True


# --- Run again ---------------------------------------------------------------------------------------------------


def _replay(settings: Settings, wish: Wish) -> int:
    from bus.local import LocalBus

    records = list(_select(settings.ledger, wish, _can_be_replayed))
    with LocalBus(settings) as bus:
        if wish.is_single() and records:
            return _replay_one(bus, records[0], wish)
        tally = Tally(records, wish.least)
        with _counting(tally, "replaying") as done:
            bus.replay_all(records, jobs=wish.jobs, live=wish.live, done=done)
    return _end(tally, wish, ReplayError("ERR_NOT_REPLAYABLE", _why_none(records), hint=_STORE))


def _replay_one(bus: "LocalBus", record: Record, wish: Wish) -> Exit:
    from bus.replay import invocation_of

    invocation_of(record)
    if not wish.as_json:
        say(f"Replaying event from line {record['seq']}\noverlay: {record['overlay']}\nphase: {record['phase']}")
    again = bus.replay(record["seq"], live=wish.live)
    if wish.as_json:
        print_json(again.body())
    else:
        _print_replay(again)
    return Exit.OK if again.verdict == "MATCH" else Exit.FAILED


def _gate(settings: Settings, wish: Wish, folder: Path) -> int:
    from bus.gate import require_good, try_candidate

    overlay = _overlay_in(folder, wish.overlay)
    needing_live = 0

    def is_good(record: Record) -> bool:
        nonlocal needing_live
        try:
            require_good(record, overlay, live=wish.live)
        except ReplayError as error:
            needing_live += error.code == "ERR_NEEDS_LIVE"
            return False
        return True

    last = wish.last or (None if wish.ranges or wish.every else LAST_AGAINST)
    named = replace(wish, last=last, overlay=None if wish.ranges else overlay)
    records = [_brief(record) for record in _select(settings.ledger, named, is_good)]
    tally = Tally(records, wish.least)
    with _counting(tally, f"trying {overlay}") as done:
        try_candidate(settings, folder, overlay, records, jobs=wish.jobs, live=wish.live, begun=tally.begin, done=done)
    detail = f"no good call of {overlay} is recorded that a candidate can be tried with"
    skipped_for_live = needing_live or any(map(_is_skipped_for_live, tally.in_order()))
    none = ReplayError("ERR_NOT_REPLAYABLE", detail, hint=_LIVE if skipped_for_live else _STORE)
    return _end(tally, wish, none)


def _brief(record: Record) -> Record:
    """What is told of a record. The rest, payload and result with it, is read again when it is tried."""
    return {name: record.get(name) for name in ("seq", "overlay", "phase")}


def _is_skipped_for_live(trial: "Trial") -> bool:
    return trial.verdict == "SKIPPED" and "may write or exec" in trial.why


def _overlay_in(folder: Path, wanted: str | None) -> str:
    """The overlay that the candidate is a version of. Raises `typer.BadParameter`.

    Of a manifest that gives no name, what was asked for: what is wrong with it is told when it is loaded.
    """
    from bus.gate import name_in

    try:
        name = name_in(folder)
    except OSError as error:
        detail = f"there is no overlay in {folder}: manifest.json: {error.strerror}"
        raise typer.BadParameter(printable(detail), param_hint=_AGAINST) from None
    if name and wanted not in (None, name):
        detail = f"the overlay in {folder} is {name}, and --overlay says {wanted}"
        raise typer.BadParameter(printable(detail), param_hint=_AGAINST)
    return name or wanted or "candidate"


@contextlib.contextmanager
def _counting(tally: Tally, what: str) -> "Iterator[Callable[[Trial], None]]":
    """Gives what a trial is told to: the tally, and a bar on the terminal. Ctrl-C ends the block, and is noted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=len(tally.records))

        def done(trial: "Trial") -> None:
            tally.add(trial)
            progress.advance(task)

        try:
            yield done
        except KeyboardInterrupt:
            tally.is_interrupted = True


# --- What is said ------------------------------------------------------------------------------------------------


def _end(tally: Tally, wish: Wish, none: ReplayError) -> int:
    """Print the tally. `none` is said to people where nothing could be run; of too few lines programs are told too."""
    code = tally.exit_code()
    if wish.as_json:
        print_json(tally.body())
    else:
        _print_trials(tally)
    if code == Exit.NOT_REPLAYABLE and tally.tried:
        detail = f"{tally.tried} of {len(tally.records)} lines could be run, and --least says {tally.least}"
        tell(ReplayError("ERR_NOT_REPLAYABLE", detail, hint=none.hint), as_json=wish.as_json)
    elif wish.as_json:
        return code
    elif tally.is_interrupted:
        complain("interrupted", f"{len(tally.trials)} of {len(tally.records)} lines were run", None)
    elif code == Exit.NOT_REPLAYABLE:
        tell(none, as_json=False)
    return code


def _print_trials(tally: Tally) -> None:
    trials = tally.in_order()
    if trials:
        _print_table(tally.candidate, trials)
    totals = ", ".join(f"{count} {name}" for name, count in tally.totals().items())
    say(f"tried {tally.tried} of {len(tally.records)}: {totals}")


def _print_table(candidate: "Candidate | None", trials: list["Trial"]) -> None:
    if candidate:
        shown = f"{candidate.overlay} {candidate.version} in {candidate.folder}, code {candidate.code_hash[:8]}"
        say(f"tried: {shown}", "bold")
    print_table(("seq", "overlay", "phase", "verdict", "why"), map(_cells, trials))
    for trial in trials:
        if trial.replay and trial.replay.difference and trial.verdict == "DRIFT":
            say(f"line {trial.record['seq']}, recorded -> now:")
            _print_difference(trial.replay.difference)


def _print_difference(difference: "Difference") -> None:
    for change in difference.changes[:CHANGES_SHOWN]:
        out().print(f"  {printable(str(change))}", soft_wrap=True)
    if (more := len(difference.changes) - CHANGES_SHOWN) > 0:
        at_least = "at least " if difference.is_cut else ""
        say(f"  and {at_least}{more} more", "dim")


def _print_replay(again: "Replay") -> None:
    sys.stdout.write(json.dumps(again.answer.body, indent=2, sort_keys=True) + "\n")
    differs = ", ".join(again.differs)
    if again.verdict == "MATCH":
        say("verdict: MATCH", "green")
        if differs:
            say(f"note: the result is the same, though not all is as it was: {differs}", "dim")
        return
    if again.difference and again.difference.changes:
        say("recorded -> now:")
        _print_difference(again.difference)
    if again.cause:
        say(f"cause: {again.cause} ({again.cause.why})")
    say(f"verdict: {again.verdict} ({differs if again.verdict == 'DRIFT' else again.why})", "bold red")


def _why_none(records: list[Record]) -> str:
    """Why of these records nothing was run."""
    if any("payload" in record for record in records):
        return "none of these lines can be replayed"
    return "there is no line with a stored payload"


def _cells(trial: "Trial") -> tuple[object, ...]:
    record = trial.record
    verdict = mark(_MARK[trial.verdict], trial.verdict)
    return record["seq"], record.get("overlay"), record.get("phase"), verdict, trial.why
