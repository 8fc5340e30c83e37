"""Chaos: a short game in full, and the proof that the eyes of the long one see."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from bus import manifests
from tests.chaos import overlays, plans, processes, verdicts
from tests.chaos.clients import Call
from tests.chaos.overlays import ANSWER, OVERLAYS, Order
from tests.chaos.processes import MARK, Victim
from tests.support import PATIENCE_S, REPO, InProcessRunner, a_call, add_overlay, eventually, running_bus

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bus.settings import Settings

ROUNDS = 6
LIMIT_S = 300
"""How long the short game may take; it takes a tenth of that where nothing is wrong."""

SEED = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**6))
"""Another one each time. `CHAOS_SEED` draws the rounds of a game that went wrong again."""

UNTIL_EOF = "import sys; sys.stdin.read()"


def test_six_rounds_leave_nothing_behind_and_lose_no_line() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--rounds", str(ROUNDS), "--seed", str(SEED), "--json"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"CHAOS_SEED={SEED}\n{done.stderr}"
    summary = json.loads(done.stdout)
    assert (summary["seed"], summary["rounds"], summary["faults"]) == (SEED, ROUNDS, 0)
    assert len({played["strike"] for played in summary["played"]}) == ROUNDS
    assert summary["answered"] > 0


def test_a_seed_draws_the_same_rounds_again() -> None:
    first, again, other = (list(plans.draw(Random(seed), 40)) for seed in (7, 7, 8))
    assert first == again != other
    assert {plan.strike for plan in first[: len(plans.STRIKES)]} == set(plans.STRIKES)


def test_a_seed_draws_the_same_calls_again() -> None:
    first, again, other = ([overlays.order(rng, OVERLAYS) for _ in range(50)] for rng in map(Random, (7, 7, 8)))
    assert first == again != other


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_a_hostile_overlay_is_a_sound_one_that_knows_its_deeds(tmp_path: Path, overlay: overlays.Overlay) -> None:
    folder = tmp_path / overlay.name
    overlay.write(folder)
    manifest = manifests.read(folder)
    assert manifest.warnings == ()
    text = "".join((folder / file).read_text() for file in overlay.files)
    deeds = {deed.name for deed in overlay.deeds} - {ANSWER.name}
    assert overlay.deeds[0].name == ANSWER.name
    assert {name for name in deeds if f"def {name}(" not in text and f'"do":"{name}"' not in text} == set()


@contextlib.contextmanager
def running(program: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that has said that it is there; it ends with the block."""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def subreaper() -> Iterator[None]:
    processes.become_subreaper()
    yield
    processes.become_subreaper(yes=False)


def test_a_process_is_found_by_its_mark() -> None:
    mark = secrets.token_hex(8)
    with running(UNTIL_EOF, **{MARK: mark}) as process:
        eventually(lambda: processes.marked(mark) == [process.pid], "it has its environment")
    assert processes.marked(mark) == []


@pytest.mark.usefixtures("subreaper")
def test_a_daemon_without_a_mark_is_found_once_its_parents_are_gone() -> None:
    before = {process.pid for process in processes.family()}
    daemon = "import os; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0)\n"
    told = "print(os.getpid(), flush=True); os.close(1); os.execve('/bin/sleep', ['sleep', '600'], {})"
    with running(daemon + told) as process:
        assert process.stdout is not None
        pid = int(process.stdout.read())
        process.wait(PATIENCE_S)
        processes.wait_until(lambda: pid in {child.pid for child in processes.family()} - before, PATIENCE_S)
        left = {child.pid for child in processes.family()} - before
        processes.kill(pid)
    assert pid in left

    def all_reaped() -> bool:
        processes.reap()
        return not {child.pid for child in processes.family()} - before

    eventually(all_reaped, "it is gone")


def test_a_zombie_is_seen_until_it_is_reaped() -> None:
    with running("") as process:
        child = [child for child in processes.family() if child.pid == process.pid]
        eventually(lambda: processes.zombies(child) == set(child), "it has ended, and nobody has looked")
    assert processes.zombies(child) == set()


def test_a_descriptor_more_is_seen_with_its_kind() -> None:
    before = processes.held(os.getpid())
    with open(os.devnull, "rb"):  # noqa: PTH123
        assert processes.held(os.getpid()) - before == {os.devnull: 1}
    reader, writer = os.pipe()
    assert (processes.held(os.getpid()) - before)["pipe"] == 2
    os.close(reader)
    os.close(writer)
    assert processes.held(os.getpid()) == before


def test_a_victim_is_killed_only_while_it_is_a_child_of_its_parent() -> None:
    with running(UNTIL_EOF) as process:
        with pytest.raises(ProcessLookupError), Victim(process.pid, 1):
            pass
        assert process.poll() is None
        with Victim(process.pid, os.getpid()) as victim:
            victim.kill()
        assert process.wait(PATIENCE_S) == -9


def answered(**changes: Any) -> Call:
    """A call of the first overlay that was answered as it should be."""
    body = {"code": "OK", "result": 5, "error": None, "detail": None} | changes
    return Call(Order(OVERLAYS[0], ANSWER, 0, 5, 1000), "answered", told=False, status=200, body=body)


def test_an_answer_as_it_should_be_is_no_fault() -> None:
    assert list(verdicts.of_call(answered(), strike=())) == []


def test_the_result_of_another_call_is_a_fault() -> None:
    (fault,) = verdicts.of_call(answered(result=6), strike=())
    assert "another call" in fault


def test_a_crash_is_a_fault_unless_a_helper_was_killed() -> None:
    crashed = answered(code="ERR_OVERLAY_CRASH")
    assert len(list(verdicts.of_call(crashed, strike=()))) == 1
    assert list(verdicts.of_call(crashed, strike=("helper",))) == []


def test_a_call_without_an_answer_is_a_fault_unless_the_server_was_told_to_end() -> None:
    cut = dataclasses.replace(answered(), end="cut", error="reset")
    assert len(list(verdicts.of_call(cut, strike=("helper",)))) == 1
    told = dataclasses.replace(cut, told=True)
    assert list(verdicts.of_call(told, strike=())) == []


def test_a_call_that_was_sent_before_the_end_is_answered_unless_the_bus_was_killed() -> None:
    cut = dataclasses.replace(answered(), end="cut", told=True, sent=True, error="reset")
    assert len(list(verdicts.of_call(cut, strike=()))) == 1
    assert list(verdicts.of_call(cut, strike=("bus",))) == []


@pytest.fixture
async def one_call(settings: Settings) -> Call:
    """A call in a ledger of its own, whose answer is what the bus said."""
    add_overlay(settings.overlays)
    async with running_bus(settings, InProcessRunner()) as bus:
        answer = await bus.invoke(a_call())
    return answered(**answer.body)


async def test_an_answer_whose_line_says_the_same_is_no_fault(settings: Settings, one_call: Call) -> None:
    assert list(verdicts.of_ledger(settings.ledger, 1, [one_call])) == []


@pytest.mark.parametrize("member", ["code", "request_id", "payload_hash"])
async def test_an_answer_whose_line_says_something_else_is_a_fault(
    settings: Settings, one_call: Call, member: str
) -> None:
    other = dataclasses.replace(one_call, body=one_call.body | {member: "else"})
    (fault,) = verdicts.of_ledger(settings.ledger, 1, [other])
    assert member in fault


async def test_an_answer_without_its_line_is_a_fault(settings: Settings, one_call: Call) -> None:
    (missing,) = verdicts.of_ledger(settings.ledger, 2, [one_call])
    assert "not in the ledger" in missing
    (nameless,) = verdicts.of_ledger(
        settings.ledger, 1, [dataclasses.replace(one_call, body=one_call.body | {"provenance": None})]
    )
    assert "names no line" in nameless


async def test_two_answers_of_one_line_are_a_fault(settings: Settings, one_call: Call) -> None:
    (fault,) = verdicts.of_ledger(settings.ledger, 1, [one_call, one_call])
    assert "one request_id" in fault


@pytest.mark.parametrize(
    ("closing", "count"),
    [([], 0), (["end"], 1), (["interrupted"], 1), (["end", "interrupted"], 2), (["interrupted", "interrupted"], 2)],
)
def test_a_call_that_started_and_is_not_closed_by_exactly_one_line_is_a_fault(closing: list[str], count: int) -> None:
    end = {"type": "invoke", "seq": 9, "request_id": "a"}
    interrupted = {"type": "interrupted", "seq": 10, "request_id": "a", "started": 7}
    others = [{"type": "started", "seq": 8, "request_id": "b"}, end | {"request_id": "b"}]
    lines = [{"type": "started", "seq": 7, "request_id": "a"}, *others]
    lines += [end if line == "end" else interrupted for line in closing]
    expected = [] if count == 1 else [f"{count} lines close the call that started in line 7"]
    assert list(verdicts.of_starts(lines)) == expected


async def test_a_ledger_that_was_changed_is_a_fault(settings: Settings, one_call: Call) -> None:
    settings.ledger.write_text(settings.ledger.read_text().replace('"ok":true', '"ok":false', 1))
    faults = list(verdicts.of_ledger(settings.ledger, 1, [one_call]))
    assert any("line 1 of the ledger is bad" in fault for fault in faults)
