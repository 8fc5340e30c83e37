"""Faults: a sample of each kind in full, and the proof that the eyes of the tool see."""

from __future__ import annotations

import functools
import json
import os
import secrets
import subprocess
import sys
import threading
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from bus import chain, unsynced
from bus.checkpoints import Checkpoints
from tests.faults import disks, facts, kills, pairs, scenario, syscalls
from tests.faults.children import DIED, HUNG, Child
from tests.faults.pairs import Beside
from tests.faults.syscalls import Fault, Setting
from tests.ledgers import append, call, opened
from tests.support import REPO

if TYPE_CHECKING:
    from pathlib import Path

    from bus.checkpoints import Note
    from bus.ledger import Receipt
    from bus.merkle import Frontier
    from tests.faults.children import Say

PARTS = ("syscalls", "pairs", "kills", "full disk", "read-only", "truncated", "flipped bits")
LIMIT_S = 300
"""How long the sample may take; it takes some ten seconds where nothing is wrong."""

SEED = int(os.environ.get("FAULTS_SEED") or secrets.randbelow(10**6))
"""Another one each time. `FAULTS_SEED` draws a sample again that went wrong."""


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults", "--seed", str(SEED), "--json"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.stdout, done.stderr
    return {part["name"]: part | {"status": done.returncode} for part in json.loads(done.stdout)["parts"]}


@pytest.mark.parametrize("name", PARTS)
def test_no_fault_loses_a_line_or_doubles_one_or_breaks_the_chain(sample: dict[str, Any], name: str) -> None:
    part = sample[name]
    if part["skipped"]:
        pytest.skip(part["skipped"])
    assert part["faults"] == [], f"FAULTS_SEED={SEED}"
    assert part["runs"] > 1


def test_the_sample_has_every_part_and_its_status_says_whether_all_was_well(sample: dict[str, Any]) -> None:
    assert tuple(sample) == PARTS
    wrong = any(part["faults"] for part in sample.values())
    assert {part["status"] for part in sample.values()} == {int(wrong)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


@pytest.fixture
def strace() -> None:
    if why := syscalls.lacking():
        pytest.skip(why)


def stands(receipt: Receipt, name: str) -> str:
    return scenario._stands(receipt, name)


# --- What is said, and what is seen ---


def test_what_a_child_has_said_is_heard_though_it_is_killed() -> None:
    def work(say: Say) -> None:
        say("there")
        threading.Event().wait()

    with Child(work) as child:
        child.go()
        child.first_line()
        assert child.kill() == ["there"]
        assert child.status == -9


def test_a_child_that_does_not_end_is_said_to_hang(capfd: pytest.CaptureFixture[str]) -> None:
    with Child(lambda _: threading.Event().wait()) as child:  # type: ignore[arg-type]
        child.go()
        assert child.lines(timeout_s=0.1) == [HUNG]
    assert "most recent call first" in capfd.readouterr().err


def test_a_child_that_raises_says_what() -> None:
    def work(_: Say) -> None:
        raise RuntimeError("unthought of")

    with Child(work) as child:
        child.go()
        (said,) = child.lines()
    assert "unthought of" in said
    assert child.status == DIED


def test_every_way_of_a_writer_is_answered_and_no_fault_is_seen_where_there_is_none(path: Path) -> None:
    said = scenario.prepare(path, "torn")
    scenario.every_way(path, "batch", said.append)
    assert [line for line in said if line.startswith("refused")] == []
    assert len(facts.stands(said)) == 11
    assert list(facts.after_reopening(path, facts.stands(said))) == []


def test_a_line_that_was_answered_for_and_is_not_there_is_a_fault(path: Path) -> None:
    with opened(path) as ledger:
        said = [stands(append(ledger, call(name)), name) for name in ("a", "b")]
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert list(facts.of_file(path, said)) == ["b was answered with line 2, which is not there"]


def test_a_line_that_is_not_the_one_that_was_answered_for_is_a_fault(path: Path) -> None:
    with opened(path) as ledger:
        said = [stands(append(ledger, call("a")), "b")]
    assert list(facts.of_file(path, said)) == ["b was answered with line 1, which is of a"]


def test_a_call_that_is_there_twice_is_a_fault(path: Path) -> None:
    with opened(path) as ledger:
        for _ in range(2):
            append(ledger, call("a"))
    assert list(facts.of_file(path, [])) == ["a is there 2 times"]


def test_a_broken_chain_is_a_fault(path: Path) -> None:
    with opened(path) as ledger:
        append(ledger, call("a"))
    path.write_bytes(path.read_bytes().replace(b'"ok":true', b'"ok":false'))
    (fault,) = facts.of_file(path, [])
    assert "line 1 is bad (hash)" in fault


def test_a_ledger_that_nobody_can_write_any_more_is_a_fault(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"[]\n")
    assert "cannot be written any more" in next(iter(facts.after_reopening(path, [])))


needs_a_key = pytest.mark.skipif(scenario.signer() is None, reason="signatures cannot be made here")


@needs_a_key
def test_a_note_that_the_log_contradicts_is_a_fault(path: Path) -> None:
    with opened(path, "batch", notary=scenario.notary(path)) as ledger:
        said = [stands(append(ledger, call(name)), name) for name in ("a", "b")]
    assert [len(line.split(" ")) for line in said] == [6, 6]
    assert list(facts.of_file(path, said)) == []
    kept = [line.split(" ")[4:] for line in said]
    path.unlink()
    with opened(path) as ledger:
        append(ledger, call("other"))
    assert [fault.split(" and ")[0] for fault in facts.of_notes(path, said)] == [
        f"a note of {size} lines with the root {root} was answered with," for size, root in kept
    ]


@needs_a_key
def test_a_note_that_was_asked_for_and_that_the_log_contradicts_is_a_fault(path: Path) -> None:
    with opened(path) as ledger:
        append(ledger, call("a"))
    said: list[str] = []
    scenario.sign(path, said.append, times=2)
    assert [line.split(" ")[:2] for line in facts.noted(said)] == [["noted", "1"]] * 2
    assert list(facts.of_file(path, said)) == []
    path.unlink()
    with opened(path) as ledger:
        append(ledger, call("other"))
    [fault] = facts.of_file(path, said)
    assert fault.startswith(f"a note of 1 lines with the root {said[-1].split(' ')[2]} was answered with")
    scenario.sign(path, said.append, times=1)
    assert said[-1].startswith("refused to sign: ")


@needs_a_key
def test_a_key_that_takes_the_log_for_another_is_a_fault(path: Path) -> None:
    with opened(path, "batch", notary=scenario.notary(path)) as ledger:
        append(ledger, call("a"))
    path.unlink()
    faults = list(facts.after_reopening(path, [], scenario.notary(path)))
    assert [fault.partition(":")[0] for fault in faults] == ["the ledger is not signed any more"]


def test_writers_that_lose_lines_when_they_are_killed_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that a process keeps to itself before it writes them are lost with it."""
    monkeypatch.setattr(chain, "write_all", lambda *_: None)
    assert any("which is not there" in fault for run in kills.play(path, Random(1), 2) for fault in run)


def test_who_takes_a_full_disk_for_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := disks.lacking():
        pytest.skip(why)
    monkeypatch.setattr(chain, "write_all", _write_or_not)
    assert [run for run in disks.full(64) if run] != []


def _write_or_not(fd: int, data: bytes) -> None:
    """What no writer may do."""
    try:
        os.write(fd, data)
    except OSError:
        return


# --- strace ---


@pytest.mark.usefixtures("strace")
def test_an_answer_for_a_line_whose_write_failed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "write_all", _write_or_not)
    fault = Fault(Setting("new", "always"), "write", 2, "EIO", lasting=True)
    assert any("was answered with line" in wrong for wrong in syscalls.run(fault))


@needs_a_key
@pytest.mark.usefixtures("strace")
def test_a_writer_that_signs_what_it_has_not_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It remembers first: killed before its lines are there, it leaves a key that takes the log for another."""
    note = Checkpoints.note

    def noted(self: Checkpoints, tree: Frontier) -> Note | None:
        made = note(self, tree)
        if made is not None and self.notary is not None:
            self.notary.vouch(made.signed, lambda _: None)
        return made

    monkeypatch.setattr(Checkpoints, "note", noted)
    runs = [syscalls.run(Fault(Setting("new", "always"), "write", number, "KILL")) for number in (2, 4, 6)]
    assert any("the ledger is not signed any more" in wrong for run in runs for wrong in run)


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("beside", Beside)
def test_two_processes_to_which_nothing_is_done_are_answered(beside: Beside) -> None:
    assert list(pairs.run(Fault(Setting("rotating", "batch"), "write", 10**4, "EIO"), beside)) == []


@pytest.mark.usefixtures("strace")
def test_who_takes_back_what_it_could_not_sync_though_another_has_gone_on_from_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unsynced, "_rewrite", lambda fd, start, _: os.ftruncate(fd, start))
    fault = Fault(Setting("new", "always"), "fdatasync", 3, "EIO", lasting=True)
    assert any(wrong.startswith("other-0 was answered with line") for wrong in pairs.run(fault, Beside.TURNS))


@pytest.mark.usefixtures("strace")
def test_a_writer_that_hangs_is_found(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Child, "lines", functools.partialmethod(Child.lines, timeout_s=1.0))
    monkeypatch.setattr(scenario, "every_way", lambda *_, **__: threading.Event().wait())
    assert next(iter(syscalls.run(Fault(Setting("new", "never"), "write", 1, "EIO")))) == "the writer hangs"
    assert "most recent call first" in capfd.readouterr().err


@pytest.mark.usefixtures("strace")
def test_a_seed_draws_the_same_faults_again_and_every_way_to_fail_is_among_all() -> None:
    every = list(syscalls.draw(None))
    assert {fault.what for fault in every} == {"KILL", "EIO", "ENOSPC", "EINTR"}
    assert {fault.setting.beginning for fault in every} == set(scenario.BEGINNINGS)
    assert {"write", "fdatasync", "ftruncate", "fsync", "flock", "rename", "openat"} <= {
        fault.syscall for fault in every
    }
    assert {fault.syscall for fault in every if fault.lasting} >= {"write", "fdatasync"}


def test_only_system_calls_on_the_ledgers_files_are_counted_each_by_its_number_in_its_thread() -> None:
    trace = """\
10 openat(AT_FDCWD</>, "/elsewhere", O_RDONLY) = 3</elsewhere>
10 openat(AT_FDCWD</>, "/t/faults-1/logs/p", O_RDWR) = 4</t/faults-1/logs/p>
11 write(4</t/faults-1/logs/p>, "x", 1 <unfinished ...>
10 write(4</t/faults-1/logs/p>, "y", 1) = 1
11 <... write resumed>) = 1
11 write(4</t/faults-1/logs/p>, "z", 1) = 1
10 io_submit(0x7f, 1, [{aio_lio_opcode=IOCB_CMD_FDSYNC}]) = 1
"""
    assert syscalls.numbers(trace, "/t/faults-1") == {"openat": {2}, "write": {1, 2}, "io_submit": {1}}
