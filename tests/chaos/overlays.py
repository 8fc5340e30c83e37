"""The hostile overlays: how each runs, what it can be told to do, and how that may end."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

PROGRAMS = Path(__file__).with_name("programs")
PHASE = "ASCEND"
"""Hostile programs start others, which no other phase allows."""

TIMEOUT_S = 20.0
"""What a deed that ends by itself may take."""

_SHORT_MS = (50, 500)
LATE_S = 4.0
"""What a call of a worker may take, whoever waits: no longer than the bus is given to come to rest."""

_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # none that leaves a core


@dataclass(frozen=True, slots=True)
class Deed:
    """`codes`: how the call ends on a bus that nothing was done to. `ends`: whether it does so by itself."""

    name: str
    codes: frozenset[str]
    ends: bool = True
    weight: int = 2


@dataclass(frozen=True, slots=True)
class Overlay:
    """`resident`: its program serves many calls, so that the deed of one is felt by others.

    The first of `deeds` is harmless. `needs_namespace`: what it leaves behind cannot be killed one by one.
    """

    name: str
    files: tuple[str, ...]
    manifest: Mapping[str, Any]
    deeds: tuple[Deed, ...]
    resident: bool = False
    needs_namespace: bool = False
    weight: int = 4

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for file in self.files:
            (folder / file).write_text((PROGRAMS / file).read_text())
        document = {"name": self.name, "version": "1.0.0", "phases": [PHASE], **self.manifest}
        (folder / "manifest.json").write_text(json.dumps(document))


@dataclass(frozen=True, slots=True)
class Order:
    """One call to make: of `overlay`, to do `deed` with `number`, known by `nonce`."""

    overlay: Overlay
    deed: Deed
    number: int
    nonce: int
    timeout_ms: int

    def body(self) -> bytes:
        payload = {"do": self.deed.name, "with": self.number, "nonce": self.nonce}
        return json.dumps({"phase": PHASE, "data": payload, "timeout_ms": self.timeout_ms}).encode()


def order(rng: Random, overlays: tuple[Overlay, ...]) -> Order:
    """A call at random."""
    (overlay,) = rng.choices(overlays, [overlay.weight for overlay in overlays])
    (deed,) = rng.choices(overlay.deeds, [deed.weight for deed in overlay.deeds])
    number = rng.choice(_SIGNALS) if deed.name == "die" else rng.randint(1, 255)
    timeout_ms = int(TIMEOUT_S * 1000) if deed.ends and not overlay.resident else rng.randint(*_SHORT_MS)
    return Order(overlay, deed, number, rng.getrandbits(32), timeout_ms)


def tame(overlay: Overlay, nonce: int) -> Order:
    """A call that has to succeed."""
    return Order(overlay, overlay.deeds[0], 0, nonce, int(TIMEOUT_S * 1000))


def _deeds(codes: str, *names: str, ends: bool = True, weight: int = 2) -> tuple[Deed, ...]:
    return tuple(Deed(name, frozenset(codes.split()), ends, weight) for name in names)


(ANSWER,) = _deeds("OK", "answer", weight=6)
_SHELL = (
    ANSWER,
    *_deeds("OK", "fork", "double_fork", "daemonise", "fill"),
    *_deeds("ERR_OVERLAY_CRASH", "leave", "die"),
    *_deeds("ERR_OUTPUT_TOO_LARGE", "flood"),
    *_deeds("ERR_TIMEOUT", "sleep", "deaf", "stop", "mute", ends=False),
)
_PYTHON = (*_SHELL, *_deeds("ERR_TIMEOUT", "threads", ends=False))
_OF_OTHERS = (
    "OK ERR_TIMEOUT ERR_OVERLAY_START ERR_OVERLAY_CRASH ERR_OVERLAY_PROTOCOL ERR_OUTPUT_TOO_LARGE "
    "ERR_HTTP_UNREACHABLE ERR_HTTP_STATUS ERR_CIRCUIT_OPEN"
)
"""What a call may come to whose program also serves others."""

_RESIDENT = (
    *_deeds(_OF_OTHERS, "answer", weight=40),
    *_deeds(_OF_OTHERS, "fork", "double_fork", "daemonise", "fill"),
    *_deeds(_OF_OTHERS, "sleep", "deaf", "threads", ends=False),
    *_deeds(_OF_OTHERS, "leave", "die", "mute", "flood", "parricide", weight=1),
)
_WORKER = (*_RESIDENT, *_deeds(_OF_OTHERS, "stop", ends=False))
"""A service that stops is missed only after several looks at its health, which take longer than a round."""


def _once(command: str) -> dict[str, Any]:
    return {"entrypoint": command, "capabilities": ["exec"]}


def _native(runner: str, entrypoint: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    capability = {"runner": runner, "timeout_s": timeout_s} | ({"path": "/"} if runner == "http" else {})
    return {"permissions": ["exec"], "entrypoints": {runner: entrypoint}, "capabilities": {"run": capability}}


_WORKERS = {"count": 2, "start_timeout_s": LATE_S}

OVERLAYS = (
    Overlay("shell", ("once.sh",), _once("sh once.sh"), _SHELL),
    Overlay("forked", ("once.py", "deeds.py"), _once("python3 once.py"), _PYTHON),
    Overlay(
        "spawned",
        ("once.py", "deeds.py"),
        _native("proc", {"command": ["python3", "once.py"], "mode": "spawn"}),
        _PYTHON,
        weight=2,
    ),
    Overlay(
        "parricidal", ("once.sh",), _once("sh once.sh"), _deeds("OK ERR_OVERLAY_CRASH", "answer", "parricide"), weight=1
    ),
    Overlay(
        "runaway",
        ("once.py", "deeds.py"),
        _once("python3 once.py"),
        _deeds("OK ERR_OVERLAY_CRASH", "answer", "run_away"),
        needs_namespace=True,
        weight=1,
    ),
    Overlay(
        "worker",
        ("worker.py", "deeds.py"),
        _native("proc", {"command": ["python3", "worker.py"], "mode": "worker", "workers": _WORKERS}, LATE_S),
        _WORKER,
        resident=True,
    ),
    Overlay(
        "service",
        ("service.py", "deeds.py"),
        _native("http", {"command": ["python3", "service.py"], "idle_s": 1}),
        _RESIDENT,
        resident=True,
    ),
)
