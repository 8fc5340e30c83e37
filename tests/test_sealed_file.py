"""Files in memory that a program gets: what is in them, and that nobody can execute one."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runners import sealed_file as module
from runners.sealed_file import MFD_NOEXEC_SEAL, sealed_file
from tests import programs

if TYPE_CHECKING:
    from collections.abc import Iterator

WITH_FCHMOD = "import os; os.fchmod(0, 0o755)"
WITH_WRITE = "import os; os.write(0, b'#!/bin/sh')"


@pytest.fixture(params=["never executed", "sealed"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What this kernel makes, and what an older one does."""
    module._can_forbid_execution.cache_clear()
    if request.param == "sealed":
        monkeypatch.setattr(os, "memfd_create", _of_an_older_kernel)
    elif not module._can_forbid_execution():
        pytest.skip("this kernel makes no memfd that is never executed (Linux 6.3)")
    yield str(request.param)
    module._can_forbid_execution.cache_clear()


_memfd_create = os.memfd_create


def _of_an_older_kernel(name: str, flags: int) -> int:
    if flags & MFD_NOEXEC_SEAL:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return _memfd_create(name, flags)


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 2**20], ids=len)
def test_it_holds_the_content_and_stands_at_its_start(kind: str, content: bytes) -> None:
    fd = sealed_file(content)
    try:
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        with open(fd, "rb", closefd=False) as file:
            assert file.read() == content
    finally:
        os.close(fd)


def test_what_a_program_makes_of_it_is_not_executed(kind: str) -> None:
    """Where it may be written to it is never executable, and elsewhere the other way round."""
    script = b"#!/bin/sh\nexit 0\n" if kind == "never executed" else b'{"payload":{}}'
    fd = sealed_file(script)
    try:
        change = WITH_FCHMOD if kind == "never executed" else WITH_WRITE
        changing = subprocess.run(
            [programs.INTERPRETERS[".py"], "-I", "-S", "-c", change], stdin=fd, capture_output=True, check=False
        )
        assert b"PermissionError" in changing.stderr
        with pytest.raises(OSError, match=r"Permission denied|Exec format error"):
            subprocess.run([f"/proc/self/fd/{fd}"], pass_fds=[fd], check=False)
    finally:
        os.close(fd)


def test_a_file_that_cannot_be_filled_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, *_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        sealed_file(b"{}")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
