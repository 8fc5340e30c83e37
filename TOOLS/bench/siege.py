"""What honest clients keep beside hostile ones.

In each round the same honest clients are measured three times, on a worker overlay and on GET /: alone, beside as many
honest clients more, and beside as many hostile ones (`hostile.py`). Beside others they share the server, and the cores
with those who send; so what they keep is taken of what they have beside honest ones, which is their fair share. The
server has a token, which honest clients send, and those hostile ones too whose harm comes after it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from hostile import KINDS
from hostile import Siege as Against
from layout import PARTS, BenchError, environment, lay_out
from load import Job
from servers import Servers
from soak import part, tallies
from targets import BODY, ECHOED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

KEEPS = 0.8
"""The share of their fair share that honest clients must keep."""
CLIENT_TIMEOUT_S = 2
"""What the server gives a client for its request: so short that slow ones come again within a measurement."""
WARMUP_S = 0.5
SLACK_S = 60.0
WORKER, ROOT = "/invoke/echo_worker", "/"
ALONE, FAIR, BESIEGED = "alone", "fair", "besieged"


@dataclass(frozen=True, slots=True)
class SiegePlan:
    """The length of one measurement, the rounds, and the clients of each half."""

    seconds: float
    runs: int
    connections: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one path: calls a second of the honest half, as medians over the rounds; `of_fair` and `of_alone` are shares.

    A share is the median of those within each round.
    """

    path: str
    alone: float
    fair: float
    besieged: float
    of_fair: float
    of_alone: float


@dataclass(frozen=True, slots=True)
class SiegeFound:
    """What one siege found. `hostile` are the counts of its clients; `held` where all honest ones kept their share."""

    plan: SiegePlan
    kept: tuple[Kept, ...]
    hostile: Mapping[str, Mapping[str, int]]
    errors: int
    first_error: str | None

    @property
    def idle(self) -> list[str]:
        """The kinds of hostile clients that did nothing: then it was no siege of that kind."""
        asked = list(KINDS)[: self.plan.connections]
        return [kind for kind in asked if not any(self.hostile.get(kind, {}).values())]

    @property
    def held(self) -> bool:
        return not self.errors and not self.idle and all(kept.of_fair >= KEEPS for kept in self.kept)


@dataclass(slots=True)
class _Run:
    """One siege while it is measured."""

    plan: SiegePlan
    servers: Servers
    token: str
    rates: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    hostile: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})
    errors: int = 0
    first_error: str | None = None

    def job(self, path: str, seconds: float) -> Job:
        method, body, must = ("GET", "", '"status":"ok"') if path == ROOT else ("POST", BODY, ECHOED)
        port, connections = self.servers.ports["bus"], self.plan.connections
        return Job(port, [path], body, connections, seconds, WARMUP_S, 200, must, method, token=self.token)

    def measure(self, path: str, beside: str) -> None:
        others: Mapping[str, Callable[[str], AbstractContextManager[None]]] = {
            ALONE: lambda _: contextlib.nullcontext(),
            FAIR: self._honest,
            BESIEGED: self._hostile,
        }
        with others[beside](path):
            [tally] = tallies(self.job(path, self.plan.seconds), self.servers.folder)
        self.rates.setdefault((path, beside), []).append(tally["calls"] / tally["seconds"])
        self.errors += tally["errors"]
        self.first_error = self.first_error or tally["first_error"]

    @contextlib.contextmanager
    def _honest(self, path: str) -> Iterator[None]:
        """As many honest clients more, for longer than any measurement."""
        job = self.job(path, self.plan.seconds + SLACK_S)
        with part("load.py", self.servers.folder) as load:
            _stdin(load, json.dumps(asdict(job)), close=True)
            yield

    @contextlib.contextmanager
    def _hostile(self, _: str) -> Iterator[None]:
        against = Against(self.servers.ports["bus"], WORKER, self.token, self.plan.connections)
        with part("hostile.py", self.servers.folder) as besiegers:
            _stdin(besiegers, json.dumps(asdict(against)) + "\n", close=False)
            if _line(besiegers) != "begun\n":
                raise BenchError("the hostile clients do not begin")
            yield
            _stdin(besiegers, "", close=True)
            counts: dict[str, dict[str, int]] = json.loads(_line(besiegers))
        for kind, outcomes in counts.items():
            self.hostile[kind].update(outcomes)

    def found(self) -> SiegeFound:
        paths = dict.fromkeys(path for path, _ in self.rates)
        hostile = {kind: dict(outcomes) for kind, outcomes in self.hostile.items()}
        return SiegeFound(self.plan, tuple(map(self._kept, paths)), hostile, self.errors, self.first_error)

    def _kept(self, path: str) -> Kept:
        alone, fair, besieged = (self.rates[path, beside] for beside in (ALONE, FAIR, BESIEGED))
        return Kept(
            path,
            statistics.median(alone),
            statistics.median(fair),
            statistics.median(besieged),
            of_fair=_median_share(besieged, fair),
            of_alone=_median_share(besieged, alone),
        )


def run_siege(plan: SiegePlan, folder: Path, say: Callable[[str], None]) -> SiegeFound:
    """Start a bus and besiege it; `say` gets a line at every round. Raises `BenchError`."""
    lay_out(folder, ["worker"], service_port=9)  # no call goes to the HTTP overlay
    token = make_token(folder)
    with Servers(folder, settings={"AAL_CLIENT_TIMEOUT_S": str(CLIENT_TIMEOUT_S)}) as servers:
        servers.start(["bus"])
        siege = _Run(plan, servers, token)
        for number in range(plan.runs):
            for path in (WORKER, ROOT):
                for beside in (ALONE, FAIR, BESIEGED):
                    siege.measure(path, beside)
            say(f"round {number + 1} of {plan.runs}: {_last(siege)}")
            if servers.processes["bus"].poll() is not None:
                raise BenchError(f"the bus has ended:\n{servers.said('bus')}")
    return siege.found()


def make_token(folder: Path) -> str:
    """A token of the bus of this folder, by its own command. Raises `BenchError`."""
    command = [sys.executable, "-m", "bus.cli", "-C", str(folder), "token", "create", "--name", "bench", "--json"]
    env = environment(folder) | {"PYTHONPATH": str(PARTS.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=SLACK_S)
    if done.returncode:
        raise BenchError(f"no token:\n{done.stderr}")
    return str(json.loads(done.stdout)["token"])


def _median_share(of: list[float], whole: list[float]) -> float:
    shares = [part / all_ if all_ else 0.0 for part, all_ in zip(of, whole, strict=True)]
    return statistics.median(shares)


def _last(siege: _Run) -> str:
    return ", ".join(f"{path} {beside} {rates[-1]:,.0f}/s" for (path, beside), rates in siege.rates.items())


def _stdin(program: subprocess.Popen[str], text: str, *, close: bool) -> None:
    assert program.stdin is not None
    program.stdin.write(text)
    program.stdin.flush()
    if close:
        program.stdin.close()


def _line(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    line: str = program.stdout.readline()
    return line
