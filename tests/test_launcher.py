"""The helper's own program: under each interpreter that it may meet, and how it knows its children."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runners import channel
from runners import helper as module
from runners.helpers import Helpers
from runners.processes import Script
from tests.programs import family
from tests.programs.a_home import ARGUMENTS, COMMAND, WITHOUT_LIST, a_home, with_token
from tests.programs.hostile import ENDED
from tests.runner_fixtures import nothing_left  # noqa: F401  # pytest finds it by its name
from tests.support import PATIENCE_S, REPO

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST, NEWEST = 8, 14
FOLDERS = [*os.get_exec_path(), *map(str, sorted(Path.home().glob(".pyenv/versions/*/bin")))]


def interpreters() -> Iterator[str]:
    """Our own, and each CPython of these versions that is there. A shim, which is a script, is none."""
    yield sys.executable
    known = {Path(sys.executable).resolve()}
    for minor in range(OLDEST, NEWEST + 1):
        for path in (Path(folder, f"python3.{minor}").resolve() for folder in FOLDERS):
            if path not in known and os.access(path, os.X_OK) and is_program(path):
                known.add(path)
                yield str(path)


def is_program(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])
@pytest.mark.parametrize("interpreter", list(interpreters()))
async def test_it_forks_under_any_interpreter(interpreter: str, namespace: bool) -> None:
    token = f"token-{os.getpid()}-{interpreter}"
    script = Script((interpreter, "-I", "-S"), ARGUMENTS, stdin="pipe")
    argv = [*script.interpreter, *ARGUMENTS, token]
    helpers = Helpers(most=1, namespace=namespace)
    helper = await asyncio.wait_for(helpers.pool(a_home(token), script).ready(), PATIENCE_S)
    null = os.open(os.devnull, os.O_RDWR)
    stdin, ours = os.pipe()
    try:
        ended = helper.launch([*argv, "daemon"], (null, null, 2), {}).ended
        assert (await asyncio.wait_for(ended, PATIENCE_S)).code == ENDED
        killed = helper.launch([*argv, "deaf"], (stdin, null, 2), {})
        assert (await killed.memory_mb() or 0) > 0
        killed.signal(signal.SIGKILL)
        assert (await asyncio.wait_for(killed.ended, PATIENCE_S)).code == -signal.SIGKILL
        running = helper.launch([*argv, "deaf"], (stdin, null, 2), {})
        await helpers.close()
        assert running.ended.result().lost is not None
        assert with_token(token) == {}
    finally:
        await helpers.close()
        for fd in (null, stdin, ours):
            os.close(fd)


@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])
@pytest.mark.parametrize("way", ["daemon", "comet"])
async def test_it_ends_orphans_where_the_kernel_does_not_list_children(
    way: str, namespace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERPRETER", (sys.executable, "-I", "-S", "-c", WITHOUT_LIST))
    helpers = Helpers(most=1, namespace=namespace)
    helper = await asyncio.wait_for(helpers.pool(a_home(f"token-{os.getpid()}-scan")).ready(), PATIENCE_S)
    null = os.open(os.devnull, os.O_RDONLY)
    said, stdout = os.pipe()
    try:
        process = helper.launch([*COMMAND, f"token-{os.getpid()}-scan", way], (null, stdout, 2), {})
        assert (await asyncio.wait_for(process.ended, PATIENCE_S)).lost is None
        os.close(stdout)
        os.set_blocking(said, False)
        assert (os.read(said, 100), os.read(said, 100)) == (b"ready\n", b"")  # nobody holds its stdout
    finally:
        await helpers.close()
        os.close(null)
        os.close(said)


@pytest.mark.parametrize("check", family.CHECKS)
async def test_it_knows_and_ends(check: str) -> None:
    command = [sys.executable, "-m", family.__name__, check]
    process = await asyncio.create_subprocess_exec(*command, cwd=REPO, stderr=asyncio.subprocess.PIPE)
    _, words = await process.communicate()
    assert (process.returncode, words) == (0, b"")


async def test_what_it_says_of_many_modules_fits_into_a_message() -> None:
    reasons = {f"module{number}": "\u20ac\n" * 100 for number in range(1000)}
    said = channel.in_short(reasons)
    assert list(said) == list(reasons)[: len(said)]
    assert channel.TOLD_BYTES / 2 < len(channel.text_of(said).encode()) <= channel.TOLD_BYTES + len("{}")


async def test_it_hands_on_the_environment_byte_by_byte() -> None:
    environment = {b"A": b"x=\xff", b"EMPTY": b"", b"LC_ALL": b"C"}
    code = f"import sys; sys.path.insert(0, {str(module.LAUNCH.parent)!r})\n"
    code += "import os, launcher; given = launcher.given_environment({})\n"
    code += "print({os.fsencode(name): os.fsencode(value) for name, value in given.items()})"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env=environment, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    assert ast.literal_eval(said.decode()) == environment
