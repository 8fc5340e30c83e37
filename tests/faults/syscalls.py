"""Each system call of a writer on the ledger's files, made to fail, to fail for good, or to be the last, by strace(1).

A first run is only watched: it tells which system calls there are, and how often. Then there is a run for each of them,
each occurrence and each way to fail. strace counts occurrences for each thread by itself, so a fault may come twice in
one run, once in each of two threads; all that is held then, too.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from bus.ledger import Fsync
from tests.faults import facts, scenario
from tests.faults.children import HANG_S, HUNG, Child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

_CHANGING = ("write", "fdatasync", "fsync", "ftruncate", "mkdir", "mkdirat", "rename", "renameat", "renameat2")
_INTERRUPTIBLE = frozenset({
    "openat", "read", "pread64", "write", "pwrite64", "fdatasync", "fsync", "ftruncate", "flock", "getdents64"
})  # fmt: skip
"""Those that are made again by whoever made them."""

_OTHERS = ("openat", "unlink", "unlinkat", "read", "pread64", "pwrite64", "lseek", "flock", "getdents64")
_LOOKS = ("stat", "lstat", "fstat", "newfstatat", "statx")
_SYNCS = ("io_setup", "io_submit", "io_getevents", "io_destroy")
TRACED = (*_CHANGING, *_OTHERS, *_LOOKS, *_SYNCS)
TAKEN_BACK = frozenset({"write", "fdatasync", "io_getevents"})
_NO_SPACE = frozenset({*_CHANGING, "openat", "pwrite64"})
SAMPLED = 15
"""How many kinds of fault (which system call, in which way) a sample takes of each setting."""

_OPENING = re.compile(r"^(\d+) +(\w+)\((.*)")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a fault is put."""

    beginning: str
    fsync: Fsync

    def __str__(self) -> str:
        return f"{self.beginning}, AAL_FSYNC={self.fsync}"


@dataclass(frozen=True, slots=True)
class Fault:
    """The `number`th `syscall` of a thread: `what` is an error's name, or `KILL`; `lasting` is all from there on.

    `then` is what becomes of every ftruncate(2), by which a writer takes back what failed: None where it works.
    """

    setting: Setting
    syscall: str
    number: int
    what: str
    lasting: bool = False
    then: str | None = None

    def __str__(self) -> str:
        then = f", then ftruncate {self.then}" if self.then else ""
        return f"{self.setting}: {self.syscall} {self.number}{'+' if self.lasting else ''} {self.what}{then}"

    @property
    def injections(self) -> list[str]:
        """As options of strace."""
        first = f"inject={self.syscall}:{_how(self.what)}:when={self.number}{'+' if self.lasting else ''}"
        return ["-e", first, *(["-e", f"inject=ftruncate:{_how(self.then)}"] if self.then else [])]

    @property
    def kind(self) -> tuple[str, str, bool, str | None]:
        return self.syscall, self.what, self.lasting, self.then


def _how(what: str) -> str:
    return "signal=KILL" if what == "KILL" else f"error={what}"


SETTINGS = tuple(Setting(beginning, fsync) for beginning in scenario.BEGINNINGS for fsync in get_args(Fsync))


def lacking() -> str | None:
    """Why this cannot be done here; None where it can."""
    if shutil.which("strace") is None:
        return "there is no strace"
    with Child(lambda _: None) as child:
        try:
            with strace(child, ["-e", "trace=read"]):
                child.go()
                child.lines()
        except PermissionError as error:
            return str(error)
    return None


def play(rng: Random | None) -> Iterator[list[str]]:
    """For each fault that is drawn, what is wrong after a run with it."""
    for fault in draw(rng):
        yield [f"{fault}: {wrong}" for wrong in run(fault)]


def draw(rng: Random | None) -> Iterator[Fault]:
    """Every fault there is; with `rng` a sample for each setting, of as many kinds."""
    for setting in SETTINGS:
        every = list(_faults(setting))
        if rng is None:
            yield from every
            continue
        by_kind: dict[tuple[str, str, bool, str | None], list[Fault]] = {}
        for fault in every:
            by_kind.setdefault(fault.kind, []).append(fault)
        kinds = list(by_kind.values())
        yield from (rng.choice(faults) for faults in rng.sample(kinds, min(SAMPLED, len(kinds))))


def faults_at(place: Callable[..., Fault], syscall: str) -> Iterator[Fault]:
    """The ways to fail that a system call has; `place` is where."""
    yield place("KILL")
    yield place("EIO")
    yield place("EIO", lasting=True)
    if syscall in TAKEN_BACK:
        yield place("EIO", then="EIO")
        yield place("EIO", then="KILL")
    if syscall in _NO_SPACE:
        yield place("ENOSPC")
        yield place("ENOSPC", lasting=True)
    if syscall in _INTERRUPTIBLE:
        yield place("EINTR")


def _faults(setting: Setting) -> Iterator[Fault]:
    for syscall, numbers in _occurrences(setting).items():
        for number in sorted(numbers):
            yield from faults_at(functools.partial(Fault, setting, syscall, number), syscall)


def _occurrences(setting: Setting) -> dict[str, set[int]]:
    """Each system call on the ledger's files, with its numbers among those of its thread."""
    with _writer(setting) as (path, _, child), tempfile.NamedTemporaryFile() as trace:
        with strace(child, ["-y", "-o", trace.name, "-e", f"trace={_names(TRACED)}"]):
            child.go()
            said = child.lines()
        if child.status != 0:
            raise RuntimeError(f"a writer to which nothing was done ended with {child.status}: {said}")
        text = Path(trace.name).read_text(errors="replace")
        return numbers(text, str(path.parent.parent))


def numbers(trace: str, folder: str) -> dict[str, set[int]]:
    """Of each system call on a file in `folder`, or on none by name, which one of its thread it was."""
    seen: Counter[tuple[str, str]] = Counter()
    found: dict[str, set[int]] = {}
    for line in trace.splitlines():
        if (opening := _OPENING.match(line)) is None:
            continue
        thread, syscall, rest = opening.groups()
        seen[thread, syscall] += 1
        if folder in rest or syscall in _SYNCS:
            found.setdefault(syscall, set()).add(seen[thread, syscall])
    return found


def run(fault: Fault) -> Iterator[str]:
    """What is wrong after a run with it."""
    with _writer(fault.setting) as (path, before, child):
        trace = f"trace={fault.syscall},ftruncate"
        with strace(child, ["-o", "/dev/null", "-e", trace, *fault.injections]):
            child.go()
            said = child.lines()
        refused = [line for line in said if line.startswith("refused ")]
        if said[-1:] == [HUNG]:
            yield "the writer hangs"
        elif "KILL" not in {fault.what, fault.then} and child.status != 0:
            yield f"the writer ended with {child.status}: {' '.join(said[-1:])}"
        if fault.what == "EINTR" and refused:
            yield f"a call that was interrupted is not made again: {', '.join(refused)}"
        yield from facts.after_reopening(path, [*before, *facts.stands(said)], scenario.notary(path))


@contextlib.contextmanager
def _writer(setting: Setting) -> Iterator[tuple[Path, list[str], Child]]:
    """In a folder of its own: the ledger, what was said of its beginning, and a writer that waits to go."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path = Path(folder) / "logs" / "provenance.jsonl"
        before = scenario.prepare(path, setting.beginning)
        size = scenario.ROTATING_BYTES if setting.beginning == "rotating" else 0
        with Child(functools.partial(scenario.every_way, path, setting.fsync, segment_bytes=size)) as child:
            yield path, before, child


@contextlib.contextmanager
def strace(child: Child, options: list[str]) -> Iterator[None]:
    """Have strace on a child, from now until that ends. Raises `PermissionError` where it may not."""
    command = ["strace", "-f", *options, "-p", str(child.pid)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        attached = strace.stderr.readline()
        if "attached" not in attached:
            strace.kill()
            raise PermissionError(f"strace may not watch here: {attached.strip()}")
        try:
            yield
            strace.communicate(timeout=HANG_S)
        finally:
            strace.kill()


def _names(syscalls: tuple[str, ...]) -> str:
    """Some are of other machines only."""
    return ",".join(f"?{syscall}" for syscall in syscalls)
