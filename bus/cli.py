"""The command `aal`. Every command is a thin door to a module that does the work.

Exit codes: 0 ok, 1 the call or check failed, 2 usage, 3 not replayable, 4 the ledger is broken.
"""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus import (
    cli_callers,
    cli_overlays,
    cli_profile,
    cli_proofs,
    cli_replay,
    cli_runes,
    cli_stress,
    resources,
    templates,
)
from bus.console import (
    AsJson,
    Exit,
    Workplace,
    complain,
    cut,
    make_app,
    mark,
    one_of,
    out,
    prepare_streams,
    print_json,
    print_pretty,
    print_table,
    printable,
    say,
    whole,
    workplace,
)
from bus.errors import Fault, OperatorError, SettingError
from bus.model import Phase
from bus.settings import FILE, PREFIX, Row, Settings, explain, table
from runners.base import JsonError, parse_json

if TYPE_CHECKING:
    from bus.course import Answer
    from bus.dispatch import Bus

EXAMPLE = "abraxas"
"""The overlay that a new folder begins with."""

_BAD_REQUEST = 400
_WHOLE = re.compile("-?[0-9]+")

_ABOUT = """The overlay bus: call overlays, see what was called, run it again.

Exit codes: 0 ok, 1 the call or check failed, 2 usage, 3 not replayable, 4 the ledger is broken.
"""

app = make_app(_ABOUT)
cli_overlays.app.command()(cli_profile.profile)
app.add_typer(cli_overlays.app, name="overlays")
app.add_typer(cli_proofs.app, name="provenance")
app.add_typer(cli_runes.app, name="runes")
app.add_typer(cli_callers.tokens, name="token")
app.add_typer(cli_callers.secrets, name="secret")


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `aal`. Ends by `SystemExit`; 130 where a signal ended it."""
    prepare_streams()
    _end_as_by_ctrl_c()
    app(args=arguments, prog_name="aal")


def _end_as_by_ctrl_c() -> None:
    """TERM and HUP end a command as Ctrl-C does: its calls are cancelled and written down. `serve` has its own way.

    What `nohup` ignores stays ignored. SIGINT itself does not, though a shell starts its background jobs so: else
    nothing would come of TERM there.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for wish in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(wish) is not signal.SIG_IGN:
            signal.signal(wish, lambda *_: signal.raise_signal(signal.SIGINT))


def _print_version(value: bool) -> None:
    if value:
        say(f"aal-core {resources.version()}")
        raise typer.Exit


@app.callback()
def _before(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Option("-C", "--folder", metavar="DIR", help="Work in this folder.")] = Path(),
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}", param_hint="-C")
    try:
        ctx.obj = Workplace(folder.absolute())
    except FileNotFoundError:
        raise typer.BadParameter("the current folder has been removed", param_hint="-C") from None


# --- aal serve ---------------------------------------------------------------------------------------------------


@app.command()
def serve(
    ctx: typer.Context,
    *,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Loopback only.")] = None,
    port: Annotated[int | None, typer.Option(parser=whole(0, 65535), metavar="N", help="0 takes a free one.")] = None,
    overlays: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the overlays.")] = None,
    logs: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the ledger.")] = None,
    state: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the bus's own state.")] = None,
    profiles: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of your own memory profiles.")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = None,
) -> None:
    """Serve the overlays over HTTP, until SIGINT or SIGTERM.

    Example: aal serve --port 8000
    """
    from bus import serve as server

    folders = {"overlays": overlays, "logs": logs, "state": state, "profiles": profiles}
    server.serve(workplace(ctx).settings(host=host, port=port, log_level=log_level, **folders), _announce)


def _announce(address: str, bus: "Bus") -> None:
    """One line when calls can come. Why an overlay is broken stands in the log."""
    entries = bus.registry.entries()
    broken = ", ".join(entry.name for entry in entries if entry.error)
    told = f" (broken: {broken})" if broken else ""
    say(f"AAL-Core {resources.version()} listens on {address} with {_count(len(entries), 'overlay')}{told}")
    sys.stdout.flush()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- aal invoke --------------------------------------------------------------------------------------------------


@app.command()
def invoke(
    ctx: typer.Context,
    *,
    target: Annotated[str, typer.Argument(metavar="OVERLAY[.CAPABILITY]", help="What to call.")],
    members: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Data. JSON where it is JSON, else text; KEY=@FILE is a file's text."),
    ] = None,
    phase: Annotated[
        Phase, typer.Option(parser=one_of(Phase), metavar="|".join(Phase), help="What the call is for.")
    ] = Phase.OPEN,
    data: Annotated[
        str | None, typer.Option(metavar="JSON|@FILE|-", help="Data as one JSON object; - is stdin.")
    ] = None,
    profile: Annotated[str | None, typer.Option(metavar="NAME", help="A memory profile's name, or a rune.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="SEED", help="A whole number or a text.")] = None,
    timeout_ms: Annotated[
        int | None, typer.Option(parser=whole(1), metavar="MS", help="Lowers the overlay's own timeout.")
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Print the line that the call left, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make one call, without a server. Exit 1 where it fails, 2 where it is no request.

    With --json the answer, as HTTP would give it; with --json --record {"outcome": answer, "record": line}.

    Example: aal invoke abraxas prompt=@README.md intent=test --phase CLEAR
    """
    from bus.local import LocalBus
    from bus.provenance import read_line

    request: dict[str, Any] = {"phase": phase.value, "data": _payload(data, members or ())}
    options = {"profile": profile, "seed": _seed(seed), "timeout_ms": timeout_ms}
    request |= {name: value for name, value in options.items() if value is not None}
    overlay, _, capability = _utf_8(target).partition(".")
    settings = workplace(ctx).settings()
    with LocalBus(settings) as bus:
        answer = bus.invoke(request, overlay, capability or None)
        has_none = answer.body["code"] == "ERR_UNKNOWN_OVERLAY" and not bus.registry.entries()
    line = read_line(settings.ledger, answer.record["seq"]) if record and answer.record else None
    if as_json:
        print_json({"outcome": answer.body, "record": line} if record else answer.body)
    else:
        _print_answer(answer, _where_overlays_may_be(settings) if has_none else None)
        if line:
            print_pretty(cut(line))
    if not answer.ok:
        raise typer.Exit(Exit.USAGE if answer.http_status == _BAD_REQUEST else Exit.FAILED)


def _utf_8(target: str) -> str:
    try:
        target.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"{printable(target)} is not UTF-8", param_hint="OVERLAY[.CAPABILITY]") from None
    return target


def _payload(data: str | None, members: Sequence[str]) -> dict[str, Any]:
    """The call's data: that of `--data`, with each KEY=VALUE put over it. Raises `typer.BadParameter`."""
    given: dict[str, Any] = {}
    for member in members:
        key, mark_, value = member.partition("=")
        if not mark_ or not key:
            raise typer.BadParameter(f"{member!r} is not KEY=VALUE", param_hint="KEY=VALUE")
        if key in given:
            raise typer.BadParameter(f"{key!r} is said twice", param_hint="KEY=VALUE")
        given[key] = _read_text(value[1:]) if value.startswith("@") else _value(value)
    return (_document(data) if data is not None else {}) | given


def _document(data: str) -> dict[str, Any]:
    if data == "-":
        text = sys.stdin.buffer.read()
    else:
        text = (_read_text(data[1:]) if data.startswith("@") else data).encode("utf-8", "surrogateescape")
    try:
        document = parse_json(text)
    except JsonError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--data") from None
    if not isinstance(document, dict):
        raise typer.BadParameter("not a JSON object", param_hint="--data")
    return document


def _read_text(name: str) -> str:
    try:
        return Path(name).read_text("utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the name
        raise typer.BadParameter(f"cannot read {name!r}: {error}", param_hint="@FILE") from None


def _value(text: str) -> Any:  # noqa: ANN401
    """The JSON value that a text is, or the text."""
    try:
        return parse_json(text.encode("utf-8", "surrogateescape"))
    except JsonError:
        return text


def _seed(text: str | None) -> str | int | None:
    if text is None or not _WHOLE.fullmatch(text):
        return text
    try:
        return int(text)
    except ValueError:  # Python reads no more digits than sys.get_int_max_str_digits()
        raise typer.BadParameter(f"a number of {len(text)} digits", param_hint="--seed") from None


def _print_answer(answer: "Answer", hint: str | None) -> None:
    """The result, a failure's code, error, log and hint on stderr, and how the call went."""
    body = answer.body
    if body["result"] is not None or body["ok"]:
        print_pretty(body["result"])
    if not body["ok"]:
        log = body["detail"] if body["detail"] != body["error"] else None
        complain(body["code"], body["error"], hint or body["hint"], log or "")
    called = " ".join(filter(None, (_joined(body["overlay"], body["capability"]), body["phase"], body["code"])))
    line = body["provenance"]
    left = f"line {line['seq']} {line['hash']}" if line else "no ledger line"
    say(f"{called} {body['duration_ms']} ms, {left}", "dim")


def _where_overlays_may_be(settings: Settings) -> str:
    """What to do in a folder without overlays."""
    beside = settings.state / "overlays"
    if not settings.overlays.exists() and beside.is_dir():
        shown = os.path.relpath(beside, settings.overlays.parent)
        return f"{beside} is a folder: set AAL_OVERLAYS={shown}, or overlays = {json.dumps(shown)} in {FILE}."
    return (
        f"There are none in {settings.overlays}: aal init DIR makes a folder with one, "
        "and AAL_OVERLAYS=DIR (aal serve --overlays DIR) names another."
    )


def _joined(overlay: str | None, capability: str | None) -> str:
    return ".".join(filter(None, (overlay, capability)))


app.command()(cli_replay.replay)


# --- aal stress, config ------------------------------------------------------------------------------------------


app.command()(cli_stress.stress)


@app.command()
def config(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every setting: its value, where that comes from, its default, what it is. Exit 2 where one cannot be.

    Example: AAL_SLOTS=8 aal config
    """
    folder = workplace(ctx).folder
    try:
        _, rows = explain(folder)
    except SettingError as error:
        if not as_json:
            _print_refused(folder, error)
        raise
    if not as_json:
        _print_settings(rows)
        return
    columns = ("name", "env", "value", "source", "default", "help", "allowed")
    print_json({"settings": [{name: _plain(getattr(row, name)) for name in columns} for row in rows]})


def _print_refused(folder: Path, error: SettingError) -> None:
    """The settings as they would be without the variables that `error` refuses, and those marked.

    Nothing where the file has faults too: then what it sets is not known.
    """
    refused = {fault.path.partition(": ")[2].upper().removeprefix(PREFIX) for fault in error.faults}
    env = {name: text for name, text in os.environ.items() if name.removeprefix(PREFIX) not in refused}
    with contextlib.suppress(SettingError):
        _print_settings(explain(folder, env)[1], error)


def _print_settings(rows: list[Row], error: SettingError | None = None) -> None:
    """The table for people, with what `error` refuses marked."""
    refused = {fault.path.partition(": ")[2]: fault for fault in error.faults} if error else {}
    print_table(
        ("setting", "value", "source", "default", "about"), (_cells(row, refused.get(row.name)) for row in rows)
    )


def _cells(row: Row, fault: Fault | None) -> tuple[object, ...]:
    if fault is None:
        return row.name, row.value, row.source, row.default, row.help
    return mark("fail", row.name), fault.found, "environment", row.default, f"allowed: {fault.allowed}"


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


# --- aal doctor, init --------------------------------------------------------------------------------------------


@app.command()
def doctor(ctx: typer.Context, as_json: AsJson = False) -> None:
    """What this machine and this folder offer, by trying. Exit 1 where something keeps calls from working.

    The second table has, for each phase, what this kernel holds a call to.

    Example: aal doctor
    """
    from dataclasses import asdict

    from bus import doctor as surgery

    settings = workplace(ctx).settings()
    try:
        tried = surgery.try_rights()
    except OSError:  # of which `examine` makes a finding
        tried = None
    findings = list(surgery.examine(settings, cli_overlays.open_registry(settings), tried))
    is_well = all(finding.mark != "fail" for finding in findings)
    if as_json:
        rights = surgery.rights_json(tried or {})
        print_json({"ok": is_well, "findings": [asdict(finding) for finding in findings], "phases": rights})
    else:
        rows = ((mark(f.mark), f.name, f"{f.found}; {f.hint}" if f.hint else f.found) for f in findings)
        print_table(("", "", ""), rows)
        print_table(surgery.RIGHTS_COLUMNS, surgery.rights_rows(tried or {}))
    if not is_well:
        raise typer.Exit(Exit.FAILED)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made where it is not there.")], as_json: AsJson = False
) -> None:
    """Lay out a working folder: an example overlay, aal.toml, .gitignore.

    An aal.toml or .gitignore that is there already stays as it is. A folder that has overlays is refused.

    Example: aal init my-bus
    """
    overlays = folder / "overlays"
    try:
        if overlays.is_dir() and any(overlays.iterdir()):
            raise OperatorError("ERR_EXISTS", f"{overlays} is not empty", hint="aal overlays add PATH adds to it.")
        shutil.copytree(
            resources.path(f"overlays/{EXAMPLE}"), overlays / EXAMPLE, ignore=shutil.ignore_patterns("__pycache__")
        )
        files = {FILE: templates.settings_file(table()), ".gitignore": templates.GITIGNORE}
        missing = {name: text for name, text in files.items() if not (folder / name).exists()}
        templates.write(folder, missing)
    except OSError as error:
        raise OperatorError("ERR_FILES", f"cannot lay out {folder}: {error}") from None
    if as_json:
        print_json({"folder": str(folder), "overlays": [EXAMPLE], "files": list(missing)})
        return
    say(f"made {folder} with the overlay {EXAMPLE}", "green")
    for command in (f"cd {folder}", f"aal invoke {EXAMPLE} prompt='Hello, bus.'", "aal serve"):
        out().print(f"  {printable(command)}", soft_wrap=True)


if __name__ == "__main__":
    main()
