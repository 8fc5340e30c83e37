"""Where the scratch folders of calls lie: a place for each tier.

LOCAL is memory where no folder is set for it. A helper with a mount namespace then covers the bus's own folder with
memory that nobody else sees, and that goes with it; without one its folder is in /dev/shm, where that is memory.
EXTENDED and COLD are folders on a disk.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runners.base import TIERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from runners.base import Tier

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # the folders in it have names that nobody can foresee
MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = frozenset({"tmpfs", "ramfs"})

_ESCAPED = re.compile(r"\\([0-7]{3})")


class Place(NamedTuple):
    """`root` is the folder that the helpers' folders are in, `mb` what a call may have there, in MiB.

    Where it `mounts`, a helper covers the root with memory of its own. `gap` says in words that it is not what its tier
    promises; None where it is.
    """

    root: Path
    mb: int
    mounts: bool = False
    gap: str | None = None


@dataclass(frozen=True, slots=True)
class Tiers:
    """The places of a bus. `folder` is its own, for each tier that none of `folders` is set for; `mb` as of `Place`."""

    folder: Path
    mb: Mapping[Tier, int]
    folders: Mapping[Tier, Path]

    @classmethod
    def all_in(cls, folder: Path, mb: int) -> Tiers:
        """With nothing set but the bus's own folder, and the same quota for each tier."""
        return cls(folder, dict.fromkeys(TIERS, mb), {})

    def place(self, tier: Tier, *, namespace: bool) -> Place:
        """Where a helper puts the folders of its calls, with or without a mount namespace. Looks at mounts."""
        folder, mb = self.folders.get(tier), self.mb[tier]
        if folder is not None and not _is_shared_memory(folder):
            return Place(folder, mb)
        if folder is None and tier != "LOCAL":
            return Place(self.folder, mb)
        if namespace:  # which has a /dev/shm of its own, too
            return Place(self.folder, mb, mounts=True)
        if shared_memory_is_usable():
            return Place(SHARED_MEMORY, mb)
        return Place(self.folder, mb, gap="LOCAL scratch is not in memory (no namespace, no /dev/shm)")

    def roots(self) -> Iterator[Path]:
        """Every folder that may be one, once each."""
        places = (self.place(tier, namespace=namespace) for tier in TIERS for namespace in (True, False))
        yield from dict.fromkeys(place.root for place in places)

    def kept(self) -> Iterator[Path]:
        """The folders that are set and are for scratch alone."""
        yield from (folder for folder in self.folders.values() if not _is_shared_memory(folder))


def shared_memory_is_usable() -> bool:
    """Whether folders can be made in /dev/shm, and are memory."""
    return os.access(SHARED_MEMORY, os.W_OK | os.X_OK) and file_system(SHARED_MEMORY) in IN_MEMORY


def file_system(path: Path) -> str:
    """What the file system of a path is called (`ext4`, `tmpfs`): of the nearest folder that is there.

    proc(5), /proc/PID/mountinfo. Of two mounts at one place the later one counts. Empty where that cannot be read.
    """
    real = os.path.realpath(path)
    found, name = "", ""
    try:
        lines = MOUNTS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, last = line.partition(" - ")
        point = _ESCAPED.sub(lambda code: chr(int(code[1], 8)), fields.split(" ")[4])
        if len(point) >= len(found) and (real == point or real.startswith(point.rstrip("/") + "/")):
            found, name = point, last.split(" ")[0]
    return name


def _is_shared_memory(folder: Path) -> bool:
    real = Path(os.path.realpath(folder))
    return real == SHARED_MEMORY or SHARED_MEMORY in real.parents
