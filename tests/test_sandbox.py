"""What a process takes on itself it cannot get rid of, whoever it is: each mechanism, tried in a process of its own."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import sys

import pytest

from runners import sandbox
from tests.programs import a_held_process, a_plan
from tests.support import REPO

ORDINARY = 65534


def landlock_abi() -> int:
    """0 where the kernel has none."""
    return max(0, int(ctypes.CDLL(None).syscall(sandbox.LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


NEEDS_ABI = {
    "with_the_files_of_its_rules": 1,
    "with_the_files_of_its_rules_though_links_took_their_places": 1,
    "with_the_same_files_where_the_kernel_opens_nothing_without_links": 1,
    "with_its_own_places": 1,
    "with_the_programs_of_its_rules": 1,
    "with_the_ports_of_its_rules": 4,
    "without_signals_to_others": 6,
}


@pytest.mark.parametrize("user", ["as it is", "ordinary"])
@pytest.mark.parametrize("check", a_held_process.CHECKS)
async def test_a_process_goes_on(check: str, user: str) -> None:
    if user == "ordinary" and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if landlock_abi() < NEEDS_ABI.get(check, 0):
        pytest.skip(f"this kernel has no Landlock of ABI {NEEDS_ABI[check]}")
    if "call" in check and platform.machine() not in a_plan.GETPPID:
        pytest.skip("the number of a system call of this machine is not known here")
    command = [sys.executable, "-m", a_held_process.__name__, check, *([str(ORDINARY)] if user == "ordinary" else [])]
    process = await asyncio.create_subprocess_exec(*command, cwd=REPO, stderr=asyncio.subprocess.PIPE)
    _, words = await process.communicate()
    assert (process.returncode, words.decode()) == (0, "")


@pytest.mark.parametrize(
    ("abi", "fs", "net", "scopes"),
    [
        (1, 0x1FFF, 0, 0),
        (2, 0x3FFF, 0, 0),
        (3, 0x7FFF, 0, 0),
        (4, 0x7FFF, 3, 0),
        (5, 0xFFFF, 3, 0),
        (6, 0xFFFF, 3, 3),
        (7, 0xFFFF, 3, 3),
        (99, 0xFFFF, 3, 3),
    ],
)
def test_of_each_landlock_only_what_it_knows_is_asked_for(abi: int, fs: int, net: int, scopes: int) -> None:
    known = tuple(sandbox.known(bits, abi) for bits in (sandbox.ACCESS_FS, sandbox.ACCESS_NET, sandbox.SCOPES))
    assert known == (fs, net, scopes)
