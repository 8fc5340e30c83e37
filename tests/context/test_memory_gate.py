"""The gate's rules, over any proposals in any order of commits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aos_context.errors import ConflictError
from aos_context.memory import InMemoryMemoryStore
from aos_context.memory_gate import Proposer, draft_of, normalised, ordered_id
from hypothesis import given
from hypothesis import strategies as st

from tests.context.memories import HERE, add, delete, remember, supersede, update

if TYPE_CHECKING:
    from random import Random

    from aos_context.artifacts import Document

CONTENTS = st.sampled_from(["a b", "a  b", "A b", "c d", "e"])
STEP = st.tuples(st.sampled_from(["add", "update", "supersede", "delete"]), st.integers(0, 3), CONTENTS)
BATCHES = st.lists(st.lists(STEP, min_size=1, max_size=4), max_size=5)


def change(op: str, target: str, content: str) -> Document:
    made = {"add": add(content), "update": update(target, content=content), "delete": delete(target)}
    return made.get(op, supersede(target, content))


def consistent(items: list[Document]) -> None:
    keys = [draft_of(item).key for item in items if item["status"] == "active"]
    assert len(keys) == len(set(keys))
    by_id = {item["id"]: item for item in items}
    for item in items:
        assert (item["status"] == "superseded") == (item["superseded_by"] is not None)
        if item["superseded_by"] is not None:
            assert by_id[item["superseded_by"]]["supersedes"] is not None
        if item["supersedes"] is not None:
            assert by_id[item["supersedes"]]["superseded_by"] == item["id"]


def committed(store: InMemoryMemoryStore, batch_id: str) -> list[Document] | None:
    """None where it was refused."""
    try:
        return store.commit(batch_id).items
    except ConflictError:
        return None


@given(BATCHES, st.randoms(use_true_random=False))
def test_no_two_active_memories_are_the_same_and_links_go_both_ways_in_any_order_of_commits(
    batches: list[list[tuple[str, int, str]]], order: Random
) -> None:
    store = InMemoryMemoryStore()
    ids = [item["id"] for item in remember(store, *[add(f"start {number}") for number in range(4)])]
    waiting = [
        store.propose([change(op, ids[target], content) for op, target, content in batch]).batch_id for batch in batches
    ]
    order.shuffle(waiting)
    for batch_id in waiting:
        before = store.items()
        made = committed(store, batch_id)
        after = {item["id"]: item for item in store.items()}
        if made is None:
            assert list(after.values()) == before
        else:
            assert all(after[item["id"]] == item for item in made)
            assert {item["id"] for item in before} <= after.keys()
        consistent(store.items())


@given(CONTENTS, st.lists(st.sampled_from(["one", "two"]), min_size=2, max_size=6))
def test_content_that_is_proposed_any_number_of_times_is_one_memory(content: str, places: list[str]) -> None:
    store = InMemoryMemoryStore()
    waiting = [store.propose([add(content), add(f" {content} ")], {"run_id": place}) for place in places]
    assert [one.staged for one in waiting] == [1] * len(places)
    assert all(one.staged == len(store.batch(one.batch_id).mcrs) for one in waiting)
    for one in reversed(waiting):
        store.commit(one.batch_id)
    assert len(store.items()) == 1


@given(st.text(), st.sampled_from([" ", "\n", "\t", "\u00a0", "\u2003"]))
def test_white_space_is_folded_and_nothing_else_of_a_content_is_lost(text: str, space: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    assert normalised(f"{space}{text}{space}{space}") == once
    assert normalised("A b") != normalised("a b")


@pytest.mark.parametrize(
    ("scope", "seen"),
    [({}, "g"), ({"task_id": "t1"}, "gt"), ({"run_id": "r1"}, "gr"), (HERE, "gtr"), ({"task_id": "r1"}, "g")],
)
def test_a_scope_sees_global_memories_and_those_of_its_task_and_run(scope: dict[str, str], seen: str) -> None:
    items: dict[str, Document] = {
        "g": {"scope": "global", "task_id": None, "run_id": None},
        "t": {"scope": "task", "task_id": "t1", "run_id": None},
        "r": {"scope": "run", "task_id": "t1", "run_id": "r1"},
    }
    assert "".join(kind for kind, item in items.items() if Proposer.parse(scope).sees(item)) == seen


def test_no_id_is_made_twice() -> None:
    assert len({ordered_id("mem") for _ in range(1_000)}) == 1_000
