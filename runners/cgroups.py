"""HARD as a limit of the kernel: a cgroup (v2) for each call, where the bus has a part of their tree for itself.

It has where it was delegated (systemd's `Delegate=yes`, a container's own tree), or, as root, where nobody else manages
the tree. A cgroup with processes can give no controller to those below it, so the bus, which must be alone in its own,
goes into one below and takes its helpers along; at its end it goes back. What a bus leaves that was killed, the next
removes: each holds a lock (flock(2)) on the cgroup that it is in, and what belongs to no held lock is nobody's.

    <base>/aal-<16 hex digits>-bus    the bus and its helpers, which have no limit
    <base>/aal-<the same>-<number>    one call, worker or service, with all that it starts

A program enters its cgroup by itself, before anything of it runs: the bus opens `cgroup.procs` and hands it on, and "0"
written there is whoever writes, by the rights of who has opened it, whatever Landlock and namespaces hide.

What counts is what was charged while it was in there: its own pages (not those that a fork shares with its helper),
what it writes to memory (`/dev/shm`, scratch that is memory), the kernel's own for it, and the page cache of files that
it is the first to read. The kernel takes that back before it ends anything. The watcher looks on, as a program that
nothing keeps from writing there (no Landlock, `AAL_SANDBOX=off`) may leave its cgroup.

Entering waits for the kernel, which locks out forks: 5 to 20 ms where nobody has entered a cgroup just before, else 30
microseconds. Sources: cgroups(7), the kernel's cgroup-v2.rst, systemd's CGROUP_DELEGATION.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import logging
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

PROC = Path("/proc")
SYSTEMD = Path("/run/systemd/system")
"""It is there where systemd manages this system (sd_booted(3))."""

DELEGATED = ("user.delegate", "trusted.delegate")
"""The extended attributes by which systemd (since 251, and since 235) says that it leaves a cgroup to who is in it."""

HINT = "Start the bus alone in a cgroup of its own: a systemd unit with Delegate=yes, whose ExecStart= is the bus."

ENDING_S, LOOKS = 0.01, 100
"""Seconds between two tries to remove a cgroup whose processes were killed, and how many there are."""

TIDY_S, TIDY_AT_LAST_S = 0.02, 1.0
"""Seconds from the end of a call to the removal of its cgroup, and the most between two tries."""

_OURS = re.compile(r"(aal-[0-9a-f]{16})-(?:bus|[0-9]+)")
_ESCAPE = re.compile(r"\\([0-7]{3})")
_KIB = 1024


class UnavailableError(Exception):
    """The bus can make no cgroups with a limit of memory; the message says why. `hint` is what to do."""

    def __init__(self, why: str, hint: str = HINT) -> None:
        super().__init__(why)
        self.hint = hint


class Ground(NamedTuple):
    """Where this process may make cgroups, and the cgroup that it is in."""

    base: Path
    own: Path


def find(proc: Path = PROC, systemd: Path = SYSTEMD) -> Ground:
    """Where this process may make cgroups. Nothing is changed. Raises `UnavailableError`."""
    own, root = _own_folder(proc)
    base = _base(own, root)
    if "memory" not in _words(base / "cgroup.controllers"):
        why = f"the memory controller is not to be had in {base}"
        raise UnavailableError(why, "Boot with cgroup_no_v1=all (systemd.unified_cgroup_hierarchy=1), or delegate it.")
    kind = _words(base / "cgroup.type")
    if kind not in ([], ["domain"]):
        raise UnavailableError(f"{base} is a cgroup for threads ({' '.join(kind)})")
    for path in (base, base / "cgroup.procs", base / "cgroup.subtree_control"):
        if not os.access(path, os.W_OK):
            raise UnavailableError(f"{path} cannot be written")
    if systemd.exists() and not _is_delegated(base):
        raise UnavailableError(f"systemd has not delegated {base}")
    return Ground(base, own)


def _own_folder(proc: Path) -> tuple[Path, Path]:
    """The cgroup that this process is in, and the root of the tree as far as it is mounted here."""
    try:
        names = [line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::")]
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError as error:
        raise UnavailableError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not names:
        raise UnavailableError("this process is in no cgroup of v2", "Boot with cgroup_no_v1=all.")
    for root, place in _mounts(mounts):
        if Path(names[0]).is_relative_to(root) and ".." not in Path(names[0]).parts:
            return place / Path(names[0]).relative_to(root), place
    raise UnavailableError(f"the cgroup of this process, {names[0]}, is mounted nowhere")


def _mounts(lines: list[str]) -> Iterator[tuple[str, Path]]:
    """Of each mount of cgroup v2 what of the tree it shows, and where (proc_pid_mountinfo(5))."""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if rest.split(" ", 1)[0] == "cgroup2":
            root, place = (_ESCAPE.sub(lambda found: chr(int(found[1], 8)), text) for text in fields.split(" ")[3:5])
            yield root, Path(place)


def _base(own: Path, root: Path) -> Path:
    """Below which the bus's own cgroups are to be: the one that it is alone in, or the one above that it may have.

    The latter is so with systemd's `DelegateSubgroup=`. The root of all has no limit on what is beside it.
    """
    if _OURS.fullmatch(own.name):
        raise UnavailableError(f"{own} is that of a bus already")
    if _is_root_of_all(own):
        return own
    others = [pid for pid in _words(own / "cgroup.procs") if pid != str(os.getpid())]
    if not others:
        return own
    if own != root and not _words(own.parent / "cgroup.procs") and _is_delegated(own.parent):
        return own.parent
    raise UnavailableError(f"the bus is not alone in its cgroup {own}: {len(others)} other processes are there")


def _is_root_of_all(folder: Path) -> bool:
    """Of the machine's, not only of what a namespace shows."""
    return not (folder / "cgroup.type").exists()


def is_of_bus(folder: str) -> bool:
    """Whether it is where a bus has itself and its helpers, and no call."""
    name = folder.rpartition("/")[2]
    return name.endswith("-bus") and _OURS.fullmatch(name) is not None


def _is_delegated(folder: Path) -> bool:
    for name in DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _words(file: Path) -> list[str]:
    """Those of a file of the kernel; none where it cannot be read."""
    try:
        return file.read_text("ascii").split()
    except OSError:
        return []


class Cgroups:
    """Those of one bus, made as soon as the first helper is to be started. `why_not` says why there are none.

    It is shared: what it made is undone once all who have joined have left.
    """

    def __init__(self, look: Callable[[], Ground] = find) -> None:
        self.why_not: str | None = "no program was started yet"
        self._look = look
        self._mark = f"aal-{secrets.token_hex(8)}"
        self._users = 0
        self._numbers = itertools.count(1)
        self._ground: Ground | None = None
        self._lock = -1
        self._enabled = False
        self._ended: list[str] = []
        self._tidying: asyncio.TimerHandle | None = None

    @property
    def _leaf(self) -> str:
        return "" if self._ground is None else f"{self._ground.base}/{self._mark}-bus"

    def join(self) -> None:
        """One more uses it. With the first this process moves."""
        self._users += 1
        if self._users > 1:
            return
        try:
            self._ground = self._look()
            self._take()
        except UnavailableError as error:
            self.why_not = str(error)
        except OSError as error:
            self.why_not = f"{error.filename or 'a cgroup'}: {error.strerror}"
            self._give_back()
        else:
            self.why_not = None
        if self.why_not is not None:
            log.info("HARD is held by looking at the calls, not by cgroups: %s", self.why_not)

    def leave(self) -> None:
        """One less uses it, and nothing that it has started is left. With the last all is as it was."""
        self._users -= 1
        if not self._users and self.why_not is None:
            self._give_back()
            self.why_not = "it was closed"

    def make(self, limit_kib: int) -> Cgroup | None:
        """A cgroup that may have so much, 0 being any number; None where there are none.

        Raises OSError where the kernel makes no more.
        """
        if self.why_not is not None or self._ground is None:
            return None
        path = f"{self._ground.base}/{self._mark}-{next(self._numbers)}"
        make_folder(path)
        try:
            return Cgroup(path, limit_kib)
        except OSError:
            self.release(path)
            raise

    def release(self, path: str) -> None:
        """Nothing is in it any more. It is removed a little later, so that no answer waits for it."""
        self._ended.append(path)
        if self._tidying is None:
            self._tidying = asyncio.get_running_loop().call_later(TIDY_S, self._tidy, TIDY_S)

    def _tidy(self, waited_s: float) -> None:
        before = len(self._ended)
        wait_s = TIDY_S if self._remove_ended() < before else min(2 * waited_s, TIDY_AT_LAST_S)
        self._tidying = None
        if self._ended:
            self._tidying = asyncio.get_running_loop().call_later(wait_s, self._tidy, wait_s)

    def _remove_ended(self) -> int:
        """How many are left, since the kernel has not yet buried all that was there. Each takes some 50 us."""
        self._ended = [path for path in self._ended if not _removed(path)]
        return len(self._ended)

    def sweep(self) -> None:
        """Remove what buses have left that are gone, and end what of their calls is left. It blocks."""
        if self._ground is not None:
            sweep(self._ground.base, but=self._mark)

    def _take(self) -> None:
        """Raises OSError."""
        base, _ = self._ground or self._look()
        self._lock = _make_locked(Path(self._leaf))
        _write(f"{self._leaf}/cgroup.procs", "0")
        if "memory" not in _words(base / "cgroup.subtree_control"):
            _write(f"{base}/cgroup.subtree_control", "+memory")
            self._enabled = True

    def _give_back(self) -> None:
        """What cannot be undone the next bus will sweep."""
        if self._ground is None or self._lock < 0:
            return
        base, own = self._ground
        if self._tidying is not None:
            self._tidying.cancel()
            self._tidying = None
        for _ in range(LOOKS):
            if not self._remove_ended():
                break
            time.sleep(ENDING_S)
        try:
            if self._enabled:
                _write(f"{base}/cgroup.subtree_control", "-memory")
            _write(f"{own}/cgroup.procs", "0")
            remove_folder(self._leaf)
        except OSError as error:
            log.warning("the bus stays in its cgroup %s: %s", self._leaf, error.strerror)
        os.close(self._lock)
        self._lock = -1
        self._enabled = False


class Cgroup:
    """One of them, of which `procs` is a descriptor to be handed to who is to enter; then `close` it.

    Raises OSError where the kernel does not take the limit.
    """

    __slots__ = ("limit_kib", "path", "procs")

    def __init__(self, path: str, limit_kib: int) -> None:
        self.path = path
        self.procs = -1
        self.limit_kib = 0
        self.limit_to(limit_kib)
        for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
            with contextlib.suppress(FileNotFoundError):  # no swap; Linux before 4.19
                _write(f"{path}/{name}", value)
        self.procs = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def limit_to(self, limit_kib: int) -> None:
        """Raises OSError."""
        if limit_kib != self.limit_kib:
            _write(f"{self.path}/memory.max", str(limit_kib * _KIB))
            self.limit_kib = limit_kib

    def raise_to(self, limit_kib: int) -> None:
        """Let it have so much, if that is more than before. Raises OSError."""
        if limit_kib > self.limit_kib:
            self.limit_to(limit_kib)

    def close(self) -> None:
        """It was handed on."""
        if self.procs >= 0:
            os.close(self.procs)
            self.procs = -1

    def excess_kib(self) -> float | None:
        """What it had when it was ended at its limit; None where it was not. Nothing runs there any more.

        Of any other call this most is not asked for, since it counts page cache, which is no need: a program that reads
        a large file has all of its limit. What processes had, others know.
        """
        try:
            events = _figures(f"{self.path}/memory.events")
        except OSError:
            return None
        # Without "oom", it was another's limit that it was killed for: the machine's, that of a cgroup above.
        if not (events.get("oom") and events.get("oom_kill")):
            return None
        try:
            with open(f"{self.path}/memory.peak", "rb") as file:  # noqa: PTH123
                return int(file.read()) / _KIB
        except OSError:  # Linux before 5.19
            return float(self.limit_kib)


def sweep(base: Path, *, but: str = "") -> None:
    """Remove what buses have left in a cgroup that are gone. It blocks; what cannot be removed is logged."""
    try:
        names = [entry.name for entry in os.scandir(base) if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        log.warning("what was left in %s cannot be looked for: %s", base, error)
        return
    found = [match for name in names if (match := _OURS.fullmatch(name))]
    for mark in sorted({match[1] for match in found} - {but}):
        calls = [str(base / match[0]) for match in found if match[1] == mark and not match[0].endswith("-bus")]
        try:
            _sweep_after(base / f"{mark}-bus", calls)
        except OSError as error:
            log.warning("what was left in %s of %s cannot be removed: %s", base, mark, error)


def _sweep_after(leaf: Path, calls: list[str]) -> None:
    """Remove all of a bus, if it is gone. Raises OSError."""
    lock = _lock_now(leaf)
    if lock is None:
        return
    try:
        for path in calls:
            with contextlib.suppress(FileNotFoundError):  # Linux before 5.14
                _write(f"{path}/cgroup.kill", "1")
            _remove_soon(path)
        if lock >= 0:
            _remove_soon(str(leaf))
    finally:
        if lock >= 0:
            os.close(lock)


def _lock_now(leaf: Path) -> int | None:
    """The lock of a bus that is gone; None where it lives; -1 where it had none any more. Raises OSError."""
    try:
        lock = os.open(leaf, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno == errno.EWOULDBLOCK:
            return None
        raise
    return lock


def _make_locked(leaf: Path) -> int:
    """A sweep may remove it between its making and its locking: then it is another than that at its path."""
    while True:
        with contextlib.suppress(FileExistsError):
            make_folder(str(leaf))
        try:
            lock = os.open(leaf, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), leaf.lstat()):
                return lock
        os.close(lock)


def _remove_soon(path: str) -> None:
    """Raises OSError where something stays in it."""
    for _ in range(LOOKS):
        if _removed(path):
            return
        time.sleep(ENDING_S)
    remove_folder(path)


def _removed(path: str) -> bool:
    """Whether it is gone, with those that programs have made in it."""
    try:
        remove_folder(path)
    except FileNotFoundError:
        return True
    except OSError:
        with contextlib.suppress(OSError):
            for entry in os.scandir(path):
                if entry.is_dir(follow_symlinks=False):
                    _removed(entry.path)
        return False
    return True


def make_folder(path: str) -> None:
    os.mkdir(path)  # noqa: PTH102  # a Path costs more than all else here


def remove_folder(path: str) -> None:
    os.rmdir(path)  # noqa: PTH106


def _write(path: str, text: str) -> None:
    """Raises OSError, with the path."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def _figures(path: str) -> dict[str, int]:
    """The lines `name number` of a file of the kernel."""
    with open(path, "rb") as file:  # noqa: PTH123
        return {name.decode(): int(number) for name, number in map(bytes.split, file)}
