"""The referee of `--memory`: an OOM killer that is the same for every policy.

A process of its own. It reads one `Rule` as a line of JSON on stdin, looks every `EVERY_S` at all that the server has
started, and where the resident memory of these together passes the limit it kills the largest, waits until that is
gone, and goes on. When stdin ends it writes what it saw as a line of JSON on stdout.

What counts is resident memory that is no mapped file (`resident - shared` of /proc/PID/statm, proc(5)).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass, field

EVERY_S = 0.01
PAGE = os.sysconf("SC_PAGE_SIZE")
MB = 2**20


@dataclass(frozen=True, slots=True)
class Rule:
    """The server whose children are watched, and what they may have together, in MiB."""

    pid: int
    limit_mb: float


@dataclass(slots=True)
class Seen:
    """`kills` is when it killed, in seconds from its start, and how large that was, in MiB.

    `mb_s` is the memory in use over time, in MiB times seconds; `looks` how often it looked, in `seconds`.
    """

    kills: list[tuple[float, float]] = field(default_factory=list)
    peak_mb: float = 0.0
    mb_s: float = 0.0
    seconds: float = 0.0
    looks: int = 0


def children(pid: int) -> list[int]:
    """Of all its threads; none where it has ended."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208  # a process of milliseconds
            with open(f"/proc/{pid}/task/{thread}/children") as file:  # noqa: PTH123
                found += map(int, file.read().split())
    except OSError:
        pass
    return found


def descendants(pid: int) -> list[int]:
    found, row = [], children(pid)
    while row:
        found += row
        row = [child for parent in row for child in children(parent)]
    return found


def resident_mb(pid: int) -> float:
    """0 where it has ended."""
    try:
        with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123
            _, resident, shared, *_ = file.read().split()
    except (OSError, ValueError):
        return 0.0
    return (int(resident) - int(shared)) * PAGE / MB


def watch(rule: Rule) -> Seen:
    seen = Seen()
    began = before = time.monotonic()
    condemned = 0
    while not select.select([sys.stdin], [], [], EVERY_S)[0]:
        sizes = {pid: resident_mb(pid) for pid in descendants(rule.pid)}
        total_mb = sum(sizes.values())
        now = time.monotonic()
        seen.mb_s += total_mb * (now - before)
        before = now
        seen.looks += 1
        seen.peak_mb = max(seen.peak_mb, total_mb)
        if total_mb > rule.limit_mb and not sizes.get(condemned):
            condemned = max(sizes, key=lambda pid: sizes[pid])
            seen.kills.append((round(now - began, 2), round(sizes[condemned], 1)))
            os.kill(condemned, signal.SIGKILL)
    seen.seconds = before - began
    return seen


if __name__ == "__main__":
    print(json.dumps(asdict(watch(Rule(**json.loads(sys.stdin.readline()))))), flush=True)
