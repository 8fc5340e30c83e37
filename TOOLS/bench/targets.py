"""What is measured, and which ratios are taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

BODY = '{"phase":"OPEN","data":{"prompt":"hello","intent":"test"}}'
REFUSED_BODY = BODY.replace("OPEN", "ASCEND")
ECHOED = '"prompt":"hello"'
WARMUP_SHARE, WARMUP_MOST_S = 0.2, 0.5
SLEEPERS = 45
"""More than the 40 threads of the pool in which a plain Starlette or FastAPI endpoint waits for its program."""


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that is measured: a path of a server, or (`server` is None) a program in a bare loop.

    `program` names what runs at each call, of `layout.PROGRAMS`. `sleepers` are calls that sleep on the same server
    from before the first measured call to after the last.
    """

    name: str
    what: str
    server: str | None
    path: str = "/echo"
    body: str = BODY
    status: int = 200
    must: str = ECHOED
    program: str | None = None
    method: str = "POST"
    sleepers: int = 0


def _root(name: str, what: str, sleepers: int = 0) -> Target:
    return Target(name, what, "bus", "/", "", 200, '"status":"ok"', method="GET", sleepers=sleepers)


TARGETS = (
    Target("bus-python", "the bus, python3 run.py", "bus", "/invoke/echo_python", program="python"),
    Target("webhook-python", "webhook (Go), python3 run.py", "webhook", "/hooks/python", program="python"),
    Target("lighttpd-python", "lighttpd CGI, python3 run.py", "lighttpd", "/echo_python/run.py", program="python"),
    Target("plain-python", "subprocess.run endpoint, python3 run.py", "plain-python", program="python"),
    Target("loop-python", "bare subprocess.run loop, python3 run.py", None, program="python"),
    Target("bus-c", "the bus, a C program", "bus", "/invoke/echo_c", program="c"),
    Target("webhook-c", "webhook (Go), a C program", "webhook", "/hooks/c", program="c"),
    Target("lighttpd-c", "lighttpd CGI, a C program", "lighttpd", "/echo_c/echo", program="c"),
    Target("plain-c", "subprocess.run endpoint, a C program", "plain-c", program="c"),
    Target("loop-c", "bare subprocess.run loop, a C program", None, program="c"),
    Target("bus-worker", "the bus, a worker", "bus", "/invoke/echo_worker", program="worker"),
    Target("bare-worker", "bare Starlette, the same worker", "bare-worker", program="worker"),
    Target("bus-http", "the bus, an HTTP service", "bus", "/invoke/echo_http"),
    Target("aiohttp-proxy", "bare aiohttp proxy to the same service", "aiohttp-proxy"),
    Target("http-service", "the same service without any proxy", "http-service"),
    Target("bus-refused", "the bus, a refused call (403)", "bus", "/invoke/echo_http", REFUSED_BODY, 403, '"ok":false'),
    Target("starlette-ledger", "bare Starlette, hash and JSONL line", "starlette-ledger"),
    Target("starlette", "bare Starlette echo", "starlette"),
    _root("bus-root", "the bus, GET /"),
    _root("bus-root-sleepers", f"the bus, GET / beside {SLEEPERS} sleeping calls", SLEEPERS),
)
RATIOS = (
    ("bus-python", "webhook-python"),
    ("bus-python", "lighttpd-python"),
    ("bus-python", "plain-python"),
    ("bus-python", "loop-python"),
    ("bus-c", "webhook-c"),
    ("bus-c", "lighttpd-c"),
    ("bus-c", "plain-c"),
    ("bus-c", "loop-c"),
    ("bus-worker", "bare-worker"),
    ("bus-http", "aiohttp-proxy"),
    ("bus-refused", "starlette-ledger"),
    ("bus-refused", "starlette"),
    ("bus-root-sleepers", "bus-root"),
)
PEERS = frozenset({"webhook", "lighttpd"})
"""The servers of others; the programs that serve them have the same names."""

PEERS_ONLY = PEERS | {"bus-root", "bus-root-sleepers"}
"""Servers and targets that are measured with `--peers`, or when they are named."""

WITHOUT_PEERS = tuple(t for t in TARGETS if not {t.name, t.server} & PEERS_ONLY)
BESIDE_PEERS = tuple(
    t for t in TARGETS if t.server not in {"starlette", "starlette-ledger"} and t.name != "bus-refused"
)
_NEEDS_SERVICE = frozenset({"bus", "aiohttp-proxy"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for. `found` are the programs of the peers that are measured; `crowd` overlays, 0 for no crowd."""

    targets: Sequence[Target]
    connections: Sequence[int]
    seconds: float
    runs: int
    notes: Sequence[str] = ()
    found: Mapping[str, Path] = field(default_factory=dict)
    crowd: int = 0
    judged: bool = False
    """Whether what was found is held against the goals."""

    @property
    def warmup_s(self) -> float:
        return min(WARMUP_MOST_S, WARMUP_SHARE * self.seconds)

    @property
    def servers(self) -> list[str]:
        """Those that the targets need, the HTTP service first where another calls it."""
        named = [target.server for target in self.targets if target.server is not None]
        service = ["http-service"] if _NEEDS_SERVICE.intersection(named) else []
        return list(dict.fromkeys(service + named))

    @property
    def programs(self) -> list[str]:
        """The programs that the targets run."""
        named = [target.program for target in self.targets if target.program is not None]
        sleeper = ["sleeper"] if any(target.sleepers for target in self.targets) else []
        return list(dict.fromkeys(named + sleeper))
