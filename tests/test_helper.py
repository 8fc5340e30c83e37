"""A helper and the plan by which the kernel is to hold it: what it is told, what it says, and what becomes of that."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from runners import helper as module
from runners.base import Sandbox
from runners.helper_errors import UnheldError
from runners.helpers import Helpers, has_namespace
from tests.programs import a_plan
from tests.programs.a_home import COMMAND, a_home, children, script_of, with_token
from tests.runner_fixtures import nothing_left  # noqa: F401  # pytest finds it by its name
from tests.support import PATIENCE_S, eventually, is_alive, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from runners.exits import Exit
    from runners.helper import Helper
    from runners.processes import Home, Process

tokens = (f"token-{os.getpid()}-held-{number}-" for number in itertools.count())

NO_FILTER = bytes(8)
"""No program of the kernel's: it ends without a return."""

REFUSE_NOTHING = a_plan.refusing(1 << 20)
"""A filter against a system call that there is not."""

in_both_modes = pytest.mark.parametrize("mode", ["spawn", "fork"])
in_both_forms = pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": True})


@dataclass(frozen=True)
class APlan:
    """A plan that says back what it is told."""

    wire: dict[str, Any]
    why: str | None = None

    def sandbox(self, scope: Any, namespace: bool, taken: Collection[str]) -> Sandbox:
        return Sandbox(scope, tuple(taken), ("namespace",) if namespace else ())

    def needs_namespace(self) -> str | None:
        return None

    def unheld(self, namespace: bool, taken: Collection[str]) -> str | None:
        return self.why


@dataclass
class AConfinement:
    """Asks the kernel for a limit of open files, for what `changes` of a plan says, and for nothing else."""

    scratch: Path
    changes: dict[str, Any] = field(default_factory=dict)
    why: str | None = None
    asked: list[tuple[Home, bool]] = field(default_factory=list)

    def plan(self, home: Home, *, forks: bool, namespace: bool = True) -> APlan:
        self.asked.append((home, forks))
        wire: dict[str, Any] = {
            "landlock": None,
            "seccomp": b"",
            "late": b"",
            "others": b"",
            "limits": [[int(resource.RLIMIT_NOFILE), 64]],
            "capabilities": None,
            "scratch": {"root": str(self.scratch), "mounts": namespace, "mb": 4, "bits": 0},
            "processes": 0,
            "strict": False,
        }
        return APlan(wire | self.changes, self.why)


class Held:
    """Helpers that hold what they start to a plan."""

    def __init__(self, scratch: Path, namespace: bool, mode: str, **changes: Any) -> None:
        self.token = next(tokens)
        self.confinement = AConfinement(scratch, changes)
        confinement: Any = self.confinement
        self.helpers = Helpers(most=1, namespace=namespace, confinement=confinement)
        self.script = script_of(mode)
        self.home = a_home(self.token, program=COMMAND[0])

    async def helper(self) -> Helper:
        return await asyncio.wait_for(self.helpers.pool(self.home, self.script).ready(), PATIENCE_S)

    @contextlib.asynccontextmanager
    async def running(self, *way: object, data_bytes: int = 0, ready: bool = True) -> AsyncIterator[Process]:
        """A `hostile.py`, once it has said that it is `ready`."""
        helper = await self.helper()
        reader, stdin = os.pipe2(os.O_CLOEXEC)
        stdout, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.ExitStack() as fds:
            for fd in (stdin, stdout):
                fds.callback(os.close, fd)
            try:
                argv = [*COMMAND, self.token, *map(str, way)]
                process = helper.launch(argv, (reader, writer, 2), {}, data_bytes)
            finally:
                os.close(reader)
                os.close(writer)
            await until(lambda: not ready or _read(stdout) == b"ready\n")
            yield process

    def program(self, helper: Helper) -> int:
        """The process of its only call."""
        (inside,) = children(helper.pid)
        (program,) = children(inside)
        return program


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 100)
    except BlockingIOError:
        return b""


def limit_of(pid: int, name: str) -> str:
    """The hard limit, as proc(5) tells it."""
    text = Path(f"/proc/{pid}/limits").read_text()
    return next(line for line in text.splitlines() if line.startswith(name))[len(name) :].split()[1]


async def end_of(process: Process) -> Exit:
    return await asyncio.wait_for(asyncio.shield(process.ended), PATIENCE_S)


@pytest.fixture
def namespace() -> bool:
    return False


@pytest.fixture
def mode() -> str:
    return "spawn"


@pytest.fixture
def changes() -> dict[str, Any]:
    return {}


@pytest.fixture
async def held(tmp_path: Path, namespace: bool, mode: str, changes: dict[str, Any]) -> AsyncIterator[Held]:
    made = Held(tmp_path / "scratch", namespace, mode, **changes)
    if namespace and not await has_namespace(tmp_path):
        pytest.skip("this kernel gives no pid namespace")
    yield made
    await made.helpers.close()
    assert with_token(made.token) == {}
    assert not made.confinement.scratch.exists() or list(made.confinement.scratch.iterdir()) == []


def with_changes(**changes: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("changes", [changes], ids=[""])


@in_both_modes
@in_both_forms
async def test_the_sandbox_says_what_the_kernel_has_taken(held: Held, namespace: bool) -> None:
    helper = await held.helper()
    missing = ("namespace",) if namespace else ()
    assert helper.sandbox_for("call") == Sandbox("call", ("limits",), missing)
    assert helper.sandbox_for("pool") == Sandbox("pool", ("limits",), missing)
    assert held.helpers.state("test")[0]["sandbox"] == {"enforced": ["limits"], "missing": list(missing)}
    async with held.running("hold") as process:
        assert limit_of(held.program(helper), "Max open files") == "64"
        assert process.sandbox_for("call") is helper.sandbox_for("call")


async def test_a_plan_is_made_for_each_start_and_way_of_starting(held: Held) -> None:
    await held.helper()
    await held.helpers.pool(held.home, script_of("fork")).ready()
    assert held.confinement.asked == [(held.home, False), (held.home, True)]


async def test_without_confinement_nothing_is_held_and_nothing_said_to_be() -> None:
    helpers = Helpers(most=1)
    helper = await helpers.pool(a_home(next(tokens))).ready()
    assert helper.sandbox_for("service") == Sandbox("service")
    await helpers.close()


@with_changes(seccomp=NO_FILTER)
async def test_what_the_kernel_refuses_is_said_and_not_in_the_sandbox(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    helper = await held.helper()
    assert helper.sandbox_for("call").enforced == ("limits",)
    assert "the programs of test are not held by seccomp: Invalid argument" in caplog.text


@in_both_modes
@in_both_forms
@with_changes(seccomp=NO_FILTER, strict=True)
async def test_a_strict_plan_that_the_kernel_refuses_starts_nothing_and_no_second_time(held: Held) -> None:
    with pytest.raises(UnheldError, match="AAL_SANDBOX=enforce asks for: seccomp: Invalid argument"):
        await held.helper()
    assert len(held.confinement.asked) == 1


@with_changes(late=NO_FILTER, strict=True)
@pytest.mark.parametrize("mode", ["fork"])
async def test_what_is_to_be_taken_late_may_be_refused_too(held: Held) -> None:
    with pytest.raises(UnheldError, match=r"AAL_SANDBOX=enforce asks for: .*Invalid argument"):
        await held.helper()
    assert len(held.confinement.asked) == 1


@in_both_forms
@pytest.mark.parametrize("mode", ["fork"])
@pytest.mark.parametrize(
    ("changes", "enforced"), [({"late": NO_FILTER}, ("limits",)), ({"late": REFUSE_NOTHING}, ("limits", "late"))]
)
async def test_what_is_taken_late_is_in_the_sandbox_where_it_was(
    held: Held, enforced: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    helper = await held.helper()
    assert helper.sandbox_for("call").enforced == enforced
    assert ("the programs of test are not held by seccomp: Invalid argument" in caplog.text) == ("late" not in enforced)


@in_both_modes
async def test_what_is_held_may_not_be_enough(held: Held) -> None:
    held.confinement.why = "exec: nobody knows what it leads to"
    with pytest.raises(UnheldError, match="exec: nobody knows what it leads to"):
        await held.helper()


@in_both_modes
async def test_a_program_has_the_limit_of_data_that_it_is_given(held: Held) -> None:
    helper = await held.helper()
    for data_bytes, limit in ((1 << 30, str(1 << 30)), (0, "unlimited")):
        async with held.running("hold", data_bytes=data_bytes) as process:
            assert limit_of(held.program(helper), "Max data size") == limit
            process.signal(signal.SIGKILL)
            await end_of(process)


@in_both_modes
@in_both_forms
@with_changes(processes=5)
async def test_a_call_with_too_many_processes_is_ended_as_a_whole_and_said_so(held: Held) -> None:
    async with held.running("crowd", ready=False) as process:
        exit_ = await end_of(process)
        assert exit_.had_too_many
        assert exit_.lost is not None
        assert "5" in exit_.lost


@in_both_modes
@pytest.mark.parametrize("killed", ["outside", "inside", "both"])
@in_both_forms
async def test_nothing_is_left_of_scratch_where_a_helper_is_killed(held: Held, killed: str) -> None:
    helper = await held.helper()
    async with held.running("hold") as process:
        (inside,) = children(helper.pid)
        scratch = scratch_of(held, inside)
        (scratch / "file").write_text("x")
        pids = {"outside": [helper.pid], "inside": [inside], "both": [helper.pid, inside]}[killed]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert (await end_of(process)).lost is not None
    await helper.gone
    assert not is_alive(inside)
    assert not list(held.confinement.scratch.glob("aal-*-*"))


def scratch_of(held: Held, pid: int) -> Path:
    """The scratch folder of the only call, as this process reaches it."""
    root = Path(f"/proc/{pid}/root{held.confinement.scratch}")
    return next(path for path in root.rglob("1") if path.is_dir())


async def test_helpers_that_are_let_go_end_with_their_processes(held: Held) -> None:
    helper = await held.helper()
    async with held.running("hold") as process:
        held.helpers.let_go(held.home)
        assert helper.is_open
        process.signal(signal.SIGKILL)
        await end_of(process)
    await asyncio.wait_for(helper.gone, PATIENCE_S)
    assert (await held.helper()) is not helper


async def test_a_scratch_root_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("no folder")
    held = Held(tmp_path / "scratch", namespace=False, mode="spawn")
    with pytest.raises(OSError, match=r"the scratch root .*scratch cannot be made: File exists"):
        await held.helper()
    await held.helpers.close()


async def test_a_program_has_helpers_of_its_own(held: Held) -> None:
    """As each may execute its own program only."""
    other = dataclasses.replace(held.home, program="another")
    assert held.helpers.pool(other) is not held.helpers.pool(held.home)


SAYS = """
import os, socket, sys
socket.send_fds(socket.socket(fileno=os.dup(int(sys.argv[2]))), [%r], [0])
"""
"""A helper that says one thing, reads nothing, and is gone."""


@pytest.mark.parametrize("said", [b'["ended", []]', b'["contained", {"namespace": true}]', b"no JSON"], ids=repr)
async def test_of_a_first_message_that_cannot_be_nothing_is_kept(
    held: Held, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the helper nor the descriptor that came with it, for which the fixture `nothing_left` looks."""
    monkeypatch.setattr(module, "INTERPRETER", (sys.executable, "-I", "-S", "-c", SAYS % said))
    with pytest.raises(OSError, match="its helper said what cannot be"):
        await held.helper()


async def test_the_last_words_are_heard_of_a_helper_that_listened_to_nothing(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = b'["not_started", [2, "no such thing"]]'
    monkeypatch.setattr(module, "INTERPRETER", (sys.executable, "-I", "-S", "-c", SAYS % said))
    starting = asyncio.create_task(held.helper())
    await until(lambda: bool(psutil.Process().children()))
    (pid,) = [child.pid for child in psutil.Process().children()]
    eventually(lambda: not is_alive(pid), "it has ended, and nobody has listened to it yet")
    with pytest.raises(FileNotFoundError, match="no such thing"):
        await starting
    assert len(held.confinement.asked) == 1
