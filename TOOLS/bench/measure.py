"""One measurement: the load generator against a server, or the bare loop, and the CPU time that it took."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers import PARTS, BenchError, environment
from targets import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from servers import Servers
    from targets import Plan, Target

SLACK_S = 60.0
"""How long one measurement may take beyond its seconds."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement. `cpu_ms` is per call; None where nothing was answered."""

    calls_s: float
    p50_ms: float | None
    p99_ms: float | None
    cpu_ms: float | None
    errors: int
    first_error: str | None


def measure(target: Target, connections: int, plan: Plan, servers: Servers) -> Sample:
    """One target once. Raises `BenchError` where the measuring process itself fails."""
    if target.server is None:
        return _sample(_run_loop(target, connections, plan, servers))
    before = servers.cpu_s(target.server)
    tally = _run_load(target, connections, plan, servers)
    return _sample(tally | {"cpu_s": servers.cpu_s(target.server) - before})


def _sample(tally: Mapping[str, Any]) -> Sample:
    return Sample(
        calls_s=tally["calls"] / tally["seconds"],
        p50_ms=tally["p50_ms"],
        p99_ms=tally["p99_ms"],
        cpu_ms=tally["cpu_s"] * 1000 / tally["total"] if tally["total"] else None,
        errors=tally["errors"],
        first_error=tally["first_error"],
    )


def _run_load(target: Target, connections: int, plan: Plan, servers: Servers) -> dict[str, Any]:
    job = {
        "port": servers.ports[str(target.server)],
        "path": target.path,
        "body": target.body,
        "connections": connections,
        "seconds": plan.seconds,
        "warmup_s": plan.warmup_s,
        "status": target.status,
        "must": target.must,
    }
    return _tally([str(PARTS / "load.py")], json.dumps(job), servers.folder, environment(servers.folder), plan)


def _run_loop(target: Target, connections: int, plan: Plan, servers: Servers) -> dict[str, Any]:
    window = ["--seconds", str(plan.seconds), "--warmup", str(plan.warmup_s)]
    options = [*window, "--threads", str(connections), "--must", target.must]
    argv = [str(PARTS / "rivals.py"), *options, "--", "loop", *COMMANDS[str(target.program)]]
    cwd = servers.folder / "overlays" / f"echo_{target.program}"
    return _tally(argv, target.body, cwd, environment(servers.folder), plan)


def _tally(argv: Sequence[str], stdin: str, cwd: Path, env: Mapping[str, str], plan: Plan) -> dict[str, Any]:
    """Run a measuring process; it has a time limit, and what it prints is its tally."""
    limit_s = plan.seconds + plan.warmup_s + SLACK_S
    done = subprocess.run(
        [sys.executable, *argv],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=env,
        timeout=limit_s,
    )
    if done.returncode:
        raise BenchError(f"{Path(argv[0]).name} failed:\n{done.stderr[-2000:]}")
    tally: dict[str, Any] = json.loads(done.stdout)
    return tally
