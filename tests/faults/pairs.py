"""Two processes on one ledger, while system calls of the one fail, or are its last, by strace(1).

They take turns, so that each fault is met by a writer that knows the ledger from before it; or the other appends all
the while until it is killed, so that lines of it stand behind what could not be synced or has to be cut off; or one of
them only signs, with the same key. The other is never refused: nothing is wrong with its own system calls.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from bus.ledger import Fsync
from tests.faults import facts, scenario, syscalls
from tests.faults.children import HUNG, Child
from tests.faults.scenario import Turn
from tests.faults.syscalls import Fault, Setting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from tests.faults.children import Say

TRACED = ("write", "pwrite64", "fdatasync", "fsync", "ftruncate", "rename", "flock", "io_submit", "io_getevents")
SAMPLED = 10
"""How many faults a sample takes of each setting."""

SETTINGS = tuple(Setting(beginning, fsync) for beginning in ("new", "torn", "rotating") for fsync in get_args(Fsync))


class Beside(Enum):
    """What the two do: the faulty one, and the other."""

    TURNS = "in turns with another"
    CROWD = "beside another"
    SIGNER = "beside one that signs"
    SIGNING = "signing beside another"


class _Pair(NamedTuple):
    path: Path
    before: list[str]
    faulty: Child
    other: Child
    beside: Beside


class _Baton:
    """Two pipes. Each writer waits for its turn and gives it on; with the other gone it is always its turn.

    By readv(2) and writev(2), as a child speaks.
    """

    def __init__(self) -> None:
        self._ends = [os.pipe(), os.pipe()]

    def taken_by(self, which: int) -> Turn:
        """In one of the writers, 0 or 1."""
        mine, others = self._ends[which][0], self._ends[1 - which][1]
        os.close(self._ends[which][1])
        os.close(self._ends[1 - which][0])

        def end() -> None:
            with contextlib.suppress(BrokenPipeError):
                os.writev(others, [b"t"])

        return Turn(lambda: _ignored(os.readv(mine, [bytearray(1)])), end)

    def throw(self) -> None:
        """In who forked the writers, once it has. The first writer has the first turn."""
        os.writev(self._ends[0][1], [b"t"])
        for end in (end for ends in self._ends for end in ends):
            os.close(end)


def _ignored(_: object = None) -> None:
    return


def play(rng: Random | None) -> Iterator[list[str]]:
    """For each fault that is drawn, what is wrong after a run with it."""
    for setting in SETTINGS:
        faults = [(fault, beside) for beside in Beside for fault in _faults(setting, beside)]
        for fault, beside in faults if rng is None else rng.sample(faults, min(SAMPLED, len(faults))):
            yield [f"{fault}, {beside.value}: {wrong}" for wrong in run(fault, beside)]


def _faults(setting: Setting, beside: Beside) -> Iterator[Fault]:
    for syscall, numbers in _occurrences(setting, signs=beside is Beside.SIGNING).items():
        for number in sorted(numbers):
            yield from syscalls.faults_at(functools.partial(Fault, setting, syscall, number), syscall)


@functools.cache
def _occurrences(setting: Setting, *, signs: bool) -> dict[str, set[int]]:
    """The system calls of the one process on the ledger's files, each with its numbers among those of its thread."""
    beside = Beside.SIGNING if signs else Beside.TURNS
    with _pair(setting, beside) as pair, tempfile.NamedTemporaryFile() as trace:
        names = ",".join(f"?{name}" for name in TRACED)
        with syscalls.strace(pair.faulty, ["-y", "-o", trace.name, "-e", f"trace={names}"]):
            said = _go(pair)
        if (pair.faulty.status, pair.other.status) != (0, _end_of_other(beside)):
            raise RuntimeError(f"two processes to which nothing was done said {said}")
        return syscalls.numbers(Path(trace.name).read_text(errors="replace"), str(pair.path.parent.parent))


def _end_of_other(beside: Beside) -> int:
    """Its exit status: it is killed where it would not end."""
    return 0 if beside is Beside.TURNS else -signal.SIGKILL


def run(fault: Fault, beside: Beside) -> Iterator[str]:
    """What is wrong after a run with it."""
    with _pair(fault.setting, beside) as pair:
        trace = f"trace={fault.syscall},ftruncate"
        with syscalls.strace(pair.faulty, ["-o", "/dev/null", "-e", trace, *fault.injections]):
            said, others = _go(pair)
        if "KILL" not in {fault.what, fault.then} and pair.faulty.status != 0:
            yield f"the faulty one ended with {pair.faulty.status}: {' '.join(said[-1:])}"
        if pair.other.status != _end_of_other(beside):
            yield f"the other one ended with {pair.other.status}: {' '.join(others[-1:])}"
        if HUNG in {*said[-1:], *others[-1:]}:
            yield "one of them hangs"
        if refused := _refusals(others):
            yield f"the other one is told {refused}"
        if fault.what == "EINTR" and (refused := _refusals(said)):
            yield f"a call that was interrupted is not made again: {refused}"
        said = [*pair.before, *said, *others]
        yield from facts.after_reopening(pair.path, facts.stands(said) + facts.noted(said), scenario.notary(pair.path))


def _refusals(said: list[str]) -> str:
    return ", ".join(line for line in said if line.startswith("refused "))


def _go(pair: _Pair) -> tuple[list[str], list[str]]:
    """What both have said by their ends."""
    pair.other.go()
    if pair.beside is not Beside.TURNS:
        pair.other.first_line()
    pair.faulty.go()
    said = pair.faulty.lines()
    return said, pair.other.lines() if pair.beside is Beside.TURNS else pair.other.kill()


@contextlib.contextmanager
def _pair(setting: Setting, beside: Beside) -> Iterator[_Pair]:
    """In a folder of its own: the ledger, what was said of its beginning, and two processes that wait to go."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path = Path(folder) / "logs" / "provenance.jsonl"
        before = scenario.prepare(path, setting.beginning)
        size = scenario.ROTATING_BYTES if setting.beginning == "rotating" else 0
        baton = _Baton()

        def faulty(say: Say) -> None:
            if beside is Beside.SIGNING:
                scenario.sign(path, say, times=scenario.SIGNATURES)
                return
            turn = baton.taken_by(0) if beside is Beside.TURNS else Turn(_ignored, _ignored)
            scenario.in_turns(path, setting.fsync, "faulty", turn, say, segment_bytes=size)

        def other(say: Say) -> None:
            if beside is Beside.TURNS:
                scenario.in_turns(path, setting.fsync, "other", baton.taken_by(1), say, segment_bytes=size)
            elif beside is Beside.SIGNER:
                scenario.sign(path, say)
            else:
                scenario.crowd(path, setting.fsync, "other", say)

        with Child(faulty) as one, Child(other) as two:
            baton.throw()
            yield _Pair(path, before, one, two, beside)
