"""How the kernel is to hold the processes of a home: the plan that a helper takes, and what it then comes to.

Each right is held by one or more mechanisms, as the last part of this file says:

    read, write   Landlock: the places of `places`; who may not write may not change modes, owners or times, who has no
                  network may not watch folders (seccomp)
    network       seccomp: kinds of sockets and what is done with them; where ports are given, Landlock for TCP
    exec          Landlock: the program of the command, or all of the PATH; in mode fork a second seccomp filter, taken
                  when the interpreter has started, after which nothing is executed any more
    processes     a pid namespace; else Landlock, which keeps from signals and ptrace(2), and a seccomp filter for what
                  else is done to a process by its number
    system        seccomp and the loss of capabilities
    limits        setrlimit(2); what scratch holds as a whole, and how many processes there are, the helper counts

The plan is plain values, as `sandbox.py` explains them. It is made before anyone knows what the kernel will give, so
what it comes to is said afterwards, of what was taken.
"""

from __future__ import annotations

import functools
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runners import kernel, places, programs, seccomp
from runners.base import Sandbox
from runners.helper import LATE, LAUNCH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from runners.base import Rights, SandboxMode
    from runners.kernel import Kernel
    from runners.places import Kept, Places
    from runners.processes import Home
    from runners.tiers import Place, Tiers

Right = Literal["read", "write", "network", "exec", "processes", "system", "limits"]
Mechanism = Literal["namespace", "capabilities", "limits", "landlock", "seccomp", "late"]

RIGHTS: tuple[Right, ...] = ("read", "write", "network", "exec", "processes", "system", "limits")
MECHANISMS: tuple[Mechanism, ...] = ("namespace", "capabilities", "limits", "landlock", "seccomp", LATE)

OPEN_FILES = 4096
"""Files that a process may have open, where the bus's own limit is not lower."""

CAPABILITIES = 1 << 1
"""Those that root keeps: CAP_DAC_OVERRIDE, so that it reads an overlay of another user. Landlock says which."""

_MB = 2**20


class Held(NamedTuple):
    """What became of a right: what holds it, nothing where it is not held, and what is missing, in words.

    A gap is `bearable` where mode enforce runs with it: where less is given, or a service listens, as it has to.
    """

    by: tuple[Mechanism, ...]
    gap: str | None = None
    bearable: bool = False

    @property
    def suffices(self) -> bool:
        """For mode enforce."""
        return bool(self.by) and (self.gap is None or self.bearable)


@dataclass(frozen=True, slots=True)
class Case:
    """What decides how a right can be held: the rights themselves, the ports of a service, and how it is started.

    `stand_in` is that of `Program`, `scratch` the gap of its `Place`.
    """

    rights: Rights
    listen: tuple[int, ...] = ()
    forks: bool = False
    stand_in: str | None = None
    scratch: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a helper is told to take (`wire`), and what that comes to once it has said what of it the kernel gave."""

    mode: SandboxMode
    wire: dict[str, Any]
    case: Case
    kernel: Kernel

    def held(self, *, namespace: bool, taken: Collection[str]) -> dict[Right, Held]:
        """Each right, with `namespace` a pid namespace and `taken` the mechanisms that were."""
        if self.mode == "off":
            return {right: Held((), "off") for right in RIGHTS}
        got = set(taken) - {"namespace"} | ({"namespace"} if namespace else set())
        return {right: _hold(right, self.case, self.kernel, got) for right in RIGHTS}

    def sandbox(
        self,
        scope: Literal["call", "pool", "service", "none"],
        namespace: bool,
        taken: Collection[str],
    ) -> Sandbox:
        """As a record has it."""
        held = self.held(namespace=namespace, taken=taken)
        enforced = tuple(right for right, how in held.items() if how.by)
        return Sandbox(scope, enforced, tuple(f"{right}: {how.gap}" for right, how in held.items() if how.gap))

    def needs_namespace(self) -> str | None:
        """Why it is not to run in mode enforce where the kernel gives no pid namespace, though it has all else."""
        return self.unheld(False, MECHANISMS)

    def unheld(self, namespace: bool, taken: Collection[str]) -> str | None:
        """Why it is not to run in mode enforce; None where it is held, or need not be.

        It is asked before anything is taken late: where that fails, the helper ends itself.
        """
        if self.mode != "enforce":
            return None
        return _first_gap(self.held(namespace=namespace, taken={*taken, LATE}))


@dataclass(frozen=True, slots=True)
class Confinement:
    """Makes the plans of a bus. `tiers` says where the scratch folders of calls lie, and how much they may hold.

    `kept` is what the bus has for itself, as `places.keep` takes it.
    """

    mode: SandboxMode
    tiers: Tiers
    max_processes: int
    kernel: Kernel = field(default_factory=kernel.this_kernel)
    kept: tuple[Path, ...] = ()

    def plan(self, home: Home, *, forks: bool, namespace: bool = True) -> Plan:
        """How to hold the processes of a home, in mode fork if it `forks`. Looks at files; raises nothing.

        `namespace`: whether it is tried for. A helper that is refused one is started anew, by another plan.
        """
        scratch = self.tiers.place(home.tier, namespace=namespace)
        if self.mode == "off":
            return Plan("off", self._wire(scratch), Case(home.rights, home.listen, forks), self.kernel)
        folder = programs.real(home.folder)
        state = _absolute(home.env.get("OVERLAY_STATE"))
        own = self._own(home.rights, state)
        program = programs.look(home.program, folder, home.env, own)
        where = places.places(self._wishes(home, state, own, program.stand_in), program, folder, home.env)
        case = Case(home.rights, home.listen, forks, program.stand_in, scratch.gap)
        return Plan(self.mode, self._wire(scratch, case, where), case, self.kernel)

    def kept_from(self, own: Iterable[Path]) -> Kept:
        """What an overlay is not given, whose folders are `own`. Looks at files."""
        return places.keep(self.kept, own)

    def lacking(self, rights: Rights) -> str | None:
        """Why this kernel cannot hold these rights, so that mode enforce refuses them at once; None where it can.

        What only the start of a process tells, `Plan.unheld` says.
        """
        if self.mode != "enforce":
            return None
        return _first_gap(self._foreseen(Case(rights, forks=True)))

    def _foreseen(self, case: Case) -> dict[Right, Held]:
        """What becomes of each right at best."""
        has = {mechanism for mechanism in MECHANISMS if _absent(mechanism, self.kernel) is None}
        return {right: _hold(right, case, self.kernel, has) for right in RIGHTS}

    def gaps(self, cases: Iterable[Case]) -> list[str]:
        """What this kernel is known to lack to hold these cases, before any process is started."""
        if self.mode == "off":
            return [f"{right}: off" for right in RIGHTS]
        held = [(right, how.gap) for case in dict.fromkeys(cases) for right, how in self._foreseen(case).items()]
        return [f"{right}: {gap}" for right, gap in dict.fromkeys(held) if gap]

    def _own(self, rights: Rights, state: tuple[Path, ...]) -> tuple[Path, ...]:
        """What the overlay may write to in some call, real."""
        given = map(Path, dict.fromkeys((*rights.write_paths, *rights.own_paths)))
        return tuple(programs.real(path) for path in (*state, *self.tiers.roots(), *given))

    def _wishes(
        self, home: Home, state: tuple[Path, ...], own: tuple[Path, ...], stand_in: str | None
    ) -> places.Wishes:
        """An overlay may always read what is its own."""
        rights = home.rights
        return places.Wishes(
            read=(*state, *map(Path, rights.read_paths)),
            write=(*state, *map(Path, rights.write_paths)) if rights.write else (),
            own=own,
            kept=self.kept_from((*state, home.folder)),
            any_program=rights.exec or stand_in is not None,
            gpu=rights.gpu,
        )

    def _wire(self, scratch: Place, case: Case | None = None, where: Places | None = None) -> dict[str, Any]:
        """As `sandbox.py` takes it; without a case only what calls are given: a scratch folder."""
        wire: dict[str, Any] = {
            "landlock": None,
            "seccomp": b"",
            "others": b"",
            "late": b"",
            "limits": [],
            "capabilities": None,
            "scratch": {
                "root": str(scratch.root),
                "mounts": scratch.mounts,
                "mb": scratch.mb,
                "bits": self.kernel.known(kernel.WRITE),
            },
            "processes": 0,
            "strict": False,
        }
        if case is not None and where is not None:
            wire |= {
                "landlock": self._landlock(case, where) if self.kernel.no_landlock is None else None,
                **_filters(case, self.kernel),
                "limits": _limits(scratch.mb),
                "capabilities": CAPABILITIES,
                "processes": self.max_processes,
                "strict": self.mode == "enforce",
            }
        return wire

    def _landlock(self, case: Case, where: Places) -> dict[str, Any]:
        known = self.kernel.known
        paths: dict[str, int] = {}
        for granted, bits in (
            (where.read, kernel.READ),
            (where.write, kernel.WRITE),
            (where.execute, kernel.READ_FILE | kernel.EXECUTE),
            (where.devices, kernel.READ | kernel.DEVICE),
            ((programs.real(LAUNCH.parent),) if case.forks else (), kernel.READ),
        ):
            for path in granted:
                paths[str(path)] = paths.get(str(path), 0) | known(bits)
        return {
            "fs": known(kernel.ALL),
            "net": 0 if case.rights.network is True else known(kernel.TCP, kernel.NET_ABI),
            "scoped": known(kernel.SCOPES, kernel.SCOPE_ABI),
            "paths": [[path, bits] for path, bits in paths.items()],
            "ports": [[port, known(bits, kernel.NET_ABI)] for port, bits in _ports(case)],
        }


def _absolute(folder: str | None) -> tuple[Path, ...]:
    return () if folder is None else (Path(folder).absolute(),)


def _ports(case: Case) -> Iterator[tuple[int, int]]:
    """The ports of TCP that may be connected to, and listened on, with their bits."""
    network = case.rights.network
    for port in () if isinstance(network, bool) else network:
        yield port, kernel.CONNECT_TCP
    for port in case.listen:
        yield port, kernel.BIND_TCP


def _filters(case: Case, machine: Kernel) -> dict[str, bytes]:
    if machine.no_seccomp is not None:
        return {}
    rights = case.rights
    rules = seccomp.Rules(rights.network, serve=bool(case.listen), clear=not rights.write, exec=rights.exec)
    is_last = case.forks and not rights.exec
    late = seccomp.late() if is_last else b""
    return {"seccomp": seccomp.compile(rules), "others": seccomp.others(), "late": late}


def _limits(scratch_mb: int) -> list[list[int]]:
    """The numbers of setrlimit(2) with their values, none above this process's own."""
    wanted = {resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_FSIZE: scratch_mb * _MB, resource.RLIMIT_CORE: 0}
    return [[number, _within(value, resource.getrlimit(number)[1])] for number, value in wanted.items()]


def _within(value: int, hard: int) -> int:
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


# What holds a right, and what is missing


def _first_gap(held: dict[Right, Held]) -> str | None:
    return next((f"{right}: {how.gap}" for right, how in held.items() if not how.suffices), None)


def _absent(mechanism: Mechanism, machine: Kernel) -> str | None:
    """Why the kernel has it not at all; None where it may have it."""
    if mechanism == "landlock":
        return machine.no_landlock
    return machine.no_seccomp if mechanism in ("seccomp", LATE) else None


def _hold(right: Right, case: Case, machine: Kernel, got: Collection[str]) -> Held:
    """What of the mechanisms that were got holds a right of this case, on this kernel."""
    way = _WAYS[right](case, machine, got)
    for mechanism in way.by:
        if mechanism not in got:
            return Held((), _absent(mechanism, machine) or f"the kernel refused {_WORDS[mechanism]}")
    return way


_WORDS: dict[Mechanism, str] = {
    "namespace": "a pid namespace",
    "capabilities": "to drop capabilities",
    "limits": "limits",
    "landlock": "Landlock",
    "seccomp": "a seccomp filter",
    "late": "a second seccomp filter",
}


def _read(case: Case, _machine: Kernel, _got: Collection[str]) -> Held:
    return Held(("landlock",) if case.rights.network else ("landlock", "seccomp"))


def _write(case: Case, machine: Kernel, got: Collection[str]) -> Held:
    if 0 < machine.landlock_abi < kernel.ABI_OF_TRUNCATE:
        return Held((), f"Landlock lets files be emptied (ABI {kernel.ABI_OF_TRUNCATE} does not)")
    by: tuple[Mechanism, ...] = ("landlock",) if case.rights.write else ("landlock", "seccomp")
    return Held(by, None if "namespace" in got else "no shared memory (no pid namespace)", bearable=True)


_LISTENS = "a service may listen on all addresses, and on a port that the kernel picks"
"""seccomp cannot tell what a socket is bound to, and Landlock is not asked where one listens that is not."""


def _network(case: Case, machine: Kernel, _got: Collection[str]) -> Held:
    has_ports = machine.landlock_abi >= kernel.ABI_OF_TCP
    since = f"this kernel has no Landlock for TCP ports (ABI {kernel.ABI_OF_TCP})"
    if case.rights.network is True or (case.rights.network is False and not case.listen):
        return Held(("seccomp",))
    if has_ports:
        return Held(("landlock", "seccomp"), _LISTENS if case.listen else None, bearable=True)
    if case.rights.network is False:
        return Held(("seccomp",), f"it may listen on any port: {since}")
    return Held((), machine.no_landlock or since)


def _exec(case: Case, _machine: Kernel, _got: Collection[str]) -> Held:
    if case.rights.exec:
        return Held(("landlock",))
    if case.forks:
        return Held(("seccomp", LATE))
    if case.stand_in is not None:
        return Held((), case.stand_in)
    return Held(("landlock", "seccomp"), "the loader runs what lies in the store" if _has_store() else None)


def _processes(_case: Case, machine: Kernel, got: Collection[str]) -> Held:
    if "namespace" in got:
        return Held(("namespace",))
    if machine.landlock_abi >= kernel.ABI_OF_SCOPES:
        return Held(("landlock", "seccomp"), "those of others can be seen (no pid namespace)")
    return Held((), f"no pid namespace, and no Landlock for signals (ABI {kernel.ABI_OF_SCOPES})")


def _system(_case: Case, _machine: Kernel, _got: Collection[str]) -> Held:
    return Held(("capabilities", "seccomp"))


def _of_limits(case: Case, _machine: Kernel, _got: Collection[str]) -> Held:
    return Held(("limits",), case.scratch, bearable=True)


_WAYS: dict[Right, Callable[[Case, Kernel, Collection[str]], Held]] = {
    "read": _read,
    "write": _write,
    "network": _network,
    "exec": _exec,
    "processes": _processes,
    "system": _system,
    "limits": _of_limits,
}


@functools.cache
def _has_store() -> bool:
    return any(Path(store).is_dir() for store in places.STORES)
