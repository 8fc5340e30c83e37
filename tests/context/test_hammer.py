"""The load and kill tool, for a short while; and that it finds what it is there to find."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from aos_context.errors import BrokenError, StaleError
from aos_context.ledger import FileLedger

from tests.context import hammer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def test_many_writers_in_many_processes_lose_no_update(tmp_path: Path) -> None:
    said = hammer.load(hammer.Run(tmp_path), patches=240, processes=4, writers=12, seed=1)
    assert said.startswith("240 patches by 12 writers in 4 processes")


def test_killed_writers_leave_every_patch_that_they_acknowledged(tmp_path: Path) -> None:
    said = hammer.kill(hammer.Run(tmp_path), kills=7, seed=2)
    assert said.startswith("7 kills (seed 2); each of ")
    torn, healed = map(int, re.findall(r"(\d+) (?:tails torn|healed)", said))
    assert healed >= torn >= 1
    assert len(list((tmp_path / "ledger").glob("run.v2.1.jsonl.torn-*"))) == healed


@pytest.fixture
def run(tmp_path: Path) -> hammer.Run:
    """One that was written to, and not yet checked."""
    run = hammer.Run(tmp_path)
    run.boot()
    crowd = hammer.Writers(run)
    try:
        crowd.start({"w": range(6)}, "")
        crowd.take()
    finally:
        crowd.end()
    return run


def test_what_was_written_is_whole(run: hammer.Run) -> None:
    run.check_all()
    assert [one.update_seq for one in run.acknowledged] == [1, 2, 3, 4, 5, 6]


def test_an_acknowledged_patch_that_is_not_there_is_a_fault(run: hammer.Run) -> None:
    run.acknowledged.append(hammer.Acknowledged(7, "w", 6, 0))
    with pytest.raises(hammer.FaultError, match="acknowledged and is not in the ledger"):
        run.check()


def test_an_acknowledged_patch_that_is_another_is_a_fault(run: hammer.Run) -> None:
    run.acknowledged[2] = run.acknowledged[2]._replace(number=9)
    with pytest.raises(hammer.FaultError, match="event 3"):
        run.check()


def test_a_lost_update_is_a_fault(run: hammer.Run) -> None:
    wsm = run.manager()
    item = {"id": "w", "content": "6", "timestamp": "2026-01-18T00:00:00Z", "priority": 5}
    patch = {"expected_seq": 6, "set": {"next_action": "6"}, "add": {"sliding_context": [item]}}
    wsm.apply_patch({"_schema_version": "2.1", **patch}, actor="w")
    with pytest.raises(hammer.FaultError, match="counted up: 6; patches: 7"):
        run.check()


def test_a_line_that_is_missing_is_a_fault(run: hammer.Run) -> None:
    path = run.ledger.path
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(BrokenError, match="its ledger only at 5"):
        run.check()


def test_a_torn_tail_that_is_not_healed_is_a_fault(run: hammer.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.tear(random.Random(1))
    monkeypatch.setattr(hammer, "kill_some", lambda *_: None)
    monkeypatch.setattr(run, "boot", lambda: None)
    with pytest.raises(hammer.FaultError, match="1 tails were torn, and 0 healed"):
        hammer.kill(run, kills=4, seed=1)


@pytest.mark.parametrize("seed", range(30))
def test_a_torn_tail_is_passed_over_by_readers_and_healed_by_the_next_writer(run: hammer.Run, seed: int) -> None:
    before = run.ledger.last_seq()
    run.tear(random.Random(seed))
    assert FileLedger(run.ledger.path).last_seq() == before
    run.check()
    with pytest.raises(StaleError):
        run.manager().apply_patch({"_schema_version": "2.1", "expected_seq": 0, "set": {"status": "BUSY"}})
    run.check()
    assert run.kinds["LEDGER_HEALED"] == 1


def test_a_torn_file_is_a_fault(run: hammer.Run) -> None:
    run.path.write_bytes(run.path.read_bytes()[:-1])
    with pytest.raises(BrokenError, match="is not JSON"):
        run.look()


def test_the_tool_says_what_it_did_and_what_was_wrong(tmp_path: Path) -> None:
    def hammered(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "tests.context.hammer", "--root", str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    code, said = hammered("--patches", "40", "--processes", "2", "--writers", "4", "--kills", "2", "--seed", "3")
    assert code == 0, said
    assert said.splitlines()[0].startswith("40 patches by 4 writers in 2 processes")
    assert said.splitlines()[1].startswith("2 kills (seed 3)")
    code, said = hammered("--patches", "1", "--processes", "0", "--seed", "3")
    assert (code, said) == (1, "FAULT (seed 3): FaultError: acknowledgements: 0; patches: 1\n")
    assert list(tmp_path.iterdir()) == []
