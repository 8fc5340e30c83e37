"""The plugin API: every hook is called with just its arguments, and what an exception in it does."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pluggy import PluginValidationError
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from bus import hookspecs, manifests
from bus.app import create_app
from bus.dispatch import Bus
from bus.errors import DeniedError
from bus.hookspecs import hookimpl
from bus.model import Invocation, Manifest
from bus.plugins import Plugins
from runners.base import Outcome, Runner
from tests.support import (
    FixedStress,
    InProcessRunner,
    a_call,
    add_native,
    add_overlay,
    calls,
    running_bus,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.requests import Request

    from bus.hookspecs import RegisterRoutes, RegisterRunner, RegisterStressSource
    from bus.model import Record
    from bus.settings import Settings

HOOKS = [name for name in vars(hookspecs) if name.startswith("aal_")]


def arguments_of(hook: str) -> list[str]:
    return list(inspect.signature(getattr(hookspecs, hook)).parameters)


def test_the_hooks_and_their_arguments_are_these() -> None:
    assert {hook: arguments_of(hook) for hook in HOOKS} == {
        "aal_register_runners": ["register"],
        "aal_check_overlay": ["manifest", "folder"],
        "aal_authorize": ["invocation", "manifest"],
        "aal_stress_sources": ["register"],
        "aal_invocation_finished": ["record"],
        "aal_routes": ["register", "bus"],
    }


def test_every_hook_is_implemented_in_a_test_of_this_file() -> None:
    tree = ast.parse(Path(__file__).read_text())
    implemented = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert set(HOOKS) <= implemented


# --- Each hook ---------------------------------------------------------------------------------------------------


async def test_a_plugins_runner_is_used_under_a_name_of_its_own(settings: Settings) -> None:
    class Registers:
        @hookimpl
        def aal_register_runners(self, register: RegisterRunner) -> None:
            register(runner)

    runner = InProcessRunner(lambda job: Outcome(result=f"{job.overlay} in process"), name="inside")
    add_native(settings.overlays, "one", {"run": {"runner": "inside"}})
    async with running_bus(settings, Registers()) as bus:
        answer = await bus.invoke(a_call("one"))
    assert answer.body["result"] == "one in process"
    assert calls(settings)[0]["runner"] == "inside"
    assert runner.closed


@pytest.mark.parametrize("lacking", ["forget", "state", "shares", "relieve", "purge", "close(*, at_once)"])
def test_a_runner_that_was_made_for_another_version_stops_the_start_and_says_what_it_lacks(
    settings: Settings, lacking: str
) -> None:
    async def close(self: object) -> None:
        """Ends nothing at once."""

    runner = InProcessRunner(name="old")
    members = {
        name: getattr(runner, name)
        for name in ("run", "state", "shares", "relieve", "purge", "forget", "close")
        if name != lacking
    }
    old = type("Old", (), {"name": "old", **members} | ({"close": close} if lacking.startswith("close") else {}))()

    class Registers:
        @hookimpl
        def aal_register_runners(self, register: RegisterRunner) -> None:
            register(old)

    with pytest.raises(PluginValidationError, match=f"has no {re.escape(lacking)}$"):
        Bus(settings, plugins=[Registers()])


def test_a_later_runner_of_the_same_name_takes_the_place_of_a_built_in(settings: Settings) -> None:
    runner = InProcessRunner(name="proc")
    runners: dict[str, Runner] = Plugins(settings, [runner]).runners()
    assert runners["proc"] is runner
    assert set(runners) == {"proc", "http"}


async def test_an_overlay_is_checked_by_plugins_when_it_is_loaded(settings: Settings) -> None:
    seen: list[tuple[Manifest, Path]] = []

    class Checks:
        @hookimpl
        def aal_check_overlay(self, manifest: Manifest, folder: Path) -> Iterable[str]:
            seen.append((manifest, folder))
            return ["first fault", "second fault"] if manifest.name == "bad" else ()

    good = add_overlay(settings.overlays, "good")
    add_overlay(settings.overlays, "bad")
    async with running_bus(settings, Checks()) as bus:
        assert (await bus.invoke(a_call("good"))).ok
        refused = await bus.invoke(a_call("bad"))
    assert {manifest.name for manifest, _ in seen} == {"good", "bad"}
    assert all(isinstance(manifest, Manifest) for manifest, _ in seen)
    assert good in {folder for _, folder in seen}
    assert refused.body["code"] == "ERR_OVERLAY_BROKEN"
    assert "first fault" in str(refused.body["faults"])
    assert "second fault" in str(refused.body["faults"])


@pytest.mark.parametrize(
    ("command", "mode", "is_fault"),
    [
        (["python3", "run.py"], "fork", False),
        (["python3", "-c", "print(1)"], "fork", True),
        (["sh", "run.sh"], "fork", True),
        (["sh", "run.sh"], "auto", False),
        (["sh", "run.sh"], "spawn", False),
    ],
)
def test_a_fork_that_was_asked_for_is_of_a_python_script(
    settings: Settings, command: list[str], mode: str, is_fault: bool
) -> None:
    entrypoints = {"proc": {"command": command, "mode": mode}}
    folder = add_native(settings.overlays, "one", {"run": {"runner": "proc"}}, entrypoints=entrypoints)
    (folder / "run.py").touch()
    manifest = manifests.read(folder)
    faults = Plugins(settings).check_overlay(manifest, folder)
    assert len(faults) == is_fault
    assert all("mode fork" in fault and command[0] in fault for fault in faults)


@pytest.mark.parametrize(
    ("path", "is_fault"),
    [("/", True), (".aal", True), (".aal/tokens.json", True), (".aal/state/other", True), ("logs/overlays", True),
     ("overlays", True), ("overlays/other/run.py", True), ("elsewhere", True), ("elsewhere/run.py", True),
     ("aal.toml", True), ("profiles", True), ("profiles/FAST.rune", True), ("overlays/one", False),
     ("overlays/one/data", False), ("data", False), (".aal/state/one", False), (".aal/state/one/cache", False),
     ("logs-of-mine", False), ("/usr/share", False)],
)  # fmt: skip
def test_no_right_reaches_what_the_bus_keeps_for_itself(settings: Settings, path: str, is_fault: bool) -> None:
    """`elsewhere` is the folder of an overlay that a link among the overlays leads to.

    To write where its manifest is, an overlay has no right anyway.
    """
    home = settings.overlays.parent
    settings = replace(settings, file=home / "aal.toml")
    (settings.overlays / "linked").symlink_to(home / "elsewhere")
    rights = ("read",) if (settings.overlays / "one").is_relative_to(home / path) else ("read", "write")
    capabilities = {right: {"runner": "proc", "rights": {right: [str(home / path)]}} for right in rights}
    folder = add_native(settings.overlays, "one", capabilities)
    faults = Plugins(settings).check_overlay(manifests.read(folder), folder)
    assert [path.strip("/") in fault for fault in faults] == [True] * is_fault * len(rights)


def test_what_the_bus_keeps_for_itself_is_out_of_reach_for_every_process(settings: Settings) -> None:
    kept = Plugins(settings).confinement.kept
    own = {settings.state, settings.logs, settings.overlays, settings.file, settings.profiles}
    assert own == set(kept)


def test_folders_that_are_set_for_scratch_are_kept_as_well(settings: Settings) -> None:
    home = settings.overlays.parent
    settings = replace(settings, scratch_cold=str(home / "cold"), scratch_local="/dev/shm")
    assert home / "cold" in Plugins(settings).confinement.kept
    assert Path("/dev/shm") not in Plugins(settings).confinement.kept
    folder = add_native(settings.overlays, "one", {"run": {"runner": "proc", "rights": {"read": [str(home / "cold")]}}})
    (fault,) = Plugins(settings).check_overlay(manifests.read(folder), folder)
    assert "cold" in fault


def test_an_overlay_that_the_bus_works_in_has_no_right_to_what_the_bus_keeps_there(settings: Settings) -> None:
    """Its folder is its own, but what is kept lies deeper."""
    home = settings.overlays.parent
    rights = {"read": [str(home / ".aal/secrets.json"), str(home / "data")]}
    folder = add_native(settings.overlays, "one", {"run": {"runner": "proc", "rights": rights}})
    manifest = replace(manifests.read(folder), folder=home.resolve())
    (fault,) = Plugins(settings).check_overlay(manifest, folder)
    assert ".aal" in fault


async def test_a_plugin_that_fails_to_check_an_overlay_keeps_it_out(settings: Settings) -> None:
    class Fails:
        @hookimpl
        def aal_check_overlay(self, manifest: Manifest) -> Iterable[str]:
            raise ZeroDivisionError(manifest.name)

    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, Fails()) as bus:
        assert (await bus.invoke(a_call("echo"))).body["code"] == "ERR_OVERLAY_BROKEN"


async def test_a_gate_is_asked_after_the_bus_itself_has_agreed(settings: Settings) -> None:
    seen: list[tuple[Any, Any]] = []

    class Gate:
        @hookimpl
        def aal_authorize(self, invocation: Invocation, manifest: Manifest) -> None:
            seen.append((invocation, manifest))

    add_overlay(settings.overlays, "echo")
    call = a_call("echo")
    async with running_bus(settings, InProcessRunner(), Gate()) as bus:
        assert (await bus.invoke(call)).ok
        assert not (await bus.invoke(a_call("echo", phase="ASCEND"))).ok
    ((invocation, manifest),) = seen
    assert invocation is call
    assert isinstance(manifest, Manifest)
    assert manifest.name == "echo"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeniedError("ERR_PERMISSION_DENIED", "the plugin's words"), "ERR_PERMISSION_DENIED"),
        (DeniedError("ERR_VETOED", "the plugin's words"), "ERR_VETOED"),
        (ZeroDivisionError("the plugin's words"), "ERR_VETOED"),
    ],
)
async def test_whatever_a_gate_raises_denies(settings: Settings, error: Exception, code: str) -> None:
    class Gate:
        @hookimpl
        def aal_authorize(self) -> None:
            raise error

    add_overlay(settings.overlays, "echo")
    runner = InProcessRunner()
    async with running_bus(settings, runner, Gate()) as bus:
        answer = await bus.invoke(a_call("echo"))
    assert (answer.http_status, answer.body["code"]) == (403, code)
    assert "the plugin's words" in answer.body["detail"]
    assert runner.jobs == []
    assert calls(settings)[0]["type"] == "denied"


async def test_the_stress_of_the_bus_is_the_largest_of_its_sources(settings: Settings) -> None:
    class Source:
        @hookimpl
        def aal_stress_sources(self, register: RegisterStressSource) -> None:
            register("gpu", lambda: 0.625)

    async with running_bus(settings, FixedStress(0.1), Source()) as bus:
        assert bus.stress.value == 0.625
        assert bus.stress.report()["sources"] == {"memory": 0.1, "pressure": None, "gpu": 0.625}


async def test_a_bus_measures_memory_and_pressure_by_itself(settings: Settings) -> None:
    assert Plugins(settings).stress_sources() == {}
    async with running_bus(settings) as bus:
        assert set(bus.stress.report()["sources"]) == {"memory", "pressure"}
        assert 0 < bus.stress.free_mb <= bus.stress.total_mb


async def test_an_observer_sees_each_record_as_it_stands_in_the_ledger(settings: Settings) -> None:
    seen: list[Record] = []

    class Observer:
        @hookimpl
        def aal_invocation_finished(self, record: Record) -> None:
            seen.append(record)

    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, InProcessRunner(), Observer()) as bus:
        await bus.invoke(a_call("echo"))
        await bus.invoke(a_call("nobody"))
    written = calls(settings)
    assert [record["code"] for record in seen] == ["OK", "ERR_UNKNOWN_OVERLAY"]
    for record, line in zip(seen, written, strict=True):
        assert (record["seq"], record["hash"]) == (line["seq"], line["hash"])
        assert {name: line[name] for name in line if name not in {"v", "prev", "payload", "result"}}.items() <= (
            record.items()
        )


async def test_an_observer_that_fails_is_dropped_and_the_others_are_still_called(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    class Fails:
        @hookimpl
        def aal_invocation_finished(self, record: Record) -> None:
            raise ZeroDivisionError(record["code"])

    class Observer:
        @hookimpl
        def aal_invocation_finished(self, record: Record) -> None:
            seen.append(record["code"])

    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, InProcessRunner(), Observer(), Fails(), Observer()) as bus:
        assert (await bus.invoke(a_call("echo"))).ok
    assert seen == ["OK", "OK"]
    assert "ZeroDivisionError: OK" in caplog.text


def test_a_plugin_adds_routes_after_those_of_the_bus(settings: Settings) -> None:
    seen: list[Bus] = []

    def greet(_: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    class Adds:
        @hookimpl
        def aal_routes(self, register: RegisterRoutes, bus: Bus) -> None:
            seen.append(bus)
            register([Route("/greeting", greet), Route("/health", greet)])

    bus = Bus(settings, plugins=[Adds()])
    client = TestClient(create_app(bus=bus))
    assert client.get("/greeting").text == "hello"
    assert client.get("/health").json() == {"status": "ok"}
    assert seen == [bus]


# --- Loading -----------------------------------------------------------------------------------------------------


def test_a_hook_that_does_not_exist_stops_the_start(settings: Settings) -> None:
    class Misspelt:
        @hookimpl
        def aal_invocation_finish(self, record: Record) -> None:
            """Never called."""

    with pytest.raises(PluginValidationError, match="aal_invocation_finish"):
        Plugins(settings, [Misspelt()])


def test_an_argument_that_a_hook_does_not_have_stops_the_start(settings: Settings) -> None:
    class Misspelt:
        @hookimpl
        def aal_invocation_finished(self, records: Record) -> None:
            """Never called."""

    with pytest.raises(PluginValidationError, match="records"):
        Plugins(settings, [Misspelt()])


@pytest.mark.parametrize("hook", ["aal_register_runners", "aal_stress_sources"])
def test_a_plugin_that_fails_to_register_stops_the_start(settings: Settings, hook: str) -> None:
    def fail(register: object) -> None:
        raise ZeroDivisionError(str(register))

    plugin = type("Fails", (), {hook: staticmethod(hookimpl(fail))})()
    with pytest.raises(ZeroDivisionError):
        Bus(settings, plugins=[plugin])


def test_each_bus_has_a_manager_of_its_own(settings: Settings) -> None:
    runner = InProcessRunner(name="inside")
    assert "inside" in Plugins(settings, [runner]).runners()
    assert "inside" not in Plugins(settings).runners()
