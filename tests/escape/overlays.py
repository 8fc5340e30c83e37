"""An attempt as an overlay: a folder with the programs, a `run.py` that makes this attempt, and its manifest."""

from __future__ import annotations

import compileall
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.escape.attempts import Attempt

Mode = Literal["fork", "spawn", "worker"]

PROGRAMS = Path(__file__).with_name("programs")
SIBLING = "sibling"
HARD_MB = 64
TIMEOUT_S = 60.0
MEMORY = f"MEM[SOFT=16,HARD={HARD_MB},VOL=LOW]"
SCRIPT = "#!/bin/sh\necho executed >&2\n"


def name_of(attempt: Attempt, mode: Mode) -> str:
    return f"{attempt.name}-{mode}"


def compile_programs(folder: Path) -> None:
    """Put a copy of the programs there for overlays to be made of, compiled: they cannot write what Python would."""
    shutil.copytree(PROGRAMS, folder, ignore=shutil.ignore_patterns("__init__.py", "__pycache__"))
    compileall.compile_dir(folder, quiet=2)


def write(root: Path, programs: Path, attempt: Attempt, mode: Mode, facts: Mapping[str, Any]) -> None:
    """The overlay of an attempt. The facts are filled into the rights that its manifest asks for."""
    module, deed = attempt.deed.split(".")
    make = "serve" if mode == "worker" else "tell"
    run = f"from {module} import {deed}\nfrom telling import {make}\n\n{make}({deed})\n"
    _write(root / name_of(attempt, mode), programs, mode, run, _filled(attempt.rights, facts))


def write_sibling(root: Path, programs: Path) -> None:
    """The overlay whose process others try to reach: it waits for its end."""
    run = "from processes import wait_for_end\nfrom telling import tell\n\ntell(wait_for_end)\n"
    _write(root / SIBLING, programs, "spawn", run, {})


def _write(folder: Path, programs: Path, mode: Mode, run: str, rights: Mapping[str, Any]) -> None:
    shutil.copytree(programs, folder)
    (folder / "run.py").write_text(run)
    (folder / "secret.txt").write_text(f"the secret of {folder.name}")
    (folder / "script.sh").write_text(SCRIPT)
    (folder / "script.sh").chmod(0o755)
    (folder / "manifest.json").write_text(json.dumps(_manifest(folder.name, mode, rights)))


def _manifest(name: str, mode: Mode, rights: Mapping[str, Any]) -> dict[str, Any]:
    capability = {"runner": "proc", "timeout_s": TIMEOUT_S, "memory": MEMORY, "rights": dict(rights)}
    return {
        "name": name,
        "version": "1.0.0",
        "permissions": ["analysis", "exec"],
        "phases": ["OPEN", "ALIGN", "ASCEND", "CLEAR", "SEAL"],
        "entrypoints": {"proc": {"command": [sys.executable, "-S", "run.py"], "mode": mode}},
        "capabilities": {"run": capability},
    }


def _filled(value: Any, facts: Mapping[str, Any]) -> Any:
    """`{name}` alone is the fact itself, within a text its words."""
    if isinstance(value, dict):
        return {key: _filled(member, facts) for key, member in value.items()}
    if isinstance(value, list):
        return [_filled(member, facts) for member in value]
    if isinstance(value, str):
        alone = facts.get(value[1:-1]) if value.startswith("{") else None
        return value.format_map(facts) if alone is None else alone
    return value
