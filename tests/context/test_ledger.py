"""The ledger: only appended to, found again after every crash, and broken where anybody else wrote in it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from typing import TYPE_CHECKING

import pytest
from aos_context.errors import BrokenError, SchemaError
from aos_context.ledger import BACK_BYTES, UNSURE_MOST, FileLedger
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from aos_context.artifacts import Document


BLOCK_BYTES = 4_096
"""What a disk takes whole or not at all."""


@pytest.fixture
def ledger(tmp_path: Path) -> FileLedger:
    return FileLedger(tmp_path / "run_1" / "ledger" / "run.v2.1.jsonl")


def note(ledger: FileLedger, number: int, size: int = 0, **members: object) -> Document:
    return ledger.append({"event_type": "NOTE", "data": {"n": number, "x": "x" * size}, **members})


def seqs(ledger: FileLedger) -> list[int]:
    return [event["seq"] for event in ledger.read()]


def test_an_event_is_filled_in_numbered_and_read_as_it_was_written(ledger: FileLedger) -> None:
    first = ledger.append({"event_type": "NOTE"})
    assert set(first) == {"_schema_version", "seq", "event_id", "event_type", "run_id", "timestamp", "actor", "data"}
    assert (first["seq"], first["run_id"], first["actor"], first["data"]) == (1, "run_1", None, {})
    second = ledger.append({"event_type": "NOTE", "event_id": "mine", "actor": "me", "run_id": "other"})
    assert (second["seq"], second["event_id"], second["actor"], second["run_id"]) == (2, "mine", "me", "other")
    assert list(ledger.read()) == [first, second]
    assert first["event_id"] != ledger.append({"event_type": "NOTE"})["event_id"]


def test_the_run_is_the_events_else_the_ledgers_else_the_last_events_else_the_folders(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "ledger" / "run.v2.1.jsonl"
    assert FileLedger(path).append({"event_type": "NOTE"})["run_id"] == "folder"
    assert FileLedger(path, run_id="own").append({"event_type": "NOTE"})["run_id"] == "own"
    assert FileLedger(path).append({"event_type": "NOTE"})["run_id"] == "own"
    assert FileLedger(path).append({"event_type": "NOTE", "run_id": "its"})["run_id"] == "its"


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"seq": 1}, "$.seq"),
        ({"event_type": "note"}, "$.event_type"),
        ({"colour": "red"}, "$"),
        ({"event_type": "MEMORY_PROPOSED", "data": {}}, "$.data"),
        ({"data": {"x": float("nan")}}, "$"),
        ({"data": {"x": "\ud800"}}, "$"),
    ],
)
def test_what_is_no_event_is_refused_with_its_path_and_not_written(
    ledger: FileLedger, members: Document, path: str
) -> None:
    with pytest.raises(SchemaError) as refused:
        ledger.append({"event_type": "NOTE", **members})
    assert refused.value.faults[0]["path"] == path
    assert ledger.last_seq() == 0


def test_a_ledger_that_is_not_there_has_no_events_and_reading_makes_none(ledger: FileLedger) -> None:
    assert (list(ledger.read()), ledger.tail(5), ledger.last_seq()) == ([], [], 0)
    assert ledger.find_last({"NOTE"}) is None
    assert not ledger.path.parent.exists()


@given(sizes=st.lists(st.sampled_from([0, 1, 200, BACK_BYTES, 3 * BACK_BYTES]), min_size=1, max_size=12))
def test_every_part_is_found_whatever_the_lengths_of_the_lines(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    ledger = FileLedger(tmp_path_factory.mktemp("run") / "ledger" / "run.v2.1.jsonl")
    events = [note(ledger, number, size) for number, size in enumerate(sizes)]
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    other = FileLedger(ledger.path)
    assert other.last_seq() == len(events)
    for after in range(len(events) + 2):
        assert list(other.read(after)) == events[after:]
        assert list(other.read(after, limit=2)) == events[after : after + 2]
        assert other.tail(after) == events[len(events) - min(after, len(events)) :]
        assert list(other.lines(after)) == lines[after:]


def test_the_last_of_some_types_is_found_and_so_are_those_before_it_down_to_a_seq(ledger: FileLedger) -> None:
    for kind in ("A", "B", "A", "C", "C"):
        ledger.append({"event_type": kind, "data": {"event_type": "B"}})

    def found(kinds: set[str]) -> int | None:
        event = ledger.find_last(kinds)
        return None if event is None else int(event["seq"])

    assert (found({"A"}), found({"A", "B"}), found({"B"}), found({"D"})) == (3, 3, 2, None)
    assert [event["seq"] for event in ledger.read_back({"A", "C"})] == [5, 4, 3, 1]
    assert [event["seq"] for event in ledger.read_back({"A", "C"}, after=3)] == [5, 4]


def test_another_writers_events_are_seen_and_numbers_go_on(ledger: FileLedger) -> None:
    other = FileLedger(ledger.path)
    for number in range(6):
        assert note((ledger, other)[number % 2], number)["seq"] == number + 1
        assert ledger.last_seq() == other.last_seq() == number + 1
    assert seqs(ledger) == [1, 2, 3, 4, 5, 6]


def test_many_threads_append_each_event_once(ledger: FileLedger) -> None:
    def work(base: int) -> None:
        mine = FileLedger(ledger.path)
        for number in range(25):
            note(mine, base + number)

    threads = [threading.Thread(target=work, args=(100 * base,)) for base in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seqs(ledger) == list(range(1, 201))
    assert len({event["data"]["n"] for event in ledger.read()}) == 200


def test_a_line_torn_at_any_byte_is_passed_over_and_cut_off_by_the_next_append(ledger: FileLedger) -> None:
    first = note(ledger, 1)
    before = ledger.path.stat().st_size
    note(ledger, 2, 40)
    whole = ledger.path.read_bytes()
    for size in range(before + 1, len(whole)):
        ledger.path.write_bytes(whole[:size])
        healer = FileLedger(ledger.path)
        assert (list(healer.read()), healer.tail(9), healer.last_seq()) == ([first], [first], 1)
        assert note(healer, 3)["seq"] == 3
        _, healed, _ = healer.read()
        assert healed["event_type"] == "LEDGER_HEALED"
        assert healed["data"]["cut_bytes"] == size - before
        kept = ledger.path.with_name(healed["data"]["kept_as"])
        assert kept.read_bytes() == whole[before:size]


@pytest.mark.parametrize("tail", [b"\0" * 700, b'{"_sch\0\0\0\n', b'\0\0\n{"a":1}\0\n\0', b"\0" * (2 * BACK_BYTES)])
def test_blocks_that_never_reached_the_disk_are_a_torn_tail_too(ledger: FileLedger, tail: bytes) -> None:
    first = note(ledger, 1)
    with ledger.path.open("ab") as file:
        file.write(tail)
    assert list(FileLedger(ledger.path).read()) == [first]
    note(ledger, 2)
    assert [event["event_type"] for event in ledger.read()] == ["NOTE", "LEDGER_HEALED", "NOTE"]
    assert len(ledger.path.read_bytes().splitlines()) == 3
    assert note(FileLedger(ledger.path), 3)["seq"] == 4


def refuse(ledger: FileLedger, number: int, size: int = 700) -> Document:
    data = {"code": "STALE", "detail": "x" * size, "expected_seq": number, "current_seq": 1}
    return ledger.append({"event_type": "WS_UPDATE_REJECTED", "data": data})


@pytest.mark.parametrize(
    ("types", "synced"),
    [
        ("NNNRRRRRRRRRRRRRRRRRRRR", 3),
        ("NNNRRRRRRRRRRRRRRRN", 3),  # its sync was ended by the power cut
        ("NNNRRRRRRRRRNRRRRRRRN", 3),  # and one was not begun, as its writer was killed
        ("RRRRRRRRRRRRRRR", 0),
        ("NRRRRRRRRRRRRRRR", 1),
    ],
)
def test_any_blocks_that_a_power_cut_keeps_from_the_disk_leave_a_ledger_that_goes_on(
    ledger: FileLedger, types: str, synced: int
) -> None:
    events = [note(ledger, number) if kind == "N" else refuse(ledger, number) for number, kind in enumerate(types)]
    whole = ledger.path.read_bytes()
    starts = [0, *itertools.accumulate(len(line) for line in whole.splitlines(keepends=True))]
    blocks = range(starts[synced] // BLOCK_BYTES, len(whole) // BLOCK_BYTES + 1)
    for lost in itertools.chain(itertools.combinations(blocks, 1), itertools.combinations(blocks, 2)):
        torn = bytearray(whole)
        for block in lost:
            start, end = max(block * BLOCK_BYTES, starts[synced]), min((block + 1) * BLOCK_BYTES, len(whole))
            torn[start:end] = bytes(end - start)
        ledger.path.write_bytes(torn)
        kept = sum(end <= max(lost[0] * BLOCK_BYTES, starts[synced]) for end in starts[1:])
        assert list(FileLedger(ledger.path).read()) == events[:kept]
        healer = FileLedger(ledger.path)
        assert healer.last_seq() == kept
        assert note(healer, 99)["seq"] == kept + 2
        *before, healed, _ = ledger.read()
        assert before == events[:kept]
        assert ledger.path.with_name(healed["data"]["kept_as"]).read_bytes() == torn[starts[kept] :]


def test_a_block_that_was_certainly_synced_and_is_lost_is_damage_and_nothing_is_cut_off(ledger: FileLedger) -> None:
    refuse(ledger, 0, 900)
    for number in range(1 + UNSURE_MOST):
        note(ledger, number)
    damaged = ledger.path.read_bytes().replace(b"x" * 900, b"\0" * 900)
    ledger.path.write_bytes(damaged)
    with pytest.raises(BrokenError, match="line 1"):
        list(FileLedger(ledger.path).read())
    FileLedger(ledger.path).append({"event_type": "NOTE"})
    assert ledger.path.read_bytes().startswith(damaged)


def test_what_was_refused_is_not_synced_and_the_next_change_takes_it_along(
    ledger: FileLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda _: synced.append(ledger.path.stat().st_size))
    refuse(ledger, 1)
    assert synced == []
    note(ledger, 2)
    assert synced == [ledger.path.stat().st_size]


@pytest.mark.parametrize("first", [note, refuse])
def test_the_name_of_a_new_ledger_is_on_the_disk_with_its_first_line_whatever_that_is(
    ledger: FileLedger, monkeypatch: pytest.MonkeyPatch, first: Callable[..., Document]
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr("aos_context.ledger.sync_folder", folders.append)
    first(ledger, 1)
    note(ledger, 2)
    assert folders == [ledger.path.parent]


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        (1, lambda _: b"{}\n"),
        (1, lambda line: line.replace(b'"seq":2', b'"seq":3')),
        (2, lambda line: line.replace(b"NOTE", b"note")),
        (0, lambda _: b""),
    ],
)
def test_a_line_that_somebody_changed_is_broken_and_named(
    ledger: FileLedger, line: int, broken: Callable[[bytes], bytes]
) -> None:
    for number in range(3):
        note(ledger, number)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    lines[line] = broken(lines[line])
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(BrokenError, match=f"run.v2.1.jsonl, line {line + 1}"):
        list(FileLedger(ledger.path).read())


def test_nothing_is_appended_to_a_ledger_whose_last_line_is_broken(ledger: FileLedger) -> None:
    note(ledger, 1)
    ledger.path.write_bytes(b"{}\n")
    with pytest.raises(BrokenError):
        note(FileLedger(ledger.path), 2)
    assert ledger.path.read_bytes() == b"{}\n"


def test_a_full_disk_leaves_the_ledger_as_it_was(ledger: FileLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    first = note(ledger, 1)
    pwrite = os.pwrite

    def filling(fd: int, data: memoryview, place: int) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data[: len(data) // 2], place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", filling)
        with pytest.raises(OSError, match="No space"):
            note(ledger, 2)
    assert list(ledger.read()) == [first]
    assert ledger.path.read_bytes().endswith(b"\n")
    assert note(ledger, 2)["seq"] == 2


def test_an_event_that_could_not_be_synced_is_not_in_the_ledger(
    ledger: FileLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = note(ledger, 1)

    def broken(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError, match="Input/output"):
            ledger.append({"event_type": "NOTE"})
    assert list(ledger.read()) == [first]
    assert ledger.append({"event_type": "NOTE"})["seq"] == 2


class CrashError(BaseException):
    """Nothing in the ledger expects it."""


def crashing(real: Callable[..., object], calls: Iterator[int], step: int) -> Callable[..., object]:
    """A system call that fails where it is the step's turn."""

    def call(*args: object) -> object:
        if next(calls) == step:
            raise CrashError
        return real(*args)

    return call


def test_a_crash_at_any_step_of_healing_leaves_a_ledger_that_heals(
    ledger: FileLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = note(ledger, 1)
    torn = ledger.path.read_bytes() + b'{"_schema_version":' + b" " * 900
    for step in itertools.count(1):
        ledger.path.write_bytes(torn)
        calls = itertools.count(1)

        with monkeypatch.context() as patched:
            for name in ("write", "fsync", "pwrite", "ftruncate", "fdatasync"):
                patched.setattr(os, name, crashing(getattr(os, name), calls, step))
            try:
                note(FileLedger(ledger.path), 2)
            except CrashError:
                ended = False
            else:
                ended = True
        assert note(FileLedger(ledger.path), 3)["event_type"] == "NOTE"
        events = list(ledger.read())
        assert events[0] == first
        assert events[1]["event_type"] == "LEDGER_HEALED"
        assert events[1]["data"]["cut_bytes"] == 919
        if ended:
            break
    assert step > 5


def test_a_line_is_compact_json_with_sorted_keys(ledger: FileLedger) -> None:
    event = note(ledger, 1)
    line = json.dumps(event, sort_keys=True, separators=(",", ":"))
    assert ledger.path.read_text() == line + "\n"
