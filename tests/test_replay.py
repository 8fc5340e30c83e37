"""A line run again: what the overlay sees, the verdict, and which lines cannot be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bus.drift import Change, Difference
from bus.errors import BusError, NotFoundError, ReplayError
from bus.local import LocalBus
from bus.records import BrokenLineError
from bus.replay import replay
from bus.secrets import Secrets
from runners.base import Outcome, Sandbox
from tests.support import (
    FixedStress,
    InProcessRunner,
    a_call,
    add_overlay,
    add_script,
    calls,
    lines,
    misfits,
    running_bus,
)

if TYPE_CHECKING:
    from pathlib import Path

    from bus.settings import Settings
    from runners.base import Job

DETERMINISTIC: dict[str, Any] = {"policy": {"deterministic": True}}


@pytest.fixture
def overlay(settings: Settings) -> Path:
    """An overlay whose answer depends on its payload alone."""
    script = """tr -d '\\n' | sed 's/.*"payload":\\({[^}]*}\\).*/{"ok":true,"result":\\1}/'"""
    return add_script(settings.overlays, "pure", script, **DETERMINISTIC)


def sent(job: Job) -> dict[str, Any]:
    """What the overlay was sent, but for its deadline, which is always of the present."""
    envelope: dict[str, Any] = orjson.loads(job.envelope)
    return {name: value for name, value in envelope.items() if name != "deadline_ms"}


@pytest.mark.usefixtures("overlay")
async def test_the_same_result_is_a_match_and_leaves_a_line_of_its_own(settings: Settings) -> None:
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("pure", data={"text": "hello"}, seed=3))
        again = await replay(bus, 1)
    assert (again.seq, again.verdict, again.differs) == (1, "MATCH", ())
    assert again.answer.body["result"] == {"text": "hello"}
    recorded, replayed = calls(settings)
    assert (replayed["type"], replayed["replay_of"], recorded["replay_of"]) == ("replay", 1, None)
    assert replayed["request_id"] != recorded["request_id"]
    assert replayed["result_hash"] == recorded["result_hash"]
    assert misfits("record", replayed) == []
    assert misfits("outcome", again.answer.json) == []
    assert orjson.loads(orjson.dumps(again.body()))["verdict"] == "MATCH"


async def test_the_overlay_sees_what_it_saw_the_first_time(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    runner, stress = InProcessRunner(lambda _: Outcome(result=1)), FixedStress(0.9)
    async with running_bus(settings, runner, stress) as bus:
        await bus.invoke(a_call("echo"))
        await bus.invoke(a_call("echo", data={"a": [1, None, "ü"]}, profile="BALANCED", timeout_ms=5000))
        stress.value = 0.0
        for _ in range(10):
            bus.stress.sample()
        again = await replay(bus, 3)
    first, second = (sent(job) for job in runner.jobs[-2:])
    assert second == first
    assert runner.jobs[-1].request_id == runner.jobs[-2].request_id == first["request_id"]
    assert first["memory"]["applied"]
    assert first["provenance"]["prev_size"] == 2
    assert (again.verdict, again.differs) == ("MATCH", ())


async def test_a_seed_and_a_run_id_are_kept(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        await bus.invoke(a_call("echo", seed="salt"))
        await bus.invoke(a_call("echo"))
        await replay(bus, 1)
        await replay(bus, 3)
    with_seed, without, with_seed_again, without_again = (sent(job) for job in runner.jobs)
    assert with_seed == with_seed_again
    assert without == without_again
    assert with_seed["seed"] == "salt"


async def test_another_result_is_a_drift(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    results = iter(["first", "second"])
    async with running_bus(settings, InProcessRunner(lambda _: Outcome(result=next(results)))) as bus:
        await bus.invoke(a_call("echo"))
        again = await replay(bus, 1)
    assert (again.verdict, again.differs) == ("DRIFT", ("result",))


async def test_another_code_is_a_drift(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    outcomes = iter([Outcome(result=1), Outcome(code="ERR_OVERLAY_CRASH", error="gone")])
    async with running_bus(settings, InProcessRunner(lambda _: next(outcomes))) as bus:
        await bus.invoke(a_call("echo"))
        again = await replay(bus, 1)
    assert (again.verdict, again.differs) == ("DRIFT", ("result",))


async def test_changed_code_is_told_beside_the_verdict_on_the_result(settings: Settings, overlay: Path) -> None:
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("pure", data={"n": 1}))
        (overlay / "note.txt").write_text("nothing that matters")
        same_result = await replay(bus, 1)
        (overlay / "run.sh").write_text("echo 2")
        other_result = await replay(bus, 1)
    assert (same_result.verdict, same_result.differs) == ("MATCH", ("code",))
    assert (other_result.verdict, other_result.differs) == ("DRIFT", ("result", "code"))


async def test_a_changed_manifest_is_told(settings: Settings, overlay: Path) -> None:
    manifest = overlay / "manifest.json"
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("pure", data={"n": 1}))
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": "2.0.0"}))
        again = await replay(bus, 1)
    assert (again.verdict, again.differs) == ("MATCH", ("manifest",))


async def test_a_call_that_was_cut_off_cannot_be_replayed(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    runner = InProcessRunner(lambda _: Outcome(code="ERR_CANCELLED", error="the caller went away"))
    async with running_bus(settings, runner) as bus:
        await bus.invoke(a_call("echo"))
        with pytest.raises(ReplayError, match="ended with ERR_CANCELLED"):
            await replay(bus, 1)


@pytest.mark.usefixtures("overlay")
async def test_another_environment_is_told(settings: Settings) -> None:
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("pure", data={"n": 1}))
        bus.environment_hash = "f" * 64
        again = await replay(bus, 1)
    assert (again.verdict, again.differs) == ("MATCH", ("environment",))


async def test_a_failure_that_fails_alike_is_a_match(settings: Settings) -> None:
    add_script(settings.overlays, "fails", "echo 'no model' >&2; exit 3", **DETERMINISTIC)
    add_script(settings.overlays, "says_no", """echo '{"ok":false,"error":"no"}'""", **DETERMINISTIC)
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("fails"))
        await bus.invoke(a_call("says_no"))
        for line in [line for line in calls(settings) if line["type"] == "invoke"]:
            again = await replay(bus, line["seq"])
            assert (again.verdict, again.answer.ok) == ("MATCH", False)


async def test_the_difference_is_told_without_secrets_and_a_payload_with_one_cannot_be_replayed(
    settings: Settings,
) -> None:
    add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    results = iter([{"n": 1, "key": "the old secret"}, {"n": 2, "key": "the old secret"}, {}])
    Secrets(settings.state).set("KEY", ["echo"], value="the old secret")
    async with running_bus(settings, InProcessRunner(lambda _: Outcome(result=next(results)))) as bus:
        bus.secrets.stamp()
        await bus.invoke(a_call("echo"))
        again = await replay(bus, 1)
        hidden = await bus.invoke(a_call("echo", data={"key": "the old secret"}))
        with pytest.raises(ReplayError, match="had a secret in its payload"):
            await replay(bus, hidden.body["provenance"]["seq"])
    assert again.difference == Difference((Change("/n", "1", "2"),))
    assert again.cause is not None
    assert again.cause.names == ("none",)


async def test_a_refusal_is_no_drift_but_has_failed(settings: Settings, overlay: Path) -> None:
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("pure", data={"n": 1}))
        manifest = overlay / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"phases": ["CLEAR"]}))
        again = await replay(bus, 1)
    assert (again.verdict, again.cause) == ("FAILED", None)
    assert again.why.startswith("ERR_PHASE_DENIED: ")
    assert misfits("replay", again.body()) == []


async def test_what_held_the_call_belongs_to_its_environment(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    held = iter([Sandbox("call", ("read", "write")), Sandbox("call", ("read",))])
    async with running_bus(settings, InProcessRunner(lambda _: Outcome(result=1, sandbox=next(held)))) as bus:
        await bus.invoke(a_call("echo"))
        again = await replay(bus, 1)
    assert (again.verdict, again.differs) == ("MATCH", ("environment",))


# --- What cannot be replayed -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("overlay")
async def test_a_line_that_is_not_there_is_not_found(settings: Settings) -> None:
    async with running_bus(settings) as bus:
        for seq in (0, -1, 1, 10**12):
            with pytest.raises(NotFoundError):
                await replay(bus, seq)


@pytest.mark.usefixtures("overlay")
async def test_lines_of_which_nothing_ran_or_was_stored_cannot_be_replayed(settings: Settings) -> None:
    stores_nothing = dataclasses.replace(settings, dev_log_payload=False)
    async with running_bus(stores_nothing) as bus:
        await bus.invoke(a_call("pure"))
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("nobody"))
        await bus.invoke(a_call("pure", data={"n": 1}))
        good = lines(settings)[-1]["seq"]
        await replay(bus, good)
        kinds = [(line["seq"], line["type"]) for line in lines(settings)]
        said = {}
        for seq, kind in kinds:
            if seq != good:
                with pytest.raises(ReplayError) as refusal:
                    await replay(bus, seq)
                assert refusal.value.code == "ERR_NOT_REPLAYABLE"
                said[kind] = (refusal.value.detail, refusal.value.hint)
    assert [kind for _, kind in kinds] == ["invoke", "environment", "denied", "invoke", "replay"]
    assert "without its payload" in said["invoke"][0]
    assert "of type denied" in said["denied"][0]
    assert "of type environment" in said["environment"][0]
    assert "is itself a replay" in said["replay"][0]
    assert said["replay"][1] == f"Replay line {good}."


@pytest.mark.parametrize(("phase", "asks"), [("OPEN", True), ("SEAL", True), ("CLEAR", False)])
async def test_what_may_write_and_is_not_deterministic_asks_first(settings: Settings, phase: str, asks: bool) -> None:
    add_overlay(settings.overlays, "echo")
    runner = InProcessRunner(lambda _: Outcome(result=1))
    async with running_bus(settings, runner) as bus:
        answer = await bus.invoke(a_call("echo", phase=phase))
        seq = answer.body["provenance"]["seq"]
        if asks:
            with pytest.raises(ReplayError) as refusal:
                await replay(bus, seq)
            assert refusal.value.code == "ERR_NEEDS_LIVE"
            assert len(runner.jobs) == 1
        assert (await replay(bus, seq, live=asks)).verdict == "MATCH"


@pytest.mark.usefixtures("overlay")
async def test_a_line_that_was_changed_is_refused_as_broken(settings: Settings) -> None:
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("pure", data={"text": "hello"}))
        text = settings.ledger.read_bytes()
        settings.ledger.write_bytes(text.replace(b'"text":"hello"', b'"text":"jello"'))
        with pytest.raises(BrokenLineError):
            await replay(bus, 1)


async def test_an_overlay_that_is_gone_cannot_be_replayed(settings: Settings, overlay: Path) -> None:
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("pure"))
        shutil.move(overlay, settings.logs)
        with pytest.raises(BusError) as refusal:
            await replay(bus, 1)
    assert refusal.value.code == "ERR_UNKNOWN_OVERLAY"


@pytest.mark.usefixtures("overlay")
def test_a_call_and_its_replay_without_an_event_loop(settings: Settings) -> None:
    with LocalBus(settings) as bus:
        body = bus.call("pure", {"n": 1}, seed=1)
        again = bus.replay(body["provenance"]["seq"])
        named = bus.call("pure.run", {"n": 2}, phase="CLEAR", timeout_ms=5000)
    assert (body["ok"], body["result"], again.verdict) == (True, {"n": 1}, "MATCH")
    assert (named["ok"], named["phase"], named["capability"]) == (True, "CLEAR", "run")
