"""A pool: the workers of one overlay, phase, rights, command and edition, and the calls that wait for them."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from runners.alarm import TICK_S, Alarm
from runners.base import Code, Outcome
from runners.output import MEMORY_EVERY_S, data_limit, excess
from runners.processes import Home
from runners.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from runners.base import Job, ProcessTarget
    from runners.helpers import Helpers
    from runners.logs import OverlayLogs
    from runners.worker import WorkerCall

T = TypeVar("T")

_STARTLESS = frozenset(
    {
        Code.START,
        Code.CRASH,
        Code.PROTOCOL,
        Code.MEMORY_LIMIT,
        Code.PROCESS_LIMIT,
        Code.SCRATCH_LIMIT,
        Code.SANDBOX,
    }
)
"""What a worker ends of that is not likely to do better at its next start."""

_IS = {"late": "late with a call that was given up"}
"""The words for what a worker does, where its state alone says too little."""


@dataclass(frozen=True, slots=True)
class WorkerPace:
    """How long and how often. Times are in seconds."""

    memory_s: float = MEMORY_EVERY_S
    """Between two looks at the memory of the workers of a pool that has calls."""
    exit_grace_s: float = 0.25
    """That a worker which has closed its stdin or stdout has to end by itself."""
    first_backoff_s: float = 0.25
    """For which no worker is started once two in a row have ended before they ever answered; doubled by each more."""
    longest_backoff_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Means:
    """What all pools share. `alive` holds, in order, every worker from before its start until nothing of it is left."""

    helpers: Helpers
    logs: OverlayLogs | None
    kill_grace_s: float
    idle_s: float
    pace: WorkerPace
    alive: dict[Worker, None] = field(default_factory=dict)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    numbers: Counter[str] = field(default_factory=Counter)

    def number(self, overlay: str) -> int:
        """What an overlay's next worker is called by in its log."""
        self.numbers[overlay] += 1
        return self.numbers[overlay]

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


class WorkerPool:
    """Calls are served first come first served. `dismiss` is called once nobody need know the pool any more.

    `draining` says, in words that go on from a worker's name, why it is to end with the calls that it is given at once.
    One timer stands for the deadlines of all its calls: it is set to the earliest, and when it fires, to the next.
    One task looks at the memory of all its workers, while there are calls. Without a cap of its own, a worker may hold
    what the largest of the pool's calls may, as it may have had that call, or may be about to.
    """

    def __init__(
        self,
        means: Means,
        job: Job,
        target: ProcessTarget,
        dismiss: Callable[[WorkerPool], None],
        *,
        draining: str | None = None,
    ) -> None:
        tier = target.workers.tier
        self.home = Home(
            job.overlay, job.phase, job.rights, job.folder, target.env, job.edition, target.argv[0], tier=tier
        )
        self.argv = target.argv
        self.log_limit = job.max_log_bytes
        self.start_timeout_s = target.workers.start_timeout_s
        self.data_bytes = data_limit(target.workers.max_mb)
        self.loop = asyncio.get_running_loop()
        self._means = means
        self._limits = target.workers
        self._dismiss = dismiss
        self._workers: list[Worker] = []
        self._free: list[Worker] = []
        self._waiting: deque[WorkerCall] = deque()
        self._stopping: set[Worker] = set()
        self._draining = draining
        self._failures = 0
        self._hard_mb = 0
        self._last_failure = Outcome(Code.START)
        self._not_before = -math.inf
        self._used = self.loop.time()
        self._alarm = Alarm(self.loop, self._expire)
        self._idle_timer = self.loop.call_later(means.idle_s, self._look_if_idle)
        self._weighing: asyncio.Task[None] | None = None

    # Calls

    def submit(self, call: WorkerCall) -> None:
        """Give the call to a free worker, or let it wait for one."""
        if call.job.hard_mb > self._hard_mb:
            self._hard_mb = call.job.hard_mb
            for worker in self._workers:
                worker.raise_limit(self.may_mb)
        self._alarm.set(call.job.deadline)
        if self._weighing is None:
            self._weighing = self._means.spawn(self._weigh())
        if self._free:
            self._free.pop().take(call)
            return
        self._waiting.append(call)
        if len(self._workers) < self._limits.count:
            self._grow()

    def abandon(self, call: WorkerCall) -> None:
        """Nobody waits for a call any more, which was not answered."""
        if call.worker is not None:
            self._late(call.worker)
        elif call in self._waiting:
            self._waiting.remove(call)

    def again(self, call: WorkerCall) -> None:
        call.worker = None
        self._waiting.appendleft(call)

    def _next(self) -> WorkerCall | None:
        while self._waiting:
            call = self._waiting.popleft()
            if not call.answer.done():
                return call
        return None

    def _refuse(self, outcome: Outcome) -> None:
        while (call := self._next()) is not None:
            call.finish(outcome)

    # Deadlines

    def _expire(self, now: float) -> float:
        for worker in list(self._workers):
            if (call := worker.awaited) is not None and call.job.deadline <= now:
                self._time_out(worker, call)
        overdue = [call for call in self._waiting if call.job.deadline <= now]
        self._waiting = deque(call for call in self._waiting if call.job.deadline > now)
        for call in overdue:
            call.finish(Outcome(Code.TIMEOUT, error=self._none_was_free(call)))
        return min(self._deadlines(), default=math.inf)

    def _time_out(self, worker: Worker, call: WorkerCall) -> None:
        error = f"the worker had not answered within the call's {call.allowed_s:.3f} s, "
        spoken = worker.log_of_call()
        if left_s := self._late(worker):
            error += f"and has {left_s:.3g} s more for a reply, which is dropped"
        else:
            error += "and was ended"
        if not worker.calls:
            error += "; it has never answered yet, and a reply is to be one line, and flushed"
        call.finish(Outcome(Code.TIMEOUT, error=error, log=spoken, sandbox=worker.sandbox))

    def _none_was_free(self, call: WorkerCall) -> str:
        count = self._limits.count
        error = f"none of {count} worker{'s' * (count > 1)} was free within the call's {call.allowed_s:.3f} s"
        states = Counter(worker.doing for worker in [*self._workers, *self._stopping])
        told = ", ".join(f"{number} {_IS.get(state, state)}" for state, number in states.items())
        return f"{error}: {told}" if told else error

    def _deadlines(self) -> Iterator[float]:
        yield from (call.job.deadline for call in self._waiting)
        yield from (call.job.deadline for worker in self._workers if (call := worker.awaited) is not None)

    def _late(self, worker: Worker) -> float:
        """Nobody waits for its reply any more. For how many seconds it may go on: not at all in a pool that ends."""
        if self._draining is None:
            return worker.be_late()
        worker.end(self._draining)
        return 0.0

    # Workers come and go

    def _grow(self) -> None:
        """Start workers for the calls that wait. As many again as the pool may have may be on their way out."""
        if not self._waiting:
            return
        if (left_s := self._not_before - self.loop.time()) > TICK_S:
            if not self._workers:
                self._refuse(self._backed_off(left_s))
            return
        count = self._limits.count
        starting = sum(worker.process is None for worker in self._workers)
        room = min(count - len(self._workers), 2 * count - len(self._workers) - len(self._stopping))
        for _ in range(min(room, len(self._waiting) - starting)):
            worker = Worker(self._means.number(self.home.overlay), self, self._means)
            self._workers.append(worker)
            self._means.alive[worker] = None
            worker.start()

    def _backed_off(self, left_s: float) -> Outcome:
        last = self._last_failure
        error = (
            f"{last.error}; {self._failures} in a row never answered, and the next is not started for {left_s:.3f} s"
        )
        return last._replace(error=error, retryable=True)

    def free(self, worker: Worker) -> None:
        if self._failures:
            self._failures = 0
            self._not_before = -math.inf
        self._used = self.loop.time()
        if worker.calls >= self._limits.max_calls:
            worker.end(f"is replaced: it has answered {worker.calls} calls")
        else:
            self.ready(worker)

    def ready(self, worker: Worker) -> None:
        if (call := self._next()) is not None:
            worker.take(call)
        elif self._draining is not None:
            worker.end(self._draining)
        else:
            self._free.append(worker)

    def withdraw(self, worker: Worker) -> None:
        if worker in self._free:
            self._free.remove(worker)

    def stopping(self, worker: Worker) -> None:
        self.withdraw(worker)
        if worker in self._workers:
            self._workers.remove(worker)
            self._stopping.add(worker)
            self.loop.call_soon(self._grow)

    def unstarted(self, worker: Worker, failure: Outcome) -> None:
        """The call that has waited longest is told."""
        if (call := self._next()) is not None:
            call.finish(failure)
        self.gone(worker, failure)

    def gone(self, worker: Worker, failure: Outcome) -> None:
        self.withdraw(worker)
        self._stopping.discard(worker)
        self._means.alive.pop(worker, None)
        if worker in self._workers:
            self._workers.remove(worker)
        if not worker.calls and failure.code in _STARTLESS:
            self._failed(failure)
        self._grow()
        self._end_if_drained()

    def _failed(self, failure: Outcome) -> None:
        """A worker never answered. One alone may have met a bad call; with the second in a row the waits begin."""
        self._last_failure = failure
        self._failures += 1
        if self._failures > 1:
            pace = self._means.pace
            wait_s = min(pace.first_backoff_s * 2.0 ** min(self._failures - 2, 30), pace.longest_backoff_s)
            self._not_before = self.loop.time() + wait_s
            self.loop.call_later(wait_s, self._grow)

    # Memory

    @property
    def may_mb(self) -> int:
        return self._limits.max_mb or self._hard_mb

    async def _weigh(self) -> None:
        """Look at every worker every now and then, for the last time when none has a call any more."""
        while True:
            await asyncio.sleep(self._means.pace.memory_s)
            for worker in list(self._workers):
                await self._weigh_one(worker)
            if not self._waiting and all(worker.call is None for worker in self._workers):
                break
        self._weighing = None

    async def _weigh_one(self, worker: Worker) -> None:
        memory_mb = await worker.measure()
        may_mb = self.may_mb
        if memory_mb is None or memory_mb <= may_mb or worker not in self._workers:
            return
        if worker.call is None:
            worker.end(f"is replaced: it {excess(memory_mb, may_mb)}")
        else:
            worker.stop(Code.MEMORY_LIMIT, f"{excess(memory_mb, may_mb)}, and was ended")

    def relieve(self, idle_s: float) -> None:
        """Memory is short: end the free workers, where no call has come for so many seconds."""
        if self.loop.time() - self._used >= idle_s:
            for worker in list(self._free):
                worker.end("is let go: memory is short")

    def purge(self) -> int:
        """Tell the workers, where they take it: how many."""
        return sum(worker.purge() for worker in list(self._workers)) if self._limits.purge else 0

    # Ends

    def drain(self, why: str) -> None:
        """Finish the calls that are here, and end: each worker as soon as nobody waits for it."""
        if self._draining is None:
            self._draining = why
            for worker in [*self._free, *(worker for worker in self._workers if worker.doing == "late")]:
                worker.end(why)
            self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self._draining is not None and not self._workers and not self._stopping and not self._waiting:
            self._end()

    def _end(self) -> None:
        self._stop_watching()
        self._dismiss(self)

    def _look_if_idle(self) -> None:
        left_s = self._used + self._means.idle_s - self.loop.time()
        if self._waiting or len(self._free) < len(self._workers):
            left_s = self._means.idle_s
        if left_s > TICK_S:
            self._idle_timer = self.loop.call_later(left_s, self._look_if_idle)
        else:
            self.drain(f"is let go: no call for {self._means.idle_s:g} s")
            self._end()

    def _stop_watching(self) -> None:
        self._idle_timer.cancel()
        self._alarm.cancel()
        if self._weighing is not None:
            self._weighing.cancel()

    def close(self) -> None:
        """Refuse the calls that wait, and stop every timer. `WorkerPools.close` ends the workers, with their calls."""
        self._stop_watching()
        self._refuse(Outcome(Code.CANCELLED, error="the runner was closed before a worker was free"))
