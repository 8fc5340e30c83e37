"""Calls that sleep on the bus while something else is measured there."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import urllib.request
from typing import TYPE_CHECKING

import tree
from layout import PROGRAMS, SLEEP_S, BenchError
from load import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import Servers

BEGIN_S = 60.0
"""How long the calls may take until all of them run, or until none runs any more."""
LOOK_S = 0.5
"""Between two looks at the CPU time of the bus and its programs."""
QUIET = 0.1
"""The share of a core that they may still take when all sleep."""
_POLL_S = 0.02


@contextlib.contextmanager
def sleeping(count: int, servers: Servers) -> Iterator[None]:
    """Within it this many calls sleep on the bus; they end by their connections being closed.

    Raises `BenchError` where they do not come to run all at once.
    """
    with contextlib.ExitStack() as connections:
        for _ in range(count):
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", servers.ports["bus"])))
            connection.sendall(_request(servers.ports["bus"]))
        _await_running(count, servers)
        _await_quiet(servers)
        yield
    _await_running(0, servers)


def _request(port: int) -> bytes:
    body = json.dumps({"phase": "OPEN", "data": {"sleep_s": SLEEP_S}})
    path = f"/invoke/{PROGRAMS['sleeper'].overlay}"
    return Job(port, [path], body, 1, 0.0, 0.0, 200, "").requests()[0]


def _await_running(count: int, servers: Servers) -> None:
    end = time.monotonic() + BEGIN_S
    while (running := _running(servers)) != count:
        if time.monotonic() > end:
            raise BenchError(f"{running} of {count} sleeping calls run, {BEGIN_S:g} s after they were begun or ended")
        time.sleep(_POLL_S)


def _await_quiet(servers: Servers) -> None:
    """Until the programs sleep: the bus counts them as running from before their interpreters have started."""
    end = time.monotonic() + BEGIN_S
    before_s, now_s = -1.0, tree.cpu_s(servers.pid("bus"))
    while now_s - before_s > QUIET * LOOK_S:
        if time.monotonic() > end:
            raise BenchError(f"the sleeping calls do not sleep, {BEGIN_S:g} s after they were begun")
        time.sleep(LOOK_S)
        before_s, now_s = now_s, tree.cpu_s(servers.pid("bus"))


def _running(servers: Servers) -> int:
    """The calls that run, as the bus says."""
    with urllib.request.urlopen(servers.url("bus", "/metrics"), timeout=BEGIN_S) as answer:
        lines: list[str] = answer.read().decode().splitlines()
    return int(next(float(line.split()[1]) for line in lines if line.startswith("aal_running ")))
