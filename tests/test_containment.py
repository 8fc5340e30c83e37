"""What holds a helper holds it whatever the overlay's interpreter is: it harms nobody, and nothing of it is left."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from runners import helper as module
from runners import helpers as pools
from runners import strays, wire
from runners.base import Code, ProcessTarget
from runners.helpers import Helpers, has_namespace
from runners.process import ProcessRunner
from tests import programs
from tests.programs.a_home import children, with_token
from tests.runner_fixtures import nothing_left  # noqa: F401  # pytest finds it by its name
from tests.support import PATIENCE_S, REPO, eventually, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from runners.base import Job, Mode

FAKE = Path(programs.FOLDER / "fake_python.py")
HELD = [f"token-{os.getpid()}-{number}-fake" for number in range(2)]
READY = '["ready",{"floor_kib":1,"loaded":[],"left":{},"failed":{}}]'


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["namespace", "subreaper"])
async def runner(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ProcessRunner]:
    namespace = request.param == "namespace"
    if namespace and not await has_namespace(tmp_path):
        pytest.skip("this kernel gives no pid namespace")
    made = ProcessRunner(Helpers(most=1, namespace=namespace), kill_grace_s=0.1)
    yield made
    await made.close()


@pytest.fixture(scope="module", autouse=True)
def none_ahead() -> Iterator[None]:
    """No process waits for a call: it would count as left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AHEAD_AFTER", sys.maxsize)
        yield


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[ProcessRunner]:
    """One that many overlays are called by."""
    made = ProcessRunner(Helpers(most=1), kill_grace_s=0.1)
    await honest(made)
    yield made
    await made.close()


def put_python(folder: Path, *way: str) -> None:
    """A `python3` of the overlay's own. (The hash bang takes a single argument.)"""
    path = folder / "python3"
    command = shlex.join([sys.executable, "-S", str(FAKE), *way])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)


def a_job(folder: Path, token: str = "", overlay: str = "fooled", **limits: Any) -> Job:
    target = ProcessTarget(("./python3", "run.py"), {**programs.ENV, "TOKEN": token})
    return programs.make_job(target, folder=folder, **limits)._replace(overlay=overlay)


async def honest(runner: ProcessRunner) -> tuple[object, int]:
    """What another overlay answers, and the helper that it has."""
    outcome = await runner.run(programs.make_job(programs.target("echo.py"), {"n": 1}))
    return outcome.result, runner.state("test")["helpers"][0]["pid"]


# What it leaves behind


@pytest.mark.parametrize("way", ["silent", "silent comet", "defiant", "defiant comet"])
@pytest.mark.parametrize("at_once", [False, True])
async def test_closing_ends_an_interpreter_that_never_speaks_and_what_it_started(
    runner: ProcessRunner, tmp_path: Path, way: str, at_once: bool
) -> None:
    put_python(tmp_path, way)
    async with programs.start_signal(tmp_path) as (_, started):
        call = asyncio.create_task(runner.run(a_job(tmp_path, HELD[0])))
        await started
        closing = asyncio.create_task(runner.close(at_once=at_once))
        assert (await asyncio.wait_for(call, PATIENCE_S)).code is Code.CANCELLED
        await asyncio.wait_for(closing, PATIENCE_S)
    assert with_token(HELD[0]) == {}


@pytest.mark.parametrize("way", ["silent", "defiant"])
async def test_the_end_of_the_process_outside_ends_an_interpreter_that_renounced_its_parents_death(
    runner: ProcessRunner, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE_S", 0.05)
    monkeypatch.setattr(pools, "TRIES", 1)
    put_python(tmp_path, way)
    async with programs.start_signal(tmp_path) as (_, started):
        call = asyncio.create_task(runner.run(a_job(tmp_path, HELD[0])))
        await started
        (outside,) = outsides(HELD[0])
        os.kill(outside, signal.SIGKILL)
        outcome = await asyncio.wait_for(call, PATIENCE_S)
    assert outcome.result == "spawned"
    assert with_token(HELD[0]).keys() - helpers_of(runner) == set()


def outsides(token: str) -> list[int]:
    """The processes with the token that this one started."""
    return [pid for pid in with_token(token) if f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{pid}/status").read_text()]


def helpers_of(runner: ProcessRunner) -> set[int]:
    """Those of the fooled overlay: the processes outside and inside."""
    outer = {helper["pid"] for helper in runner.state("fooled")["helpers"]}
    return outer | {child for pid in outer for child in children(pid)}


@pytest.mark.parametrize("form", ["namespace", "subreaper"])
@pytest.mark.parametrize("way", ["silent comet", "defiant comet"])
async def test_nothing_is_left_of_such_an_interpreter_when_the_bus_is_killed(
    form: str, way: str, tmp_path: Path
) -> None:
    put_python(tmp_path, way)
    async with programs.start_signal(tmp_path) as (_, started):
        bus = subprocess.Popen(  # noqa: ASYNC220  # it is killed below
            [sys.executable, "-m", "tests.programs.a_fooled_bus", form, HELD[1], str(tmp_path)],
            cwd=REPO,
        )
        await started
        bus.kill()
        bus.wait()
    eventually(lambda: with_token(HELD[1]) == {}, "nothing is left")


async def test_an_interpreter_that_takes_no_message_keeps_the_bus_from_nothing(
    shared: ProcessRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE_S", 0.05)
    put_python(tmp_path, "deaf to the bus")
    call = asyncio.create_task(shared.run(a_job(tmp_path, overlay=tmp_path.name, timeout_s=0.5)))
    result, _ = await honest(shared)
    assert result is not None
    assert (await asyncio.wait_for(call, PATIENCE_S)).code is Code.TIMEOUT
    await gone(shared, tmp_path.name)


# What it says


LIES = [
    "what?",
    "7",
    '{"a":1,"b":2}',
    '["contained",{"namespace":true}]',
    '["no_namespace","none"]',
    '["ended",[[1,0,1,1,null]]]',
    '["ended",7]',
    '["memory",[1,1]]',
    '["failed",[1,2,"words"]]',
    '["unheard",null]',
    json.dumps(["unfit", "x" * 100_000]),
    *['["ready",{}]', '["ready",7]', '["ready",{"floor_kib":1e999,"loaded":[],"left":{},"failed":{}}]'],
    *[
        '["ready",{"floor_kib":1,"loaded":[7],"left":{},"failed":{}}]',
        '["ready",{"floor_kib":1,"loaded":[],"left":[7],"failed":{}}]',
    ],
    *['["unfit",["no"]]', '["unclean","no"]', '["unclean",{}]', '["not_started",["x","y"]]', '["not_started",7]'],
]


def short(words: str) -> str:
    return words[:40]


@pytest.mark.parametrize("words", LIES, ids=short)
async def test_the_calls_of_a_helper_that_lies_at_its_start_are_spawned(
    shared: ProcessRunner, tmp_path: Path, words: str
) -> None:
    put_python(tmp_path, "says", words)
    before = await honest(shared)
    outcome = await asyncio.wait_for(shared.run(a_job(tmp_path, overlay=tmp_path.name)), PATIENCE_S)
    assert (outcome.code, outcome.result) == (Code.OK, "spawned")
    assert await honest(shared) == before
    (helper,) = shared.state(tmp_path.name)["helpers"]
    assert helper["mode"] == "spawn"
    assert len(helper["not_forked"]) <= wire.WORDS
    await gone(shared, tmp_path.name)


async def gone(runner: ProcessRunner, overlay: str) -> None:
    """Have it forgotten, until nothing of it is left."""
    runner.forget(overlay)
    honest = {helper["pid"] for helper in runner.state("test")["helpers"]}
    await until(lambda: {child.pid for child in psutil.Process().children()} == honest)


LATER_LIES = [
    *LIES[:5],
    *['["ended",[[99,0,1,1,null]]]', '["ended",[[1,"x",1,1,null]]]', '["ended",[[1,127,1,1,null]]]'],
    *['["ended",[[1,0,"x",1,null]]]', '["ended",[[1,0,1,1e999,null]]]', '["ended",[[1,0,1,1,{}]]]'],
    *['["ended",[[1,18446744073709551615,1,1,null]]]', '["ended",[[[],0,1,1,null]]]', '["ended",[[1]]]'],
    *['["memory",[1,1]]', '["failed",[99,2,"words"]]', '["failed",[1,"x","y"]]', '["failed",[1,2,3]]'],
    *[READY, '["unfit","no"]', '["unclean",{"json":"no"}]', '["not_started",[2,"words"]]'],
]


@pytest.mark.parametrize("words", LATER_LIES, ids=short)
async def test_the_call_of_a_helper_that_lies_is_lost_and_may_be_tried_again(
    shared: ProcessRunner, tmp_path: Path, words: str
) -> None:
    put_python(tmp_path, "first_says", f"{READY}\n{words}")
    before = await honest(shared)
    outcome = await asyncio.wait_for(shared.run(a_job(tmp_path, overlay=tmp_path.name)), PATIENCE_S)
    assert (outcome.code, outcome.retryable) == (Code.CRASH, True)
    assert outcome.error == "the helper that ran it said what cannot be, and was ended"
    assert await honest(shared) == before


@pytest.mark.parametrize("lies", ['["ended",[[1,0,1,1,null],[1,0,1,1,null]]]', '["failed",[1,2,"words"]]'])
async def test_a_helper_that_ends_its_own_call_falsely_harms_that_alone(
    shared: ProcessRunner, tmp_path: Path, lies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE_S", 0.05)
    put_python(tmp_path, "first_says", f"{READY}\n{lies}")
    before = await honest(shared)
    outcome = await asyncio.wait_for(shared.run(a_job(tmp_path, overlay=tmp_path.name)), PATIENCE_S)
    assert not outcome.ok
    assert await honest(shared) == before
    await gone(shared, tmp_path.name)


async def test_a_helper_that_learns_for_ever_is_given_up(
    runner: ProcessRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "STARTS", 3)
    (tmp_path / "python3").write_text(
        f"#!{sys.executable} -S\nimport os, sys\n"
        "if sys.argv[-1] != 'inside': print('\"spawned\"')\n"
        'else: os.write(int(sys.argv[-3]), b\'["unclean",{"%s":"no"}]\' % os.urandom(8).hex().encode())\n'
    )
    (tmp_path / "python3").chmod(0o755)
    outcome = await asyncio.wait_for(runner.run(a_job(tmp_path)), PATIENCE_S)
    assert outcome.result == "spawned"
    (helper,) = runner.state("fooled")["helpers"]
    assert helper["not_forked"] == "its helper was not ready after 3 starts"


async def test_an_interpreter_that_is_not_there_is_named_as_any_program(runner: ProcessRunner, tmp_path: Path) -> None:
    for name, reason in (("./python3", "No such file or directory"), ("python3", "No such file or directory")):
        target = ProcessTarget((name, "run.py"), {"PATH": str(tmp_path)})
        outcome = await runner.run(a_job(tmp_path)._replace(target=target, edition=len(name)))
        assert (outcome.code, outcome.error) == (Code.START, f"could not start {name!r}: {reason}")


async def test_the_interpreter_is_looked_up_on_the_path_that_the_program_gets(
    runner: ProcessRunner, tmp_path: Path
) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    (place / "python3").symlink_to(sys.executable)
    (tmp_path / "run.py").write_text("import json, sys; print(json.dumps(sys.executable))")
    target = ProcessTarget(("python3", "run.py"), {"PATH": "/no/such/place:bin"})
    outcome = await runner.run(a_job(tmp_path)._replace(target=target))
    assert outcome.ok, outcome
    assert runner.state("fooled")["helpers"][0]["mode"] == "fork"


SIGNALS = "import json, signal; print(json.dumps([str(signal.getsignal(n)) for n in range(1, 60)]))"


async def test_no_program_ignores_a_signal_that_the_bus_was_told_to_ignore(
    runner: ProcessRunner, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(SIGNALS)
    of_shells = (signal.SIGINT, signal.SIGQUIT)  # which a shell's background ignores
    ours = [signal.signal(number, signal.SIG_DFL) for number in of_shells]
    plain = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, check=True)  # noqa: ASYNC221
    for number, handler in zip(of_shells, ours, strict=True):
        signal.signal(number, handler)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        modes: tuple[Mode, ...] = ("spawn", "fork")
        for mode in modes:
            target = ProcessTarget((sys.executable, "run.py"), programs.ENV, mode=mode)
            assert (await runner.run(programs.make_job(target, folder=tmp_path))).result == json.loads(plain.stdout)
    finally:
        signal.signal(signal.SIGUSR1, before)


# Rights


CAPABILITIES = "import json; print(json.dumps(dict(l.split(':') for l in open('/proc/self/status'))['CapEff'].strip()))"


async def test_no_way_to_start_a_script_gives_it_capabilities(runner: ProcessRunner, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(CAPABILITIES)
    plain = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, check=True)  # noqa: ASYNC221
    modes: tuple[Mode, ...] = ("spawn", "fork")
    for mode in modes:
        target = ProcessTarget((sys.executable, "run.py"), programs.ENV, mode=mode)
        outcome = await runner.run(programs.make_job(target, folder=tmp_path))
        assert outcome.result == json.loads(plain.stdout)
    assert [helper["mode"] for helper in runner.state("test")["helpers"]] == ["spawn", "fork"]


WITHOUT_SYS_ADMIN = """
import asyncio, ctypes, pathlib, sys
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
if len(sys.argv) < 2:
    import os
    assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) == 0
    os.execv(sys.executable, [*sys.orig_argv, "without"])
from runners.helpers import has_namespace
print(asyncio.run(has_namespace(pathlib.Path.cwd())))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be without a capability of root")
async def test_root_without_the_capability_gets_a_user_namespace_as_others_do() -> None:
    if not gives_user_namespace():
        pytest.skip("this kernel gives no user namespace")
    command = [sys.executable, "-c", WITHOUT_SYS_ADMIN]
    asked = subprocess.run(command, cwd=REPO, capture_output=True, check=True)  # noqa: ASYNC221
    assert asked.stdout == b"True\n"


def gives_user_namespace() -> bool:
    pid = os.fork()
    if not pid:
        os._exit(ctypes.CDLL(None).unshare(0x10000000) != 0)  # CLONE_NEWUSER
    return os.waitpid(pid, 0)[1] == 0


# The last resort


def carrying(mark: str, variable: str) -> subprocess.Popen[bytes]:
    """A program whose environment has the mark."""
    command = [sys.executable, "-I", "-S", "-c", "import signal; print(flush=True); signal.pause()"]
    process = subprocess.Popen(command, env={variable: f"{mark}-3"}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


async def test_what_carries_the_mark_of_a_helper_is_ended_and_nothing_else() -> None:
    mark, other = f"aal-{os.getpid()}-1", f"aal-{os.getpid()}-12"
    marked = [carrying(mark, strays.MARK) for _ in range(2)]
    others = [carrying(other, strays.MARK), carrying(mark, "NAME")]
    await asyncio.to_thread(strays.end, mark)
    assert [process.wait() for process in marked] == [-signal.SIGKILL] * 2
    assert [process.poll() for process in others] == [None] * 2
    for process in others:
        process.kill()
        process.wait()


async def test_what_shows_no_environment_as_it_is_being_executed_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mark = f"aal-{os.getpid()}-1"
    marked = carrying(mark, strays.MARK)
    read, blank = Path.read_bytes, [Path(f"/proc/{marked.pid}/environ")] * 2
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"" if path in blank and blank.pop() else read(path))
    await asyncio.to_thread(strays.end, mark)
    assert marked.wait(timeout=10) == -signal.SIGKILL


async def test_who_cannot_look_for_the_mark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(_: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "read_bytes", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        strays.end("aal-none")


async def test_a_program_that_an_interpreter_started_ends_where_both_processes_of_its_helper_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE_S", 0.05)
    monkeypatch.setattr(pools, "TRIES", 1)
    runner = ProcessRunner(Helpers(most=1, namespace=False))
    put_python(tmp_path, "silent program")
    async with programs.start_signal(tmp_path) as (_, started):
        call = asyncio.create_task(runner.run(a_job(tmp_path, HELD[0])))
        await started
        kill_both()
        assert (await asyncio.wait_for(call, PATIENCE_S)).result == "spawned"
    await runner.close()
    assert with_token(HELD[0]) == {}


def kill_both() -> None:
    (outside,) = outsides(HELD[0])
    (inside,) = children(outside)
    for pid in (outside, inside):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN])
def at_a_childs_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the bus does at SIGCHLD."""
    before = signal.signal(signal.SIGCHLD, request.param)
    yield
    signal.signal(signal.SIGCHLD, before)


LEAVES_A_DAEMON = f"""
import sys
sys.path.insert(0, {str(programs.FOLDER)!r})
import hostile
hostile.daemon(hostile.deaf)
open("started", "w").write("started")
hostile.linger()
"""


@pytest.mark.usefixtures("at_a_childs_end")
@pytest.mark.parametrize("mode", ["spawn", "fork"])
async def test_programs_without_a_namespace_end_where_both_processes_of_their_helper_are_killed(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GONE_S", 0.05)
    runner = ProcessRunner(Helpers(most=1, namespace=False))
    (tmp_path / "run.py").write_text(LEAVES_A_DAEMON)
    target = ProcessTarget((sys.executable, "run.py"), {**programs.ENV, "TOKEN": HELD[0]}, mode=mode)
    async with programs.start_signal(tmp_path) as (_, started):
        call = asyncio.create_task(runner.run(programs.make_job(target, folder=tmp_path)))
        await started
        kill_both()
        assert (await asyncio.wait_for(call, PATIENCE_S)).retryable
    assert with_token(HELD[0]) == {}
    await runner.close()
