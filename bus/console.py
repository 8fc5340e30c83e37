"""What every command shares: the working folder, the exit codes, and how things are shown to people and programs.

Programs get JSON on stdout (`--json`), people tables and colours, and colours only on a terminal. Errors go to stderr:
code, detail and hint, or with `--json` the body that the HTTP side would answer.
"""

import enum
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from bus import settings as bus_settings
from bus.errors import BusError, OperatorError, ReplayError, RequestError, SettingError
from bus.settings import Settings

_WIDE = 10_000
"""Columns of what is no terminal, so that nothing is folded or cut in a pipe."""

_LONG_TEXT = 200
"""Characters of a text that people are shown of a record."""

_NAMED = 80
"""Characters of an argument that its refusal repeats."""

Word = TypeVar("Word", bound=enum.StrEnum)
Function = TypeVar("Function", bound=Callable[..., Any])
Mark = Literal["ok", "warn", "fail"]
_STYLE: dict[Mark, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class Exit(enum.IntEnum):
    """The exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_REPLAYABLE = 3
    LEDGER_BROKEN = 4


@dataclass(slots=True)
class Workplace:
    """What the options before the command say, and whether this command speaks JSON."""

    folder: Path = Path()
    as_json: bool = False

    def settings(self, **overrides: Any) -> Settings:  # noqa: ANN401
        """The folder's settings. Raises `SettingError`."""
        return bus_settings.load(self.folder, overrides=overrides)


def workplace(ctx: typer.Context) -> Workplace:
    """The workplace of a running command."""
    place: Workplace = ctx.find_root().ensure_object(Workplace)
    return place


def _speak_json(ctx: typer.Context, value: bool) -> bool:
    workplace(ctx).as_json = value
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.", callback=_speak_json)]


def _first_sentence(text: str | None) -> str:
    """What a list of commands says of one: never cut short, as typer's own would be."""
    found = re.match(r"(.*?\.)(?=\s|$)", text or "", re.DOTALL)
    return " ".join((found[1] if found else text or "").split())


class Command(TyperCommand):
    """A command whose help names its arguments as its usage line does, without types of Python."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return _first_sentence(self.help)

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        options = [param.get_help_record(ctx) for param in self.get_params(ctx) if param.param_type_name == "option"]
        rows = [(param.metavar or param.name, getattr(param, "help", None) or "") for param in arguments]
        for title, shown in (("Arguments", rows), ("Options", list(filter(None, options)))):
            if shown:
                with formatter.section(title):
                    formatter.write_dl(shown)


class Commands(TyperGroup):
    """A group whose commands may raise `BusError` or `OSError`: it is told on stderr, and becomes the exit code."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return _first_sentence(self.help)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        try:
            return super().invoke(ctx)
        except BusError as error:
            refusal = error
        except BrokenPipeError:  # the reader of our output has seen enough; typer ends quietly
            raise
        except OSError as error:
            refusal = OperatorError("ERR_FILES", str(error))
        tell(refusal, as_json=workplace(ctx).as_json)
        raise typer.Exit(exit_code(refusal))


class App(typer.Typer):
    """A `typer.Typer` whose commands are of the class `Command`."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:  # noqa: ANN401
        return super().command(name, **{"cls": Command} | options)


def make_app(about: str) -> App:
    """A group of commands. Its help is plain text, and typer's own tracebacks are off."""
    return App(
        help=about,
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def whole(low: int, high: int | None = None) -> Callable[[object], int]:
    """A parser of whole numbers from `low` to `high`, for an argument or an option."""
    allowed = f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}"

    def parse(text: object) -> int:
        try:
            number = int(str(text)) if re.fullmatch("-?[0-9]+", str(text)) else None
        except ValueError:  # Python reads no more digits than sys.get_int_max_str_digits()
            number = None
        if number is None or number < low or (high is not None and number > high):
            raise typer.BadParameter(f"{str(text)[:_NAMED]!r} is not {allowed}")
        return number

    return parse


def one_of(choices: type[Word]) -> Callable[[object], Word]:
    """A parser of one of some words, in whatever case."""
    known = {choice.lower(): choice for choice in choices}

    def parse(text: object) -> Word:
        if (found := known.get(str(text).lower())) is None:
            raise typer.BadParameter(f"{str(text)[:_NAMED]!r} is not one of {', '.join(choices)}")
        return found

    return parse


def exit_code(error: BusError) -> Exit:
    """The exit code that a refusal ends a command with."""
    if error.code == "ERR_LEDGER_BROKEN":
        return Exit.LEDGER_BROKEN
    if isinstance(error, ReplayError):
        return Exit.NOT_REPLAYABLE
    return Exit.USAGE if isinstance(error, SettingError | RequestError) else Exit.FAILED


def prepare_streams() -> None:
    """Output in UTF-8 whatever the locale, since JSON is; the null device for a stream that our caller has closed.

    Otherwise the next file that is opened would be fd 1, and what is printed would go there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115  # for good
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def out() -> Console:
    """The console on stdout as it is now."""
    return _console(stderr=False)


def err() -> Console:
    """The console on stderr as it is now."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else _WIDE)


def say(text: str, style: str | None = None) -> None:
    """One line for people, on stdout."""
    out().print(printable(text), style=style, soft_wrap=True)


def tell(error: BusError, *, as_json: bool) -> None:
    """An error on stderr: its body for programs, else its code, detail, hint and further faults."""
    if as_json:
        sys.stderr.write(dump(error.body()) + "\n")
        return
    complain(error.code, error.detail, error.hint)
    for fault in map(str, error.faults):
        if fault not in error.detail:
            err().print(printable(f"  {fault}"), soft_wrap=True)


def complain(code: str, detail: str, hint: str | None, log: str = "") -> None:
    """A failure on stderr. `log` is what a program said of it."""
    err().print(Text.assemble((code, "bold red"), ": ", printable(detail)), soft_wrap=True)
    for line in log.splitlines():
        err().print(printable(f"  {line}"), soft_wrap=True)
    if hint:
        err().print(printable(f"hint: {hint}"), style="dim", soft_wrap=True)


def dump(value: object) -> str:
    """JSON in one line. A lone surrogate, as of an argument that is not UTF-8, becomes its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace").decode()


def print_json(value: object) -> None:
    """One JSON document on stdout, in one line, for programs."""
    sys.stdout.write(dump(value) + "\n")


def print_pretty(value: object) -> None:
    """Indented JSON for people, coloured on a terminal."""
    out().print_json(json.dumps(value, ensure_ascii=False), ensure_ascii=False)


def cut(value: Any) -> Any:  # noqa: ANN401
    """A JSON value with its long texts cut, for people."""
    if isinstance(value, dict):
        return {name: cut(member) for name, member in value.items()}
    if isinstance(value, list):
        return [cut(member) for member in value]
    if isinstance(value, str) and len(value) > _LONG_TEXT:
        return f"{value[:_LONG_TEXT]}… {len(value)} characters"
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table without lines, and without a header where every column is nameless.

    A cell that is `rich.text.Text` keeps its style.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False, show_header=any(columns))
    for position, column in enumerate(columns, 1):
        table.add_column(column, overflow="fold", no_wrap=position < len(columns))
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else printable(_cell(cell)) for cell in row))
    console = out()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


def mark(kind: Mark, text: str | None = None) -> Text:
    """A word in the colour of its kind."""
    return Text(text or kind, style=_STYLE[kind])


def printable(text: str) -> str:
    """Text that an overlay may have written, safe for a terminal: control characters are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _cell(value: object) -> str:
    return "" if value is None else str(value)
