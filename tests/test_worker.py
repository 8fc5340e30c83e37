"""Workers, friendly and hostile: each call gets its own answer or an outcome with a code, and nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from runners import worker as worker_module
from runners.base import LARGE_BYTES, Code, Job, ProcessTarget, Workers
from runners.helpers import Helpers
from runners.worker import ReplyError, reply_on
from runners.worker_pool import WorkerPace
from runners.workers import WorkerPools
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
    """What was logged, in memory: what workers said, and what the bus noted of them."""

    def __init__(self) -> None:
        self.text = b""
        self.notes = ""
        self.ended = 0

    def append(self, overlay: str, data: bytes, source: Hashable = None) -> None:
        assert overlay == "test"
        if source is None:
            self.notes += data.decode()
        else:
            self.text += data

    def end(self, overlay: str, source: Hashable = None) -> None:
        self.ended += 1


class Bench:
    """Pools with their helpers, and jobs for them."""

    def __init__(self, helpers: Helpers, **options: Any) -> None:
        self.helpers = helpers
        self.logs = Logs()
        self.pools = self.new_pools(**options)

    def new_pools(self, *, kill_grace_s: float = 0.1, idle_s: float = 60.0, **pace: Any) -> WorkerPools:
        logs: Any = self.logs
        quick = WorkerPace(**{"memory_s": 0.01} | pace)
        return WorkerPools(self.helpers, logs, kill_grace_s=kill_grace_s, idle_s=idle_s, pace=quick)

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

    def tasks(self) -> list[str]:
        """What runs beside the test, by name."""
        ours = asyncio.current_task()
        return [str(task.get_coro()) for task in asyncio.all_tasks() if task is not ours and "Pool" in repr(task)]

    def does(self) -> list[str]:
        return [worker["state"] for worker in self.workers()]

    def do(self, *states: str) -> bool:
        """Whether these are the states of the workers."""
        return self.does() == list(states)


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
    return job._replace(request_id=request_id, envelope=envelope, **(changes or {}))


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
    assert reply_on(line.encode(), "1") == reply


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
        reply_on(line.encode(), "1")


async def test_one_process_answers_call_after_call(bench: Bench) -> None:
    first = await bench.call(text="ä\n☃")
    assert first.result == {"ok": True, "result": {"do": "echo", "text": "ä\n☃"}}
    assert first.output_bytes > 0
    assert (first.exit_code, first.cpu_ms) == (None, None)
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
        assert bench.workers() == [{"phase": "OPEN", "state": "loading", "calls": 0}]
        await started
        assert (bench.does(), bench.workers()[0]["calls"]) == (["loading"], 0)
        call.cancel()
        await asyncio.wait([call])
        assert bench.does() == ["late"]
    bench.pools.forget("test")
    assert bench.does() == ["ending"]
    assert (await bench.call()).ok
    await until(lambda: bench.does() == ["idle"] and "memory_mb" in bench.workers()[0])
    (state,) = bench.workers()
    assert state["memory_mb"] > 1
    assert state["uptime_s"] >= 0
    assert is_alive(state["pid"])
    assert (state["phase"], state["calls"]) == ("OPEN", 1)


async def test_a_worker_that_has_answered_before_is_busy_with_its_call(bench: Bench, tmp_path: Path) -> None:
    assert (await bench.call()).ok
    async with programs.start_signal(tmp_path) as (path, started):
        call = asyncio.create_task(bench.call("hang", started=path))
        await started
        assert bench.does() == ["busy"]
        call.cancel()
        await asyncio.wait([call])


async def test_the_log_tells_what_became_of_each_worker(bench: Bench) -> None:
    two = Workers(max_calls=2)
    for _ in range(2):
        await bench.pid(workers=two, changes={"edition": 7})
    assert (await bench.call("exit", status=3)).code is Code.CRASH
    await until(lambda: bench.logs.notes.count("\n") == 5)
    assert sorted(bench.logs.notes.splitlines()) == [
        "aal: worker 1 ended with exit status 0",
        "aal: worker 1 is replaced: it has answered 2 calls",
        "aal: worker 1 starts (phase OPEN, edition 7)",
        "aal: worker 2 ended with exit status 3 before it answered",
        "aal: worker 2 starts (phase OPEN, edition 0)",
    ]


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


async def test_a_worker_that_has_grown_is_replaced_quietly_when_it_has_no_call(bench: Bench) -> None:
    bench.pools = bench.new_pools(memory_s=0.5)
    assert (await bench.pools.run(a_job({"do": "grow", "mb": 64}, changes={"hard_mb": 60}))).ok
    await until(lambda: bench.workers() == [])
    assert "worker 1 is replaced: it used " in bench.logs.notes
    assert " MiB of memory, more than the 60 that it may" in bench.logs.notes
    assert (await bench.call()).ok


async def test_a_worker_may_hold_what_the_largest_call_of_its_pool_may(bench: Bench) -> None:
    assert (await bench.pools.run(a_job({"do": "grow", "mb": 64}, changes={"hard_mb": 256}))).ok
    small = asyncio.create_task(bench.pools.run(a_job({"do": "swell", "mb": 64}, changes={"hard_mb": 60})))
    await until(lambda: bench.workers()[0].get("memory_mb", 0) > 128)
    assert (bench.does(), small.done()) == (["busy"], False)
    small.cancel()
    await asyncio.wait([small])


@pytest.mark.parametrize("do", ["swell", "breed"])
@pytest.mark.parametrize("limit", [{"workers": Workers(max_mb=60)}, {"changes": {"hard_mb": 60}}])
async def test_a_call_during_which_its_worker_takes_too_much_memory_is_told_the_figure(
    bench: Bench, do: str, limit: dict[str, Any]
) -> None:
    """Whether it is the worker itself that takes it, or a child of it."""
    outcome = await bench.pools.run(a_job({"do": do, "mb": 64, "log": "big\n"}, **limit))
    assert (outcome.code, outcome.log) == (Code.MEMORY_LIMIT, "big\n")
    figure = re.fullmatch(
        r"the worker used (\d+\.\d) MiB of memory, more than the 60 that it may, and was ended", error_of(outcome)
    )
    assert figure
    assert float(figure[1]) > 60
    assert (await bench.call()).ok


async def test_memory_is_looked_at_now_and_then_and_not_for_each_call(bench: Bench) -> None:
    bench.pools = bench.new_pools(memory_s=math.inf)
    small = Workers(max_mb=60)
    assert (await bench.pools.run(a_job({"do": "grow", "mb": 64}, workers=small))).ok
    assert len({await bench.pid(workers=small) for _ in range(20)}) == 1
    assert "memory_mb" not in bench.workers()[0]


async def test_workers_without_calls_are_left_in_peace(bench: Bench) -> None:
    assert (await bench.call()).ok
    await until(lambda: "memory_mb" in bench.workers()[0])
    await until(lambda: not bench.tasks())


# Editions


async def test_a_newer_edition_gets_new_workers_and_the_old_finish_what_they_do(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        go_on = tmp_path / "go_on"
        script = f"while {READY}; do echo > '{path}'; until [ -e '{go_on}' ]; do sleep 0.01; done; {answers()}; done"
        old = asyncio.create_task(bench.pools.run(shell(script, changes={"edition": 1})))
        waiting = asyncio.create_task(bench.pools.run(shell(script, changes={"edition": 1})))
        await started
        new = await bench.pid(changes={"edition": 2})
        assert bench.does() == ["loading", "idle"]
        go_on.touch()
        assert (await old).ok
        assert (await waiting).ok
        await until(lambda: bench.does() == ["idle"])
        assert await bench.pid(changes={"edition": 2}) == new


async def test_workers_without_a_call_end_when_a_newer_edition_is_called(bench: Bench) -> None:
    old = await bench.pid(changes={"edition": 1})
    new = await bench.pid(changes={"edition": 2})
    await until(lambda: not is_alive(old))
    assert is_alive(new)
    assert "worker 1 is let go: its overlay has changed\n" in bench.logs.notes


async def test_a_late_call_of_an_older_edition_is_served_and_the_newer_goes_on(bench: Bench) -> None:
    new = await bench.pid(changes={"edition": 2})
    old = await bench.pid(changes={"edition": 1})
    assert old != new
    await until(lambda: not is_alive(old))
    assert await bench.pid(changes={"edition": 2}) == new
    await until(lambda: bench.does() == ["idle"])


async def test_what_is_forgotten_ends_once_its_calls_have(bench: Bench, tmp_path: Path) -> None:
    two = Workers(count=2)
    async with programs.start_signal(tmp_path) as (path, started):
        go_on = tmp_path / "go_on"
        script = f"""while {READY}; do case $line in *'"stay": "'*) {announce()};
            until [ -e '{go_on}' ]; do sleep 0.01; done;; esac; {answers()}; done"""
        argv = ("sh", "-c", script)
        stays = asyncio.create_task(bench.pools.run(a_job({"stay": path}, argv, workers=two)))
        await started
        assert (await bench.pools.run(a_job({}, argv, workers=two))).ok
        bench.pools.forget("test")
        bench.pools.forget("another")
        assert bench.does() == ["loading", "ending"]
        await until(lambda: bench.does() == ["loading"])
        go_on.touch()
        assert (await stays).ok
    await until(lambda: bench.workers() == [])
    assert "worker 1 is let go: its overlay was removed or disabled\n" in bench.logs.notes
    assert (await bench.call()).ok


async def test_an_idle_pool_ends_and_the_next_call_begins_anew(bench: Bench) -> None:
    bench.pools = bench.new_pools(idle_s=0.01)
    pid = await bench.pid()
    await until(lambda: not is_alive(pid))
    await until(lambda: bench.pools.state("test") == {})
    assert "worker 1 is let go: no call for 0.01 s\n" in bench.logs.notes
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
    assert "worker 1 wrote what nobody had asked for: " in bench.logs.notes


async def test_output_between_two_calls_ends_a_worker(bench: Bench, tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"
    job = shell(f"{READY}; {answers()}; until [ -e '{go_on}' ]; do sleep 0.01; done; echo more; read line")
    assert (await bench.pools.run(job)).ok
    assert [worker["state"] for worker in bench.workers()] == ["idle"]
    go_on.touch()
    await until(lambda: bench.workers() == [])
    assert "worker 1 wrote what nobody had asked for: 'more\\n'\n" in bench.logs.notes


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


async def test_a_worker_that_closes_its_stdout_and_stays_is_ended(bench: Bench) -> None:
    bench.pools = bench.new_pools(exit_grace_s=0.01)
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


async def test_a_program_that_cannot_be_executed_is_told_what_it_lacks(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "bare").write_text("echo 1\n")
    (tmp_path / "bare").chmod(0o755)
    outcome = await bench.pools.run(a_job(argv=("./bare",), folder=tmp_path))
    assert outcome.code is Code.START
    assert "a script needs a first line such as #!/bin/sh" in error_of(outcome)


async def test_a_worker_that_crashes_at_every_start_is_not_started_in_a_hot_loop(bench: Bench, tmp_path: Path) -> None:
    bench.pools = bench.new_pools(first_backoff_s=60.0, longest_backoff_s=60.0)
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


async def test_the_next_call_after_the_wait_tries_again(bench: Bench, tmp_path: Path) -> None:
    bench.pools = bench.new_pools(first_backoff_s=0.01, longest_backoff_s=0.01)
    healed = tmp_path / "healed"
    script = f"[ -e '{healed}' ] || exit 3; while {READY}; do {answers()}; done"
    assert [(await bench.pools.run(shell(script))).code for _ in range(5)] == [Code.CRASH] * 5
    healed.touch()
    async with asyncio.timeout(20):
        while not (outcome := await bench.pools.run(shell(script))).ok:
            assert outcome.retryable
            await asyncio.sleep(0.001)
    assert [(await bench.pools.run(shell(script))).code for _ in range(5)] == [Code.OK] * 5


async def test_an_answer_ends_the_row_of_failures(bench: Bench) -> None:
    bench.pools = bench.new_pools(first_backoff_s=60.0, longest_backoff_s=60.0)
    for _ in range(2):
        assert (await bench.call("exit", status=3)).code is Code.CRASH
        assert (await bench.call()).ok
        assert (await bench.call("exit", status=3)).code is Code.CRASH


async def test_a_call_waits_out_a_failing_start_while_another_worker_lives(bench: Bench, tmp_path: Path) -> None:
    bench.pools = bench.new_pools(first_backoff_s=0.05)
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


class Gated:
    """A worker that writes `x` to `starts` when it starts, and lets the calls that say `stay` wait at a gate."""

    def __init__(self, folder: Path, *, loading: bool = False) -> None:
        self.starts = folder / "starts"
        self.gate = folder / "gate"
        at_the_gate = f"until [ -e '{self.gate}' ]; do sleep 0.01; done"
        stay = f"""case $line in *'"stay"'*) {at_the_gate};; esac"""
        before = at_the_gate if loading else ":"
        script = f"echo x >> '{self.starts}'; {before}; while {READY}; do {stay}; {answers()}; done"
        self.argv = ("sh", "-c", script)

    def job(self, payload: dict[str, Any] | None = None, **options: Any) -> Job:
        return a_job(payload, self.argv, **options)

    def open(self) -> None:
        self.gate.touch()

    @property
    def started(self) -> int:
        return self.starts.read_text().count("x")


IMPATIENT_S = 0.3
"""What an impatient caller allows, while the limit of its overlay stays."""


async def give_up(bench: Bench, job: Job, how: str) -> None:
    """Have a call that a worker has leave it, because of its time or of its caller."""
    if how == "impatience":
        outcome = await bench.pools.run(job._replace(deadline=time.monotonic() + IMPATIENT_S, limit=job.deadline))
        assert outcome.code is Code.TIMEOUT
        assert outcome.result is None
    else:
        call = asyncio.create_task(bench.pools.run(job))
        await until(lambda: any(state in {"loading", "busy"} for state in bench.does()))
        await until(lambda: "pid" in bench.workers()[-1])
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


@pytest.mark.parametrize("how", ["impatience", "cancellation"])
async def test_a_loading_worker_survives_an_impatient_first_caller_and_serves_the_second(
    bench: Bench, tmp_path: Path, how: str
) -> None:
    worker = Gated(tmp_path, loading=True)
    await give_up(bench, worker.job(), how)
    assert bench.does() == ["late"]
    second = asyncio.create_task(bench.pools.run(worker.job()))
    worker.open()
    assert (await second).ok
    assert (worker.started, bench.workers()[0]["calls"]) == (1, 2)


@pytest.mark.parametrize("how", ["impatience", "cancellation"])
async def test_a_late_reply_reaches_nobody_and_its_worker_serves_the_next_call(
    bench: Bench, tmp_path: Path, how: str
) -> None:
    worker = Gated(tmp_path)
    assert (await bench.pools.run(worker.job())).ok
    await give_up(bench, worker.job({"stay": 1}), how)
    assert bench.does() == ["late"]
    job = worker.job()
    second = asyncio.create_task(bench.pools.run(job))
    worker.open()
    assert (await second).ok
    assert (worker.started, bench.does(), bench.workers()[0]["calls"]) == (1, ["idle"], 3)


async def test_a_call_that_times_out_says_what_becomes_of_its_worker(bench: Bench) -> None:
    def job(do: str = "hang", **limits: Any) -> Job:
        return a_job({"do": do, "log": "why\n"}, workers=Workers(count=2), **limits)

    loading = await bench.pools.run(job(timeout_s=0.3))
    assert re.fullmatch(
        r"the worker had not answered within the call's 0\.300 s, and has (29|30)(\.\d)? s more for a reply, which is "
        "dropped; it has never answered yet, and a reply is to be one line, and flushed",
        error_of(loading),
    )
    assert (await bench.pools.run(job("echo"))).ok
    over = await bench.pools.run(job(timeout_s=0.3))
    assert error_of(over) == "the worker had not answered within the call's 0.300 s, and was ended"
    assert over.log == "why\n"


async def test_a_late_worker_keeps_its_place_and_another_serves_where_there_is_room(
    bench: Bench, tmp_path: Path
) -> None:
    worker, two = Gated(tmp_path), Workers(count=2)
    await give_up(bench, worker.job({"stay": 1}, workers=two), "impatience")
    assert (await bench.pools.run(worker.job(workers=two))).ok
    assert bench.does() == ["late", "idle"]
    await give_up(bench, worker.job({"stay": 2}, workers=two), "impatience")
    refused = await bench.pools.run(worker.job(workers=two, timeout_s=0.05))
    assert refused.code is Code.TIMEOUT
    assert (
        error_of(refused)
        == "none of 2 workers was free within the call's 0.050 s: 2 late with a call that was given up"
    )
    assert worker.started == 2
    worker.open()
    await until(lambda: bench.does() == ["idle", "idle"])


async def test_a_late_reply_to_another_call_ends_its_worker(bench: Bench, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script = (
        f'{READY}; until [ -e \'{gate}\' ]; do sleep 0.01; done; echo \'{{"request_id":"1","ok":true}}\'; read line'
    )
    await give_up(bench, shell(script), "impatience")
    gate.touch()
    await until(lambda: bench.workers() == [])
    assert "worker 1 wrote a line whose request_id is not the call's" in bench.logs.notes


async def test_a_worker_is_late_no_longer_than_its_overlay_allows(bench: Bench) -> None:
    pid = await bench.pid()
    hanging = a_job({"do": "hang"}, timeout_s=0.1)
    hanging = hanging._replace(limit=hanging.deadline + 0.05)
    assert (await bench.pools.run(hanging)).code is Code.TIMEOUT
    assert (await bench.call(number=1)).ok
    assert not is_alive(pid)
    assert "worker 1 had not answered in the time that it may take, and was ended\n" in bench.logs.notes


async def test_a_worker_that_loads_for_ever_is_ended_and_killed_where_it_ignores_term(bench: Bench) -> None:
    loads_for_ever = f"trap '' TERM; {READY}; while :; do sleep 0.01; done"
    job = shell(loads_for_ever, timeout_s=0.2, workers=Workers(start_timeout_s=0.4))
    assert (await bench.pools.run(job)).code is Code.TIMEOUT
    assert bench.does() == ["late"]
    await until(lambda: bench.workers() == [])
    assert "worker 1 was ended by SIGKILL before it answered\n" in bench.logs.notes


async def test_a_call_that_times_out_in_a_pool_that_ends_is_told_that_its_worker_does_too(bench: Bench) -> None:
    assert (await bench.pools.run(a_job(changes={"edition": 2}))).ok
    late = await bench.pools.run(a_job({"do": "hang"}, timeout_s=0.3, changes={"edition": 1}))
    assert error_of(late).startswith("the worker had not answered within the call's 0.300 s, and was ended; it has")


async def test_a_late_worker_of_an_older_edition_is_not_waited_for(bench: Bench) -> None:
    await give_up(bench, a_job({"do": "hang"}, changes={"edition": 1}), "impatience")
    assert (await bench.pools.run(a_job(changes={"edition": 2}))).ok
    await until(lambda: bench.does() == ["idle"])


async def test_a_call_waits_for_a_worker_within_its_deadline_only(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        hanging = asyncio.create_task(bench.call("hang", started=path))
        await started
        outcome = await bench.pools.run(a_job(timeout_s=0.05))
        assert outcome.code is Code.TIMEOUT
        assert error_of(outcome) == "none of 1 worker was free within the call's 0.050 s: 1 loading"
        hanging.cancel()
        await asyncio.wait([hanging])


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
    gate = tmp_path / "gate"
    script = f"trap '' TERM; {READY}; echo no reply; until [ -e '{gate}' ]; do sleep 0.01; done"
    calls = []
    for count in (1, 2):
        calls.append(asyncio.create_task(bench.pools.run(shell(script))))
        await until(functools.partial(bench.do, *["ending"] * count))
    third = await bench.pools.run(shell(script, timeout_s=0.05))
    assert error_of(third) == "none of 1 worker was free within the call's 0.050 s: 2 ending"
    gate.touch()
    assert [(await call).code for call in calls] == [Code.PROTOCOL] * 2


# Cancelled and closed


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


async def test_a_call_cancelled_while_its_worker_starts_leaves_that_worker_for_the_next(bench: Bench) -> None:
    two = Workers(count=2)
    hanging = asyncio.create_task(bench.pools.run(a_job({"do": "hang"}, workers=two)))
    await until(lambda: bench.does() == ["loading"])
    call = asyncio.create_task(bench.pools.run(a_job(workers=two)))
    await until(lambda: len(bench.workers()) == 2)
    call.cancel()
    await asyncio.wait([call])
    await until(lambda: "memory_mb" in bench.workers()[-1])
    assert bench.does() == ["loading", "loading"]
    assert (await bench.pools.run(a_job(workers=two))).ok
    assert [worker["calls"] for worker in bench.workers()] == [0, 1]
    hanging.cancel()
    await asyncio.wait([hanging])


async def test_a_fault_in_reading_a_large_reply_is_logged_and_ends_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker_module, "reply_on", fail)
    outcome = await bench.call(text="x" * (LARGE_BYTES + 1))
    assert outcome.code is Code.PROTOCOL
    assert error_of(outcome) == "the worker wrote a line that could not be read: MemoryError()"
    assert "MemoryError" in caplog.text


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


class NoHelpers:
    """Helpers of which none is ever ready."""

    async def start(self, *_: object, data_bytes: int, held_mb: int) -> None:
        await asyncio.get_running_loop().create_future()


async def test_closing_does_not_wait_for_a_helper_that_is_not_ready() -> None:
    helpers: Any = NoHelpers()
    pools = WorkerPools(helpers, None, kill_grace_s=60, idle_s=60)
    starting = asyncio.create_task(pools.run(a_job()))
    await asyncio.sleep(0)
    assert pools.state("test")["workers"] == [{"phase": "OPEN", "state": "loading", "calls": 0}]
    unstarted = asyncio.create_task(pools.run(a_job(changes={"phase": "CLEAR"})))
    await asyncio.sleep(0)
    await pools.close()
    assert [(await call).code for call in (starting, unstarted)] == [Code.CANCELLED] * 2
    assert pools.state("test") == {}


@pytest.mark.parametrize("first", [True, False])
async def test_a_second_close_at_once_ends_the_grace_of_the_first(bench: Bench, tmp_path: Path, *, first: bool) -> None:
    bench.pools = bench.new_pools(kill_grace_s=3600)
    async with programs.start_signal(tmp_path) as (path, started):
        script = f"trap '' TERM; {READY}; {announce()}; while :; do sleep 0.01; done"
        call = asyncio.create_task(bench.pools.run(a_job({"stay": path}, ("sh", "-c", script))))
        await started
        closing = [asyncio.create_task(bench.pools.close())] if first else []
        await asyncio.sleep(0)
        await bench.pools.close(at_once=True)
        await asyncio.gather(*closing)
    assert ((await call).code, (await call).exit_code) == (Code.CANCELLED, -9)


async def test_closing_ends_a_late_worker(bench: Bench) -> None:
    await give_up(bench, a_job({"do": "hang"}), "impatience")
    await bench.pools.close()
    assert bench.workers() == []


async def test_what_a_helper_takes_with_it_is_said(bench: Bench, tmp_path: Path) -> None:
    async with programs.start_signal(tmp_path) as (path, started):
        call = asyncio.create_task(bench.call("hang", started=path))
        await started
        await bench.helpers.close()
        outcome = await call
    assert (outcome.code, outcome.retryable) == (Code.CRASH, True)
    assert re.fullmatch(r"the worker was ended from outside \(.+\) before it answered", error_of(outcome))


# Purges

PURGEABLE = Workers(purge=True)


async def ask(bench: Bench, do: str, **payload: Any) -> Outcome:
    return await bench.pools.run(a_job({"do": do, **payload}, workers=PURGEABLE))


async def purges_of(bench: Bench) -> Any:
    """How often the worker that answers was told."""
    return (await ask(bench, "purges")).result["result"]


@contextlib.asynccontextmanager
async def at_the_gate(bench: Bench, tmp_path: Path, do: str) -> AsyncIterator[tuple[asyncio.Task[Outcome], str]]:
    """A call whose worker has begun with it and goes on once the FIFO is opened to write."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with programs.start_signal(tmp_path) as (path, started):
        call = asyncio.create_task(ask(bench, do, gate=str(gate), started=path))
        await started
        yield call, str(gate)


async def let_through(gate: str) -> None:
    await asyncio.to_thread(lambda: os.close(os.open(gate, os.O_WRONLY)))


async def test_a_free_worker_is_told_of_a_purge_at_once_and_goes_on(bench: Bench) -> None:
    before = time.time_ns() // 1_000_000
    first = (await ask(bench, "pid")).result["result"]
    assert bench.pools.purge(None) == {"test": 1}
    assert await purges_of(bench) == 1
    assert (await ask(bench, "pid")).result["result"] == first
    (told,) = bench.workers()
    assert told["purges"] == 1
    assert told["last_purge_ms"] >= before


async def test_a_purge_frees_what_a_worker_keeps(bench: Bench) -> None:
    await ask(bench, "grow", mb=64)
    await until(lambda: bench.workers()[0].get("memory_mb", 0) > 64)
    bench.pools.purge({"test"})
    assert await purges_of(bench) == 1
    await until(lambda: bench.workers()[0]["memory_mb"] < 64)


async def test_a_worker_that_has_a_call_is_told_after_its_reply_and_before_the_next_call(
    bench: Bench, tmp_path: Path
) -> None:
    async with at_the_gate(bench, tmp_path, "wait") as (call, gate):
        assert bench.pools.purge(None) == {"test": 1}
        assert "purges" not in bench.workers()[0]
        queued = asyncio.create_task(purges_of(bench))
        await let_through(gate)
        assert (await call).ok
        assert await queued == 1


async def test_a_worker_that_is_late_is_told_once_its_reply_has_come(bench: Bench, tmp_path: Path) -> None:
    async with at_the_gate(bench, tmp_path, "wait") as (call, gate):
        call.cancel()
        await until(lambda: bench.do("late"))
        assert bench.pools.purge(None) == {"test": 1}
        await let_through(gate)
        assert await purges_of(bench) == 1


@pytest.mark.parametrize(
    ("workers", "overlays"), [(Workers(), None), (PURGEABLE, {"another"}), (PURGEABLE, set[str]())]
)
async def test_nobody_else_is_told_of_a_purge(bench: Bench, workers: Workers, overlays: set[str] | None) -> None:
    await bench.pools.run(a_job(workers=workers))
    assert bench.pools.purge(overlays) == {}
    outcome = await bench.pools.run(a_job({"do": "purges"}, workers=workers))
    assert outcome.result["result"] == 0


async def test_every_worker_of_an_overlay_is_told(bench: Bench, tmp_path: Path) -> None:
    async with at_the_gate(bench, tmp_path, "wait") as (call, gate):
        other = await bench.pools.run(a_job({}, workers=PURGEABLE, changes={"phase": "CLEAR"}))
        assert other.ok
        assert bench.pools.purge(None) == {"test": 2}
        await let_through(gate)
        await call


async def test_a_worker_that_answers_a_purge_breaks_the_protocol_and_is_replaced(bench: Bench) -> None:
    await ask(bench, "rude")
    bench.pools.purge(None)
    await until(lambda: bench.workers() == [])
    assert "nobody had asked for" in bench.logs.notes
    assert await purges_of(bench) == 0


async def test_a_call_that_its_worker_never_read_behind_a_purge_goes_on_to_another(
    bench: Bench, tmp_path: Path
) -> None:
    async with at_the_gate(bench, tmp_path, "leave") as (call, gate):
        assert (await call).ok
        assert bench.pools.purge(None) == {"test": 1}
        unread = asyncio.create_task(purges_of(bench))
        await until(lambda: bench.do("busy"))
        await let_through(gate)
        assert await unread == 0


async def test_purges_that_a_worker_has_not_read_yet_are_one(bench: Bench, tmp_path: Path) -> None:
    async with at_the_gate(bench, tmp_path, "leave") as (call, gate):
        assert (await call).ok
        assert [bench.pools.purge(None) for _ in range(5000)] == [{"test": 1}] * 5000
        assert bench.workers()[0]["purges"] == 1
        await let_through(gate)


async def test_a_worker_that_has_closed_its_stdin_is_not_told_and_takes_no_more_calls(bench: Bench) -> None:
    assert (await ask(bench, "deaf")).ok
    assert bench.pools.purge(None) == {}
    assert await purges_of(bench) == 0
    await until(lambda: bench.do("idle"))


async def test_a_worker_that_closed_its_stdin_during_its_call_gets_no_other_after_a_purge(
    bench: Bench, tmp_path: Path
) -> None:
    async with at_the_gate(bench, tmp_path, "deaf") as (call, gate):
        assert bench.pools.purge(None) == {"test": 1}
        await let_through(gate)
        assert (await call).ok
        assert await purges_of(bench) == 0


async def test_a_worker_that_only_starts_has_nothing_to_let_go_of(bench: Bench) -> None:
    call = asyncio.create_task(purges_of(bench))
    await asyncio.sleep(0)
    assert bench.pools.purge(None) == {}
    assert await call == 0
