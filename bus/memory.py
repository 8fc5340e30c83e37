"""How much memory there is for us, and how long tasks wait for it, as the kernel tells: `/proc` and cgroup v2.

What counts as used is what the kernel could not give back at once. So page cache is not counted: of the machine by
`MemAvailable`, of a cgroup as `memory.current` less `active_file`, `inactive_file` and `slab_reclaimable`. `file` of
`memory.stat` is no measure of it: that includes shared memory and tmpfs, which have nowhere to go without swap.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runners.cgroups import is_of_bus

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROC = "/proc"
CGROUPS = "/sys/fs/cgroup"
MIB = 2**20

_READ_BYTES = 16 * 1024
"""More than any of these files has; the kernel gives each whole to one `read` that has room for it."""

_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_CACHE = (b"active_file", b"inactive_file", b"slab_reclaimable")


@dataclass(frozen=True, slots=True)
class Room:
    """One bound on memory and what is used of it, in bytes, page cache not counted. `name` is for people."""

    total: int
    used: int
    name: str = "further"

    @property
    def share(self) -> float:
        """The used part, 0 to 1, above 1 where more is used than may be."""
        return self.used / self.total if self.total else 1.0

    @property
    def free_mb(self) -> float:
        """What is left, in MiB, 0 or more."""
        return max(0, self.total - self.used) / MIB


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """For people, in MiB. `limit_mb` is the smallest cgroup limit below the machine's memory, None without one."""

    total_mb: int
    used_mb: int
    limit_mb: int | None = None
    limit_used_mb: int | None = None

    @property
    def usable_mb(self) -> int:
        return self.total_mb if self.limit_mb is None else self.limit_mb


@dataclass(frozen=True, slots=True)
class Reading:
    """What the kernel says at one moment.

    `rooms` are the machine, then each cgroup of ours, inmost first, whose limit is below the machine's memory.
    `waiting` is the share of the last ten seconds, in percent, in which some task waited for memory; None where the
    kernel does not tell.
    """

    rooms: tuple[Room, ...]
    waiting: float | None = None

    @property
    def machine(self) -> MachineMemory:
        machine, *limits = self.rooms
        tightest = min(limits, key=lambda room: room.total, default=None)
        if tightest is None:
            return MachineMemory(machine.total // MIB, machine.used // MIB)
        return MachineMemory(machine.total // MIB, machine.used // MIB, tightest.total // MIB, tightest.used // MIB)


def read(proc: str | os.PathLike[str] = PROC, cgroups: str | os.PathLike[str] = CGROUPS) -> Reading:
    """One reading. Raises `OSError`, `KeyError` or `ValueError` where `/proc/meminfo` cannot be made sense of.

    Three system calls a file: `/proc/meminfo`, one or two of pressure, our cgroups' names, and two for each of those,
    four where it has a limit. Their descriptors are not kept, as a process can be moved to another cgroup.
    """
    proc, cgroups = os.fspath(proc), os.fspath(cgroups)
    machine = _machine(proc)
    folders = _own_cgroups(proc, cgroups)
    limits = [room for folder, name in folders if (room := _limit(folder, name)) and room.total < machine.total]
    waiting = _most(_waiting(f"{proc}/pressure/memory"), _waiting_here(folder for folder, _ in folders))
    return Reading((machine, *limits), waiting)


def _machine(proc: str) -> Room:
    figures = _figures(_text(f"{proc}/meminfo"))
    total = int(figures[b"MemTotal:"]) * 1024
    return Room(total, total - int(figures[b"MemAvailable:"]) * 1024, "machine")


def _own_cgroups(proc: str, cgroups: str) -> Sequence[tuple[str, str]]:
    """Our cgroup v2 folder and those above it, each with its name. One that a namespace hides is left out.

    The root stands last: in a container that has no namespace of its own for cgroups it is the container's.
    """
    lines = os.fsdecode(_if_there(f"{proc}/self/cgroup") or b"").splitlines()
    names = [name for line in lines if line.startswith("0::") for name in line[3:].split("/") if name]
    depths = range(0 if ".." in names else len(names), -1, -1)
    paths = ["/".join(names[:depth]) for depth in depths]
    return [(f"{cgroups}/{path}" if path else cgroups, f"cgroup /{path}") for path in paths]


def _limit(folder: str, name: str) -> Room | None:
    """The room under a cgroup's `memory.max`, or under `memory.high` where that is lower; None where it sets neither.

    Above `memory.high` the kernel slows down whatever allocates (systemd's `MemoryHigh=`), so that is where it is full.
    """
    limits = [limit for file in ("memory.max", "memory.high") if (limit := _bytes(f"{folder}/{file}")) is not None]
    current = _if_there(f"{folder}/memory.current") if limits else None
    if current is None:
        return None
    figures = _figures(_if_there(f"{folder}/memory.stat") or b"")
    cache = sum(int(figures.get(of, 0)) for of in _CACHE)
    return Room(min(limits), max(0, int(current) - cache), name)


def _bytes(file: str) -> int | None:
    """A limit; None for `max`, and where there is no such file, as at the root."""
    text = _if_there(file)
    return None if text is None or text.strip() == b"max" else int(text)


def _waiting_here(folders: Iterable[str]) -> float | None:
    """Of the inmost cgroup of ours that can be seen and has what calls have, too, which one for the bus alone has not.

    The machine's figure is weighed by all processors that are busy, so a bus that waits on one of many hardly shows.
    """
    files = (f"{folder}/memory.pressure" for folder in folders if not is_of_bus(folder))
    return next((found for file in files if (found := _waiting(file)) is not None), None)


def _waiting(file: str) -> float | None:
    """`some avg10` of a file of pressure stall information (PSI), in percent; None where there is none."""
    text = _if_there(file) or b""  # an old kernel has no such file, and one with psi=0 refuses to read it
    some = next((line for line in text.splitlines() if line.startswith(b"some ")), b"")
    fields = dict(field.split(b"=", 1) for field in some.split()[1:])
    return float(fields[b"avg10"]) if b"avg10" in fields else None


def _most(*figures: float | None) -> float | None:
    return max((figure for figure in figures if figure is not None), default=None)


def _figures(text: bytes) -> dict[bytes, bytes]:
    """The lines `name number ...` of a kernel file."""
    rows = (line.split(None, 2) for line in text.splitlines())
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _if_there(file: str) -> bytes | None:
    """None where it cannot be read, be it that its cgroup is gone by now.

    Raises `OSError` while descriptors or memory are short: else a limit would seem to be lifted then.
    """
    try:
        return _text(file)
    except OSError as error:
        if error.errno in _SHORT:
            raise
        return None


def _text(file: str) -> bytes:
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(handle, _READ_BYTES)
    finally:
        os.close(handle)
