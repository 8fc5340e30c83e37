"""HARD as a limit, with real programs: what has more is ended and told the figure, wherever in its tree it has it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from runners.base import TIERS, Code, Meter, ProcessTarget
from runners.confinement import Confinement
from runners.helpers import Helpers
from runners.process import ProcessRunner
from runners.tiers import Tiers
from tests import programs
from tests.runner_fixtures import nothing_left  # noqa: F401  # pytest finds it by its name
from tests.support import PATIENCE_S, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from runners.base import Job, Outcome

HARD_MB = 64
SCRIPT = str(programs.FOLDER / "hungry.py")


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(params=[True, False], ids=["namespace", "subreaper"])
async def runner(request: pytest.FixtureRequest) -> AsyncIterator[ProcessRunner]:
    made = ProcessRunner(Helpers(namespace=request.param), kill_grace_s=0.1)
    yield made
    await made.close(at_once=True)


def a_job(mode: Any, payload: dict[str, Any], **changes: Any) -> Job:
    target = ProcessTarget((sys.executable, SCRIPT), programs.ENV, mode=mode)
    return programs.make_job(target, payload)._replace(hard_mb=HARD_MB, meter=Meter(), **changes)


async def run(runner: ProcessRunner, job: Job) -> Outcome:
    return await asyncio.wait_for(runner.run(job), PATIENCE_S)


each_mode = pytest.mark.parametrize("mode", ["spawn", "fork"])


@each_mode
@pytest.mark.parametrize("where", ["itself", "child", "grandchild", "children"])
async def test_what_has_more_than_its_hard_is_ended_and_told_the_figure(
    runner: ProcessRunner, mode: str, where: str
) -> None:
    outcome = await run(runner, a_job(mode, {"in": where, "mb": 100, "hold": True}))
    assert outcome.code is Code.MEMORY_LIMIT
    assert outcome.peak_mb is not None
    assert outcome.peak_mb > HARD_MB
    assert outcome.error == (
        f"the program used {outcome.peak_mb:.1f} MiB of memory, more than the 64 that it may, and was ended"
    )
    assert not outcome.retryable


@each_mode
async def test_what_had_more_for_a_moment_is_told_so_though_nobody_looked(runner: ProcessRunner, mode: str) -> None:
    outcome = await run(runner, a_job(mode, {"in": "itself", "mb": 80, "hold": False}))
    assert outcome.code is Code.MEMORY_LIMIT
    assert "more than the 64 that it may" in (outcome.error or "")
    assert outcome.result is None


@each_mode
async def test_what_stays_below_it_answers_and_its_peak_is_told(runner: ProcessRunner, mode: str) -> None:
    outcome = await run(runner, a_job(mode, {"in": "itself", "mb": 40, "hold": False}))
    assert outcome.ok
    assert outcome.peak_mb is not None
    assert 40 < outcome.peak_mb < HARD_MB


@each_mode
async def test_while_it_runs_its_meter_shows_what_its_whole_tree_has(runner: ProcessRunner, mode: str) -> None:
    job = a_job(mode, {"in": "grandchild", "mb": 40, "hold": True})
    meter = job.meter
    assert meter is not None
    running = asyncio.create_task(run(runner, job))
    await until(lambda: meter.used_mb > 40)
    assert meter.evict is not None
    meter.evict("to make room")
    outcome = await running
    assert (outcome.code, outcome.error) == (Code.EVICTED, "the program was ended to make room")
    assert outcome.peak_mb is not None
    assert outcome.peak_mb > 40
    assert meter.evict is None


@each_mode
async def test_one_call_that_is_ended_for_its_memory_leaves_its_neighbours_alone(
    runner: ProcessRunner, mode: str
) -> None:
    jobs = [a_job(mode, {"in": "itself", "mb": mb, "hold": False}) for mb in (1, 100, 1)]
    outcomes = await asyncio.gather(*(run(runner, job) for job in jobs))
    assert [outcome.code for outcome in outcomes] == [Code.OK, Code.MEMORY_LIMIT, Code.OK]


@each_mode
async def test_a_kill_from_outside_is_told_as_such_and_may_be_tried_again(runner: ProcessRunner, mode: str) -> None:
    job = a_job(mode, {"in": "itself", "mb": 40, "hold": True})
    meter = job.meter
    assert meter is not None
    running = asyncio.create_task(run(runner, job))
    await until(lambda: meter.used_mb > 40)
    processes = psutil.Process().children(recursive=True)
    os.kill(max(processes, key=lambda process: process.memory_info().rss).pid, signal.SIGKILL)
    outcome = await running
    assert outcome.code is Code.CRASH
    assert (outcome.error or "").startswith("the program was ended by SIGKILL")
    assert (outcome.error or "").endswith("; the bus did not do it, and the kernel does where memory has run out")
    assert outcome.retryable


@each_mode
async def test_the_backstop_gives_no_more_than_twice_and_the_answer_says_what_that_may_be(
    mode: str, tmp_path: Path
) -> None:
    confinement = Confinement(mode="off", tiers=Tiers(tmp_path, dict.fromkeys(TIERS, 16), {}), max_processes=64)
    runner = ProcessRunner(Helpers(confinement=confinement), kill_grace_s=0.1)
    try:
        outcome = await run(runner, a_job(mode, {"in": "itself", "mb": 10_000, "hold": False}))
    finally:
        await runner.close()
    assert outcome.code is Code.CRASH
    assert "MemoryError" in outcome.log
    assert (
        outcome.hint == "It may have run out of memory: of its own data it can have twice its HARD of 64 MiB at most."
    )
