"""The working folder: the overlays that are measured, and the environment in which everything runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PARTS = Path(__file__).resolve().parent
MEMORY = "MEM[SOFT=16,HARD=256,VOL=LOW];PRIORITY=9"
PYTHON = "python"
"""An empty virtual environment: `python3` starts as on a clean machine, whatever this one has in its site-packages."""


class BenchError(Exception):
    """The bench cannot run; the message is for people."""


@dataclass(frozen=True, slots=True)
class Program:
    """One program that is measured: its overlay, how it is started there, and its source beside this file."""

    overlay: str
    command: tuple[str, ...]
    source: str
    mode: str | None = None
    timeout_s: float = 30.0


SLEEP_S = 600.0
"""How long a sleeper may sleep: longer than any measurement."""

PROGRAMS: Mapping[str, Program] = {
    "python": Program("echo_python", ("python3", "run.py"), "echo.py"),
    "c": Program("echo_c", ("./echo",), "echo.c"),
    "worker": Program("echo_worker", ("python3", "run.py"), "echo_worker.py", mode="worker"),
    "sleeper": Program("sleeper", ("python3", "run.py"), "sleeper.py", timeout_s=SLEEP_S),
}


def environment(folder: Path) -> dict[str, str]:
    """What every server and program gets, and nothing else: no `AAL_*` of the caller reaches the bus."""
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    path = os.pathsep.join((str(python_of(folder).parent), os.environ.get("PATH", os.defpath)))
    return {**kept, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PATH": path}


def python_of(folder: Path) -> Path:
    """The interpreter that every rival runs scripts with."""
    return folder / PYTHON / "bin" / "python3"


def overlay_of(folder: Path, program: str) -> Path:
    return folder / "overlays" / PROGRAMS[program].overlay


def has_cc() -> bool:
    return shutil.which("cc") is not None


def lay_out(folder: Path, programs: Sequence[str], service_port: int) -> None:
    """Write the overlays of the bus into `folder`, and the `python3` that runs scripts. Raises `BenchError` of cc."""
    make_python(folder)
    for name in programs:
        write_program(folder, PROGRAMS[name].overlay, PROGRAMS[name])
    service = {"http": {"base_url": f"http://127.0.0.1:{service_port}"}}
    write_overlay(folder, "echo_http", service, {"runner": "http", "path": "/echo"})


def make_python(folder: Path) -> None:
    venv.create(folder / PYTHON, with_pip=False, symlinks=True)


def write_program(folder: Path, overlay: str, program: Program) -> None:
    """One overlay with this program. Raises `BenchError` of cc."""
    mode = {"mode": program.mode} if program.mode else {}
    entrypoints = {"proc": {"command": list(program.command), **mode}}
    home = write_overlay(folder, overlay, entrypoints, {"runner": "proc", "timeout_s": program.timeout_s})
    source = PARTS / program.source
    if source.suffix == ".c":
        compile_c(source, home / source.stem)
    else:
        shutil.copy(source, home / "run.py")


def write_overlay(
    folder: Path, name: str, entrypoints: Mapping[str, Any], capability: Mapping[str, Any], memory: str = MEMORY
) -> Path:
    manifest = {
        "name": name,
        "version": "1.0.0",
        "phases": ["OPEN"],
        "permissions": ["analysis"],
        "entrypoints": entrypoints,
        "capabilities": {"run": {**capability, "memory": memory}},
    }
    home = folder / "overlays" / name
    home.mkdir(parents=True)
    (home / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return home


def compile_c(source: Path, program: Path) -> None:
    done = subprocess.run(["cc", "-O2", "-o", program, source], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise BenchError(f"cc does not compile {source.name}:\n{done.stderr}")
