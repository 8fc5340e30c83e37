"""Verifying the ledger: its lines, its tree and its checkpoints, while others write and after others changed it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bus import checkpoints, merkle, verification
from bus.canonical import canonical
from bus.errors import NotFoundError, OperatorError
from bus.notes import Checkpoint
from bus.records import GENESIS, environment_hash
from bus.segments import closed_path
from bus.verification import VerifyReport, verify
from tests.ledgers import ENVIRONMENT, HASH, appended, call, opened, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


# --- Lines ---


def test_a_bit_flipped_at_any_byte_is_found(path: Path) -> None:
    write(path, call("a", environment_hash=environment_hash(ENVIRONMENT)), call("b", payload={"hash": HASH}))
    whole = path.read_bytes()
    assert verify(path).lines == 3
    for index in range(len(whole)):
        changed = bytearray(whole)
        changed[index] ^= 1 << index % 8
        path.write_bytes(changed)
        report = verify(path)
        assert report.first_bad == whole.count(b"\n", 0, index) + 1, (index, report)


def _without_line_2(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1]]


def _not_json(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"[]\n", lines[2]]


def _empty(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"\n", *lines[1:]]


def _changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"ok":true', b'"ok":false'), lines[2]]


def _cut_off(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1][:-1]]


def _from_another_chain(lines: list[bytes]) -> list[bytes]:
    record = orjson.loads(lines[1])
    record["prev"] = HASH
    del record["hash"]
    record["hash"] = hashlib.sha256(canonical(record)).hexdigest()
    return [lines[0], canonical(record) + b"\n", lines[2]]


def _without_a_hash(lines: list[bytes]) -> list[bytes]:
    record = orjson.loads(lines[1])
    del record["hash"]
    return [lines[0], canonical(record) + b"\n", lines[2]]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_without_line_2, "seq"),
        (_swapped, "seq"),
        (_not_json, "json"),
        (_empty, "json"),
        (_changed, "hash"),
        (_without_a_hash, "hash"),
        (_cut_off, "torn"),
        (_from_another_chain, "chain"),
    ],
)
def test_a_damaged_log_is_told_by_what_is_wrong_with_which_line(
    path: Path, damage: Callable[[list[bytes]], list[bytes]], fault: str
) -> None:
    receipts = write(path, call("a"), call("b"), call("c"))
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    report = verify(path)
    assert (report.lines, report.first_bad, report.fault) == (1, 2, fault)
    assert report.head_hash == receipts[0].hash
    assert report.reason
    assert not report.ok


def test_a_whole_log_is_verified_with_progress(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "PROGRESS_LINES", 2)
    receipts = write(path, *(call() for _ in range(5)))
    seen: list[int] = []
    report = verify(path, progress=seen.append)
    assert (report.ok, report.lines, report.head_hash) == (True, 5, receipts[-1].hash)
    assert seen == [2, 4]


def test_an_empty_log_is_whole_and_a_missing_one_is_an_error(path: Path) -> None:
    with pytest.raises(NotFoundError):
        verify(path)
    write(path)
    assert verify(path) == VerifyReport(0, 0, GENESIS, merkle.EMPTY_ROOT.hex(), 0, 0)


def test_a_log_without_its_lock_file_is_verified(path: Path) -> None:
    write(path, call())
    path.with_name("provenance.lock").unlink()
    assert verify(path).lines == 1


async def test_a_log_is_verified_while_it_is_written(path: Path) -> None:
    with opened(path) as ledger:
        written = asyncio.gather(*(appended(ledger, call(error="x" * 5000)) for _ in range(500)))
        reports = [await asyncio.to_thread(verify, path) for _ in range(10)]
        await written
    assert all(report.ok for report in reports)


def test_an_end_that_is_cut_off_while_it_is_read_is_no_fault(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And other calls' lines take its place; no block that is read at once holds all of them."""
    monkeypatch.setattr(verification, "PROGRESS_LINES", 1)
    write(path, *(call("cut off", error="x" * 600_000) for _ in range(5)))
    lines = path.read_bytes().splitlines(keepends=True)
    seen: list[int] = []

    def and_cut_off(line: int) -> None:
        seen.append(line)
        if seen == [1, 2, 3]:
            path.write_bytes(b"".join(lines[:2]))
            write(path, *(call("instead", error="y" * 500_000) for _ in range(3)))

    report = verify(path, progress=and_cut_off)
    assert (report.ok, report.lines, report.head_hash) == (True, 5, records(path)[-1]["hash"])
    assert records(path)[-1]["request_id"] == "instead"
    assert seen == [1, 2, 3, 1, 2, 3, 4, 5]


def test_a_fault_that_stays_is_told_after_a_second_look_at_the_open_segment_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "PROGRESS_LINES", 1)
    write(path, *(call(str(number)) for number in range(6)))
    lines = path.read_bytes().splitlines(keepends=True)
    closed_path(path, 1).write_bytes(b"".join(lines[:3]))
    path.write_bytes(b"".join([lines[3], lines[4][:-9]]))
    seen: list[int] = []
    report = verify(path, progress=seen.append)
    assert (report.first_bad, report.fault, report.lines) == (5, "torn", 4)
    assert seen == [1, 2, 3, 4, 4]
    closed_path(path, 1).write_bytes(b"".join(_swapped(lines[:3])))
    seen.clear()
    assert verify(path, progress=seen.append).first_bad == 2
    assert seen == [1]


# --- The tree ---


@pytest.fixture
def long(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirteen lines, of which 5 and 10 are checkpoints."""
    monkeypatch.setattr(checkpoints, "LINES", 4)
    write(path, *(call(str(number)) for number in range(11)))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def root_of(path: Path, size: int) -> bytes:
    return merkle.root_of(bytes.fromhex(record["hash"]) for record in records(path)[:size])


def rewritten(path: Path, seq: int, **members: Any) -> None:
    """The log as somebody would write it who changed one line and chained all that come after it anew."""
    prev, lines = GENESIS, []
    for record in records(path):
        if record["seq"] == seq:
            record.update(members)
        record["prev"] = prev
        del record["hash"]
        prev = record["hash"] = hashlib.sha256(canonical(record)).hexdigest()
        lines.append(canonical(record) + b"\n")
    path.write_bytes(b"".join(lines))


def test_the_checkpoints_of_a_log_are_held_against_its_tree(long: Path) -> None:
    report = verify(long)
    assert (report.ok, report.lines, report.checkpoints, report.signed) == (True, 13, 2, 0)
    assert report.root == root_of(long, 13).hex()


def test_a_log_that_was_chained_anew_is_found_at_its_next_checkpoint(long: Path) -> None:
    rewritten(long, 7, error="something else")
    report = verify(long)
    assert (report.first_bad, report.fault) == (10, "tree")


@pytest.mark.parametrize(
    "members", [{"size": 3}, {"root": HASH}, {"nodes": []}, {"nodes": [HASH]}, {"nodes": [3]}, {"size": "4"}]
)
def test_a_checkpoint_that_makes_no_sense_is_found(long: Path, members: dict[str, Any]) -> None:
    rewritten(long, 5, **members)
    report = verify(long)
    assert (report.first_bad, report.fault) == (5, "tree")


def test_part_of_a_log_is_verified(long: Path) -> None:
    report = verify(long, start=3, end=12)
    assert (report.ok, report.lines, report.last, report.checkpoints) == (True, 10, 12, 2)
    assert report.head_hash == records(long)[11]["hash"]
    assert report.root == root_of(long, 12).hex()
    assert verify(long, start=6, end=8).root is None
    with pytest.raises(NotFoundError):
        verify(long, start=14)


def test_what_lies_outside_a_part_is_not_looked_at(long: Path) -> None:
    lines = long.read_bytes().splitlines(keepends=True)
    long.write_bytes(b"".join([b"[]\n", *lines[1:12], b"[]\n"]))
    assert verify(long, start=2, end=12).ok
    assert verify(long).first_bad == 1
    assert verify(long, start=2).first_bad == 13


@pytest.mark.parametrize("start", [1, 3])
def test_a_log_that_only_grew_holds_against_an_earlier_checkpoint(long: Path, start: int) -> None:
    for size in range(5, 14):
        assert verify(long, start=start, against=Checkpoint("x", size, root_of(long, size))).ok


def test_a_log_that_was_rewritten_or_cut_off_does_not_hold_against_what_was_kept(long: Path) -> None:
    kept = Checkpoint("x", 13, root_of(long, 13))
    lines = long.read_bytes().splitlines(keepends=True)
    long.write_bytes(b"".join(lines[:12]))
    report = verify(long, against=kept)
    assert (report.first_bad, report.fault) == (13, "tree")
    long.write_bytes(b"".join(lines))
    rewritten(long, 12, error="something else")
    report = verify(long, against=kept)
    assert (report.first_bad, report.fault) == (13, "tree")


def test_lines_that_cannot_tell_of_a_checkpoint_are_no_proof_against_it(long: Path) -> None:
    parts: tuple[tuple[int, int | None], ...] = ((6, 9), (1, 6), (9, None))
    for start, end in parts:
        with pytest.raises(OperatorError, match="do not tell the tree of 7 lines"):
            verify(long, start=start, end=end, against=Checkpoint("x", 7, root_of(long, 7)))
