"""The story of a call: each step's refusal, what a success leaves behind, and what happens when things break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus import verification
from bus.callers import Caller
from bus.dispatch import Bus
from bus.errors import DeniedError, SettingError
from bus.hookspecs import hookimpl
from bus.model import Phase
from runners.base import LARGE_BYTES, Outcome, Sandbox
from runners.kernel import Kernel
from tests.programs import running
from tests.support import (
    FixedStress,
    InProcessRunner,
    a_call,
    add_native,
    add_overlay,
    add_script,
    calls,
    lines,
    misfits,
    running_bus,
    until,
    write_overlay,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from bus.course import Answer
    from bus.ledger import Receipt
    from bus.model import Invocation, Manifest, Record
    from bus.settings import Settings
    from runners.base import Job

STRICT = {
    "runner": "proc",
    "input_schema": {"type": "object", "required": ["text"]},
    "output_schema": {"type": "object", "required": ["overlay"]},
}


class Veto:
    @hookimpl
    def aal_authorize(self, invocation: Invocation, manifest: Manifest) -> None:
        if invocation.payload.get("forbidden"):
            raise DeniedError("ERR_VETOED", f"{manifest.name} is not for you")


class Gate:
    """A runner's answer that waits until it is let go."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, _: Job) -> Outcome:
        await self.open.wait()
        return Outcome(result="let through")


def assert_told_alike(answer: Answer, settings: Settings) -> None:
    """Answer and ledger line have their forms, and say the same."""
    line = next(line for line in calls(settings) if line["request_id"] == answer.body["request_id"])
    assert misfits("outcome", answer.json) == []
    assert misfits("record", line) == []
    for name in ("ok", "code", "phase", "run_id", "payload_hash", "result_hash", "timestamp_ms", "duration_ms"):
        assert answer.body[name] == line[name], name
    assert (answer.body["provenance"]["seq"], answer.body["provenance"]["hash"]) == (line["seq"], line["hash"])


# --- What goes well ----------------------------------------------------------------------------------------------


async def test_a_call_runs_and_leaves_a_line_that_says_what_its_answer_says(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("echo", data={"text": "hello"}, seed=7, session="s"))
        assert_told_alike(answer, settings)
    (line,) = calls(settings)
    assert (answer.http_status, answer.ok, answer.body["code"], answer.body["status"]) == (200, True, "OK", "success")
    assert answer.body["result"]["payload"] == {"text": "hello"}
    assert (line["type"], line["seq"], line["overlay"], line["capability"]) == ("invoke", 1, "echo", "run")
    assert (line["payload"], line["result"]) == ({"text": "hello"}, answer.body["result"])
    assert (line["exit_code"], line["seed"], line["runner"], line["version"]) == (0, 7, "proc", "1.0.0")
    assert (line["session"], line["caller"], line["deterministic"]) == ("s", None, False)
    assert line["cpu_ms"] >= 0
    assert line["memory"]["peak_mb"] > 0


async def test_what_the_overlay_is_sent_fits_its_schema_and_names_the_ledger(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("echo"))
        answer = await bus.invoke(a_call("echo"))
        sent = answer.body["result"]
        assert misfits("overlay_request", sent) == []
        assert sent["provenance"] == {"prev_size": 2, "environment_hash": bus.environment_hash}
        assert sent["request_id"] == answer.body["request_id"]
        assert sent["run_id"] == answer.body["run_id"]


async def test_the_environment_is_written_down_after_the_first_line_that_names_it(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings) as bus:
        for _ in range(3):
            await bus.invoke(a_call("echo"))
    written = lines(settings)
    assert [line["type"] for line in written] == ["invoke", "environment", "invoke", "invoke"]
    assert all(misfits("record", line) == [] for line in written)
    assert {line["environment_hash"] for line in written} == {written[1]["environment_hash"]}


async def test_an_overlay_that_answers_ok_false_has_done_its_job_and_so_has_the_bus(settings: Settings) -> None:
    add_script(settings.overlays, "no", """echo '{"ok":false,"error":"not today","code":"ERR_MINE","result":[1]}'""")
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("no"))
        assert_told_alike(answer, settings)
    assert answer.http_status == 200
    assert (answer.body["ok"], answer.body["error"], answer.body["code"]) == (False, "not today", "ERR_MINE")
    assert (answer.body["status"], answer.body["result"]) == ("partial", [1])
    assert "the overlay answered" in answer.body["message"].lower()
    assert calls(settings)[0]["type"] == "invoke"


async def test_an_overlay_that_uses_a_code_of_the_bus_does_not_speak_for_the_bus(settings: Settings) -> None:
    add_script(settings.overlays, "sly", """echo '{"ok":false,"error":"e","code":"ERR_BUSY","retryable":false}'""")
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("sly"))
    assert (answer.http_status, answer.body["code"], answer.body["retryable"]) == (200, "ERR_OVERLAY_FAILED", False)
    assert answer.retry_after_s is None


async def test_a_result_that_does_not_fit_the_output_schema_is_502(settings: Settings) -> None:
    add_native(settings.overlays, "strict", {"run": STRICT | {"output_schema": {"required": ["absent"]}}})
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("strict", data={"text": "x"}))
        assert_told_alike(answer, settings)
    assert (answer.http_status, answer.body["code"]) == (502, "ERR_OUTPUT_SCHEMA")
    assert "$.result.absent" in answer.body["error"]
    assert calls(settings)[0]["type"] == "invoke"


@pytest.mark.parametrize(("result", "code"), [("5", "ERR_OUTPUT_SCHEMA"), ("9007199254740993", "ERR_OVERLAY_PROTOCOL")])
async def test_a_wrong_result_in_a_reply_of_the_right_form_is_502_too(
    settings: Settings, result: str, code: str
) -> None:
    folder = add_native(settings.overlays, "strict", {"run": {"runner": "proc", "output_schema": {"type": "string"}}})
    (folder / "run.sh").write_text(f"""echo '{{"ok":true,"result":{result}}}'""")
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("strict"))
        assert_told_alike(answer, settings)
    assert (answer.http_status, answer.body["code"]) == (502, code)


async def test_a_crash_is_502_and_its_detail_is_the_overlays_log(settings: Settings) -> None:
    add_script(settings.overlays, "bad", "echo 'no model file' >&2; exit 3")
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("bad"))
        assert_told_alike(answer, settings)
    assert (answer.http_status, answer.body["code"]) == (502, "ERR_OVERLAY_CRASH")
    assert answer.body["detail"] == "no model file"
    assert calls(settings)[0]["exit_code"] == 3


async def test_without_the_setting_neither_payload_nor_result_is_stored(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(replace(settings, dev_log_payload=False)) as bus:
        await bus.invoke(a_call("echo", data={"secret": "x"}))
    assert {"payload", "result"}.isdisjoint(calls(settings)[0])
    assert "secret" not in settings.ledger.read_text()


async def test_sixty_four_calls_at_once_are_sixty_four_lines_of_one_chain(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings) as bus:
        answers = await asyncio.gather(*(bus.invoke(a_call("echo", data={"n": n})) for n in range(64)))
    assert [answer.body["result"]["payload"]["n"] for answer in answers] == list(range(64))
    written = calls(settings)
    assert {line["request_id"] for line in written} == {answer.body["request_id"] for answer in answers}
    assert len(written) == len({line["run_id"] for line in written}) == 64
    assert {answer.body["provenance"]["seq"] for answer in answers} == {line["seq"] for line in written}
    report = verification.verify(settings.ledger)
    assert report.ok
    assert report.lines == 65


# --- What is refused ---------------------------------------------------------------------------------------------

REFUSED = [
    ({"overlay": "nobody"}, 404, "ERR_UNKNOWN_OVERLAY"),
    ({"overlay": "../echo"}, 404, "ERR_UNKNOWN_OVERLAY"),
    ({"overlay": "x" * 5000}, 404, "ERR_UNKNOWN_OVERLAY"),
    ({"overlay": "strict", "capability": "nothing"}, 404, "ERR_UNKNOWN_CAPABILITY"),
    ({"overlay": "strict"}, 404, "ERR_UNKNOWN_CAPABILITY"),
    ({"overlay": "broken"}, 409, "ERR_OVERLAY_BROKEN"),
    ({"overlay": "off"}, 409, "ERR_OVERLAY_DISABLED"),
    ({"overlay": "strict", "capability": "open_only", "phase": "SEAL"}, 403, "ERR_PHASE_DENIED"),
    ({"phase": "ASCEND"}, 403, "ERR_PERMISSION_DENIED"),
    ({"data": {"op": "unlisted"}}, 403, "ERR_PERMISSION_DENIED"),
    ({"data": {"op": "start"}}, 403, "ERR_PERMISSION_DENIED"),
    ({"data": {"forbidden": True}}, 403, "ERR_VETOED"),
    ({"overlay": "strict", "capability": "schema", "data": {}}, 422, "ERR_INPUT_SCHEMA"),
    ({"profile": "ENORMOUS"}, 422, "ERR_BAD_RUNE"),
    ({"profile": "MEM[SOFT=2,HARD=1,VOL=LOW]"}, 422, "ERR_BAD_RUNE"),
]


@pytest.fixture
def overlays(settings: Settings) -> Settings:
    """An overlay for each step at which a call may be refused."""
    root = settings.overlays
    add_overlay(root, "echo", op_policy={"start": ["exec"]}, phases=["OPEN", "ASCEND"])
    add_native(root, "strict", {"schema": STRICT, "open_only": {"runner": "proc", "phases": ["OPEN"]}})
    write_overlay(root, "broken", {"name": "another", "version": 1})
    add_overlay(root, "off")
    return settings


@pytest.mark.parametrize(
    ("request_", "status", "code"), REFUSED, ids=[f"{row[2]}-{n}" for n, row in enumerate(REFUSED)]
)
async def test_a_refusal_leaves_a_line_and_starts_nothing(
    overlays: Settings, request_: dict[str, Any], status: int, code: str
) -> None:
    runner = InProcessRunner()
    async with running_bus(overlays, runner, Veto()) as bus:
        bus.registry.disable("off")
        answer = await bus.invoke(a_call(**{"overlay": "echo"} | request_))
        assert_told_alike(answer, overlays)
    (line,) = calls(overlays)
    assert (answer.http_status, answer.body["code"], line["type"]) == (status, code, "denied")
    assert answer.body["detail"]
    assert answer.body["hint"]
    assert (line["memory"], line["sandbox"], line["queue_ms"], line["cost_cents"]) == (None, None, None, 0)
    assert runner.jobs == []


async def test_the_bus_refuses_while_memory_is_short(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    stress = FixedStress(1.0)
    async with running_bus(settings, stress) as bus:
        answer = await bus.invoke(a_call("echo"))
        assert_told_alike(answer, settings)
        assert (answer.http_status, answer.body["code"]) == (503, "ERR_STRESS")
        assert answer.retry_after_s
        assert (await bus.invoke(a_call("echo", profile="PERFORMANCE"))).ok


async def test_a_full_queue_refuses_and_says_when_to_come_again(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    gate = Gate()
    async with running_bus(replace(settings, slots=1, queue_limit=0), InProcessRunner(gate)) as bus:
        first = asyncio.create_task(bus.invoke(a_call("echo")))
        await until(lambda: bus.scheduler.running == 1)
        answer = await bus.invoke(a_call("echo"))
        assert_told_alike(answer, settings)
        assert (answer.http_status, answer.body["code"], answer.body["retryable"]) == (503, "ERR_BUSY", True)
        assert answer.retry_after_s
        gate.open.set()
        assert (await first).ok


async def test_waiting_counts_against_the_deadline(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    gate, runner = Gate(), InProcessRunner()
    runner.answer = gate
    async with running_bus(replace(settings, slots=1), runner) as bus:
        first = asyncio.create_task(bus.invoke(a_call("echo")))
        await until(lambda: bus.scheduler.running == 1)
        answer = await bus.invoke(a_call("echo", timeout_ms=1))
        assert_told_alike(answer, settings)
        assert (answer.http_status, answer.body["code"]) == (504, "ERR_DEADLINE")
        gate.open.set()
        assert (await first).ok
    assert len(runner.jobs) == 1


async def test_a_request_that_could_not_be_read_is_written_down_too(settings: Settings) -> None:
    async with running_bus(settings) as bus:
        answer = await bus.refuse(DeniedError("ERR_VETOED", "no"), "x" * 5000, "y" * 5000)
        assert_told_alike(answer, settings)
    (line,) = calls(settings)
    assert (line["type"], line["phase"], line["payload_hash"]) == ("denied", None, None)
    assert len(line["overlay"]) < 200
    assert len(line["capability"]) < 200


async def test_a_fault_of_the_bus_itself_is_500_and_leaves_its_line(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Job) -> Outcome:
        raise ZeroDivisionError("in a runner")

    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, InProcessRunner(fail)) as bus:
        answer = await bus.invoke(a_call("echo"))
        assert_told_alike(answer, settings)
        assert bus.scheduler.running == 0
    assert (answer.http_status, answer.body["code"]) == (500, "ERR_INTERNAL")
    assert "in a runner" in caplog.text


# --- The ledger --------------------------------------------------------------------------------------------------


async def test_what_cannot_be_written_down_does_not_start_and_starts_again_when_it_can(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    settings.logs.write_text("a file in the place of the folder")
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        answer = await bus.invoke(a_call("echo"))
        assert (answer.http_status, answer.body["code"], answer.record) == (503, "ERR_LEDGER", None)
        assert answer.body["provenance"] is None
        assert answer.retry_after_s
        assert misfits("outcome", answer.json) == []
        assert runner.jobs == []
        assert await bus.not_ready()

        settings.logs.unlink()
        assert await bus.not_ready() is None
        answers = [await bus.invoke(a_call("echo")) for _ in range(2)]
    assert answers[-1].ok
    assert verification.verify(settings.ledger).ok


async def test_a_call_whose_line_cannot_be_written_answers_500_with_its_outcome(
    settings: Settings, tmp_path: Path
) -> None:
    def lose_the_folder(_: Job) -> Outcome:
        shutil.move(settings.logs, tmp_path / "away")
        settings.logs.write_text("a file in the place of the folder")
        return Outcome(result="precious")

    add_overlay(settings.overlays, "echo")
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        await bus.invoke(a_call("echo"))
        runner.answer = lose_the_folder
        answer = await bus.invoke(a_call("echo"))
        assert (answer.http_status, answer.body["code"], answer.record) == (500, "ERR_LEDGER", None)
        assert answer.body["result"] == "precious"
        assert "ended with OK" in answer.body["error"]
        assert answer.body["retryable"] is False
        assert misfits("outcome", answer.json) == []

        settings.logs.unlink()
        shutil.move(tmp_path / "away", settings.logs)
        runner.answer = lambda _: Outcome(result="again")
        assert await bus.not_ready() is None
        assert (await bus.invoke(a_call("echo"))).body["result"] == "again"
    assert verification.verify(settings.ledger).ok
    assert [line["ok"] for line in calls(settings)] == [True, True]


# --- Cancelling and closing --------------------------------------------------------------------------------------


async def test_a_cancelled_call_leaves_its_line_and_frees_its_slot(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, InProcessRunner(Gate())) as bus:
        task = asyncio.create_task(bus.invoke(a_call("echo", data={"n": 1})))
        await until(lambda: bus.scheduler.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert bus.scheduler.running == 0
    (line,) = calls(settings)
    assert misfits("record", line) == []
    assert (line["type"], line["code"], line["ok"]) == ("invoke", "ERR_CANCELLED", False)
    assert line["memory"]


async def test_a_call_cancelled_while_it_waits_leaves_its_line(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    gate = Gate()
    async with running_bus(replace(settings, slots=1), InProcessRunner(gate)) as bus:
        first = asyncio.create_task(bus.invoke(a_call("echo")))
        second = asyncio.create_task(bus.invoke(a_call("echo")))
        await until(lambda: bus.scheduler.waiting == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open.set()
        assert (await first).ok
    assert [line["code"] for line in calls(settings)] == ["ERR_CANCELLED", "OK"]


async def test_a_second_cancellation_does_not_keep_the_line_from_being_written(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, InProcessRunner(Gate())) as bus:
        task = asyncio.create_task(bus.invoke(a_call("echo")))
        await until(lambda: bus.scheduler.running == 1)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [line["code"] for line in calls(settings)] == ["ERR_CANCELLED"]


async def test_closing_ends_what_does_not_finish_in_time_and_writes_its_line(settings: Settings) -> None:
    add_script(settings.overlays, "slow", "exec sleep 600")
    async with running_bus(replace(settings, drain_s=0.0)) as bus:
        task = asyncio.create_task(bus.invoke(a_call("slow")))
        await until(lambda: running(str(settings.state)) != [])
    assert not running(str(settings.state))
    answer = await task
    assert not answer.ok
    assert [line["request_id"] for line in calls(settings)] == [answer.body["request_id"]]


async def test_closing_lets_running_calls_finish_and_refuses_those_that_wait(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    gate, runner = Gate(), InProcessRunner()
    runner.answer = gate
    async with running_bus(replace(settings, slots=1), runner) as bus:
        first = asyncio.create_task(bus.invoke(a_call("echo")))
        second = asyncio.create_task(bus.invoke(a_call("echo")))
        await until(lambda: bus.scheduler.waiting == 1)
        closing = asyncio.create_task(bus.close())
        assert (await second).body["code"] == "ERR_SHUTTING_DOWN"
        assert not closing.done()
        gate.open.set()
        assert (await first).body["result"] == "let through"
        await closing
    assert runner.closed
    assert sorted(line["code"] for line in calls(settings)) == ["ERR_SHUTTING_DOWN", "OK"]


async def test_closing_waits_for_the_line_of_a_call_that_has_run(settings: Settings) -> None:
    schema = {"items": {"type": "integer"}}  # which takes a while to hold a large result to
    add_native(settings.overlays, "echo", {"run": {"runner": "proc", "output_schema": schema}})
    large = Outcome(result=list(range(50_000)), output_bytes=10 * LARGE_BYTES)
    runner = InProcessRunner(lambda _: large)
    async with running_bus(settings, runner) as bus:
        task = asyncio.create_task(bus.invoke(a_call("echo")))
        await until(lambda: runner.jobs != [])
    assert (await task).body["code"] == "OK"
    assert [line["code"] for line in calls(settings)] == ["OK"]


async def raise_later(*, at_once: bool = False) -> None:
    raise RuntimeError("stuck")


def raise_now(*, at_once: bool = False) -> None:
    raise RuntimeError("stuck")


@pytest.mark.parametrize("close", [raise_later, raise_now, lambda at_once: None])
async def test_a_runner_that_cannot_be_closed_keeps_nothing_else_open(
    settings: Settings, caplog: pytest.LogCaptureFixture, close: Callable[..., Any]
) -> None:
    stuck: Any = InProcessRunner()
    stuck.close = close
    async with running_bus(settings, stuck) as bus:
        pass
    assert "could not be closed" in caplog.text
    assert not bus.ledger.healthy


async def test_a_start_that_failed_can_be_made_again(settings: Settings) -> None:
    settings.state.mkdir()
    (settings.state / "overlays.json").write_text("nonsense")
    add_overlay(settings.overlays, "echo")
    bus = Bus(settings)
    with pytest.raises(SettingError):
        await bus.start()
    (settings.state / "overlays.json").unlink()
    async with bus:
        assert (await bus.invoke(a_call("echo"))).ok


@pytest.mark.parametrize("bad", [{"cpu_ms": math.nan}, {"peak_mb": math.inf}, {"exit_code": "1"}, {"cost_cents": []}])
async def test_an_outcome_that_no_line_can_hold_is_an_internal_error_with_a_line(
    settings: Settings, bad: dict[str, Any]
) -> None:
    add_overlay(settings.overlays, "echo")
    runner = InProcessRunner(lambda _: Outcome(result=1, **bad))
    async with running_bus(settings, runner) as bus:
        answer = await bus.invoke(a_call("echo"))
    assert (answer.http_status, answer.body["code"]) == (500, "ERR_INTERNAL")
    (line,) = calls(settings)
    assert (line["type"], line["code"], misfits("record", line)) == ("invoke", "ERR_INTERNAL", [])


async def test_words_of_an_overlay_that_are_no_text_are_made_text(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    runner = InProcessRunner(lambda _: Outcome(code="ERR_OVERLAY_CRASH", error="bad \udcff", log="worse \udcfe"))
    async with running_bus(settings, runner) as bus:
        answer = await bus.invoke(a_call("echo"))
    assert json.loads(answer.json)["error"] == calls(settings)[0]["error"] == "bad \\udcff"


async def test_a_state_folder_that_was_removed_is_made_again(settings: Settings) -> None:
    add_script(settings.overlays, "state", 'test -d "$OVERLAY_STATE" && echo true || echo false')
    async with running_bus(settings) as bus:
        assert (await bus.invoke(a_call("state"))).body["result"] is True
        shutil.rmtree(settings.state)
        assert (await bus.invoke(a_call("state"))).body["result"] is True


async def test_a_call_cancelled_while_its_line_is_written_is_told_to_the_plugins(settings: Settings) -> None:
    told: list[Record] = []

    class Listener:
        @hookimpl
        def aal_invocation_finished(self, record: Record) -> None:
            told.append(record)

    add_overlay(settings.overlays, "echo")
    runner = InProcessRunner()
    async with running_bus(settings, runner, Listener()) as bus:
        submit = bus.ledger.submit

        def submit_and_cancel(record: Record, **told: Callable[[Receipt], object] | None) -> asyncio.Future[Receipt]:
            task.cancel()
            return submit(record, **told)

        bus.ledger.submit = submit_and_cancel  # type: ignore[method-assign]
        task = asyncio.create_task(bus.invoke(a_call("echo")))
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: told != [])
    assert [(line["seq"], line["code"]) for line in told] == [(line["seq"], line["code"]) for line in calls(settings)]
    assert told[0]["code"] == "OK"


async def test_a_plugin_that_writes_into_a_record_changes_nothing(settings: Settings) -> None:
    class Scribbler:
        @hookimpl
        def aal_invocation_finished(self, record: Record) -> None:
            record.clear()

    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, Scribbler()) as bus:
        assert (await bus.invoke(a_call("echo"))).ok


async def test_a_closed_bus_refuses_with_503(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings) as bus:
        await bus.close()
        assert (await bus.invoke(a_call("echo"))).http_status == 503


# --- What a call gets --------------------------------------------------------------------------------------------


async def test_degradation_reaches_overlay_answer_and_line_alike(settings: Settings) -> None:
    degradation = {"max_fraction": 0.5, "disable_nonessential": True}
    add_native(settings.overlays, "big", {"run": {
        "runner": "proc", "memory": "BALANCED", "degradation": degradation}})  # fmt: skip
    async with running_bus(settings, FixedStress(0.9)) as bus:
        answer = await bus.invoke(a_call("big"))
        assert_told_alike(answer, settings)
    told = answer.body["result"]["memory"]
    assert told["applied"] == ["SHRINK_KV(0.75)", "CONTEXT(4096)", "DISABLE(HIGH_COST_METRICS)", "BATCH(ASYNC)"]
    assert (told["stress"], told["max_context_tokens"]) == (0.9, 4096)
    assert told.items() >= degradation.items()
    memory = answer.body["memory"]
    assert memory["peak_mb"] >= memory["peak_floor_mb"] > 0
    assert (
        memory == told | {name: memory[name] for name in ("peak_mb", "peak_floor_mb")} == calls(settings)[0]["memory"]
    )


@pytest.mark.parametrize(("degrade", "steps"), [("progressive", 1), ("all", 5)])
async def test_how_many_steps_apply_is_a_setting(settings: Settings, degrade: Any, steps: int) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(replace(settings, degrade=degrade), FixedStress(0.6)) as bus:
        answer = await bus.invoke(a_call("echo", profile="BALANCED"))
    assert len(answer.body["memory"]["applied"]) == steps


@pytest.mark.parametrize(("asked_ms", "given_s"), [(None, 60.0), (50_000, 50.0), (90_000, 60.0)])
async def test_a_caller_may_lower_the_timeout_and_never_raise_it(
    settings: Settings, asked_ms: int | None, given_s: float
) -> None:
    add_overlay(settings.overlays, "echo", timeout_ms=60_000)
    runner = InProcessRunner()
    call = a_call("echo", timeout_ms=asked_ms)
    async with running_bus(settings, runner) as bus:
        await bus.invoke(call)
    assert runner.jobs[0].deadline - call.received == pytest.approx(given_s)


async def test_the_line_names_the_code_and_the_manifest_that_ran(settings: Settings) -> None:
    folder = add_overlay(settings.overlays, "echo")
    manifest = folder / "manifest.json"
    async with running_bus(settings) as bus:
        await bus.invoke(a_call("echo"))
        await bus.invoke(a_call("echo"))
        (folder / "more.txt").write_text("x")
        await bus.invoke(a_call("echo"))
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": "2.0.0"}))
        await bus.invoke(a_call("echo"))
    first, same, code_changed, manifest_changed = calls(settings)
    assert (first["code_hash"], first["manifest_hash"]) == (same["code_hash"], same["manifest_hash"])
    assert code_changed["code_hash"] != first["code_hash"]
    assert code_changed["manifest_hash"] == first["manifest_hash"]
    assert manifest_changed["manifest_hash"] != first["manifest_hash"]
    assert (first["version"], manifest_changed["version"]) == ("1.0.0", "2.0.0")


ENVIRONMENT = """import json, os
print(json.dumps({"env": dict(os.environ), "cwd": os.getcwd(), "state": os.path.isdir(os.environ["OVERLAY_STATE"])}))
"""


async def test_an_overlay_sees_an_allow_list_of_the_environment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AAL_STOLEN", "SECRET_TOKEN", "PASSED", "ASKED_FOR", "NOT_ASKED_FOR", "LD_PRELOAD_X"):
        monkeypatch.setenv(name, "x")
    folder = write_overlay(
        settings.overlays,
        "env",
        {
            "name": "env",
            "version": "1",
            "permissions": ["analysis"],
            "entrypoints": {"proc": {"command": [sys.executable, "env.py"]}},
            "env": ["ASKED_FOR", "AAL_STOLEN"],
            "capabilities": {"run": {"runner": "proc"}},
        },
        {"env.py": ENVIRONMENT},
    )
    async with running_bus(replace(settings, pass_env="PASSED, AAL_STOLEN")) as bus:
        seen = (await bus.invoke(a_call("env"))).body["result"]
    allowed = {"HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER"}
    given = {"OVERLAY_STATE", "OVERLAY_SCRATCH", "OVERLAY_CALL"}
    assert set(seen["env"]) - allowed == {"PASSED", "ASKED_FOR", "PYTHONHASHSEED"} | given
    assert seen["env"]["TMPDIR"] == seen["env"]["OVERLAY_SCRATCH"]
    assert seen["env"]["PYTHONHASHSEED"] == "0"
    assert seen["env"]["OVERLAY_STATE"] == str(settings.state / "state" / "env")
    assert seen["state"] is True
    assert seen["cwd"] == str(folder)


async def test_a_state_folder_that_cannot_be_made_refuses_the_call_and_says_which(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings) as bus:
        settings.state.mkdir(exist_ok=True)
        (settings.state / "state").write_text("in the way")
        answer = await bus.invoke(a_call("echo"))
    assert (answer.http_status, answer.body["code"]) == (500, "ERR_FILES")
    assert str(settings.state / "state" / "echo") in answer.body["detail"]
    assert [line["code"] for line in calls(settings)] == ["ERR_FILES"]


async def test_a_capability_runs_no_more_calls_at_once_than_it_says(settings: Settings) -> None:
    add_native(settings.overlays, "one", {"run": {"runner": "proc", "concurrency": 1}})
    add_overlay(settings.overlays, "echo")
    gate, runner = Gate(), InProcessRunner()
    runner.answer = gate
    async with running_bus(settings, runner) as bus:
        ones = [asyncio.create_task(bus.invoke(a_call("one"))) for _ in range(3)]
        other = asyncio.create_task(bus.invoke(a_call("echo")))
        await until(lambda: bus.scheduler.waiting == 2)
        assert sorted(job.overlay for job in runner.jobs) == ["echo", "one"]
        gate.open.set()
        assert all(answer.ok for answer in await asyncio.gather(*ones, other))


async def test_declared_cost_is_charged_for_what_ran_unless_the_overlay_says_what_it_cost(settings: Settings) -> None:
    add_native(settings.overlays, "paid", {"run": {"runner": "proc", "cost_cents": 2, "phases": ["OPEN"]}})
    runner = InProcessRunner(
        lambda job: Outcome(result={"ok": True, "cost_cents": 0.5} if b"cheap" in job.envelope else 1)
    )
    async with running_bus(settings, runner) as bus:
        costs = [
            (await bus.invoke(a_call("paid", **request))).body["cost_cents"]
            for request in ({}, {"data": {"cheap": 1}}, {"phase": "SEAL"})
        ]
    assert costs == [2, 0.5, 0] == [line["cost_cents"] for line in calls(settings)]


async def test_an_overlay_without_a_name_for_its_capability_is_called_by_either_name(settings: Settings) -> None:
    add_native(settings.overlays, "psi", {"psi.ping": {"runner": "proc"}})
    async with running_bus(settings, InProcessRunner()) as bus:
        answers = [await bus.invoke(a_call("psi", capability)) for capability in (None, "ping", "psi.ping")]
    assert {answer.body["capability"] for answer in answers} == {"ping"}
    assert all(answer.ok for answer in answers)


# --- What the kernel cannot hold ---------------------------------------------------------------------------------

CAN_HOLD_ALL = Kernel(7, None, None)
NO_LANDLOCK = Kernel(0, "this kernel has no Landlock", None)


@contextlib.asynccontextmanager
async def an_enforcing_bus(settings: Settings, kernel: Kernel, **changes: Any) -> AsyncIterator[Bus]:
    """It refuses what this kernel could not hold; its runner starts no process."""
    async with running_bus(replace(settings, sandbox="enforce", **changes), InProcessRunner()) as bus:
        bus.confinement = replace(bus.confinement, kernel=kernel)
        yield bus


async def test_under_enforce_a_call_that_the_kernel_cannot_hold_is_refused_with_the_reason(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    async with an_enforcing_bus(settings, NO_LANDLOCK) as bus:
        refused = await bus.invoke(a_call("echo"))
    assert (refused.http_status, refused.body["code"]) == (503, "ERR_SANDBOX")
    assert "no Landlock" in refused.body["detail"]
    assert [(line["type"], line["code"], line["sandbox"]) for line in calls(settings)] == [
        ("denied", "ERR_SANDBOX", None)
    ]
    async with an_enforcing_bus(settings, CAN_HOLD_ALL) as bus:
        assert (await bus.invoke(a_call("echo"))).ok


async def test_under_enforce_a_folder_with_links_that_lead_out_is_refused(settings: Settings) -> None:
    folder = add_overlay(settings.overlays, "echo")
    (folder / "inside").symlink_to("manifest.json")
    async with an_enforcing_bus(settings, CAN_HOLD_ALL) as bus:
        assert (await bus.invoke(a_call("echo"))).ok
        (folder / "outside").symlink_to("/etc/hosts")
        refused = await bus.invoke(a_call("echo"))
    assert refused.body["code"] == "ERR_SANDBOX"
    assert "outside -> /etc/hosts" in refused.body["detail"]


async def test_under_enforce_what_is_one_process_for_all_phases_gets_no_call_that_must_be_held(
    settings: Settings,
) -> None:
    entrypoints = {"http": {"base_url": "http://127.0.0.1:9"}}
    capabilities = {"run": {"runner": "http"}}
    for name in ("far", "trusted"):
        add_native(settings.overlays, name, capabilities, entrypoints=entrypoints)
    async with an_enforcing_bus(settings, CAN_HOLD_ALL, trusted="trusted, other") as bus:
        codes = {
            (name, phase): (await bus.invoke(a_call(name, phase=phase))).body["code"]
            for name in ("far", "trusted")
            for phase in ("OPEN", "CLEAR", "SEAL")
        }
    assert {where for where, code in codes.items() if code == "ERR_SANDBOX"} == {("far", "CLEAR"), ("far", "SEAL")}


async def test_the_record_says_what_held_the_process_that_ran_the_call(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    held = Sandbox("pool", ("read", "write"), ("network: nothing",))
    runner = InProcessRunner(lambda job: Outcome(result=1, sandbox=held if job.phase == "OPEN" else None))
    async with running_bus(replace(settings, sandbox="best-effort"), runner) as bus:
        answers = [await bus.invoke(a_call("echo", phase=phase)) for phase in ("OPEN", "CLEAR", "ASCEND")]
    ours = {"mode": "best-effort", "scope": "pool", "enforced": ["read", "write"], "missing": ["network: nothing"]}
    nothing = {"mode": "best-effort", "scope": "none", "enforced": [], "missing": []}
    assert [answer.body["sandbox"] for answer in answers] == [ours, nothing, None]
    assert [line["sandbox"] for line in calls(settings)] == [ours, nothing, None]


# --- Who calls ---------------------------------------------------------------------------------------------------


async def test_a_caller_gets_what_its_token_has_and_the_line_names_it(settings: Settings) -> None:
    for name in ("echo", "other"):
        add_overlay(settings.overlays, name)
    caller = Caller("ci", ("ech*",), (Phase.OPEN,), ("invoke",))
    async with running_bus(settings, InProcessRunner()) as bus:
        asked = [("echo", "OPEN"), ("echo", "CLEAR"), ("other", "OPEN"), ("unknown", "OPEN")]
        answers = [await bus.invoke(a_call(name, phase=phase)._replace(caller="ci"), caller) for name, phase in asked]
    assert [answer.body["code"] for answer in answers] == ["OK", *["ERR_FORBIDDEN"] * 3]
    assert "the phase CLEAR" in answers[1].body["detail"]
    assert [(line["caller"], line["type"]) for line in calls(settings)] == [("ci", "invoke"), *[("ci", "denied")] * 3]


async def test_an_overlay_that_asks_who_calls_is_for_tokens_and_the_operator(settings: Settings) -> None:
    add_native(settings.overlays, "shy", {"run": {"runner": "proc"}}, policy={"requires_auth": True})
    unnamed, named = (Caller(name, ("*",), tuple(Phase), ("invoke",)) for name in (None, "ci"))
    async with running_bus(settings, InProcessRunner()) as bus:
        answers = [await bus.invoke(a_call("shy"), caller) for caller in (unnamed, named, None)]
    assert [answer.body["code"] for answer in answers] == ["ERR_CALLER_UNKNOWN", "OK", "OK"]


async def test_a_library_in_an_overlays_folder_is_not_loaded_before_the_overlay_is_held(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty element of LD_LIBRARY_PATH is the working folder (ld.so(8)). The overlay itself finds the variable."""
    monkeypatch.setenv("LD_LIBRARY_PATH", ":/nowhere")
    say = 'echo "\\"$LD_LIBRARY_PATH\\""'
    folder = add_native(settings.overlays, "own", {"run": {"runner": "proc"}}, env=["LD_LIBRARY_PATH"])
    (folder / "run.sh").write_text(say)
    for library in ("libm.so.6", "libpthread.so.0", "libdl.so.2", "libutil.so.1", "libz.so.1"):  # not those of a shell
        (folder / library).write_text("no library")
    async with running_bus(settings) as bus:
        answer = await bus.invoke(a_call("own"))
    assert answer.body["result"] == ":/nowhere", answer.body
