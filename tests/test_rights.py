"""Rights through the runners, with real programs: what a phase allows works, what it forbids fails, and is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from bus.model import Phase
from bus.policy import PHASES, authorize
from runners import helpers
from runners.base import TIERS, Code, HttpTarget, Job, ProcessTarget, Rights, Sandbox, ServiceTarget, Workers
from runners.confinement import RIGHTS, Confinement
from runners.helpers import Helpers
from runners.http import EXTERNAL, HttpRunner
from runners.kernel import ABI_OF_SCOPES, Kernel, this_kernel
from runners.process import ProcessRunner
from runners.services import Services
from runners.tiers import Tiers
from tests import programs
from tests.runner_fixtures import nothing_left  # noqa: F401  # pytest finds it by its name
from tests.support import PATIENCE_S, a_capability, a_manifest, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from runners.base import Mode, Outcome, SandboxMode, Tier

WITHOUT_LANDLOCK = Kernel(0, "this kernel has no Landlock", None)
SCRIPT = str(programs.FOLDER / "rights.py")
KINDS = ["spawn", "fork", "worker", "service"]
SCOPE = {"spawn": "call", "fork": "call", "worker": "pool", "service": "service"}

needs_landlock = pytest.mark.skipif(
    this_kernel().landlock_abi < ABI_OF_SCOPES or this_kernel().no_seccomp is not None,
    reason=f"this kernel has no Landlock of ABI {ABI_OF_SCOPES} or no seccomp",
)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_phase = pytest.mark.parametrize("phase", list(Phase))


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": True})


@dataclass(frozen=True)
class Outside:
    """What lies around an overlay, and what answers there."""

    folder: Path
    tcp: int
    udp: int

    @property
    def secret(self) -> str:
        return str(self.folder / "secret")

    @property
    def is_untouched(self) -> bool:
        return Path(self.secret).read_text() == "hidden"

    @property
    def socket(self) -> str:
        return str(self.folder / "socket")

    @property
    def state(self) -> str:
        return str(self.folder / "state")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    (tmp_path / "secret").write_text("hidden")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "mine").write_text("kept")
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        unix.bind(str(tmp_path / "socket"))
        unix.listen(64)
        yield Outside(tmp_path, tcp.getsockname()[1], udp.getsockname()[1])


class House:
    """Both runners of a bus, whose processes are confined."""

    def __init__(self, outside: Outside, mode: SandboxMode = "best-effort", **changes: Any) -> None:
        namespace = changes.pop("namespace", True)
        self.root = outside.folder / "scratch"
        places = dict.fromkeys(TIERS, self.root)  # also without a namespace, where LOCAL would be in /dev/shm
        tiers = Tiers(self.root, dict.fromkeys(TIERS, 16), {} if namespace else places)
        values: dict[str, Any] = {"tiers": tiers, "max_processes": 64}
        self.confinement = Confinement(mode=mode, **values | changes)
        self.outside = outside
        self.helpers = self._helpers(namespace)
        self.process = ProcessRunner(self.helpers, kill_grace_s=0.1)
        self.http = HttpRunner(Services(self._helpers(namespace), None, kill_grace_s=0.1, drain_s=5.0))

    def _helpers(self, namespace: bool) -> Helpers:
        return Helpers(namespace=namespace, confinement=self.confinement)

    async def run(self, kind: str, rights: Rights, *tries: Any, phase: str = "OPEN", **job: Any) -> Outcome:
        """Have them tried by a process of this kind and these rights, one after the other."""
        target = self._target(kind, rights, job.get("tier", "LOCAL"))
        payload = {"try": [list(each) for each in tries]}
        made = programs.make_job(target, payload, timeout_s=PATIENCE_S)
        made = made._replace(envelope=self._envelope(made, payload), rights=rights, phase=phase, **job)
        return await (self.http if kind == "service" else self.process).run(made)

    async def tried(self, kind: str, rights: Rights, *tries: Any, **job: Any) -> tuple[list[str], Sandbox]:
        """What each gave, and what the process was held to."""
        outcome = await self.run(kind, rights, *tries, **job)
        assert (outcome.code, outcome.error, outcome.log) == (Code.OK, None, "")
        assert outcome.sandbox is not None
        result = outcome.result["result"] if kind == "worker" else outcome.result
        return result, outcome.sandbox

    def _envelope(self, job: Job, payload: Any) -> bytes:
        return json.dumps({"request_id": job.request_id, "payload": payload}).encode()

    def _target(self, kind: str, rights: Rights, tier: Tier) -> ProcessTarget | HttpTarget:
        env = programs.ENV | {"OVERLAY_STATE": self.outside.state}
        argv = (sys.executable, SCRIPT)
        if kind == "service":
            service = ServiceTarget((*argv, "service"), env, max_mb=256, rights=rights, tier=tier)
            return HttpTarget("/", "POST", service=service)
        if kind == "worker":
            return ProcessTarget((*argv, "worker"), env, mode="worker", workers=Workers(max_mb=256, tier=tier))
        mode: Mode = "fork" if kind == "fork" else "spawn"
        return ProcessTarget(argv, env, mode=mode)

    async def close(self) -> None:
        await self.process.close()
        await self.http.close()

    @property
    def scratch(self) -> list[Path]:
        """What lies in the scratch root, but for what says who is alive."""
        return [path for path in self.root.iterdir() if path.suffix != ".lock"]

    @property
    def in_use(self) -> list[Path]:
        """The scratch folders of calls, as far as they can be seen from here: those without a namespace."""
        return [folder for helper in self.scratch for folder in helper.iterdir()]


@contextlib.asynccontextmanager
async def a_house(outside: Outside, mode: SandboxMode = "best-effort", **changes: Any) -> AsyncIterator[House]:
    house = House(outside, mode, **changes)
    try:
        yield house
    finally:
        await house.close()


@pytest.fixture
async def house(outside: Outside) -> AsyncIterator[House]:
    async with a_house(outside) as made:
        yield made


def rights_of(phase: Phase) -> Rights:
    rule = PHASES[phase]
    return Rights(rule.write, rule.network, rule.exec)


def a_program() -> str:
    return os.path.realpath("/bin/true")


@needs_landlock
@each_phase
@each_kind
async def test_a_phase_allows_what_its_row_of_the_table_says_and_no_more(
    house: House, outside: Outside, kind: str, phase: Phase
) -> None:
    rights = rights_of(phase)
    tries = {
        ("read", SCRIPT): True,
        ("read", "/etc/passwd"): True,
        ("read", outside.state + "/mine"): True,
        ("read", outside.secret): False,
        ("write_in", "OVERLAY_SCRATCH", "a"): True,
        ("write_in", "TMPDIR", "b"): True,
        ("write", outside.state + "/new"): rights.write,
        ("mode", outside.state + "/mine"): rights.write,
        ("write", outside.secret): False,
        ("write", SCRIPT + ".new"): False,
        ("tcp", outside.tcp): rights.network is True,
        ("udp", outside.udp): rights.network is True,
        ("unix", outside.socket): rights.network is True,
        ("execute", a_program()): rights.exec,
        ("kill", os.getpid()): False,
        ("unshare",): False,
    }
    result, sandbox = await house.tried(kind, rights, *tries, phase=phase)
    found = dict(zip(tries, result, strict=True))
    refusals = {"EPERM", "EACCES", "ESRCH"}
    assert {what: gave not in refusals for what, gave in found.items()} == tries
    assert outside.is_untouched
    assert sandbox.scope == SCOPE[kind]
    assert set(sandbox.enforced) >= {"read", "write", "network", "system", "limits", "processes"}
    assert set(sandbox.enforced) | {why.partition(":")[0] for why in sandbox.missing} == set(RIGHTS)


@needs_landlock
@each_kind
async def test_a_service_alone_may_listen_without_the_network_and_on_its_own_port_only(house: House, kind: str) -> None:
    (found,), _ = await house.tried(kind, Rights(), ("listen",))
    assert found in {"EPERM", "EACCES"}


@needs_landlock
@each_kind
@pytest.mark.parametrize("network", [False, (443,)])
async def test_where_a_service_may_listen_unasked_its_record_says_so(
    house: House, kind: str, network: bool | tuple[int, ...]
) -> None:
    (found,), sandbox = await house.tried(kind, Rights(network=network), ("listen_unbound",))
    assert "network" in sandbox.enforced
    assert found == ("listening" if kind == "service" else "EPERM")
    said = "network: a service may listen on all addresses, and on a port that the kernel picks"
    assert (said in sandbox.missing) == (kind == "service")


@needs_landlock
@each_kind
async def test_a_network_of_ports_has_those_ports(house: House, outside: Outside, kind: str) -> None:
    rights = Rights(network=(outside.tcp,))
    with socket.create_server(("127.0.0.1", 0)) as another:
        tries = ("tcp", outside.tcp), ("tcp", another.getsockname()[1]), ("udp", outside.udp)
        found, sandbox = await house.tried(kind, rights, *tries)
    assert found == ["connected", "EACCES", "EPERM"]
    assert "network" in sandbox.enforced


@needs_landlock
@each_kind
async def test_paths_of_a_manifest_are_given_beside_the_built_in_ones(
    house: House, outside: Outside, kind: str
) -> None:
    (outside.folder / "given").mkdir()
    rights = Rights(write=True, read_paths=(outside.secret,), write_paths=(str(outside.folder / "given"),))
    found, _ = await house.tried(
        kind, rights, ("read", outside.secret), ("write", outside.secret), ("write", f"{outside.folder}/given/a")
    )
    assert found == ["hidden", "EACCES", "1"]


@needs_landlock
@pytest.mark.parametrize("kind", ["spawn", "fork", "worker"])
async def test_a_link_that_one_phase_lays_in_the_folder_leads_another_phase_nowhere(
    house: House, outside: Outside, kind: str
) -> None:
    folder = outside.folder / "overlay"
    (folder / "out").mkdir(parents=True)
    (outside.folder / "others").mkdir()
    (outside.folder / "others/key").write_text("hidden")
    writes = a_capability(name="writes", write_paths=(str(folder / "out"),))
    reads = a_capability(name="reads", read_paths=(SCRIPT, str(folder / "out/x")))
    held = a_manifest(capabilities={one.name: one for one in (writes, reads)})
    deeds = {
        (writes, Phase.OPEN): ("link", f"{folder}/out/x", f"{outside.folder}/others"),
        (writes, Phase.CLEAR): ("read", f"{folder}/out/x/key"),
        (reads, Phase.CLEAR): ("read", f"{folder}/out/x/key"),
        (reads, Phase.OPEN): ("read", f"{folder}/out/x/key"),
    }
    found = []
    for (capability, phase), deed in deeds.items():
        rights = authorize(held, capability, phase, {})
        rights = rights._replace(read_paths=(SCRIPT, *rights.read_paths))
        (gave,), _ = await house.tried(kind, rights, deed, phase=phase, folder=folder)
        found.append(gave)
    assert found == ["linked", "EACCES", "EACCES", "EACCES"]


@needs_landlock
@each_kind
async def test_limits_hold_and_cannot_be_raised(house: House, kind: str) -> None:
    (limits, written), _ = await house.tried(kind, Rights(), ("limits",), ("write_in", "OVERLAY_SCRATCH", "a"))
    assert limits == "core 0, not raised"
    assert written.endswith("[]")


@each_kind
async def test_with_the_sandbox_off_everything_works_and_the_outcome_says_so(outside: Outside, kind: str) -> None:
    async with a_house(outside, "off") as house:
        found, sandbox = await house.tried(kind, Rights(), ("read", outside.secret), ("tcp", outside.tcp))
    assert found == ["hidden", "connected"]
    assert sandbox == Sandbox(sandbox.scope, (), tuple(f"{right}: off" for right in RIGHTS))
    assert sandbox.scope == SCOPE[kind]


@each_kind
async def test_a_kernel_without_landlock_is_said_to_hold_less(outside: Outside, kind: str) -> None:
    async with a_house(outside, kernel=WITHOUT_LANDLOCK) as house:
        (found,), sandbox = await house.tried(kind, Rights(), ("read", outside.secret))
    assert found == "hidden"
    assert not {"read", "write"} & set(sandbox.enforced)
    assert "read: this kernel has no Landlock" in sandbox.missing


@each_kind
async def test_under_enforce_what_cannot_be_held_does_not_start(outside: Outside, kind: str) -> None:
    async with a_house(outside, "enforce", kernel=WITHOUT_LANDLOCK) as house:
        outcome = await house.run(kind, Rights(), ("write", outside.secret))
    assert (outcome.code, outcome.retryable, outcome.sandbox) == (Code.SANDBOX, False, None)
    assert "this kernel has no Landlock" in (outcome.error or "")
    assert outside.is_untouched


@each_kind
async def test_under_enforce_without_a_namespace_nothing_of_an_overlay_is_started(
    outside: Outside, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even its interpreter, which would otherwise be one before anybody looks at what was given."""
    monkeypatch.setattr(helpers, "Helper", lambda *_, **__: pytest.fail("a helper was started"))
    async with a_house(outside, "enforce", namespace=False) as house:
        outcome = await house.run(kind, Rights(), ("read", outside.secret))
    assert (outcome.code, outcome.retryable) == (Code.SANDBOX, False)
    assert "no pid namespace" in (outcome.error or "")


@needs_landlock
@each_kind
async def test_under_enforce_what_can_be_held_runs(outside: Outside, kind: str) -> None:
    async with a_house(outside, "enforce") as house:
        (found,), _ = await house.tried(kind, Rights(), ("read", outside.secret))
    assert found == "EACCES"


@each_kind
async def test_too_many_processes_end_the_call_and_are_named(outside: Outside, kind: str) -> None:
    async with a_house(outside, max_processes=10) as house:
        outcome = await house.run(kind, Rights(), ("breed", 40))
    assert outcome.code == Code.PROCESS_LIMIT
    assert "too many processes" in (outcome.error or "")
    assert "10" in (outcome.error or "")
    assert not outcome.retryable


@each_kind
async def test_memory_beyond_twice_what_is_allowed_is_not_given(house: House, kind: str) -> None:
    """A call's own HARD where the process is its own, else `max_mb` of the manifest, which is 256 here."""
    (little, much), _ = await house.tried(kind, Rights(), ("allocate", 100), ("allocate", 800), hard_mb=256)
    assert (little, much) == ("100", "MemoryError")


@pytest.mark.parametrize("kind", ["spawn", "fork"])
@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])
async def test_each_of_many_calls_at_once_has_a_scratch_folder_of_its_own_and_nothing_stays(
    outside: Outside, kind: str, namespace: bool
) -> None:
    async with a_house(outside, namespace=namespace) as house:
        calls = [house.tried(kind, Rights(), ("write_in", "OVERLAY_SCRATCH", "same")) for _ in range(12)]
        found = [result for (result,), _ in await asyncio.gather(*calls)]
        assert len(set(found)) == len(calls)
        assert {result.partition(" ")[2] for result in found} == {"[]"}
        assert not house.in_use
    assert house.scratch == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])
async def test_scratch_is_gone_after_a_crash(outside: Outside, kind: str, namespace: bool) -> None:
    async with a_house(outside, namespace=namespace) as house:
        outcome = await house.run(kind, Rights(), ("leave", "deep"))
        assert outcome.code in {
            Code.CRASH,
            Code.UNREACHABLE,
        }  # of a service, as its connection may be seen to end first
        assert outcome.sandbox is not None
        if outcome.code == Code.UNREACHABLE:
            await until(lambda: not house.in_use)
        assert not house.in_use
    assert house.scratch == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])
async def test_scratch_is_gone_after_its_helper_was_killed(outside: Outside, kind: str, namespace: bool) -> None:
    async with a_house(outside, namespace=namespace) as house:
        running = asyncio.create_task(house.run(kind, Rights(), ("write_in", "OVERLAY_SCRATCH", "a"), ("breed", 0)))
        helpers: list[psutil.Process] = []

        def has_written() -> bool:
            helpers[:] = psutil.Process().children()
            return any(_scratch_has(helper, house, "a") for helper in helpers)

        await until(has_written)
        for process in [inside for helper in helpers for inside in helper.children()] + helpers:
            process.send_signal(signal.SIGKILL)
        outcome = await running
        assert outcome.code == Code.CRASH
        await until(lambda: house.scratch == [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])
async def test_scratch_on_the_disk_is_gone_after_its_helper_was_killed(
    outside: Outside, kind: str, namespace: bool
) -> None:
    async with a_house(outside, namespace=namespace) as house:
        tries = ("write_in", "OVERLAY_SCRATCH", "a"), ("breed", 0)
        running = asyncio.create_task(house.run(kind, Rights(), *tries, tier="EXTENDED"))
        await until(lambda: house.root.exists() and bool(list(house.root.rglob("a"))))
        helpers = psutil.Process().children()
        for process in [inside for helper in helpers for inside in helper.children()] + helpers:
            process.send_signal(signal.SIGKILL)
        assert (await running).code == Code.CRASH
        await until(lambda: house.scratch == [])


def tiers_in(folder: Path, mb: int = 16) -> Tiers:
    """Each with a folder of its own."""
    return Tiers(folder / "scratch", dict.fromkeys(TIERS, mb), {tier: folder / tier for tier in TIERS})


@needs_landlock
@each_kind
@pytest.mark.parametrize("namespace", [True, False], ids=["namespace", "subreaper"])
@pytest.mark.parametrize("tier", ["EXTENDED", "COLD"])
async def test_a_call_may_write_to_the_place_of_its_tier_and_to_no_other(
    outside: Outside, kind: str, namespace: bool, tier: Tier
) -> None:
    others = [outside.folder / other for other in TIERS if other != tier]
    for other in others:
        other.mkdir()
    tries = [("write_in", "OVERLAY_SCRATCH", "a"), *(("write", f"{other}/new") for other in others)]
    async with a_house(outside, namespace=namespace, tiers=tiers_in(outside.folder)) as house:
        (written, *refused), _ = await house.tried(kind, Rights(write=True), *tries, tier=tier)
        assert written.startswith(str(outside.folder / tier))
        assert refused == ["EACCES", "EACCES"]
    assert [list((outside.folder / tier).iterdir()) for tier in TIERS] == [[], [], []]


@pytest.mark.parametrize("kind", ["spawn", "fork"])
async def test_calls_of_two_tiers_of_one_overlay_run_at_once(outside: Outside, kind: str) -> None:
    async with a_house(outside, tiers=tiers_in(outside.folder)) as house:
        calls = [
            house.tried(kind, Rights(), ("write_in", "OVERLAY_SCRATCH", "a"), tier=tier)
            for tier in TIERS
            for _ in range(4)
        ]
        found = [result.partition(" ")[0] for (result,), _ in await asyncio.gather(*calls)]
        assert [Path(path).relative_to(outside.folder).parts[0] for path in found] == [
            tier for tier in TIERS for _ in range(4)
        ]
        assert {helper["tier"] for helper in house.helpers.state("test")} == set(TIERS)


@each_kind
@pytest.mark.parametrize("tier", ["LOCAL", "COLD"])
async def test_too_much_in_scratch_ends_the_call_and_the_figure_is_told(
    outside: Outside, kind: str, tier: Tier
) -> None:
    async with a_house(outside, tiers=Tiers.all_in(outside.folder / "scratch", 1)) as house:
        outcome = await house.run(kind, Rights(), ("fill", 30), ("breed", 0), tier=tier)
    assert outcome.code == Code.SCRATCH_LIMIT
    assert "too much in scratch: " in (outcome.error or "")
    assert "where 1024 are allowed" in (outcome.error or "")
    assert not outcome.retryable


@pytest.mark.parametrize("kind", ["spawn", "fork"])
async def test_a_call_that_was_refused_more_room_has_the_tier_and_the_quota_in_its_hint(
    outside: Outside, kind: str
) -> None:
    async with a_house(outside, tiers=Tiers.all_in(outside.folder / "scratch", 1)) as house:
        outcome = await house.run(kind, Rights(), ("outgrow", 2), tier="EXTENDED")
    assert outcome.code == Code.CRASH
    assert outcome.hint == "It may have filled its scratch folder: tier EXTENDED has 1 MiB a call."


def _scratch_has(helper: psutil.Process, house: House, name: str) -> bool:
    """Whether there is such a file in scratch, as the process inside sees it."""
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return any(list(Path(f"/proc/{inside.pid}/root{house.root}").rglob(name)) for inside in helper.children())
    return False


async def test_of_a_service_that_the_bus_did_not_start_nothing_is_held(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=answer)
        thread.start()
        outcome = await house.http.run(programs.make_job(HttpTarget(f"http://127.0.0.1:{port}/", "POST")))
        thread.join()
    assert (outcome.code, outcome.sandbox) == (Code.OK, EXTERNAL)
    assert (EXTERNAL.scope, EXTERNAL.enforced, len(EXTERNAL.missing)) == ("none", (), len(RIGHTS))


async def test_what_was_not_started_was_held_to_nothing(house: House) -> None:
    target = ProcessTarget(("no-such-program",), programs.ENV, mode="spawn")
    outcome = await house.process.run(programs.make_job(target))
    assert (outcome.code, outcome.sandbox) == (Code.START, None)
