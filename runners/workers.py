"""The workers of a bus: which pool a call goes to, and when a pool must end.

A pool belongs to one edition of its overlay. The first call of a newer edition lets the older pools drain: they finish
the calls that they have, and end. A call of an older edition, resolved before the change, still has a pool, which ends
when that call has. What a worker is to do is said in `worker.py`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from runners.base import Code, Outcome, ProcessTarget, Share, shared_by
from runners.worker import WorkerCall
from runners.worker_pool import Means, WorkerPace, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Collection

    from runners.base import Job, Rights
    from runners.helpers import Helpers
    from runners.logs import OverlayLogs

    Key = tuple[str, str, Rights, tuple[str, ...], int]

OUTDATED = "is let go: its overlay has changed"
FORGOTTEN = "is let go: its overlay was removed or disabled"


class WorkerPools:
    """Every pool of a bus. Used in one event loop only."""

    def __init__(
        self,
        helpers: Helpers,
        logs: OverlayLogs | None,
        *,
        kill_grace_s: float,
        idle_s: float,
        pace: WorkerPace | None = None,
    ) -> None:
        self._means = Means(helpers, logs, kill_grace_s, idle_s, pace or WorkerPace())
        self._pools: dict[Key, WorkerPool] = {}
        self._living: set[WorkerPool] = set()
        self._editions: dict[str, int] = {}
        self._closed = False

    async def run(self, job: Job) -> Outcome:
        """Have a worker answer, until `job.deadline` at most. Raises nothing but `asyncio.CancelledError`.

        Neither ends the worker: see `worker.py` for what becomes of it.
        """
        if self._closed:
            return Outcome(Code.CANCELLED, error="the runner was closed before the call could start")
        if job.deadline <= (now := time.monotonic()):
            return Outcome(Code.TIMEOUT, error="the deadline had passed before the call could start")
        pool = self._pool(job)
        call = WorkerCall(job, now, pool.loop.create_future())
        pool.submit(call)
        try:
            return await call.answer
        except asyncio.CancelledError:
            pool.abandon(call)
            raise

    def state(self, overlay: str) -> dict[str, Any]:
        """`{}`, or `{"workers": [{"phase", "state", "calls", "pid", "uptime_s", "memory_mb"}, ...]}`, oldest first.

        `pid` and `uptime_s` are there once a worker has started, `memory_mb` (MiB) once it was looked at, `purges` (a
        number) and `last_purge_ms` (since the epoch) once it was told to let go of its caches.
        """
        workers = [worker.told() for worker in self._means.alive if worker.overlay == overlay]
        return {"workers": workers} if workers else {}

    def shares(self) -> dict[str, Share]:
        """The workers that there are, by what their calls have in common, as `Runner.shares`."""
        found: dict[str, Share] = {}
        for worker in self._means.alive:
            name = shared_by(worker.overlay, worker.phase)
            so_far = found.get(name, Share(0, 0.0))
            found[name] = Share(so_far.processes + 1, so_far.used_mb + (worker.memory_mb or 0.0))
        return found

    def relieve(self, idle_s: float) -> None:
        """End the workers of every pool that was without a call for so many seconds."""
        for pool in list(self._living):
            pool.relieve(idle_s)

    def purge(self, overlays: Collection[str] | None) -> dict[str, int]:
        """Tell the workers of these overlays, or of all, where they take it. How many of each are told."""
        told: Counter[str] = Counter()
        for pool in list(self._living):
            if overlays is None or pool.home.overlay in overlays:
                told[pool.home.overlay] += pool.purge()
        return {overlay: count for overlay, count in told.items() if count}

    def forget(self, overlay: str) -> None:
        """Let all workers of the overlay end, each as soon as its calls have. A later call has a new pool."""
        self._editions.pop(overlay, None)
        for key, pool in list(self._pools.items()):
            if pool.home.overlay == overlay:
                del self._pools[key]
                pool.drain(FORGOTTEN)

    async def close(self, *, at_once: bool = False) -> None:
        """End every worker, and start no more. Calls that wait or run get ERR_CANCELLED.

        What is just being started ends with the helpers, which are for the caller to close. A second call, `at_once`,
        may hurry the first.
        """
        self._closed = True
        for pool in list(self._living):
            pool.close()
        for task in self._means.tasks:
            task.cancel()
        for worker in list(self._means.alive):
            held = worker.awaited is not None
            what = "still had the call when the runner was closed, and was ended" if held else "is ended with the bus"
            worker.stop(Code.CANCELLED, what, at_once=at_once)
        ends = [worker.ended for worker in self._means.alive]
        if ends or self._means.tasks:
            await asyncio.wait([*ends, *self._means.tasks])

    def _pool(self, job: Job) -> WorkerPool:
        target = job.target
        if not isinstance(target, ProcessTarget):
            raise TypeError(f"a worker cannot carry {target!r}")
        key = (job.overlay, job.phase, job.rights, target.argv, job.edition)
        return self._pools.get(key) or self._new_pool(key, job, target)

    def _new_pool(self, key: Key, job: Job, target: ProcessTarget) -> WorkerPool:
        newest = self._editions.get(job.overlay, job.edition)
        if job.edition > newest:
            self._drain_older(job)
        self._editions[job.overlay] = max(newest, job.edition)
        draining = OUTDATED if job.edition < newest else None
        pool = WorkerPool(self._means, job, target, functools.partial(self._dismiss, key), draining=draining)
        self._pools[key] = pool
        self._living.add(pool)
        return pool

    def _drain_older(self, job: Job) -> None:
        for pool in list(self._living):
            if pool.home.overlay == job.overlay and pool.home.edition < job.edition:
                pool.drain(OUTDATED)

    def _dismiss(self, key: Key, pool: WorkerPool) -> None:
        """Its key may be another's by now."""
        self._living.discard(pool)
        if self._pools.get(key) is pool:
            del self._pools[key]
