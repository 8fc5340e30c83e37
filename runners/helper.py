"""One helper, as the bus sees it: the process that starts an overlay's programs, reaps and kills them.

The bus itself is big, threaded and busy, so it starts nothing but `launch.py`, with its own interpreter. That process
contains all the rest (`containment.py`), says so, and only then becomes what starts programs (`launcher.py`): in mode
fork under the overlay's own interpreter, which need not be one. So the first message is believed, and none after it:
a helper that says what no helper says is ended. It harms its own overlay's calls at most.

A helper that ends takes its processes with it. They end with `Exit.lost`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson

from runners import strays
from runners.output import Log, Output, describe
from runners.wire import Wire, message

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping, Sequence

    from runners.base import Rights

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

WORDS = 500
"""Characters that are kept of a reason that a helper gives."""

BY_SIGNAL = 128
SIGNALLED = range(BY_SIGNAL + 1, BY_SIGNAL + signal.SIGRTMAX + 1)
"""The process outside says this + the signal that ended the one inside, as shells do."""

INTERPRETER = (sys.executable, "-I", "-S")
"""What a helper is started with: the bus's own interpreter, without site-packages."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a process belongs. Processes with equal homes are started by the same helper, with the same rights.

    `edition` grows with each change of the overlay (`Job.edition`). A helper stands in the folder that it was started
    in, even if another has taken its place since.
    """

    overlay: str
    phase: str
    rights: Rights
    folder: Path = field(compare=False)
    env: Mapping[str, str] = field(compare=False)
    edition: int = 0


@dataclass(frozen=True, slots=True)
class Script:
    """A Python script that is forked for calls: the interpreter with its options, and `run.py` or `-m`, `module`."""

    interpreter: tuple[str, ...]
    arguments: tuple[str, ...]
    preload: tuple[str, ...] = ()
    stdin: Literal["file", "pipe"] = "file"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended.

    `code` is negative for a signal, as in `subprocess`; None where nobody can tell. `failed` says why it did not start
    at all. `lost` says what ended it from outside, where that was its helper's doing.
    """

    code: int | None
    cpu_ms: float | None = None
    peak_mb: float | None = None
    peak_floor_mb: float | None = None
    """The helper's own size, below which the kernel puts no peak."""
    lost: str | None = None
    failed: OSError | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """What a helper says of itself once programs can be given to it: modules loaded, and left to the calls and why."""

    loaded: tuple[str, ...]
    left: Mapping[str, str]


class Process:
    """A program that was started, leader of its own session and group, until nothing of it is left.

    `ended` holds its exit once it was reaped and all that it had started is gone. It never fails, nor is it cancelled.
    """

    def __init__(self, number: int, helper: Helper, loop: asyncio.AbstractEventLoop) -> None:
        self.ended: asyncio.Future[Exit] = loop.create_future()
        self._number = number
        self._helper = helper

    @property
    def helper_pid(self) -> int:
        """The process that everything of this one's overlay and phase is below, as this process sees it."""
        return self._helper.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its group. KILL ends also what left the group. Nothing happens once it has ended."""
        if not self.ended.done():
            self._helper.signal(self._number, number)

    async def memory_mb(self) -> float | None:
        """What it has of memory now with all that it started, in MiB; None once it has ended.

        Of one process that is its resident memory, of several the sum of their shares (Pss of proc(5)).
        """
        return None if self.ended.done() else await self._helper.measure(self._number)


class AnotherWayError(Exception):
    """Instead of being ready a helper told that it has to be started another way.

    `no_namespace`: without a pid namespace. `unfit`: its script cannot be forked. `unclean`: without these modules.
    `given` says why: of a namespace by the kernel's error, of modules by their names.
    """

    def __init__(
        self, verb: Literal["no_namespace", "unfit", "unclean"], given: OSError | str | dict[str, str]
    ) -> None:
        super().__init__(f"{verb}: {given}")
        self.verb = verb
        self.given = given


class GoneError(OSError):
    """The helper ended before it could be given a program. Nothing was started: ask its pool for another helper."""

    def __init__(self) -> None:
        super().__init__(errno.ESRCH, "the helper has ended")


class Keeper(Protocol):
    """Who keeps a helper, and hears how it does."""

    def rests(self, helper: Helper) -> None:
        """It has no process any more."""

    def leaves(self, helper: Helper) -> None:
        """It takes no programs any more."""


class Helper:
    """One helper, from its start until nothing of it is left; then `gone` is done.

    `ready` fails with `AnotherWayError`, or OSError where it cannot be had. `namespace` says whether it is contained by
    a pid namespace; None until it said so.
    """

    def __init__(
        self, home: Home, script: Script | None, keeper: Keeper, *, mark: str, namespace: bool, skip: Iterable[str] = ()
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
        self._floor_mb = 0.0
        self._fault: str | None = None
        self._numbers = itertools.count(1)
        self._measured: dict[int, asyncio.Future[float | None]] = {}
        self._pidfds: set[int] = set()
        self._wire = Wire(loop, self._receive, self._cut_off)
        try:
            with self._wire.theirs as theirs:
                self._wire.send(message("begin", _config(script, namespace, skip)))
                self._popen, self._outside, said = self._begin(theirs)
        except BaseException:
            self._wire.close()
            raise
        self._said = Output(loop, said, self.log.add)
        late = loop.call_later(START_S, self._give_up)
        self.ready.add_done_callback(lambda _: late.cancel())

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_idle(self) -> bool:
        return not self.processes and self.is_open and self.ready.done()

    @property
    def is_open(self) -> bool:
        """Whether programs can be given to it, as far as is known."""
        return self._wire.is_open

    def _begin(self, theirs: socket.socket) -> tuple[subprocess.Popen[bytes], int, int]:
        """The process, its pidfd, which is watched, and our end of the pipe for what it says.

        Its stdin is of the kind that a call gets, since Python looks at that once, at its start.
        """
        said, says = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(says, True)
        stdin = -1
        try:
            stdin = self._empty_stdin()
            popen = subprocess.Popen(
                [*INTERPRETER, str(LAUNCH), str(theirs.fileno()), self._mark],
                stdin=stdin,
                stdout=says,
                stderr=says,
                cwd=self.home.folder,
                env={**self.home.env, strays.MARK: f"{self._mark}-0"},  # of no call, as they begin with 1
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            try:
                pidfd = os.pidfd_open(popen.pid)
            except OSError:
                popen.kill()
                popen.wait()
                raise
        except BaseException:
            os.close(said)
            raise
        finally:
            os.close(says)
            if stdin >= 0:
                os.close(stdin)
        self._watch(pidfd)
        return popen, pidfd, said

    def _empty_stdin(self) -> int:
        if self.script is None or self.script.stdin == "file":
            return os.memfd_create("nothing", os.MFD_CLOEXEC)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.close(writer)
        return reader

    # Programs

    def launch(self, argv: Sequence[str], fds: tuple[int, int, int], env: Mapping[str, str]) -> Process:
        """Have a program started: `Process.ended` tells if it could not be.

        Raises OSError where the command is too long, `GoneError` where the helper has ended.
        """
        number = next(self._numbers)
        given = argv if self.script is None else argv[len(self.script.interpreter) :]  # which the helper is itself
        run = message("run", (number, list(given), dict(env)))
        if not self.is_open:
            raise GoneError
        try:
            self._wire.send(run, fds)
        except (BrokenPipeError, ConnectionResetError):
            self._receive_last()
            self.close()  # it may only have closed its ears
            raise GoneError from None
        process = self.processes[number] = Process(number, self, self._loop)
        return process

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
            self._popen.send_signal(signal.SIGTERM)
            self._popen.send_signal(signal.SIGCONT)
            self._loop.call_later(GONE_S if within_s is None else within_s, self._signal_both, signal.SIGKILL)

    def _signal_both(self, signal_number: int) -> None:
        """To the process that the bus started, and to the one that does its work."""
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal_number)

    def _give_up(self) -> None:
        self._refuse(OSError(errno.EBUSY, f"its helper was not ready within {START_S:g} s"))

    def _refuse(self, error: OSError | AnotherWayError) -> None:
        """It is not to be used. Nothing more of what it says is read."""
        if not self.ready.done():
            self.ready.set_exception(error)
        self.close()
        self.kill()

    def _watch(self, pidfd: int) -> None:
        self._pidfds.add(pidfd)
        self._loop.add_reader(pidfd, partial(self._exited, pidfd))

    def _exited(self, pidfd: int) -> None:
        """Of the process outside, or of the one inside. With the last, everything is gone."""
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        self._pidfds.discard(pidfd)
        self._receive_last()
        self.close()
        if not self._pidfds:
            self._settle()
        elif pidfd == self._outside:
            self._end_inside()

    def _end_inside(self) -> None:
        """The process inside may have renounced the signal of its parent's death.

        Without a namespace it is left a while to end what it started, as nobody else knows that.
        """
        if self.namespace:
            self._signal_both(signal.SIGKILL)
        else:
            self._loop.call_later(GONE_S, self._signal_both, signal.SIGKILL)

    def _settle(self) -> None:
        """Where no namespace held them and the process outside was killed, programs may have lost all their parents.

        A bus that ignores SIGCHLD is told no status: to `Popen` all of them are 0.
        """
        in_order = self._popen.wait() >= 0 and signal.getsignal(signal.SIGCHLD) != signal.SIG_IGN
        if in_order or self.namespace is not False:
            self._finish()
        else:
            self._loop.run_in_executor(None, strays.end, self._mark).add_done_callback(self._swept)

    def _swept(self, sweep: asyncio.Future[None]) -> None:
        if not sweep.cancelled() and (error := sweep.exception()) is not None:
            log.error("programs of %s may be left: %s", self.home.overlay, error)
        self._finish()

    def _finish(self) -> None:
        self._said.drain()
        lost = f"the helper that ran it {self._fault or _end_of(self._popen.returncode)}"
        if not self.ready.done():
            said = self.log.kept().decode("utf-8", "replace").strip()
            self.ready.set_exception(OSError(errno.ECHILD, f"{lost} before it was ready: {said}"))
        if not self.ready.cancelled():
            self.ready.exception()  # seen, whether or not somebody waits for it
        for future in self._measured.values():
            future.set_result(None)
        for number in list(self.processes):
            self._end(number, Exit(None, lost=lost))
        self.gone.set_result(None)

    # What it says

    def _receive(self) -> bool:
        """Take one message. False where none is there."""
        try:
            words, fds = self._wire.receive(with_fd=self.namespace is None)
        except BlockingIOError:
            return False
        if not words:
            self.close()
            return False
        try:
            verb, given = orjson.loads(words)
            if self.namespace is None:
                self._take_first(verb, given, fds)
            else:
                self._take(verb, given)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            log.warning("the helper of %s said what cannot be: %.*s", self.home.overlay, WORDS, error)
            self._fault = "said what cannot be, and was ended"
            self._refuse(OSError(errno.EPROTO, f"its helper {self._fault}"))
        return True

    def _receive_last(self) -> None:
        """Take what it said before it ended."""
        for _ in range(LAST_MESSAGES):
            if not (self.is_open and self._receive()):
                break

    def _take_first(self, verb: str, given: Any, fds: Sequence[int]) -> None:  # noqa: ANN401
        """The only message that can be relied on, and the only one with a descriptor: a pidfd of the process inside."""
        if verb == "contained":
            self.namespace = given["namespace"]
            for pidfd in fds:
                self._watch(pidfd)
            if not fds:  # the kernel passes as many as this process may have open (unix(7), MSG_CTRUNC)
                self._refuse(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        elif verb == "no_namespace":
            self._refuse(AnotherWayError("no_namespace", _os_error(*given)))
        elif verb == "not_started":
            self._refuse(_os_error(*given))
        else:
            raise ValueError(verb)

    def _take(self, verb: str, given: Any) -> None:  # noqa: ANN401
        """Raises ValueError, TypeError or LookupError for what no helper says."""
        if verb == "ended":
            for number, *figures in given:
                self._end(number, self._exit(*figures))
        elif verb == "failed":
            number, *why = given
            self._end(number, Exit(None, failed=_os_error(*why)))
        elif verb == "memory":
            number, kib = given
            mb = None if kib is None else _figure(kib) / 1024
            self._measured.pop(number).set_result(mb)
        elif self.ready.done():
            raise ValueError(verb)
        else:
            self._take_start(verb, given)

    def _take_start(self, verb: str, given: Any) -> None:  # noqa: ANN401
        if verb == "ready":
            ready = Ready(tuple(map(_words, given["loaded"])), _reasons(given["left"]))
            self._floor_mb = round(_figure(given["floor_kib"]) / 1024, 3)
            self.idle_since = time.monotonic()
            self.ready.set_result(ready)
        elif self.script is None:
            raise ValueError(verb)
        elif verb == "unfit":
            self._refuse(AnotherWayError("unfit", _words(given)))
        elif verb == "unclean":
            self._refuse(AnotherWayError("unclean", _reasons(given)))
        elif verb == "not_started":
            self._refuse(_os_error(*given))
        else:
            raise ValueError(verb)

    def _exit(self, status: int, cpu_ms: float, peak_kib: int, lost: str | None) -> Exit:
        peak_mb = round(_figure(peak_kib) / 1024, 3)
        floor_mb = min(peak_mb, self._floor_mb)
        why = None if lost is None else _words(lost)
        return Exit(os.waitstatus_to_exitcode(status), _figure(cpu_ms), peak_mb, floor_mb, why)

    def _end(self, number: int, exit_: Exit) -> None:
        """Raises KeyError where there is no such process."""
        self.processes.pop(number).ended.set_result(exit_)
        if not self.processes:
            self.idle_since = time.monotonic()
            self._keeper.rests(self)


def _config(script: Script | None, namespace: bool, skip: Iterable[str]) -> dict[str, Any]:
    """What a helper is told first, as `launcher.py` explains it."""
    return {
        "bus": os.getpid(),
        "namespace": namespace,
        "interpreter": None if script is None else script.interpreter,
        "arguments": None if script is None else script.arguments,
        "preload": () if script is None else script.preload,
        "skip": list(skip),
        "ahead": AHEAD_AFTER,
    }


def _figure(value: Any) -> float:  # noqa: ANN401
    """A number of something. Raises TypeError or ValueError where it is none."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(value)
    return float(value)


def _words(value: Any) -> str:  # noqa: ANN401
    """The beginning of a text. Raises TypeError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value[:WORDS]


def _reasons(value: Any) -> dict[str, str]:  # noqa: ANN401
    """Why, by the names of modules. Raises TypeError where it is not that."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return {_words(name): _words(why) for name, why in value.items()}


def _os_error(number: Any, words: Any) -> OSError:  # noqa: ANN401
    """Raises TypeError for what is no error."""
    if not isinstance(number, int | None):
        raise TypeError(f"{number!r} is no number of an error")
    return OSError(number or errno.EINVAL, _words(words))


def _end_of(code: int) -> str:
    """Of `Popen.returncode`."""
    return describe(BY_SIGNAL - code if code in SIGNALLED else code)
