"""`aal serve` as one user, with every attempt that it is given made once in each of its phases."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.escape import overlays
from tests.escape.place import MAX_PROCESSES, SCRATCH_MB, Place, a_folder_for_root
from tests.programs import running
from tests.support import REPO, eventually

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bus.model import Phase
    from tests.escape.attempts import Attempt
    from tests.escape.overlays import Mode

AT_ONCE = 6
ANSWER_S = 120.0
ORDINARY = 65534


@dataclass(frozen=True, slots=True)
class User:
    """Who starts the server. `namespaces`: whether the kernel gives it namespaces of users."""

    name: str
    uid: int
    namespaces: bool = True


class Try(NamedTuple):
    """One call."""

    attempt: Attempt
    mode: Mode
    phase: Phase


class Server:
    """A server, the place that its overlays aim at, and a process of another overlay that runs all the while."""

    def __init__(self, user: User, tries: Iterable[Try], **settings: str) -> None:
        self.user = user
        self.tries = list(tries)
        self.place = Place(user.uid)
        self._settings = {"scratch_mb": str(SCRATCH_MB), "max_processes": str(MAX_PROCESSES), "helper_idle_s": "0.3"}
        self._settings |= {"kill_grace_s": "0.2", "max_output_mb": "1", "drain_s": "0"} | settings
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as held:
            held.enter_context(self.place)
            self.place.write_overlays({(try_.attempt, try_.mode) for try_ in self.tries})
            self.before = self.place.seen_outside()
            self._start_sibling(held, self._start(held))
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def call(self, overlay: str, phase: Phase | str) -> dict[str, Any]:
        """The answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        with contextlib.closing(connection):
            body = json.dumps({"phase": phase, "data": self.place.facts})
            connection.request("POST", f"/invoke/{overlay}", body, {"Content-Type": "application/json"})
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer

    def make_all(self) -> dict[Try, dict[str, Any]]:
        """The answer of each."""
        with ThreadPoolExecutor(AT_ONCE) as clients:
            answers = clients.map(self._make, self.tries)
            return dict(zip(self.tries, answers, strict=True))

    def _make(self, try_: Try) -> dict[str, Any]:
        return self.call(overlays.name_of(try_.attempt, try_.mode), try_.phase)

    def _start(self, held: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("AAL_")}
        env |= {f"AAL_{name.upper()}": value for name, value in self._settings.items()}
        env |= {"PYTHONPATH": str(REPO), "HOME": self.place.facts["home"], "OF_THE_BUS": self.place.secret}
        serve = [sys.executable, "-m", "bus.cli", "-C", str(self.place.folder), "serve", "--port", "0"]
        server = held.enter_context(
            subprocess.Popen(
                self._as_user(held) + serve,
                env=env,
                cwd=REPO,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        )
        held.callback(server.terminate)
        assert server.stdout is not None
        held.enter_context(server.stdout)
        found = re.search(rb"http://[\d.]+:(\d+)", server.stdout.readline())
        assert found, "the server has ended before it listened"
        self.port = int(found[1])
        self.place.facts |= {"bus": server.pid, "bus_group": server.pid}
        return server

    def _as_user(self, held: contextlib.ExitStack) -> list[str]:
        if self.user.uid == os.geteuid():
            return []
        below = "" if self.user.namespaces else held.enter_context(a_folder_for_root())
        return [sys.executable, "-m", "tests.escape.as_user", str(self.user.uid), below]

    def _start_sibling(self, held: contextlib.ExitStack, server: subprocess.Popen[bytes]) -> None:
        """A call that lasts as long as the server. Its process is the first that a call has."""
        caller = threading.Thread(target=self.call, args=("sibling", "OPEN"))
        caller.start()
        held.callback(caller.join)
        held.callback(server.terminate)  # which ends the call
        runs = self.place.folder / ".aal" / "state" / "sibling" / "runs"
        eventually(runs.exists, "another overlay runs")
        (sibling,) = running(f"{self.place.folder}/")
        self.place.facts["sibling"] = sibling
        if Path(f"/proc/{sibling}/ns/pid").readlink() == Path("/proc/self/ns/pid").readlink():
            self.place.lacks.add("namespace")
