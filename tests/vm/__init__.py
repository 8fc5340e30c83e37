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

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

REPO = Path(__file__).resolve().parent.parent.parent
INIT = Path(__file__).with_name("init.py")
ON_ITS_KERNEL = ("tests/test_cgroups_kernel.py",)
MEMORY_MB = 2048

VARIABLE = "AAL_TEST_UML"
"""Names the program where it is not on the PATH."""

_STATUS = re.compile(rb"^exit status (\d+)\r?$", re.MULTILINE)


def kernel() -> str | None:
    """The program; None where there is none."""
    return os.environ.get(VARIABLE) or shutil.which("linux.uml") or shutil.which("linux")


def boot(program: str, arguments: Sequence[str], timeout_s: float) -> tuple[int | None, bytes]:
    """Run pytest in a virtual machine: its exit status, None where it came to none, and all that the console said.

    Raises `subprocess.TimeoutExpired`.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            program,
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"mem={MEMORY_MB}M", "quiet"),
            *("con=null", "con0=null,fd:1", "cgroup_no_v1=all", f"uml_dir={folder}/", "umid=tests"),
            *(f"init={sys.executable}", "--", "-I", str(INIT), *arguments),
        ]
        environment = {"PATH": os.defpath, "TMPDIR": folder}
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    found = _STATUS.findall(done.stdout)
    return (int(found[-1]) if found else None), done.stdout
