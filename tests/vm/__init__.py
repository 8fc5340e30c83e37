"""Tests on a kernel of its own, where this machine's does not have what they need: cgroups (v2) with memory.

User-Mode Linux is a kernel that is an ordinary program: no root, no virtualisation, up in a second. It finds the files
of this machine, to be read only; its memory and its processes are its own. Debian has it as `user-mode-linux`:

    apt-get install user-mode-linux                        or unpack it anywhere (apt-get download, dpkg -x),
                                                           and name it in AAL_TEST_UML=.../usr/bin/linux.uml

    python -m tests.vm                                     the tests of cgroups, in the virtual machine
    python -m tests.vm tests/test_process.py -k memory     any others, as pytest is told

It has one processor and no Landlock (Debian's of Linux 6.1). `init.py` is what runs in it first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REPO = Path(__file__).resolve().parent.parent.parent
INIT = Path(__file__).with_name("init.py")
ON_ITS_KERNEL = ("tests/test_cgroups_kernel.py",)
"""What is run here, and elsewhere only collected where the kernel has what it needs (`tests/conftest.py`)."""

MEMORY_MB = 2048

VARIABLE = "AAL_TEST_UML"
"""Names the program where it is not on the PATH."""

NO_STATUS = -1
"""The machine did not come to one, or took too long."""

_STATUS = re.compile(rb"^exit status (\d+)\r?$", re.MULTILINE)


def kernel() -> str | None:
    """The program; None where there is none."""
    return os.environ.get(VARIABLE) or shutil.which("linux.uml") or shutil.which("linux")


def boot(program: str, arguments: Sequence[str], timeout_s: float, echo: BinaryIO | None = None) -> tuple[int, str]:
    """Run pytest in a virtual machine: its exit status, or `NO_STATUS`, and what the console said, `echo` at once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            program,
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"mem={MEMORY_MB}M", "quiet"),
            *("con=null", "con0=null,fd:1", "cgroup_no_v1=all", f"uml_dir={folder}/", "umid=tests"),
            *(f"init={sys.executable}", "--", "-I", str(INIT), json.dumps(arguments).encode().hex()),
        ]
        with subprocess.Popen(
            command,
            env={"PATH": os.defpath, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as machine:
            late = threading.Timer(timeout_s, machine.kill)
            late.start()
            try:
                said = b"".join(_lines(machine.stdout, echo))
            finally:
                late.cancel()
                machine.kill()
    found = _STATUS.findall(said)
    return (int(found[-1]) if found else NO_STATUS), said.decode(errors="replace")


def _lines(stream: IO[bytes] | None, echo: BinaryIO | None) -> Iterator[bytes]:
    for line in stream or ():
        if echo is not None:
            echo.write(line)
            echo.flush()
        yield line
