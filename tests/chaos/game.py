"""The rounds: start, call, strike, look; start again, look again."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from bus import provenance, starts
from tests.chaos import clients, overlays, plans, processes, verdicts
from tests.chaos.clients import Call, Crowd
from tests.chaos.overlays import OVERLAYS
from tests.chaos.server import HELPER_IDLE_S, Server, StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psutil

    from tests.chaos.overlays import Overlay
    from tests.chaos.place import Place
    from tests.chaos.plans import Plan

GONE_S = 10.0
"""How long all that a server started may take to be gone after its end."""

IDLE_S = 30.0
"""How long it may take, after the last call, until nothing but the bus runs: idle times, graces, a busy machine."""

REAP_S = 0.8 * HELPER_IDLE_S
"""How long a process may be a zombie after the last call. A helper that ends would hide it, so it is less than that."""

HEAL_S = 60.0
"""How long a worker or a service may keep failing after the worst: the waits between two starts grow."""

WARM_UP = 0
"""The number of the round before the first, which is reported only where something was wrong."""

COMPLAINTS = (" ERROR ", "Traceback", "cannot be forked", "does not end call")
"""What a server's log never says, whatever is done to its helpers."""

LOG_SHOWN = 2000
"""Characters of a server's log in a fault."""


@dataclass(slots=True)
class Round:
    """What came of a plan. `gone_s` is how long it took until nothing was left, in seconds."""

    plan: Plan
    calls: list[Call] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    first_line: int = 1
    gone_s: float = 0.0

    def ends(self) -> Counter[str]:
        return Counter(call.end for call in self.calls)


class Game:
    """Plays rounds in one place, and keeps what came of them. `report` is told of each round once it is judged."""

    def __init__(self, place: Place, report: Callable[[Round], None]) -> None:
        self._place = place
        self._report = report
        self._mark = secrets.token_hex(8)
        self._idle: Counter[str] = Counter()
        self._choice: tuple[Overlay, ...] = ()
        self.namespaces = False

    def play(self, rng: Random, rounds: int) -> None:
        """All rounds, unless a server does not start. Whatever happens, nothing is left then."""
        processes.become_subreaper()
        last = Round(plans.Plan(WARM_UP, (), 0.0, 0.0, 0))
        try:
            self._warm_up(last)
            for plan in plans.draw(rng, rounds):
                with Server(self._place, self._mark) as server:
                    self._judge(last)
                    last = self._round(server, plan)
            with Server(self._place, self._mark):
                self._judge(last)
        except StartError as error:
            last.faults += [f"after it, {error}: {self._place.log.read_text()[:LOG_SHOWN]}"]
            self._report(last)
        finally:
            self._end_all()

    def _warm_up(self, warm: Round) -> None:
        """One call of each overlay on a new server, to see what a bus that has worked and rests holds open."""
        with Server(self._place, self._mark) as server:
            self._choice = tuple(overlay for overlay in OVERLAYS if not overlay.needs_namespace)
            self._prove(server, warm)
            self.namespaces = any(processes.has_namespace(process.pid) for process in processes.family(server.pid))
            if self.namespaces:
                self._choice = OVERLAYS
            if processes.wait_until(lambda: not processes.family(server.pid), IDLE_S) is None:
                warm.faults += ["the bus never came to rest before anything was struck"]
            self._idle = self._held(server)
            self._end(server, warm)

    def _round(self, server: Server, plan: Plan) -> Round:
        """Everything up to the server's end."""
        played = Round(plan, first_line=self._next_line())
        crowd = Crowd(server, plan.seed, self._choice)
        crowd.start()
        try:
            time.sleep(plan.before_s)  # a moment at random, not an event
            self._strike(server, plan)
            time.sleep(plan.after_s)
        except LookupError as error:
            played.faults.append(str(error))
        finally:
            played.calls += crowd.join()
        if not plan.ends_bus:
            played.faults += self._outlived(server)
            played.faults += self._zombies(server)
            self._prove(server, played)
            played.faults += self._rest(server)
        self._end(server, played)
        self._place.empty_disks()
        return played

    def _strike(self, server: Server, plan: Plan) -> None:
        if plan.strike:
            server.strike(plan.strike, Random(plan.seed))
        else:
            server.ask_to_end()

    def _next_line(self) -> int:
        return max((line["seq"] for line in provenance.tail(self._place.ledger, 1)), default=0) + 1

    def _outlived(self, server: Server) -> Iterator[str]:
        """What is still there of calls that are over, at once, while their helpers live on.

        A call of a client that hung up may begin only now; it is over when none runs for the second time.
        """
        looks = []
        for _ in range(2):
            if processes.wait_until(lambda: server.running_calls() == 0, IDLE_S) is None:
                yield "calls do not end after their clients have gone"
                return
            looks.append({process for helper in self._helpers_of_calls(server) for process in _beneath(helper)})
        left = looks[0] & looks[1]
        yield from (f"outlived its call: {line}" for line in processes.describe(process.pid for process in left))

    def _helpers_of_calls(self, server: Server) -> list[int]:
        """The helpers of overlays whose programs run for one call."""
        folders = {str(self._place.overlay(overlay.name)) for overlay in OVERLAYS if not overlay.resident}
        return [helper for helper in processes.helpers(server.pid) if processes.folder(helper) in folders]

    def _zombies(self, server: Server) -> Iterator[str]:
        """What has ended at the end of the last call, and stays unreaped."""
        dead = processes.zombies(processes.family(server.pid))
        if processes.wait_until(lambda: not processes.zombies(dead), REAP_S) is None:
            yield f"zombies: {processes.describe(process.pid for process in processes.zombies(dead))}"

    def _prove(self, server: Server, played: Round) -> None:
        """Call each overlay for something harmless; where no process serves many calls, that succeeds at once."""
        for overlay in self._choice:
            give_up = time.monotonic() + (HEAL_S if overlay.resident else 0.0)
            while True:
                call = clients.make(server, overlays.tame(overlay, nonce=len(played.calls)))
                played.calls.append(call)
                if call.code == "OK" or time.monotonic() > give_up:
                    break
                time.sleep(processes.POLL_S * 10)
            if call.code != "OK":
                said = call.body or call.error
                played.faults.append(f"after the strike {overlay.name} came to {call.code}: {said}")

    def _rest(self, server: Server) -> Iterator[str]:
        """Once idle, the bus holds what it held when nothing had happened, and nothing else runs."""

        def rests() -> bool:
            return not processes.family(server.pid) and self._held(server) == self._idle

        if processes.wait_until(rests, IDLE_S) is None:
            now = self._held(server)
            yield f"the bus does not come to rest: it holds {now - self._idle} more and {self._idle - now} less"
            yield from processes.describe(process.pid for process in processes.family(server.pid))

    def _held(self, server: Server) -> Counter[str]:
        """What the bus holds open, but for one descriptor of the log of each overlay that ever had something to log.

        The locks of its scratch and of its calls that started have other names each time.
        """
        renamed = (f"{self._place.scratch}/", f"{self._place.ledger.parent / starts.FOLDER}/")
        held = Counter[str]()
        for path, number in processes.held(server.pid).items():
            held[next((folder for folder in renamed if path.startswith(folder)), path)] += number
        held.subtract(log for overlay in OVERLAYS if held[log := str(self._place.log_of(overlay.name))])
        return +held

    def _end(self, server: Server, played: Round) -> None:
        """End the server, unless it has been killed, and see that all of it goes."""
        if not server.told:
            server.ask_to_end()
        status = server.wait()
        if "bus" not in played.plan.strike:
            outlived = processes.describe(self._left())  # before anybody else could clean up
            played.faults += [f"outlived a bus that ended in order: {line}" for line in outlived]
            if status != 0:
                played.faults.append(f"the bus, asked to end, ended with {status}")
        server.kill()
        gone_s = processes.wait_until(self._nothing_left, GONE_S)
        played.gone_s = GONE_S if gone_s is None else gone_s
        if gone_s is None:
            played.faults += [f"left behind: {line}" for line in processes.describe(self._left())]
            self._end_all()

    def _left(self) -> list[int]:
        return sorted({*processes.marked(self._mark), *(process.pid for process in processes.family())})

    def _nothing_left(self) -> bool:
        processes.reap()
        return not self._left()

    def _end_all(self) -> None:
        """Leave nothing behind, whatever happened."""

        def killed() -> bool:
            for pid in self._left():
                processes.kill(pid)
            return self._nothing_left()

        processes.wait_until(killed, GONE_S)

    def _judge(self, played: Round) -> None:
        """After the next start."""
        for call in played.calls:
            played.faults += verdicts.of_call(call, played.plan.strike)
        played.faults += verdicts.of_ledger(self._place.ledger, played.first_line, played.calls)
        played.faults += [f"a file was left: {path}" for path in self._place.leftovers()]
        played.faults += self._verified_by_command()
        played.faults += self._complaints()
        if played.plan.number != WARM_UP or played.faults:
            self._report(played)

    def _verified_by_command(self) -> Iterator[str]:
        command = [sys.executable, "-m", "bus.cli", "-C", str(self._place.folder), "provenance", "verify"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            yield f"aal provenance verify ended with {done.returncode}: {done.stdout}{done.stderr}"

    def _complaints(self) -> Iterator[str]:
        """What the server's log tells of faults inside the bus."""
        text = self._place.log.read_text()
        os.truncate(self._place.log, 0)
        if any(word in text for word in COMPLAINTS):
            yield f"the server's log: {text[:LOG_SHOWN]}"


def _beneath(helper: int) -> list[psutil.Process]:
    """What runs below a helper and its zygote, but for what waits there for its call."""
    inside = processes.zygote(helper)
    return [one for one in processes.family(helper) if one.pid != inside and not processes.waits(one.pid, inside)]


def as_json(played: Round) -> dict[str, Any]:
    ends = played.ends()
    return {
        "round": played.plan.number,
        "strike": str(played.plan),
        **{end: ends[end] for end in ("answered", "left", "cut")},
        "gone_s": round(played.gone_s, 3),
        "faults": played.faults,
    }
