"""`aal runes`: see the memory profiles by name, check rune text, and format it. A running server follows."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len

from bus.console import AsJson, Exit, complain, make_app, mark, out, print_json, print_table, printable, say, workplace
from bus.errors import BusError, OperatorError
from bus.settings import Settings

if TYPE_CHECKING:
    from bus.profiles import NamedProfile
    from bus.runes import MemoryProfile

app = make_app("See the memory profiles, check and format rune text; a running server follows.")

_STDIN = "-"
_BEFORE, _AFTER = 60, 40
"""Characters of a long line that are shown to the left and to the right of a fault."""

_MARKS = re.compile(r"[=\[{;]")
"""What rune text has, also most that is faulty, and names of files have not."""

_COLUMNS = ("name", "from", "soft MiB", "hard MiB", "volatility", "tier", "priority", "KV", "degrade")


@dataclass(frozen=True, slots=True)
class Reading:
    """One rune text as it was read: `name` is what people call it, `text` empty where there is none to show.

    There is either a `profile`, with its canonical `layout` where that was asked for, or an `error`.
    """

    name: str
    text: str = ""
    profile: "MemoryProfile | None" = None
    layout: str = ""
    error: BusError | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the canonical form is another text."""
        return self.error is None and self.layout != self.text


# --- aal runes list, show ----------------------------------------------------------------------------------------


def _named_profiles(settings: Settings) -> "list[NamedProfile]":
    from bus.profiles import Profiles

    return Profiles(settings.profiles).all()


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every memory profile by name, your own and the shipped ones; the broken ones with their reason.

    Example: aal runes list
    """
    found = _named_profiles(workplace(ctx).settings())
    if as_json:
        print_json({"profiles": [_profile_json(named) for named in found]})
    else:
        print_table(_COLUMNS, map(_row, found))


def _row(named: "NamedProfile") -> tuple[object, ...]:
    profile = named.profile
    if profile is None:
        return (mark("fail", printable(named.name)), _origin(named), *[""] * 6, named.error and named.error.detail)
    figures = (profile.soft_mb, profile.hard_mb, profile.volatility, profile.tier, profile.priority)
    kv = f"{profile.kv.cap:g} {profile.kv.policy} {profile.kv.purge}" if profile.kv else ""
    return (named.name, _origin(named), *figures, kv, " ".join(map(str, profile.steps)))


def _origin(named: "NamedProfile") -> str:
    if named.file is None:
        return "shipped"
    return f"{named.file}, in place of the shipped one" if named.replaces_shipped else str(named.file)


def _profile_json(named: "NamedProfile") -> dict[str, Any]:
    """A profile for programs. `profile` is null where its file is broken."""
    return {
        "name": named.name,
        "source": "file" if named.file else "shipped",
        "file": str(named.file) if named.file else None,
        "replaces_shipped": named.replaces_shipped,
        "profile": _figures(named.profile),
        "error": _error_json(named.error),
    }


def _figures(profile: "MemoryProfile | None") -> dict[str, Any] | None:
    if profile is None:
        return None
    from bus import runes

    kv = profile.kv
    return {
        "soft_mb": profile.soft_mb,
        "hard_mb": profile.hard_mb,
        "volatility": profile.volatility,
        "kv": {"cap": kv.cap, "policy": kv.policy, "purge": kv.purge} if kv else None,
        "tier": profile.tier,
        "priority": profile.priority,
        "steps": list(map(str, profile.steps)),
        "rune": runes.format(profile),
    }


def _error_json(error: BusError | None) -> dict[str, Any] | None:
    """Line and column count from 1, and are null with the rest where no text could be read."""
    if error is None:
        return None
    places = {name: getattr(error, name, None) for name in ("line", "column", "found")}
    expected = getattr(error, "expected", None)
    return {"code": error.code, "detail": error.detail} | places | {"expected": expected and list(expected)}


@app.command()
def show(
    ctx: typer.Context,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The profile's name.")],
    rune: Annotated[bool, typer.Option("--rune", help="Print its rune text alone, as in a file of your own.")] = False,
    as_json: AsJson = False,
) -> None:
    """One memory profile: where it comes from, and its figures.

    Example: aal runes show BALANCED
    """
    from bus import runes

    named = _find(name, workplace(ctx).settings())
    if named.profile is None:
        raise named.error or runes.unknown_name(name, ())
    if as_json:
        print_json(_profile_json(named))
    elif rune:
        sys.stdout.write(runes.layout(named.profile))
    else:
        print_table(("", ""), (pair for pair in zip(_COLUMNS, _row(named), strict=True) if pair[1] != ""))


def _find(name: str, settings: Settings) -> "NamedProfile":
    """Raises `RuneError` where there is no profile of this name."""
    from bus import runes

    found = _named_profiles(settings)
    for named in found:
        if named.name == name:
            return named
    raise runes.unknown_name(name, filter(runes.name_in, (named.name for named in found)))


# --- aal runes check ---------------------------------------------------------------------------------------------


@app.command()
def check(
    ctx: typer.Context,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT|FILE|NAME", help="Default: every profile of your own; - is stdin."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whether rune texts are sound: in the argument, in a file, or a profile's by name; exit 1 where one is not.

    Example: aal runes check 'MEM[SOFT=256,HARD=512,VOL=LOW]; PRIORITY=7'
    """
    settings = workplace(ctx).settings()
    if texts:
        readings = [_read_given(given, settings) for given in texts]
    else:
        readings = [_read_named(named) for named in _named_profiles(settings) if named.file]
    if as_json:
        print_json({"runes": [_reading_json(reading) for reading in readings]})
    else:
        for reading in readings:
            out().print(mark("fail" if reading.error else "ok"), printable(reading.name), soft_wrap=True)
            if reading.error:
                say(f"  {reading.error.detail}", "red")
                for line in _pointer(reading):
                    say(f"  {line}")
        if not readings:
            say(f"no profiles of your own in {settings.profiles}", "dim")
    _end(readings)


def _read_given(given: str, settings: Settings) -> Reading:
    """What an argument of `check` is: stdin, a file that is there, a name, a text with marks of runes, or a file."""
    from bus import runes

    if given == _STDIN or os.path.isfile(given):  # noqa: PTH113  # False for what no path can be, too
        return _read(given)
    if runes.name_in(given):
        try:
            return _read_named(_find(given.strip(), settings))
        except runes.RuneError as error:
            return Reading(given, error=error)
    return _examine(given, lambda: given, "rune") if _MARKS.search(given) else _read(given)


def _read_named(named: "NamedProfile") -> Reading:
    """A profile's file as it is now; what is wrong with its name is an error of its own."""
    from bus import runes

    reading = _read(str(named.file)) if named.file else Reading(named.name, profile=named.profile)
    is_name_wrong = named.error is not None and runes.name_in(named.name) != named.name
    return Reading(reading.name, error=named.error) if is_name_wrong else reading


def _reading_json(reading: Reading) -> dict[str, Any]:
    """A verdict for programs."""
    figures = _figures(reading.profile)
    error = _error_json(reading.error)
    return {"name": reading.name, "ok": reading.error is None, "profile": figures, "error": error}


# --- aal runes fmt -----------------------------------------------------------------------------------------------


@app.command()
def fmt(
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE", help="Default, and as -: stdin.")] = None,
    *,
    check_only: Annotated[
        bool, typer.Option("--check", help="Print no text but which would change; exit 1 where one would.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Write it to the file instead of printing it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rune text in its canonical form: one clause a line, each DEGRADE step on a line of its own.

    The order is MEM, KV, TIER, PRIORITY, DEGRADE. TIER and PRIORITY are written where they were left to their default,
    steps are numbered from 1, and numbers have no needless zeros; what the text means stays the same.

    Example: aal runes fmt --write profiles/*.rune
    """
    given = files or [_STDIN]
    if write and check_only:
        raise typer.BadParameter("--check changes nothing", param_hint="--write")
    if write and _STDIN in given:
        raise typer.BadParameter("stdin cannot be written; name a FILE", param_hint="--write")
    readings = [_read(name, lay_out=True) for name in given]
    if write:
        readings = [_write(reading) if reading.is_changed else reading for reading in readings]
    if as_json:
        print_json({"runes": [_reading_json(one) | _formatted_json(one) for one in readings]})
    else:
        for reading in readings:
            _print_formatted(reading, check_only=check_only, write=write)
    _end(readings, is_failed=check_only and any(reading.is_changed for reading in readings))


def _write(reading: Reading) -> Reading:
    """Give its file the canonical form; a link stays one."""
    from bus.overlay_files import write_whole

    try:
        write_whole(Path(os.path.realpath(reading.name)), reading.layout.encode())
    except OSError as error:
        return Reading(reading.name, error=_unreadable(reading.name, error))
    return reading


def _formatted_json(reading: Reading) -> dict[str, Any]:
    return {"changed": reading.is_changed, "text": None if reading.error else reading.layout}


def _print_formatted(reading: Reading, *, check_only: bool, write: bool) -> None:
    if reading.error:
        complain(reading.error.code, reading.error.detail, None, "\n".join(_pointer(reading)))
    elif check_only or write:
        if reading.is_changed:
            say(f"{'wrote' if write else 'would change'} {reading.name}")
    else:
        sys.stdout.write(reading.layout)


# --- Reading -----------------------------------------------------------------------------------------------------


def _read(name: str, *, lay_out: bool = False) -> Reading:
    """The rune text of a file, or of stdin."""
    from bus import profiles

    if name == _STDIN:
        return _examine(name, lambda: profiles.decode(sys.stdin.buffer.read(profiles.MAX_BYTES + 1)), "stdin", lay_out)
    return _examine(name, lambda: profiles.read_text(name), name, lay_out)


def _examine(name: str, read: Callable[[], str], source: str, lay_out: bool = False) -> Reading:
    """What `read` gives, as a reading. `source` is what an error calls it."""
    from bus import runes

    text = ""
    try:
        text = read()
        profile = runes.parse(text)
        return Reading(name, text, profile, runes.tidy(text) if lay_out else "")
    except OSError as error:
        return Reading(name, error=_unreadable(name, error))
    except runes.RuneError as error:
        return Reading(name, text, error=error.within(source))


def _unreadable(name: str, error: OSError) -> OperatorError:
    return OperatorError("ERR_FILES", f"{name}: {error.strerror or error}")


def _pointer(reading: Reading) -> tuple[str, ...]:
    """The line with the fault and a caret below it; nothing where there is no text."""
    from bus.runes import RuneError

    error = reading.error
    if not isinstance(error, RuneError) or not reading.text:
        return ()
    line = reading.text.split("\n")[error.line - 1]
    start = max(0, error.column - 1 - _BEFORE)
    before = ("…" if start else "") + _on_one_line(line[start : error.column - 1])
    after = _on_one_line(line[error.column - 1 : error.column - 1 + _AFTER].rstrip())
    return before + after, " " * cell_len(before) + "^"


def _on_one_line(text: str) -> str:
    """Printable text, in which a tab is one column wide."""
    return printable(text.replace("\t", " "))


def _end(readings: list[Reading], *, is_failed: bool = False) -> None:
    """Exit 1 where a text is no rune, or the command failed otherwise."""
    if is_failed or any(reading.error for reading in readings):
        raise typer.Exit(Exit.FAILED)
