"""One helper, as the bus sees it: the process that starts an overlay's programs, reaps and kills them.

The bus itself is big, threaded and busy, so it starts nothing but `launch.py`, with its own interpreter. That process
contains all the rest (`containment.py`), says so, and only then becomes what starts programs (`launcher.py`): in mode
fork under the overlay's own interpreter, which need not be one. So the first message is believed, and none after it:
a helper that says what no helper says is ended. It harms its own overlay's calls at most.

A helper that ends takes its processes with it. They end with `Exit.lost`.
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import errno
import itertools
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson

from runners import strays
from runners.base import Sandbox
from runners.contained import Contained
from runners.exits import Exit
from runners.helper_errors import AnotherWayError, GoneError, UnheldError, in_words
from runners.output import Log, Output, close_all
from runners.processes import KIB, Process
from runners.scratch import folder_of, remove_tree
from runners.wire import WORDS, Wire, as_error, as_figure, as_reasons, as_words, message

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from runners.cgroups import Cgroup, Cgroups
    from runners.confinement import Plan
    from runners.processes import Home, Scope, Script

log = logging.getLogger(__name__)

LAUNCH = Path(__file__).with_name("launch.py")
LAST_MESSAGES = 1000
"""How many messages of a helper that has ended are read: a socket holds fewer."""

AHEAD_AFTER = 2
"""Calls of a script after which its helper forks for the next one before that comes."""

START_S = 120.0
"""How long, in seconds, a helper may take to load a script's imports before it is given up."""

GONE_S = 5.0
"""How long, in seconds, a helper and what it killed may take to be gone before the helper itself is killed."""

AT_ONCE_S = 0.5
"""The same where all is to end at once."""

LOG_BYTES = 8 * 1024
"""What is kept of what a helper writes: the words of an interpreter that does not start, of a module that prints."""

LATE: Final = "late"
"""The mechanism that mode fork takes once the overlay's interpreter has started; the others are taken before."""

INTERPRETER = (sys.executable, "-I", "-S")
"""What a helper is started with: the bus's own interpreter, without site-packages."""


@cache
def _compile_zygote() -> None:
    """Leave the bytecode of what a helper loads when it may write nothing any more; once, where it is not there.

    Each would compile the text. What that leaves in its memory lies between the things that every fork copies: it
    takes a twentieth of the rate. An interpreter of another version than the bus's own still does.
    """
    if sys.dont_write_bytecode:
        return
    for path in LAUNCH.parent.glob("zygote*.py"):
        compileall.compile_file(path, quiet=2)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a helper says of itself once programs can be given to it: modules loaded, and left to the calls and why."""

    loaded: tuple[str, ...]
    left: Mapping[str, str]


class Keeper(Protocol):
    """Who keeps a helper, and hears how it does."""

    def rests(self, helper: Helper) -> None:
        """It has no process any more."""

    def leaves(self, helper: Helper) -> None:
        """It takes no programs any more."""


class Helper:
    """One helper, from its start until nothing of it is left; then `gone` is done.

    `ready` fails with `AnotherWayError`, `UnheldError`, or another OSError where it cannot be had. `namespace` says
    whether it is contained by a pid namespace; None until it said so. `floor_mb` is its own size, once it is ready.
    """

    def __init__(
        self,
        home: Home,
        script: Script | None,
        keeper: Keeper,
        *,
        mark: str,
        namespace: bool,
        skip: Iterable[str] = (),
        plan: Plan | None = None,
        redact: Callable[[bytes], bytes] = bytes,
        cgroups: Cgroups | None = None,
    ) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.home = home
        self.script = script
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.namespace: bool | None = None
        self.processes: dict[int, Process] = {}
        self.began = self.idle_since = time.monotonic()
        self.log = Log(LOG_BYTES)
        self._keeper = keeper
        self._mark = mark
        self._redact = redact
        self._cgroups = cgroups
        self._place: tuple[int, Cgroup] | None = None  # a cgroup for the next call, and its number
        self._plan = plan
        self._wired = None if plan is None else plan.wire
        self._taken: tuple[str, ...] = ()
        self._sandboxes: dict[Scope, Sandbox] = {}
        self.floor_mb = 0.0
        self._fault: str | None = None
        self._numbers = itertools.count(1)
        self._places = itertools.count(1)
        self._measured: dict[int, asyncio.Future[float | None]] = {}
        self._wire = Wire(loop, self._receive, self._cut_off)
        try:
            with self._wire.theirs as theirs:
                self._wire.send(message("begin", self._config(namespace, skip)))
                self._contained = self._begin(theirs)
        except BaseException:
            self._wire.close()
            raise
        self._said = Output(loop, self._contained.said, self.log.add)
        late = loop.call_later(START_S, self._give_up)
        self.ready.add_done_callback(lambda _: late.cancel())

    @property
    def pid(self) -> int:
        return self._contained.pid

    @property
    def scratch_mb(self) -> int:
        """What each of its programs may have in its scratch folder, in MiB; 0 for any amount."""
        return 0 if self._wired is None else int(self._wired["scratch"]["mb"])

    @property
    def is_idle(self) -> bool:
        return not self.processes and self.is_open and self.ready.done()

    @property
    def is_open(self) -> bool:
        """Whether programs can be given to it, as far as is known."""
        return self._wire.is_open

    def _begin(self, theirs: socket.socket) -> Contained:
        if self.script is not None:
            _compile_zygote()
        return Contained(
            self._loop,
            [*INTERPRETER, str(LAUNCH), str(theirs.fileno()), self._mark],
            self._exited,
            folder=self.home.folder,
            env={name: value for name, value in self._env.items() if not _is_for_the_loader(name)},
            channel=theirs.fileno(),
            pipe_stdin=self.script is not None and self.script.stdin == "pipe",
        )

    @property
    def _env(self) -> dict[str, str]:
        """That of its programs; and the mark of no call, as they begin with 1."""
        return {**self.home.env, strays.MARK: f"{self._mark}-0"}

    def _config(self, namespace: bool, skip: Iterable[str]) -> dict[str, Any]:
        """What it is told first, as `launcher.py` explains it."""
        script = self.script
        return {
            "bus": os.getpid(),
            "namespace": namespace,
            "environment": {name: value for name, value in self._env.items() if _is_for_the_loader(name)},
            "interpreter": None if script is None else script.interpreter,
            "arguments": None if script is None else script.arguments,
            "preload": () if script is None else script.preload,
            "skip": list(skip),
            "ahead": AHEAD_AFTER,
            "places": self._cgroups is not None,
            "plan": self._wired,
        }

    def sandbox_for(self, scope: Scope) -> Sandbox:
        """What the kernel holds its programs to, whose rights were made for this scope. Known once it is ready."""
        held = self._sandboxes.get(scope)
        if held is None:
            plan = self._plan
            held = Sandbox(scope) if plan is None else plan.sandbox(scope, bool(self.namespace), self._taken)
            self._sandboxes[scope] = held
        return held

    # Programs

    def launch(
        self,
        argv: Sequence[str],
        fds: tuple[int, int, int],
        env: Mapping[str, str],
        data_bytes: int = 0,
        most_kib: int = 0,
        *,
        held_kib: int = 0,
    ) -> Process:
        """Have a program started: `Process.ended` tells if it could not be. `data_bytes` is its RLIMIT_DATA; 0 none.

        It is ended where it has more than `most_kib` in memory, with all that it starts, when the helper looks at it,
        and kept by the kernel to `held_kib`, where there are cgroups; 0 is any number. Raises OSError where the command
        is too long, `GoneError` where the helper has ended.
        """
        number = next(self._numbers)
        given = argv if self.script is None else argv[len(self.script.interpreter) :]  # which the helper is itself
        if not self.is_open:
            raise GoneError
        place, cgroup = self._cgroup(held_kib) if self._cgroups is not None and held_kib else (0, None)
        try:
            all_fds = fds if cgroup is None else (*fds, cgroup.procs)
            limits = 0 if self._wired is None else data_bytes, most_kib, len(all_fds), place
            self._wire.send(message("run", (number, list(given), dict(env), limits)), all_fds)
        except (BrokenPipeError, ConnectionResetError):
            self._let_go(cgroup)
            self._receive_last()
            self.close()  # it may only have closed its ears
            raise GoneError from None
        except BaseException:
            self._let_go(cgroup)
            raise
        if cgroup is not None:
            cgroup.close()
        process = self.processes[number] = Process(number, self, self._loop, cgroup)
        return process

    # Cgroups

    def _cgroup(self, limit_kib: int) -> tuple[int, Cgroup | None]:
        """That of the next program, and the place that it is, 0 for none. Without one it is looked at, as ever."""
        (place, cgroup), self._place = self._place or (0, None), None
        try:
            if cgroup is not None:
                cgroup.limit_to(limit_kib)
            elif self._cgroups is not None:
                cgroup = self._cgroups.make(limit_kib)
        except OSError as error:
            self._let_go(cgroup)
            log.warning("a program of %s has no cgroup: %s", self.home.overlay, error.strerror)
            return 0, None
        return place, cgroup

    def _let_go(self, cgroup: Cgroup | None) -> None:
        if cgroup is not None and self._cgroups is not None:
            cgroup.close()
            self._cgroups.release(cgroup.path)

    def _offer_place(self) -> None:
        """Before its next call comes: to enter a cgroup can take longer than a call."""
        if self._cgroups is None or self.script is None or self._place is not None or not self.is_idle:
            return
        try:
            cgroup = self._cgroups.make(0)
        except OSError as error:
            log.debug("no cgroup for the next call of %s: %s", self.home.overlay, error.strerror)
            return
        if cgroup is not None:
            self._place = next(self._places), cgroup
            with contextlib.suppress(OSError):  # it is gone, and says so
                self._wire.send(message("place", self._place[0]), (cgroup.procs,))

    def signal(self, number: int, signal_number: signal.Signals) -> None:
        with contextlib.suppress(OSError):  # it is gone, and its processes with it
            self._wire.send(message("kill", (number, int(signal_number))))
        if signal_number == signal.SIGKILL:
            self._loop.call_later(GONE_S, self._insist, number)

    async def measure(self, number: int) -> float | None:
        waiting = self._measured.get(number)
        if waiting is None:
            try:
                self._wire.send(message("measure", number))
            except OSError:  # it is gone, and its processes with it
                return None
            waiting = self._measured[number] = self._loop.create_future()
        return await asyncio.shield(waiting)

    def _cut_off(self) -> None:
        """What was waiting for it cannot be told any more: its programs would wait for ever."""
        self._receive_last()
        self.close()
        self.kill()

    def _insist(self, number: int) -> None:
        """A process that was killed is still not reported: the helper is stopped, stuck or out of its mind."""
        if number in self.processes:
            log.warning("the helper of %s does not end call %d; it is killed", self.home.overlay, number)
            self.kill()

    # Its end

    def close(self, *, at_once: bool = False) -> None:
        """Let it end, and all that it started; `gone` tells when. `at_once`: whatever state it is in."""
        if self.is_open:
            self._wire.close()
            self._keeper.leaves(self)
            if self.ready.done():
                self._loop.call_later(GONE_S, self.kill)
            else:
                self.kill()  # it has nothing to end, and may hear nothing until it has loaded all
        if at_once:
            self.kill(AT_ONCE_S)

    def kill(self, within_s: float | None = None) -> None:
        """End it, though it be stopped or stuck, and all that it started.

        TERM to the process outside, which KILLs the one inside; after `within_s` (`GONE_S`) KILL to both.
        """
        if not self.gone.done():
            self._contained.terminate(GONE_S if within_s is None else within_s)

    def _give_up(self) -> None:
        self._refuse(OSError(errno.EBUSY, f"its helper was not ready within {START_S:g} s"))

    def _refuse(self, error: OSError | AnotherWayError) -> None:
        """It is not to be used. Nothing more of what it says is read."""
        if not self.ready.done():
            self.ready.set_exception(error)
        self.close()
        self.kill()

    def _exited(self, outside: bool) -> None:
        """One of its processes, as far as they are known. With the last, everything is gone.

        The process inside may have renounced the signal of its parent's death. Without a namespace it is left a while
        to end what it started, as nobody else knows that.
        """
        self._receive_last()
        self.close()
        if not self._contained.is_left:
            self._settle()
        elif outside and self.namespace:
            self._contained.kill()
        elif outside:
            self._loop.call_later(GONE_S, self._contained.kill)

    def _settle(self) -> None:
        """Where no namespace held them, there may be more to end: what only the bus can clear away."""
        orphans = not self._contained.ended_in_order() and self.namespace is False
        scratch = self._scratch_on_disk()
        if orphans or (scratch is not None and os.path.lexists(scratch)):
            clearing = self._loop.run_in_executor(None, _clear, self._mark, orphans, scratch)
            clearing.add_done_callback(self._cleared)
        else:
            self._finish()

    def _scratch_on_disk(self) -> str | None:
        """The folder that its calls have theirs in; None where that is memory which has gone with it."""
        if self._wired is None:
            return None
        place = self._wired["scratch"]
        return None if self.namespace and place["mounts"] else folder_of(place["root"], self._mark, private=False)

    def _cleared(self, clearing: asyncio.Future[None]) -> None:
        if not clearing.cancelled() and (error := clearing.exception()) is not None:
            log.error("programs of %s, or what they wrote to scratch, may be left: %s", self.home.overlay, error)
        self._finish()

    def _finish(self) -> None:
        self._said.drain()
        lost = f"the helper that ran it {self._fault or self._contained.how_it_ended()}"
        if not self.ready.done():
            said = self._redact(self.log.kept()).decode("utf-8", "replace").strip()
            self.ready.set_exception(OSError(errno.ECHILD, f"{lost} before it was ready: {said}"))
        if not self.ready.cancelled():
            self.ready.exception()  # seen, whether or not somebody waits for it
        for future in self._measured.values():
            future.set_result(None)
        for number in list(self.processes):
            self._end(number, Exit(None, lost=lost))
        self._let_go(None if self._place is None else self._place[1])
        self._place = None
        self.gone.set_result(None)

    # What it says

    def _receive(self) -> bool:
        """Take one message. False where none is there."""
        try:
            words, fds = self._wire.receive(with_fd=self.namespace is None)
        except BlockingIOError:
            return False
        try:
            if not words:
                self.close()
                return False
            verb, given = orjson.loads(words)
            if self.namespace is None:
                self._take_first(verb, given, fds)
            else:
                self._take(verb, given)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            log.warning("the helper of %s said what cannot be: %.*s", self.home.overlay, WORDS, error)
            self._fault = "said what cannot be, and was ended"
            self._refuse(OSError(errno.EPROTO, f"its helper {self._fault}"))
        finally:
            close_all(fds)
        return True

    def _receive_last(self) -> None:
        """Take what it said before it ended."""
        for _ in range(LAST_MESSAGES):
            if not (self.is_open and self._receive()):
                break

    def _take_first(self, verb: str, given: Any, fds: list[int]) -> None:  # noqa: ANN401
        """The only message that can be relied on, and the only one with a descriptor: a pidfd of the process inside."""
        if verb == "contained":
            self.namespace = given["namespace"]
            self._hold(map(as_words, given["taken"]), as_reasons(given["failed"]))
            if fds:
                self._contained.watch(fds.pop())
            else:  # the kernel passes as many as this process may have open (unix(7), MSG_CTRUNC)
                self._refuse(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            if self._plan is not None and (why := self._plan.unheld(bool(self.namespace), self._taken)):
                self._refuse(UnheldError(why))
        elif verb == "no_namespace":
            self._refuse(AnotherWayError("no_namespace", as_error(*given)))
        elif verb == "not_started":
            self._refuse(as_error(*given))
        elif verb == "unheld":
            self._refuse(UnheldError.of(as_reasons(given)))
        else:
            raise ValueError(verb)

    def _hold(self, taken: Iterable[str], failed: Mapping[str, str]) -> None:
        """What it was told to hold its programs by: what of that the kernel has taken, and what not."""
        self._taken += tuple(taken)
        if failed:
            log.warning("the programs of %s are not held by %s", self.home.overlay, in_words(failed))

    def _take(self, verb: str, given: Any) -> None:  # noqa: ANN401
        """Raises ValueError, TypeError or LookupError for what no helper says."""
        if verb == "ended":
            for number, *figures in given:
                self._end(number, self._exit(*figures))
        elif verb == "failed":
            number, *why = given
            self._end(number, Exit(None, failed=as_error(*why)))
        elif verb == "memory":
            number, kib = given
            mb = None if kib is None else as_figure(kib) / 1024
            self._measured.pop(number).set_result(mb)
        elif verb == "using":
            for number, kib in given:
                if (process := self.processes.get(number)) is not None:
                    process.uses(as_figure(kib) / 1024)
        elif self.ready.done():
            raise ValueError(verb)
        else:
            self._take_start(verb, given)

    def _take_start(self, verb: str, given: Any) -> None:  # noqa: ANN401
        if verb == "ready":
            ready = Ready(tuple(map(as_words, given["loaded"])), as_reasons(given["left"]))
            self.floor_mb = round(as_figure(given["floor_kib"]) / 1024, 3)
            late, failed = self._wired is not None and self._wired["late"], as_reasons(given["failed"])
            self._hold((LATE,) if late and not failed else (), failed)
            self.idle_since = time.monotonic()
            self.ready.set_result(ready)
        elif verb == "unheld":
            self._refuse(UnheldError.of(as_reasons(given)))
        elif self.script is None:
            raise ValueError(verb)
        elif verb == "unfit":
            self._refuse(AnotherWayError("unfit", as_words(given)))
        elif verb == "unclean":
            self._refuse(AnotherWayError("unclean", as_reasons(given)))
        elif verb == "not_started":
            self._refuse(as_error(*given))
        else:
            raise ValueError(verb)

    def _exit(self, status: int, cpu_ms: float, peak_kib: int, lost: str | None) -> Exit:
        peak_mb = round(as_figure(peak_kib) / 1024, 3)
        floor_mb = min(peak_mb, self.floor_mb)
        why = None if lost is None else as_words(lost)
        return Exit(os.waitstatus_to_exitcode(status), as_figure(cpu_ms), peak_mb, floor_mb, why)

    def _end(self, number: int, exit_: Exit) -> None:
        """Raises KeyError where there is no such process."""
        process = self.processes.pop(number)
        if process.cgroup is not None:
            exit_ = _with_excess(exit_, process.cgroup)
            self._let_go(process.cgroup)
        process.ended.set_result(exit_)
        if not self.processes:
            self.idle_since = time.monotonic()
            self._keeper.rests(self)
            if self._cgroups is not None:
                self._loop.call_soon(self._offer_place)


def _with_excess(exit_: Exit, cgroup: Cgroup) -> Exit:
    """With the figure, where the kernel has ended it at its limit.

    Then that is why, and not what its helper has found afterwards, such as too much in scratch.
    """
    kib = cgroup.excess_kib()
    return exit_ if kib is None else replace(exit_, peak_mb=round(kib / KIB, 3), lost=None, at_limit=True)


def _is_for_the_loader(name: str) -> bool:
    """Whether a variable can have a program load code (ld.so(8), iconv(1)), as one that is under no rights yet."""
    return name.startswith("LD_") or name in {"GCONV_PATH", "GLIBC_TUNABLES", "LOCPATH"}


def _clear(mark: str, orphans: bool, scratch: str | None) -> None:
    """Kill the programs that carry the mark, and remove their scratch folders. It blocks. Raises OSError."""
    if orphans:
        strays.end(mark)
    if scratch is not None:
        remove_tree(scratch)
