"""The servers: each a process of its own that ends with the bench."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import peers
from layout import PARTS, PROGRAMS, BenchError, environment, overlay_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ROOT = PARTS.parent.parent
PROGRAM_OF = {"plain-python": "python", "plain-c": "c", "bare-worker": "worker"}
"""The program that a rival starts in its folder; every other server starts in the working folder."""

START_S = 30.0
"""How long a server may take until it answers."""
STOP_S = 10.0
"""How long a server may take to end after TERM."""
POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Servers:
    """The servers of one run, from their start to their end. A context manager: leaving it ends them all.

    `found` are the programs of the peers, `settings` further variables for the bus.
    """

    folder: Path
    found: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        """TERM to all, one wait, KILL to the group of each; so nothing that they started lives on either."""
        for process in self.processes.values():
            process.terminate()
        end = time.monotonic() + STOP_S
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start(self, names: Sequence[str]) -> None:
        """Start these and wait until each answers. Raises `BenchError` with what a server wrote that does not."""
        for name in names:
            self._start(name)
        for name in names:
            self._await(name)

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    def url(self, name: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}{path}"

    def _start(self, name: str) -> None:
        self.ports.setdefault(name, free_port())
        with self._log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self._command(name),
                cwd=self._cwd(name),
                env=environment(self.folder) | (self._bus_environment() if name == "bus" else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # the bench has no threads
            )

    def _cwd(self, name: str) -> Path:
        program = PROGRAM_OF.get(name)
        return overlay_of(self.folder, program) if program else self.folder

    def _command(self, name: str) -> list[str]:
        if name == "bus":
            return [sys.executable, "-m", "bus.cli", "serve"]
        if name in self.found:
            return peers.command(name, self.found[name], self.folder, self.ports[name])
        special = {
            "plain-python": ["plain", *PROGRAMS["python"].command],
            "plain-c": ["plain", *PROGRAMS["c"].command],
            "bare-worker": ["worker", *PROGRAMS["worker"].command],
            "starlette": ["echo"],
            "starlette-ledger": ["ledger", "--file", str(self.folder / "rival.jsonl")],
            "aiohttp-proxy": ["proxy", "--url", f"http://127.0.0.1:{self.ports.get('http-service')}/echo"],
            "http-service": ["service"],
        }
        return [sys.executable, str(PARTS / "rivals.py"), "--port", str(self.ports[name]), *special[name]]

    def _bus_environment(self) -> dict[str, str]:
        """The bus's settings. `slots` and `queue_limit` stay as shipped: 64 connections fit into 64 slots."""
        return {
            "PYTHONPATH": str(ROOT),
            "AAL_PORT": str(self.ports["bus"]),
            "AAL_FSYNC": "batch",
            "AAL_LOG_LEVEL": "warning",
            "AAL_PASS_ENV": "PYTHONDONTWRITEBYTECODE",
            **self.settings,
        }

    def said(self, name: str) -> str:
        """The end of what a server wrote."""
        return self._log(name).read_text("utf-8", "replace")[-2000:]

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _await(self, name: str) -> None:
        end = time.monotonic() + START_S
        while not self._answers(name):
            if self.processes[name].poll() is not None or time.monotonic() > end:
                raise BenchError(f"the server {name} does not start:\n{self.said(name)}")
            time.sleep(POLL_S)

    def _answers(self, name: str) -> bool:
        """The bus says whether it is ready; a rival is as soon as it answers anything."""
        try:
            with urllib.request.urlopen(self.url(name, "/ready" if name == "bus" else "/"), timeout=START_S):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return name != "bus"
        except OSError:
            return False


_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the child, before its program: TERM when the bench is gone, however it went (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
