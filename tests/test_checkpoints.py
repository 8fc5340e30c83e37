"""Checkpoints: when the ledger says what it is, and that nobody reads further back than to the last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bus import checkpoints, merkle
from bus.ledger import Ledger
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, append, call, opened, write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def types(path: Path) -> list[str]:
    return [record["type"] for record in records(path)]


def served(path: Path, *members: dict[str, Any]) -> None:
    """As `write`, by a server."""
    ledger = Ledger(path, fsync="never", environment=ENVIRONMENT)
    ledger.open(serves=True)
    for record in members:
        append(ledger, record)
    ledger.close()


def test_after_so_many_lines_one_says_what_came_before_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 3)
    receipts = write(path, *(call() for _ in range(7)))
    assert types(path) == [*["invoke"] * 3, "checkpoint", *["invoke"] * 3, "checkpoint", "invoke"]
    leaves = [bytes.fromhex(record["hash"]) for record in records(path)]
    for record in records(path):
        if record["type"] == "checkpoint":
            assert record["size"] == record["seq"] - 1
            assert record["root"] == merkle.root_of(leaves[: record["size"]]).hex()
            assert record["note"] is None
    assert [receipt.seq for receipt in receipts] == [1, 2, 3, 5, 6, 7, 9]
    assert receipts[2].tree_size == 4


def test_a_server_leaves_one_when_it_ends_and_not_two_in_a_row(path: Path) -> None:
    served(path, call())
    served(path)
    served(path, call())
    assert types(path) == ["invoke", "checkpoint", "invoke", "checkpoint"]


def test_a_command_that_makes_one_call_leaves_its_line_alone(path: Path) -> None:
    write(path, call())
    write(path, call())
    assert types(path) == ["invoke", "invoke"]


def test_a_server_writes_one_once_time_has_passed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "AFTER_S", 0.0)
    ledger = Ledger(path, fsync="never", environment=ENVIRONMENT)
    ledger.open(serves=True)
    try:
        append(ledger, call())
        append(ledger, call())
        assert types(path) == ["invoke", "checkpoint"] * 2
    finally:
        ledger.close()
    assert types(path) == ["invoke", "checkpoint"] * 2


def test_who_opens_the_ledger_reads_back_to_the_last_one_and_no_further(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 3)
    write(path, *(call() for _ in range(4)))
    root = verify(path).root
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b"x" * (len(line) - 1) + b"\n" for line in lines[:3]] + lines[3:]))
    with opened(path) as ledger:
        assert ledger.healthy
        assert append(ledger, call()).seq == 6
    path.write_bytes(b"".join(lines))
    with opened(path) as ledger:
        append(ledger, call())
    assert verify(path).ok
    assert verify(path, end=5).root == root


def test_processes_that_take_turns_keep_one_tree(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 5)
    with opened(path) as one, opened(path) as other:
        for _ in range(9):
            append(one, call("one"))
            append(other, call("other", payload={"type": "checkpoint"}))
    report = verify(path)
    assert (report.ok, report.lines, report.checkpoints) == (True, 21, 3)
    assert types(path).count("checkpoint") == 3


def test_a_checkpoint_that_lies_makes_the_ledger_unwell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 2)
    write(path, call(), call(), call())
    text = path.read_bytes()
    root = records(path)[2]["root"].encode()
    path.write_bytes(text.replace(root, root[::-1]))
    with opened(path) as ledger:
        assert not ledger.healthy
        assert "do not have the hash" in str(ledger.reason)
