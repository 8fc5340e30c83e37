"""The working set: one patch at a time, at the state that it saw, and never lost once it was acknowledged."""

from __future__ import annotations

import copy
import errno
import fcntl
import itertools
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aos_context import locks
from aos_context.artifacts import Document, encode, sha256
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.errors import BrokenError, BusyError, ExistsError, LimitError, NotFoundError, SchemaError, StaleError
from aos_context.ledger import FileLedger
from aos_context.ws_manager import PatchResult, WorkingSetManager
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

NAMES = {"task_id": "task_1", "thread_id": "thread_1", "run_id": "run_1", "objective": "Find out."}


def manager(root: Path, config: Config = DEFAULT_CONFIG, **options: Any) -> WorkingSetManager:
    """Another process's view: nothing is kept from what was read before."""
    ledger = FileLedger(root / "ledger" / "run.v2.1.jsonl")
    return WorkingSetManager(root / "state" / "working_set.v2.1.json", config, ledger=ledger, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of a run that was booted."""
    manager(tmp_path / "run_1").create_initial(**NAMES)
    return tmp_path / "run_1"


def item(name: str, priority: int = 5, content: str = "abcd", timestamp: str = "2026-01-18T00:00:00Z") -> Document:
    return {"id": name, "content": content, "timestamp": timestamp, "priority": priority}


def patch(seq: int, **members: Document) -> Document:
    return {"_schema_version": "2.1", "expected_seq": seq, **members}


def step(wsm: WorkingSetManager, **members: Document) -> PatchResult:
    return wsm.apply_patch(patch(wsm.load()["_update_seq"], **members))


def ids(working_set: Document, context: str = "sliding_context") -> list[str]:
    return [one["id"] for one in working_set[context]]


def events(root: Path, kind: str) -> list[Document]:
    return [event for event in FileLedger(root / "ledger" / "run.v2.1.jsonl").read() if event["event_type"] == kind]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_begins_idle_with_what_it_is_to_do(tmp_path: Path) -> None:
    wsm = manager(tmp_path / "run_1")
    made = wsm.create_initial(**NAMES, acceptance_criteria=["It is found."], constraints=("Be quick.",), actor="me")
    assert (made["_update_seq"], made["status"], made["current_stage"]) == (0, "IDLE", "INTAKE")
    assert (made["acceptance_criteria"], made["constraints"]) == (["It is found."], ["Be quick."])
    assert made == wsm.load() == manager(tmp_path / "run_1").load()
    (booted,) = events(tmp_path / "run_1", "RUN_BOOTED")
    assert (booted["data"]["working_set"], booted["actor"], booted["run_id"]) == (made, "me", "run_1")


def test_a_run_begins_once_and_a_bad_one_leaves_nothing(root: Path) -> None:
    with pytest.raises(ExistsError, match="run_1"):
        manager(root).create_initial(**NAMES)
    with pytest.raises(SchemaError):
        manager(root.parent / "other").create_initial(**{**NAMES, "run_id": "../x"})
    assert not (root.parent / "other").exists()
    assert len(events(root, "RUN_BOOTED")) == 1


def test_a_run_that_is_not_there_is_not_found_and_no_folder_is_made(tmp_path: Path) -> None:
    wsm = manager(tmp_path / "none")
    with pytest.raises(NotFoundError):
        wsm.load()
    with pytest.raises(NotFoundError):
        wsm.apply_patch(patch(0, set={"status": "BUSY"}))
    assert not (tmp_path / "none").exists()


def test_without_a_ledger_a_working_set_is_a_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "working_set.v2.1.json"
    one, other = WorkingSetManager(path), WorkingSetManager(path)
    one.create_initial(**NAMES)
    for seq in range(6):
        result = (one, other)[seq % 2].apply_patch(patch(seq, set={"next_action": f"step {seq}"}))
        assert result.update_seq == seq + 1
    assert one.load() == other.load() == json.loads(path.read_bytes())
    assert {found.name for found in path.parent.iterdir()} == {path.name, ".lock", ".lock.turn"}


def test_set_takes_effect_before_remove_and_remove_before_add(root: Path) -> None:
    wsm = manager(root)
    result = step(
        wsm,
        set={"status": "BUSY", "sliding_context": [item("a"), item("b"), item("c")]},
        remove={"sliding_context": ["b", "never-there"]},
        add={"sliding_context": [item("d"), item("a", content="new")], "pinned_context": [item("b")]},
    )
    assert ids(result.working_set) == ["a", "c", "d"]
    assert result.working_set["sliding_context"][0]["content"] == "new"
    assert ids(result.working_set, "pinned_context") == ["b"]
    assert result.working_set["status"] == "BUSY"
    assert result.working_set == wsm.load() == manager(root).load()


def test_an_applied_patch_is_in_the_ledger_with_what_it_made(root: Path) -> None:
    sent = patch(0, add={"sliding_context": [item("a")]})
    manager(root).apply_patch(sent, actor="me")
    (applied,) = events(root, "WS_UPDATE_APPLIED")
    text = (root / "state" / "working_set.v2.1.json").read_bytes()
    assert (applied["actor"], applied["run_id"]) == ("me", "run_1")
    assert applied["data"] == {
        "update_seq": 1,
        "patch": sent,
        "evicted": [],
        "updated_at": json.loads(text)["updated_at"],
        "sha256": sha256(text),
    }


def test_a_stale_patch_is_refused_with_the_current_seq_and_leaves_one_event(root: Path) -> None:
    wsm = manager(root)
    step(wsm, set={"status": "BUSY"})
    before = wsm.load()
    with pytest.raises(StaleError) as refused:
        wsm.apply_patch(patch(0, set={"status": "DONE"}), actor="me")
    assert (refused.value.current_seq, refused.value.body()["current_seq"]) == (1, 1)
    assert wsm.load() == manager(root).load() == before
    (rejected,) = events(root, "WS_UPDATE_REJECTED")
    assert rejected["actor"] == "me"
    assert rejected["data"] == {"code": "STALE", "detail": str(refused.value), "expected_seq": 0, "current_seq": 1}


def test_a_refused_patch_waits_for_no_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("fsync", "fdatasync", "replace"):
        monkeypatch.setattr(os, call, full)
    with pytest.raises(StaleError):
        manager(root).apply_patch(patch(1, set={"status": "DONE"}))
    assert len(events(root, "WS_UPDATE_REJECTED")) == 1


def test_a_refused_patch_is_refused_though_the_ledger_cannot_be_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(os, "pwrite", full)
        with pytest.raises(StaleError):
            manager(root).apply_patch(patch(1, set={"status": "DONE"}))
    assert events(root, "WS_UPDATE_REJECTED") == []


def test_a_refused_patch_is_refused_though_others_hold_the_ledger(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wsm = manager(root)
    wsm.load()
    monkeypatch.setattr("aos_context.locks.LOCK_WAIT_S", 0.0)
    with (root / "ledger" / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StaleError):
            wsm.apply_patch(patch(1, set={"status": "DONE"}))
        with pytest.raises(BusyError):
            wsm.apply_patch(patch(0, set={"status": "DONE"}))
    assert events(root, "WS_UPDATE_REJECTED") == []
    assert wsm.load()["status"] == "IDLE"


@pytest.mark.parametrize(
    ("bad", "expected_seq"),
    [
        (patch(0, set={"status": "ASLEEP"}), 0),
        (patch(0, set={"next_action": "\ud83d"}), 0),
        ({"_schema_version": "2.1", "expected_seq": "x" * 99_999, "set": {"status": "BUSY"}}, None),
        ("not a patch", None),
        ({"_schema_version": "2.1", "expected_seq": True, "set": {"status": "BUSY"}}, None),
    ],
)
def test_what_is_no_patch_is_refused_and_leaves_one_event(root: Path, bad: Any, expected_seq: int | None) -> None:
    with pytest.raises(SchemaError):
        manager(root).apply_patch(bad)
    (rejected,) = events(root, "WS_UPDATE_REJECTED")
    assert (rejected["data"]["code"], rejected["data"]["expected_seq"]) == ("SCHEMA", expected_seq)
    assert manager(root).load()["_update_seq"] == 0


@pytest.mark.parametrize(
    ("members", "path"),
    [
        ({"set": {"sliding_context": [item("a"), item("b"), item("a")]}}, "$.set.sliding_context[2].id"),
        ({"add": {"pinned_context": [item("a"), item("a")]}}, "$.add.pinned_context[1].id"),
        ({"add": {"pinned_context": [item("p")], "sliding_context": [item("p")]}}, "$.add.pinned_context[0].id"),
        ({"add": {"pinned_context": [item("q"), item("old")]}}, "$.add.pinned_context[1].id"),
        ({"set": {"sliding_context": [item("pin")]}}, "$.set.sliding_context[0].id"),
    ],
)
def test_an_id_that_would_be_there_twice_is_refused_with_its_path(root: Path, members: Document, path: str) -> None:
    wsm = manager(root)
    step(wsm, add={"sliding_context": [item("old")], "pinned_context": [item("pin")]})
    with pytest.raises(SchemaError) as refused:
        step(wsm, **members)
    assert refused.value.faults[0]["path"] == path
    assert wsm.load()["_update_seq"] == 1


def test_an_item_is_pinned_by_taking_it_out_of_the_sliding_context(root: Path) -> None:
    wsm = manager(root)
    step(wsm, add={"sliding_context": [item("a")]})
    result = step(wsm, remove={"sliding_context": ["a"]}, add={"pinned_context": [item("a")]})
    assert (ids(result.working_set), ids(result.working_set, "pinned_context")) == ([], ["a"])


def test_more_pinned_context_than_is_allowed_is_refused_naming_what_is_and_what_may_be(root: Path) -> None:
    wsm = manager(root, replace(DEFAULT_CONFIG, pinned_max_items=2, pinned_max_tokens=4))
    step(wsm, add={"pinned_context": [item("a"), item("b")]})
    with pytest.raises(LimitError, match="3 items of 3 tokens; 2 items and 4 tokens") as refused:
        step(wsm, add={"pinned_context": [item("c")]})
    assert refused.value.body()["pinned_max_items"] == 2
    with pytest.raises(LimitError, match="2 items of 5 tokens"):
        step(wsm, add={"pinned_context": [item("a", content="x" * 16)]})
    assert {event["data"]["code"] for event in events(root, "WS_UPDATE_REJECTED")} == {"LIMIT"}
    assert ids(wsm.load(), "pinned_context") == ["a", "b"]


def test_where_less_may_be_pinned_than_is_a_patch_may_change_the_rest_and_take_some_out(root: Path) -> None:
    step(manager(root), add={"pinned_context": [item("a"), item("b"), item("c")]})
    wsm = manager(root, replace(DEFAULT_CONFIG, pinned_max_items=1))
    assert step(wsm, set={"status": "BUSY"}).update_seq == 2
    assert ids(step(wsm, remove={"pinned_context": ["a"]}).working_set, "pinned_context") == ["b", "c"]


def test_each_content_is_counted_once_however_many_patches_come(root: Path) -> None:
    counted = []

    def count(text: str) -> int:
        counted.append(text)
        return 1

    wsm = manager(root, count=count)
    for number in range(5):
        step(wsm, add={"sliding_context": [item(f"c{number}", content=f"text {number}")]})
    assert counted == [f"text {number}" for number in range(5)]


def test_where_pinned_context_is_from_counts_as_what_it_says_does(root: Path) -> None:
    wsm = manager(root, replace(DEFAULT_CONFIG, pinned_max_tokens=9), count=len)
    with pytest.raises(LimitError, match="1 items of 10 tokens"):
        step(wsm, add={"pinned_context": [{**item("a"), "source_refs": ["xxx", "xxx"]}]})


@pytest.mark.parametrize("part", ["set", "add"])
def test_a_sliding_item_that_alone_is_beyond_the_budget_is_refused_and_drives_nothing_out(
    root: Path, part: str
) -> None:
    wsm = manager(root, replace(DEFAULT_CONFIG, sliding_max_tokens=8), count=len)
    step(wsm, add={"sliding_context": [item("a"), item("b")]})
    large = {**item("c", 0), "source_refs": ["12345"]}
    with pytest.raises(LimitError, match="'c' alone has 9 tokens; 8 tokens are allowed") as refused:
        step(wsm, **{part: {"sliding_context": [item("d"), large]}})
    body = refused.value.body()
    assert (body["item_id"], body["item_tokens"], body["sliding_max_tokens"]) == ("c", 9, 8)
    assert ids(wsm.load()) == ["a", "b"]


def test_an_item_that_a_patch_itself_replaces_may_not_be_beyond_the_budget_either(root: Path) -> None:
    wsm = manager(root, replace(DEFAULT_CONFIG, sliding_max_tokens=8), count=len)
    with pytest.raises(LimitError, match="'a' alone has 9 tokens"):
        step(wsm, set={"sliding_context": [item("a", content="x" * 9)]}, add={"sliding_context": [item("a")]})


def test_a_working_set_beyond_its_bytes_is_refused_naming_what_is_and_what_may_be(root: Path) -> None:
    most = (root / "state" / "working_set.v2.1.json").stat().st_size + 1_000
    wsm = manager(root, replace(DEFAULT_CONFIG, working_set_max_bytes=most))
    with pytest.raises(LimitError, match=rf"would be \d+ bytes; {most} bytes are allowed") as refused:
        step(wsm, set={"next_action": "x" * 1_001})
    body = refused.value.body()
    assert body["working_set_max_bytes"] == most
    assert body["working_set_bytes"] == most + 1
    assert step(wsm, set={"next_action": "x" * 1_000}).update_seq == 1
    assert (root / "state" / "working_set.v2.1.json").stat().st_size == most
    assert [event["data"]["code"] for event in events(root, "WS_UPDATE_REJECTED")] == ["LIMIT"]


def test_a_run_whose_first_working_set_is_beyond_its_bytes_is_not_booted(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="500 bytes are allowed"):
        manager(tmp_path / "run_1", replace(DEFAULT_CONFIG, working_set_max_bytes=500)).create_initial(
            **NAMES, constraints=["x" * 500]
        )
    assert not (tmp_path / "run_1").exists()


ITEM = st.builds(
    lambda number, priority, content, day, refs: {
        **item(f"c{number}", priority, content, f"2026-01-0{day}T00:00:00Z"),
        "source_refs": refs,
    },
    st.integers(0, 19),
    st.integers(0, 2),
    st.text("ab", min_size=1, max_size=8),
    st.integers(1, 3),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=2),
)
PLACED = st.lists(
    st.tuples(ITEM, st.sampled_from(["pinned_context", "sliding_context"])),
    unique_by=lambda one: str(one[0]["id"]),
    max_size=14,
)


def size(one: Document) -> int:
    return len(one["content"]) + sum(map(len, one["source_refs"]))


def worth_most(items: list[Document], budget: int) -> set[str]:
    """Of the sliding context: the best, as long as they have room together."""
    kept: set[str] = set()
    for one in sorted(items, key=lambda one: (one["priority"], one["timestamp"], one["id"]), reverse=True):
        budget -= size(one)
        if budget < 0:
            break
        kept.add(one["id"])
    return kept


@settings(max_examples=60)
@given(placed=PLACED, budget=st.integers(16, 60), order=st.randoms(use_true_random=False), parts=st.integers(1, 5))
def test_whatever_is_pinned_stays_and_so_do_the_best_of_the_rest_within_the_budget_in_whatever_order_they_come(
    tmp_path_factory: pytest.TempPathFactory,
    placed: list[tuple[Document, str]],
    budget: int,
    order: Random,
    parts: int,
) -> None:
    root = tmp_path_factory.mktemp("runs") / "run_1"
    wsm = manager(root, replace(DEFAULT_CONFIG, sliding_max_tokens=budget), count=len)
    wsm.create_initial(**NAMES)
    order.shuffle(placed)
    pinned: dict[str, Document] = {}
    for part in range(parts):
        added = {
            context: [one for one, where in placed[part::parts] if where == context]
            for context in ("pinned_context", "sliding_context")
        }
        sliding = [*wsm.load()["sliding_context"], *added["sliding_context"]]
        pinned |= {one["id"]: one for one in added["pinned_context"]}
        result = step(wsm, set={"status": "BUSY"}, add=added)
        assert {one["id"]: one for one in result.working_set["pinned_context"]} == pinned
        assert set(ids(result.working_set)) == worth_most(sliding, budget)
        assert sorted([*ids(result.working_set), *result.evicted]) == sorted(one["id"] for one in sliding)
    (root / "state" / "working_set.v2.1.json").unlink()
    assert manager(root).load() == result.working_set


def test_what_is_handed_out_or_in_can_be_changed_without_changing_the_working_set(root: Path) -> None:
    wsm = manager(root)
    sent = patch(0, add={"sliding_context": [{**item("a"), "source_refs": ["x"]}]})
    result = wsm.apply_patch(sent)
    expected = copy.deepcopy(result.working_set)
    for document in (result.working_set["sliding_context"][0], sent["add"]["sliding_context"][0]):
        document["content"] = "changed"
        document["source_refs"].append("y")
    wsm.load()["constraints"].append("z")
    assert wsm.load() == expected


def test_threads_that_lose_read_again_and_no_update_is_lost(root: Path) -> None:
    def work() -> None:
        mine = manager(root)
        for _ in range(10):
            while True:
                working_set = mine.load()
                count = int(working_set["next_action"] or 0) + 1
                try:
                    mine.apply_patch(patch(working_set["_update_seq"], set={"next_action": str(count)}))
                except StaleError:
                    continue
                break

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    working_set = manager(root).load()
    assert (working_set["next_action"], working_set["_update_seq"]) == ("40", 40)
    assert [event["data"]["update_seq"] for event in events(root, "WS_UPDATE_APPLIED")] == list(range(1, 41))


def test_the_lock_of_the_run_can_be_taken_again_by_who_has_it(root: Path) -> None:
    wsm = manager(root)
    with wsm.locked(), manager(root).locked():
        assert step(wsm, set={"status": "BUSY"}).update_seq == 1
        reader = threading.Thread(target=manager(root).load)
        reader.start()
        assert reader.is_alive()
    reader.join(10)
    assert not reader.is_alive()


def test_a_file_of_the_same_inode_size_and_time_is_not_taken_for_the_one_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat, path_stat = os.fstat, Path.stat

    def alike(found: os.stat_result) -> os.stat_result:
        return os.stat_result((*found[:1], 1, 1, *found[3:7], 0, 0, 0), {"st_mtime_ns": 0})

    monkeypatch.setattr(os, "fstat", lambda fd: alike(fstat(fd)))
    monkeypatch.setattr(Path, "stat", lambda path, **options: alike(path_stat(path, **options)))
    one = WorkingSetManager(root / "state" / "working_set.v2.1.json")
    other = WorkingSetManager(root / "state" / "working_set.v2.1.json")
    for seq in range(4):
        before = one.load()
        other.apply_patch(patch(seq, set={"next_action": str(seq)}))
        assert one.load()["_update_seq"] == before["_update_seq"] + 1 == seq + 1


def behind(root: Path) -> tuple[Document, bytes]:
    """A crash between the event and the file: what the working set is, and what the file still was."""
    path = root / "state" / "working_set.v2.1.json"
    wsm = manager(root)
    step(wsm, add={"sliding_context": [item("a")], "pinned_context": [item("p")]})
    old = path.read_bytes()
    step(wsm, set={"status": "BUSY"}, add={"sliding_context": [item("b")]})
    new = step(wsm, remove={"sliding_context": ["a"]}).working_set
    path.write_bytes(old)
    return new, old


def test_a_reader_has_what_only_the_ledger_has_and_writes_nothing(root: Path) -> None:
    new, old = behind(root)
    wsm = manager(root)
    assert wsm.load() == wsm.load() == new
    assert (root / "state" / "working_set.v2.1.json").read_bytes() == old


def test_a_writer_makes_the_file_again_even_where_its_patch_is_stale(root: Path) -> None:
    new, _ = behind(root)
    wsm = manager(root)
    with pytest.raises(StaleError):
        wsm.apply_patch(patch(1, set={"status": "DONE"}))
    assert (root / "state" / "working_set.v2.1.json").read_bytes() == encode("working_set", new)
    assert step(wsm, set={"status": "DONE"}).update_seq == 4


def test_a_manager_that_was_up_to_date_sees_that_the_file_was_put_back(root: Path) -> None:
    wsm = manager(root)
    step(wsm, set={"status": "BUSY"})
    old = (root / "state" / "working_set.v2.1.json").read_bytes()
    new = step(wsm, set={"status": "DONE"}).working_set
    (root / "state" / "working_set.v2.1.json").write_bytes(old)
    assert wsm.load() == new


def test_a_lost_file_is_made_again_from_all_of_the_ledger(root: Path) -> None:
    new, _ = behind(root)
    (root / "state" / "working_set.v2.1.json").unlink()
    assert manager(root).load() == new
    with pytest.raises(ExistsError):
        manager(root).create_initial(**NAMES)
    assert step(manager(root), set={"status": "DONE"}).update_seq == 4


def test_a_budget_that_was_changed_since_makes_the_same_working_set_again(root: Path) -> None:
    narrow = manager(root, replace(DEFAULT_CONFIG, sliding_max_tokens=2))
    result = step(narrow, add={"sliding_context": [item("a", 1), item("b", 2), item("c", 0)]})
    assert result.evicted == ["c"]
    (root / "state" / "working_set.v2.1.json").unlink()
    assert ids(manager(root).load()) == ["a", "b"]


def test_a_run_that_was_loaded_from_a_pack_is_made_again_under_its_new_name(root: Path) -> None:
    step(manager(root), set={"status": "BUSY"})
    data = {"pack_id": "pack_1", "from_run_id": "run_1", "manifest_sha256": "0" * 64, "pointers": {}}
    moved = {**manager(root).load(), "run_id": "run_2"}
    wsm = manager(root)
    wsm.path.write_bytes(encode("working_set", moved))
    assert wsm.load() == manager(root).load() == moved
    ledger = FileLedger(root / "ledger" / "run.v2.1.jsonl")
    ledger.append({"event_type": "RESUME_PACK_LOADED", "run_id": "run_2", "data": data})
    assert wsm.load() == manager(root).load() == moved
    new = step(manager(root), set={"status": "DONE"}).working_set
    (root / "state" / "working_set.v2.1.json").unlink()
    assert manager(root).load() == new
    assert new["run_id"] == "run_2"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text.replace(b"BUSY", b"DONE"),
        lambda text: text.replace(b'"_update_seq":1', b'"_update_seq":2'),
        lambda text: text.replace(b'"sliding_context":[]', b'"sliding_context":[%s]' % json.dumps(item("p")).encode()),
    ],
)
def test_a_file_that_somebody_changed_is_broken_and_named(root: Path, change: Callable[[bytes], bytes]) -> None:
    path = root / "state" / "working_set.v2.1.json"
    step(manager(root), set={"status": "BUSY"}, add={"pinned_context": [item("p")]})
    text = path.read_bytes()
    assert change(text) != text
    path.write_bytes(change(text))
    for action in (manager(root).load, lambda: manager(root).apply_patch(patch(1, set={"status": "IDLE"}))):
        with pytest.raises(BrokenError, match=r"working_set\.v2\.1\.json"):
            action()
    path.unlink()
    assert manager(root).load()["status"] == "BUSY"


def test_an_event_that_may_yet_be_taken_back_is_not_taken_for_the_last_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader looks while an event is written that cannot be synced; then a patch gets its number, and crashes."""
    ledger = FileLedger(root / "ledger" / "run.v2.1.jsonl")
    take = locks._take
    looked = threading.Event()
    wsm = manager(root)

    def look() -> None:
        wsm.load()
        looked.set()

    def taken(fd: int, path: Path) -> None:
        if threading.current_thread() is reader and path.parent.name == "ledger":
            looked.set()  # the reader waits
        take(fd, path)

    def unsynced(_fd: int) -> None:
        reader.start()
        assert looked.wait(10)
        raise OSError(errno.EIO, "Input/output error")

    reader = threading.Thread(target=look)
    with monkeypatch.context() as patches:
        patches.setattr(os, "fdatasync", unsynced)
        patches.setattr(locks, "_take", taken)
        with pytest.raises(OSError, match="Input/output"):
            ledger.append({"event_type": "NOTE"})
        reader.join(10)
    with monkeypatch.context() as patches:
        patches.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            step(manager(root), set={"status": "BUSY"})
    assert ledger.last_seq() == 2
    assert wsm.load()["status"] == "BUSY"


def test_a_ledger_that_began_later_than_the_file_cannot_make_it_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / "working_set.v2.1.json"
    alone = WorkingSetManager(path)
    alone.create_initial(**NAMES)
    old = path.read_bytes()
    step(alone, set={"status": "BUSY"})
    assert step(manager(tmp_path), set={"status": "DONE"}).update_seq == 2
    path.write_bytes(old)
    with pytest.raises(BrokenError, match="what was before is missing"):
        manager(tmp_path).load()
    path.unlink()
    with pytest.raises(BrokenError, match="what was before is missing"):
        manager(tmp_path).load()


def test_an_event_that_does_not_make_what_it_says_is_broken(root: Path) -> None:
    behind(root)
    ledger = root / "ledger" / "run.v2.1.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b"BUSY", b"DONE"))
    with pytest.raises(BrokenError, match="hash"):
        manager(root).load()


FAULTY = ("open", "write", "fsync", "pwrite", "fdatasync", "ftruncate", "mkdir", "replace")
"""Every system call of a patch that may fail."""


def stepping(monkeypatch: pytest.MonkeyPatch, turn: int, fault: Callable[[], None]) -> None:
    """Let the call fail whose turn it is, and all after it work."""
    calls = itertools.count(1)

    def faulty(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls) == turn:
                fault()
            return real(*args, **options)

        return call

    for name in FAULTY:
        monkeypatch.setattr(os, name, faulty(getattr(os, name)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_step_raises_and_leaves_all_of_the_patch_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    outcomes = []
    for turn in itertools.count(1):
        root = tmp_path / f"run_{turn}"
        wsm = manager(root)
        wsm.create_initial(**{**NAMES, "run_id": root.name})
        old = step(wsm, set={"status": "BUSY"}).working_set
        raised = None
        with monkeypatch.context() as patches:
            stepping(patches, turn, fail)
            try:
                wsm.apply_patch(patch(1, set={"status": "DONE"}))
            except OSError as error:
                raised = error.errno
        working_set = wsm.load()
        assert working_set == manager(root).load()
        applied = [event["data"]["update_seq"] for event in events(root, "WS_UPDATE_APPLIED")]
        assert applied == list(range(1, working_set["_update_seq"] + 1))
        assert working_set == old or working_set["status"] == "DONE"
        assert step(wsm, set={"status": "IDLE"}).update_seq == working_set["_update_seq"] + 1
        assert [path for path in (root / "state").iterdir() if path.name.startswith(".w")] == []
        if raised is None:
            break
        assert raised == code
        outcomes.append(working_set["_update_seq"])
    # Nothing of the patch before the ledger has it, and all of it after.
    assert outcomes == sorted(outcomes)
    assert outcomes.count(1) >= 7
    assert outcomes.count(2) == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_writer_that_is_killed_within_a_line_of_the_ledger_leaves_nothing_and_the_line_is_healed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if not child:
        pwrite = os.pwrite

        def torn(fd: int, data: memoryview, place: int) -> None:
            pwrite(fd, data[:99], place)
            os._exit(0)

        try:
            monkeypatch.setattr(os, "pwrite", torn)
            step(manager(root), set={"status": "BUSY"})
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert manager(root).load()["_update_seq"] == 0
    assert step(manager(root), set={"status": "DONE"}).update_seq == 1
    (healed,) = events(root, "LEDGER_HEALED")
    assert healed["data"]["cut_bytes"] == 99


ENDED, KILLED, FAILED = range(3)


def killed_at_each_step(folder: Path, action: Callable[[Path], object], *, booted: bool) -> Iterator[Path]:
    """A run each time: after each system call at which a child that does it is killed, and last where none was."""
    for turn in itertools.count(1):
        root = folder / f"run_{turn}"
        if booted:
            manager(root).create_initial(**NAMES)
        child = os.fork()
        if not child:
            code = FAILED
            try:
                with pytest.MonkeyPatch.context() as patches:
                    stepping(patches, turn, lambda: os._exit(KILLED))
                    action(root)
                code = ENDED
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code != FAILED
        yield root
        if code == ENDED:
            return


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child takes no lock that a thread may have
def test_a_writer_that_is_killed_at_any_step_leaves_all_of_the_patch_or_nothing(tmp_path: Path) -> None:
    def write(root: Path) -> None:
        step(manager(root), add={"sliding_context": [item("a")]})

    outcomes = []
    for root in killed_at_each_step(tmp_path, write, booted=True):
        working_set = manager(root).load()
        outcomes.append(working_set["_update_seq"])
        assert ids(working_set) == ["a"][: outcomes[-1]]
        assert len(events(root, "WS_UPDATE_APPLIED")) == outcomes[-1]
        assert step(manager(root), set={"status": "DONE"}).update_seq == outcomes[-1] + 1
        assert [path.name for path in (root / "state").iterdir() if path.name.startswith(".w")] == []
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_boot_that_is_killed_at_any_step_is_a_run_or_none_and_can_be_made_again(tmp_path: Path) -> None:
    def boot(root: Path) -> None:
        manager(root).create_initial(**NAMES)

    outcomes = []
    for root in killed_at_each_step(tmp_path, boot, booted=False):
        try:
            manager(root).load()
        except NotFoundError:
            boot(root)
            outcomes.append(0)
        else:
            with pytest.raises(ExistsError):
                boot(root)
            outcomes.append(1)
        assert step(manager(root), set={"status": "BUSY"}).update_seq == 1
        assert len(events(root, "RUN_BOOTED")) == 1
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1}
