"""Imports modules early, and watches that they do nothing that a new process would have to do for itself."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it
import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.machinery import ModuleSpec
    from typing import Any

    from runners.zygote_script import Capture, MissingError, Own
else:
    from zygote_script import Capture, MissingError

CHANCE = frozenset(
    [("random", "Random"), ("numpy.random.mtrand", "RandomState"), ("numpy.random._generator", "Generator")]
)
"""Sources of random numbers, which every child of one process would draw alike."""


RENEWED_CHANCE = (("random", "_inst"), ("numpy.random.mtrand", "_rand"))
"""Those that a child seeds anew."""


class Loader:
    """Imports modules, and watches what they do.

    `loaded`: what was imported. `left`: what was not, and why; `left` is what is known of that before. `unclean`: what
    did more than define things, and what that was. `room` is as for `Capture`.
    """

    def __init__(self, own: Own, skip: Iterable[str], left: dict[str, str], room: str) -> None:
        self.loaded = []  # type: list[str]
        self.left = left
        self.unclean = {}  # type: dict[str, str]
        self._skip = tuple(skip)
        self._room = room
        self._guard = Guard(own)

    def load(self, requests: Iterable[tuple[str, list[str]]], preload: Iterable[str]) -> None:
        """The requests, each a module and the names wanted from it, then `preload`.

        A request that is left alone may change how the next ones go, so these are left alone, too.
        """
        with Capture(self._room) as said:
            blocker = None  # type: str | None
            with self._guard:
                for name, names in requests:
                    if blocker is not None:
                        self._leave(name, "it stands behind the import of %s" % blocker)
                    elif not self._load(name, names, said):
                        blocker = name
            for name in preload:
                self._load(name, [], said)

    def _leave(self, name: str, why: str) -> None:
        self.left.setdefault(name, why)

    def _load(self, name: str, names: list[str], said: Capture) -> bool:
        if any(name == skipped or name.startswith(skipped + ".") for skipped in self._skip):
            self._leave(name, "it does more than define things")
            return False
        before, held = World(said), len(sys.modules)
        try:
            why = self._import(name, names)
        except MissingError as missing:
            self._leave(name, str(missing))
            return False
        if why or len(sys.modules) != held:
            faults = ([why] if why else []) + self._guard.told() + World(said).changes_since(before)
            if faults:
                self.unclean[name] = " and ".join(faults)
                return False
        self.left.pop(name, None)
        if name not in self.loaded:
            self.loaded.append(name)
        return True

    @staticmethod
    def _import(name: str, names: list[str]) -> str | None:
        """What went wrong. Raises `MissingError` where there is no such module."""
        try:
            __import__(name, {}, None, names)
        except BaseException as error:  # noqa: BLE001  # also SystemExit: whatever it is, it is to happen in the child
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and (name == missing or name.startswith(missing + ".")):
                raise MissingError("there is no module %s" % missing) from None
            return "it does not load: %s: %s" % (type(error).__name__, error)
        return None


class Guard:
    """While it stands, nothing that is imported gets at the overlay's own code (a module that shadows another)."""

    def __init__(self, own: Own) -> None:
        self._own = own
        self._found = []  # type: list[str]
        self._finder = None  # type: Any

    def __enter__(self) -> None:
        at = [getattr(finder, "__name__", "") for finder in sys.meta_path].index("PathFinder")
        self._finder = sys.meta_path[at]
        sys.meta_path.insert(at, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = self._finder.find_spec(name, path, target)  # type: ModuleSpec | None
        if spec is not None and self._own.has(spec):
            self._found.append(name)
            raise ImportError("the overlay's own code runs in the children only", name=name)
        return spec

    def told(self) -> list[str]:
        """What was asked for since the last time, in words."""
        found, self._found = self._found, []
        return ["it loads %s, which is the overlay's own" % name for name in found]


_OF_LIBC = 0b11 << 31
"""Signals 32 and 33, which the C library handles once there was a thread (nptl(7))."""


class World:
    """What this process would not hand on to a child as it is, and what is outside of it."""

    def __init__(self, said: Capture) -> None:
        status = process_status()
        with open("/proc/self/stat", "rb") as file:
            figures = file.read().rpartition(b")")[2].split()
        self._facts = {
            "it writes to stdout or stderr": said.size,
            "it starts threads": status["Threads"],
            "it starts a process": figures[8],  # cminflt of proc(5): page faults of children that were waited for
            "it leaves something open": _open_files(),
            "it changes how signals are handled": [
                int(status[name], 16) & ~_OF_LIBC for name in ("SigBlk", "SigIgn", "SigCgt")
            ],
            "it sets a timer": [_signal.getitimer(which) for which in range(3)],
            "it changes the umask": status.get("Umask"),
            "it changes the user": [status[name] for name in ("Uid", "Gid")],
            "it changes the environment": dict(os.environ),
            "it changes the working folder": os.getcwd(),
            "it makes a source of random numbers": _sources_of_chance(),
        }  # type: dict[str, Any]

    def changes_since(self, before: World) -> list[str]:
        changes = [what for what, fact in self._facts.items() if fact != before._facts[what]]
        threads = "it starts threads"
        if threads in changes and _end_at_fork(before._facts[threads]):
            changes.remove(threads)
        return changes


def process_status() -> dict[str, str]:
    """/proc/self/status (proc(5))."""
    with open("/proc/self/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def _open_files() -> dict[str, str]:
    files = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            files[fd] = os.readlink("/proc/self/fd/" + fd)
        except FileNotFoundError:  # the listing's own
            pass
    return files


def _end_at_fork(threads: str) -> bool:
    """Whether a fork ends the threads that were started: OpenBLAS, for one, puts its pool away and starts it at need.

    A thread that was joined may be counted for a moment longer.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for _ in range(100):
        if process_status()["Threads"] == threads:
            return True
        os.sched_yield()
    return False


def _sources_of_chance() -> int:
    """How many there are that a child does not seed anew."""
    known = [vars(sys.modules[name]).get(source) for name, source in RENEWED_CHANCE if name in sys.modules]
    kinds = tuple(kind for name, source in CHANCE if (kind := getattr(sys.modules.get(name), source, None)) is not None)
    system = getattr(sys.modules.get("random"), "SystemRandom", ())
    found = [thing for thing in gc.get_objects() if isinstance(thing, kinds) and not isinstance(thing, system)]
    return sum(not any(thing is seeded for seeded in known) for thing in found)
