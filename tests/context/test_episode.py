"""Episodes: what they hold, and that no change of any of them goes unnoticed."""

from __future__ import annotations

import fcntl
import json
import stat
from typing import TYPE_CHECKING

import pytest
from aos_context.artifacts import encode, sha256
from aos_context.episode import content_id, file_name, number_of
from aos_context.episode_slice import Passing
from aos_context.errors import BrokenError, BusyError, NotFoundError, SchemaError

from tests.context.made import TIME, MadeRun, item, memory_item, working_set

if TYPE_CHECKING:
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.episode import EpisodeStore


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """A run with three episodes."""
    made = MadeRun(tmp_path / "run_1")
    for _ in range(3):
        made.update()
        made.milestone()
    return made


def overwrite(store: EpisodeStore, number: int, data: bytes) -> None:
    path = store.path(number)
    path.chmod(0o600)
    path.write_bytes(data)


def forged(store: EpisodeStore, number: int, **members: object) -> bytes:
    """Another episode in its place, in itself without a fault."""
    document: Document = {**json.loads(store.path(number).read_bytes()), **members}
    document["episode_id"] = content_id(document)
    return encode("episode", document) + b"\n"


def test_episodes_are_read_only_numbered_without_a_gap_and_each_has_the_hash_of_the_one_before(run: MadeRun) -> None:
    store = run.episodes
    assert store.numbers() == [1, 2, 3]
    assert [store.path(number).name for number in store.numbers()] == [file_name(1), file_name(2), file_name(3)]
    assert {stat.S_IMODE(store.path(number).stat().st_mode) for number in store.numbers()} == {0o444}
    assert [one["prev_sha256"] for one in store.list()] == [None, store.sha256(1), store.sha256(2)]
    assert store.last() == store.load(3)
    assert store.verify() == 3


def test_an_episode_holds_the_state_before_and_after_and_what_happened_in_between(run: MadeRun) -> None:
    episode = run.episodes.load(2)
    assert (episode["ws_before"]["_update_seq"], episode["ws_after"]["_update_seq"]) == (1, 2)
    assert (episode["ledger"]["first_seq"], episode["ledger"]["last_seq"]) == (3, 4)
    lines = b"".join(run.ledger.read_bytes().splitlines(keepends=True)[2:4])
    assert run.episodes.slice_path(2).read_bytes() == lines
    assert (episode["ledger"]["bytes"], episode["ledger"]["sha256"]) == (len(lines), sha256(lines))
    assert stat.S_IMODE(run.episodes.slice_path(2).stat().st_mode) == 0o444


def test_every_changed_byte_of_a_slice_is_detected_and_a_missing_one_is_missed(run: MadeRun) -> None:
    slice_, store = run.episodes.slice_path(2), run.episodes
    slice_.chmod(0o600)
    whole = slice_.read_bytes()
    for data in (*(whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))), whole * 2, b""):
        slice_.write_bytes(data)
        with pytest.raises(BrokenError, match=r"episode_000002\.v2\.1\.jsonl was changed"):
            store.load(2)
    with pytest.raises(BrokenError, match=r"episode_000002\.v2\.1\.jsonl was changed"):
        store.verify()
    slice_.unlink()
    with pytest.raises(BrokenError, match="is not there"):
        store.load(2)


@pytest.mark.parametrize("line", range(6))
def test_a_line_of_the_ledger_that_was_written_anew_is_told_from_the_one_that_an_episode_has_seen(
    run: MadeRun, line: int
) -> None:
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    event = json.loads(lines[line]) | {"actor": "eve"}
    run.ledger.write_bytes(b"".join([*lines[:line], encode("ledger_event", event) + b"\n", *lines[line + 1 :]]))
    assert [one["number"] for one in run.episodes.list()] == [1, 2, 3]
    with pytest.raises(BrokenError, match=rf"run\.v2\.1\.jsonl: a line up to .* at episode {line // 2 + 1}"):
        run.episodes.verify()


def test_a_line_that_was_taken_out_of_the_ledger_is_missed_by_the_episode_that_has_seen_it(run: MadeRun) -> None:
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:2]))
    with pytest.raises(BrokenError, match="at episode 2"):
        run.episodes.verify()
    run.ledger.unlink()
    with pytest.raises(BrokenError, match="at episode 1"):
        run.episodes.verify()


def test_each_episode_has_the_hash_of_the_chain_of_all_slices_up_to_its_own(run: MadeRun) -> None:
    chain = "0" * 64
    for episode in run.episodes.list():
        chain = sha256(f"{chain}{episode['ledger']['sha256']}".encode())
        assert episode["ledger"]["chain_sha256"] == chain


def test_the_last_episode_is_read_without_its_slice(run: MadeRun) -> None:
    whole = run.episodes.load(3)
    run.episodes.slice_path(3).unlink()
    assert run.episodes.last() == whole


def test_a_slice_that_a_crash_has_left_without_its_episode_gives_way_to_the_next(run: MadeRun) -> None:
    left = run.episodes.slice_path(4)
    left.write_bytes(b"half")
    left.chmod(0o444)
    run.milestone()
    assert run.episodes.verify() == 4


def test_the_types_and_numbers_of_lines_are_read_off_their_ends_whatever_their_data_say() -> None:
    tricky = {"event_type": "OTHER", "run_id": "r", "seq": 9, "timestamp": TIME}
    event = {
        "_schema_version": "2.1", "seq": 1, "event_id": "evt_1", "event_type": "NOTED", "run_id": "r",
        "timestamp": TIME, "actor": None, "data": {**tricky, "text": '"event_type":"OTHER"}\n', "more": tricky},
    }  # fmt: skip
    lines = [encode("ledger_event", event) + b"\n"]
    lines.append(json.dumps({**event, "seq": 2, "data": tricky}).encode() + b"\n")
    lines.append(json.dumps({**dict(reversed(event.items())), "seq": 3}, separators=(",", ":")).encode() + b"\n")
    passing = Passing(1)
    assert list(passing.through(lines)) == lines
    assert (passing.counts, passing.document()["last_seq"]) == ({"NOTED": 3}, 3)


def test_a_run_without_episodes_has_no_last_one(tmp_path: Path) -> None:
    store = MadeRun(tmp_path / "run").episodes
    assert (store.last(), store.list(), store.verify()) == (None, [], 0)
    with pytest.raises(NotFoundError):
        store.load(1)


def test_every_changed_byte_of_every_episode_is_detected(run: MadeRun) -> None:
    store = run.episodes
    for number in store.numbers():
        whole = store.path(number).read_bytes()
        for place in range(len(whole)):
            overwrite(store, number, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(BrokenError, match=file_name(number).replace(".", r"\.")):
                store.load(number)
        overwrite(store, number, whole)
    assert store.verify() == 3


@pytest.mark.parametrize("more", [b"\n", b" ", b"{}"])
def test_an_episode_that_has_become_longer_or_shorter_is_detected(run: MadeRun, more: bytes) -> None:
    whole = run.episodes.path(3).read_bytes()
    for data in (whole + more, more + whole, whole[:-1], b""):
        overwrite(run.episodes, 3, data)
        with pytest.raises(BrokenError):
            run.episodes.load(3)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_episode_that_was_removed_is_missed(run: MadeRun, number: int) -> None:
    run.episodes.path(number).unlink()
    with pytest.raises(BrokenError, match=f"{number}.v2.1.json is not there"):
        run.episodes.verify()


@pytest.mark.parametrize("number", [1, 2])
def test_an_episode_whose_predecessor_was_removed_is_not_loaded(run: MadeRun, number: int) -> None:
    run.episodes.path(number).unlink()
    with pytest.raises(BrokenError):
        run.episodes.load(number + 1)


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 3), (1, 3)])
def test_two_episodes_that_changed_places_are_detected(run: MadeRun, one: int, other: int) -> None:
    first, second = run.episodes.path(one).read_bytes(), run.episodes.path(other).read_bytes()
    overwrite(run.episodes, one, second)
    overwrite(run.episodes, other, first)
    for number in (one, other):
        with pytest.raises(BrokenError, match="holds the episode"):
            run.episodes.load(number)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_episode_replaced_by_another_valid_one_is_detected(run: MadeRun, number: int) -> None:
    overwrite(run.episodes, number, forged(run.episodes, number, reason="another"))
    with pytest.raises(BrokenError):
        run.episodes.verify()


@pytest.mark.parametrize("number", [1, 2])
def test_the_one_after_a_replaced_episode_is_not_loaded(run: MadeRun, number: int) -> None:
    overwrite(run.episodes, number, forged(run.episodes, number, reason="another"))
    assert run.episodes.load(number)["reason"] == "another"
    with pytest.raises(BrokenError, match="is not the one that episode"):
        run.episodes.load(number + 1)


def test_a_first_episode_that_says_it_follows_another_is_detected(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.milestone()
    overwrite(made.episodes, 1, forged(made.episodes, 1, prev_sha256="0" * 64))
    with pytest.raises(BrokenError, match="is the first"):
        made.episodes.load(1)


def test_a_whole_chain_that_was_made_anew_is_detected_by_the_ledger(run: MadeRun) -> None:
    for number in (1, 2, 3):
        prev = run.episodes.sha256(number - 1) if number > 1 else None
        overwrite(run.episodes, number, forged(run.episodes, number, reason="another", prev_sha256=prev))
    with pytest.raises(BrokenError, match="not the one that the ledger has"):
        run.episodes.verify()


def test_an_episode_of_which_the_ledger_does_not_know_yet_is_there_all_the_same(run: MadeRun) -> None:
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # the crash tore its event
    assert run.episodes.verify() == 3


def test_an_episode_waits_for_another_that_is_being_written(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aos_context.locks.LOCK_WAIT_S", 0.0)
    before = run.episodes.numbers()
    with (run.folder / "episodes" / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            run.milestone()
    assert run.episodes.numbers() == before


def test_no_episode_follows_one_that_was_changed(run: MadeRun) -> None:
    overwrite(run.episodes, 3, run.episodes.path(3).read_bytes().replace(b"checkpoint", b"checkpaint"))
    run.update()
    with pytest.raises(BrokenError):
        run.milestone()
    assert run.episodes.numbers() == [1, 2, 3]


def test_events_with_a_gap_and_documents_that_are_none_make_no_episode(run: MadeRun) -> None:
    run.events[-1]["seq"] += 1
    run.events.append({**run.events[0], "seq": 1})
    with pytest.raises(BrokenError, match="event 8 follows event 6"):
        run.milestone()
    run.events[:] = run.events[: run.since]
    with pytest.raises(SchemaError):
        run.milestone((memory_item() | {"scope": "everywhere"},))
    assert run.episodes.numbers() == [1, 2, 3]


def test_what_is_not_named_like_an_episode_is_not_one() -> None:
    assert number_of("episode_1234567.v2.1.json") == 1_234_567
    for name in ("episode_1.v2.1.json", "episode_0000001.v2.1.json", ".episode_000001.v2.1.json.1-a", "episode_x.json"):
        assert number_of(name) is None


def test_the_summary_says_what_changed_and_is_the_same_for_the_same_episode(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.update()
    made.working_set = working_set(
        1,
        objective="Go further.",
        acceptance_criteria=["It is reached.", "It is tested."],
        sliding_context=[item("c9", "new")],
        pinned_context=[item("p1", "kept")],
    )
    summary = made.milestone((memory_item(),))["summary"]
    assert summary.splitlines() == [
        "Reason: checkpoint",
        "Objective: Go further.",
        "Objective before: Reach the end.",
        "Status: IDLE -> BUSY; stage: INTAKE; updates: 0 -> 1",
        "Acceptance criteria: 1 added, 0 removed, 2 in all",
        "  + It is tested.",
        "Pinned context: 1 added (p1); 1 in all",
        "Sliding context: 1 added (c9); 1 in all",
        "Events: 2 (RUN_BOOTED 1, WS_UPDATE_APPLIED 1)",
        "Memory committed: 1",
        "  fact, global, active: Prefers Python.",
        "Next: step 2",
    ]


def test_the_summary_of_the_largest_episode_is_within_its_limit(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run")
    made.before = working_set(
        acceptance_criteria=["a" * 2000] * 200,
        constraints=["b" * 2000] * 200,
        pinned_context=[item(f"p{n}".ljust(128, "x")) for n in range(500)],
    )
    made.working_set = working_set(
        objective="o" * 10_000,
        next_action="n" * 10_000,
        acceptance_criteria=["c" * 2000] * 200,
        constraints=["d" * 2000] * 200,
        sliding_context=[item(f"s{n}".ljust(128, "x")) for n in range(500)],
    )
    for number in range(100):
        made.add(f"OWN_{number}".ljust(64, "X"), {})
    episode = made.milestone(tuple(memory_item(f"mem_{n}", content="m" * 65_536) for n in range(100)))
    assert len(episode["summary"]) <= 60_000
    assert "and 80 more" in episode["summary"]
