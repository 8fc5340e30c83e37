"""What is alike is looked for before the lock, and named as it is under it."""

from __future__ import annotations

import random
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest
from aos_context import memory_compared, memory_sqlite
from aos_context.config import DEFAULT_CONFIG
from aos_context.errors import SchemaError
from aos_context.memory_gate import CONFLICTS_MOST, Proposer, judge
from aos_context.memory_sqlite import SQLiteMemoryStore

from tests.context.memories import HERE, add, delete, remember, supersede, update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.memory_gate import Draft, Judgement
    from aos_context.memory_shelf import Shelf

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteMemoryStore]:
    with closing(SQLiteMemoryStore(tmp_path / "memory.sqlite")) as given:
        yield given


@pytest.fixture
def other(store: SQLiteMemoryStore) -> Iterator[SQLiteMemoryStore]:
    """As another process has it."""
    with closing(SQLiteMemoryStore(store.path)) as given:
        yield given


@contextmanager
def meanwhile(store: SQLiteMemoryStore, work: Callable[[], object]) -> Iterator[None]:
    """This is done between the two moments in which the store judges a proposal."""
    whole = store.transaction

    @contextmanager
    def first(*, writes: bool) -> Iterator[Shelf]:
        with whole(writes=writes) as shelf:
            yield shelf
        if not writes:
            work()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transaction", first)
        yield


def judged(store: SQLiteMemoryStore, mcrs: list[Document]) -> Judgement:
    """At one moment, without what was found before."""
    with store.transaction(writes=False) as shelf:
        return judge(mcrs, Proposer(**HERE), shelf, DEFAULT_CONFIG)


def text(draw: random.Random) -> str:
    return " ".join(draw.sample(WORDS, draw.randint(2, 4)))


def change(draw: random.Random, items: list[Document]) -> Document:
    """Of one that is active, or one more."""
    active = [item["id"] for item in items if item["status"] == "active"]
    makers = [
        lambda: add(text(draw), scope=draw.choice(["global", "task"])),
        lambda: update(draw.choice(active), confidence=draw.random()),
        lambda: supersede(draw.choice(active), f"{text(draw)} {draw.random()}"),
        lambda: delete(draw.choice(active)),
    ]
    return (draw.choice(makers) if active else makers[0])()


@pytest.mark.parametrize("changed_most", [0, 2, 500])
@pytest.mark.parametrize("seed", range(20))
def test_what_others_change_while_a_proposal_is_compared_counts_as_if_it_was_there_before(
    store: SQLiteMemoryStore, other: SQLiteMemoryStore, monkeypatch: pytest.MonkeyPatch, seed: int, changed_most: int
) -> None:
    monkeypatch.setattr(memory_compared, "CHANGED_MOST", changed_most)
    draw = random.Random(seed)
    remember(other, *[add(text(draw)) for _ in range(draw.randint(0, 30))], **HERE)
    mcrs = [add(text(draw)) for _ in range(4)]
    expected: list[Judgement] = []

    def work() -> None:
        for _ in range(draw.randint(1, 5)):
            remember(other, change(draw, other.items()), **HERE)
        expected.append(judged(other, mcrs))

    with meanwhile(store, work):
        proposed = store.propose(mcrs, HERE)
    [at_the_lock] = expected
    assert (proposed.conflicts, proposed.duplicates) == (at_the_lock.conflicts, at_the_lock.duplicates)
    assert [mcr["content"] for mcr in store.batch(proposed.batch_id).mcrs] == [
        one.mcr["content"] for one in at_the_lock.staged
    ]


def test_the_next_best_come_up_where_the_best_have_gone_meanwhile(
    store: SQLiteMemoryStore, other: SQLiteMemoryStore
) -> None:
    items = remember(other, *[add(f"alpha beta gamma {number}") for number in range(CONFLICTS_MOST + 5)])
    best = {one.memory_id for one in judged(other, [add("alpha beta gamma")]).conflicts}
    with meanwhile(store, lambda: remember(other, *[delete(item_id) for item_id in sorted(best)])):
        found = {one.memory_id for one in store.propose([add("alpha beta gamma")]).conflicts}
    assert found == {item["id"] for item in items} - best


def test_others_write_while_a_proposal_is_compared(
    store: SQLiteMemoryStore, other: SQLiteMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the lock held they would be refused as busy."""
    monkeypatch.setattr(memory_sqlite, "BUSY_TIMEOUT_S", 0.0)
    remember(store, add("alpha beta"))
    batch_id = other.propose([add("gamma delta")]).batch_id
    whole = memory_sqlite._Shelf.alike
    committed: list[Document] = []

    def comparing(shelf: memory_sqlite._Shelf, draft: Draft, least: float) -> Iterable[tuple[float, Document]]:
        committed.extend(other.commit(batch_id).items)
        return whole(shelf, draft, least)

    monkeypatch.setattr(memory_sqlite._Shelf, "alike", comparing)
    [conflict] = store.propose([add("gamma delta epsilon")]).conflicts
    assert [conflict.memory_id] == [item["id"] for item in committed]


def test_a_memory_that_was_committed_while_the_same_was_compared_is_told_as_a_duplicate(
    store: SQLiteMemoryStore, other: SQLiteMemoryStore
) -> None:
    made: list[Document] = []
    with meanwhile(store, lambda: made.extend(remember(other, add("alpha beta")))):
        proposed = store.propose([add("alpha  beta")])
    assert (proposed.staged, [one.memory_id for one in proposed.duplicates]) == (0, [made[0]["id"]])


def test_a_refused_proposal_takes_no_lock(store: SQLiteMemoryStore, other: SQLiteMemoryStore) -> None:
    with other.transaction(writes=True), pytest.raises(SchemaError):
        store.propose([{"op": "nothing"}])
