"""The memory in Mem0, with the real package on a vector store in a folder: what is Mem0's and what stays ours."""

from __future__ import annotations

import importlib.util
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from aos_context import memory_mem0
from aos_context.errors import BusyError, ConflictError, UnreachableError
from aos_context.memory import InMemoryMemoryStore
from aos_context.memory_mem0 import USER_ID, Mem0MemoryStore
from aos_context.memory_sqlite import SQLiteMemoryStore
from aos_context.runs import Runs

from tests.context.memories import HERE, add, delete, found, offline_mem0, remember, supersede, update

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.artifacts import Document

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mem0") is None, reason="mem0ai is not installed")


@pytest.fixture
def mem0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with offline_mem0(tmp_path) as memory:
        yield memory


def kept(mem0: Any) -> list[tuple[str, Document]]:
    rows = mem0.get_all(filters={"user_id": USER_ID}, top_k=100)["results"]
    return sorted((row["memory"], row["metadata"]) for row in rows)


def test_mem0_gets_what_is_committed_as_it_is_with_what_a_search_filters_by(mem0: Any) -> None:
    store = Mem0MemoryStore(mem0, InMemoryMemoryStore())
    batch_id = store.propose([add("Water  is\nwet", scope="run", writer="ann")], HERE).batch_id
    assert kept(mem0) == []
    [item] = store.commit(batch_id).items
    metadata = {"memory_id": item["id"], "place": "run:r1", "status": "active", "type": "fact"}
    assert kept(mem0) == [("Water  is\nwet", {**metadata, "writer": "ann", "confidence": 0.9})]


def test_what_is_changed_is_changed_in_mem0_and_nothing_is_there_twice(mem0: Any) -> None:
    store = Mem0MemoryStore(mem0, InMemoryMemoryStore())
    one, two, three = remember(store, add("alpha beta"), add("gamma delta"), add("epsilon zeta"))
    remember(store, update(one["id"], content="eta theta"), delete(two["id"]), supersede(three["id"], "iota kappa"))
    assert [(content, metadata["status"]) for content, metadata in kept(mem0)] == [
        ("epsilon zeta", "superseded"),
        ("eta theta", "active"),
        ("gamma delta", "deleted"),
        ("iota kappa", "active"),
    ]


def test_the_best_match_by_meaning_comes_first_with_the_score_of_mem0(mem0: Any) -> None:
    store = Mem0MemoryStore(mem0, InMemoryMemoryStore())
    remember(store, add("the cat sat on the mat"), add("the cat sleeps"), add("stocks fell"))
    hits = store.search("cat sleeps", {}, 2)
    assert [hit.item["content"] for hit in hits] == ["the cat sleeps", "the cat sat on the mat"]
    assert 1 >= hits[0].score > hits[1].score > 0


def test_what_is_filtered_out_takes_no_place_among_the_best(mem0: Any) -> None:
    store = Mem0MemoryStore(mem0, InMemoryMemoryStore())
    remember(store, *[add(f"common words {number}", scope="run") for number in range(8)], run_id="r2")
    remember(store, add("common"), add("common low", confidence=0.1))
    assert found(store, "common words", min_confidence=0.5) == {"common"}
    assert [hit.item["content"] for hit in store.search("common words", {"min_confidence": 0.5}, 1)] == ["common"]


def test_what_others_have_in_mem0_is_not_shown_as_ours(mem0: Any) -> None:
    store = Mem0MemoryStore(mem0, InMemoryMemoryStore())
    mem0.add("water of others", user_id="others", infer=False)
    mem0.add("water of nobody", user_id=USER_ID, metadata={"place": "global", "status": "active"}, infer=False)
    remember(store, add("water is wet"))
    assert found(store, "water") == {"water is wet"}


class Failing:
    """A Mem0 that fails at the n-th change."""

    def __init__(self, mem0: Any, left: int) -> None:
        self._mem0 = mem0
        self.left = left

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the vector store is away")

    def add(self, messages: str, **members: Any) -> object:
        self._count()
        return self._mem0.add(messages, **members)

    def update(self, memory_id: str, text: str, metadata: Document) -> object:
        self._count()
        return self._mem0.update(memory_id, text, metadata)

    def get_all(self, **members: Any) -> object:
        return self._mem0.get_all(**members)

    def search(self, query: str, **members: Any) -> object:
        return self._mem0.search(query, **members)


@pytest.fixture
def deciding(tmp_path: Path) -> Iterator[SQLiteMemoryStore]:
    with closing(SQLiteMemoryStore(tmp_path / "memory.sqlite")) as store:
        yield store


CONTENTS = ["alpha one", "beta two", "gamma three"]


@pytest.mark.parametrize("next_step", ["the same commit", "another commit", "sync", "sync after a restart"])
def test_a_commit_in_which_mem0_fails_holds_and_the_next_one_or_sync_brings_what_is_missing(
    mem0: Any, deciding: SQLiteMemoryStore, next_step: str
) -> None:
    failing = Failing(mem0, left=2)
    store = Mem0MemoryStore(failing, deciding)
    batch_id = store.propose([add(content) for content in CONTENTS]).batch_id
    other_id = store.propose([add("delta four")]).batch_id
    assert [item["content"] for item in store.commit(batch_id).items] == CONTENTS
    assert store.batch(batch_id).state == "committed"
    assert [content for content, _ in kept(mem0)] == CONTENTS[:2]
    with pytest.raises(UnreachableError) as refused:
        store.sync()
    assert (refused.value.status, refused.value.code) == (503, "UNREACHABLE")
    failing.left = 1 + (next_step == "another commit")
    if next_step == "the same commit":
        assert store.commit(batch_id).already
    elif next_step == "another commit":
        store.commit(other_id)
    else:
        (store if next_step == "sync" else Mem0MemoryStore(failing, deciding)).sync()
    more = ["delta four"] if next_step == "another commit" else []
    assert [content for content, _ in kept(mem0)] == sorted([*CONTENTS, *more])
    assert failing.left == 0
    store.sync()  # It has nothing to bring: it would fail.


def test_what_a_process_could_not_bring_and_ended_is_brought_by_the_next_commit_of_another(
    mem0: Any, tmp_path: Path
) -> None:
    with closing(SQLiteMemoryStore(tmp_path / "memory.sqlite")) as deciding:
        away = Mem0MemoryStore(Failing(mem0, left=1), deciding)
        [_, two] = remember(away, add("alpha one"), add("beta two"))
        remember(away, update(two["id"], content="beta three"))
    with closing(SQLiteMemoryStore(tmp_path / "memory.sqlite")) as deciding:
        remember(deciding, add("gamma four"))  # who commits without Mem0 brings it nothing
        assert [content for content, _ in kept(mem0)] == ["alpha one"]
        remember(Mem0MemoryStore(mem0, deciding), add("delta five"))
    assert [content for content, _ in kept(mem0)] == ["alpha one", "beta three", "delta five", "gamma four"]


def test_a_commit_brings_its_own_first_and_so_much_of_what_is_missing_that_it_ends_soon(
    mem0: Any, deciding: SQLiteMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_mem0, "BROUGHT_MOST", 2)
    remember(deciding, *[add(f"missed {number}") for number in range(5)])
    store = Mem0MemoryStore(mem0, deciding)
    remember(store, add("new one"))
    assert [content for content, _ in kept(mem0)] == ["missed 0", "missed 1", "new one"]
    remember(store, add("new two"))
    remember(store, add("new three"))
    assert len(kept(mem0)) == 8
    assert deciding.followed(f"mem0:{USER_ID}") == 6


def test_what_mem0_has_lost_is_brought_by_sync_though_it_was_there(mem0: Any, deciding: SQLiteMemoryStore) -> None:
    store = Mem0MemoryStore(mem0, deciding)
    remember(store, *[add(content) for content in CONTENTS])
    mem0.delete_all(user_id=USER_ID)
    remember(store, add("delta four"))
    assert [content for content, _ in kept(mem0)] == ["delta four"]
    store.sync()
    assert [content for content, _ in kept(mem0)] == sorted([*CONTENTS, "delta four"])


def test_a_commit_holds_though_how_far_mem0_is_cannot_be_kept(
    mem0: Any, deciding: SQLiteMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BusyError("others write")

    store = Mem0MemoryStore(mem0, deciding)
    with monkeypatch.context() as patch:
        patch.setattr(deciding, "follow", refuse)
        assert len(remember(store, add("alpha one"))) == 1
    remember(store, add("beta two"))
    assert deciding.followed(f"mem0:{USER_ID}") == 2
    assert [content for content, _ in kept(mem0)] == CONTENTS[:2]


def test_what_mem0_still_has_in_an_old_form_is_not_found(mem0: Any) -> None:
    store = Mem0MemoryStore(Failing(mem0, left=1), InMemoryMemoryStore())
    [item] = remember(store, add("water is wet"))
    remember(store, delete(item["id"]))
    assert kept(mem0)[0][1]["status"] == "active"
    assert found(store, "water") == set()


def test_a_store_that_is_made_anew_shows_what_was_committed_before(mem0: Any, deciding: SQLiteMemoryStore) -> None:
    remember(Mem0MemoryStore(mem0, deciding), add("water is wet"))
    assert found(Mem0MemoryStore(mem0, deciding), "water") == {"water is wet"}


class Away:
    """A Mem0 that is not there."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError(f"the vector store is away: {name}")


def test_without_mem0_runs_are_changed_and_mended_and_only_a_search_by_meaning_is_503(
    deciding: SQLiteMemoryStore, tmp_path: Path
) -> None:
    runs = Runs(tmp_path / "runs", memory=Mem0MemoryStore(Away(), deciding))
    run = runs.open(runs.boot("Move the invoices.")["run_id"])
    proposed = run.propose([add("water is wet")])
    deciding.commit(proposed.batch_id)  # a commit that was cut off before its event
    assert run.milestone("reached", memory_batch_id=proposed.batch_id).memory is not None
    run.snapshot()
    types = [event["event_type"] for event in run.events(limit=9)]
    assert types == ["RUN_BOOTED", "MEMORY_PROPOSED", "MEMORY_COMMITTED", "EPISODE_CREATED", "RESUME_PACK_CREATED"]
    assert [hit.item["content"] for hit in run.search("")] == ["water is wet"]
    with pytest.raises(UnreachableError, match="the vector store is away"):
        run.search("water")


def test_a_batch_that_is_refused_brings_nothing_to_mem0(mem0: Any) -> None:
    store = Mem0MemoryStore(mem0, InMemoryMemoryStore())
    [item] = remember(store, add("water is wet"))
    stale = store.propose([add("fire is hot"), supersede(item["id"], "ice is cold")]).batch_id
    remember(store, delete(item["id"]))
    with pytest.raises(ConflictError):
        store.commit(stale)
    assert [content for content, _ in kept(mem0)] == ["water is wet"]
