"""A soak: a steady rate of a mix of calls for a long time, and what the bus takes meanwhile.

The mix is one call each in turn of a Python script, a C program (where there is a compiler), a worker and an HTTP
service. The rate is the given one, or the highest that holds: the closed loop says how many calls a second the bus does
at most; then shares of that are tried from the top, and the first is taken that holds: no error, all calls answered in
time, and half of them no later than in the closed loop (calls that pile up would wait longer).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import tree
from flat import Flatness, flatness
from layout import PARTS, BenchError, environment, has_cc, lay_out
from load import Job
from servers import Servers, free_port
from targets import BODY, ECHOED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONNECTIONS = 16
WARMUP_S = 1.0
TRY_S = 5.0
"""How long each rate of the ramp is tried; no more than a tenth of the soak."""
SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
KEEPS_UP = 0.98
"""The share of the calls due that must be answered before the end: some are always under way then."""
END_S = 10.0


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """How long, how often a line is printed, and at which rate: calls a second, None for the highest that holds."""

    seconds: float
    every_s: float
    rate: float | None = None

    @property
    def try_s(self) -> float:
        return min(TRY_S, self.seconds / 10)


@dataclass(frozen=True, slots=True)
class Moment:
    """One interval: its calls, and the tree of the bus at its end, `at_s` after the start."""

    at_s: float
    calls: int
    errors: int
    first_error: str | None
    p50_ms: float | None
    p99_ms: float | None
    tree: tree.Tree


@dataclass(frozen=True, slots=True)
class Soak:
    """What one soak found. `held` where nothing failed, the bus kept up, and all that must be flat is."""

    mix: tuple[str, ...]
    rate: float
    seconds: float
    moments: tuple[Moment, ...]
    flat: tuple[Flatness, ...]
    keeps_up: bool
    held: bool

    @property
    def calls(self) -> int:
        return sum(moment.calls for moment in self.moments)

    @property
    def errors(self) -> int:
        return sum(moment.errors for moment in self.moments)


def run_soak(plan: SoakPlan, folder: Path, say: Callable[[str], None]) -> Soak:
    """Start a bus and hold it under load; `say` gets a line of text at every step. Raises `BenchError`."""
    programs = [name for name in ("python", "c", "worker") if name != "c" or has_cc()]
    mix = (*programs, "http")
    with Servers(folder) as servers:
        servers.ports["http-service"] = free_port()
        lay_out(folder, programs, servers.ports["http-service"])
        servers.start(["http-service", "bus"])
        rate = plan.rate or find_rate(mix, plan.try_s, servers, say)
        say(f"{', '.join(mix)}: {rate:,.0f} calls a second for {plan.seconds / 60:g} min")
        say(HEADER)
        moments = []
        for moment in watch(job_of(mix, servers, plan.seconds, rate=rate, every_s=plan.every_s), servers):
            say(line_of(moment))
            moments.append(moment)
    flat = flatness([moment.tree for moment in moments])
    keeps_up = sum(moment.calls for moment in moments) >= KEEPS_UP * rate * plan.seconds
    held = keeps_up and not any(moment.errors for moment in moments) and all(found.is_flat for found in flat)
    return Soak(mix, rate, plan.seconds, tuple(moments), flat, keeps_up, held)


def find_rate(mix: tuple[str, ...], try_s: float, servers: Servers, say: Callable[[str], None]) -> float:
    """The highest rate that holds, in calls a second. Raises `BenchError` where not even the lowest share does."""
    [most] = tallies(job_of(mix, servers, try_s), servers.folder)
    highest: float = most["calls"] / most["seconds"]
    figures = f"{highest:,.0f} calls a second, {most['errors']} errors, p50 {most['p50_ms']} ms"
    say(f"closed loop, {CONNECTIONS} connections: {figures}")
    for share in SHARES if highest else ():
        rate = highest * share
        [tried] = tallies(job_of(mix, servers, try_s, rate=rate), servers.folder)
        answered: float = tried["calls"] / tried["seconds"]
        say(f"at {rate:,.0f}: {answered:,.0f} answered, {tried['errors']} errors, p50 {tried['p50_ms']} ms")
        if not tried["errors"] and answered >= KEEPS_UP * rate and tried["p50_ms"] <= most["p50_ms"]:
            return rate
    raise BenchError(f"no rate holds; the first error of the closed loop: {most['first_error']}")


def job_of(
    mix: tuple[str, ...], servers: Servers, seconds: float, *, rate: float | None = None, every_s: float | None = None
) -> Job:
    """A soak counts from its first call; a trial has a warm-up."""
    paths = [f"/invoke/echo_{name}" for name in mix]
    warmup_s = 0.0 if every_s else WARMUP_S
    return Job(
        servers.ports["bus"], paths, BODY, CONNECTIONS, seconds, warmup_s, 200, ECHOED, rate=rate, every_s=every_s
    )


def watch(job: Job, servers: Servers) -> Iterator[Moment]:
    """Run the job, and look at the bus each time that the load generator tells of an interval."""
    at_s = 0.0
    for tally in tallies(job, servers.folder):
        at_s += tally["seconds"]
        figures = {name: tally[name] for name in ("calls", "errors", "first_error", "p50_ms", "p99_ms")}
        if servers.processes["bus"].poll() is not None:
            raise BenchError(f"the bus has ended:\n{servers.said('bus')}")
        yield Moment(at_s, **figures, tree=tree.look(servers.pid("bus")))


def tallies(job: Job, folder: Path) -> Iterator[dict[str, Any]]:
    """What the load generator says, as it says it. It ends with whoever stops reading."""
    with part("load.py", folder) as load:
        assert load.stdin is not None
        assert load.stdout is not None
        load.stdin.write(json.dumps(asdict(job)))
        load.stdin.close()
        for line in load.stdout:
            yield json.loads(line)
        if load.wait(END_S):
            raise BenchError(f"the load generator failed with exit status {load.returncode}")


@contextlib.contextmanager
def part(source: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A program of the benchmark's own, spoken to over its pipes; it is ended with the block."""
    argv = [sys.executable, str(PARTS / source)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=environment(folder)) as program:
        try:
            yield program
        finally:
            program.kill()


HEADER = "  time s    calls  errors   p50 ms   p99 ms  bus RSS MB  tree PSS MB  fds  tree fds  processes"


def line_of(moment: Moment) -> str:
    now = moment.tree
    return (
        f"{moment.at_s:8.1f} {moment.calls:8} {moment.errors:7} {_ms(moment.p50_ms)} {_ms(moment.p99_ms)}"
        f" {now.rss_mb:11.1f} {'-' if now.pss_mb is None else format(now.pss_mb, '.1f'):>12} {now.fds:4}"
        f" {'-' if now.tree_fds is None else now.tree_fds:>9} {now.processes:10}"
    )


def _ms(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.2f}"
