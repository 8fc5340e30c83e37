"""The helpers of a bus: one for each `Home` and way of starting that is in use.

A second one is begun where two cores have work for it, and none is kept that was idle for long. `Pool.ready` and then
`Helper.launch` is the door for a call, `Helpers.start` for what keeps running; both give a `Process`.

What a helper was started for is one edition of its overlay. With the first process of a higher one all that is older
is retired: it ends with its calls. Who comes later and still wants an older one has a helper that ends as soon.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import secrets
import signal
import time
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.base import Rights, Share
from runners.helper import Helper
from runners.helper_errors import AnotherWayError, GoneError, UnheldError
from runners.processes import KIB, Home
from runners.scratch_root import ScratchRoot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from runners.cgroups import Cgroups
    from runners.confinement import Confinement, Plan
    from runners.processes import Process, Script

log = logging.getLogger(__name__)

IDLE_S = 60.0
"""Seconds that a helper without a process is kept."""

KEPT_IDLE = 32
"""Idle helpers that are kept at most: each holds some 5 to 10 MB."""

TIDY_S = 1.0
"""How long, in seconds, one too many may be idle: it may be between two calls, or about to get its first."""

AGAIN_S = 1.0
"""How long, in seconds, a pool that has a helper waits after a second could not be started."""

TRIES = 2
"""How often a helper is started that ends before it is ready: the first may have been killed for want of memory."""

STARTS = 50
"""How often a helper is started at most until one is ready. Each learns from the last, so that few are enough."""

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.ETOOMANYREFS})
"""What fails to start for want of these may start a moment later."""

REFUSALS = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS})
"""The errors of a kernel that gives no pid namespace, and will give none."""


class UnfitError(Exception):
    """A script that cannot be run by fork; the message says why. Spawn it."""


class Pool:
    """The helpers of one home and way of starting, and what is known of how to start them.

    A pool that is retired lets its helpers end as soon as they have no process.
    """

    def __init__(self, house: Helpers, home: Home, script: Script | None, *, retired: bool) -> None:
        self.home = home
        self.script = script
        self.helpers: list[Helper] = []
        self.skip: dict[str, str] = {}
        self.unfit: str | None = None
        self.retired = retired
        self._house = house
        self._waiting = 0
        self._starting: asyncio.Task[Helper] | None = None
        self._more_from = 0.0
        """On the clock of `time.monotonic`: when another may be begun beside those that are there."""

    @property
    def is_empty(self) -> bool:
        return not self.helpers and self._starting is None

    def free(self) -> Helper | None:
        """The helper with the fewest processes; None where none is ready. Another is begun where all have work."""
        helper = self.any()
        if helper is not None and helper.processes and self._may_have_more():
            self._start()
        return helper

    def _may_have_more(self) -> bool:
        return len(self.helpers) < self._house.most and not self.retired and time.monotonic() >= self._more_from

    def any(self) -> Helper | None:
        return min(self.helpers, key=_load, default=None)

    async def ready(self) -> Helper:
        """Wait for a helper that is ready. One that is starting goes on if the caller is cancelled.

        Raises `UnfitError`, `UnheldError`, or another OSError where no helper can be had.
        """
        helper = self.free()
        if helper is not None:
            return helper
        self._waiting += 1
        try:
            return await asyncio.shield(self._start())
        finally:
            self._waiting -= 1
            self._rest_soon()

    def retire(self) -> None:
        self.retired = True
        self._rest()

    def rests(self, helper: Helper) -> None:
        """As a `Keeper`."""
        if self.retired:
            helper.close()
        else:
            self._house.tidy_soon()

    def leaves(self, helper: Helper) -> None:
        """As a `Keeper`."""
        if helper in self.helpers:
            self.helpers.remove(helper)
        self._house.look_at(self)

    def _rest_soon(self) -> None:
        """Who has just been given a helper is to launch first."""
        if self.retired:
            asyncio.get_running_loop().call_later(TIDY_S, self._rest)

    def _rest(self) -> None:
        """Of a retired pool, let those end for which nothing is to come."""
        if self.retired and not self._waiting:
            for helper in [helper for helper in self.helpers if not helper.processes]:
                helper.close()
            self._house.look_at(self)

    def _start(self) -> asyncio.Task[Helper]:
        if self._starting is None:
            self._starting = asyncio.create_task(self._until_ready(), name=f"helper of {self.home.overlay}")
            self._starting.add_done_callback(self._started)
        return self._starting

    def _started(self, task: asyncio.Task[Helper]) -> None:
        self._starting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("no helper for %s: %s", self.home.overlay, error)
            self._more_from = time.monotonic() + AGAIN_S
        self._rest_soon()

    async def _until_ready(self) -> Helper:
        """Each start that fails teaches something: no namespace, one more module to leave alone."""
        tries = itertools.count(1)
        for _ in range(STARTS):
            try:
                helper = self._house.begin(self)
                await helper.ready
            except AnotherWayError as told:
                self._learn(told)
            except UnheldError:  # another way would hold no more
                raise
            except OSError as error:
                if error.errno == errno.ECHILD and not self._house.closed and next(tries) < TRIES:
                    continue
                if self._cannot_give_up() or self._house.closed or error.errno in SHORTAGES:
                    raise
                self._give_up(str(error))
            else:
                self._house.had_namespace |= bool(helper.namespace)
                if helper.is_open:
                    self.helpers.append(helper)
                    return helper
            if self.unfit is not None:
                raise UnfitError(self.unfit)
        why = f"its helper was not ready after {STARTS} starts"
        if self._cannot_give_up():
            raise OSError(errno.EAGAIN, why)
        self._give_up(why)
        raise UnfitError(why)

    def _learn(self, told: AnotherWayError) -> None:
        """Raises OSError where another way is not to be tried."""
        if isinstance(told.given, OSError):
            self._house.do_without_namespace(told.given)
        elif isinstance(told.given, str):
            self.unfit = told.given
        elif told.given.keys() - self.skip.keys():
            self.skip |= told.given
        else:
            self.unfit = "its helper loads what it was told to leave alone"

    def _cannot_give_up(self) -> bool:
        """There is no other way to start it, or this one is known to be good."""
        return self.script is None or bool(self.helpers)

    def _give_up(self, why: str) -> None:
        self.unfit = why
        log.warning("%s cannot be forked for calls, so it is spawned: %s", self.home.overlay, why)


def _load(helper: Helper) -> int:
    return len(helper.processes)


class Helpers:
    """Every helper of a bus. Used in one event loop only."""

    def __init__(
        self,
        *,
        idle_s: float = IDLE_S,
        most: int | None = None,
        namespace: bool = True,
        confinement: Confinement | None = None,
        redact: Callable[[bytes], bytes] = bytes,
        cgroups: Cgroups | None = None,
    ) -> None:
        """Without `confinement` the kernel holds programs to no rights, without `cgroups` to no memory.

        `redact` takes out of a helper's last words what nobody is to read.
        """
        self.most = most or min(2, len(os.sched_getaffinity(0)))
        """Helpers of one pool."""
        self.closed = False
        self.had_namespace = False
        """Whether the kernel has given one to a helper."""
        self._idle_s = idle_s
        self._namespace = namespace
        self._confinement = confinement
        self._redact = redact
        self._cgroups = cgroups
        self._in_cgroups = False
        self._mark = f"aal-{secrets.token_hex(8)}"
        self._scratch: dict[Path, ScratchRoot] = {}
        self._sweeps: set[asyncio.Future[None]] = set()
        self._numbers = itertools.count(1)
        self._pools: dict[tuple[Home, Script | None], Pool] = {}
        self._draining: set[Pool] = set()
        self._editions: dict[str, int] = {}
        self._alive: set[Helper] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._tidying: asyncio.TimerHandle | None = None

    def pool(self, home: Home, script: Script | None = None) -> Pool:
        """The pool for calls of this home: of forks where `script` is given and fit for it, else of spawns."""
        pool = self._pools.get((home, script))
        if pool is None:
            pool = self._new_pool(home, script)
        return pool if pool.unfit is None else self.pool(home)

    async def start(
        self,
        home: Home,
        argv: Sequence[str],
        fds: tuple[int, int, int],
        env: Mapping[str, str] | None = None,
        data_bytes: int = 0,
        *,
        held_mb: int = 0,
    ) -> Process:
        """Start a program that keeps running, in the folder and environment of its home, with `env` added.

        `fds` become its stdin, stdout and stderr; they stay the caller's to close. `data_bytes` is its RLIMIT_DATA,
        `held_mb` what the kernel lets it have where there are cgroups; 0 is none. Raises OSError, with the errno
        and the words of the program's failure to start; `UnheldError`.
        """
        process = None
        while process is None:
            pool = self.pool(home)
            helper = pool.any() or await pool.ready()
            with contextlib.suppress(GoneError):
                process = helper.launch(argv, fds, env or {}, data_bytes, held_kib=held_mb * KIB)
        try:
            await process.memory_mb()  # it answers after it has started the program, or told that it could not
        except asyncio.CancelledError:
            process.signal(signal.SIGKILL)
            raise
        if process.ended.done() and (failed := process.ended.result().failed) is not None:
            raise failed
        return process

    def state(self, overlay: str) -> list[dict[str, Any]]:
        """The helpers of an overlay, as JSON for people."""
        pools = [pool for pool in (*self._pools.values(), *self._draining) if pool.home.overlay == overlay]
        unfit = {pool.home: pool.unfit for pool in pools if pool.unfit is not None}
        return [_as_json(pool, helper, unfit.get(pool.home)) for pool in pools for helper in pool.helpers]

    def forget(self, overlay: str) -> None:
        """The overlay is gone: its helpers end as soon as their processes have. A later process has a new one."""
        self._editions.pop(overlay, None)
        self._retire(pool for pool in self._pools.values() if pool.home.overlay == overlay)

    @property
    def share(self) -> Share:
        """How many there are, and what they have for themselves."""
        return Share(len(self._alive), sum(helper.floor_mb for helper in self._alive))

    def relieve(self, idle_s: float) -> None:
        """End the helpers that were idle for so many seconds."""
        since = time.monotonic() - idle_s
        for helper in list(self._alive):
            if helper.is_idle and helper.idle_since <= since:
                helper.close()

    def let_go(self, home: Home) -> None:
        """Nothing more is to be started there: its helpers end as soon as their processes have."""
        self._retire(pool for pool in self._pools.values() if pool.home == home)

    async def close(self, *, at_once: bool = False) -> None:
        """End every helper and with them everything that was started; `at_once` also what is stopped or stuck."""
        self.closed = True
        for timer in (self._looking, self._tidying):
            if timer is not None:
                timer.cancel()
        for helper in list(self._alive):
            helper.close(at_once=at_once)
        if self._alive:
            await asyncio.wait([helper.gone for helper in self._alive])
        if self._sweeps:
            await asyncio.wait(self._sweeps)
        if self._in_cgroups and self._cgroups is not None:
            self._in_cgroups = False
            self._cgroups.leave()
        while self._scratch:
            self._scratch.popitem()[1].close()

    # For pools

    def begin(self, pool: Pool) -> Helper:
        """Start a helper. Raises OSError."""
        if self.closed:
            raise OSError(errno.ESHUTDOWN, "the bus is shutting down")
        self._make_room(1)
        mark = f"{self._mark}-{next(self._numbers)}"
        plan = self._plan(pool)
        helper = Helper(
            pool.home,
            pool.script,
            pool,
            mark=mark,
            namespace=self._namespace,
            skip=pool.skip,
            plan=plan,
            redact=self._redact,
            cgroups=self._enter_cgroups(),
        )
        self._alive.add(helper)
        helper.gone.add_done_callback(lambda _: self._alive.discard(helper))
        if self._looking is None:
            self._look()
        return helper

    def _plan(self, pool: Pool) -> Plan | None:
        """How the kernel is to hold a helper of the pool; there is a scratch root then. Raises OSError."""
        if self._confinement is None:
            return None
        plan = self._confinement.plan(pool.home, forks=pool.script is not None, namespace=self._namespace)
        if not self._namespace and (why := plan.needs_namespace()):
            raise UnheldError(why)
        if plan.wire is not None:
            self._provide_scratch(Path(plan.wire["scratch"]["root"]))
        return plan

    def _provide_scratch(self, root: Path) -> None:
        try:
            if root in self._scratch:
                self._scratch[root].provide()
                return
            made = self._scratch[root] = ScratchRoot(root, self._mark)
        except OSError as error:
            raise OSError(error.errno, f"the scratch root {root} cannot be made: {error.strerror}") from error
        self._sweep(made.sweep)

    def _enter_cgroups(self) -> Cgroups | None:
        """Those of the bus, if it can make any. Before a helper is started, as it is to be where the bus then is."""
        if self._cgroups is None:
            return None
        if not self._in_cgroups:
            self._in_cgroups = True
            self._cgroups.join()
            if self._cgroups.why_not is None:
                self._sweep(self._cgroups.sweep)
        return self._cgroups if self._cgroups.why_not is None else None

    def _sweep(self, sweep: Callable[[], None]) -> None:
        self._sweeps.add(asyncio.get_running_loop().run_in_executor(None, sweep))

    def do_without_namespace(self, error: OSError) -> None:
        """It was tried, by what can be believed. Raises OSError where the kernel may have one a moment later.

        Where it never gave one, any other error is its last word: a limit on namespaces may be 0.
        """
        if error.errno in SHORTAGES or (self.had_namespace and error.errno not in REFUSALS):
            raise OSError(errno.EAGAIN, f"no pid namespace is to be had now: {error.strerror}")
        log.warning("programs run without a pid namespace: %s", error.strerror)
        self._namespace = False

    def look_at(self, pool: Pool) -> None:
        """Let go of it if it is retired and empty."""
        if pool.retired and pool.is_empty:
            self._draining.discard(pool)
            if self._pools.get((pool.home, pool.script)) is pool:
                del self._pools[pool.home, pool.script]

    def tidy_soon(self) -> None:
        if self._tidying is None and len(self._alive) > KEPT_IDLE and not self.closed:
            self._tidying = asyncio.get_running_loop().call_later(TIDY_S, self._tidy)

    def _new_pool(self, home: Home, script: Script | None) -> Pool:
        newest = self._editions.setdefault(home.overlay, home.edition)
        if home.edition > newest:
            self._editions[home.overlay] = home.edition
            self._retire(pool for pool in self._pools.values() if pool.home.overlay == home.overlay)
        pool = self._pools[home, script] = Pool(self, home, script, retired=home.edition < newest)
        return pool

    def _retire(self, pools: Iterable[Pool]) -> None:
        """Each lets its calls end, and takes no new ones."""
        for pool in list(pools):
            del self._pools[pool.home, pool.script]
            self._draining.add(pool)
            pool.retire()

    def _make_room(self, more: int = 0) -> None:
        """Of too many helpers that are idle those end that were idle for longest."""
        idle = sorted((helper for helper in self._alive if helper.is_idle), key=attrgetter("idle_since"))
        for helper in idle[: max(0, len(idle) - KEPT_IDLE + more)]:
            helper.close()

    def _tidy(self) -> None:
        self._tidying = None
        self._make_room()

    def _look(self) -> None:
        """End the helpers that were idle for long."""
        self.relieve(self._idle_s)
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self._idle_s / 2, self._look) if self._alive else None


def _as_json(pool: Pool, helper: Helper, unfit: str | None) -> dict[str, Any]:
    ready = helper.ready.result()
    held = helper.sandbox_for("call")
    why = {} if pool.script is not None or unfit is None else {"not_forked": unfit}
    return {
        "pid": helper.pid,
        "phase": pool.home.phase,
        "tier": pool.home.tier,
        "mode": "spawn" if pool.script is None else "fork",
        **why,
        "running": len(helper.processes),
        "uptime_s": round(time.monotonic() - helper.began, 3),
        "pid_namespace": helper.namespace,
        "sandbox": {"enforced": list(held.enforced), "missing": list(held.missing)},
        "preloaded": list(ready.loaded),
        "not_preloaded": {**ready.left, **pool.skip},
    }


async def has_namespace(folder: Path) -> bool:
    """Whether the kernel gives helpers a pid namespace, by starting one in `folder`. Raises OSError."""
    helpers = Helpers(most=1)
    home = Home("none", "", Rights(), folder, {"PATH": os.defpath})
    try:
        helper = await helpers.pool(home).ready()
        return bool(helper.namespace)
    finally:
        await helpers.close()
