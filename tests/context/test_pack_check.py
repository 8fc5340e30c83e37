"""A resume pack against the ledger of a real bus: which of its memories were committed as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aos_context import bus_ledger
from aos_context.bus_ledger import FORM, GENESIS
from aos_context.errors import BrokenError, NotFoundError, PackError
from aos_context.pack_check import check_against_ledger
from aos_context.resume_pack import snapshot

from bus import records, segments
from tests import ledgers
from tests.context.made import TIME, MadeRun, memory_item

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aos_context.artifacts import Document
    from aos_context.pack_check import Report

COMMIT = {"overlay": "aos_context", "capability": "milestone", "phase": "SEAL"}
STARTED = {**COMMIT, "type": "started", "timestamp_ms": 1, "writer": "w"}


def commit(request_id: str, **members: Any) -> dict[str, Any]:
    return ledgers.call(request_id, **{**COMMIT, **members})


def other(number: int) -> dict[str, Any]:
    return ledgers.call(f"other-{number}", overlay="echo", capability="say", phase="OPEN")


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Lines 1 to 7; the commits are the first, the fourth and the last."""
    path = tmp_path / "logs" / "provenance.jsonl"
    path.parent.mkdir()
    ledgers.write(
        path,
        commit("req-1"),
        other(2),
        other(3),
        commit("req-4", capability="commit"),
        other(5),
        other(6),
        commit("req-7"),
    )
    return path


def pack_of(folder: Path, items: Sequence[Document]) -> Path:
    run = MadeRun(folder / "run_1")
    run.commit(*items)
    return snapshot(run.folder, pack_id="p1", zip_pack=True, pointers={}, memory_items=items, now=TIME).path


def report(tmp_path: Path, ledger: Path, *committed_by: str | None) -> Report:
    items = [memory_item(f"mem_{number}", id_) for number, id_ in enumerate(committed_by)]
    return check_against_ledger(pack_of(tmp_path, items), ledger)


def reasons(found: Report) -> list[str | None]:
    return [verdict.reason for verdict in found.verdicts]


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("as_folder", [True, False])
def test_items_whose_commits_the_ledger_has_are_sound(tmp_path: Path, ledger: Path, as_folder: bool) -> None:
    found = report(tmp_path, ledger.parent if as_folder else ledger, "req-1", "req-4", "req-4", "req-7")
    assert reasons(found) == [None] * 4
    assert [verdict.seq for verdict in found.verdicts] == [1, 4, 4, 7]
    assert found.ok()
    assert (found.pack_id, found.run_id, found.lines) == ("p1", "run_1", len(lines_of(ledger)))


def test_an_item_without_a_request_id_is_a_finding_that_can_be_allowed(tmp_path: Path, ledger: Path) -> None:
    found = report(tmp_path, ledger, "req-1", None)
    assert reasons(found) == [None, "it was committed without a bus"]
    assert [one.item_id for one in found.faults()] == ["mem_1"]
    assert found.ok(allow_unrecorded=True)
    assert not found.ok()


def test_a_call_that_the_ledger_does_not_have_is_a_fault_whatever_is_allowed(tmp_path: Path, ledger: Path) -> None:
    found = report(tmp_path, ledger, "req-9", None)
    assert reasons(found)[0] == "the ledger has no line on the call that it names"
    assert [one.item_id for one in found.faults(allow_unrecorded=True)] == ["mem_0"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"type": "denied"}, 'type is "denied"'),
        ({"type": "replay"}, 'type is "replay"'),
        ({"overlay": "echo"}, 'overlay is "echo"'),
        ({"capability": "propose"}, 'capability is "propose"'),
        ({"phase": "OPEN"}, 'phase is "OPEN"'),
        ({"ok": False, "code": "CONFLICT"}, "ok is false"),
        ({"ok": False, "code": "ERR_TIMEOUT", "phase": "OPEN"}, 'phase is "OPEN"'),
        ({"ok": 1}, "ok is 1"),
    ],
)
def test_a_call_that_was_no_commit_is_a_fault_and_says_why(
    tmp_path: Path, ledger: Path, members: dict[str, Any], reason: str
) -> None:
    ledgers.write(ledger, commit("req-8", **members))
    found = report(tmp_path, ledger, "req-8")
    assert reason in str(reasons(found)[0])


def test_a_ledgers_line_that_was_changed_is_a_fault_of_the_items_that_name_it(tmp_path: Path, ledger: Path) -> None:
    lines = lines_of(ledger)
    lines[3] = lines[3].replace(b'"timestamp_ms":1', b'"timestamp_ms":2')
    ledger.write_bytes(b"".join(lines))
    found = report(tmp_path, ledger, "req-1", "req-4", "req-7")
    assert reasons(found) == [None, "the line's bytes do not have the hash that it holds", None]


def test_every_flipped_byte_of_a_commits_line_is_a_fault(tmp_path: Path, ledger: Path) -> None:
    lines = lines_of(ledger)
    pack = pack_of(tmp_path, [memory_item(committed_by="req-4")])
    for place in range(0, len(lines[3]), 5):
        changed = lines[3][:place] + bytes([lines[3][place] ^ 1]) + lines[3][place + 1 :]
        ledger.write_bytes(b"".join([*lines[:3], changed, *lines[4:]]))
        assert not check_against_ledger(pack, ledger).ok()


@pytest.mark.parametrize(("gone", "reason"), [(2, "its prev is not"), (4, "the line after it"), (3, "has no line")])
def test_a_line_that_was_taken_out_of_the_ledger_is_missed_by_its_neighbours(
    tmp_path: Path, ledger: Path, gone: int, reason: str
) -> None:
    lines = lines_of(ledger)
    ledger.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
    assert reason in str(reasons(report(tmp_path, ledger, "req-4"))[0])


def test_a_line_that_was_made_anew_with_its_own_hash_does_not_have_the_links(tmp_path: Path, ledger: Path) -> None:
    lines = lines_of(ledger)
    forged, _ = records.draft_call(commit("req-9")).line(4, json.loads(lines[3])["prev"])
    ledger.write_bytes(b"".join([*lines[:3], forged, *lines[4:]]))
    assert reasons(report(tmp_path, ledger, "req-9")) == ["the line after it does not have its hash as prev"]
    forged, _ = records.draft_call(commit("req-9")).line(8, GENESIS)
    ledger.write_bytes(b"".join([*lines, forged]))
    assert "its prev is not" in str(
        check_against_ledger(tmp_path / "run_1/resume/pack_p1.zip", ledger).verdicts[0].reason
    )


def test_two_lines_on_one_call_are_a_fault(tmp_path: Path, ledger: Path) -> None:
    ledgers.write(ledger, commit("req-4"))
    assert reasons(report(tmp_path, ledger, "req-4")) == ["the ledger has 2 lines on the call that it names"]


def test_a_started_line_and_an_id_in_a_payload_are_not_what_came_of_a_call(tmp_path: Path, ledger: Path) -> None:
    started = STARTED | {"request_id": "req-8"}
    ledgers.write(ledger, started, other(9) | {"payload": {"request_id": "req-8"}}, commit("req-8"))
    ledgers.write(
        ledger, other(11) | {"payload": {"request_id": "req-8"}}, other(12) | {"payload": '"request_id":"req-8"'}
    )
    assert reasons(report(tmp_path, ledger, "req-8")) == [None]
    lines = [line for line in lines_of(ledger) if b'"type":"invoke"' not in line or b'"overlay":"echo"' in line]
    ledger.write_bytes(b"".join(lines))
    again = check_against_ledger(tmp_path / "run_1/resume/pack_p1.zip", ledger)
    assert "its prev is not" in str(again.verdicts[0].reason)  # of the started line, which is all there is


@pytest.mark.parametrize("end", ["failed", "interrupted", "started"])
@pytest.mark.parametrize("again", ["same", "batch", "other", "worse", "none"])
def test_a_commit_whose_answer_was_lost_is_sound_where_a_later_call_shows_it_and_open_where_none_does(
    tmp_path: Path, ledger: Path, end: str, again: str
) -> None:
    hash_, other_hash = "cd" * 32, "ef" * 32
    ledgers.write(ledger, STARTED | {"request_id": "req-8", "payload_hash": hash_})
    if end == "failed":
        ledgers.write(ledger, commit("req-8", ok=False, code="ERR_TIMEOUT", payload_hash=hash_))
    elif end == "interrupted":
        ledgers.write(ledger, {**COMMIT, "type": "interrupted", "timestamp_ms": 1, "request_id": "req-8", "started": 8})
    later = {
        "same": commit("req-9", payload_hash=hash_),
        "batch": commit("req-9", capability="commit", payload={"run_id": "run_1", "batch_id": "batch_1"}),
        "other": commit("req-9", payload_hash=other_hash, payload={"run_id": "run_1", "memory_batch_id": "batch_2"}),
        "worse": commit("req-9", payload_hash=hash_, ok=False, code="ERR_TIMEOUT"),
        "none": other(9),
    }
    ledgers.write(ledger, later[again])
    found = report(tmp_path, ledger, "req-8")
    if again in {"same", "batch"}:
        assert (reasons(found), found.ok(strict=True)) == ([None], True)
    else:
        assert "answer was lost" in str(reasons(found)[0])
        assert (found.verdicts[0].is_open, found.ok(), found.ok(strict=True)) == (True, True, False)


def test_a_call_before_the_one_whose_answer_was_lost_shows_nothing_of_it(tmp_path: Path, ledger: Path) -> None:
    hash_ = "cd" * 32
    ledgers.write(ledger, commit("req-8", payload_hash=hash_), commit("req-9", ok=False, code="X", payload_hash=hash_))
    assert report(tmp_path, ledger, "req-9").verdicts[0].is_open


def test_a_lost_answer_of_a_call_for_another_batch_is_a_fault(tmp_path: Path, ledger: Path) -> None:
    payload = {"run_id": "run_1", "memory_batch_id": "batch_2"}
    ledgers.write(ledger, commit("req-8", ok=False, code="ERR_TIMEOUT", payload=payload))
    found = report(tmp_path, ledger, "req-8")
    assert reasons(found) == ['the call\'s payload has the memory_batch_id "batch_2", not batch_1']
    assert not found.ok()


def test_an_id_with_characters_that_json_escapes_is_found(tmp_path: Path, ledger: Path) -> None:
    ledgers.write(ledger, commit('re"q\\\u00e9\n8'))
    assert reasons(report(tmp_path, ledger, 're"q\\\u00e9\n8')) == [None]


@pytest.mark.parametrize("torn_at", [1, 40, -1])
def test_a_torn_last_line_is_no_witness_against_the_one_before_and_none_for_its_own(
    tmp_path: Path, ledger: Path, torn_at: int
) -> None:
    ledgers.write(ledger, commit("req-8"))
    lines = lines_of(ledger)
    ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:torn_at])
    found = reasons(report(tmp_path, ledger, "req-7", "req-8"))
    assert found[0] is None
    assert found[1] is not None


def test_closed_segments_are_read_before_the_open_one_plain_or_compressed(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "provenance.jsonl"
    path.parent.mkdir()
    for number in range(4):
        ledgers.write(path, commit(f"req-{number}"), *map(other, range(8)), segment_bytes=2500)
    names = [f"req-{number}" for number in range(4)]
    assert len(segments.closed_firsts(path)) >= 3
    assert reasons(report(tmp_path, path, *names)) == [None] * 4
    pack = tmp_path / "run_1/resume/pack_p1.zip"
    plain = check_against_ledger(pack, path)
    first = segments.closed_path(path, segments.closed_firsts(path)[0])
    kept = first.read_bytes()
    segments.compress(path)
    assert not first.exists()
    assert check_against_ledger(pack, path.parent) == plain
    first.write_bytes(kept)  # a crash has left both
    assert check_against_ledger(pack, path) == plain
    first.unlink()
    packed = first.with_name(first.name + ".gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(BrokenError, match="cannot be unpacked"):
        check_against_ledger(pack, path)
    packed.unlink()
    assert "no line" in str(check_against_ledger(pack, path).verdicts[0].reason)


def test_a_segment_that_is_closed_while_the_segments_are_listed_is_read_once(
    tmp_path: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, whole, rotations = pack_of(tmp_path, [memory_item(committed_by="req-4")]), bus_ledger._closed, iter([1])

    def rotating(path: Path) -> list[Path]:
        found = whole(path)
        for _ in rotations:
            with ledger.open("r+b") as file:
                segments.rotate(ledger, file.fileno(), len(lines_of(ledger)))
            ledgers.write(ledger, commit("req-8"))
        return found

    monkeypatch.setattr(bus_ledger, "_closed", rotating)
    count = len(lines_of(ledger))
    found = check_against_ledger(pack, ledger)
    assert reasons(found) == [None]
    assert found.lines > count


def test_a_first_line_that_is_not_line_1_has_no_link_to_be_seen(tmp_path: Path, ledger: Path) -> None:
    ledger.write_bytes(b"".join(lines_of(ledger)[3:]))
    assert "cannot be seen" in str(reasons(report(tmp_path, ledger, "req-4"))[0])


def test_a_changed_pack_is_refused_before_any_ledger_is_read(tmp_path: Path, ledger: Path) -> None:
    pack = pack_of(tmp_path, [memory_item(committed_by="req-1")])
    pack.write_bytes(pack.read_bytes().replace(b"req-1", b"req-4"))
    with pytest.raises(PackError):
        check_against_ledger(pack, ledger)


def test_a_ledger_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        report(tmp_path, tmp_path / "none" / "provenance.jsonl", "req-1")
    with pytest.raises(NotFoundError):
        check_against_ledger(tmp_path / "run_1/resume/pack_p1.zip", tmp_path)


def test_the_form_that_is_told_names_what_the_bus_calls_its_segments() -> None:
    assert segments.packed_path(Path("provenance.jsonl"), 7).name == "provenance-000000000007.jsonl.gz"
    assert "<name>-<first seq>.jsonl" in FORM
    assert GENESIS == records.GENESIS


def test_a_payload_that_the_ledger_holds_is_of_the_packs_run_and_of_the_items_batch(
    tmp_path: Path, ledger: Path
) -> None:
    good = {"run_id": "run_1", "reason": "done", "memory_batch_id": "batch_1"}
    ledgers.write(
        ledger,
        commit("good", payload=good),
        commit("sealed", capability="commit", payload={"run_id": "run_1", "batch_id": "batch_1"}),
        commit("run", payload=good | {"run_id": "run_2"}),
        commit("batch", payload=good | {"memory_batch_id": "batch_2"}),
        commit("none", payload={"run_id": "run_1", "reason": "nothing was committed"}),
    )
    found = report(tmp_path, ledger, "good", "sealed", "run", "batch", "none", "req-1")
    assert reasons(found) == [
        None,
        None,
        'the call\'s payload has the run_id "run_2", not run_1',
        'the call\'s payload has the memory_batch_id "batch_2", not batch_1',
        "the call's payload has the memory_batch_id null, not batch_1",
        None,
    ]
    assert "run and batch of 1 calls" in found.unchecked[0]


def test_what_there_was_nothing_to_check_by_is_said_and_a_manifests_hash_is_checked(
    tmp_path: Path, ledger: Path
) -> None:
    payload = {"run_id": "run_1", "reason": "done", "memory_batch_id": "batch_1"}
    ledgers.write(ledger, commit("good", payload=payload))
    pack = pack_of(tmp_path, [memory_item("mem_1", "good")])
    found = check_against_ledger(pack, ledger)
    assert [one.partition(",")[0] for one in found.unchecked] == [
        "the manifest's own members",
        "lines 1 to 2 of ledger/run.v2.1.jsonl",
    ]
    assert check_against_ledger(pack, ledger, manifest_sha256=found.manifest_sha256).unchecked == ()
    with pytest.raises(PackError, match="SHA-256 that was asked for"):
        check_against_ledger(pack, ledger, manifest_sha256="0" * 64)
