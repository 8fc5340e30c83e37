"""A process that a helper started for somebody, until nothing of it is left; where it belongs, and what it runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import asyncio
    import signal
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from runners.base import Rights, Sandbox, Tier
    from runners.cgroups import Cgroup
    from runners.exits import Exit
    from runners.helper import Helper

log = logging.getLogger(__name__)

KIB = 1024
"""In a MiB."""

Scope = Literal["call", "pool", "service"]
"""What the rights of a process were made for."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a process belongs. Processes with equal homes are started by the same helper, with the same rights.

    `edition` grows with each change of the overlay (`Job.edition`). `program` is the first word of the commands that
    are started there; `listen` has the TCP ports that may be listened on without any right to the network; `tier` is
    where their scratch folders are, of which they may write to no other. A helper stands in the folder that it was
    started in, even if another has taken its place since.
    """

    overlay: str
    phase: str
    rights: Rights
    folder: Path = field(compare=False)
    env: Mapping[str, str] = field(compare=False)
    edition: int = 0
    program: str = ""
    listen: tuple[int, ...] = ()
    tier: Tier = "LOCAL"


@dataclass(frozen=True, slots=True)
class Script:
    """A Python script that is forked for calls: the interpreter with its options, and `run.py` or `-m`, `module`."""

    interpreter: tuple[str, ...]
    arguments: tuple[str, ...]
    preload: tuple[str, ...] = ()
    stdin: Literal["file", "pipe"] = "file"


class Process:
    """A program that was started, leader of its own session and group, until nothing of it is left.

    `ended` holds its exit once it was reaped and all that it had started is gone. It never fails, nor is it cancelled.
    """

    def __init__(
        self, number: int, helper: Helper, loop: asyncio.AbstractEventLoop, cgroup: Cgroup | None = None
    ) -> None:
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self.cgroup = cgroup
        self._number = number
        self._helper = helper
        self._on_use: Callable[[float], None] | None = None

    def watch(self, on_use: Callable[[float], None]) -> None:
        """Have `on_use` called with what it has of memory, with all that it started, in MiB, whenever that changes.

        A program that ends soon is not looked at.
        """
        self._on_use = on_use

    def uses(self, mb: float) -> None:
        """Its helper has looked at it."""
        if self._on_use is not None:
            self._on_use(mb)

    @property
    def helper_pid(self) -> int:
        """The process that everything of this one's overlay and phase is below, as this process sees it."""
        return self._helper.pid

    def sandbox_for(self, scope: Scope) -> Sandbox:
        """What the kernel holds it to."""
        return self._helper.sandbox_for(scope)

    @property
    def scratch_mb(self) -> int:
        """What it may have in its scratch folder, in MiB; 0 for any amount."""
        return self._helper.scratch_mb

    def raise_limit(self, mb: int) -> None:
        """Let it have so many MiB of memory, if the kernel limits it and that is more than before."""
        if self.cgroup is not None and not self.ended.done():
            try:
                self.cgroup.raise_to(mb * KIB)
            except OSError as error:
                log.warning("the limit of %s cannot be raised: %s", self.cgroup.path, error.strerror)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its group. KILL ends also what left the group. Nothing happens once it has ended."""
        if not self.ended.done():
            self._helper.signal(self._number, number)

    async def memory_mb(self) -> float | None:
        """What it has of memory now with all that it started, in MiB; None once it has ended.

        Of one process that is its resident memory, of several the sum of their shares (Pss of proc(5)).
        """
        return None if self.ended.done() else await self._helper.measure(self._number)
