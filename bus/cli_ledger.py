"""`aal provenance` reads the ledger (cli_proofs has what verifies it); `aal replay` runs its lines again."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bus.console import (
    AsJson,
    Exit,
    err,
    make_app,
    mark,
    print_json,
    print_pretty,
    print_table,
    printable,
    say,
    tell,
    whole,
    workplace,
)
from bus.errors import BusError, NotFoundError, OperatorError, ReplayError
from bus.model import Record

if TYPE_CHECKING:
    from bus.local import LocalBus
    from bus.replay import Replay

app = make_app("Read and verify the ledger.")

Verdict = Literal["MATCH", "DRIFT", "FAILED", "SKIPPED"]
_MARK: dict[Verdict, Literal["ok", "warn", "fail"]] = {
    "MATCH": "ok",
    "DRIFT": "fail",
    "FAILED": "fail",
    "SKIPPED": "warn",
}
_HASH_SHOWN = 8
_STORE = "Make calls with AAL_DEV_LOG_PAYLOAD=1: then their lines hold what a replay needs."
_NO_CALL_YET = "No call was made here yet."


# --- aal provenance ----------------------------------------------------------------------------------------------


@app.command()
def tail(
    ctx: typer.Context,
    count: Annotated[int, typer.Option("-n", parser=whole(1), metavar="N", help="How many lines.")] = 10,
    overlay: Annotated[str | None, typer.Option(metavar="NAME", help="Only this overlay's.")] = None,
    ok: Annotated[bool | None, typer.Option("--ok/--failed", help="Only what succeeded, or failed.")] = None,
    as_json: AsJson = False,
) -> None:
    """The last lines, oldest first; with --json one record a line.

    Example: aal provenance tail -n 20 --overlay abraxas --failed
    """
    from bus import provenance

    path = _ledger(ctx)
    records = provenance.tail(path, count, overlay=overlay, ok=ok)
    if not as_json and not path.exists():
        say(_NO_CALL_YET, "dim")
    elif not as_json:
        print_table(("seq", "time", "type", "overlay", "phase", "code", "ms", "hash"), map(_tail_row, records))
    else:
        for record in records:
            _print_line(record)


def _tail_row(record: Record) -> tuple[object, ...]:
    code = record.get("code")
    return (
        record["seq"],
        _time(record["timestamp_ms"]),
        record["type"],
        _called(record),
        record.get("phase"),
        code and mark("ok" if record.get("ok") else "fail", printable(str(code))),
        record.get("duration_ms"),
        record["hash"][:_HASH_SHOWN],
    )


def _time(timestamp_ms: int) -> str:
    try:
        moment = datetime.fromtimestamp(timestamp_ms / 1000, UTC).astimezone()
    except (OverflowError, ValueError, OSError):  # no year has it: nobody's clock wrote this
        return str(timestamp_ms)
    return moment.strftime("%m-%d %H:%M:%S")


def _called(record: Record) -> str:
    return ".".join(str(name) for name in (record.get("overlay"), record.get("capability")) if name)


@app.command()
def show(
    ctx: typer.Context,
    seq: Annotated[int, typer.Argument(parser=whole(1), metavar="N", help="The line's number.")],
    as_json: AsJson = False,
) -> None:
    """Line N, after a check of its hash; with --json the line's own bytes.

    Example: aal provenance show 1
    """
    record = _read_line(_ledger(ctx), seq)
    if as_json:
        _print_line(record)
    else:
        print_pretty(record)


def _read_line(path: Path, seq: int) -> Record:
    """Line `seq`. Raises `NotFoundError`, and `OperatorError` that names the line where it is broken."""
    from bus import provenance
    from bus.records import BrokenLineError

    try:
        return provenance.read_line(path, seq)
    except BrokenLineError as error:
        raise _broken(seq, error) from None


def _lines(path: Path, start: int = 1) -> Iterator[Record]:
    """The lines from `start` on. Raises as `_read_line`."""
    from bus import provenance
    from bus.records import BrokenLineError

    seq = start
    try:
        for record in provenance.iter_lines(path, start):
            yield record
            seq += 1
    except BrokenLineError as error:
        raise _broken(seq, error) from None


def _broken(seq: int, error: BusError) -> OperatorError:
    hint = "aal provenance verify tells what is still good."
    return OperatorError(error.code, f"line {seq}: {error.detail}", hint=hint)


def _ledger(ctx: typer.Context) -> Path:
    return workplace(ctx).settings().ledger


def _print_line(record: Record) -> None:
    """A record's line as it stands in the file: its canonical form is what was written."""
    from bus.canonical import canonical

    sys.stdout.write(canonical(record).decode() + "\n")


# --- aal replay --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one line of several. `why` names what differs, or the reason why nothing was run."""

    record: Record
    verdict: Verdict
    why: str
    replay: "Replay | None" = None

    def body(self) -> dict[str, Any]:
        said = self.replay.body() if self.replay else {"seq": self.record["seq"], "reason": self.why}
        return {"verdict": self.verdict} | said


def replay(
    ctx: typer.Context,
    *,
    lines: Annotated[list[str] | None, typer.Argument(metavar="N|A-B", help="Numbers of lines.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every recorded call.")] = False,
    last: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="K", help="The last K calls that can be replayed.")
    ] = None,
    overlay: Annotated[str | None, typer.Option(metavar="NAME", help="Only this overlay's.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Also what could change something.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run recorded calls again, and say whether the same came of them.

    Needs lines with a stored payload: set AAL_DEV_LOG_PAYLOAD=1 when calling.

    \b
    Exit codes: 0 all MATCH, 1 a DRIFT or a failure, 2 usage or no such line,
    3 nothing that can be replayed, 4 the ledger is broken.

    Example: aal replay 1, or aal replay 3-9 12, or aal replay --last 5
    """
    from bus.local import LocalBus

    ranges = [_range(text) for text in lines or ()]
    if bool(ranges) + every + (last is not None) != 1:
        raise typer.BadParameter("give line numbers, --all or --last K, and one of these only")
    settings = workplace(ctx).settings()
    try:
        records = list(_select(settings.ledger, ranges, last, overlay))
    except NotFoundError as error:
        tell(error, as_json=as_json)
        raise typer.Exit(Exit.USAGE) from None
    asks_for_one = (last == 1 and not as_json) or (len(ranges) == 1 and len(ranges[0]) == 1)
    is_single = asks_for_one and bool(records)
    with LocalBus(settings) as bus:
        code = _replay_one(bus, records[0], live, as_json) if is_single else _replay_many(bus, records, live, as_json)
    raise typer.Exit(code)


def _range(text: str) -> range:
    """`3` or `3-9`, as written on the command line."""
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    first = int(match[1]) if match else 0
    final = int(match[2] or first) if match else 0
    if not 1 <= first <= final:
        raise typer.BadParameter(f"{text!r} is no line number and no range A-B of them", param_hint="N|A-B")
    return range(first, final + 1)


def _select(path: Path, ranges: list[range], last: int | None, overlay: str | None) -> Iterator[Record]:
    """The records to run. Raises `NotFoundError` where a number is beyond the last line."""
    if last is not None:
        yield from _last_replayable(path, last, overlay)
        return
    chosen: Iterator[Record] = (record for record in _lines(path) if record["type"] == "invoke")
    if ranges:
        chosen = itertools.chain.from_iterable(_read_range(path, wanted) for wanted in ranges)
    yield from (record for record in chosen if overlay in (None, record.get("overlay")))


def _read_range(path: Path, wanted: range) -> Iterator[Record]:
    yield _read_line(path, wanted[0])
    rest = _lines(path, wanted[0] + 1)
    for seq in wanted[1:]:
        if (record := next(rest, None)) is None:
            raise NotFoundError("ERR_NOT_FOUND", f"the ledger has no line {seq}")
        yield record


def _last_replayable(path: Path, count: int, overlay: str | None) -> list[Record]:
    """Looks back further and further, so that a long ledger is not read whole for its last lines."""
    from bus import provenance

    limit = count
    while True:
        calls = provenance.tail(path, limit, overlay=overlay, types=("invoke",))
        found = [record for record in calls if _can_be_replayed(record)]
        if len(found) >= count or len(calls) < limit:
            return found[-count:]
        limit *= 4


def _can_be_replayed(record: Record) -> bool:
    from bus.replay import invocation_of

    try:
        invocation_of(record)
    except ReplayError:
        return False
    return True


def _replay_one(bus: "LocalBus", record: Record, live: bool, as_json: bool) -> Exit:
    from bus.replay import invocation_of

    invocation_of(record)
    if not as_json:
        say(f"Replaying event from line {record['seq']}\noverlay: {record['overlay']}\nphase: {record['phase']}")
    done = bus.replay(record["seq"], live=live)
    if as_json:
        print_json(done.body())
    else:
        _print_replay(done)
    return Exit.OK if done.verdict == "MATCH" else Exit.FAILED


def _print_replay(done: "Replay") -> None:
    sys.stdout.write(json.dumps(done.answer.body, indent=2, sort_keys=True) + "\n")
    differs = ", ".join(done.differs)
    if done.verdict == "DRIFT":
        say(f"verdict: DRIFT ({differs})", "bold red")
        return
    say("verdict: MATCH", "green")
    if differs:
        say(f"note: the result is the same, though not all is as it was: {differs}", "dim")


def _replay_many(bus: "LocalBus", records: list[Record], live: bool, as_json: bool) -> Exit:
    from rich.progress import track

    console = err()
    shown = track(records, "replaying", console=console, transient=True, disable=not console.is_terminal)
    rows = [_row(bus, record, live) for record in shown]
    counts = Counter(row.verdict for row in rows)
    totals = {verdict.lower(): counts[verdict] for verdict in _MARK}
    if as_json:
        print_json({"replays": [row.body() for row in rows], "totals": totals})
    elif rows:
        print_table(("seq", "overlay", "phase", "verdict", "differs"), map(_cells, rows))
        say(", ".join(f"{count} {name}" for name, count in totals.items()))
    if counts["DRIFT"] or counts["FAILED"]:
        return Exit.FAILED
    if counts["MATCH"]:
        return Exit.OK
    if not as_json:
        tell(ReplayError("ERR_NOT_REPLAYABLE", _why_none(records), hint=_STORE), as_json=False)
    return Exit.NOT_REPLAYABLE


def _why_none(records: list[Record]) -> str:
    """Why of these records nothing was run."""
    if any("payload" in record for record in records):
        return "none of these lines can be replayed"
    return "there is no line with a stored payload"


def _row(bus: "LocalBus", record: Record, live: bool) -> Row:
    """One line run again. Raises only `OperatorError` of a broken ledger: no verdict is worth anything there."""
    try:
        done = bus.replay(record["seq"], live=live)
    except ReplayError as error:
        return Row(record, "SKIPPED", error.detail)
    except BusError as error:
        if error.code == "ERR_LEDGER_BROKEN":
            raise _broken(record["seq"], error) from None
        return Row(record, "FAILED", f"{error.code}: {error.detail}")
    return Row(record, done.verdict, ", ".join(done.differs), done)


def _cells(row: Row) -> tuple[object, ...]:
    record = row.record
    return record["seq"], record.get("overlay"), record.get("phase"), mark(_MARK[row.verdict], row.verdict), row.why
