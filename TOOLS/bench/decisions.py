"""What one decision of admission costs, in microseconds of CPU.

    python TOOLS/bench/decisions.py [--calls 300] [--json]

1,000 calls wait, of 1, 50 or 1,000 capabilities, for memory, for a slot, or for their capability's concurrency. Then
calls ask and wait, running calls end and others start in their place, claims are looked at anew, and samples come in.
The clock of the admission stands, but for a moment before each step, as it would in a burst.

The time is CPU time of this thread, so what else the machine does counts only by what it does to the caches.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from bus.admission import MARGIN, AdmissionControl, Ticket, Wish  # noqa: E402
from bus.claims import Need  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bus.errors import BusError

Blocked = Literal["memory", "slot", "concurrency"]

WAITING = 1000
RUNNING = 64
CAPABILITIES = (1, 50, 1000)
TOTAL_MB = 65_536.0
CALL_MB = 512.0
LIMIT_US = 50.0
"""What a decision may cost (the goal)."""

PERIOD_S = 1e-4
"""Between two steps, on the clock of the admission."""

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Found:
    """One operation in one situation, in microseconds a call."""

    operation: str
    blocked: Blocked
    capabilities: int
    p50_us: float
    p99_us: float

    @property
    def is_dear(self) -> bool:
        return self.p50_us > LIMIT_US


class Line:
    """An admission with calls that run, `RUNNING` at most, and `WAITING` that wait, all blocked in the same way."""

    def __init__(self, blocked: Blocked, capabilities: int) -> None:
        self.blocked = blocked
        self.capabilities = capabilities
        self.now = 0.0
        self.started: deque[Ticket] = deque()
        self._numbers = itertools.count()
        self._asked: dict[int, Ticket] = {}
        self.control = AdmissionControl(
            slots=RUNNING if blocked == "slot" else 2 * RUNNING,
            queue_limit=2 * WAITING,
            stress=lambda: 0.0,
            clock=lambda: self.now,
        )
        self.sample()
        while self.control.waiting < WAITING:
            self.ask()

    def ask(self) -> None:
        """One more call."""
        number = next(self._numbers)
        which = number % self.capabilities
        wish = Wish(
            f"overlay{which % 20}.c{which}",
            f"overlay{which % 20}",
            (2, 5, 8)[number % 3],
            NEVER,
            self.now,
            self._concurrency(),
            Need(CALL_MB, 2 * CALL_MB, CALL_MB / 2, "measured", 1.0, 1.25),
        )

        def decided(refusal: BusError | None) -> None:
            if refusal is None:
                self.started.append(self._asked.pop(number))

        ticket = self.control.ask(wish, decided)
        if ticket.state == "running":
            self.started.append(ticket)
        else:
            self._asked[number] = ticket

    def _concurrency(self) -> int | None:
        """Where that is what blocks: as many of each capability as make `RUNNING` together."""
        return RUNNING // self.capabilities if self.blocked == "concurrency" else None

    def leave(self) -> None:
        """The call that has run for longest ends, and another starts in its place."""
        self.control.leave(self.started.popleft())

    def refresh(self) -> None:
        self.control.refresh()

    def sample(self) -> None:
        """Nobody has looked at the calls yet, so all that they may have is free."""
        room_mb = RUNNING * CALL_MB if self.blocked == "memory" else TOTAL_MB
        self.control.sampled(room_mb + MARGIN * TOTAL_MB, TOTAL_MB, {})


def measure(blocked: Blocked, capabilities: int, calls: int) -> list[Found]:
    """The four operations, each so many times, with garbage collection off as a decision does not wait for it."""
    line = Line(blocked, capabilities)
    operations: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "leave and dispatch": (line.leave, line.ask),  # one comes for one that goes, untimed
        "ask and wait": (line.ask, _nothing),
        "refresh": (line.refresh, _nothing),
        "sampled": (line.sample, _nothing),
    }
    return [_found(name, line, _times_us(line, step, after, calls)) for name, (step, after) in operations.items()]


def situations() -> list[tuple[Blocked, int]]:
    """What blocks, and how many capabilities. More than can run at once are never all at their concurrency."""
    every: list[tuple[Blocked, int]] = [(blocked, n) for blocked in get_args(Blocked) for n in CAPABILITIES]
    return [(blocked, n) for blocked, n in every if blocked != "concurrency" or n <= RUNNING]


def _nothing() -> None:
    pass


def _times_us(line: Line, step: Callable[[], None], after: Callable[[], None], calls: int) -> list[float]:
    times: list[float] = []
    gc.disable()
    try:
        for _ in range(calls):
            line.now += PERIOD_S
            began = time.thread_time_ns()
            step()
            times.append((time.thread_time_ns() - began) / 1000)
            after()
    finally:
        gc.enable()
    return sorted(times)


def _found(name: str, line: Line, ordered: Sequence[float]) -> Found:
    def of(share: float) -> float:
        return round(ordered[math.ceil(share * len(ordered)) - 1], 1)

    return Found(name, line.blocked, line.capabilities, of(0.5), of(0.99))


def machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}"


def tell(found: Sequence[Found]) -> str:
    lines = [f"us a call, p50 / p99, with {WAITING:,} waiting and {RUNNING} running ({machine()}):"]
    lines += [
        f"{each.operation:20} {each.capabilities:5} capabilities, blocked by {each.blocked:12}"
        f"{each.p50_us:9.1f} / {each.p99_us:9.1f}{'  above ' + format(LIMIT_US, 'g') if each.is_dear else ''}"
        for each in found
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="decisions.py", description="What one decision of admission costs.")
    parser.add_argument("--calls", type=int, default=300, help="how often each operation is timed, 1 to 900")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    if not 1 <= given.calls < WAITING:
        parser.error(f"--calls {given.calls}, allowed: 1 to {WAITING - 1}")
    found = [each for blocked, n in situations() for each in measure(blocked, n, given.calls)]
    if given.json:
        print(json.dumps({"machine": machine(), "limit_us": LIMIT_US, "found": [asdict(each) for each in found]}))
    else:
        print(tell(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
