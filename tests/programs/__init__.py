"""Small programs, friendly and hostile, and what it takes to run one through a runner in a test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from runners.base import Job, ProcessTarget, Rights

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Mapping

    from runners.base import HttpTarget

FOLDER = Path(__file__).resolve().parent
ENV = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"}
INTERPRETERS = {".py": sys.executable, ".sh": "bash", ".js": "node"}


def argv(name: str) -> tuple[str, ...]:
    """The command that runs one of the programs here, whether or not its file is executable."""
    return (INTERPRETERS[Path(name).suffix], str(FOLDER / name))


def target(name: str) -> ProcessTarget:
    return ProcessTarget(argv(name), ENV)


def make_job(
    to: ProcessTarget | HttpTarget,
    payload: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 60.0,
    folder: Path = FOLDER,
    max_output_bytes: int = 16 * 2**20,
    max_log_bytes: int = 64 * 1024,
) -> Job:
    """A job with everything that a runner does not look at filled in."""
    return Job(
        request_id="0190a000-0000-7000-8000-000000000000",
        overlay="test",
        capability="echo",
        phase="OPEN",
        folder=folder,
        target=to,
        envelope=json.dumps({"payload": payload or {}}, ensure_ascii=False, separators=(",", ":")).encode(),
        rights=Rights(),
        deadline=time.monotonic() + timeout_s,
        hard_mb=256,
        max_output_bytes=max_output_bytes,
        max_log_bytes=max_log_bytes,
    )


@contextlib.asynccontextmanager
async def start_signal(folder: Path) -> AsyncIterator[tuple[str, Awaitable[None]]]:
    """The path of a FIFO for a payload's `started`, and what to await until something was written there."""
    path = folder / "started"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    loop = asyncio.get_running_loop()
    started: asyncio.Future[None] = loop.create_future()

    def note() -> None:
        loop.remove_reader(fd)
        started.set_result(None)

    loop.add_reader(fd, note)
    try:
        yield str(path), asyncio.wait_for(asyncio.shield(started), 60)
    finally:
        loop.remove_reader(fd)
        os.close(fd)
        path.unlink()


def held() -> tuple[Counter[str], list[int]]:
    """What this process holds: how many open descriptors of each kind, and which children.

    Kinds, not numbers, and none of /dev/null: uvloop makes its own few anew at each run, and keeps a spare.
    """
    kinds: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            kinds[str(fd.readlink()).partition("[")[0]] += 1
    del kinds["/dev/null"]
    return kinds, [child.pid for child in psutil.Process().children(recursive=True)]


def running(mark: str) -> list[int]:
    """The programs of calls whose environment holds the text, and what they started. A zombie has no environment.

    The call of a helper, and of what was forked from it, has the number 0 there.
    A process id that a program says of itself is no help: it counts in a namespace of its own.
    While a process executes another program the kernel shows no environment of it: who waits for one looks again.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes()
            if mark.encode() in environment and re.search(rb"OVERLAY_CALL=[^\0]*-[1-9][0-9]*\0", environment):
                found.append(int(folder.name))
    return found
