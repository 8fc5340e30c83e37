"""Many calls that really take memory, and too little for all of them: how fast, and how many are killed, by policy.

The same calls in the same order go to the same bus with the same overlay (`allocator.py`), one policy after the other,
under the same referee (`referee.py`), which kills the largest process whenever all together pass the limit:

    the bus          admission by memory, as shipped, with AAL_MEMORY_MB the limit
    N at once        a count and nothing else (AAL_ADMISSION=slots), for several N: what is tuned by hand
    SOFT only        what the overlay declares is reserved, and nothing is limited or learned: Ray's rule for `memory`
                     (docs.ray.io, "Memory Management": "does not impose any limits on memory usage"); of one overlay
                     that is a count, limit / SOFT
    the ancestor     40 at once, the threads of its web framework: its rule sets flags and holds nothing back
    no admission     all at once
    an oracle        knows each call's size before, and starts what fits, high priority first: what could be had

Sizes are heavy-tailed (bounded Pareto) and come in batches, as documents do: a Markov chain between light calls and
heavy ones. A call that was killed is sent again by its client; one in ten has a high priority and a deadline, after
which its client gives up.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
from layout import PARTS, BenchError, environment, make_python, write_overlay
from load import Job
from referee import Rule, Seen
from servers import Servers
from soak import tallies
from targets import BODY, ECHOED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SMALLEST_MB, LARGEST_MB, SOFT_MB, HARD_MB = 20, 400, 128, 512
ALPHA = 1.5
"""Of the bounded Pareto distribution of light calls."""

HEAVY_MB = (150, LARGEST_MB)
TURN_HEAVY, TURN_LIGHT = 0.025, 0.1
"""The chances that a heavy batch begins with the next call, and that it ends: every fifth call is in one."""

HOLD_S, HOLD_SIGMA = 2.0, 0.5
"""The median and the spread (lognormal) of how long a call holds its memory."""

BURST, BURST_EVERY_S = 25, 1.0
"""Calls that come at once, and seconds from one such burst to the next."""

DEADLINE_S, PATIENCE_S = 15.0, 600.0
"""What calls of high priority are given, and all others."""

OWN_MB = 12
"""What the interpreter of a call takes beside, which an oracle knows as well."""

TRIES = 50
ROUNDS, ROUND_S = 3, 3.0
"""Of the script that declares too much: how often, and how long each way."""

RUNE = f"MEM[SOFT={SOFT_MB},HARD={HARD_MB},VOL=LOW];PRIORITY="
HIGH, ORDINARY = 9, 5


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How many calls share how much memory, and the seed of all that is drawn."""

    calls: int = 200
    limit_mb: int = 2048
    seed: int = 1
    counts: tuple[int, ...] = (5, 6, 8, 12)


@dataclass(frozen=True, slots=True)
class Policy:
    """What is between the calls and the memory. `count` None: the bus's own rule; `knows`: clients hold calls back."""

    name: str
    count: int | None = None
    knows: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    at_s: float
    mb: int
    hold_s: float
    high: bool


@dataclass(slots=True)
class Run:
    """What became of the calls under one policy. `codes` counts the answers; `lost` never had a good one."""

    policy: Policy
    seconds: float = 0.0
    done: int = 0
    lost: int = 0
    late: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)

    @property
    def rate(self) -> float:
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def killed(self) -> int:
        return len(self.seen.kills)

    def wait_s(self, share: float) -> float:
        """The nearest-rank percentile of the time from a call's arrival to its good answer, less what it held."""
        ordered = sorted(self.waits_s)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass(frozen=True, slots=True)
class Declared:
    """A small script that declares far too much: its calls a second with admission by memory and by slots, by round."""

    by_memory: tuple[float, ...]
    by_slots: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.by_memory, self.by_slots, strict=True))


@dataclass(frozen=True, slots=True)
class MemoryFound:
    plan: MemoryPlan
    runs: tuple[Run, ...]
    declared: Declared

    @property
    def ours(self) -> Run:
        return next(run for run in self.runs if run.policy.name == OURS.name)

    @property
    def best_rival(self) -> Run | None:
        """The fastest that loses no more than ours: the oracle is no rival."""
        ours = self.ours
        rivals = [run for run in self.runs if run.policy.count is not None and not run.policy.knows]
        fair = [run for run in rivals if run.killed <= ours.killed and run.lost <= ours.lost]
        return max(fair, key=lambda run: run.rate, default=None)

    @property
    def ratio(self) -> float | None:
        return None if self.best_rival is None else self.ours.rate / self.best_rival.rate

    @property
    def held(self) -> bool:
        """The goals: at most one in a hundred killed, none lost, none of high priority late, 1.5 times the best."""
        ours = self.ours
        return (
            ours.killed <= self.plan.calls / 100
            and not ours.lost
            and not ours.late
            and self.ratio is not None
            and self.ratio >= GOAL
            and self.declared.ratio >= GOAL_DECLARED
        )


OURS = Policy("the bus")
GOAL, GOAL_DECLARED = 1.5, 0.8

FAR_TOO_MUCH = "MEM[SOFT=2048,HARD=4096,VOL=MED]"
"""What the script declares that has 9 MB, where overlays may have `MemoryPlan.limit_mb` altogether."""

LEARNING = 20
"""Its first calls, which are not measured."""


def policies(plan: MemoryPlan) -> list[Policy]:
    return [
        OURS,
        *(Policy(f"{count} at once", count) for count in plan.counts),
        Policy(f"SOFT only ({plan.limit_mb // SOFT_MB})", plan.limit_mb // SOFT_MB),
        Policy("the ancestor (40)", 40),
        Policy("no admission", plan.calls),
        Policy("an oracle", plan.calls, knows=True),
    ]


def calls_of(plan: MemoryPlan) -> list[Call]:
    """The calls, in the order in which they come."""
    draw = random.Random(plan.seed)
    found, heavy = [], False
    for number in range(plan.calls):
        heavy = draw.random() >= TURN_LIGHT if heavy else draw.random() < TURN_HEAVY
        mb = round(draw.uniform(*HEAVY_MB)) if heavy else round(_pareto_mb(draw))
        high = number % 10 == 9  # noqa: PLR2004
        found.append(Call(number // BURST * BURST_EVERY_S, mb, draw.lognormvariate(math.log(HOLD_S), HOLD_SIGMA), high))
    return found


def _pareto_mb(draw: random.Random) -> float:
    """A bounded Pareto variate, by inversion."""
    low, high = SMALLEST_MB**ALPHA, LARGEST_MB**ALPHA
    u = draw.random()
    return float((-(u * high - u * low - high) / (high * low)) ** (-1 / ALPHA))


def run_memory(plan: MemoryPlan, folder: Path, progress: Callable[[str], None]) -> MemoryFound:
    calls = calls_of(plan)
    sizes = sorted(call.mb for call in calls)
    progress(f"{plan.calls} calls of {sizes[0]} to {sizes[-1]} MiB, {sum(sizes) / len(sizes):.0f} in the mean")
    progress(f"{plan.limit_mb} MiB to share, seed {plan.seed}")
    make_python(folder)
    home = write_overlay(
        folder,
        "allocator",
        {"proc": {"command": ["python3", "run.py"]}},
        {"runner": "proc", "timeout_s": PATIENCE_S, "idempotent": True},
        memory=f"{RUNE}{ORDINARY}",
    )
    (home / "run.py").write_text((PARTS / "allocator.py").read_text())
    runs = []
    for policy in policies(plan):
        run = _run(plan, policy, calls, folder)
        progress(line_of(run))
        runs.append(run)
    declared = _run_declared(plan, folder)
    progress(f"{'':>20}  {_of_declared(declared)}")
    return MemoryFound(plan, tuple(runs), declared)


def _run_declared(plan: MemoryPlan, folder: Path) -> Declared:
    entrypoints = {"proc": {"command": ["python3", "run.py"]}}
    home = write_overlay(folder, "careless", entrypoints, {"runner": "proc"}, memory=FAR_TOO_MUCH)
    (home / "run.py").write_text((PARTS / "echo.py").read_text())
    rates: dict[str, list[float]] = {"memory": [], "slots": []}
    for number in range(ROUNDS):
        for admission, found in rates.items():
            logs = str(folder / "logs" / f"careless-{admission}-{number}")
            settings = {"AAL_ADMISSION": admission, "AAL_MEMORY_MB": str(plan.limit_mb), "AAL_LOGS": logs}
            with Servers(folder, settings=settings) as servers:
                servers.start(["bus"])
                asyncio.run(_learn(servers.url("bus", "/invoke/careless")))
                job = Job(servers.ports["bus"], ["/invoke/careless"], BODY, 16, ROUND_S, 0.5, 200, ECHOED)
                [tally] = tallies(job, folder)
                found.append(tally["calls"] / tally["seconds"])
    return Declared(tuple(rates["memory"]), tuple(rates["slots"]))


async def _learn(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(LEARNING):
            async with session.post(url, data=BODY, headers={"Content-Type": "application/json"}) as response:
                if response.status != 200:  # noqa: PLR2004
                    raise BenchError(f"a call of the careless overlay failed: {await response.text()}")


def line_of(run: Run) -> str:
    used_mb = run.seen.mb_s / run.seen.seconds if run.seen.seconds else 0.0
    return (
        f"{run.policy.name:>20}: {run.rate:6.2f} calls/s  {run.seconds:6.1f} s  killed {run.killed:4}  "
        f"lost {run.lost:3}  late {run.late:3}  p50 {run.wait_s(0.5):6.1f} s  p99 {run.wait_s(0.99):6.1f} s  "
        f"memory {used_mb:5.0f} mean, {run.seen.peak_mb:5.0f} MiB peak"
    )


def _run(plan: MemoryPlan, policy: Policy, calls: Sequence[Call], folder: Path) -> Run:
    settings = {"AAL_QUEUE_LIMIT": "1000", "AAL_LOGS": str(folder / "logs" / policy.name.replace(" ", "-"))}
    if policy.count is None:
        settings |= {"AAL_MEMORY_MB": str(plan.limit_mb)}
    else:
        settings |= {"AAL_ADMISSION": "slots", "AAL_SLOTS": str(policy.count)}
    with Servers(folder, settings=settings) as servers:
        servers.start(["bus"])
        with subprocess.Popen(
            [sys.executable, str(PARTS / "referee.py")],
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as referee:
            assert referee.stdin is not None
            referee.stdin.write(json.dumps(asdict(Rule(servers.pid("bus"), plan.limit_mb))) + "\n")
            referee.stdin.flush()
            run = asyncio.run(_Clients(plan, policy, servers.url("bus", "/invoke/allocator")).send(calls))
            said, _ = referee.communicate()
    if not said:
        raise BenchError("the referee ended before its time")
    run.seen = Seen(**json.loads(said))
    return run


class _Clients:
    """One client a call, which sends it again where it was killed."""

    def __init__(self, plan: MemoryPlan, policy: Policy, url: str) -> None:
        self._url = url
        self._run = Run(policy)
        self._free_mb = plan.limit_mb if policy.knows else math.inf
        self._first = 0
        """How many of high priority are held back."""
        self._changed = asyncio.Condition()

    async def send(self, calls: Sequence[Call]) -> Run:
        began = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(self._send(session, call) for call in calls))
        self._run.seconds = time.monotonic() - began
        return self._run

    async def _send(self, session: aiohttp.ClientSession, call: Call) -> None:
        await asyncio.sleep(call.at_s)
        came = time.monotonic()
        await self._hold_back(call)
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(0.1 + 0.1 * attempt)
            answer = await self._post(session, call, came)
            self._run.codes[answer["code"]] += 1
            if answer["ok"]:
                self._run.done += 1
                self._run.waits_s.append(time.monotonic() - came - call.hold_s)
                break
            if not answer["retryable"] or _left_s(call, came) <= 0:
                self._run.lost += 1
                break
        else:
            self._run.lost += 1
        self._run.late += call.high and _left_s(call, came) < 0
        await self._let_go(call)

    async def _post(self, session: aiohttp.ClientSession, call: Call, came: float) -> dict[str, Any]:
        body = {
            "phase": "OPEN",
            "data": {"mb": call.mb, "hold_s": call.hold_s},
            "profile": f"{RUNE}{HIGH if call.high else ORDINARY}",
            "timeout_ms": max(1, round(_left_s(call, came) * 1000)),
        }
        try:
            async with session.post(self._url, json=body) as response:
                answer: dict[str, Any] = await response.json()
        except aiohttp.ClientError as error:  # a machine that is this short of memory may drop connections, too
            return {"ok": False, "code": type(error).__name__, "retryable": True}
        return answer

    async def _hold_back(self, call: Call) -> None:
        """What an oracle does: it lets a call go when its memory is there."""
        async with self._changed:
            self._first += call.high
            await self._changed.wait_for(lambda: self._free_mb >= call.mb + OWN_MB and (call.high or not self._first))
            self._first -= call.high
            self._free_mb -= call.mb + OWN_MB
            self._changed.notify_all()  # the others need not wait for this one any more

    async def _let_go(self, call: Call) -> None:
        async with self._changed:
            self._free_mb += call.mb + OWN_MB
            self._changed.notify_all()


def _left_s(call: Call, came: float) -> float:
    """Seconds for which a client still waits."""
    return came + (DEADLINE_S if call.high else PATIENCE_S) - time.monotonic()


def _of_declared(declared: Declared) -> str:
    rates = " and ".join(f"{statistics.median(rates):.0f}" for rates in (declared.by_memory, declared.by_slots))
    said = f"a script of 9 MB that declares {FAR_TOO_MUCH}, after {LEARNING} calls"
    return f"{said}: x {declared.ratio:.2f} of its rate without a memory rule ({rates} calls/s)"


def markdown_memory(found: MemoryFound) -> str:
    """The table for a README."""
    head = "policy | calls a second | killed | lost | late of high priority | p50 / p99 wait, s | memory in use, MiB"
    rows = [
        f"| {run.policy.name} | {run.rate:.2f} | {run.killed} | {run.lost} | {run.late} | "
        f"{run.wait_s(0.5):.1f} / {run.wait_s(0.99):.1f} | {run.seen.mb_s / run.seen.seconds:,.0f} |"
        for run in found.runs
    ]
    plan = found.plan
    says = f"`TOOLS/bench.py --memory --seed {plan.seed}`: {plan.calls} calls of {SMALLEST_MB} to {LARGEST_MB} MiB, "
    says += f"{plan.limit_mb} MiB to share:"
    told = [says, "", f"| {head} |", f"|{' --- |' + ' ---: |' * head.count('|')}", *rows, "", *tell_memory(found)[1:2]]
    return "\n".join([*told, "", _of_declared(found.declared) + ".", ""])


def tell_memory(found: MemoryFound) -> list[str]:
    """The verdict, for people."""
    best, ours = found.best_rival, found.ours
    rival = "no rival loses so few"
    if best is not None:
        rival = f"x {found.ratio:.2f} of {best.policy.name}, the best that loses no more"
    answers = ", ".join(f"{count} {code}" for code, count in ours.codes.most_common())
    return [
        f"{'':>20}  answers of the bus: {answers}",
        f"the verdict: {'held' if found.held else 'NOT held'} ({rival})",
        f"{'':>20}  goals: x {GOAL}, at most 1 % killed, none lost, none of high priority late; x {GOAL_DECLARED}",
    ]
