"""The working folder with the overlays, and the servers: each a process of its own that ends with the bench."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from targets import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PARTS = Path(__file__).resolve().parent
ROOT = PARTS.parent.parent
MEMORY = "MEM[SOFT=16,HARD=256,VOL=LOW];PRIORITY=9"
PYTHON = "python"
"""An empty virtual environment: `python3` starts as on a clean machine, whatever this one has in its site-packages."""

START_S = 30.0
"""How long a server may take until it answers."""
STOP_S = 10.0
"""How long a server may take to end after TERM."""
POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


class BenchError(Exception):
    """The bench cannot run; the message is for people."""


def environment(folder: Path) -> dict[str, str]:
    """What every server and program gets, and nothing else: no `AAL_*` of the caller reaches the bus."""
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    path = os.pathsep.join((str(folder / PYTHON / "bin"), os.environ.get("PATH", os.defpath)))
    return {**kept, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PATH": path}


def lay_out(folder: Path, programs: Sequence[str], service_port: int) -> None:
    """Write the overlays of the bus into `folder`, and the `python3` that runs scripts. Raises `BenchError` of cc."""
    venv.create(folder / PYTHON, with_pip=False, symlinks=True)
    for program in programs:
        entrypoint = {"proc": {"command": list(COMMANDS[program])}}
        home = write_overlay(folder, f"echo_{program}", entrypoint, {"runner": "proc"})
        if program == "c":
            compile_c(PARTS / "echo.c", home / "echo")
        else:
            shutil.copy(PARTS / "echo.py", home / "run.py")
    service = {"http": {"base_url": f"http://127.0.0.1:{service_port}"}}
    write_overlay(folder, "echo_http", service, {"runner": "http", "path": "/echo"})


def write_overlay(folder: Path, name: str, entrypoints: Mapping[str, Any], capability: Mapping[str, Any]) -> Path:
    manifest = {
        "name": name,
        "version": "1.0.0",
        "phases": ["OPEN"],
        "permissions": ["analysis"],
        "entrypoints": entrypoints,
        "capabilities": {"echo": {**capability, "memory": MEMORY}},
    }
    home = folder / "overlays" / name
    home.mkdir(parents=True)
    (home / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return home


def compile_c(source: Path, program: Path) -> None:
    done = subprocess.run(["cc", "-O2", "-o", program, source], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise BenchError(f"cc does not compile {source.name}:\n{done.stderr}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Servers:
    """The servers of one run, from their start to their end. A context manager: leaving it ends them all."""

    folder: Path
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

    def cpu_s(self, name: str) -> float:
        """User and system time of a server and all that it started: proc(5), utime + stime + cutime + cstime."""
        server = psutil.Process(self.processes[name].pid)
        total = 0.0
        for process in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # then its time is in its parent's
                total += sum(process.cpu_times()[:4])
        return total

    def _start(self, name: str) -> None:
        self.ports.setdefault(name, free_port())
        overlay = self.folder / "overlays" / f"echo_{name.removeprefix('plain-')}"
        cwd = overlay if name.startswith("plain-") else self.folder
        with self._log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self._command(name),
                cwd=cwd,
                env=environment(self.folder) | (self._bus_environment() if name == "bus" else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # the bench has no threads
            )

    def _command(self, name: str) -> list[str]:
        if name == "bus":
            return [sys.executable, "-m", "bus.cli", "serve"]
        rival = [sys.executable, str(PARTS / "rivals.py")]
        port = ["--port", str(self.ports[name])]
        if name.startswith("plain-"):
            return [*rival, *port, "--", "plain", *COMMANDS[name.removeprefix("plain-")]]
        special = {
            "starlette": ["echo"],
            "starlette-ledger": ["ledger", "--file", str(self.folder / "rival.jsonl")],
            "aiohttp-proxy": ["proxy", "--url", f"http://127.0.0.1:{self.ports.get('http-service')}/echo"],
            "http-service": ["service"],
        }
        return [*rival, *special[name], *port]

    def _bus_environment(self) -> dict[str, str]:
        """The bus's settings. `slots` and `queue_limit` stay as shipped: 64 connections fit into 64 slots."""
        return {
            "PYTHONPATH": str(ROOT),
            "AAL_PORT": str(self.ports["bus"]),
            "AAL_FSYNC": "batch",
            "AAL_LOG_LEVEL": "warning",
            "AAL_PASS_ENV": "PYTHONDONTWRITEBYTECODE",
        }

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _await(self, name: str) -> None:
        end = time.monotonic() + START_S
        while not self._answers(name):
            if self.processes[name].poll() is not None or time.monotonic() > end:
                said = self._log(name).read_text("utf-8", "replace")[-2000:]
                raise BenchError(f"the server {name} does not start:\n{said}")
            time.sleep(POLL_S)

    def _answers(self, name: str) -> bool:
        """The bus says whether it is ready; a rival is as soon as it answers anything."""
        url = f"http://127.0.0.1:{self.ports[name]}/{'ready' if name == 'bus' else ''}"
        try:
            with urllib.request.urlopen(url, timeout=START_S):
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
