"""`aal provenance` reads the ledger; cli_proofs has what verifies it."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from bus.console import (
    AsJson,
    make_app,
    mark,
    one_of,
    print_pretty,
    print_table,
    printable,
    say,
    whole,
    workplace,
)
from bus.errors import BusError, OperatorError
from bus.model import Phase, Record

app = make_app("Read and verify the ledger.")

_HASH_SHOWN = 8
_NO_CALL_YET = "No call was made here yet."


def _moment(text: str) -> int:
    """Milliseconds since the epoch, written as such, or as ISO 8601 in the local time where it names no zone."""
    try:
        if text.isascii() and text.isdecimal():
            return int(text)
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise typer.BadParameter(f"{text!r} is no time, as 2025-01-31 or 2025-01-31T12:00:00+00:00") from None


Since = Annotated[int | None, typer.Option(parser=_moment, metavar="TIME", help="Only from this time on.")]
Until = Annotated[int | None, typer.Option(parser=_moment, metavar="TIME", help="Only up to this time.")]


@app.command()
def tail(
    ctx: typer.Context,
    *,
    count: Annotated[int, typer.Option("-n", parser=whole(1), metavar="N", help="How many lines.")] = 10,
    overlay: Annotated[str | None, typer.Option(metavar="NAME", help="Only this overlay's.")] = None,
    phase: Annotated[
        Phase | None, typer.Option(parser=one_of(Phase), metavar="|".join(Phase), help="Only calls in this phase.")
    ] = None,
    ok: Annotated[bool | None, typer.Option("--ok/--failed", help="Only what succeeded, or failed.")] = None,
    code: Annotated[str | None, typer.Option(metavar="CODE", help="Only what ended with it, as ERR_TIMEOUT.")] = None,
    caller: Annotated[str | None, typer.Option(metavar="NAME", help="Only calls with the token of this name.")] = None,
    since: Since = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """The last lines, oldest first; with --json one record a line.

    Example: aal provenance tail -n 20 --overlay abraxas --failed
    """
    from bus import provenance

    path = _ledger(ctx)
    records = provenance.tail(
        path,
        count,
        overlay=overlay,
        phase=phase,
        ok=ok,
        code=code,
        caller=caller,
        since_ms=since,
        until_ms=until,
    )
    if not as_json and not provenance.exists(path):
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
    record = read_line(_ledger(ctx), seq)
    if as_json:
        _print_line(record)
    else:
        print_pretty(record)


def read_line(path: Path, seq: int) -> Record:
    """Line `seq`. Raises `NotFoundError`, and `OperatorError` that names the line where it is broken."""
    from bus import provenance
    from bus.records import BrokenLineError

    try:
        return provenance.read_line(path, seq)
    except BrokenLineError as error:
        raise broken(seq, error) from None


def broken(seq: int, error: BusError) -> OperatorError:
    hint = "aal provenance verify tells what is still good."
    return OperatorError(error.code, f"line {seq}: {error.detail}", hint=hint)


def _ledger(ctx: typer.Context) -> Path:
    return workplace(ctx).settings().ledger


def _print_line(record: Record) -> None:
    """A record's line as it stands in the file: its canonical form is what was written."""
    from bus.canonical import canonical

    sys.stdout.write(canonical(record).decode() + "\n")
