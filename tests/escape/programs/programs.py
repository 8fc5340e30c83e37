"""Attempts to execute another program."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from kernel import syscall  # type: ignore[import-not-found]  # a copy stands beside it
from telling import NothingGainedError  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.escape.programs.telling import Facts

SAID = b"executed"
SHELL = "/bin/sh"
ARGUMENTS = [SHELL, "-c", f"echo {SAID.decode()} >&2"]
AT_EMPTY_PATH = 0x1000


def shell(_: Facts) -> str:
    return _said(lambda: os.execv(SHELL, ARGUMENTS))


def shell_by_python(_: Facts) -> str:
    """As a program does that knows of no phases."""
    return subprocess.run(ARGUMENTS, stderr=subprocess.PIPE, check=True).stderr.decode()


def spawn(_: Facts) -> str:
    """By posix_spawn(3), which takes a way of its own through libc."""
    reader, writer = os.pipe()
    child = os.posix_spawn(SHELL, ARGUMENTS, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 2)])
    os.close(writer)
    return _answer(reader, child)


def by_descriptor(_: Facts) -> str:
    """By execveat(2), of a descriptor that is for nothing else (O_PATH)."""
    fd = os.open(SHELL, os.O_PATH)
    return _said(lambda: _execveat(fd))


def by_loader(facts: Facts) -> str:
    """The loader of ELF programs is one itself, and runs what it is told to."""
    return _said(lambda: os.execv(facts["loader"], [facts["loader"], *ARGUMENTS]))


def from_memory(facts: Facts) -> str:
    """A program that lies in no file (memfd_create(2))."""
    fd = os.memfd_create("program")
    os.write(fd, Path(facts["program"]).read_bytes())
    return _said(lambda: os.execv(f"/proc/self/fd/{fd}", ARGUMENTS))


def from_stdin(facts: Facts) -> str:
    """The envelope came in a file in memory; a program can be written there."""
    os.ftruncate(0, 0)
    os.pwrite(0, Path(facts["program"]).read_bytes(), 0)
    return _said(lambda: os.execv("/proc/self/fd/0", ARGUMENTS))


def from_stdout(facts: Facts) -> str:
    """By its own stdout, which it has made a program."""
    copy = _copy(facts, Path(os.environ["OVERLAY_SCRATCH"]))

    def execute() -> None:
        os.dup2(os.open(copy, os.O_RDONLY), 1)
        os.execv("/proc/self/fd/1", ARGUMENTS)

    return _said(execute)


def from_scratch(facts: Facts) -> str:
    """A copy of a program, where the call may write."""
    copy = _copy(facts, Path(os.environ["OVERLAY_SCRATCH"]))
    return _said(lambda: os.execv(copy, ARGUMENTS))


def from_state(facts: Facts) -> str:
    copy = _copy(facts, Path(os.environ["OVERLAY_STATE"]))
    return _said(lambda: os.execv(copy, ARGUMENTS))


def script_in_scratch(_: Facts) -> str:
    """Its first line names a program."""
    script = Path(os.environ["OVERLAY_SCRATCH"]) / "script"
    script.write_text(f"#!{SHELL}\necho {SAID.decode()} >&2\n")
    script.chmod(0o755)
    return _said(lambda: os.execv(script, [str(script)]))


def script_in_own_folder(_: Facts) -> str:
    """A script that the overlay brought along."""
    script = Path(__file__).with_name("script.sh")
    return _said(lambda: os.execv(script, [str(script)]))


def _execveat(fd: int) -> None:
    words = (ctypes.c_char_p * 4)(*map(os.fsencode, ARGUMENTS), None)
    address = ctypes.addressof(words)
    syscall("execveat", fd, b"", address, 0, AT_EMPTY_PATH)


def _copy(facts: Facts, folder: Path) -> Path:
    copy = folder / "sh"
    copy.write_bytes(Path(facts["program"]).read_bytes())
    copy.chmod(0o755)
    return copy


def _said(execute: Callable[[], None]) -> str:
    """What the program says on stderr that a child becomes. Raises the OSError with which it did not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return _answer(reader, child)
    try:
        os.dup2(writer, 2)
        execute()
    except OSError as error:
        os.write(writer, b"errno %d" % (error.errno or 0))
    os._exit(127)


def _answer(reader: int, child: int) -> str:
    with os.fdopen(reader, "rb") as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if text.startswith(b"errno "):
        raise OSError(int(text.split()[1]), "not executed")
    if SAID not in text:
        raise NothingGainedError(f"status {status}, said {text[:200]!r}")
    return text.decode()
