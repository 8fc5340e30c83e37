"""Helpers and what they hold: whatever a program does and whoever is killed, each call ends and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from runners import helper as module
from runners import helpers as pools
from runners import wire
from runners.exits import Exit
from runners.helper_errors import GoneError
from runners.helpers import Helpers
from tests.programs import hostile
from tests.programs.a_home import COMMAND, WITHOUT_LIST, a_home, children, script_of, with_token
from tests.runner_fixtures import nothing_left
from tests.support import PATIENCE_S, REPO, eventually, is_alive, until

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator

    from runners.helper import Helper
    from runners.helpers import Pool
    from runners.processes import Home, Process

FORMS = ["namespace", "subreaper"]
MODES = ["spawn", "fork"]
tokens = (f"token-{os.getpid()}-{number}-" for number in itertools.count())

in_both_modes = pytest.mark.parametrize("mode", MODES)
in_one_form = pytest.mark.parametrize("form", ["subreaper"])


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def mode() -> str:
    """Of the tests that do not care for it."""
    return "spawn"


@dataclasses.dataclass
class Program:
    """A running `hostile.py`: our ends of its stdin and stdout."""

    process: Process
    stdin: int
    stdout: int

    async def line(self) -> str:
        """The next line; what comes with it is dropped."""
        text = b""
        while b"\n" not in text:
            part = await self._read()
            assert part, f"it ended after {text!r}"
            text += part
        return text.partition(b"\n")[0].decode()

    async def _read(self) -> bytes:
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        loop.add_reader(self.stdout, _resolve, readable)
        try:
            await asyncio.wait_for(readable, PATIENCE_S)
        finally:
            loop.remove_reader(self.stdout)
        return os.read(self.stdout, 65536)

    def let_go(self) -> None:
        """Its stdin ends, and so does `hold`."""
        os.close(self.stdin)
        self.stdin = -1

    async def end(self) -> Exit:
        """How it ended. By then nobody of it may be left, so nobody holds its stdout."""
        exit_ = await asyncio.wait_for(asyncio.shield(self.process.ended), PATIENCE_S)
        while os.read(self.stdout, 65536):
            pass
        return exit_

    def close(self) -> None:
        os.close(self.stdout)
        if self.stdin >= 0:
            os.close(self.stdin)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Bench:
    """Helpers of one form, and programs of one mode that they run."""

    def __init__(self, form: str, mode: str) -> None:
        self.form = form
        self.token = next(tokens)
        self.helpers = Helpers(most=1, namespace=form == "namespace")
        self.script = script_of(mode)
        self.home = a_home(self.token)
        self.programs: list[Program] = []

    def pool(self) -> Pool:
        return self.helpers.pool(self.home, self.script)

    async def helper(self) -> Helper:
        pool = self.pool()
        assert pool.script == self.script, "a script that is unfit for fork was spawned"
        if (helper := pool.any()) is not None:
            return helper
        return await asyncio.wait_for(pool.ready(), PATIENCE_S)

    async def start(self, way: str, *arguments: object) -> Program:
        """The program, once it has started."""
        return self.launch(await self.helper(), way, *arguments)

    async def started(self, way: str, *arguments: object) -> Program:
        """The program, once it has done its worst."""
        program = await self.start(way, *arguments)
        assert await program.line() == "ready"
        return program

    def launch(self, helper: Helper, way: str, *arguments: object) -> Program:
        reader, stdin = os.pipe2(os.O_CLOEXEC)
        stdout, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, True)
        try:
            argv = [*COMMAND, self.token, way, *map(str, arguments)]
            program = Program(helper.launch(argv, (reader, writer, 2), {}), stdin, stdout)
        except BaseException:
            os.close(stdin)
            os.close(stdout)
            raise
        finally:
            os.close(reader)
            os.close(writer)
        self.programs.append(program)
        return program

    async def left(self) -> dict[int, str]:
        """What has our token and belongs to no helper."""
        own = await self.helper()
        return {pid: words for pid, words in with_token(self.token).items() if pid not in {own.pid, inner(own)}}

    async def close(self) -> None:
        await self.helpers.close()
        for program in self.programs:
            program.close()
        assert with_token(self.token) == {}


def started_by_us() -> set[int]:
    """The processes that this one started, whichever thread did."""
    return {child.pid for child in psutil.Process().children()}


def inner(helper: Helper) -> int:
    """The process that does the helper's work."""
    (child,) = children(helper.pid)
    return child


def programs_of(helper: Helper) -> list[int]:
    """What came to be a child of the helper, as we see it, and their children."""
    found = children(inner(helper))
    for pid in found:
        found.extend(children(pid))
    return found


def state_of(pid: int) -> str:
    """A letter, as in proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def another(home: Home) -> Home:
    """Of the same folder, with helpers of its own."""
    return dataclasses.replace(home, phase="CLEAR")


def later(home: Home, editions: int = 1) -> Home:
    return dataclasses.replace(home, edition=home.edition + editions)


def descriptors(pid: int | None = None) -> list[int]:
    """Those that a process has open; of this one also that by which it looks."""
    return sorted(int(path.name) for path in Path(f"/proc/{pid or 'self'}/fd").iterdir())


@pytest.fixture(autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process waits for a call, but where a test is about that."""
    monkeypatch.setattr(module, "AHEAD_AFTER", 1 if "waiting" in request.fixturenames else sys.maxsize)


@pytest.fixture
async def bench(form: str, mode: str) -> AsyncIterator[Bench]:
    made = Bench(form, mode)
    try:
        if form == "namespace" and not (await made.helper()).namespace:
            pytest.skip("this kernel gives no pid namespace")
        yield made
    finally:
        await made.close()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers that do not answer are given up at once."""
    monkeypatch.setattr(module, "GONE_S", 0.05)


# Processes that are forked before their calls


@pytest.fixture
async def waiting(bench: Bench) -> tuple[Helper, int]:
    """A helper of a script that has had a call, and the process that waits for its next."""
    helper = await bench.helper()
    assert children(inner(helper)) == []
    first = await bench.started("hold")
    assert len(children(inner(helper))) == 1
    first.let_go()
    assert (await first.end()).code == hostile.ENDED
    await until(lambda: len(children(inner(helper))) == 1)
    (pid,) = children(inner(helper))
    return helper, pid


in_mode_fork = pytest.mark.parametrize("mode", ["fork"])


@in_mode_fork
async def test_what_a_helper_loads_when_it_may_write_no_more_is_compiled_before(bench: Bench) -> None:
    compiled = [Path(cache_from_source(path)) for path in module.LAUNCH.parent.glob("zygote*.py")]
    for path in compiled:
        path.unlink(missing_ok=True)
    module._compile_zygote.cache_clear()
    home = another(bench.home)
    silent = dataclasses.replace(home, env={**home.env, "PYTHONDONTWRITEBYTECODE": "1"})
    await bench.helpers.pool(silent, bench.script).ready()
    assert len(compiled) > 1
    assert all(path.is_file() for path in compiled)


@in_mode_fork
async def test_a_lone_call_gets_the_process_that_waits_for_it_and_the_next_one_another(
    bench: Bench, waiting: tuple[Helper, int]
) -> None:
    helper, pid = waiting
    program = await bench.started("hold")
    assert children(inner(helper)) == [pid]
    beside = await bench.started("hold")
    assert len(children(inner(helper))) == 2
    for one in (program, beside):
        one.let_go()
        assert (await one.end()).code == hostile.ENDED
    await until(lambda: len(children(inner(helper))) == 1)
    assert children(inner(helper)) != [pid]


@in_mode_fork
async def test_a_call_has_a_process_though_the_one_that_waited_was_killed(
    bench: Bench, waiting: tuple[Helper, int]
) -> None:
    helper, pid = waiting
    os.kill(pid, signal.SIGKILL)
    await until(lambda: children(inner(helper)) != [pid])
    for _ in range(2):
        program = await bench.started("hold")
        program.let_go()
        assert (await program.end()).code == hostile.ENDED


@in_mode_fork
@pytest.mark.parametrize("killed", ["inner", "outer", None])
async def test_a_process_that_waits_goes_with_its_helper(
    bench: Bench, waiting: tuple[Helper, int], killed: str | None
) -> None:
    helper, pid = waiting
    if killed is None:
        helper.close()
    else:
        os.kill(helper.pid if killed == "outer" else inner(helper), signal.SIGKILL)
    await asyncio.wait_for(helper.gone, PATIENCE_S)
    assert not is_alive(pid)
    assert with_token(bench.token) == {}


@in_mode_fork
async def test_a_process_that_waits_holds_nothing_but_where_it_waits(bench: Bench, waiting: tuple[Helper, int]) -> None:
    _, pid = waiting
    await until(lambda: len(descriptors(pid)) == 4)  # it lets go of them once it is there
    assert descriptors(pid)[:3] == [0, 1, 2]


# What programs leave behind


@in_both_modes
@pytest.mark.parametrize("way", hostile.LEFT)
async def test_what_a_program_leaves_behind_ends_with_it_and_other_calls_go_on(bench: Bench, way: str) -> None:
    steady = await bench.started("hold")
    program = await bench.started(way)
    program.let_go()
    exit_ = await program.end()
    assert (exit_.code, exit_.lost) == (hostile.ENDED, None)
    assert len(programs_of(await bench.helper())) == 1
    steady.let_go()
    exit_ = await steady.end()
    assert (exit_.code, exit_.lost) == (hostile.ENDED, None)


@in_both_modes
async def test_what_a_running_call_left_behind_is_its_own_until_it_ends(bench: Bench) -> None:
    busy = [await bench.started(way) for way in ("orphan", "daemon", "daemon of a daemon")]
    alive = programs_of(await bench.helper())
    other = await bench.started("daemon")
    other.let_go()
    await other.end()
    assert sorted(programs_of(await bench.helper())) == sorted(alive)
    assert "Z" not in {state_of(pid) for pid in alive}
    for program in busy:
        program.let_go()
        await program.end()
    assert programs_of(await bench.helper()) == []


@in_both_modes
@pytest.mark.parametrize("way", ["deaf", "comet", "unknown"])
async def test_kill_ends_also_what_left_the_group(bench: Bench, way: str) -> None:
    program = await bench.started(way)
    program.process.signal(signal.SIGKILL)
    exit_ = await program.end()
    assert (exit_.code, exit_.lost) == (-signal.SIGKILL, None)
    assert programs_of(await bench.helper()) == []


# What programs do to others and to themselves


@in_both_modes
async def test_a_program_inherits_three_descriptors(bench: Bench) -> None:
    assert await (await bench.start("descriptors")).line() == "0 1 2"


@in_both_modes
@pytest.mark.parametrize("form", ["namespace"])  # without one it sees all of this machine
async def test_a_program_that_kills_all_that_it_sees_does_not_reach_the_helper(bench: Bench) -> None:
    helper = await bench.helper()
    other, killer = await bench.started("hold"), await bench.started("kill all")
    assert (await other.end()).code == -signal.SIGKILL
    killer.let_go()
    exit_ = await killer.end()
    assert (exit_.code, exit_.lost) == (hostile.ENDED, None)
    assert await bench.helper() is helper


@in_both_modes
@pytest.mark.parametrize("way", [("signal parent", int(signal.SIGKILL)), ("signal parent variously",)])
async def test_a_program_that_signals_its_parent_ends_at_most_its_own_helper(
    bench: Bench, way: tuple[Any, ...]
) -> None:
    helper = await bench.helper()
    program = await bench.start(*way)
    if bench.form == "namespace":
        assert await program.line() == "ready"
        program.let_go()
        assert (await program.end()).code == hostile.ENDED
        assert await bench.helper() is helper
    else:
        assert "was ended by" in str((await program.end()).lost)
        assert await bench.helper() is not helper
    program = await bench.started("hold")
    program.let_go()
    assert (await program.end()).code == hostile.ENDED


@in_both_modes
async def test_a_program_that_stops_its_parent_stops_no_process_1(bench: Bench, soon: None) -> None:
    program = await bench.start("signal parent", int(signal.SIGSTOP))
    assert await program.line() == "ready"
    program.process.signal(signal.SIGKILL)
    exit_ = await program.end()
    assert (exit_.lost is None) == (bench.form == "namespace")


@pytest.mark.parametrize("way", ["stop", "stop group"])
async def test_a_program_that_stops_itself_can_be_killed(bench: Bench, way: str) -> None:
    program = await bench.started(way)
    (pid,) = programs_of(await bench.helper())
    await until(lambda: state_of(pid) == "T")
    program.process.signal(signal.SIGKILL)
    assert (await program.end()).code == -signal.SIGKILL


async def test_a_program_whose_pipe_is_full_can_be_killed(bench: Bench) -> None:
    program = await bench.started("flood")
    program.process.signal(signal.SIGKILL)
    assert (await program.end()).code == -signal.SIGKILL


# Helpers that end, stop or fall silent


async def lose(bench: Bench, *pids: int) -> None:
    """Kill these with calls in flight. Each call ends as lost, with nobody left; the next one has another helper."""
    helper = await bench.helper()
    calls = [await bench.started(way) for way in ("hold", "deaf", "comet", "unknown", "stopped")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for call in calls:
        exit_ = await call.end()
        assert exit_ == Exit(None, lost="the helper that ran it was ended by SIGKILL")
    assert helper.gone.done()
    assert with_token(bench.token) == {}
    program = await bench.started("hold")
    assert await bench.helper() is not helper
    program.let_go()
    assert (await program.end()).code == hostile.ENDED


@in_both_modes
async def test_the_calls_of_a_helper_that_is_killed_are_lost_and_nothing_is_left(bench: Bench) -> None:
    await lose(bench, inner(await bench.helper()))


@in_both_modes
async def test_the_calls_of_a_helper_that_is_killed_from_outside_are_lost_and_nothing_is_left(bench: Bench) -> None:
    helper = await bench.helper()
    call = await bench.started("comet")
    os.kill(helper.pid, signal.SIGKILL)
    assert "the helper that ran it was ended by SIGKILL" in str((await call.end()).lost)
    assert with_token(bench.token) == {}
    await lose(bench, inner(await bench.helper()))


@in_both_modes
@pytest.mark.parametrize("stopped", [("inner",), ("outer",), ("inner", "outer")])
async def test_a_kill_that_a_stopped_helper_does_not_obey_ends_the_helper(
    bench: Bench, soon: None, stopped: tuple[str, ...]
) -> None:
    helper = await bench.helper()
    calls = [await bench.started(way) for way in ("hold", "deaf")]
    for which in stopped:
        os.kill(helper.pid if which == "outer" else inner(helper), signal.SIGSTOP)
    if "inner" not in stopped:
        os.kill(inner(helper), signal.SIGKILL)
    calls[0].process.signal(signal.SIGKILL)
    exits = [await call.end() for call in calls]
    assert exits[0].code is None or exits[0].code == -signal.SIGKILL  # it may obey when it goes on to end
    for exit_ in exits[1:]:
        assert "the helper that ran it was ended by" in str(exit_.lost)
    assert with_token(bench.token) == {}
    assert await bench.helper() is not helper


async def test_a_helper_that_is_stopped_can_be_closed(bench: Bench, soon: None) -> None:
    await bench.started("deaf")
    os.kill(inner(await bench.helper()), signal.SIGSTOP)
    await asyncio.wait_for(bench.helpers.close(), PATIENCE_S)
    assert with_token(bench.token) == {}


async def test_a_program_is_given_to_another_helper_where_the_first_has_just_ended(bench: Bench) -> None:
    helper = await bench.helper()
    ended = os.pidfd_open(helper.pid)
    os.kill(inner(helper), signal.SIGKILL)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000)  # without the event loop, which so knows nothing of it
    os.close(ended)
    assert await bench.helper() is helper
    null = os.open(os.devnull, os.O_RDWR)
    process = await bench.helpers.start(bench.home, ["true"], (null, null, null))
    os.close(null)
    assert (await asyncio.wait_for(process.ended, PATIENCE_S)).code == 0


@in_one_form
async def test_a_helper_that_has_just_ended_takes_no_program(bench: Bench) -> None:
    helper = await bench.helper()
    helper.close()
    with pytest.raises(GoneError):
        bench.launch(helper, "hold")
    assert bench.programs == []
    assert await bench.helper() is not helper


@in_both_modes
@pytest.mark.parametrize("stopped", [False, True])
async def test_nothing_is_left_of_a_bus_that_is_killed(mode: str, form: str, stopped: bool) -> None:
    token = next(tokens)
    ways = ["hold", "deaf", "comet", "unknown", "stopped", "daemon of a daemon"]
    stdin, ours = os.pipe()
    stdout, theirs = os.pipe()
    bus = subprocess.Popen(  # noqa: ASYNC220  # the loop has nothing else to do
        [sys.executable, "-m", "tests.programs.a_bus", form, mode, token, *ways],
        cwd=REPO,
        stdin=stdin,
        stdout=theirs,
        start_new_session=True,
    )
    os.close(stdin)
    os.close(theirs)
    with os.fdopen(stdout, "rb") as said:
        assert [said.readline() for _ in ways] == [b"ready\n"] * len(ways)
        (helper,) = children(bus.pid)
        (inside,) = children(helper)
        if stopped:
            os.kill(inside, signal.SIGSTOP)
        bus.kill()
        bus.wait()
        assert said.read() == b""  # it ends when nobody holds it
    os.close(ours)
    eventually(lambda: not is_alive(helper), "the helper has ended")
    assert with_token(token) == {}


# Many at once, and limits


@in_both_modes
async def test_many_programs_run_at_once(bench: Bench) -> None:
    helper = await bench.helper()
    programs = [bench.launch(helper, "hold") for _ in range(64)]
    assert {await program.line() for program in programs} == {"ready"}
    assert len(programs_of(helper)) == 64
    for program in programs:
        program.let_go()
    assert {(await program.end()).code for program in programs} == {hostile.ENDED}
    assert programs_of(helper) == []


async def quick(bench: Bench, count: int, *arguments: str) -> list[Process]:
    helper = await bench.helper()
    argv = [*COMMAND, bench.token, "exit", "3"] if bench.script else ["sh", "-c", "exit 3", *arguments]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        return [helper.launch(argv, (null, null, null), {}) for _ in range(count)]
    finally:
        os.close(null)


@in_both_modes
async def test_many_programs_in_a_row_each_end_with_their_own_status(bench: Bench) -> None:
    for _ in range(10):
        processes = await quick(bench, 50)
        exits = [await asyncio.wait_for(process.ended, PATIENCE_S) for process in processes]
        assert {(exit_.code, exit_.lost) for exit_ in exits} == {(3, None)}
    assert programs_of(await bench.helper()) == []


@in_both_modes
async def test_what_a_stopped_helper_does_not_take_waits_for_it(bench: Bench) -> None:
    pid = inner(await bench.helper())
    os.kill(pid, signal.SIGSTOP)
    before = len(descriptors())
    processes = await quick(bench, 64, "x" * 20_000)
    if bench.script is None:  # else the messages are too short to fill the socket
        assert len(descriptors()) > before
    os.kill(pid, signal.SIGCONT)
    exits = [await asyncio.wait_for(process.ended, PATIENCE_S) for process in processes]
    assert {exit_.code for exit_ in exits} == {3}
    assert len(descriptors()) == before


@in_one_form
async def test_what_waits_for_a_helper_that_ends_is_lost(bench: Bench) -> None:
    pid = inner(await bench.helper())
    os.kill(pid, signal.SIGSTOP)
    processes = await quick(bench, 64, "x" * 20_000)
    os.kill(pid, signal.SIGKILL)
    exits = [await asyncio.wait_for(process.ended, PATIENCE_S) for process in processes]
    assert {exit_.lost for exit_ in exits} == {"the helper that ran it was ended by SIGKILL"}


class Refusing:
    """A socket through which nothing can be sent, for a reason that passes."""

    def __init__(self, other: socket.socket) -> None:
        self._other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def sendmsg(self, *_: object) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


@in_one_form
async def test_what_waits_for_a_helper_and_cannot_be_sent_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = await bench.helper()
    os.kill(inner(helper), signal.SIGSTOP)
    processes = await quick(bench, 64, "x" * 20_000)
    monkeypatch.setattr(helper._wire, "_socket", Refusing(helper._wire._socket))
    os.kill(inner(helper), signal.SIGCONT)
    exits = [await asyncio.wait_for(process.ended, PATIENCE_S) for process in processes]
    assert exits[-1].lost is not None


@in_one_form
async def test_what_keeps_running_and_nobody_waits_for_any_more_is_not_started(bench: Bench) -> None:
    helper = await bench.helpers.pool(bench.home).ready()
    os.kill(inner(helper), signal.SIGSTOP)
    null = os.open(os.devnull, os.O_RDWR)
    starting = asyncio.create_task(bench.helpers.start(bench.home, ["sleep", "1000"], (null, null, null)))
    await until(lambda: bool(helper.processes))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    os.close(null)
    os.kill(inner(helper), signal.SIGCONT)
    await until(lambda: not helper.processes)


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process can open none."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@in_one_form
async def test_a_bus_without_descriptors_cannot_begin_a_helper(bench: Bench) -> None:
    await bench.helper()  # the event loop has what it needs
    pool = bench.helpers.pool(another(bench.home), bench.script)
    with no_more_descriptors(), pytest.raises(OSError, match="Too many open files"):
        await pool.ready()
    assert (await asyncio.wait_for(pool.ready(), PATIENCE_S)).is_open


@in_one_form
@pytest.mark.parametrize("spare", range(1, 6))
async def test_a_bus_with_few_descriptors_leaks_none(bench: Bench, spare: int) -> None:
    pool = bench.helpers.pool(another(bench.home), bench.script)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + spare, limit[1]))
    try:
        with contextlib.suppress(OSError):
            await pool.ready()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    for helper in list(pool.helpers):
        helper.close()
        await asyncio.wait_for(asyncio.shield(helper.gone), PATIENCE_S)
    assert descriptors() == before


@in_one_form
async def test_a_bus_without_descriptors_cannot_let_a_program_wait(bench: Bench) -> None:
    helper = await bench.helper()
    pid = inner(helper)
    os.kill(pid, signal.SIGSTOP)
    argv = [*COMMAND, bench.token, "exit", "3", "x" * 100_000]
    null = os.open(os.devnull, os.O_RDWR)
    processes: list[Process] = []

    def fill_the_socket() -> None:
        while len(processes) < 100:
            processes.append(helper.launch(argv, (null, null, null), {}))

    with no_more_descriptors(), pytest.raises(OSError, match="Too many") as caught:
        fill_the_socket()
    assert caught.value.errno in pools.SHORTAGES  # an ordinary user may have no more on their way, either
    os.close(null)
    os.kill(pid, signal.SIGCONT)
    exits = [await asyncio.wait_for(process.ended, PATIENCE_S) for process in processes]
    assert {exit_.code for exit_ in exits} == {3}


@in_both_modes
async def test_a_helper_without_descriptors_starts_nothing(bench: Bench) -> None:
    await (await bench.start("exit", 0)).end()  # so that it has done all that belongs to its start
    pid = inner(await bench.helper())
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    free = sorted({*range(100)} - {*descriptors(pid)})
    for spare in range(3):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[spare], limit[1]))
        program = await bench.start("hold")
        failed = (await program.end()).failed
        assert failed is not None
        assert failed.errno == errno.EMFILE
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    assert await (await bench.start("hold")).line() == "ready"


# Commands that cannot be started


@in_one_form
async def test_a_command_longer_than_a_message_is_refused(bench: Bench) -> None:
    with pytest.raises(OSError, match="Argument list too long"):
        await bench.start("hold", "x" * wire.MESSAGE_BYTES)


@in_one_form
@pytest.mark.parametrize(
    ("argv", "number", "words"),
    [
        (["no-such-program"], errno.ENOENT, "No such file"),
        (["/"], errno.EACCES, "Permission denied"),
        (["echo", "a\0b"], errno.EINVAL, "null byte"),
        (["echo", "\ud800"], errno.EINVAL, "surrogates not allowed"),
    ],
)
async def test_a_command_that_cannot_be_started_says_why(
    bench: Bench, argv: list[str], number: int, words: str
) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    try:
        with pytest.raises(OSError, match=words) as caught:
            await bench.helpers.start(bench.home, argv, (null, null, null))
    finally:
        os.close(null)
    assert caught.value.errno == number
    assert programs_of(await bench.helpers.pool(bench.home).ready()) == []


# Pools


async def test_a_helper_that_was_idle_for_long_ends(bench: Bench) -> None:
    helpers = Helpers(idle_s=0.01, namespace=bench.form == "namespace")
    helper = await helpers.pool(bench.home, bench.script).ready()
    program = bench.launch(helper, "hold")
    assert await program.line() == "ready"
    program.let_go()
    assert (await program.end()).lost is None
    await asyncio.wait_for(asyncio.shield(helper.gone), PATIENCE_S)
    assert helpers.state("test") == []
    await helpers.close()


@in_one_form
async def test_a_pool_that_another_replaced_lets_its_calls_end(bench: Bench) -> None:
    old = await bench.helper()
    program = await bench.started("hold")
    bench.home = later(bench.home)
    new = await bench.helper()
    assert new is not old
    assert not old.gone.done()
    program.let_go()
    exit_ = await program.end()
    assert (exit_.code, exit_.lost) == (hostile.ENDED, None)
    await asyncio.wait_for(asyncio.shield(old.gone), PATIENCE_S)
    assert await bench.helper() is new


@in_one_form
async def test_a_pool_without_calls_that_another_replaced_ends_at_once(bench: Bench) -> None:
    old = await bench.helper()
    bench.home = later(bench.home)
    bench.pool()
    await asyncio.wait_for(asyncio.shield(old.gone), PATIENCE_S)


@in_one_form
async def test_a_late_program_of_an_older_edition_has_a_helper_that_ends_with_it(bench: Bench) -> None:
    old_home, bench.home = bench.home, later(bench.home, 2)
    new = await bench.helper()
    bench.home = later(old_home)
    late = await bench.helper()
    program = bench.launch(late, "hold")
    assert await program.line() == "ready"
    assert not late.gone.done()
    program.let_go()
    assert (await program.end()).code == hostile.ENDED
    await asyncio.wait_for(asyncio.shield(late.gone), PATIENCE_S)
    assert bench.helpers.pool(later(old_home, 2), bench.script).any() is new


@in_one_form
async def test_a_helper_that_nobody_waits_for_any_more_ends_where_its_edition_is_old(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "TIDY_S", 0.0)
    bench.helpers.pool(later(bench.home), bench.script)
    before = started_by_us()
    waiting = asyncio.create_task(bench.helpers.pool(bench.home, bench.script).ready())
    await until(lambda: bool(started_by_us() - before))
    waiting.cancel()
    await until(lambda: not started_by_us() - before)
    assert bench.helpers.state("test") == []


@in_one_form
async def test_what_was_forgotten_ends_with_its_calls_and_is_made_anew(bench: Bench) -> None:
    busy, program = await bench.helper(), await bench.started("hold")
    bench.helpers.forget("other")
    assert await bench.helper() is busy
    bench.helpers.forget("test")
    assert bench.helpers.state("test")[0]["running"] == 1
    new = await bench.helper()
    assert new is not busy
    program.let_go()
    assert (await program.end()).code == hostile.ENDED
    await asyncio.wait_for(asyncio.shield(busy.gone), PATIENCE_S)
    bench.helpers.forget("test")
    await asyncio.wait_for(asyncio.shield(new.gone), PATIENCE_S)
    assert bench.helpers.state("test") == []


@in_one_form
async def test_of_too_many_idle_helpers_the_longest_idle_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "KEPT_IDLE", 2)
    monkeypatch.setattr(pools, "TIDY_S", 0.0)
    phases = ["ALIGN", "CLEAR", "SEAL", "ASCEND"]
    homes = [dataclasses.replace(bench.home, phase=phase) for phase in phases]
    helpers = [await bench.helpers.pool(home).ready() for home in homes[:1]]
    programs = [bench.launch(helpers[0], "hold")]
    for home in homes[1:]:
        helpers.append(await bench.helpers.pool(home).ready())
        programs.append(bench.launch(helpers[-1], "hold"))
    for program in programs:
        assert await program.line() == "ready"
        program.let_go()
        await program.end()
    await until(lambda: sum(helper.is_open for helper in helpers) <= 2)
    assert [helper.is_open for helper in helpers] == [False, False, True, True]


@in_one_form
async def test_two_phases_have_helpers_of_their_own(bench: Bench) -> None:
    first = await bench.started("hold")
    bench.home = another(bench.home)
    second = await bench.started("hold")
    assert {state["phase"]: state["running"] for state in bench.helpers.state("test")} == {"OPEN": 1, "CLEAR": 1}
    for program in (first, second):
        program.let_go()
        assert (await program.end()).lost is None


@in_one_form
async def test_a_second_helper_is_begun_where_the_first_has_work(bench: Bench) -> None:
    helpers = Helpers(most=2, namespace=bench.form == "namespace")
    pool = helpers.pool(bench.home, bench.script)
    first = await pool.ready()
    program = bench.launch(first, "hold")
    assert await program.line() == "ready"
    assert pool.free() is first  # nobody waits for the other
    await until(lambda: len(pool.helpers) == 2)
    assert pool.free() is not first
    await helpers.close()


@in_one_form
@pytest.mark.parametrize("mode", ["fork"])
async def test_a_second_helper_that_does_not_start_leaves_the_first_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = Helpers(most=2, namespace=bench.form == "namespace")
    pool = helpers.pool(bench.home, bench.script)
    first = await pool.ready()
    monkeypatch.setattr(module, "INTERPRETER", (sys.executable, "-c", "raise SystemExit(3)"))
    program = bench.launch(first, "hold")
    assert await program.line() == "ready"
    assert pool.free() is first
    await until(lambda: pool._starting is None)
    assert helpers.pool(bench.home, bench.script).free() is first
    assert pool._starting is None  # another is not tried at once
    await helpers.close()


WITHOUT_NAMESPACE = f"""
import sys
sys.path.insert(0, {str(module.LAUNCH.parent)!r})
import containment
containment._unshare = lambda channel: containment._give_up(channel, "no_namespace", (%d, "words"))
del sys.argv[0]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), {{"__name__": "__main__", "__file__": sys.argv[0]}})
"""
"""A helper where the kernel gives no namespace, with this error."""


@in_one_form
@pytest.mark.parametrize(("had", "error"), [(False, errno.EPERM), (False, errno.ENOSPC), (True, errno.EPERM)], ids=str)
async def test_a_kernel_that_gives_no_namespace_is_done_without_and_that_is_logged(
    bench: Bench, had: bool, error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "INTERPRETER", (*module.INTERPRETER, "-c", WITHOUT_NAMESPACE % error))
    helpers = Helpers(most=1)
    helpers.had_namespace = had
    assert (await asyncio.wait_for(helpers.pool(bench.home).ready(), PATIENCE_S)).namespace is False
    assert "programs run without a pid namespace: words" in caplog.text
    await helpers.close()


@in_one_form
@pytest.mark.parametrize(("had", "error"), [(False, errno.ENOMEM), (True, errno.ENOSPC)], ids=str)
async def test_where_the_kernel_is_short_of_namespaces_nothing_starts_without(
    bench: Bench, had: bool, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = module.INTERPRETER
    monkeypatch.setattr(module, "INTERPRETER", (*usual, "-c", WITHOUT_NAMESPACE % error))
    helpers = Helpers(most=1)
    helpers.had_namespace = had
    with pytest.raises(OSError, match="no pid namespace is to be had now: words") as caught:
        await asyncio.wait_for(helpers.pool(bench.home).ready(), PATIENCE_S)
    assert caught.value.errno in pools.SHORTAGES
    assert helpers._namespace
    await helpers.close()


@in_one_form
async def test_a_folder_made_anew_is_the_new_folder_for_the_next_edition(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "overlay"

    async def listed() -> str:
        program = await bench.helpers.pool(bench.home).ready()
        reader, writer = os.pipe()
        try:
            process = program.launch(["ls"], (reader, writer, 2), {})
            assert (await asyncio.wait_for(process.ended, PATIENCE_S)).code == 0
            os.set_blocking(reader, False)
            with contextlib.suppress(BlockingIOError):
                return os.read(reader, 100).decode()
            return ""
        finally:
            os.close(reader)
            os.close(writer)

    folder.mkdir()
    (folder / "old").touch()
    bench.home = a_home(bench.token, folder=folder)
    assert await listed() == "old\n"
    shutil.rmtree(folder)
    assert await listed() == ""
    folder.mkdir()
    (folder / "new").touch()
    bench.home = a_home(bench.token, folder=folder, edition=1)
    assert await listed() == "new\n"


@in_one_form
async def test_who_waits_for_a_helper_may_give_up_and_others_get_it(bench: Bench) -> None:
    bench.home = another(bench.home)
    pool = bench.pool()
    waiting = [asyncio.create_task(pool.ready()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    first, *others = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert others == [pool.any()] * 2


async def test_who_waits_for_a_helper_is_told_when_all_are_closed(bench: Bench) -> None:
    bench.home = another(bench.home)
    waiting = asyncio.create_task(bench.pool().ready())
    await asyncio.sleep(0)
    await asyncio.wait_for(bench.helpers.close(), PATIENCE_S)
    with pytest.raises(OSError, match="before it was ready"):
        await waiting
    with pytest.raises(OSError, match="shutting down"):
        await bench.pool().ready()


@in_both_modes
@pytest.mark.parametrize("stopped", ["inner", "outer"])
async def test_closing_at_once_ends_also_what_is_stopped_while_a_first_close_waits(
    bench: Bench, stopped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE_S", 0.05)
    helper = await bench.helper()
    program = await bench.started("deaf")
    os.kill(helper.pid if stopped == "outer" else inner(helper), signal.SIGSTOP)
    first = asyncio.create_task(bench.helpers.close())
    await asyncio.sleep(0)
    await asyncio.wait_for(bench.helpers.close(at_once=True), module.GONE_S)
    await asyncio.wait_for(first, PATIENCE_S)
    assert (await program.end()).lost is not None
    assert with_token(bench.token) == {}


@in_both_modes
async def test_closing_ends_what_runs(bench: Bench) -> None:
    helper = await bench.helper()
    programs = [await bench.started(way) for way in ("hold", "deaf", "comet", "unknown")]
    await asyncio.wait_for(bench.helpers.close(), PATIENCE_S)
    assert helper.gone.done()
    for program in programs:
        assert (await program.end()).lost is not None
    assert with_token(bench.token) == {}


DIES_AT_FIRST = """
import os, sys
try:
    os.mkdir({!r})
except FileExistsError:
    os.execv(sys.executable, [sys.executable, "-I", "-S", *sys.argv[1:]])
os.kill(os.getpid(), 9)
"""


@in_both_modes
async def test_a_helper_killed_while_it_starts_is_started_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interpreter = (sys.executable, "-I", "-S", "-c", DIES_AT_FIRST.format(str(tmp_path / "died")))
    monkeypatch.setattr(module, "INTERPRETER", interpreter)
    script = bench.script and dataclasses.replace(bench.script, interpreter=interpreter)
    pool = bench.helpers.pool(bench.home, script) if script else bench.helpers.pool(another(bench.home))
    assert (await asyncio.wait_for(pool.ready(), PATIENCE_S)).is_open
    assert (tmp_path / "died").exists()
    assert pool.unfit is None


@in_one_form
async def test_a_helper_that_is_silent_at_its_start_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERPRETER", (sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"))
    monkeypatch.setattr(module, "START_S", 0.05)
    with pytest.raises(OSError, match="not ready within"):
        await bench.helpers.pool(another(bench.home)).ready()


# What is told of an end


@in_both_modes
@pytest.mark.parametrize(
    ("way", "argument", "code"),
    [("exit", 0, 0), ("exit", 255, 255), ("die", int(signal.SIGABRT), -signal.SIGABRT), ("die", 40, -40)],
)
async def test_an_exit_has_status_or_signal_and_what_it_took(bench: Bench, way: str, argument: int, code: int) -> None:
    exit_ = await (await bench.start(way, argument)).end()
    assert (exit_.code, exit_.lost, exit_.failed) == (code, None, None)
    assert exit_.cpu_ms is not None
    assert exit_.peak_mb is not None
    assert 0 < exit_.cpu_ms < 1000
    assert 1 < exit_.peak_mb < 40


@in_one_form
async def test_an_exit_tells_the_processors_time(bench: Bench) -> None:
    program = await bench.started("burn", 60)
    program.let_go()
    exit_ = await program.end()
    assert exit_.cpu_ms is not None
    assert 60 <= exit_.cpu_ms < 600


@in_both_modes
async def test_an_exit_tells_the_memory_of_its_peak_and_a_running_program_that_of_now(bench: Bench) -> None:
    program = await bench.started("fill", 50)
    resident = await program.process.memory_mb()
    program.let_go()
    exit_ = await program.end()
    assert exit_.peak_mb is not None
    assert resident is not None
    assert 50 < resident < 90
    assert 50 < exit_.peak_mb < 90
    assert await program.process.memory_mb() is None


@in_both_modes
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("way", ["fill child", "fill daemon"])
async def test_the_memory_of_a_program_is_that_of_all_that_it_started(
    bench: Bench, way: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not listed and bench.script is None:
        monkeypatch.setattr(module, "INTERPRETER", (*module.INTERPRETER, "-c", WITHOUT_LIST))
        bench.home = another(bench.home)
    other = await bench.started("fill child", 20)
    program = await bench.started(way, 50)
    of_all, of_other = await program.process.memory_mb(), await other.process.memory_mb()
    assert of_all is not None
    assert of_other is not None
    assert 50 < of_all < 75
    assert 20 < of_other < 45


async def test_the_memory_of_a_program_whose_helper_has_ended_is_not_known(bench: Bench) -> None:
    program = await bench.started("hold")
    helper = await bench.helper()
    os.kill(inner(helper), signal.SIGSTOP)
    asking = asyncio.create_task(program.process.memory_mb())
    await asyncio.sleep(0)
    os.kill(inner(helper), signal.SIGKILL)
    assert await asyncio.wait_for(asking, PATIENCE_S) is None
    await program.end()
    program = await bench.started("hold")
    (await bench.helper()).close()
    assert await program.process.memory_mb() is None
