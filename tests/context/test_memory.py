"""What every store of memory does, run against each: the gate, the four changes, and who sees what."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
from aos_context.config import Config
from aos_context.errors import ConflictError, NotFoundError, SchemaError
from aos_context.memory_gate import CONFLICTS_MOST
from aos_context.memory_mem0 import Mem0MemoryStore

from tests.context.memories import HERE, add, delete, found, opened, remember, supersede, update

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.memory import RecordingMemoryStore

no_mem0 = pytest.mark.skipif(importlib.util.find_spec("mem0") is None, reason="mem0ai is not installed")


@pytest.fixture(params=["memory", "sqlite", pytest.param("mem0", marks=no_mem0)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordingMemoryStore]:
    with opened(request.param, tmp_path, Config(batch_max_changes=20)) as store:
        yield store


def contents(items: list[Document]) -> list[str]:
    return [item["content"] for item in items]


def test_what_is_proposed_is_memory_only_once_it_is_committed(store: RecordingMemoryStore) -> None:
    batch_id = store.propose([add("water is wet")], {"writer": "ann", **HERE}).batch_id
    assert (found(store, "water"), store.items(), store.batch(batch_id).state) == (set(), [], "proposed")
    [item] = store.commit(batch_id, committed_by="request7").items
    assert found(store, "water") == {"water is wet"}
    assert store.items() == [item]
    assert (item["writer"], item["committed_by"], item["batch_id"]) == ("ann", "request7", batch_id)
    assert (item["scope"], item["task_id"], item["run_id"], item["status"]) == ("global", None, None, "active")
    batch = store.batch(batch_id)
    assert (batch.state, batch.committed_by, batch.run_id, batch.task_id) == ("committed", "request7", "r1", "t1")


def test_a_change_has_its_own_writer_before_that_of_its_batch_and_is_anonymous_without_any(
    store: RecordingMemoryStore,
) -> None:
    items = remember(store, add("one thing", writer="bob"), add("second matter"), writer="ann")
    assert [item["writer"] for item in items + remember(store, add("third case"))] == ["bob", "ann", "anonymous"]


def test_a_commit_that_is_repeated_gives_the_first_answer_though_memory_went_on(store: RecordingMemoryStore) -> None:
    batch_id = store.propose([add("water is wet")]).batch_id
    first = store.commit(batch_id, committed_by="request7")
    remember(store, update(first.items[0]["id"], content="water is not wet"))
    again = store.commit(batch_id, committed_by="request8")
    assert (first.already, again.already) == (False, True)
    assert again.items == first.items
    assert contents(store.items(batch_id=batch_id)) == ["water is wet"]
    assert contents(store.items()) == ["water is not wet"]


@pytest.mark.parametrize("same", ["cafe\u0301 au lait", "  caf\u00e9\tau \n lait "])
def test_the_same_content_proposed_twice_is_one_within_a_batch_and_after_its_commit(
    store: RecordingMemoryStore, same: str
) -> None:
    twice = store.propose([add("caf\u00e9 au lait"), add(same)])
    assert (twice.staged, [one.index for one in twice.duplicates]) == (1, [1])
    [item] = store.commit(twice.batch_id).items
    again = store.propose([add(same)])
    assert (again.staged, [one.memory_id for one in again.duplicates]) == (0, [item["id"]])
    assert (store.batch(again.batch_id).state, store.batch(again.batch_id).mcrs) == ("empty", [])
    assert store.commit(again.batch_id).items == []
    assert store.batch(again.batch_id).state == "committed"
    assert store.items() == [item]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_proposal_that_was_abandoned_is_named_to_nobody_and_can_still_be_committed(tmp_path: Path, kind: str) -> None:
    with opened(kind, tmp_path, Config(proposal_max_age_days=0)) as store:
        [item] = remember(store, add("water is wet"))
        old = store.propose([add("fire is hot"), delete(item["id"])]).batch_id
        again = store.propose([add("fire is hot"), update(item["id"], content="ice is cold")])
        assert (again.staged, again.duplicates, again.conflicts) == (2, (), ())
        assert len(store.commit(old).items) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_same_content_in_two_batches_is_one_whichever_is_committed_first(
    store: RecordingMemoryStore, order: tuple[int, int]
) -> None:
    first = store.propose([add("water is wet")])
    second = store.propose([add("water is  wet")])
    assert (second.staged, [one.batch_id for one in second.duplicates]) == (1, [first.batch_id])
    batches = [first.batch_id, second.batch_id]
    assert [len(store.commit(batches[turn]).items) for turn in order] == [1, 0]
    assert len(store.items()) == 1


@pytest.mark.parametrize(
    "other",
    [add("Water is wet"), add("water is wet", type="decision"), add("water is wet", scope="task")],
    ids=["case", "type", "scope"],
)
def test_what_differs_in_case_type_or_scope_is_no_duplicate(store: RecordingMemoryStore, other: Document) -> None:
    remember(store, add("water is wet"))
    assert store.propose([other], HERE).duplicates == ()
    assert len(remember(store, other, **HERE)) == 1


def test_the_same_content_of_two_runs_is_two(store: RecordingMemoryStore) -> None:
    for run in ("r1", "r2"):
        assert len(remember(store, add("water is wet", scope="run"), run_id=run)) == 1


def test_an_active_memory_with_alike_words_is_named_as_a_conflict_and_nothing_is_held_back(
    store: RecordingMemoryStore,
) -> None:
    [item, _] = remember(store, add("the build runs on Python 3.11 only"), add("lunch is at noon"))
    proposed = store.propose([add("unrelated words"), add("the BUILD runs on Python 3.12 only")])
    [conflict] = proposed.conflicts
    assert (conflict.index, conflict.memory_id, conflict.content) == (1, item["id"], item["content"])
    assert "alike (0.78)" in conflict.reason
    assert proposed.staged == 2


def test_of_many_alike_memories_the_most_alike_are_named_and_no_more_than_are_said(store: RecordingMemoryStore) -> None:
    remember(store, *[add(f"the build runs on Python x{n}") for n in range(CONFLICTS_MOST)])
    _, nearest = remember(store, add("the build runs on Python now and x"), add("the build runs on Python"))
    proposed = store.propose([add("the build runs on Python now")])
    assert len(proposed.conflicts) == CONFLICTS_MOST == 10
    assert [one.content for one in proposed.conflicts][:1] == ["the build runs on Python"]
    assert "the build runs on Python now and x" in [one.content for one in proposed.conflicts]
    changed = store.propose([update(nearest["id"], content="the build runs on Python at last")])
    assert len(changed.conflicts) == CONFLICTS_MOST
    assert nearest["id"] not in [one.memory_id for one in changed.conflicts]


def test_a_target_that_no_longer_holds_or_that_others_are_to_change_is_a_conflict(store: RecordingMemoryStore) -> None:
    one, two = remember(store, add("alpha beta"), add("gamma delta"))
    remember(store, delete(one["id"]))
    waiting = store.propose([delete(two["id"])]).batch_id
    reasons = [
        (conflict.index, conflict.memory_id, conflict.reason)
        for conflict in store.propose(
            [update(one["id"], content="x"), update(two["id"], content="y"), update(two["id"], content="z")]
        ).conflicts
    ]
    assert reasons == [
        (0, one["id"], "it is deleted"),
        (1, two["id"], f"batch {waiting} changes it"),
        (2, two["id"], "another proposal of this batch changes it"),
        (2, two["id"], f"batch {waiting} changes it"),
    ]


def test_an_update_changes_what_it_names_in_place(store: RecordingMemoryStore) -> None:
    [before] = remember(store, add("water is wet", source_refs=["a"]))
    proposed = store.propose([update(before["id"], content="fire is hot", confidence=0.5)], {"writer": "eve"})
    [after] = store.commit(proposed.batch_id, committed_by="request9").items
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"content", "confidence", "rationale", "writer", "batch_id", "committed_by", "updated_at"}
    assert (after["content"], after["writer"], after["committed_by"]) == ("fire is hot", "eve", "request9")
    assert store.items() == [after]
    assert contents([hit.item for hit in store.search("fire hot", {}, 1)]) == ["fire is hot"]


def test_an_update_that_changes_nothing_is_a_duplicate(store: RecordingMemoryStore) -> None:
    [item] = remember(store, add("water is wet"))
    assert store.propose([update(item["id"], content="water is wet", writer="eve")]).staged == 0


def test_a_memory_that_is_superseded_stays_with_links_both_ways(store: RecordingMemoryStore) -> None:
    [old] = remember(store, add("the sky is blue", type="observation", scope="task"), **HERE)
    retired, new = remember(store, supersede(old["id"], "the sky is grey"), **HERE)
    assert (retired["id"], retired["status"], retired["superseded_by"]) == (old["id"], "superseded", new["id"])
    assert (new["status"], new["supersedes"], new["type"], new["task_id"]) == ("active", old["id"], "observation", "t1")
    assert found(store, "sky", task_id="t1") == {"the sky is grey"}
    assert found(store, "sky", task_id="t1", status="superseded") == {"the sky is blue"}
    assert len(found(store, "sky", task_id="t1", status="any")) == 2


def test_what_is_superseded_by_a_memory_that_is_there_already_makes_no_second_one(store: RecordingMemoryStore) -> None:
    one, two = remember(store, add("the sky is blue"), add("grass tends green"))
    remember(store, supersede(one["id"], "grass tends green"))
    after = {item["id"]: item for item in store.items()}
    assert len(after) == 2
    assert (after[one["id"]]["status"], after[one["id"]]["superseded_by"]) == ("superseded", two["id"])
    assert (after[two["id"]]["status"], after[two["id"]]["supersedes"]) == ("active", one["id"])


def test_a_memory_of_a_run_can_be_superseded_by_one_for_all(store: RecordingMemoryStore) -> None:
    [own] = remember(store, add("tests take a minute", scope="run"), **HERE)
    assert found(store, "tests minute", run_id="r2") == set()
    remember(store, supersede(own["id"], "tests take a minute", scope="global"), **HERE)
    assert found(store, "tests minute", run_id="r2") == {"tests take a minute"}


def test_a_memory_that_is_deleted_stays_and_its_content_can_be_added_anew(store: RecordingMemoryStore) -> None:
    [item] = remember(store, add("water is wet"))
    [gone] = remember(store, delete(item["id"]))
    assert (gone["id"], gone["status"], gone["content"]) == (item["id"], "deleted", "water is wet")
    assert found(store, "water") == set()
    assert found(store, "water", status="deleted") == {"water is wet"}
    [new] = remember(store, add("water is wet"))
    assert new["id"] != item["id"]


def test_changes_of_one_batch_see_each_other(store: RecordingMemoryStore) -> None:
    [item] = remember(store, add("water is wet"))
    gone, new = remember(store, delete(item["id"]), add("water is wet", confidence=0.1))
    assert (gone["id"], gone["status"], new["status"], new["confidence"]) == (item["id"], "deleted", "active", 0.1)
    item = new
    items = remember(store, update(item["id"], content="ice is cold"), supersede(item["id"], "steam is hot"))
    assert [(one["content"], one["status"]) for one in items] == [
        ("ice is cold", "superseded"),
        ("steam is hot", "active"),
    ]
    assert items == store.items()[1:]


def test_content_that_a_batch_has_given_up_can_be_added_by_it(store: RecordingMemoryStore) -> None:
    [item] = remember(store, add("water is wet"))
    batch = [update(item["id"], content="ice is cold"), update(item["id"], content="steam is hot"), add("ice is cold")]
    changed, added = remember(store, *batch)
    assert (changed["id"], changed["content"], added["content"]) == (item["id"], "steam is hot", "ice is cold")


@pytest.mark.parametrize("op", ["update", "supersede", "delete"])
def test_a_batch_that_can_no_longer_be_made_changes_nothing_and_says_what_is_in_its_way(
    store: RecordingMemoryStore, op: str
) -> None:
    one, two = remember(store, add("alpha beta"), add("gamma delta"))
    change = {
        "update": update(two["id"], content="new words"),
        "supersede": supersede(two["id"], "new words"),
        "delete": delete(two["id"]),
    }[op]
    stale = store.propose([update(one["id"], confidence=0.1), add("epsilon zeta"), change]).batch_id
    remember(store, supersede(two["id"], "eta theta"))
    before = store.items()
    with pytest.raises(ConflictError) as refused:
        store.commit(stale)
    assert refused.value.members["conflicts"] == [
        {"index": 2, "memory_id": two["id"], "content": "gamma delta", "reason": "it is superseded"}
    ]
    assert store.items() == before
    assert store.batch(stale).state == "proposed"
    assert found(store, "epsilon zeta") <= {item["content"] for item in before}


def test_an_update_to_the_content_of_another_memory_is_named_and_refused(store: RecordingMemoryStore) -> None:
    one, two = remember(store, add("alpha beta"), add("gamma delta"))
    proposed = store.propose([update(one["id"], content="gamma  delta")])
    assert [conflict.memory_id for conflict in proposed.conflicts] == [two["id"]]
    with pytest.raises(ConflictError, match="same content"):
        store.commit(proposed.batch_id)


def test_the_same_change_in_two_batches_is_made_once(store: RecordingMemoryStore) -> None:
    one, two, three = remember(store, add("alpha beta"), add("gamma delta"), add("epsilon zeta"))
    changes = [delete(one["id"]), supersede(two["id"], "eta theta"), update(three["id"], confidence=0.2)]
    first, second = store.propose(changes), store.propose(changes)
    assert (second.staged, {one.batch_id for one in second.duplicates}) == (3, {first.batch_id})
    assert second.conflicts == ()
    assert len(store.commit(second.batch_id).items) == 4
    assert store.commit(first.batch_id).items == []


def test_a_target_that_is_not_there_or_is_another_runs_is_refused_with_its_path_and_nothing_is_staged(
    store: RecordingMemoryStore,
) -> None:
    [other] = remember(store, add("water is wet", scope="run"), run_id="r2")
    with pytest.raises(SchemaError) as refused:
        store.propose([add("a"), delete("mem_none"), delete(other["id"])], HERE)
    assert [fault["path"] for fault in refused.value.faults] == ["$[1].target_id", "$[2].target_id"]
    assert store.batches("r1") == []


def test_a_scope_needs_the_place_where_it_holds(store: RecordingMemoryStore) -> None:
    with pytest.raises(SchemaError) as refused:
        store.propose([add("a", scope="run"), add("b", scope="task")])
    assert [fault["path"] for fault in refused.value.faults] == ["$[0].scope", "$[1].scope"]


@pytest.mark.parametrize(
    ("mcrs", "path"),
    [
        ([add("a"), add("b", colour="red")], "$[1]"),
        ([add("a", confidence=2)], "$[0].confidence"),
        ([add("a", confidence=float("nan"))], "$[0].confidence"),
        ([add("half \ud800")], "$[0]"),
        (["add"], "$[0]"),
        ([], "$"),
        ("add", "$"),
        ([add(str(number)) for number in range(21)], "$"),
    ],
)
def test_what_is_no_list_of_changes_is_refused_with_its_path(store: RecordingMemoryStore, mcrs: Any, path: str) -> None:
    with pytest.raises(SchemaError) as refused:
        store.propose(mcrs)
    assert refused.value.faults[0]["path"] == path


@pytest.mark.parametrize(
    ("scope", "path"),
    [
        ({"colour": "red"}, "$.colour"),
        ({"run_id": "../r"}, "$.run_id"),
        ({"task_id": 7}, "$.task_id"),
        ({"writer": ""}, "$.writer"),
        ({"writer": "\ud800"}, "$.writer"),
        ([], "$"),
    ],
)
def test_scope_filters_are_checked(store: RecordingMemoryStore, scope: Any, path: str) -> None:
    with pytest.raises(SchemaError) as refused:
        store.propose([add("a")], scope)
    assert refused.value.faults[0]["path"] == path


@pytest.mark.parametrize(
    ("filters", "path"),
    [
        ({"colour": "red"}, "$.colour"),
        ({"scope": "galaxy"}, "$.scope"),
        ({"status": "lost"}, "$.status"),
        ({"type": ["fact"]}, "$.type"),
        ({"run_id": "a b"}, "$.run_id"),
        ({"writer": 7}, "$.writer"),
        ({"min_confidence": 1.5}, "$.min_confidence"),
        ({"min_confidence": float("nan")}, "$.min_confidence"),
        ({"min_confidence": True}, "$.min_confidence"),
        ("all", "$"),
    ],
)
def test_filters_are_checked(store: RecordingMemoryStore, filters: Any, path: str) -> None:
    with pytest.raises(SchemaError) as refused:
        store.search("a", filters)
    assert refused.value.faults[0]["path"] == path


@pytest.mark.parametrize("top_k", [0, -1, 101, 1.0, True, "3"])
def test_top_k_is_bounded(store: RecordingMemoryStore, top_k: Any) -> None:
    with pytest.raises(SchemaError, match=r"\$\.top_k"):
        store.search("a", {}, top_k)


def test_memories_of_a_task_or_a_run_are_found_there_only_and_global_ones_everywhere(
    store: RecordingMemoryStore,
) -> None:
    remember(store, add("milk for all"), add("milk for task", scope="task"), add("milk for run", scope="run"), **HERE)
    everywhere = {"milk for all"}
    assert found(store, "milk for") == everywhere
    assert found(store, "milk for", task_id="t1") == everywhere | {"milk for task"}
    assert found(store, "milk for", run_id="r1") == everywhere | {"milk for run"}
    assert found(store, "milk for", **HERE) == everywhere | {"milk for task", "milk for run"}
    assert found(store, "milk for", task_id="t2", run_id="r2") == everywhere
    assert found(store, "milk for", **HERE, scope="run") == {"milk for run"}
    assert found(store, "milk for", scope="run") == set()
    assert found(store, "", **HERE, scope="task") == {"milk for task"}


def test_filters_narrow_to_a_type_a_writer_and_a_confidence(store: RecordingMemoryStore) -> None:
    remember(
        store,
        add("tea fact", writer="ann", confidence=0.2),
        add("tea decision", type="decision", writer="ann"),
        add("tea other", writer="bob"),
    )
    assert found(store, "tea", type="decision") == {"tea decision"}
    assert found(store, "tea", writer="ann") == {"tea fact", "tea decision"}
    assert found(store, "tea", min_confidence=0.9) == {"tea decision", "tea other"}
    assert found(store, "tea", writer="ann", type="fact", min_confidence=0.5) == set()
    assert found(store, "tea", writer=None, type=None, min_confidence=None) == {"tea fact", "tea decision", "tea other"}
    assert found(store, "", writer="bob") == {"tea other"}


def test_an_empty_query_lists_the_newest_first(store: RecordingMemoryStore) -> None:
    for number in range(5):
        remember(store, add(f"number {number}"))
    assert contents([hit.item for hit in store.search(" ", {}, 3)]) == ["number 4", "number 3", "number 2"]
    assert len(store.search("")) == 5


def test_the_same_query_gives_the_same_order_also_among_equals(store: RecordingMemoryStore) -> None:
    items = remember(store, *[add(f"twin {letter}") for letter in "abcdef"])
    hits = [hit.item["id"] for hit in store.search("twin")]
    assert hits == [item["id"] for item in items]
    assert [hit.item["id"] for hit in store.search("twin")] == hits
    if not isinstance(store, Mem0MemoryStore):  # Which of equals come through its cut is the vector store's affair.
        assert [hit.item["id"] for hit in store.search("twin", {}, 2)] == hits[:2]


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (update("", content="two"), [("eve", "", "active")]),
        (update("", content="two", rationale="measured"), [("eve", "measured", "active")]),
        (
            supersede("", "two", rationale="measured"),
            [("eve", "measured", "superseded"), ("eve", "measured", "active")],
        ),
        (delete(""), [("eve", "wrong", "deleted")]),
    ],
)
def test_each_version_says_who_made_it_and_why_and_a_run_keeps_the_versions_that_it_made(
    store: RecordingMemoryStore, change: Document, made: list[tuple[str, str, str]]
) -> None:
    first = store.propose([add("one")], {"run_id": "r1", "writer": "ann"}).batch_id
    [item] = store.commit(first, committed_by="request1").items
    second = store.propose([{**change, "target_id": item["id"]}], {"run_id": "r2", "writer": "eve"}).batch_id
    items = store.commit(second, committed_by="request2").items
    assert [(one["writer"], one["rationale"], one["status"]) for one in items] == made
    assert {(one["batch_id"], one["committed_by"]) for one in items} == {(second, "request2")}
    assert store.items(run_id="r1") == store.items(batch_id=first) == [item]
    assert store.items(run_id="r2") == store.items(batch_id=second) == store.items() == items


def test_of_an_item_that_two_runs_change_in_turn_each_has_its_own_last_version(store: RecordingMemoryStore) -> None:
    early = store.propose([add("other matter")], {"run_id": "r1"}).batch_id
    [item] = remember(store, add("turn 0"), run_id="r1")
    for turn in range(1, 5):
        remember(store, update(item["id"], content=f"turn {turn}"), run_id=f"r{1 + turn % 2}")
    store.commit(early)
    assert contents(store.items(run_id="r1")) == ["turn 4", "other matter"]
    assert contents(store.items(run_id="r2")) == ["turn 3"]
    assert contents(store.items()) == ["turn 4", "other matter"]


def test_an_active_memory_that_takes_anothers_place_says_who_put_it_there(store: RecordingMemoryStore) -> None:
    one, _ = remember(store, add("the sky is blue"), add("grass tends green"), writer="ann")
    items = remember(store, supersede(one["id"], "grass tends green", rationale="compared"), writer="eve")
    assert [(item["writer"], item["rationale"]) for item in items] == [("eve", "compared")] * 2


def test_what_waits_are_batches_of_the_run_that_would_change_something(store: RecordingMemoryStore) -> None:
    remember(store, add("alpha one"), run_id="r1")
    store.propose([add("alpha one")], {"run_id": "r1"})
    store.propose([add("gamma three")], {"run_id": "r2"})
    batches = [
        store.propose([add(f"{word} two"), add("more")], {"run_id": "r1"}).batch_id for word in ("be", "de", "ge")
    ]
    assert [one.batch_id for one in store.waiting("r1", 9)] == batches
    found = store.waiting("r1", 2)
    assert [(one.batch_id, one.changes, one.first and one.first["content"]) for one in found] == [
        (batches[1], 2, "de two"),
        (batches[2], 2, "ge two"),
    ]
    assert [one.proposed_at for one in found] == [store.batch(batch_id).proposed_at for batch_id in batches[1:]]
    store.commit(batches[1])
    assert [one.batch_id for one in store.waiting("r1", 9)] == [batches[0], batches[2]]
    assert store.waiting("r3", 9) == []


def test_batches_and_items_are_listed_by_the_run_that_proposed_them(store: RecordingMemoryStore) -> None:
    first = store.propose([add("alpha one")], {"run_id": "r1"}).batch_id
    second = store.propose([add("beta two")], {"run_id": "r1"}).batch_id
    other = store.propose([add("gamma three")], {"run_id": "r2"}).batch_id
    for batch_id in (other, second, first):
        store.commit(batch_id)
    assert [batch.batch_id for batch in store.batches("r1")] == [first, second]
    assert [batch.mcrs[0]["content"] for batch in store.batches("r2")] == ["gamma three"]
    assert sorted(contents(store.items(run_id="r1"))) == ["alpha one", "beta two"]
    assert contents(store.items(run_id="r1", batch_id=first)) == ["alpha one"]
    assert store.items(run_id="r2", batch_id=first) == []
    assert len(store.items()) == 3


@pytest.mark.parametrize("batch_id", ["batch_none", "", "' OR 1=1", "\ud800", None])
def test_an_unknown_batch_is_not_found(store: RecordingMemoryStore, batch_id: Any) -> None:
    for ask in (store.batch, store.commit):
        with pytest.raises(NotFoundError):
            ask(batch_id)


def test_no_caller_can_change_what_is_kept(store: RecordingMemoryStore) -> None:
    mcr = add("water is wet", source_refs=["a"])
    proposed = store.propose([mcr])
    mcr["source_refs"].append("b")
    store.batch(proposed.batch_id).mcrs[0]["source_refs"].append("c")
    committed = store.commit(proposed.batch_id).items
    committed[0]["source_refs"].append("d")
    store.search("")[0].item["source_refs"].append("e")
    assert store.items()[0]["source_refs"] == ["a"]


@pytest.mark.parametrize("name", ["", "x" * 129, "\ud800", 7])
def test_who_commits_is_text_and_else_nothing_is_committed(store: RecordingMemoryStore, name: Any) -> None:
    batch_id = store.propose([add("fire is hot")]).batch_id
    with pytest.raises(SchemaError, match=r"\$\.committed_by"):
        store.commit(batch_id, committed_by=name)
    assert store.batch(batch_id).state == "proposed"
    assert store.items() == []
