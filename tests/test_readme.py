"""README is true: its commands run, its Python runs, its tables are those of the code."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bus import hookspecs, schemas

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
_FENCES = [(found[1], found[2]) for found in re.finditer(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]
COMMANDS = [body.strip() for kind, body in _FENCES if kind == "sh"]
SCRIPTS = [body for kind, body in _FENCES if kind == "python"]
FIRST, SECOND, SERVE, *LATER = COMMANDS
TIME_LIMIT_S = 300

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="README's calls are made with curl")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone would hold."""
    folder = tmp_path_factory.mktemp("clone") / "aal-core"
    ignored = shutil.ignore_patterns(".git", ".venv", "logs", ".aal", "__pycache__", ".*_cache", ".hypothesis")
    return shutil.copytree(ROOT, folder, ignore=ignored)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user with an empty home, and the environment active that these tests run in."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "LANG", "TMPDIR"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"HOME": str(home), "PATH": path, "AAL_PORT": "0"}


@pytest.fixture(scope="module")
def address(checkout: Path, environment: dict[str, str]) -> Iterator[str]:
    """The bus, served by README's own command on a port that is free."""
    with subprocess.Popen(
        ["bash", "-c", f"export {SERVE.replace(' aal', '; exec aal', 1)}"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        told = next(found for line in server.stdout if (found := re.search(r"http://([\d.]+:\d+)", line)))
        yield told[1]
        server.send_signal(signal.SIGTERM)
        server.stdout.read()
        assert server.wait() == 0


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_first_command_installs_calls_and_replays(checkout: Path, environment: dict[str, str]) -> None:
    # pip would compile every module of every package, and the two commands import few of them
    said = run(FIRST, checkout, environment | {"PATH": os.environ["PATH"], "PIP_NO_COMPILE": "1"})
    assert '"counts"' in said
    assert '"payload_hash"' in said
    assert "Replaying event from line 1" in said
    assert "verdict: MATCH" in said
    shutil.rmtree(checkout / ".venv")
    shutil.rmtree(checkout / "logs")


def test_the_second_command_is_what_ci_runs() -> None:
    assert SECOND in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


def test_every_later_command_works_while_the_bus_serves(
    checkout: Path, environment: dict[str, str], address: str
) -> None:
    said = [run(command.replace("127.0.0.1:8000", address), checkout, environment) for command in LATER]
    assert "Hello, Ada." in "\n".join(said)
    assert "Replaying event from line 1" in said[0]
    assert any("verdict: MATCH" in text for text in said[1:])
    assert any('"reason":"planned"' in text and "Move the invoices." in text for text in said)
    assert "\nok " in said[-2]
    assert said[-1].startswith("lines 1 to ")
    assert "line 1 with the hash " in said[-1]


def test_the_python_of_the_readme_runs(checkout: Path, environment: dict[str, str]) -> None:
    for script in SCRIPTS:
        subprocess.run([sys.executable, "-c", script], cwd=checkout, env=environment, check=True, timeout=TIME_LIMIT_S)


def test_the_tables_are_those_of_the_code() -> None:
    assert subprocess.run([sys.executable, ROOT / "TOOLS" / "readme.py", "--check"], check=False).returncode == 0


def test_every_hook_stands_there_with_its_arguments() -> None:
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("aal_"):
            assert f"| `{name}({', '.join(inspect.signature(hook).parameters)})` |" in TEXT


def test_every_fence_is_of_a_kind_that_is_looked_at() -> None:
    assert {kind for kind, _ in _FENCES} <= {"sh", "python", "json", "text"}


def test_the_rights_of_the_readme_are_those_of_a_manifest() -> None:
    fences = [json.loads(text) for kind, text in _FENCES if kind == "json"]
    assert fences
    for rights in fences:
        native = {"name": "a", "version": "1", "permissions": [], "entrypoints": {"proc": {"command": ["cat"]}}}
        native["capabilities"] = {"run": {"runner": "proc", **rights}}
        assert schemas.faults(schemas.shipped("manifest"), native) == []
