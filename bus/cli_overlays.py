"""`aal overlays`: see, check, make, add, switch and remove overlays, and read their logs. A running server follows."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import contextlib
import enum
import itertools
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from bus import templates
from bus.console import (
    AsJson,
    Exit,
    make_app,
    mark,
    one_of,
    out,
    print_json,
    print_table,
    printable,
    say,
    whole,
    workplace,
)
from bus.errors import Fault, NotFoundError, OperatorError
from bus.settings import TOKEN, Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bus.needs import Needs
    from bus.overlays import Entry, Registry

app = make_app("See, check, make, add, switch and remove overlays, and read their logs; a running server follows.")

_FIRST_PORT = 8101
"""Port of the first service that `aal overlays new` writes."""

_FOLLOW_S = 0.25
"""Seconds between two looks at a log that is followed."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="The overlay's name.")]


def open_registry(settings: Settings, root: Path | None = None) -> "Registry":
    """The overlays as a server of this folder would load them, plugins' checks and runners included."""
    from bus.overlays import Registry
    from bus.plugins import Plugins
    from bus.profiles import Profiles

    plugins = Plugins(settings)
    return Registry(
        root or settings.overlays,
        settings.state,
        check=plugins.check_overlay,
        default_timeout_s=settings.timeout_s,
        runners=plugins.runners(),
        profiles=Profiles(settings.profiles),
    )


def _registry(ctx: typer.Context) -> "Registry":
    return open_registry(workplace(ctx).settings())


def recalled_needs(settings: Settings) -> "Needs":
    """What calls needed of memory, by the last lines of the ledger, as a server of this folder learns it at its start.

    Nothing where the ledger cannot be read.
    """
    from bus import provenance
    from bus.needs import RECALLED, Needs

    needs = Needs()
    with contextlib.suppress(OSError):
        needs.recall(provenance.tail(settings.ledger, RECALLED))
    return needs


def _named(registry: "Registry", name: str) -> "Entry":
    """One of the entries, also of a folder whose name no overlay can have, as the list shows it.

    Raises `NotFoundError`.
    """
    from bus.manifests import NAME

    if not NAME.fullmatch(name):
        for entry in registry.entries():
            if name in (entry.name, printable(entry.name), entry.summary()["name"]):
                return entry
    return registry.entry(name)


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Every overlay, the broken ones with their reason; below, what declares far from the memory that it needs.

    Example: aal overlays list
    """
    entries, needs = _registry(ctx).entries(), recalled_needs(workplace(ctx).settings())
    found = {entry.name: needs.findings(entry.manifest) for entry in entries if entry.manifest}
    if as_json:
        print_json({"overlays": [entry.summary() | {"findings": found.get(entry.name, [])} for entry in entries]})
        return
    print_table(("name", "version", "status", "runner", "phases", "capabilities", "about"), map(_row, entries))
    for name, findings in found.items():
        for finding in findings:
            say(f"{name}: {finding}", "yellow")
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
    """One overlay with everything that its manifest says, and what its calls needed; its schemas with --json only.

    Example: aal overlays show abraxas
    """
    from bus.plugins import scratch_of, tiers_of

    settings = workplace(ctx).settings()
    entry, needs = _named(open_registry(settings), name), recalled_needs(settings)
    manifest, reserves = entry.manifest, settings.admission == "memory"
    detail = entry.detail(needs.told(manifest, reserves=reserves) if manifest else None)
    detail["findings"] = needs.findings(manifest) if manifest else []
    detail["scratch"] = scratch_of(manifest, tiers_of(settings)) if manifest else {}
    if as_json:
        print_json(detail)
    else:
        _print_detail(detail)


def _print_detail(detail: dict[str, Any]) -> None:
    """What an overlay is, what is wrong with it, and a paragraph for each of its capabilities."""
    members = ("name", "version", "status", "description", "phases", "permissions", "deterministic")
    ways = ("resources", "mode", "preload", "workers", "service", "purged_on")  # a broken one has none of them
    said = ((name, detail.get(name)) for name in members + ways)
    print_table(("", ""), ((name, _shown(value)) for name, value in said if _says(value)))
    _print_findings(detail)
    for name, capability in detail["details"].items():
        say(f"\ncapability {name}", "bold")
        told = _told(capability, detail["scratch"])
        print_table(("", ""), ((member, _shown(value)) for member, value in told if _says(value)))


def _told(capability: dict[str, Any], scratch: dict[str, dict[str, Any]]) -> "Iterator[tuple[str, Any]]":
    """Those members of a capability that say something, the most telling first. `scratch` has the places by tier."""
    memory, rights = capability["memory"], capability["rights"]
    yield "about", capability["description"]
    yield "runner", capability["runner"]
    yield from ((name, capability[name]) for name in ("method", "url") if capability["url"])
    yield "command", shlex.join(capability["argv"])
    yield "phases", capability["phases"]
    yield "timeout", f"{capability['timeout_s']} s"
    yield "memory", f"{memory['profile']}: {memory['soft_mb']} to {memory['hard_mb']} MiB"
    yield from _told_of_memory(capability["measured"])
    place = scratch[memory["tier"]]
    yield "scratch", f"{memory['tier']}: {place['place']}, {place['mb']} MiB a call"
    yield from rights.items()
    yield "payload needs", (capability["input_schema"] or {}).get("required", [])


def _told_of_memory(measured: dict[str, Any] | None) -> "Iterator[tuple[str, str]]":
    """What its calls needed, and what each degradation step bought."""
    if not measured or not measured["measured_calls"]:
        return
    figures = f"median {measured['median_mb']}, p95 {measured['p95_mb']}, most {measured['peak_mb']} MiB"
    yield "measured", f"{figures}, of the last {measured['measured_calls']} calls"
    yield "reserves", f"{measured['reserved_mb']} MiB ({measured['basis']})"
    for step in measured["degradation"]:
        if step["calls"]:
            medians = f"median {step['median_with_mb']} MiB, without {step['median_without_mb'] or 'unknown'}"
            alike = f"; {step['saved_mb']} MiB less for the same payload" if step["payloads"] else ""
            yield step["step"], f"in force of {step['calls']} calls: {medians}{alike}"


def _says(value: Any) -> bool:  # noqa: ANN401
    return value not in ("", None, [], {})


def _shown(value: Any) -> str:  # noqa: ANN401
    """A value in a table for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(member)}" for name, member in value.items() if _says(member))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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
    if overlays:
        verdicts = [_verdict_on(registry, settings, given) for given in overlays]
    else:
        verdicts = [_verdict(entry) for entry in registry.entries()]
    if as_json:
        print_json({"overlays": verdicts})
    else:
        for verdict in verdicts:
            _print_verdict(verdict)
    if not all(verdict["ok"] for verdict in verdicts):
        raise typer.Exit(Exit.FAILED)


def _verdict_on(registry: "Registry", settings: Settings, given: str) -> dict[str, Any]:
    """That of what was named; a name of nothing fails by itself, and the others are still checked."""
    try:
        return _verdict(_find(registry, settings, given))
    except (NotFoundError, OperatorError) as error:
        unknown = {"name": given, "ok": False, "version": None, "error": error.detail}
        return unknown | {"faults": [], "warnings": [], "links": []}


def _find(registry: "Registry", settings: Settings, given: str) -> "Entry":
    """What was named. A text with a slash is a path, and so is one that only leads to a folder."""
    if "/" not in given:
        try:
            return _named(registry, given)
        except NotFoundError:
            if not Path(given).is_dir():
                raise
    return _at(Path(os.path.abspath(given)), settings)  # noqa: PTH100  # resolve() would give the name of a link's target


def _at(folder: Path, settings: Settings) -> "Entry":
    """An overlay outside the folder of overlays. Raises `OperatorError` where there is no folder."""
    from bus.manifests import NAME, ManifestError
    from bus.overlays import Entry

    if not folder.is_dir():
        raise _no_folder(folder)
    if not NAME.fullmatch(folder.name):
        fault = Fault("folder", repr(folder.name), f"a name that matches {NAME.pattern}")
        return Entry(folder.name, folder, error=ManifestError(folder.name, [fault]))
    return open_registry(settings, folder.parent).entry(folder.name)


def _no_folder(path: Path) -> OperatorError:
    return OperatorError("ERR_FILES", f"there is no folder {path}", hint="Give the path of an overlay's folder.")


def _verdict(entry: "Entry") -> dict[str, Any]:
    summary = entry.summary()
    members = ("version", "error", "faults", "warnings", "links")
    return {"name": summary["name"], "ok": entry.error is None} | {name: summary[name] for name in members}


def _print_verdict(verdict: dict[str, Any]) -> None:
    out().print(mark("ok" if verdict["ok"] else "fail"), printable(verdict["name"]), soft_wrap=True)
    _print_findings(verdict)


def _print_findings(found: dict[str, Any]) -> None:
    """The faults, warnings and links of a verdict or of an overlay's detail, and what was found of its memory."""
    faults = [str(Fault(**fault)) for fault in found["faults"]] or list(filter(None, [found["error"]]))
    for kind, texts, style in (
        ("fault", faults, "red"),
        ("warning", found["warnings"], "yellow"),
        ("link", found["links"], "dim"),
        ("memory", found.get("findings", []), "yellow"),
    ):
        for text in texts:
            say(f"  {kind:7}  {text}", style)


class Kind(enum.StrEnum):
    """What a new overlay is: a program for each call or for many, a service that runs by itself or by the bus."""

    PROC = "proc"
    WORKER = "worker"
    HTTP = "http"
    SERVICE = "service"


@app.command()
def new(
    ctx: typer.Context,
    *,
    name: Name,
    runner: Annotated[
        Kind,
        typer.Option(
            parser=one_of(Kind),
            metavar="proc|worker|http|service",
            help="A program for each call, one for many, an HTTP service that is there, or one that the bus starts.",
        ),
    ] = Kind.PROC,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Where it goes; default: the folder of overlays.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            parser=whole(1, 65535),
            metavar="N",
            help=f"Port of the service (http only); default: the first from {_FIRST_PORT} that no overlay uses.",
        ),
    ] = None,
    as_json: AsJson = False,
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
        templates.write(draft, templates.overlay_files(name, runner.value, port or _free_port(registry)))
        made = registry.add(draft)
    if as_json:
        _print_entry(made)
        return
    shown = os.path.relpath(made.folder)
    say(f"made {shown}", "green")
    say(f"its test:  python3 {shlex.quote(f'{shown}/{templates.path_of_test(name)}')}")
    if runner is Kind.HTTP:
        say(f"start it:  python3 {shlex.quote(f'{shown}/service.py')}")
    if folder is None:
        say(f"call it:   aal invoke {name} text='two words'")


def _free_port(registry: "Registry") -> int:
    """The first port from `_FIRST_PORT` on that no manifest has its service on."""
    manifests = [entry.manifest for entry in registry.entries() if entry.manifest]
    urls = {offered.url for manifest in manifests for offered in manifest.capabilities.values() if offered.url}
    used = {urlsplit(url).port for url in urls}
    return next(port for port in itertools.count(_FIRST_PORT) if port not in used)


def _print_entry(entry: "Entry") -> None:
    """An overlay that was made or added, for programs: `path` is where it lies."""
    print_json(entry.summary() | {"path": str(entry.folder)})


@app.command()
def add(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An overlay's folder.")],
    as_json: AsJson = False,
) -> None:
    """Copy an overlay's folder in; one with faults is refused.

    Example: aal overlays add ../elsewhere/my-tool
    """
    source = Path(os.path.abspath(path))  # noqa: PTH100  # as in _find
    if not source.is_dir():
        raise _no_folder(source)
    entry = _registry(ctx).add(source)
    if as_json:
        _print_entry(entry)
    else:
        say(f"added {entry.name}", "green")


@app.command()
def enable(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Let calls through again.

    Example: aal overlays enable my-tool
    """
    _registry(ctx).enable(name)
    _print_switched(name, as_json, enabled=True)


@app.command()
def disable(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Refuse calls from now on, after restarts too.

    Example: aal overlays disable my-tool
    """
    _registry(ctx).disable(name)
    _print_switched(name, as_json, enabled=False)


@app.command()
def purge(
    ctx: typer.Context,
    *,
    name: Name,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where the server is; default: the one that serves this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have a running server tell an overlay's workers and service to let go of their caches.

    One that has a call is told once it has answered. AAL_TOKEN is the server's token, where it needs one.

    Example: aal overlays purge my-model
    """
    from bus import remote

    address = url or remote.address_of(workplace(ctx).settings().state)
    answer = remote.purge(address, name, os.environ.get(TOKEN) or None)
    if as_json:
        print_json(answer)
        return
    told: dict[str, int] = answer.get("told", {})
    reached = ", ".join(f"{count} of the runner {runner}" for runner, count in told.items())
    say(f"told {name}: {reached or 'nothing of it runs that could be told'}", "green" if reached else "yellow")


def _print_switched(name: str, as_json: bool, *, enabled: bool) -> None:
    if as_json:
        print_json({"name": name, "enabled": enabled})
    else:
        say(f"{'enabled' if enabled else 'disabled'} {name}", "green")


@app.command()
def remove(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Move an overlay away; nothing is deleted.

    Example: aal overlays remove my-tool
    """
    settings = workplace(ctx).settings()
    registry = open_registry(settings)
    entry = _named(registry, name)
    moved = _move_away(registry, settings, entry)
    if as_json:
        print_json({"name": entry.summary()["name"], "path": str(moved)})
        return
    say(f"removed {entry.name}; it lies in {moved}", "green")
    if entry.error is None:
        say(f"bring it back:  aal overlays add {shlex.quote(os.path.relpath(moved))}")


def _move_away(registry: "Registry", settings: Settings, entry: "Entry") -> Path:
    """Remove an overlay, or a folder that can be none for its name; gives the path where it lies now."""
    from bus.manifests import NAME
    from bus.overlay_files import locked, move_out

    if NAME.fullmatch(entry.name):
        return registry.remove(entry.name)
    with locked(settings.state):
        return move_out(entry.folder, settings.state)


@app.command()
def logs(
    ctx: typer.Context,
    *,
    name: Name,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes, until Ctrl-C.")] = False,
    count: Annotated[int, typer.Option("-n", parser=whole(0), metavar="N", help="How many lines to begin with.")] = 100,
    as_json: AsJson = False,
) -> None:
    """What an overlay's programs wrote to stderr, the last lines, and its service to stdout; --json: one object a line.

    The file is logs/overlays/NAME.log. At 1 MiB it becomes NAME.log.1, in place of the one before.

    Example: aal overlays logs my-service -f
    """
    from runners.logs import LogReader, path_of

    settings = workplace(ctx).settings()
    entry = _named(open_registry(settings), name)
    path = path_of(settings.overlay_logs, entry.name)
    with LogReader(path) as reader:
        lines = reader.last(count)
        if not lines and not path.exists() and not as_json:
            say(f"{entry.name} has no log yet; none of its programs has written to stderr", "dim")
        _print_log(lines, as_json)
        with contextlib.suppress(KeyboardInterrupt):
            while follow:
                sys.stdout.flush()
                time.sleep(_FOLLOW_S)
                _print_log(reader.more(), as_json)


def _print_log(lines: "Iterable[bytes]", as_json: bool) -> None:
    """Lines of a log; for programs as `{"time": RFC 3339, "text": ...}`."""
    for line in lines:
        text = line.decode("utf-8", "replace")
        if as_json:
            moment, _, said = text.partition(" ")
            print_json({"time": moment, "text": said})
        else:
            sys.stdout.write(printable(text) + "\n")
