"""The contract: every runner carries the same cases to the same overlay, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from runners.base import Code, HttpTarget, ProcessTarget
from runners.http import HttpRunner
from runners.process import ProcessRunner
from tests import programs
from tests.programs import echo
from tests.runner_fixtures import anyio_backend, nothing_left

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from runners.base import Outcome, Runner


@pytest.fixture(params=["proc", "http"])
async def overlay(request: pytest.FixtureRequest, nothing_left: None) -> AsyncIterator[Overlay]:
    if request.param == "proc":
        runner: Runner = ProcessRunner(kill_grace_s=0.1)
        yield Overlay(runner, programs.target("echo.py"))
        await runner.close()
        return
    service = web.AppRunner(_service(), handler_cancellation=True, shutdown_timeout=0)
    await service.setup()
    site = web.TCPSite(service, "127.0.0.1", 0)
    await site.start()
    runner = HttpRunner()
    yield Overlay(runner, HttpTarget(f"http://127.0.0.1:{service.addresses[0][1]}/echo"))
    await runner.close()
    await service.cleanup()


def _service() -> web.Application:
    async def handle(request: web.Request) -> web.Response:
        payload = (await request.json())["payload"]
        echo.announce(payload)
        text = echo.answer(payload)
        if text is None:
            await asyncio.Event().wait()
        return web.Response(text=text, content_type="application/json")

    app = web.Application(client_max_size=2**30)
    app.router.add_post("/echo", handle)
    return app


class Overlay:
    """One echo overlay behind one runner."""

    def __init__(self, runner: Runner, target: ProcessTarget | HttpTarget) -> None:
        self.runner = runner
        self.target = target

    async def call(self, payload: dict[str, Any], **limits: Any) -> Outcome:
        return await self.runner.run(programs.make_job(self.target, payload, **limits))


async def test_a_protocol_reply_is_the_result_unopened(overlay: Overlay) -> None:
    outcome = await overlay.call({"prompt": "hello"})
    assert outcome.code is Code.OK
    assert outcome.result == {"ok": True, "result": {"prompt": "hello"}}
    assert outcome.error is None


async def test_any_other_json_is_the_result_too(overlay: Overlay) -> None:
    outcome = await overlay.call({"do": "bare", "n": [1, 2.5, None]})
    assert outcome.code is Code.OK
    assert outcome.result == {"do": "bare", "n": [1, 2.5, None]}


@pytest.mark.parametrize("text", ["null", "0", '"word"', "[]", " {}\n"])
async def test_a_value_of_any_kind_is_a_result(overlay: Overlay, text: str) -> None:
    outcome = await overlay.call({"do": "text", "text": text})
    assert outcome.code is Code.OK
    assert outcome.result == json.loads(text)


async def test_a_reply_that_says_no_is_a_reply(overlay: Overlay) -> None:
    outcome = await overlay.call({"do": "fail"})
    assert outcome.code is Code.OK
    assert outcome.result == {"ok": False, "error": "it did not work", "code": "ERR_OF_ITS_OWN"}


async def test_text_of_every_script_comes_back_as_it_went(overlay: Overlay) -> None:
    payload = {"text": 'žluťoučký 漢字 🦊 \u2028 \x00 \\ "', "ключ": "значение"}
    outcome = await overlay.call(payload)
    assert outcome.result == {"ok": True, "result": payload}


async def test_what_never_answers_is_ended_at_its_deadline(overlay: Overlay) -> None:
    outcome = await overlay.call({"do": "hang"}, timeout_s=0.3)
    assert outcome.code is Code.TIMEOUT
    assert outcome.result is None
    assert outcome.error


async def test_a_deadline_in_the_past_is_a_timeout(overlay: Overlay) -> None:
    outcome = await overlay.call({}, timeout_s=-1)
    assert outcome.code is Code.TIMEOUT


async def test_cancelling_ends_the_work_and_passes_on(overlay: Overlay, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (fifo, started):
        task = asyncio.create_task(overlay.call({"do": "hang", "started": fifo}))
        await started
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("turns", range(12))
async def test_cancelling_at_any_moment_and_again_leaves_nothing(overlay: Overlay, turns: int) -> None:
    task = asyncio.create_task(overlay.call({"do": "hang"}))
    for _ in range(turns):
        await asyncio.sleep(0)
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)
    assert task.cancelled()


async def test_closing_the_runner_ends_what_runs_and_starts_no_more(overlay: Overlay, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (fifo, started):
        task = asyncio.create_task(overlay.call({"do": "hang", "started": fifo}))
        await started
        await overlay.runner.close()
        assert (await task).code is Code.CANCELLED
    assert (await overlay.call({})).code is Code.CANCELLED


async def test_output_over_its_cap_is_never_parsed(overlay: Overlay) -> None:
    outcome = await overlay.call({"do": "flood", "size": 300_000}, max_output_bytes=100_000)
    assert outcome.code is Code.OUTPUT_TOO_LARGE
    assert outcome.result is None
    assert "100000" in (outcome.error or "")


async def test_output_of_exactly_its_cap_passes(overlay: Overlay) -> None:
    outcome = await overlay.call({"do": "text", "text": json.dumps("x" * 998)}, max_output_bytes=1000)
    assert outcome.result == "x" * 998


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing"),
        (" \n ", "nothing"),
        ("<!doctype html><h1>It works!</h1>", "It works!"),
        ('{"ok":true,"result":[1,2', "not JSON"),
        ('{"a":1,"a":2}', "'a' stands twice"),
        ("[NaN]", "NaN"),
        ("[" * 100_000, "deeper"),
    ],
)
async def test_output_that_is_not_json_is_quoted_with_the_reason(overlay: Overlay, text: str, said: str) -> None:
    outcome = await overlay.call({"do": "text", "text": text})
    assert outcome.code is Code.PROTOCOL
    assert outcome.result is None
    assert said in (outcome.error or "")
    assert len(outcome.error or "") < 500


async def test_eight_megabytes_go_in_and_come_out(overlay: Overlay) -> None:
    payload = {"text": "0123456789abcdef" * 2**19}
    outcome = await overlay.call(payload)
    assert outcome.code is Code.OK
    assert outcome.result == {"ok": True, "result": payload}


async def test_64_calls_at_once_each_get_their_own_answer(overlay: Overlay) -> None:
    outcomes = await asyncio.gather(*(overlay.call({"n": n}) for n in range(64)))
    assert [outcome.result["result"]["n"] for outcome in outcomes] == list(range(64))


async def test_a_target_of_another_runner_is_a_mistake_of_the_caller(overlay: Overlay) -> None:
    other = HttpTarget("http://127.0.0.1/") if overlay.runner.name == "proc" else ProcessTarget(("true",), {})
    with pytest.raises(TypeError, match="cannot carry"):
        await overlay.runner.run(programs.make_job(other))
