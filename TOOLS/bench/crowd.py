"""What the bus takes with many overlays: its own memory, and that of all that it keeps running for them."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tree
from layout import PROGRAMS, BenchError, make_python, write_program
from servers import START_S, Servers
from targets import BODY, ECHOED

if TYPE_CHECKING:
    from pathlib import Path

CALL_S = 0.25
"""What one call may take. For so long times the calls the bus keeps an idle helper: until each overlay was called."""
IDLE_LEAST_S = 1.0
IDLE_WAIT_S = 30.0
"""How much longer than that the helpers may take to be gone."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Crowd:
    """A bus with many overlays; `ready_s` is from its start until it said that it was ready.

    `called` is just after one call of each, `idle` once nothing but the bus was left, or after a limit.
    """

    overlays: int
    ready_s: float
    called: tree.Tree
    idle: tree.Tree


def measure_crowd(folder: Path, overlays: int) -> Crowd:
    """Start a bus with this many overlays of a Python script, call each once, and wait until it is idle.

    Raises `BenchError` where a call fails.
    """
    make_python(folder)
    names = [f"crowd_{number:03}" for number in range(overlays)]
    for name in names:
        write_program(folder, name, PROGRAMS["python"])
    idle_s = max(IDLE_LEAST_S, CALL_S * overlays)
    with Servers(folder, settings={"AAL_HELPER_IDLE_S": str(idle_s)}) as servers:
        began = time.monotonic()
        servers.start(["bus"])
        ready_s = time.monotonic() - began
        for name in names:
            _call(servers.url("bus", f"/invoke/{name}"))
        called = tree.look(servers.pid("bus"))
        return Crowd(overlays, ready_s, called, _idle(servers.pid("bus"), idle_s + IDLE_WAIT_S))


def _call(url: str) -> None:
    request = urllib.request.Request(url, BODY.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            said = answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            raise BenchError(f"{url}: {error}: {error.read().decode('utf-8', 'replace')}") from None
    except OSError as error:
        raise BenchError(f"{url}: {error}") from None
    if ECHOED not in said:
        raise BenchError(f"{url}: {said}")


def _idle(pid: int, limit_s: float) -> tree.Tree:
    end = time.monotonic() + limit_s
    while (now := tree.look(pid)).children and time.monotonic() < end:
        time.sleep(_POLL_S)
    return now
