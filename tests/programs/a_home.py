"""Where `hostile.py` is at home, how it is run, and who has its token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runners.base import Rights
from runners.helper import LAUNCH
from runners.processes import Home, Script
from tests import programs

INTERPRETER = (sys.executable, "-I", "-S")
ARGUMENTS = (str(programs.FOLDER / "hostile.py"),)
COMMAND = (*INTERPRETER, *ARGUMENTS)


WITHOUT_LIST = f"""
import sys
sys.path.insert(0, {str(LAUNCH.parent)!r})
import launcher
launcher.Family.__init__ = lambda self: vars(self).update(_list=-1, highest_fd=-1)
del sys.argv[0]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), {{"__name__": "__main__", "__file__": sys.argv[0]}})
"""
"""A helper where the kernel does not list children."""


def a_home(token: str, **changes: Any) -> Home:
    values: dict[str, Any] = {
        "overlay": "test",
        "phase": "OPEN",
        "rights": Rights(),
        "folder": programs.FOLDER,
        "env": {**programs.ENV, "TOKEN": token},
    }
    return Home(**values | changes)


def script_of(mode: str) -> Script | None:
    return Script(INTERPRETER, ARGUMENTS, stdin="pipe") if mode == "fork" else None


def children(pid: int) -> list[int]:
    """Of a process with one thread, zombies too."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def with_token(token: str) -> dict[int, str]:
    """The command lines of the processes that have it in their environment or command line. A zombie has neither."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if token.encode() in command + environment:
            found[int(folder.name)] = command.replace(b"\0", b" ").decode()
    return found
