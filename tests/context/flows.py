"""What tests of whole flows share: a user's shell beside a service that uvicorn serves, and calls through the bus."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.context.conftest import OVERLAY
from tests.context.served import PATIENCE_S, environment
from tests.support import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_curl = pytest.mark.skipif(
    None in {shutil.which("curl"), shutil.which("jq")}, reason="the calls are made with curl and jq"
)


def copy_overlay(to: Path) -> Path:
    """The overlay as a user has it: its folder, and nothing of the bus."""
    return shutil.copytree(OVERLAY, to, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs", "parts"))


@contextmanager
def uvicorn(folder: Path) -> Iterator[str]:
    """README's own way to serve, on a socket that listens already; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = f"-W error -m uvicorn aos_context.api.main:app --log-level warning --fd {listening.fileno()}"
        process = subprocess.Popen(
            [sys.executable, *command.split()], cwd=folder, env=environment(), pass_fds=[listening.fileno()]
        )
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a user's bash says, which ends at the first command that fails; none may."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def bus_with(overlay: Path, home: Path) -> Iterator[Server]:
    """A bus in a process of its own, with a copy of the overlay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", environment()["PATH"])
        server = Server(home)
        copied = home / "overlays/aos_context"
        shutil.copytree(overlay, copied, ignore=shutil.ignore_patterns("runs", "parts"))
        with server:
            yield server


def invoke(bus: Server, capability: str, phase: str, **data: Any) -> dict[str, Any]:
    reply = bus.post(f"/invoke/aos_context/{capability}", {"phase": phase, "data": data})
    answer: dict[str, Any] = reply.json()
    return answer


def result(bus: Server, capability: str, phase: str, **data: Any) -> dict[str, Any]:
    answer = invoke(bus, capability, phase, **data)
    assert answer["ok"], answer
    found: dict[str, Any] = answer["result"]
    return found
