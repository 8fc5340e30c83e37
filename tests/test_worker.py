"""Workers, friendly and hostile: each call gets its own answer or an outcome with a code, and nothing of them stays."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

from runners import worker
from runners.base import LARGE_BYTES, Code, Job, ProcessTarget, Workers
from runners.helpers import Helpers
from runners.worker import ReplyError, WorkerPools, read_reply
from tests import programs
from tests.runner_fixtures import anyio_backend, nothing_left
from tests.support import is_alive, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable
    from pathlib import Path

    from runners.base import Outcome

numbers = itertools.count()

PROGRAM = (sys.executable, "-I", "-S", str(programs.FOLDER / "worker.py"))
READY = "read line"
"""A shell's way to wait for its first call."""


class Logs:
    """What was logged, in memory."""

    def __init__(self) -> None:
        self.text = b""
        self.ended = 0

    def append(self, overlay: str, data: bytes, source: Hashable = None) -> None:
        assert overlay == "test"
        self.text += data

    def end(self, overlay: str, source: Hashable = None) -> None:
        self.ended += 1


class Bench:
    """Pools with their helpers, and jobs for them."""

    def __init__(self, helpers: Helpers, **options: Any) -> None:
        self.helpers = helpers
        self.logs = Logs()
        self.pools = self.new_pools(**options)

    def new_pools(self, *, kill_grace_s: float = 0.1, idle_s: float = 60.0) -> WorkerPools:
        logs: Any = self.logs
        return WorkerPools(self.helpers, logs, kill_grace_s=kill_grace_s, idle_s=idle_s)

    async def call(self, do: str = "echo", **payload: Any) -> Outcome:
        return await self.pools.run(a_job({"do": do, **payload}))

    async def pid(self, **options: Any) -> int:
        outcome = await self.pools.run(a_job({"do": "pid"}, **options))
        assert outcome.ok, outcome
        pid = outcome.result["result"]
        assert isinstance(pid, int)
        return pid

    def workers(self) -> list[dict[str, Any]]:
        found = self.pools.state("test").get("workers", [])
        assert isinstance(found, list)
        return found


def a_job(
    payload: dict[str, Any] | None = None,
    argv: tuple[str, ...] = PROGRAM,
    *,
    workers: Workers = Workers(),  # noqa: B008  # frozen
    env: dict[str, str] = programs.ENV,
    changes: dict[str, Any] | None = None,
    **limits: Any,
) -> Job:
    """A job with a request id of its own, which its envelope has too."""
    job = programs.make_job(ProcessTarget(argv, env, mode="worker", workers=workers), payload, **limits)
    request_id = f"0190a000-0000-7000-8000-{next(numbers):012}"
    envelope = json.dumps({"request_id": request_id, "payload": payload or {}}, ensure_ascii=False).encode()
    return dataclasses.replace(job, request_id=request_id, envelope=envelope, **(changes or {}))


def shell(script: str, **options: Any) -> Job:
    return a_job({}, ("sh", "-c", script), **options)


def answers() -> str:
    """Shell text that answers the call in `$line`."""
    return """id=${line#*'"request_id": "'}; echo "{\\"request_id\\":\\"${id%%'"'*}\\",\\"result\\":1}\""""


def announce() -> str:
    """Shell text that writes a line to the FIFO which the call in `$line` names as `stay`."""
    return """path=${line#*'"stay": "'}; echo > "${path%%'"'*}\""""


def error_of(outcome: Outcome) -> str:
    assert outcome.error is not None
    return outcome.error


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    helpers = Helpers(namespace=False)  # so that a worker's process id is the one that we see
    made = Bench(helpers)
    yield made
    await made.pools.close()
    await helpers.close()


# Replies


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ('{"request_id":"1","ok":true,"result":2}', {"ok": True, "result": 2}),
        ('{"request_id":"1","ok":false,"error":"no"}\r', {"ok": False, "error": "no"}),
        ('{"request_id":"1","result":{"ok":false}}', {"ok": True, "result": {"ok": False}}),
        ('{"request_id":"1","result":null,"cost_cents":3}', {"ok": True, "result": None, "cost_cents": 3}),
    ],
)
async def test_a_reply_is_the_protocol_reply_without_its_request_id(line: str, reply: dict[str, Any]) -> None:
    assert read_reply(line.encode(), "1") == reply


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ready", "not JSON"),
        ("", "not JSON"),
        ('"text"', "not an object"),
        ('{"ok":true,"result":1}', "request_id is not the call's"),
        ('{"request_id":"2","ok":true}', "request_id is not the call's"),
        ('{"request_id":"1","value":1}', "neither ok nor result"),
        ('{"request_id":"1","ok":true,"result":NaN}', "NaN"),
        ('{"request_id":"1","ok":true,"ok":true}', "twice"),
    ],
)
async def test_any_other_line_is_refused_with_its_fault(line: str, fault: str) -> None:
    with pytest.raises(ReplyError, match=fault):
        read_reply(line.encode(), "1")


async def test_one_process_answers_call_after_call(bench: Bench) -> None:
    first = await bench.call(text="ä\n☃")
    assert first.result == {"ok": True, "result": {"do": "echo", "text": "ä\n☃"}}
    assert first.output_bytes > 0
    assert (first.exit_code, first.cpu_ms, first.peak_mb) == (None, None, None)
    assert (await bench.call("fail")).result == {
        "ok": False,
        "error": "it did not work",
        "code": "ERR_OF_ITS_OWN",
    }
    assert await bench.pid() == await bench.pid()
    assert bench.workers()[0]["calls"] == 4


@pytest.mark.parametrize("size", [65_535, 65_536, LARGE_BYTES + 1, 8 * 2**20])
async def test_a_line_of_any_length_goes_both_ways(bench: Bench, size: int) -> None:
    text = "0123456789abcdef" * (size // 16) + "x" * (size % 16)
    assert (await bench.call(text=text)).result["result"]["text"] == text
    assert (await bench.call()).ok
    assert bench.workers()[0]["calls"] == 2


async def test_each_of_many_callers_gets_its_own_answer(bench: Bench) -> None:
    three = Workers(count=3)

    async def caller(name: int) -> None:
        for number in range(20):
            outcome = await bench.pools.run(a_job({"caller": name, "number": number}, workers=three))
            assert outcome.result == {"ok": True, "result": {"caller": name, "number": number}}

    await asyncio.gather(*(caller(name) for name in range(10)))
    workers = bench.workers()
    assert len(workers) == 3
    assert sum(worker["calls"] for worker in workers) == 200


async def test_calls_are_served_in_the_order_that_they_came(bench: Bench) -> None:
    served: list[int] = []

    async def caller(number: int) -> None:
        assert (await bench.call()).ok
        served.append(number)

    await asyncio.gather(*(caller(number) for number in range(20)))
    assert served == list(range(20))


async def test_there_are_no_more_workers_than_calls_need(bench: Bench) -> None:
    four = Workers(count=4)
    assert await bench.pid(workers=four) == await bench.pid(workers=four)
    assert len(bench.workers()) == 1


async def test_each_phase_and_rights_have_workers_of_their_own(bench: Bench) -> None:
    assert await bench.pid() != await bench.pid(changes={"phase": "CLEAR"})
    assert sorted(worker["phase"] for worker in bench.workers()) == ["CLEAR", "OPEN"]
    assert bench.pools.state("another") == {}


async def test_state_says_what_each_worker_does(bench: Bench, tmp_path: Path) -> None:
    assert bench.pools.state("test") == {}
    async with programs.start_signal(tmp_path) as (path, started):
        call = asyncio.create_task(bench.call("hang", started=path))
        await asyncio.sleep(0)
        assert bench.workers() == [{"phase": "OPEN", "state": "starting", "calls": 0}]
        await started
        assert bench.workers() == [{"phase": "OPEN", "state": "busy", "calls": 0}]
        call.cancel()
        await asyncio.wait([call])
    assert (await bench.call()).ok
    await until(lambda: "memory_mb" in bench.workers()[0])
    (state,) = bench.workers()
    assert state.pop("memory_mb") > 1
    assert state == {"phase": "OPEN", "state": "idle", "calls": 1}


# What a worker writes to stderr


async def test_the_log_of_a_call_is_what_came_during_it(bench: Bench) -> None:
    assert (await bench.call(log="one\n")).log == "one\n"
    assert (await bench.call()).log == ""
    assert (await bench.call(log="two\nthree")).log == "two\nthree"
    assert bench.logs.text == b"one\ntwo\nthree"
    assert [(await bench.call(log=f"{number}\n")).log for number in range(100)] == [f"{n}\n" for n in range(100)]
    await bench.pools.close()
    assert bench.logs.ended == 1


async def test_a_long_log_is_cut_in_its_middle(bench: Bench) -> None:
    outcome = await bench.pools.run(a_job({"log": "a" * 40_000 + "b" * 40_000}, max_log_bytes=1000))
    assert outcome.log.startswith("a" * 500)
    assert outcome.log.endswith("b" * 500)
    assert "79000 bytes left out" in outcome.log


# Replaced


async def test_a_worker_is_replaced_after_its_number_of_calls(bench: Bench) -> None:
    two = Workers(max_calls=2)
    pids = [await bench.pid(workers=two) for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    await until(lambda: not is_alive(pids[0]))


async def test_a_worker_that_is_let_go_sees_the_end_of_its_stdin_first(bench: Bench, tmp_path: Path) -> None:
    """It is given a minute for it, and takes none."""
    bench.pools = bench.new_pools(kill_grace_s=60)
    gone = tmp_path / "gone"
    job = shell(f"{READY}; {answers()}; read line || : > '{gone}'", workers=Workers(max_calls=1))
    assert (await bench.pools.run(job)).ok
    await until(gone.exists)


@pytest.mark.parametrize("limit", [{"workers": Workers(max_mb=60)}, {"changes": {"hard_mb": 60}}])
async def test_a_worker_that_has_grown_is_replaced(bench: Bench, limit: dict[str, Any]) -> None:
    job = a_job({"do": "grow", "mb": 64}, **limit)
    assert (await bench.pools.run(job)).ok
    await until(lambda: bench.workers() == [])
    assert b"MB of memory, more than 60, and is replaced" in bench.logs.text
    assert (await bench.call()).ok


async def test_memory_is_not_looked_at_after_every_call(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MEMORY_EVERY_S", math.inf)
    small = Workers(max_mb=60)
    pid = await bench.pid(workers=small)
    await until(lambda: "memory_mb" in bench.workers()[0])
    assert (await bench.pools.run(a_job({"do": "grow", "mb": 64}, workers=small))).ok
    assert {await bench.pid(workers=small) for _ in range(20)} == {pid}
    assert bench.workers()[0]["memory_mb"] < 60


async def test_new_code_gets_new_workers_and_the_old_finish_what_they_do(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        go_on = tmp_path / "go_on"
        script = f"{READY}; echo > '{path}'; until [ -e '{go_on}' ]; do sleep 0.01; done; {answers()}; read line"
        old = asyncio.create_task(bench.pools.run(shell(script, changes={"code_hash": "old"})))
        await started
        new = await bench.pid(changes={"code_hash": "new"})
        assert [worker["state"] for worker in bench.workers()] == ["busy", "idle"]
        go_on.touch()
        assert (await old).ok
        assert [worker["state"] for worker in bench.workers()] == ["idle"]
        assert await bench.pid(changes={"code_hash": "new"}) == new


async def test_workers_without_a_call_end_when_the_code_changes(bench: Bench) -> None:
    old = await bench.pid(changes={"code_hash": "old"})
    new = await bench.pid(changes={"code_hash": "new"})
    await until(lambda: not is_alive(old))
    again = await bench.pid(changes={"code_hash": "old"})
    assert again not in {old, new}
    await until(lambda: not is_alive(new))


async def test_another_environment_gets_another_worker(bench: Bench) -> None:
    assert await bench.pid() != await bench.pid(env=dict(programs.ENV))
    assert len(bench.workers()) == 1


async def test_an_idle_pool_ends_and_the_next_call_begins_anew(bench: Bench) -> None:
    bench.pools = bench.new_pools(idle_s=0.01)
    pid = await bench.pid()
    await until(lambda: not is_alive(pid))
    assert bench.pools.state("test") == {}
    assert (await bench.call()).ok


# Broken protocol


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ready\n", "is not JSON"),
        ('{"request_id":"0190a000-0000-7000-8000-999999999999","ok":true}\n', "request_id is not the call's"),
    ],
)
async def test_a_line_that_is_no_reply_fails_its_call_and_replaces_the_worker(
    bench: Bench, text: str, fault: str
) -> None:
    pid = await bench.pid()
    outcome = await bench.call("text", text=text, log="why\n")
    assert outcome.code is Code.PROTOCOL
    assert fault in error_of(outcome)
    assert outcome.log == "why\n"
    assert not is_alive(pid)
    assert await bench.pid() != pid


async def test_a_large_line_that_is_no_reply_fails_its_call(bench: Bench) -> None:
    outcome = await bench.call("text", text="x" * (LARGE_BYTES + 1) + "\n")
    assert outcome.code is Code.PROTOCOL
    assert (await bench.call()).ok


@pytest.mark.parametrize("size", [10, LARGE_BYTES])
async def test_a_second_reply_costs_the_worker_its_place_and_no_call_its_answer(bench: Bench, size: int) -> None:
    pid = await bench.pid()
    outcome = await bench.call("twice", text="x" * size)
    assert outcome.ok
    assert await bench.pid() != pid
    await until(lambda: not is_alive(pid))
    assert b"what nobody had asked for" in bench.logs.text


async def test_output_between_two_calls_ends_a_worker(bench: Bench, tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"
    job = shell(f"{READY}; {answers()}; until [ -e '{go_on}' ]; do sleep 0.01; done; echo more; read line")
    assert (await bench.pools.run(job)).ok
    assert [worker["state"] for worker in bench.workers()] == ["idle"]
    go_on.touch()
    await until(lambda: bench.workers() == [])
    await until(lambda: b"the worker wrote what nobody had asked for: 'more\\n', without a call\n" in bench.logs.text)


async def test_a_reply_before_the_call_was_read_is_refused(bench: Bench) -> None:
    outcome = await bench.pools.run(a_job({"text": "x" * 2**20}, ("sh", "-c", "echo '{}'; sleep 1000")))
    assert outcome.code is Code.PROTOCOL
    assert "before it had read its call" in error_of(outcome)


async def test_output_above_the_cap_ends_the_worker_and_is_never_parsed(bench: Bench) -> None:
    pid = await bench.pid()
    outcome = await bench.pools.run(a_job({"do": "flood", "size": 2**20}, max_output_bytes=1000))
    assert outcome.code is Code.OUTPUT_TOO_LARGE
    assert "more than 1000 bytes" in error_of(outcome)
    assert outcome.result is None
    assert await bench.pid() != pid


async def test_a_reply_of_exactly_the_cap_is_taken(bench: Bench) -> None:
    size = (await bench.call(text="0123456789")).output_bytes
    assert (await bench.pools.run(a_job({"do": "echo", "text": "0123456789"}, max_output_bytes=size))).ok
    outcome = await bench.pools.run(a_job({"do": "echo", "text": "0123456789"}, max_output_bytes=size - 1))
    assert outcome.code is Code.OUTPUT_TOO_LARGE


async def test_a_worker_that_closes_its_stdout_and_stays_is_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "EXIT_GRACE_S", 0.01)
    outcome = await bench.call("mute")
    assert outcome.code is Code.PROTOCOL
    assert error_of(outcome) == "the worker closed its stdout and went on, and was ended"
    assert (await bench.call()).ok


# Crashes


async def test_a_crash_fails_its_call_with_the_end_of_its_log(bench: Bench) -> None:
    outcome = await bench.call("exit", status=3, log="no luck\n")
    assert outcome.code is Code.CRASH
    assert error_of(outcome) == "the worker ended with exit status 3 before it answered"
    assert (outcome.exit_code, outcome.log) == (3, "no luck\n")
    assert (await bench.call()).ok


async def test_a_crash_of_one_worker_is_nothing_to_the_calls_of_others(bench: Bench) -> None:
    jobs = [a_job({"do": "exit", "status": 1} if number % 5 == 1 else {}, workers=Workers(4)) for number in range(20)]
    await asyncio.gather(*(bench.pid(workers=Workers(4)) for _ in range(4)))
    outcomes = await asyncio.gather(*(bench.pools.run(job) for job in jobs))
    assert [outcome.ok for outcome in outcomes] == [number % 5 != 1 for number in range(20)]


@pytest.mark.parametrize("size", [0, 2**22])
async def test_a_reply_counts_though_the_worker_ends_right_after_it(bench: Bench, size: int) -> None:
    outcomes = [await bench.call("last", size=size) for _ in range(4)]
    assert [outcome.code for outcome in outcomes] == [Code.OK] * 4
    assert len({outcome.result["result"] for outcome in outcomes}) == 4


async def test_a_call_that_an_ending_worker_never_read_goes_to_another(bench: Bench) -> None:
    """All calls wait at once, so each but the first is written while the worker before it is about to end."""
    outcomes = await asyncio.gather(*(bench.call("last") for _ in range(10)))
    assert [outcome.code for outcome in outcomes] == [Code.OK] * 10
    assert len({outcome.result["result"] for outcome in outcomes}) == 10


async def test_a_line_cut_short_is_a_crash(bench: Bench) -> None:
    outcome = await bench.pools.run(shell(f"{READY}; printf '{{\"request'; exit 0"))
    assert outcome.code is Code.CRASH
    assert error_of(outcome) == "the worker ended with exit status 0 in the middle of a line"


async def test_a_missing_program_is_named(bench: Bench) -> None:
    outcome = await bench.pools.run(a_job({}, ("no-such-program",)))
    assert outcome.code is Code.START
    assert error_of(outcome).startswith("could not start 'no-such-program': No such file or directory")
    assert outcome.retryable is False
    assert bench.pools.state("test") == {}


async def test_a_worker_that_crashes_at_every_start_is_not_started_in_a_hot_loop(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FIRST_BACKOFF_S", 60.0)
    monkeypatch.setattr(worker, "LONGEST_BACKOFF_S", 60.0)
    starts = tmp_path / "starts"
    script = f"echo x >> '{starts}'; echo no luck >&2; exit 3"
    outcomes = await asyncio.gather(*(bench.pools.run(shell(script)) for _ in range(10)))
    assert starts.read_text() == "x\n" * 2
    assert {outcome.code for outcome in outcomes} == {Code.CRASH}
    assert {outcome.log for outcome in outcomes} == {"no luck\n"}
    assert [outcome.retryable for outcome in outcomes] == [None] * 2 + [True] * 8
    refused = error_of(await bench.pools.run(shell(script)))
    assert refused.startswith("the worker ended with exit status 3 before it answered; 2 in a row never answered")
    assert starts.read_text() == "x\n" * 2


async def test_the_next_call_after_the_wait_tries_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(worker, "LONGEST_BACKOFF_S", 0.01)
    healed = tmp_path / "healed"
    script = f"[ -e '{healed}' ] || exit 3; while {READY}; do {answers()}; done"
    assert [(await bench.pools.run(shell(script))).code for _ in range(5)] == [Code.CRASH] * 5
    healed.touch()
    async with asyncio.timeout(20):
        while not (outcome := await bench.pools.run(shell(script))).ok:
            assert outcome.retryable
            await asyncio.sleep(0.001)
    assert [(await bench.pools.run(shell(script))).code for _ in range(5)] == [Code.OK] * 5


async def test_an_answer_ends_the_row_of_failures(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FIRST_BACKOFF_S", 60.0)
    monkeypatch.setattr(worker, "LONGEST_BACKOFF_S", 60.0)
    for _ in range(2):
        assert (await bench.call("exit", status=3)).code is Code.CRASH
        assert (await bench.call()).ok
        assert (await bench.call("exit", status=3)).code is Code.CRASH


async def test_a_call_waits_out_a_failing_start_while_another_worker_lives(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FIRST_BACKOFF_S", 0.05)
    two = Workers(count=2)
    async with programs.start_signal(tmp_path) as (path, started):
        hanging = asyncio.create_task(bench.pools.run(a_job({"do": "hang", "started": path}, workers=two)))
        await started
        for _ in range(2):
            outcome = await bench.pools.run(a_job({"do": "exit", "status": 3}, workers=two))
            assert outcome.code is Code.CRASH
        assert (await bench.pools.run(a_job(workers=two))).ok
        hanging.cancel()
        await asyncio.wait([hanging])


# Time


async def test_a_reply_that_never_comes_is_a_timeout_of_that_call_only(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        hanging = asyncio.create_task(bench.pools.run(a_job({"do": "hang", "started": path}, timeout_s=0.3)))
        await started
        waiting = asyncio.create_task(bench.call(number=1))
        outcome = await hanging
    assert outcome.code is Code.TIMEOUT
    assert error_of(outcome) == (
        "the worker had not answered within the call's 0.300 s, and was ended; its reply is to be one line, and flushed"
    )
    assert (await waiting).ok


async def test_a_late_reply_reaches_nobody(bench: Bench) -> None:
    outcome = await bench.pools.run(a_job({"do": "late", "secret": 1}, timeout_s=0.2))
    assert outcome.code is Code.TIMEOUT
    assert outcome.result is None
    assert (await bench.call(number=2)).result["result"] == {"do": "echo", "number": 2}


async def test_a_worker_that_ignores_term_is_killed(bench: Bench) -> None:
    outcome = await bench.pools.run(shell(f"trap '' TERM; {READY}; while :; do sleep 0.01; done", timeout_s=0.3))
    assert outcome.code is Code.TIMEOUT
    assert outcome.exit_code == -9


async def test_a_call_waits_for_a_worker_within_its_deadline_only(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        hanging = asyncio.create_task(bench.call("hang", started=path))
        await started
        outcome = await bench.pools.run(a_job(timeout_s=0.05))
        assert outcome.code is Code.TIMEOUT
        assert "none of 1 workers was free" in error_of(outcome)
        hanging.cancel()
        await asyncio.wait([hanging])
    assert (await bench.call()).ok


async def test_a_deadline_that_has_passed_starts_nothing(bench: Bench) -> None:
    outcome = await bench.pools.run(a_job(timeout_s=-1))
    assert outcome.code is Code.TIMEOUT
    assert bench.pools.state("test") == {}


async def test_a_worker_that_never_reads_blocks_nobody(bench: Bench) -> None:
    big = a_job({"text": "x" * 2**22}, ("sleep", "1000"), timeout_s=0.3)
    outcome, other = await asyncio.gather(bench.pools.run(big), bench.call())
    assert outcome.code is Code.TIMEOUT
    assert other.ok


async def test_workers_that_do_not_end_do_not_pile_up(bench: Bench, tmp_path: Path) -> None:
    """Beside the one that serves, one may be on its way out. So the third call waits until the first has gone."""
    bench.pools = bench.new_pools(kill_grace_s=60)
    go_on = tmp_path / "go_on"
    work = f"""case $line in *'"stay": "'*) {announce()};; *) {answers()};; esac"""
    argv = ("sh", "-c", f"trap '' TERM; {READY}; {work}; until [ -e '{go_on}' ]; do sleep 0.01; done")
    calls = []
    for _ in range(2):
        async with programs.start_signal(tmp_path) as (path, started):
            calls.append(asyncio.create_task(bench.pools.run(a_job({"stay": path}, argv))))
            await started
            calls[-1].cancel()
    third = a_job({"stay": ""}, argv, timeout_s=0.05)
    assert "none of 1 workers was free" in error_of(await bench.pools.run(third))
    fourth = asyncio.create_task(bench.pools.run(a_job({}, argv)))
    go_on.touch()
    assert (await fourth).ok
    await asyncio.wait(calls)
    assert all(call.cancelled() for call in calls)


# Cancelled and closed


async def test_a_cancelled_call_has_ended_its_worker(bench: Bench, tmp_path: Path) -> None:
    pid = await bench.pid()
    async with programs.start_signal(tmp_path) as (path, started):
        call = asyncio.create_task(bench.call("late", started=path))
        await started
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert not is_alive(pid)
    assert (await bench.call(number=2)).result["result"] == {"do": "echo", "number": 2}


async def test_a_call_cancelled_while_it_waits_leaves_the_worker_alone(bench: Bench) -> None:
    pid = await bench.pid()
    tasks = [asyncio.create_task(bench.call(number=number)) for number in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert [(await task).ok for task in (tasks[0], tasks[2])] == [True, True]
    assert await bench.pid() == pid


async def test_a_call_cancelled_while_its_worker_starts_is_forgotten(bench: Bench) -> None:
    call = asyncio.create_task(bench.call())
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await bench.call()).ok


async def test_closing_ends_running_waiting_and_starting_calls(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        running = asyncio.create_task(bench.call("hang", started=path))
        await started
        waiting = asyncio.create_task(bench.call())
        starting = asyncio.create_task(bench.pools.run(a_job(changes={"phase": "CLEAR"})))
        await asyncio.sleep(0)
        await bench.pools.close()
        assert [(await call).code for call in (running, waiting, starting)] == [Code.CANCELLED] * 3
    assert (await bench.call()).code is Code.CANCELLED
    assert bench.pools.state("test") == {}


async def test_closing_does_not_wait_for_a_worker_that_was_let_go_gently(bench: Bench) -> None:
    """It has a minute to see the end of its stdin, and never looks. TERM ends it."""
    bench.pools = bench.new_pools(kill_grace_s=60)
    job = shell(f"{READY}; {answers()}; exec sleep 1000", workers=Workers(max_calls=1))
    assert (await bench.pools.run(job)).ok
    async with asyncio.timeout(20):
        await bench.pools.close()


async def test_what_a_helper_takes_with_it_is_said(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        call = asyncio.create_task(bench.call("hang", started=path))
        await started
        await bench.helpers.close()
        outcome = await call
    assert outcome.code is Code.CRASH
    assert re.fullmatch(r"the worker was ended from outside \(.+\) before it answered", error_of(outcome))
