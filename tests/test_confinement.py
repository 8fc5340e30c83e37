"""The plan for the rights of a phase on each kernel there may be, what is said of it, and that this kernel takes it."""

from __future__ import annotations

import errno
import marshal
import resource
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pytest

from runners import kernel, seccomp, tiers
from runners.base import Code, Job, ProcessTarget, Rights
from runners.confinement import CAPABILITIES, MECHANISMS, OPEN_FILES, RIGHTS, Confinement
from runners.helper import LAUNCH
from runners.helpers import Helpers
from runners.kernel import Kernel, this_kernel
from runners.process import ProcessRunner
from runners.processes import Home
from runners.tiers import Tiers

if TYPE_CHECKING:
    from pathlib import Path

    from runners.base import Outcome, SandboxMode
    from runners.confinement import Plan

NONE = "this kernel has no Landlock"
WHOLE = Kernel(7, None, None)
OPEN = Rights(write=True, network=True)
ASCEND = Rights(write=True, network=True, exec=True)
CLEAR = Rights()
PORTS = Rights(network=(443, 53))
ALL = set(RIGHTS)

holds_all = pytest.mark.skipif(
    this_kernel().landlock_abi < kernel.ABI_OF_SCOPES or this_kernel().no_seccomp is not None,
    reason="this kernel cannot hold every right",
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Of an overlay whose program is this Python."""
    folder = tmp_path.resolve() / "overlays/own"
    folder.mkdir(parents=True)
    (tmp_path / "state").mkdir()
    env = {"PATH": "/usr/bin:/bin", "OVERLAY_STATE": str(tmp_path / "state")}
    return Home("own", "CLEAR", CLEAR, folder, env, program=sys.executable)


def confinement(home: Home, mode: SandboxMode = "best-effort", on: Kernel = WHOLE) -> Confinement:
    root = home.folder.parent.parent / "scratch"
    return Confinement(mode, Tiers.all_in(root, 16), max_processes=64, kernel=on)


def plan(home: Home, rights: Rights, *, forks: bool = False, on: Kernel = WHOLE, mode: SandboxMode = "enforce") -> Plan:
    return confinement(home, mode, on).plan(replace(home, rights=rights), forks=forks)


def granted(wire: dict[str, Any], path: Path) -> int:
    """The bits of exactly this path."""
    return sum(bits for place, bits in wire["landlock"]["paths"] if place == str(path))


# --- the plan ---


def test_a_plan_is_plain_values(home: Home) -> None:
    for mode in ("enforce", "off"):
        wire = plan(home, PORTS, mode=mode).wire
        assert marshal.loads(marshal.dumps(wire, 2)) == wire


def test_state_is_written_where_the_phase_writes_and_read_in_every_phase(home: Home) -> None:
    state = home.folder.parent.parent / "state"
    assert granted(plan(home, OPEN).wire, state) == kernel.WRITE
    assert granted(plan(home, CLEAR).wire, state) == kernel.READ


def test_paths_of_the_manifest_are_read_and_written_as_given(home: Home) -> None:
    for name in ("in", "out"):
        (home.folder.parent / name).mkdir()
    ways = {name: (str(home.folder.parent / name),) for name in ("in", "out")}
    wire = plan(home, Rights(write=True, read_paths=ways["in"], write_paths=ways["out"])).wire
    assert granted(wire, home.folder.parent / "in") == kernel.READ
    assert granted(wire, home.folder.parent / "out") == kernel.WRITE
    assert granted(wire, home.folder.parent) == 0


def test_a_program_that_another_call_may_have_changed_leads_nowhere(home: Home) -> None:
    secret = home.folder.parent / "secret/lib"
    (home.folder / ".venv/bin").mkdir(parents=True)
    secret.mkdir(parents=True)
    (home.folder / ".venv/bin/python3").symlink_to(sys.executable)
    (home.folder / ".venv/lib").symlink_to(secret)
    (home.folder / ".venv/pyvenv.cfg").write_text(f"home = {secret.parent / 'bin'}\n")
    within = replace(home, program=".venv/bin/python3")
    for own in ((), (str(home.folder / ".venv"),)):
        wire = plan(within, Rights(own_paths=own)).wire
        assert bool(granted(wire, secret)) == (not own)
        executed = [path for path, bits in wire["landlock"]["paths"] if bits & kernel.EXECUTE]
        assert bool(executed) == (not own)


def test_a_link_that_another_overlay_laid_to_what_the_bus_keeps_leads_nowhere(home: Home) -> None:
    base = home.folder.parent.parent
    for name in ("state/own", "state/other", "shared"):
        (base / name).mkdir(parents=True)
    (base / "state/secrets.json").touch()
    (base / "shared/file").symlink_to(base / "state/secrets.json")
    (base / "shared/folder").symlink_to(base / "state/other")
    (base / "shared/above").symlink_to(base)
    (home.folder / "link").symlink_to(base / "shared/folder")
    links = tuple(str(base / "shared" / name) for name in ("file", "folder", "above"))
    asked = replace(home, env={"OVERLAY_STATE": str(base / "state/own")})
    for rights in (Rights(read_paths=links), Rights(write=True, write_paths=links[:2])):
        made = replace(confinement(home), kept=(base / "state", base / "overlays"))
        paths = made.plan(replace(asked, rights=rights), forks=False).wire["landlock"]["paths"]
        below = {path for path, _ in paths if path.startswith(str(base))}
        assert below == {str(home.folder), str(base / "state/own")}


def test_scratch_is_left_to_the_process_inside_with_its_bits(home: Home) -> None:
    wire = plan(home, CLEAR).wire
    root = home.folder.parent.parent / "scratch"
    assert wire["scratch"] == {"root": str(root), "mounts": True, "mb": 16, "bits": kernel.WRITE}
    assert granted(wire, root) == 0


def test_only_the_program_of_the_command_is_executed_but_in_ascend(home: Home) -> None:
    for rights, is_any in ((CLEAR, False), (ASCEND, True)):
        paths = plan(home, rights).wire["landlock"]["paths"]
        executed = {path for path, bits in paths if bits & kernel.EXECUTE}
        assert ("/usr" in executed) == is_any
        assert (str(home.folder) in executed) == is_any


def test_a_fork_reads_the_helpers_own_folder_and_executes_nothing_once_it_is_loaded(home: Home) -> None:
    forked, spawned = plan(home, CLEAR, forks=True).wire, plan(home, CLEAR).wire
    assert granted(forked, LAUNCH.parent) == kernel.READ
    assert granted(spawned, LAUNCH.parent) == 0
    assert (forked["late"], spawned["late"]) == (seccomp.late(), b"")
    assert plan(home, ASCEND, forks=True).wire["late"] == b""
    assert forked["seccomp"] == spawned["seccomp"], "not even before it is loaded it executes from memory"


def test_a_fork_is_said_to_execute_nothing_only_once_it_has_taken_its_late_filter(home: Home) -> None:
    made = plan(home, CLEAR, forks=True)
    assert said(made, without="late") == (ALL - {"exec"}, {"exec: the kernel refused a second seccomp filter"})
    assert (
        said(plan(home, CLEAR), without="late") == said(plan(home, ASCEND, forks=True), without="late") == (ALL, set())
    )
    before = [mechanism for mechanism in MECHANISMS if mechanism != "late"]
    assert made.unheld(namespace=True, taken=before) is None, "it ends itself where that fails"


def test_the_filter_is_that_of_the_rights(home: Home) -> None:
    assert plan(home, CLEAR).wire["seccomp"] == seccomp.compile(seccomp.Rules(clear=True))
    assert plan(home, CLEAR).wire["others"] == seccomp.others()
    assert plan(home, ASCEND).wire["seccomp"] == seccomp.compile(seccomp.Rules(network=True, exec=True))
    served = replace(home, listen=(4000,))
    assert plan(served, CLEAR).wire["seccomp"] == seccomp.compile(seccomp.Rules(serve=True, clear=True))


def test_tcp_is_held_to_the_ports_that_are_given_and_to_the_services_own(home: Home) -> None:
    ways = plan(replace(home, listen=(4000,)), PORTS).wire["landlock"]
    assert ways["net"] == kernel.TCP
    assert ways["ports"] == [[443, kernel.CONNECT_TCP], [53, kernel.CONNECT_TCP], [4000, kernel.BIND_TCP]]
    assert plan(home, CLEAR).wire["landlock"]["net"] == kernel.TCP
    assert plan(home, OPEN).wire["landlock"]["net"] == 0


@pytest.mark.parametrize("abi", range(1, 10))
def test_no_kernel_is_asked_for_bits_that_it_does_not_know(home: Home, abi: int) -> None:
    wire = plan(replace(home, listen=(4000,)), ASCEND._replace(network=(1,)), on=Kernel(abi, None, None)).wire
    ways = wire["landlock"]
    assert ways["fs"] == {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}.get(abi, 0xFFFF)
    assert ways["net"] == (kernel.TCP if abi >= 4 else 0)
    assert ways["scoped"] == (kernel.SCOPES if abi >= 6 else 0)
    assert all(bits and not bits & ~ways["fs"] for _, bits in [*ways["paths"], ["scratch", wire["scratch"]["bits"]]])
    assert not any(bits & ~ways["net"] for _, bits in ways["ports"])


def test_limits_are_never_above_those_of_the_bus(home: Home) -> None:
    limits = dict(map(tuple, plan(home, CLEAR).wire["limits"]))
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    _, size = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert limits == {
        resource.RLIMIT_NOFILE: OPEN_FILES if files < 0 else min(OPEN_FILES, files),
        resource.RLIMIT_FSIZE: 16 * 2**20 if size < 0 else min(16 * 2**20, size),
        resource.RLIMIT_CORE: 0,
    }


def test_what_the_kernel_has_not_is_not_asked_for(home: Home) -> None:
    wire = plan(home, CLEAR, on=Kernel(0, NONE, "no filters")).wire
    assert (wire["landlock"], wire["seccomp"], wire["others"], wire["late"]) == (None, b"", b"", b"")
    assert wire["capabilities"] == CAPABILITIES


def test_mode_off_gives_scratch_and_holds_nothing(home: Home) -> None:
    made = plan(home, CLEAR, mode="off")
    nothing: dict[str, Any] = {
        "landlock": None,
        "seccomp": b"",
        "others": b"",
        "late": b"",
        "limits": [],
        "capabilities": None,
        "processes": 0,
    }
    assert made.wire == {**nothing, "strict": False, "scratch": plan(home, CLEAR).wire["scratch"]}
    held = made.sandbox("call", namespace=True, taken=MECHANISMS)
    assert (held.scope, held.enforced, held.missing) == ("call", (), tuple(f"{right}: off" for right in RIGHTS))
    assert made.unheld(namespace=False, taken=()) is None


def test_only_enforce_is_strict(home: Home) -> None:
    assert plan(home, CLEAR).wire["strict"]
    assert not plan(home, CLEAR, mode="best-effort").wire["strict"]


# --- what it comes to ---


def said(made: Plan, *, namespace: bool = True, without: str = "") -> tuple[set[str], set[str]]:
    """What is enforced and what is missing, when all was taken but one mechanism."""
    sandbox = made.sandbox("call", namespace, [mechanism for mechanism in MECHANISMS if mechanism != without])
    return set(sandbox.enforced), set(sandbox.missing)


@pytest.mark.parametrize("rights", [OPEN, ASCEND, CLEAR, PORTS])
@pytest.mark.parametrize("forks", [True, False])
def test_a_kernel_with_all_holds_every_right(home: Home, rights: Rights, forks: bool) -> None:
    made = plan(home, rights, forks=forks)
    assert said(made) == (ALL, set())
    assert made.unheld(namespace=True, taken=MECHANISMS) is None
    assert confinement(home, "enforce").lacking(rights) is None


LACKS = [
    (Kernel(0, NONE, None), CLEAR, {f"{right}: {NONE}" for right in ("read", "write", "exec")}),
    (Kernel(0, NONE, None), PORTS, {f"{right}: {NONE}" for right in ("read", "write", "exec", "network")}),
    (Kernel(2, None, None), OPEN, {"write: Landlock lets files be emptied (ABI 3 does not)"}),
    (Kernel(3, None, None), CLEAR, set()),
    (Kernel(3, None, None), PORTS, {"network: this kernel has no Landlock for TCP ports (ABI 4)"}),
    (Kernel(7, None, "no filters"), OPEN, {f"{right}: no filters" for right in ("network", "exec", "system")}),
    (Kernel(7, None, "no filters"), ASCEND, {f"{right}: no filters" for right in ("network", "system")}),
]


@pytest.mark.parametrize(("on", "rights", "missing"), LACKS)
def test_what_a_kernel_lacks_is_said_by_right(home: Home, on: Kernel, rights: Rights, missing: set[str]) -> None:
    without = "landlock" if on.no_landlock else "seccomp" if on.no_seccomp else ""
    enforced, said_missing = said(plan(home, rights, on=on), without=without)
    assert said_missing == missing
    assert enforced == ALL - {gap.partition(":")[0] for gap in missing}


@pytest.mark.parametrize(("on", "rights", "missing"), LACKS)
def test_enforce_refuses_what_a_kernel_lacks_before_anything_starts(
    home: Home, on: Kernel, rights: Rights, missing: set[str]
) -> None:
    why = confinement(home, "enforce", on).lacking(rights)
    assert why in missing or (why is None and not missing)
    assert confinement(home, "best-effort", on).lacking(rights) is None


def test_local_scratch_that_is_not_in_memory_is_said_and_borne(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "shared_memory_is_usable", lambda: False)
    made = confinement(home, "enforce").plan(home, forks=False, namespace=False)
    assert made.held(namespace=False, taken=MECHANISMS)["limits"].suffices
    assert "limits: LOCAL scratch is not in memory (no namespace, no /dev/shm)" in said(made, namespace=False)[1]
    assert made.wire["scratch"]["mounts"] is False
    cold = confinement(home).plan(replace(home, tier="COLD"), forks=False, namespace=False)
    assert not any("scratch" in gap for gap in said(cold, namespace=False)[1])


def test_without_a_namespace_other_processes_are_seen_but_not_reached(home: Home) -> None:
    enforced, missing = said(plan(home, CLEAR), namespace=False)
    assert enforced == ALL
    assert missing == {
        "write: no shared memory (no pid namespace)",
        "processes: those of others can be seen (no pid namespace)",
    }
    assert "processes" not in said(plan(home, CLEAR), namespace=False, without="seccomp")[0]
    old = plan(home, CLEAR, on=Kernel(5, None, None))
    assert "processes" not in said(old, namespace=False)[0]
    assert old.unheld(namespace=False, taken=MECHANISMS) == (
        "processes: no pid namespace, and no Landlock for signals (ABI 6)"
    )
    assert old.unheld(namespace=True, taken=MECHANISMS) is None


@pytest.mark.parametrize(
    ("without", "lost"),
    [
        ("landlock", {"read", "write", "exec"}),
        ("seccomp", {"read", "write", "network", "exec", "system"}),
        ("capabilities", {"system"}),
        ("limits", {"limits"}),
    ],
)
def test_what_the_kernel_refused_is_not_said_to_hold(home: Home, without: str, lost: set[str]) -> None:
    enforced, missing = said(plan(home, CLEAR), without=without)
    assert enforced == ALL - lost
    assert {gap.partition(":")[0] for gap in missing} == lost
    assert all("the kernel refused" in gap for gap in missing)


def test_a_service_that_listens_is_held_to_its_port_where_landlock_has_ports(home: Home) -> None:
    service = replace(home, listen=(4000,))
    held = plan(service, CLEAR)
    assert said(held) == (ALL, {"network: a service may listen on all addresses, and on a port that the kernel picks"})
    assert held.unheld(namespace=True, taken=MECHANISMS) is None
    old = plan(service, CLEAR, on=Kernel(3, None, None))
    enforced, missing = said(old)
    assert "network" in enforced
    assert missing == {"network: it may listen on any port: this kernel has no Landlock for TCP ports (ABI 4)"}
    assert old.unheld(namespace=True, taken=MECHANISMS) in missing


def test_enforce_refuses_what_is_held_but_for_a_part(home: Home) -> None:
    made = plan(home, CLEAR)
    without = made.unheld(namespace=False, taken=MECHANISMS)
    assert without == "processes: those of others can be seen (no pid namespace)"
    assert made.unheld(namespace=True, taken=MECHANISMS) is None
    assert plan(home, CLEAR, mode="best-effort").unheld(namespace=False, taken=MECHANISMS) is None


def test_a_stand_in_is_held_by_a_fork_alone(home: Home) -> None:
    shims = home.folder.parent / "manager/shims"
    shims.mkdir(parents=True)
    (shims / "python3").write_text("#!/bin/sh\n")
    (shims / "python3").chmod(0o755)
    stood = replace(home, program="python3", env={**home.env, "PATH": f"{shims}:/usr/bin"})
    spawned = plan(stood, CLEAR)
    assert said(spawned) == (ALL - {"exec"}, {"exec: python3 is a version manager's shim"})
    assert spawned.unheld(namespace=True, taken=MECHANISMS) == "exec: python3 is a version manager's shim"
    assert granted(spawned.wire, shims.parent) & kernel.EXECUTE
    assert said(plan(stood, CLEAR, forks=True)) == said(plan(stood, ASCEND)) == (ALL, set())


# --- this kernel ---


def test_this_kernel_is_asked_once_and_says_why_it_has_not() -> None:
    asked = this_kernel()
    assert asked is this_kernel()
    assert (asked.landlock_abi == 0) == (asked.no_landlock is not None)


def test_the_machines_that_are_asked_for_filters_are_those_that_have_some() -> None:
    for machine in seccomp.machines():
        assert kernel.no_seccomp(machine) != kernel.no_seccomp("abacus")
    assert kernel.no_seccomp("abacus") == "no seccomp filter is known for abacus"


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSYS, "this kernel has no Landlock"),
        (errno.EOPNOTSUPP, "Landlock is switched off at boot (lsm=)"),
        (errno.EPERM, "Landlock is refused: Operation not permitted"),
    ],
)
def test_the_reason_for_no_landlock_is_what_the_kernel_says(
    monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    monkeypatch.setattr(kernel, "_call", lambda *_: (-1, number))
    assert kernel.landlock() == (0, why)


PROGRAM = """
import json, os, sys
def tried(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno
    return 0
print(json.dumps({
    "state": tried(lambda: open(os.environ["OVERLAY_STATE"] + "/new", "w")),
    "scratch": tried(lambda: open(os.environ["OVERLAY_SCRATCH"] + "/new", "w")),
    "elsewhere": tried(lambda: os.listdir(os.path.dirname(os.environ["OVERLAY_STATE"]))),
    "exec": tried(lambda: os.execv("/bin/sh", ["sh", "-c", "echo 1"])),
}))
"""


async def run(home: Home, rights: Rights, mode: SandboxMode, way: Literal["spawn", "fork"]) -> Outcome:
    """What came of the program with these rights, on this kernel."""
    (home.folder / "run.py").write_text(PROGRAM)
    target = ProcessTarget((sys.executable, "-I", "run.py"), home.env, mode=way)
    runner = ProcessRunner(Helpers(confinement=confinement(home, mode, this_kernel())))
    job = Job("1", "own", "run", "CLEAR", home.folder, target, b"{}", rights, time.monotonic() + 30, 512, 2**16)
    try:
        return await runner.run(job)
    finally:
        await runner.close()


@holds_all
@pytest.mark.parametrize("way", ["spawn", "fork"])
async def test_this_kernel_takes_the_plan_of_clear(home: Home, way: Literal["spawn", "fork"]) -> None:
    outcome = await run(home, CLEAR, "enforce", way)
    assert outcome.code == Code.OK, outcome
    assert outcome.sandbox is not None
    refused = outcome.result
    assert (refused["state"], refused["scratch"], refused["elsewhere"]) == (errno.EACCES, 0, errno.EACCES)
    assert refused["exec"] in (errno.EACCES, errno.EPERM)
    assert (outcome.sandbox.scope, set(outcome.sandbox.enforced)) == ("call", ALL)


@holds_all
@pytest.mark.parametrize("way", ["spawn", "fork"])
async def test_this_kernel_takes_the_plan_of_open(home: Home, way: Literal["spawn", "fork"]) -> None:
    outcome = await run(home, OPEN, "enforce", way)
    assert outcome.code == Code.OK, outcome
    assert (outcome.result["state"], outcome.result["scratch"]) == (0, 0)
    assert outcome.result["exec"] in (errno.EACCES, errno.EPERM)


BEFORE = """
import os, sys
try:
    sys.refused = not os.memfd_create("program")
except OSError as error:
    sys.refused = error.errno
"""


@holds_all
async def test_no_program_is_made_in_memory_before_the_late_filter_either(home: Home) -> None:
    (home.folder / "sitecustomize.py").write_text(BEFORE)
    (home.folder / "run.py").write_text("import sys\nprint(sys.refused)\n")
    env = {**home.env, "PYTHONPATH": str(home.folder)}
    target = ProcessTarget((sys.executable, "run.py"), env, mode="fork")
    runner = ProcessRunner(Helpers(confinement=confinement(home, "enforce", this_kernel())))
    job = Job("1", "own", "run", "CLEAR", home.folder, target, b"{}", CLEAR, time.monotonic() + 30, 512, 2**16)
    try:
        outcome = await runner.run(job)
        assert (outcome.code, outcome.result) == (Code.OK, errno.EPERM), outcome
        assert [helper["mode"] for helper in runner.state("own")["helpers"]] == ["fork"]
    finally:
        await runner.close()


async def test_mode_off_leaves_a_program_its_ways(home: Home) -> None:
    outcome = await run(home, CLEAR, "off", "spawn")
    assert outcome.result == 1, "the other program was executed, and wrote that"
    assert outcome.sandbox is not None
    assert outcome.sandbox.enforced == ()
