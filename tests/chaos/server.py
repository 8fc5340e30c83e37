"""`aal serve` as a process: started, asked to end, struck."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from tests.chaos import processes
from tests.chaos.processes import MARK, Victim

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from tests.chaos.place import Place
    from tests.chaos.plans import Target

START_S = 60.0
"""How long a server may take to listen."""

END_S = 60.0
"""How long it may take to end once it was asked to: the drain, the grace, and a busy machine."""

VICTIM_S = 20.0
"""How long it may take until there is something to strike while clients call."""

HELPER_IDLE_S = 1.0
"""Helpers and workers without a call are kept so long; what they fail to reap is seen within that time."""

_SETTINGS = {
    "AAL_KILL_GRACE_S": "0.3",
    "AAL_DRAIN_S": "0.5",
    "AAL_HELPER_IDLE_S": str(HELPER_IDLE_S),
    "AAL_MAX_OUTPUT_MB": "1",
    "AAL_LOG_LEVEL": "warning",
    "AAL_PASS_ENV": MARK,
}


class StartError(Exception):
    """The server does not listen; its log says why."""


class Server:
    """A server of the place, from the moment it listens until it has ended. Raises `StartError`."""

    def __init__(self, place: Place, mark: str) -> None:
        command = [sys.executable, "-m", "bus.cli", "-C", str(place.folder), "serve", "--port", "0"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AAL_")}
        with place.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=inherited | _SETTINGS | {MARK: mark, "TMPDIR": str(place.tmp)},
                stdout=subprocess.PIPE,
                stderr=log,
                preexec_fn=processes.die_with_parent,  # noqa: PLW1509  # no other thread runs between rounds
            )
        self.told = False
        """Whether it was told to end: from then on nobody may rely on it."""

        try:
            self.address = self._read_address()
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def running_calls(self) -> int:
        """As its own figures say."""
        connection = http.client.HTTPConnection(*self.address, timeout=END_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return int(next(float(line.split()[1]) for line in text.splitlines() if line.startswith("aal_running ")))

    def ask_to_end(self) -> None:
        self.told = True
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int | None:
        """The status it ends with, None where it does not end."""
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self.told = True
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def strike(self, targets: Sequence[Target], rng: Random) -> None:
        """Kill them at once. Raises `LookupError` where there is nothing to kill."""
        with contextlib.ExitStack() as held:
            victims: list[Victim] = []

            def choose() -> bool:
                with contextlib.suppress(ProcessLookupError):
                    victims[:] = [held.enter_context(victim) for victim in self._victims(targets, rng)]
                return bool(victims)

            if processes.wait_until(choose, VICTIM_S) is None:
                raise LookupError(f"no {' and '.join(targets)} to kill")
            self.told = "bus" in targets
            for victim in victims:
                victim.kill()
        if self.told:
            self.kill()

    def _victims(self, targets: Sequence[Target], rng: Random) -> list[Victim]:
        """Raises ProcessLookupError where there are not enough."""
        pairs = [(pid, inside) for pid in processes.helpers(self.pid) if (inside := processes.zygote(pid))]
        wanted = [target for target in targets if target != "bus"]
        if len(pairs) < len(wanted):
            raise ProcessLookupError(f"{len(pairs)} helpers")
        victims = [Victim(self.pid, os.getpid())] if "bus" in targets else []
        for target, (helper, inside) in zip(wanted, rng.sample(pairs, len(wanted)), strict=True):
            victims.append(Victim(helper, self.pid) if target == "helper" else Victim(inside, helper))
        return victims

    def _read_address(self) -> tuple[str, int]:
        out = self._process.stdout
        if out is None or not select.select([out], [], [], START_S)[0]:
            raise StartError(f"the server does not listen within {START_S:g} s")
        found = re.search(rb"http://([\d.]+):(\d+)", out.readline())
        if found is None:
            raise StartError("the server has ended before it listened")
        return found[1].decode(), int(found[2])
