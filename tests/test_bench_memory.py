"""The bench of `--memory`: its calls, its referee, its verdict. The whole of it runs for minutes, and not here."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTS = Path(__file__).resolve().parent.parent / "TOOLS" / "bench"

FAMILY = """
import signal, subprocess, sys
take = "import sys, signal; kept = b'x' * (int(sys.argv[1]) << 20); print('taken', flush=True); signal.pause()"
pipe = subprocess.PIPE
children = [subprocess.Popen([sys.executable, "-c", take, mb], stdout=pipe, text=True) for mb in sys.argv[1:]]
for child in children:
    child.stdout.readline()
print("ready", flush=True)
print([-child.wait() for child in children[1:]], flush=True)
sys.stdin.read()
for child in children:
    child.kill()
    child.wait()
"""
"""Starts children with so many MiB each, and tells by which signals all but the first end."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    before = set(sys.modules)
    sys.path.insert(0, str(PARTS))
    yield importlib.import_module("shared_memory")
    sys.path.remove(str(PARTS))
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == PARTS:
            del sys.modules[name]


def test_the_same_seed_gives_the_same_calls_within_their_bounds(bench: Any) -> None:
    plan = bench.MemoryPlan(seed=5)
    calls = bench.calls_of(plan)
    assert calls == bench.calls_of(plan) != bench.calls_of(bench.MemoryPlan(seed=6))
    assert len(calls) == plan.calls
    assert all(bench.SMALLEST_MB <= call.mb <= bench.LARGEST_MB for call in calls)
    assert sum(call.high for call in calls) == plan.calls / 10
    assert [call.at_s for call in calls] == sorted(call.at_s for call in calls)


def started(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], stdin=pipe, stdout=pipe, text=True)


def test_the_referee_kills_the_largest_until_the_rest_fits() -> None:
    with started("-c", FAMILY, "20", "60", "40") as family, started(str(PARTS / "referee.py")) as referee:
        assert family.stdout is not None
        assert referee.stdin is not None
        assert family.stdout.readline() == "ready\n"
        referee.stdin.write(json.dumps({"pid": family.pid, "limit_mb": 50}) + "\n")
        referee.stdin.flush()
        assert family.stdout.readline() == "[9, 9]\n"
        said, _ = referee.communicate(timeout=PATIENCE_S)
        family.communicate(timeout=PATIENCE_S)
    seen = json.loads(said)
    (_, first_mb), (_, second_mb) = seen["kills"]
    assert first_mb > 60 > second_mb > 40
    assert seen["peak_mb"] > 120


def a_run(bench: Any, name: str, count: int | None, done: int, kills: int = 0, **more: Any) -> Any:
    run = bench.Run(bench.Policy(name, count, **more), seconds=10.0, done=done)
    run.seen.kills = [(1.0, 100.0)] * kills
    return run


def test_the_rival_is_the_fastest_that_loses_no_more(bench: Any) -> None:
    runs = (
        a_run(bench, "the bus", None, 200, kills=1),
        a_run(bench, "4 at once", 4, 80),
        a_run(bench, "6 at once", 6, 100, kills=1),
        a_run(bench, "8 at once", 8, 150, kills=2),
        a_run(bench, "an oracle", 200, 300, knows=True),
    )
    found = bench.MemoryFound(bench.MemoryPlan(), runs, bench.Declared((90.0,), (100.0,)))
    assert found.best_rival.policy.name == "6 at once"
    assert (found.ratio, found.held) == (2.0, True)
    slow = bench.Declared((70.0,), (100.0,))
    assert not bench.MemoryFound(bench.MemoryPlan(), runs, slow).held
    runs[0].lost = 1
    assert not found.held


def test_what_is_told_has_a_row_for_each_policy(bench: Any) -> None:
    run = a_run(bench, "the bus", None, 200)
    run.seen.seconds = 1.0
    found = bench.MemoryFound(
        bench.MemoryPlan(), (run, a_run(bench, "4 at once", 4, 80)), bench.Declared((9.0,), (9.0,))
    )
    found.runs[1].seen.seconds = 1.0
    table = [line for line in bench.markdown_memory(found).splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
