"""Which commands are forked: a script or a module after options that a fork can honour."""

from __future__ import annotations

import pytest

from runners.python_command import PythonCommand, split


@pytest.mark.parametrize(
    ("command", "interpreter", "arguments"),
    [
        ("python3 run.py", "python3", "run.py"),
        ("python run.py --stdin-json -u", "python", "run.py --stdin-json -u"),
        ("/opt/x/.venv/bin/python3.13 src/run.py", "/opt/x/.venv/bin/python3.13", "src/run.py"),
        ("python3.13t run.py", "python3.13t", "run.py"),
        ("python3 -u run.py", "python3 -u", "run.py"),
        ("python3 -uB -I run.py x", "python3 -uB -I", "run.py x"),
        ("python3 -W error -Wignore run.py", "python3 -W error -Wignore", "run.py"),
        ("python3 -X dev -Xutf8=1 run.py", "python3 -X dev -Xutf8=1", "run.py"),
        ("python3 -uX dev run.py", "python3 -uX dev", "run.py"),
        ("python3 --check-hash-based-pycs never run.py", "python3 --check-hash-based-pycs never", "run.py"),
        ("python3 -m pkg.mod a -c", "python3", "-m pkg.mod a -c"),
        ("python3 -um pkg.mod", "python3 -u", "-m pkg.mod"),
        ("python3 -mpkg.mod a", "python3", "-m pkg.mod a"),
    ],
)
def test_a_command_is_taken_apart_after_the_options_of_its_interpreter(
    command: str, interpreter: str, arguments: str
) -> None:
    assert split(command.split()) == PythonCommand(tuple(interpreter.split()), tuple(arguments.split()))


@pytest.mark.parametrize(
    "command",
    [
        "",
        "python3",
        "python3 -u",
        "python3 -W",
        "python3 -m",
        "python3 -",
        "python3 -- run.py",
        "python3 -c print()",
        "python3 -ic print()",
        "python3 -i run.py",
        "python3 -v run.py",
        "python3 -x run.py",
        "python3 -V",
        "python3 --help",
        "python3 --check-hash-based-pycs",
        "python3 -X importtime run.py",
        "python3 -Xtracemalloc=5 run.py",
        "python2 run.py",
        "python3-config run.py",
        "pypy3 run.py",
        "node run.js",
        "./run.py",
        "env python3 run.py",
        "bash -c python3",
    ],
)
def test_what_only_a_new_process_can_run_is_no_python_command(command: str) -> None:
    assert split(command.split()) is None
