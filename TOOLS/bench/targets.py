"""What is measured, and which ratios are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BODY = '{"phase":"OPEN","data":{"prompt":"hello","intent":"test"}}'
REFUSED_BODY = BODY.replace("OPEN", "ASCEND")
ECHOED = '"prompt":"hello"'
WARMUP_SHARE, WARMUP_MOST_S = 0.2, 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that is measured: a path of a server, or (`server` is None) a program in a bare loop."""

    name: str
    what: str
    server: str | None
    path: str = "/echo"
    body: str = BODY
    status: int = 200
    must: str = ECHOED
    program: str | None = None
    """The program that runs at each call: `python`, `c` or none."""


TARGETS = (
    Target("bus-python", "the bus, python3 run.py", "bus", "/invoke/echo_python", program="python"),
    Target("plain-python", "subprocess.run endpoint, python3 run.py", "plain-python", program="python"),
    Target("loop-python", "bare subprocess.run loop, python3 run.py", None, program="python"),
    Target("bus-c", "the bus, a C program", "bus", "/invoke/echo_c", program="c"),
    Target("plain-c", "subprocess.run endpoint, a C program", "plain-c", program="c"),
    Target("loop-c", "bare subprocess.run loop, a C program", None, program="c"),
    Target("bus-http", "the bus, an HTTP service", "bus", "/invoke/echo_http"),
    Target("aiohttp-proxy", "bare aiohttp proxy to the same service", "aiohttp-proxy"),
    Target("http-service", "the same service without any proxy", "http-service"),
    Target("bus-refused", "the bus, a refused call (403)", "bus", "/invoke/echo_http", REFUSED_BODY, 403, '"ok":false'),
    Target("starlette-ledger", "bare Starlette, hash and JSONL line", "starlette-ledger"),
    Target("starlette", "bare Starlette echo", "starlette"),
)
RATIOS = (
    ("bus-python", "plain-python"),
    ("bus-python", "loop-python"),
    ("bus-c", "plain-c"),
    ("bus-c", "loop-c"),
    ("bus-http", "aiohttp-proxy"),
    ("bus-refused", "starlette-ledger"),
    ("bus-refused", "starlette"),
)
COMMANDS: Mapping[str, tuple[str, ...]] = {"python": ("python3", "run.py"), "c": ("./echo",)}
_NEEDS_SERVICE = frozenset({"bus", "aiohttp-proxy"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    targets: Sequence[Target]
    connections: Sequence[int]
    seconds: float
    runs: int
    notes: Sequence[str] = ()

    @property
    def warmup_s(self) -> float:
        return min(WARMUP_MOST_S, WARMUP_SHARE * self.seconds)

    @property
    def servers(self) -> list[str]:
        """Those that the targets need, the HTTP service first where another calls it."""
        named = [target.server for target in self.targets if target.server is not None]
        service = ["http-service"] if _NEEDS_SERVICE.intersection(named) else []
        return list(dict.fromkeys(service + named))
