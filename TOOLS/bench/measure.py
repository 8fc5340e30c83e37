"""One measurement: the load generator against a server, or the bare loop, and the CPU time that it took."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import tree
from layout import PARTS, PROGRAMS, BenchError, environment, overlay_of
from samples import Sample
from sleepers import sleeping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from servers import Servers
    from targets import Plan, Target

SLACK_S = 60.0
"""How long one measurement may take beyond its seconds."""


def measure(target: Target, connections: int, plan: Plan, servers: Servers) -> Sample:
    """One target once. Where the measuring itself fails that is an error of this sample, and the others go on."""
    try:
        return _measure(target, connections, plan, servers)
    except (BenchError, OSError, subprocess.TimeoutExpired, psutil.NoSuchProcess) as error:
        return Sample.failed(str(error))


def _measure(target: Target, connections: int, plan: Plan, servers: Servers) -> Sample:
    if target.server is None:
        return _sample(_run_loop(target, connections, plan, servers))
    with sleeping(target.sleepers, servers) if target.sleepers else contextlib.nullcontext():
        before_s = tree.cpu_s(servers.pid(target.server))
        tally = _run_load(target, connections, plan, servers)
        return _sample(tally | {"cpu_s": tree.cpu_s(servers.pid(target.server)) - before_s})


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
        "method": target.method,
        "paths": [target.path],
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
    argv = [str(PARTS / "rivals.py"), *options, "--", "loop", *PROGRAMS[str(target.program)].command]
    cwd = overlay_of(servers.folder, str(target.program))
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
