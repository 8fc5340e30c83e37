"""`aal overlays profile`: what a capability declares of memory against what it needs, by running it."""

# ruff: noqa: PLC0415  # what is slow to import is imported by the command that needs it: `aal --help` stays quick

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bus.console import (
    AsJson,
    Exit,
    complain,
    err,
    one_of,
    out,
    print_json,
    print_table,
    printable,
    say,
    tell,
    whole,
    workplace,
)
from bus.errors import OperatorError, ReplayError
from bus.model import Phase
from bus.settings import Settings
from runners.base import JsonError, parse_json

if TYPE_CHECKING:
    from bus.local import LocalBus
    from bus.model import Capability, Manifest, Record
    from bus.profiling import Run
    from bus.runes import MemoryProfile

RUNS = 20
"""How many runs there are at least where nobody says: from so many on a bus goes by what it measured."""

LOOK_S = 1.2
"""Seconds in which the memory of a process that is kept from call to call is looked at for once."""

_STORED = "Give --payload, or make calls with AAL_DEV_LOG_PAYLOAD=1: then their lines hold their payloads."
_PARAM = "--payload"


CalledPhase = Annotated[
    Phase | None,
    typer.Option(
        parser=one_of(Phase),
        metavar="|".join(Phase),
        help="Default: that of the recorded call; of a payload CLEAR, or the first that there is.",
    ),
]
Payloads = Annotated[
    list[str] | None,
    typer.Option(metavar="JSON|FILE|-", help="A payload, or a file with one, or with one a line; - is stdin."),
]
Recorded = Annotated[
    int | None,
    typer.Option(parser=whole(1), metavar="K", help=f"The last K payloads of the ledger. Default: {RUNS}."),
]
Runs = Annotated[
    int | None,
    typer.Option(
        parser=whole(1), metavar="N", help=f"Runs in all. Default: {RUNS}, or one for each payload if they are more."
    ),
]


class Request(NamedTuple):
    """What one run asks for, and the number of its payload."""

    number: int
    phase: Phase
    payload: Mapping[str, Any]
    seed: str | int | None = None

    def body(self, rune: str | None = None) -> dict[str, Any]:
        """The request; `rune` in place of what the capability declares."""
        options = {"seed": self.seed, "profile": rune}
        body = {"phase": self.phase.value, "data": self.payload}
        return body | {name: value for name, value in options.items() if value is not None}


class Target(NamedTuple):
    """What is measured."""

    manifest: "Manifest"
    capability: "Capability"

    @property
    def is_kept(self) -> bool:
        """Whether its process serves call after call: its memory is looked at once a second, and never falls back."""
        return self.capability.runner == "http" or self.manifest.mode == "worker"


def profile(
    ctx: typer.Context,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The overlay's name.")],
    capability: Annotated[str | None, typer.Option(metavar="NAME", help="Needed where it has several.")] = None,
    phase: CalledPhase = None,
    payload: Payloads = None,
    recorded: Recorded = None,
    runs: Runs = None,
    live: Annotated[bool, typer.Option("--live", help="Also what could change something.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a capability, one run after the other, and propose the rune that fits what it needs of memory.

    The runs are calls like any others and leave their lines, as do those in which a lower HARD is tried. Before each
    run of a worker or a service there is a second in which its memory is looked at.

    \b
    Exit codes: 0 every run succeeded, 1 a run failed or nothing could be measured,
    2 usage, 3 no recorded payload or not without --live.

    Example: aal overlays profile abraxas --payload '{"prompt": "two words"}' --phase CLEAR
    """
    from bus.local import LocalBus

    settings = workplace(ctx).settings()
    with LocalBus(settings) as bus:
        resolved = bus.registry.resolve(name, capability)
        target = Target(resolved.manifest, resolved.capability)
        _require_ours(target)
        if payload:
            _refuse_both(recorded)
            asked = _given(payload, phase or _mildest(target))
        else:
            asked = _recorded(settings.ledger, target, recorded or RUNS, phase)
        _require_consent(target, asked, live)
        count = runs or max(RUNS, len(asked))
        done = _run_all(bus, target, list(itertools.islice(itertools.cycle(asked), count)))
    report = {"overlay": target.manifest.name, "capability": target.capability.name, "payloads": min(len(asked), count)}
    report |= _report(settings, target, asked, done)
    if as_json:
        print_json(report)
    else:
        _print_report(report, "memory" if target.manifest.shape == "native" else "default_profile")
    _end(report, as_json)


def _require_consent(target: Target, asked: Iterable[Request], live: bool) -> None:
    """Raises `ReplayError` (ERR_NEEDS_LIVE) for what could change something, unless that was allowed."""
    from bus import policy

    for used in dict.fromkeys(request.phase for request in asked):
        if not live and policy.replay_needs_consent(used, deterministic=target.manifest.deterministic):
            told = f"phase {used} may write or exec, and {target.manifest.name} is not declared deterministic"
            raise ReplayError("ERR_NEEDS_LIVE", told)


def _require_ours(target: Target) -> None:
    """Raises `OperatorError` (ERR_NOT_MEASURED) for what nobody here can see."""
    from bus.needs import is_external

    if is_external(*target):
        what = f"{target.manifest.name}.{target.capability.name} is answered by a service that the bus does not start"
        raise OperatorError("ERR_NOT_MEASURED", f"{what}: nothing is seen of its memory, and none is reserved for it")


def _refuse_both(recorded: int | None) -> None:
    if recorded is not None:
        raise typer.BadParameter("give --payload or --recorded, not both", param_hint="--recorded")


def _mildest(target: Target) -> Phase:
    """CLEAR where it can be called so, else the first phase that it can be called in."""
    from bus import policy

    able = [phase for phase in target.capability.phases if policy.PHASES[phase].needs in target.manifest.permissions]
    return Phase.CLEAR if Phase.CLEAR in able or not able else able[0]


# --- What is run -------------------------------------------------------------------------------------------------


def _given(texts: Iterable[str], phase: Phase) -> list[Request]:
    payloads = itertools.chain.from_iterable(map(_payloads, texts))
    asked = [Request(number, phase, payload) for number, payload in enumerate(payloads, 1)]
    if not asked:
        raise typer.BadParameter("there is no payload in it", param_hint=_PARAM)
    return asked


def _payloads(text: str) -> Iterator[Mapping[str, Any]]:
    """One that is written out; else those of a file, which is one JSON object or has one on each line."""
    if text.lstrip().startswith(("{", "[")):
        yield _object(text.encode("utf-8", "surrogateescape"), _shown(text))
        return
    content = _content(text)
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        for number, line in lines:
            yield _object(line, f"line {number} of {_shown(text)}")
    elif lines:
        yield _object(content, _shown(text))


def _is_json(text: bytes) -> bool:
    try:
        parse_json(text)
    except JsonError:
        return False
    return True


def _content(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name.removeprefix("@")).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise typer.BadParameter(f"cannot read {_shown(name)}: {error}", param_hint=_PARAM) from None


def _object(text: bytes, what: str) -> Mapping[str, Any]:
    try:
        value = parse_json(text)
    except JsonError as error:
        raise typer.BadParameter(f"{what} is not JSON: {error}", param_hint=_PARAM) from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{what} is not a JSON object", param_hint=_PARAM)
    return value


def _shown(text: str) -> str:
    return printable(repr(text[:80]))


def _recorded(ledger: Path, target: Target, count: int, phase: Phase | None) -> list[Request]:
    """The last `count` calls of the capability whose lines hold their payload, oldest first, in their own phase."""
    from bus import provenance

    overlay, capability = target.manifest.name, target.capability.name

    def fits(record: "Record") -> bool:
        has_payload = isinstance(record.get("payload"), dict) and record.get("phase") in set(Phase)
        return has_payload and record.get("capability") == capability and phase in (None, record["phase"])

    lines = provenance.tail(ledger, count, overlay=overlay, types=("invoke",), shown=fits)
    if not lines:
        where = f"{overlay}.{capability}" + (f" in phase {phase}" if phase else "")
        raise ReplayError("ERR_NOT_REPLAYABLE", f"the ledger has no call of {where} with its payload", hint=_STORED)
    return [
        Request(number, Phase(line["phase"]), line["payload"], line.get("seed")) for number, line in enumerate(lines, 1)
    ]


def _run_all(bus: "LocalBus", target: Target, asked: Sequence[Request], rune: str | None = None) -> "list[Run]":
    """One after the other, so that no two share a moment. What is kept from call to call is started by one more."""
    from rich.progress import track

    from bus.profiling import Run

    def run(request: Request) -> Run:
        return Run.of(bus.invoke(request.body(rune), target.manifest.name, target.capability.name), request.number)

    console = err()
    if target.is_kept:
        run(asked[0])
    done = []
    for request in track(asked, "measuring", console=console, transient=True, disable=not console.is_terminal):
        if target.is_kept:
            bus.rest(LOOK_S)
        done.append(run(request))
    return done


def _report(settings: Settings, target: Target, asked: Sequence[Request], done: "Sequence[Run]") -> dict[str, Any]:
    """The figures of the runs, with the rune that they propose; a lower HARD has been tried by then."""
    from bus import profiling

    declared = target.capability.memory
    proposed = profiling.proposal(declared, done)
    too_low_mb: list[int] = []
    if proposed is not None:
        chosen = profiling.to_try(done)
        for candidate in profiling.lower_hards(declared, proposed):
            if not chosen or _ends_as_before(settings, target, asked, chosen, candidate):
                break
            too_low_mb.append(candidate.hard_mb)
        if too_low_mb:
            proposed = replace(proposed, hard_mb=min(2 * too_low_mb[-1], declared.hard_mb))
    return profiling.report(declared, done, proposed, too_low_mb)


def _ends_as_before(
    settings: Settings, target: Target, asked: Sequence[Request], before: "Sequence[Run]", profile: "MemoryProfile"
) -> bool:
    """Whether runs of the same payloads end alike under another profile; each in a process that knows no other."""
    from bus import runes
    from bus.local import LocalBus

    requests = [asked[run.payload - 1] for run in before]
    with LocalBus(settings) as bus:
        again = _run_all(bus, target, requests, runes.format(profile))
    return [run.code for run in again] == [run.code for run in before]


# --- What is said ------------------------------------------------------------------------------------------------


def _print_report(report: Mapping[str, Any], member: str) -> None:
    """The figures for people; `member` is what the manifest declares memory by."""
    peak = report["measured"]["peak_mb"]
    head = f"{report['overlay']}.{report['capability']}: {report['runs']} runs, payloads: {report['payloads']}"
    say(f"{head}, declared: {report['declared']['profile'] or report['declared']['rune']}", "bold")
    if peak:
        _print_memory(report, peak)
    times = ((name, report["measured"][f"{name}_ms"]) for name in ("run", "cpu"))
    columns = ("least", "median", "p95", "most")
    rows = [(name, *(figures[column] for column in columns)) for name, figures in times if figures]
    if rows:
        say("")
        print_table(("ms", *columns), rows)
    if report["failures"]:
        say("")
        failed = ((fault["code"], fault["runs"], fault["error"]) for fault in report["failures"])
        print_table(("failed", "runs", "the first said"), failed)
    for note in report["notes"]:
        out().print(printable(f"note: {note}"), style="yellow", soft_wrap=True)
    if report["proposed"]:
        say("\nFor the manifest, in place of what declares its memory there:", "dim")
        say(f'"{member}": "{report["proposed"]["rune"]}"', "green")


def _print_memory(report: Mapping[str, Any], peak: Mapping[str, float]) -> None:
    """What is declared, measured and proposed side by side, and the histogram of the peaks."""
    from bus.profiling import chart

    declared, proposed = report["declared"], report["proposed"]
    measured = {
        "SOFT": f"median {peak['median']:,.1f}, p95 {peak['p95']:,.1f}",
        "HARD": f"most {peak['most']:,.1f}",
        "VOL": f"p95 is {report['measured']['spread']:.2f} x the median",
    }
    members = (("SOFT", "soft_mb"), ("HARD", "hard_mb"), ("VOL", "volatility"))
    rows = ((name, declared[key], measured[name], proposed[key]) for name, key in members)
    print_table(("MiB", "declared", "measured", "proposed"), rows)
    say("")
    marks = {"median": peak["median"], "p95": peak["p95"], "most": peak["most"]}
    marks |= {"SOFT": declared["soft_mb"], "HARD": declared["hard_mb"]}
    print_table(("peak, MiB", "", "runs", ""), chart(report["histogram"], marks))


def _end(report: Mapping[str, Any], as_json: bool) -> None:
    """Raises `typer.Exit` where a run failed or none could be measured."""
    if not report["proposed"]:
        why = "no run was measured to its end" if report["failures"] else "nothing measured the memory of these runs"
        failure = OperatorError("ERR_NOT_MEASURED", f"{report['overlay']}.{report['capability']}: {why}")
        if as_json:
            tell(failure, as_json=True)
        else:
            complain(failure.code, failure.detail, failure.hint)
    if report["failures"] or not report["proposed"]:
        raise typer.Exit(Exit.FAILED)
