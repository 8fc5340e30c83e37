"""A script cannot tell whether it was spawned or forked: both say the same, byte for byte, and end alike."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runners import helper as helper_module
from runners import python_command
from runners.base import ProcessTarget, Rights
from runners.helpers import Helpers, UnfitError
from runners.process import ProcessRunner
from runners.processes import Home, Script
from tests.programs import make_job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from runners.helper import Helper

CORPUS = Path(__file__).parent / "corpus"
STDIN = '{"payload":\n{"n": 3, "text": "žluťoučký kůň"}}\n'.encode()


@dataclass(frozen=True)
class Case:
    """A script of the corpus with its arguments; or, with `-m`, a module. `same_log` is False where chance writes."""

    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()
    code: int | None = 0
    stdin: str = "file"
    forked: bool = True
    same_log: bool = True
    loaded: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return " ".join((*self.options, *self.arguments, *(["<pipe"] if self.stdin == "pipe" else [])))


def case(command: str, code: int | None = 0, options: str = "", **more: Any) -> Case:
    return Case(tuple(command.split()), tuple(options.split()), code, **more)


CASES = [
    case("echo_json.py", loaded=("json",)),
    case("echo_json.py", stdin="pipe"),
    case("namespace.py x"),
    case("./own/../namespace.py x"),
    case("arguments.py --stdin-json x"),
    case("arguments.py", options="-u"),
    case("arguments.py", options="-I"),
    case("arguments.py", options="-E -s -B -O"),
    case("arguments.py", options="-X dev -W error"),
    case("arguments.py", options="-P"),
    case("text_and_buffer.py"),
    case("text_and_buffer.py", stdin="pipe"),
    case("reads_descriptor_0.py"),
    case("reads_descriptor_0.py", stdin="pipe"),
    case("asks_input.py"),
    case("asks_input.py", stdin="pipe"),
    case("seeks_stdin.py"),
    case("seeks_stdin.py", stdin="pipe"),
    case("exits.py 0"),
    case("exits.py 3", 3),
    case("exits.py -1", 255),
    case("exits.py 2**80", 255, same_log=False),
    case("exits.py True", 1),
    case("exits.py None"),
    case("exits.py 'words'", 1),
    case("exits.py [1,2]", 1),
    case("raises.py", 1),
    case("raises_group.py", 1),
    case("excepthook.py", 1),
    case("excepthook_fails.py", 1),
    case("excepthook_exits.py", 7),
    case("excepthook_gone.py", 1),
    case("threads.py"),
    case("thread_raises.py"),
    case("daemon_thread.py"),
    case("thread_pool_left.py"),
    case("at_exit.py", same_log=False),  # an address
    case("exits_at_exit.py", same_log=False),
    case("objects.py"),
    case("finalizers.py"),
    case("finalizers_plain.py"),
    case("finalizers_held_elsewhere.py"),
    case("file_held_elsewhere.py"),
    case("generator_held_elsewhere.py"),
    case("finalizers_in_typing.py"),
    case("finalizer_raises.py", same_log=False),
    case("files_left_open.py"),
    case("stdout_replaced.py"),
    case("stdout_none.py"),
    case("stdout_full.py", 120),
    case("stdout_closed.py", 120),
    case("stdout_broken.py", 120),
    case("write_to_broken_pipe.py", 1),
    case("stderr_closed.py", 1, same_log=False),
    case("interrupted.py", -signal.SIGINT),
    case("raises_interrupt.py", -signal.SIGINT),
    case("raises_interrupt.py own", 1),
    case("leaves_at_once.py", 3),
    case("forks.py"),
    case("fork_raises.py", 4),
    case("executes.py"),
    case("executes_python.py"),
    case("subprocesses.py"),
    case("multiprocessing_fork.py"),
    case("multiprocessing_spawn.py"),
    case("runs_asyncio.py"),
    case("asyncio_interrupted.py", -signal.SIGINT),
    case("asyncio_stdin.py"),
    case("asyncio_stdin.py", stdin="pipe"),
    case("asyncio_loop_left.py", same_log=False),
    case("epoll_stdin.py"),
    case("epoll_stdin.py", stdin="pipe"),
    case("selects_stdin.py"),
    case("selects_stdin.py", stdin="pipe"),
    case("signals.py", -signal.SIGHUP),
    case("process_state.py"),
    case("streams.py"),
    case("streams.py", stdin="pipe"),
    case("streams.py", options="-u"),
    case("faults.py", -signal.SIGSEGV, same_log=False),
    case("aborts.py", -signal.SIGABRT),
    case("warns.py"),
    case("warns.py", 1, options="-W error"),
    case("bad_escape.py"),
    case("bad_escape.py", options="-W always"),
    case("syntax_error.py", 1, forked=False),
    case("no_such_file.py", 2, forked=False),
    case("package", forked=False, code=1),
    case("latin_1.py"),
    case("-m package"),
    case("-m package.tool a b"),
    case("-m package.tool interrupt", -signal.SIGINT),
    case("-m package.tool raise", 1),
    case("-m package.missing", 1, forked=False),
    case("-m json.tool"),
    case("environment_first.py"),
    case("path_first.py"),
    case("shadow/run.py"),
    case("shadow/by_library.py"),
    case("uses_own.py"),
    case("import_missing.py", 1, loaded=("json",)),
    case("import_guarded.py", loaded=("json",)),
    case("import_fails.py", 1),
    case("import_exits.py", 6),
    case("import_dies.py", 8, forked=False),
    case("import_starts_thread.py", loaded=("json",)),
    case("import_opens_socket.py"),
    case("import_says_hello.py"),
    case("import_changes_world.py"),
    case("import_starts_child.py"),
    case("import_draws.py"),
    case("import_warns.py"),
    case("import_looks_around.py", loaded=("looks_around",)),
    case("frames.py"),
    case("introspects.py"),
    case("modules.py"),
    case("recursion.py"),
    case("c_stdio.py"),
    case("writes_2_mb_elsewhere.py"),
    case("writes_8_mb.py"),
    case("long_log.py"),
    case("relative_open.py"),
    case("changes_folder.py"),
    case("logs.py"),
]


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is forked ahead of every call, the first one, too."""
    monkeypatch.setattr(helper_module, "AHEAD_AFTER", 0)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def helpers() -> AsyncIterator[Helpers]:
    helpers = Helpers(most=1)
    yield helpers
    await helpers.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The corpus in a place of its own, with modules beside it that count as installed."""
    place = tmp_path_factory.mktemp("corpus")
    shutil.copytree(CORPUS, place, dirs_exist_ok=True)
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONPATH": str(place / "installed"), "PYTHONHASHSEED": "0"}
    return Home("corpus", "OPEN", Rights(), place / "overlay", env)


@dataclass(frozen=True)
class Said:
    code: int | None
    stdout: bytes
    log: bytes


def script_of(argv: Sequence[str], stdin: Any, preload: tuple[str, ...] = ()) -> Script:
    command = python_command.split(argv)
    assert command is not None
    length = 2 if command.arguments[0] == "-m" else 1
    return Script(command.interpreter, command.arguments[:length], preload, stdin)


@contextlib.asynccontextmanager
async def forking(helpers: Helpers, home: Home, argv: Sequence[str], stdin: str = "file") -> AsyncIterator[Helper]:
    """The helper that forks a script. Raises `UnfitError`."""
    helper = await helpers.pool(home, script_of(argv, stdin)).ready()
    yield helper
    helper.close()


async def run(helper: Helper, argv: Sequence[str], stdin: str = "file", env: Mapping[str, str] | None = None) -> Said:
    pipes = [os.pipe(), os.pipe()]
    given = stdin_of(stdin)
    process = helper.launch(argv, (given, pipes[0][1], pipes[1][1]), env or {})
    for fd in (given, pipes[0][1], pipes[1][1]):
        os.close(fd)
    stdout, log = await asyncio.gather(*(asyncio.to_thread(read_all, reading) for reading, _ in pipes))
    exit_ = await process.ended
    assert exit_.failed is None
    return Said(exit_.code, stdout, log)


def stdin_of(kind: str) -> int:
    if kind == "pipe":
        reading, writing = os.pipe()
        os.write(writing, STDIN)
        os.close(writing)
        return reading
    fd = os.memfd_create("stdin")
    os.pwrite(fd, STDIN, 0)
    return fd


def read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


async def run_by_fork(helpers: Helpers, home: Home, argv: Sequence[str], case: Case) -> list[Said]:
    """By a process that was forked ahead, and by two at once; nothing where it cannot be forked."""
    try:
        async with forking(helpers, home, argv, case.stdin) as helper:
            assert set(case.loaded) <= set(helper.ready.result().loaded)
            ahead = await run(helper, argv, case.stdin)
            return [ahead, *await asyncio.gather(*(run(helper, argv, case.stdin) for _ in range(2)))]
    except UnfitError:
        return []


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
async def test_a_script_says_and_does_the_same_whether_spawned_or_forked(
    helpers: Helpers, home: Home, case: Case
) -> None:
    argv = (sys.executable, *case.options, *case.arguments)
    spawner = await helpers.pool(home).ready()
    spawned, forked = await asyncio.gather(run(spawner, argv, case.stdin), run_by_fork(helpers, home, argv, case))
    assert spawned.code == case.code, spawned.log
    assert len(forked) == (3 if case.forked else 0)
    for said in forked:
        assert said.stdout == spawned.stdout
        assert said.code == spawned.code
        assert not case.same_log or said.log == spawned.log


async def test_what_a_process_has_of_its_own_is_made_anew_for_each_call(helpers: Helpers, home: Home) -> None:
    argv = (sys.executable, "fresh_each_time.py")
    async with forking(helpers, home, argv) as helper:
        first, second = [await run(helper, argv) for _ in range(2)]
        assert helper.ready.result().loaded[:4] == ("json", "logging", "multiprocessing", "os")
    assert first.code == 0, first.log
    things, others = json.loads(first.stdout), json.loads(second.stdout)
    assert {name for name in things if things[name] == others[name]} == set()


async def test_what_draws_at_its_import_draws_otherwise_in_each_call(helpers: Helpers, home: Home) -> None:
    argv = (sys.executable, "import_draws.py", "show")
    async with forking(helpers, home, argv) as helper:
        assert "draws" in helper.ready.result().left
        first, second = [await run(helper, argv) for _ in range(2)]
    assert first.code == second.code == 0
    assert first.stdout != second.stdout


async def test_the_environment_of_a_call_is_added_to_that_of_its_home(helpers: Helpers, home: Home) -> None:
    argv = (sys.executable, "environment.py")
    async with forking(helpers, home, argv) as helper:
        with_more = await run(helper, argv, env={"CORPUS_WORD": "of this call", "LANG": "C"})
        without = await run(helper, argv)
    assert with_more.stdout == b"of this call C\nof this call C\n"
    assert without.stdout == b"None C.UTF-8\nC.UTF-8\n"


@pytest.mark.parametrize("name", ["writes_8_mb.js", "reopens_stdout.sh"])
async def test_what_is_no_python_says_the_same_in_every_mode(home: Home, name: str) -> None:
    program = {".js": "node", ".sh": "bash"}[Path(name).suffix]
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")
    runner = ProcessRunner(Helpers(most=1))
    try:
        outcomes = [
            await runner.run(make_job(ProcessTarget((program, name), home.env, mode=mode), folder=home.folder))
            for mode in ("spawn", "auto")
        ]
    finally:
        await runner.close()
    spawned, auto = outcomes
    assert spawned.ok, spawned
    assert spawned.output_bytes > (8_000_000 if program == "node" else 0)
    assert auto.result == spawned.result
