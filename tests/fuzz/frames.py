"""What a helper says to the bus, byte by byte: `Helper` at one end of a real socket, a hostile one at the other.

After its first message a helper may have loaded an overlay's libraries, so nothing that it says is believed. Whatever
comes: no exception leaves the reader, a helper that says what no helper says is ended, each of its programs gets its
exit, who waits is told, and no descriptor is left behind. `fuzz_frames.py` runs the same cases under atheris.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import orjson
from hypothesis import strategies as st

from runners import helper as helpers
from runners.base import Rights
from runners.contained import Contained
from runners.helper import Helper
from runners.helper_errors import AnotherWayError
from runners.processes import Home, Script
from tests.fuzz.campaign import Probe, Target
from tests.fuzz.samples import damaged_bytes, scalars, to_bytes, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy

    from runners.processes import Process

PROGRAMS = 3
"""The programs that run when the helper begins to say odd things: the numbers 1 to 3."""

GONE_S = 5.0
"""How long what has ended may take to be known as such."""


class Frames(NamedTuple):
    """What a helper says, one message after the other. The first that is sent with `pidfd` carries a descriptor."""

    messages: tuple[bytes, ...]
    scripted: bool
    pidfd: bool


class _FakePopen:
    """A process that has ended well, and hears no signal."""

    pid = os.getpid()
    returncode = 0

    def wait(self, timeout: float | None = None) -> int:
        return 0

    def send_signal(self, number: int) -> None:
        """It has ended."""


class _FakeContained(Contained):
    """Two processes that are none: pipes stand for their pidfds, and end when they are told to."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, _: Sequence[str], exited: Callable[[bool], object], **given: Any
    ) -> None:
        self.theirs = socket.socket(fileno=os.dup(given["channel"]))
        self._loop = loop
        self._tell = exited
        self._pidfds = set()
        self._popen = _FakePopen()  # type: ignore[assignment]  # as much of one as is used
        self._outside, self._outside_ends = os.pipe2(os.O_CLOEXEC)
        self.said, says = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(says)
        self.watch(self._outside)

    def kill(self) -> None:
        """It does not hear: `end` is what ends it."""

    def end(self) -> None:
        os.close(self._outside_ends)


class _Keeper:
    """Hears of the helper, and keeps nothing."""

    def rests(self, helper: Helper) -> None: ...

    def leaves(self, helper: Helper) -> None: ...


class Bench:
    """A loop in which one helper after the other is spoken to."""

    def __init__(self, loop: asyncio.Runner) -> None:
        self._loop = loop
        self._faults: list[Mapping[str, Any]] = []
        loop.get_loop().set_exception_handler(lambda _, context: self._faults.append(context))

    def speak(self, frames: Frames) -> str:
        """Say all that to a helper, and end it. What became of it: `refused`, `ended`, `unready` or `ready`."""
        held = _descriptors()
        try:
            outcome = self._loop.run(_speak(frames))
        finally:
            if self._faults:
                raise AssertionError("an exception left the reader") from self._faults.pop().get("exception")
        assert _descriptors() == held, "a descriptor is left open"
        return outcome


async def _speak(frames: Frames) -> str:
    script = Script(("python3",), ("run.py",)) if frames.scripted else None
    home = Home("echo", "OPEN", Rights(), Path("/"), {})
    with mock.patch.object(helpers, "Contained", _FakeContained):
        helper = Helper(home, script, _Keeper(), mark="fuzz", namespace=True)
    contained = helper._contained  # the fake
    assert isinstance(contained, _FakeContained)
    processes = [helper.launch(["program", "x"], (0, 1, 2), {}) for _ in range(PROGRAMS)]
    measured = [asyncio.ensure_future(process.memory_mb()) for process in processes]
    await asyncio.sleep(0)
    with contained.theirs as theirs:
        _say(theirs, frames, helper)
    outcome = _state(helper)
    helper.close()
    contained.end()
    async with asyncio.timeout(GONE_S):
        await helper.gone
        await asyncio.gather(*measured)
    _all_told(helper, processes)
    return outcome


def _say(theirs: socket.socket, frames: Frames, helper: Helper) -> None:
    """Each message, which the bus takes at once, as far as it still listens."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.close(writer)  # the pidfd of a process inside that has ended
    try:
        for number, message in enumerate(frames.messages):
            rights = [reader] if frames.pidfd and number == 0 else []
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(theirs, [message], rights)
            if not (helper.is_open and helper._receive()):  # as the event loop calls it
                break
    finally:
        os.close(reader)


def _state(helper: Helper) -> str:
    if not helper.ready.done():
        return "unready" if helper.is_open else "ended"
    return "refused" if helper.ready.exception() else "ready"


def _all_told(helper: Helper, processes: Sequence[Process]) -> None:
    assert helper.processes == {}
    assert helper.ready.done()
    error = helper.ready.exception()
    assert error is None or isinstance(error, OSError | AnotherWayError), error
    for process in processes:
        orjson.dumps([process.ended.result().code, process.ended.result().lost, process.ended.result().cpu_ms])


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names are enough


_numbers = st.integers(0, PROGRAMS + 1) | st.integers(1, PROGRAMS) | scalars
_figures = st.integers(0, 10_000) | st.floats(0, 100) | scalars
_words = st.sampled_from(("No such file", "", "x" * 600, "lost")) | st.text(max_size=10) | scalars
_names = st.lists(_words, max_size=3) | values
_whys = st.dictionaries(st.text(max_size=5), _words, max_size=2) | values
_statuses = st.sampled_from((0, 256, 9, 139, 0x7F, -1, 2**31, 2**64)) | scalars
_exits = st.tuples(_numbers, _statuses, _figures, _figures, st.none() | _words) | st.lists(scalars, max_size=6)
_ABOUT: Mapping[str, SearchStrategy[Any]] = {
    "ended": st.lists(_exits, max_size=4) | values,
    "failed": st.tuples(_numbers, st.integers(1, 140) | scalars, _words),
    "memory": st.tuples(_numbers, st.none() | _figures),
    "ready": st.fixed_dictionaries({"floor_kib": _figures, "loaded": _names, "left": _whys, "failed": _whys}),
    "contained": st.fixed_dictionaries({"namespace": st.booleans() | scalars, "taken": _names, "failed": _whys}),
    "no_namespace": st.tuples(st.integers(1, 140) | scalars, _words),
    "not_started": st.tuples(st.integers(1, 140) | scalars, _words),
    "unheld": _whys,
    "unfit": _words,
    "unclean": _whys,
}


VERBS = tuple(_ABOUT)


@st.composite
def _said(draw: DrawFn) -> bytes:
    verb = draw(st.sampled_from(VERBS))
    about = draw(_ABOUT[verb] | _ABOUT[draw(st.sampled_from(VERBS))] if draw(st.booleans()) else _ABOUT[verb])
    return to_bytes((verb, about))


CONTAINED = to_bytes(("contained", {"namespace": True, "taken": ["landlock"], "failed": {}}))
READY = to_bytes(("ready", {"floor_kib": 5000, "loaded": ["json"], "left": {"os": "why"}, "failed": {}}))
OPENINGS = ((), (CONTAINED,), (CONTAINED, READY))


@st.composite
def frames(draw: DrawFn) -> Frames:
    """A sound opening, or none, and then what no helper says, or not in this order."""
    odd = _said() | values.map(to_bytes) | damaged_bytes(_said()) | st.binary(min_size=1, max_size=64)
    said = draw(st.lists(odd, max_size=4))
    opening = draw(st.sampled_from(OPENINGS))
    return Frames((*opening, *(message for message in said if message)), draw(st.booleans()), draw(st.booleans()))


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """Without the log's lines: each odd message has one."""
    log = logging.getLogger(helpers.__name__)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with asyncio.Runner() as loop:
            yield Bench(loop)
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def helper_frames() -> Iterator[Probe]:
    with bench() as found:
        yield Probe(frames(), found.speak)


TARGETS = (Target("frames", "what a helper says", 12, helper_frames, frozenset({"ready", "refused", "unready"})),)
