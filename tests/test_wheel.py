"""The wheel holds all that the bus needs: what is unpacked from it works far from any checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, in a folder of its own; built from a copy, as `pip install .` does."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "logs", "tests", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def aal(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs the unpacked `aal` in an empty folder, with the dependencies of these tests."""

    def run(*arguments: str) -> str:
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(installed), "AAL_DEV_LOG_PAYLOAD": "1"}
        command = [sys.executable, "-P", "-m", "bus.cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    return run


def test_an_installed_bus_lays_out_a_folder_that_works(aal: Callable[..., str]) -> None:
    aal("init", "home")
    answer = json.loads(aal("-C", "home", "invoke", "abraxas", "prompt=Hello world.", "--json"))
    assert answer["result"]["counts"]["words"] == 2
    assert "verdict: MATCH" in aal("-C", "home", "replay", "1")


def test_an_installed_bus_has_every_schema(installed: Path) -> None:
    shipped = {path.relative_to(ROOT) for path in (ROOT / "schemas").rglob("*") if path.is_file()}
    assert shipped == {
        path.relative_to(installed / "bus/share") for path in (installed / "bus/share/schemas").rglob("*.*")
    }
