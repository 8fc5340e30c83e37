"""`aal overlays`: see, check, make, add, switch and remove overlays. A running server notices all of it."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import enum
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus import templates
from bus.console import (
    AsJson,
    Exit,
    make_app,
    mark,
    out,
    print_json,
    print_pretty,
    print_table,
    printable,
    say,
    workplace,
)
from bus.errors import Fault, NotFoundError, OperatorError
from bus.settings import Settings

if TYPE_CHECKING:
    from bus.overlays import Entry, Registry

app = make_app("See, check, make, add, switch and remove overlays; a running server follows.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The overlay's name.")]


def open_registry(settings: Settings, root: Path | None = None) -> "Registry":
    """The overlays as a server of this folder would load them, plugins' checks and runners included."""
    from bus.overlays import Registry
    from bus.plugins import Plugins

    plugins = Plugins(settings)
    return Registry(
        root or settings.overlays,
        settings.state,
        check=plugins.check_overlay,
        default_timeout_s=settings.timeout_s,
        runners=plugins.runners(),
    )


def _registry(ctx: typer.Context) -> "Registry":
    return open_registry(workplace(ctx).settings())


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every overlay, the broken ones with their reason.

    Example: aal overlays list
    """
    entries = _registry(ctx).entries()
    if as_json:
        print_json({"overlays": [entry.summary() for entry in entries]})
        return
    print_table(("name", "version", "status", "runner", "phases", "capabilities", "about"), map(_row, entries))
    if not entries:
        say(f"no overlays in {workplace(ctx).settings().overlays}; aal overlays new NAME makes one", "dim")


def _row(entry: "Entry") -> tuple[object, ...]:
    summary = entry.summary()
    kind = {"broken": "fail", "disabled": "warn"}.get(entry.status, "ok")
    return (
        entry.name,
        summary["version"],
        mark(kind, entry.status),  # type: ignore[arg-type]  # the literal is one of three
        ", ".join(summary["runners"]),
        " ".join(summary["phases"]),
        ", ".join(entry.manifest.capabilities) if entry.manifest else "",
        summary["error"] or summary["description"],
    )


@app.command()
def show(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """One overlay with everything that its manifest says.

    Example: aal overlays show abraxas
    """
    detail = _registry(ctx).entry(name).detail()
    (print_json if as_json else print_pretty)(detail)


@app.command()
def check(
    ctx: typer.Context,
    overlays: Annotated[list[str] | None, typer.Argument(metavar="NAME|PATH", help="Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Every fault and warning of overlays, by name or by folder; exit 1 where there is a fault.

    Example: aal overlays check abraxas ./my-overlay
    """
    settings = workplace(ctx).settings()
    registry = open_registry(settings)
    entries = [_find(registry, settings, given) for given in overlays] if overlays else registry.entries()
    if as_json:
        print_json({"overlays": [_verdict(entry) for entry in entries]})
    else:
        for entry in entries:
            _print_verdict(entry)
    if any(entry.error for entry in entries):
        raise typer.Exit(Exit.FAILED)


def _find(registry: "Registry", settings: Settings, given: str) -> "Entry":
    """What was named. A text with a slash is a path, and so is one that only leads to a folder."""
    if "/" not in given:
        try:
            return registry.entry(given)
        except NotFoundError:
            if not Path(given).is_dir():
                raise
    return _at(Path(os.path.abspath(given)), settings)  # noqa: PTH100  # resolve() would give the name of a link's target


def _at(folder: Path, settings: Settings) -> "Entry":
    """An overlay outside the folder of overlays. Raises `OperatorError` where there is no folder."""
    from bus.manifests import NAME, ManifestError
    from bus.overlays import Entry

    if not folder.is_dir():
        raise OperatorError("ERR_FILES", f"there is no folder {folder}")
    if not NAME.fullmatch(folder.name):
        fault = Fault("folder", repr(folder.name), f"a name that matches {NAME.pattern}")
        return Entry(folder.name, folder, error=ManifestError(folder.name, [fault]))
    return open_registry(settings, folder.parent).entry(folder.name)


def _verdict(entry: "Entry") -> dict[str, Any]:
    summary = entry.summary()
    return {"name": entry.name, "ok": entry.error is None} | {
        key: summary[key] for key in ("version", "error", "faults", "warnings", "links")
    }


def _print_verdict(entry: "Entry") -> None:
    out().print(mark("fail" if entry.error else "ok"), printable(entry.name), soft_wrap=True)
    for fault in entry.error.faults if entry.error else ():
        say(f"  fault    {fault}", "red")
    for warning in entry.manifest.warnings if entry.manifest else ():
        say(f"  warning  {warning}", "yellow")
    for link in entry.links:
        say(f"  link     {link}", "dim")


class Kind(enum.StrEnum):
    """What a new overlay is: a program for each call, or a service that runs by itself."""

    PROC = "proc"
    HTTP = "http"


@app.command()
def new(
    ctx: typer.Context,
    name: Name,
    runner: Annotated[Kind, typer.Option(help="A program for each call, or an HTTP service.")] = Kind.PROC,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where it goes; default: the folder of overlays.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service (http only).")] = 8101,
) -> None:
    """Write a working overlay, with its test.

    Example: aal overlays new my-tool --runner proc
    """
    from bus.manifests import NAME

    if not NAME.fullmatch(name):
        raise typer.BadParameter(f"{name!r} does not match {NAME.pattern}", param_hint="NAME")
    registry = open_registry(workplace(ctx).settings(), folder and folder.absolute())
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / name
        templates.write(draft, templates.overlay_files(name, runner.value, port))
        made = registry.add(draft).folder
    shown = os.path.relpath(made)
    say(f"made {shown}", "green")
    say(f"its test:  python3 -m pytest {shown}")
    if runner is Kind.HTTP:
        say(f"start it:  python3 {shown}/service.py")
    if folder is None:
        say(f"call it:   aal invoke {name} text='two words'")


@app.command()
def add(ctx: typer.Context, path: Annotated[Path, typer.Argument(metavar="PATH", help="An overlay's folder.")]) -> None:
    """Copy an overlay's folder in; one with faults is refused.

    Example: aal overlays add ../elsewhere/my-tool
    """
    entry = _registry(ctx).add(Path(os.path.abspath(path)))  # noqa: PTH100  # as in _find
    say(f"added {entry.name}", "green")


@app.command()
def enable(ctx: typer.Context, name: Name) -> None:
    """Let calls through again.

    Example: aal overlays enable my-tool
    """
    _registry(ctx).enable(name)
    say(f"enabled {name}", "green")


@app.command()
def disable(ctx: typer.Context, name: Name) -> None:
    """Refuse calls from now on, after restarts too.

    Example: aal overlays disable my-tool
    """
    _registry(ctx).disable(name)
    say(f"disabled {name}", "green")


@app.command()
def remove(ctx: typer.Context, name: Name) -> None:
    """Move an overlay away; nothing is deleted.

    Example: aal overlays remove my-tool
    """
    moved = _registry(ctx).remove(name)
    say(f"removed {name}; it lies in {moved}", "green")
