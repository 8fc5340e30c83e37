"""What decides who runs, and what others than this bus do.

They know of a call what it declares, and of memory what the machine says; how much a call will have nobody tells them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeAlias

from bus.degradation import memory_block
from bus.model import Degradation
from bus.stress import stress_of_share

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulation.world import Request, World

    MakePolicy: TypeAlias = Callable[[World], "Policy"]

NOTHING_MORE = Degradation()
"""Calls of a trace have a profile, and no manifest that adds to it."""


class Policy(Protocol):
    """Decides over the requests of one world, with `world.start` and `world.refuse`."""

    def ask(self, request: Request) -> None:
        """It wants to run: start it, now or later, or refuse it."""

    def ended(self, request: Request, code: str) -> None:
        """A run ended with this code; what it had is free."""

    def expire(self, request: Request) -> None:
        """The deadline of one that waits has passed. Whoever does not say so with `world.lose` has it said."""

    def sampled(self) -> None:
        """It is time to look at the machine: once every `SAMPLE_S`."""

    def reserved_mb(self) -> float | None:
        """What is reserved now, in MiB; None where nothing ever is."""


class Nobody:
    """No admission: what comes is started. It is what a server does that starts a process for each request."""

    def __init__(self, world: World) -> None:
        self.world = world

    def ask(self, request: Request) -> None:
        self.world.start(request)

    def ended(self, request: Request, code: str) -> None:
        pass

    def expire(self, request: Request) -> None:
        pass

    def sampled(self) -> None:
        pass

    def reserved_mb(self) -> float | None:
        return None


class Ancestor(Nobody):
    """The rule of the program that this bus follows upon: it starts what comes, and tells it to do with less.

    Above a stress of 0.3 + 0.05 x priority, at the moment of the start, all DEGRADE steps of the profile apply at once.
    It queues nothing, refuses nothing and limits nothing. Its stress was a used share of /proc/meminfo between 0 and 1;
    the bus's own curve stands for that.
    """

    def ask(self, request: Request) -> None:
        machine = self.world.machine
        stress = stress_of_share(machine.used_mb(self.world.now) / machine.total_mb)
        told = memory_block(
            request.call.profile,
            stress,
            all_steps=True,
            degradation=NOTHING_MORE,
            total_mb=round(machine.total_mb),
        )
        self.world.start(request, told.get("kv_shrink_factor", 1.0))


class Slots(Nobody):
    """Count-only: so many calls at once, the others in the order in which they came. A semaphore, a thread pool."""

    def __init__(self, world: World, slots: int) -> None:
        super().__init__(world)
        self._slots = slots
        self._line: deque[Request] = deque()

    def ask(self, request: Request) -> None:
        self._line.append(request)
        self._dispatch()

    def ended(self, request: Request, code: str) -> None:
        self._dispatch()

    def expire(self, request: Request) -> None:
        self._line.remove(request)

    def _dispatch(self) -> None:
        while self._line and len(self.world.running) < self._slots:
            self.world.start(self._line.popleft())


class SoftOnly(Nobody):
    """Reserve what is declared (SOFT), believe it, and hold nobody to it.

    So Ray treats its resource `memory`: "Resource requirements of tasks or actors do NOT impose limits on actual
    physical resource usage" (docs.ray.io, Ray Core, Resources), and they are used for admission only. Calls that
    declare the same wait in one line; a line whose first does not fit does not hold up others, as with Ray's scheduling
    classes. What is declared larger than the machine never starts. Ray's memory monitor, which kills workers where a
    node is nearly full, is not here: the kernel's killer stands for it.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._reserved_mb = 0.0
        self._lines: dict[int, deque[Request]] = {}

    def ask(self, request: Request) -> None:
        self._lines.setdefault(request.call.profile.soft_mb, deque()).append(request)
        self._dispatch()

    def ended(self, request: Request, code: str) -> None:
        self._reserved_mb -= request.call.profile.soft_mb
        self._dispatch()

    def expire(self, request: Request) -> None:
        self._lines[request.call.profile.soft_mb].remove(request)

    def reserved_mb(self) -> float:
        return self._reserved_mb

    def _dispatch(self) -> None:
        """Start what fits; of the lines whose first fits, the one that has waited for longest."""
        while fitting := [
            (line[0].asked_s, soft_mb)
            for soft_mb, line in self._lines.items()
            if line and self._reserved_mb + soft_mb <= self.world.machine.room_mb
        ]:
            _, soft_mb = min(fitting)
            self._reserved_mb += soft_mb
            self.world.start(self._lines[soft_mb].popleft())
