"""HARD as a limit of the kernel, where it has cgroups (v2) with memory and lets the tests have some: see `tests/vm`."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runners.base import Code, HttpTarget, ProcessTarget, ServiceTarget
from runners.cgroups import Cgroups, UnavailableError, find
from runners.faults import ServiceError
from runners.helper import AHEAD_AFTER
from runners.helpers import Helpers, has_namespace
from runners.processes import Script
from runners.service import Pace
from runners.services import Services
from runners.worker_pool import WorkerPace
from runners.workers import WorkerPools
from tests import programs
from tests.programs.a_cgroup_bus import EATER
from tests.programs.a_home import INTERPRETER, a_home, with_token
from tests.support import PATIENCE_S, REPO, Server, add_script, eventually, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from runners.exits import Exit
    from runners.processes import Process

HELD_MB = 32
MORE_MB = 48
SLOW_S = 10 * PATIENCE_S
"""How long a test waits here: a virtual machine is slow to give memory."""

NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"
"""One that other users may run, too."""

tokens = (f"token-{os.getpid()}-eater-{number}-" for number in itertools.count())


def ground() -> tuple[Path, str]:
    """Below which buses of these tests make their cgroups, before one is in its own; else why there is nothing."""
    try:
        return find().base, ""
    except UnavailableError as error:
        return Path("/nowhere"), str(error)


BASE, WHY_NOT = ground()

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no cgroups are to be had: {WHY_NOT}; see tests/vm")


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": True})


@functools.cache
def files_of(mb: int) -> list[str]:
    """The largest of what is installed, so many that they have more than this together."""
    files = [path for path in (REPO / ".venv").rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = sorted(((path.stat().st_size, str(path)) for path in files), reverse=True)
    totals = list(itertools.accumulate(size for size, _ in sizes))
    assert totals[-1] > mb << 20
    return [path for _, path in sizes[: bisect.bisect(totals, mb << 20) + 1]]


def left() -> list[str]:
    """What buses have made and not removed."""
    return sorted(path.name for path in BASE.glob("aal-*"))


@dataclass
class Bench:
    """Helpers whose programs nobody looks at."""

    mode: str
    namespace: bool
    token: str = field(default_factory=lambda: next(tokens))
    stdins: dict[Process, int] = field(default_factory=dict)
    stdouts: dict[Process, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cgroups = Cgroups()
        self.helpers = Helpers(most=1, namespace=self.namespace, cgroups=self.cgroups)

    async def launch(self, way: str, mb: int, *paths: str, held_mb: int = HELD_MB) -> Process:
        script = Script(INTERPRETER, EATER, stdin="pipe") if self.mode == "fork" else None
        pool = self.helpers.pool(a_home(self.token), script)
        helper = pool.any()
        if helper is None:
            helper = await asyncio.wait_for(pool.ready(), SLOW_S)
        reader, stdin = os.pipe()
        stdout, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        command = [*INTERPRETER, *EATER, self.token, way, str(mb), *paths]
        process = helper.launch(command, (reader, writer, 2), {}, held_kib=held_mb * 1024)
        os.close(reader)
        os.close(writer)
        self.stdins[process], self.stdouts[process] = stdin, stdout
        return process

    async def is_ready(self, process: Process) -> None:
        """It has all that it needs."""
        said = b""
        async with asyncio.timeout(SLOW_S):
            while said != b"ready\n":
                assert not process.ended.done(), process.ended.result()
                with contextlib.suppress(BlockingIOError):
                    said += os.read(self.stdouts[process], 100)
                await asyncio.sleep(0.01)

    async def let_end(self, process: Process) -> Exit:
        os.close(self.stdins.pop(process))
        return await self.end_of(process)

    @staticmethod
    async def end_of(process: Process) -> Exit:
        return await asyncio.wait_for(asyncio.shield(process.ended), SLOW_S)

    async def close(self) -> None:
        await self.helpers.close()
        for fd in (*self.stdins.values(), *self.stdouts.values()):
            os.close(fd)


@pytest.fixture(params=["spawn", "fork"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["namespace", "subreaper"])
async def bench(mode: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    if request.param and not await has_namespace(tmp_path):
        pytest.skip("this kernel gives no pid namespace")
    made = Bench(mode, request.param)
    yield made
    await made.close()
    assert with_token(made.token) == {}
    assert left() == []


async def test_a_program_that_needs_more_is_ended_with_the_figure_and_its_neighbour_lives(bench: Bench) -> None:
    neighbour = await bench.launch("eat", 4)
    await bench.is_ready(neighbour)
    ended = await bench.end_of(await bench.launch("eat", MORE_MB))
    assert (ended.code, ended.at_limit) == (-signal.SIGKILL, True)
    assert ended.peak_mb == pytest.approx(HELD_MB, abs=1)
    assert not neighbour.ended.done()
    ended = await bench.let_end(neighbour)
    assert (ended.code, ended.at_limit) == (0, False)


async def test_what_a_program_starts_counts_and_all_of_it_is_ended(bench: Bench) -> None:
    ended = await bench.end_of(await bench.launch("breed", MORE_MB))
    assert (ended.code, ended.at_limit) == (-signal.SIGKILL, True)


async def test_what_a_program_needs_of_its_limit_it_gets(bench: Bench) -> None:
    process = await bench.launch("breed", 16)
    await bench.is_ready(process)
    ended = await bench.let_end(process)
    assert (ended.code, ended.at_limit) == (0, False)
    assert ended.peak_mb is not None
    assert 16 < ended.peak_mb < HELD_MB


async def test_what_it_writes_to_memory_counts(bench: Bench) -> None:
    ended = await bench.end_of(await bench.launch("store", MORE_MB, "/dev/shm"))
    assert (ended.code, ended.at_limit) == (-signal.SIGKILL, True)


async def test_files_that_it_reads_do_not(bench: Bench) -> None:
    process = await bench.launch("read", 0, *files_of(MORE_MB))
    await bench.is_ready(process)
    ended = await bench.let_end(process)
    assert (ended.code, ended.at_limit) == (0, False)
    assert ended.peak_mb is not None
    assert ended.peak_mb < HELD_MB / 2


async def test_many_at_once_are_held_each_to_its_own(bench: Bench) -> None:
    running = [await bench.launch("eat", 2 if number % 8 else MORE_MB) for number in range(64)]
    for number, process in enumerate(running):
        if number % 8:
            await bench.is_ready(process)
    over = [process for number, process in enumerate(running) if not number % 8]
    assert [(await bench.end_of(process)).at_limit for process in over] == [True] * 8
    for process in running:
        if process not in over:
            assert (await bench.let_end(process)).code == 0


@pytest.mark.parametrize("mode", ["fork"])
async def test_a_fork_ahead_waits_in_its_place_and_is_held_to_what_its_call_may(bench: Bench) -> None:
    for _ in range(AHEAD_AFTER):
        await bench.let_end(await bench.launch("eat", 1))
    await until(lambda: any(_inhabitants(path) for path in find_calls()))
    (place,) = find_calls()
    waiting = _inhabitants(place)
    process = await bench.launch("eat", MORE_MB)
    assert process.cgroup is not None
    assert process.cgroup.path == str(place)
    assert _inhabitants(place) == waiting
    assert (await bench.end_of(process)).at_limit


def find_calls() -> list[Path]:
    return [path for path in BASE.glob("aal-*") if not path.name.endswith("-bus")]


def _inhabitants(path: Path) -> list[str]:
    try:
        return (path / "cgroup.procs").read_text().split()
    except OSError:
        return []


async def test_the_call_of_a_worker_is_told_and_another_worker_takes_the_next() -> None:
    cgroups = Cgroups()
    helpers = Helpers(most=1, cgroups=cgroups)
    pools = WorkerPools(helpers, None, kill_grace_s=0.1, idle_s=60.0, pace=WorkerPace(memory_s=1e6))
    job = programs.make_job(ProcessTarget(programs.argv("worker.py"), programs.ENV, mode="worker"), timeout_s=SLOW_S)
    job = job._replace(hard_mb=HELD_MB, limit=job.deadline)

    def asking(**payload: object) -> Any:
        return job._replace(envelope=json.dumps({"request_id": job.request_id, "payload": payload}).encode())

    assert (await pools.run(asking(do="echo"))).ok
    outcome = await pools.run(asking(do="swell", mb=MORE_MB))
    assert outcome.code == Code.MEMORY_LIMIT
    assert outcome.error is not None
    assert f"needed more memory than the {HELD_MB} MiB that it may use" in outcome.error
    assert (await pools.run(asking(do="echo"))).ok
    outcome = await pools.run(asking(do="grow", mb=MORE_MB)._replace(hard_mb=3 * MORE_MB))
    assert outcome.ok, outcome
    await pools.close()
    await helpers.close()
    assert left() == []


async def test_a_service_that_does_not_come_up_for_want_of_memory_says_so(tmp_path: Path) -> None:
    helpers = Helpers(most=1, cgroups=Cgroups())
    pace = Pace(memory_s=1e6)
    services = Services(helpers, None, kill_grace_s=0.1, drain_s=0.1, pace=pace)
    code = f"import http.server, os; x = b'x' * ({MORE_MB} << 20)"
    argv = (sys.executable, "-I", "-S", "-c", code)
    target = ServiceTarget(argv, programs.ENV, start_timeout_s=SLOW_S)
    job = programs.make_job(HttpTarget("/", service=target), timeout_s=SLOW_S, folder=tmp_path)
    with pytest.raises(ServiceError, match="needed more memory than it may use, and was ended with") as caught:
        async with services.use(job._replace(hard_mb=HELD_MB), target):
            pass
    await services.close()
    await helpers.close()
    assert left() == []
    assert caught.value.outcome.code == Code.START


# Whole buses


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup that nobody is in and nobody owns, but the user `nobody`."""
    base = BASE / "delegated"
    (BASE / "cgroup.subtree_control").write_text("+memory")
    base.mkdir()
    for path in (base, base / "cgroup.procs", base / "cgroup.subtree_control"):
        os.chown(path, NOBODY, NOBODY)
    yield base
    eventually(lambda: not (base / "cgroup.procs").read_text(), "nobody is left there")
    base.rmdir()


def a_bus(base: Path, *arguments: str, user: int = 0) -> subprocess.Popen[str]:
    """One that starts in this cgroup."""

    def enter() -> None:
        (base / "cgroup.procs").write_text("0")
        if user:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)

    python = SYSTEM_PYTHON if user else sys.executable
    site_packages = next((REPO / ".venv/lib").glob("python3*/site-packages"))
    environment = programs.ENV | {"PYTHONPATH": str(site_packages), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-m", "tests.programs.a_cgroup_bus", *arguments]
    return subprocess.Popen(
        command,
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=enter,  # noqa: PLW1509  # no thread runs here
    )


def test_a_bus_of_any_user_holds_its_calls_where_it_was_delegated_a_cgroup_and_goes_back(
    delegated: Path, mode: str
) -> None:
    with a_bus(delegated, mode, next(tokens), str(MORE_MB), user=NOBODY) as bus:
        said, _ = bus.communicate(timeout=SLOW_S)
    told = json.loads(said)
    assert told["path"].startswith(f"{delegated}/aal-")
    assert (told["at_limit"], told["peak_mb"]) == (True, pytest.approx(HELD_MB, abs=1))
    assert list(delegated.glob("aal-*")) == []
    assert (delegated / "cgroup.subtree_control").read_text().split() == []


def test_of_a_bus_that_was_killed_nothing_is_left_once_the_next_has_started(mode: str) -> None:
    token = next(tokens)
    with a_bus(BASE, mode, token) as bus:
        assert bus.stdout is not None
        told = json.loads(bus.stdout.readline())
        assert _inhabitants(Path(told["path"])) != []
        bus.kill()
    eventually(lambda: with_token(token) == {}, "nothing of its call runs")
    assert Path(told["path"]).name in left()
    with a_bus(BASE, mode, next(tokens), str(MORE_MB)) as following:
        following.communicate(timeout=SLOW_S)
    assert left() == []


def test_the_answer_and_the_record_tell_of_it(tmp_path: Path) -> None:
    (tmp_path / "overlays").mkdir()
    add_script(tmp_path / "overlays", "eater", "x=$(head -c 100m /dev/zero | tr '\\0' x)")
    memory = f"MEM[SOFT=8,HARD={HELD_MB},VOL=LOW]"
    with Server(tmp_path, sandbox="best-effort") as server:
        server.patience_s = SLOW_S
        reply = server.invoke("eater", profile=memory)
        assert reply.status == 502, reply.content
        answer = reply.json()
        assert answer["code"] == "ERR_MEMORY_LIMIT"
        line = server.line_of(answer["request_id"])
        assert line["memory"]["peak_mb"] == pytest.approx(HELD_MB, rel=0.2)
        assert left() != []
    eventually(lambda: left() == [], "the bus has gone back")
