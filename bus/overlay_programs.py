"""Whether the programs that a manifest names are there: one that came before its program is broken until that comes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bus.codehash import stamp_of
from bus.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bus.codehash import Place
    from bus.model import Manifest

_SHELL = "abefhkmnpruvxBCEHP"
_SWITCHES = {"python": "bBdEiIOPqsSuvx", "pypy": "bBdEiIOPqsSuvx", "sh": _SHELL, "bash": _SHELL, "dash": _SHELL,
             "ksh": _SHELL, "zsh": _SHELL, "node": "", "ruby": "dvw", "perl": "tTuUwWX"}  # fmt: skip
"""Interpreters, each with its options of one letter that take no value. Of what follows another nothing is known."""

_INTERPRETER = re.compile(rf"({'|'.join(_SWITCHES)})[0-9.]*")
_SCRIPT = (".py", ".sh", ".js", ".mjs", ".rb", ".pl")


class Programs(NamedTuple):
    """What of a manifest's programs is missing, and every place that was looked at to tell."""

    faults: tuple[Fault, ...]
    places: tuple[Place, ...]


def look(manifest: Manifest) -> Programs:
    """Look for the program of each `proc` capability and of the service, and for the script of an interpreter.

    The paths are those of the child: from the overlay's folder on, and the `.venv` there stands first on its PATH.
    """
    commands = dict.fromkeys(_commands(manifest))
    first = "" if manifest.shape == "A" else "[0]"
    programs = dict.fromkeys((argv[0], at + first) for argv, at in commands)
    scripts = dict.fromkeys((script, at) for argv, at in commands if (script := _script(argv)))
    found = [_program(name, manifest.folder, at) for name, at in programs]
    found += [_look_at_script(name, manifest.folder, at) for name, at in scripts]
    return Programs(
        tuple(fault for one in found for fault in one.faults), tuple(place for one in found for place in one.places)
    )


def _commands(manifest: Manifest) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each command that the bus starts, with the JSON path that it stands at."""
    at = "$.entrypoint" if manifest.shape == "A" else "$.entrypoints.proc.command"
    for capability in manifest.capabilities.values():
        if capability.runner == "proc" and capability.argv:
            yield capability.argv, at
    if manifest.service:
        yield manifest.service.argv, "$.entrypoints.http.command"


def _program(name: str, folder: Path, at: str) -> Programs:
    candidates = [f"{folder / name}"] if "/" in name else [f"{place}/{name}" for place in _search_path(folder)]
    places: list[Place] = []
    for path in candidates:
        places.append((path, stamp_of(path)))
        if _is_program(path):
            return Programs((), tuple(places))
    if "/" not in name:
        fault = Fault(at, f"{name!r}, which is not on the PATH", "a program on the PATH or in .venv/bin")
    elif places[0][1] is None:
        fault = Fault(at, f"{name!r}, which is not there", "a program")
    else:
        fault = Fault(at, f"{name!r}, which cannot be executed", "a program that may be executed")
    return Programs((fault,), tuple(places))


def _search_path(folder: Path) -> Iterator[Path]:
    for place in (".venv/bin", *os.environ.get("PATH", os.defpath).split(os.pathsep)):
        yield folder / place


def _is_program(path: str) -> bool:
    return os.access(path, os.X_OK) and not Path(path).is_dir()


def _look_at_script(name: str, folder: Path, at: str) -> Programs:
    path = f"{folder / name}"
    stamp = stamp_of(path)
    faults = () if stamp else (Fault(at, f"{name!r}, which is not there", "a script in the folder"),)
    return Programs(faults, ((path, stamp),))


def _script(argv: Sequence[str]) -> str | None:
    """The relative path of a script that an interpreter is surely asked to run: `run.py` of `python3 -u run.py`."""
    interpreter = _INTERPRETER.fullmatch(argv[0].rpartition("/")[2])
    switches = set(_SWITCHES[interpreter[1]]) if interpreter else set()
    for argument in argv[1:] if interpreter else ():
        if argument.startswith("-"):
            if not argument[1:] or not switches.issuperset(argument[1:]):
                return None
        else:
            return argument if argument.endswith(_SCRIPT) and not argument.startswith("/") else None
    return None
