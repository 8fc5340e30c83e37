"""The memory in a file: what it survives, what it refuses, and that its searches are those of the plain rules."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest
from aos_context import memory_sqlite
from aos_context.config import Config
from aos_context.errors import BrokenError, BusyError, ConflictError, ContextError
from aos_context.memory import InMemoryMemoryStore
from aos_context.memory_sqlite import COUNTED_MOST, IDLE_MOST, SQLiteMemoryStore, neighbours, plan
from aos_context.memory_words import words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.context.memories import HERE, add, delete, found, remember, supersede, update
from tests.context.memory_writer import CHANGES
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.artifacts import Document

VOCABULARY = ["alpha", "beta", "gamma", "delta", "epsilon", "and", "AND", "near", "NOT", "the"]
KILLS = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "memory.v2.1.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteMemoryStore]:
    store = SQLiteMemoryStore(path)
    yield store
    store.close()


def writer(path: Path, batches: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.context.memory_writer", str(path), str(batches)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)


def test_a_batch_is_committed_whole_or_not_at_all_and_an_acknowledged_one_is_there_whenever_its_writer_is_killed(
    path: Path,
) -> None:
    done: set[str] = set()
    chance = random.Random(7)
    for _ in range(KILLS):
        process = writer(path, 1_000_000)
        assert process.stdout is not None
        left = chance.randint(1, 30)
        for line in process.stdout:
            what, batch_id = line.split()
            done |= {batch_id} if what == "done" else set()
            left -= 1
            if left == 0:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    store = SQLiteMemoryStore(path)
    committed = {item["batch_id"] for item in store.items()}
    assert done <= committed
    for batch_id in committed:
        assert store.batch(batch_id).state == "committed"
        items = store.items(batch_id=batch_id)
        assert len(items) == CHANGES
        assert all(item["content"] in found(store, item["content"]) for item in items)
    store.close()


@pytest.mark.parametrize("table", ["change", "item", "word", "batch", "proposal"])
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_commit_that_fails_at_any_write_leaves_memory_and_its_batch_as_they_were(
    store: SQLiteMemoryStore, table: str, writes: int
) -> None:
    one, two = remember(store, add("water is wet"), add("ice is cold"))
    batch_id = store.propose([add("fire is hot"), delete(one["id"]), update(two["id"], content="ice is hot")]).batch_id
    before = (store.items(), counted(store), [found(store, word) for word in ("fire", "water", "ice")])
    fail(store.path, table, writes)
    with pytest.raises(ContextError, match="no room"):
        store.commit(batch_id)
    assert store.batch(batch_id).state == "proposed"
    assert (store.items(), counted(store), [found(store, word) for word in ("fire", "water", "ice")]) == before
    heal(store.path)
    assert len(store.commit(batch_id).items) == 3
    assert [found(store, word) for word in ("fire", "water", "ice")] == [{"fire is hot"}, set(), {"ice is hot"}]


def fail(path: Path, table: str, writes: int) -> None:
    """The write after so many to a table fails; of `batch` and `proposal` a commit makes one or three."""
    left = {"batch": 0, "proposal": writes}.get(table, writes)
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE writes (n); INSERT INTO writes VALUES (0);")
    for event in ("INSERT", "UPDATE"):
        connection.execute(
            f"CREATE TRIGGER fail_{event} BEFORE {event} ON {table} BEGIN UPDATE writes SET n = n + 1; "
            f"SELECT RAISE(ROLLBACK, 'no room') FROM writes WHERE n > {left}; END"
        )
    connection.commit()
    connection.close()


def heal(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript("DROP TRIGGER fail_INSERT; DROP TRIGGER fail_UPDATE; DROP TABLE writes;")
    connection.close()


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    processes = [writer(path, 15) for _ in range(4)]
    acknowledged = [
        line.split()[1] for one in processes for line in one.communicate()[0].splitlines() if "done" in line
    ]
    assert [one.returncode for one in processes] == [0] * 4
    store = SQLiteMemoryStore(path)
    assert len(acknowledged) == 60
    assert {item["batch_id"] for item in store.items()} == set(acknowledged)
    assert len(store.items()) == 60 * CHANGES
    store.close()


def test_a_batch_that_many_threads_commit_is_committed_once(store: SQLiteMemoryStore) -> None:
    batch_id = store.propose([add("water is wet")]).batch_id
    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda number: store.commit(batch_id, committed_by=f"r{number}"), range(32)))
    assert sorted(result.already for result in results) == [False] + [True] * 31
    assert len({str(result.items) for result in results}) <= 2  # JSON's order of members, and that of making.
    assert all(result.items == results[0].items for result in results)


def test_of_many_threads_that_change_one_memory_one_does(store: SQLiteMemoryStore) -> None:
    [item] = remember(store, add("water is wet"))
    batches = [store.propose([supersede(item["id"], f"version {number}")]).batch_id for number in range(12)]

    def won(batch_id: str) -> bool:
        try:
            return len(store.commit(batch_id).items) == 2
        except ConflictError:
            return False

    with ThreadPoolExecutor(12) as threads:
        assert sum(threads.map(won, batches)) == 1
    assert len(store.items()) == 2


def test_memory_is_there_when_its_file_is_opened_again(store: SQLiteMemoryStore, path: Path) -> None:
    items = remember(store, add("water is wet", scope="run"), add("fire is hot"), **HERE)
    waiting = store.propose([delete(items[0]["id"])], HERE).batch_id
    store.close()
    again = SQLiteMemoryStore(path)
    assert again.items() == items
    assert found(again, "water", **HERE) == {"water is wet"}
    assert again.commit(waiting).items[0]["status"] == "deleted"
    again.close()


def test_every_connection_syncs_each_commit_to_the_disk(store: SQLiteMemoryStore) -> None:
    with ExitStack() as stack:
        for _ in range(IDLE_MOST + 1):
            shelf = stack.enter_context(store.transaction(writes=False))
            connection = shelf._connection  # type: ignore[attr-defined]
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_only_its_owner_may_read_the_file(store: SQLiteMemoryStore, path: Path) -> None:
    remember(store, add("water is wet"))
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}
    assert path.name in modes


FORKING = """
import os, sys
from pathlib import Path
from tests.context.conftest import OVERLAY
sys.path.insert(0, str(OVERLAY))
from aos_context.memory_sqlite import SQLiteMemoryStore
from tests.context.memories import add, remember
store = SQLiteMemoryStore(Path(sys.argv[1]))
remember(store, add("before"))
inherited = list(store._idle)
child = os.fork()
remember(store, add("child" if child == 0 else "parent"))
assert (store._idle == inherited) == (child != 0)
if child:
    assert os.waitpid(child, 0)[1] == 0
    remember(store, add("after"))
"""


def test_a_child_process_by_fork_uses_connections_of_its_own(path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKING, str(path)], check=True, cwd=REPO)
    store = SQLiteMemoryStore(path)
    assert found(store, "") == {"before", "child", "parent", "after"}
    store.close()


def other_program(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE item (n)")
    connection.commit()
    connection.close()


def newer_schema(path: Path) -> None:
    SQLiteMemoryStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def notes(path: Path) -> None:
    path.write_text("what to buy\n" * 100)


def test_a_file_of_another_program_or_of_a_newer_one_is_refused_and_left_as_it_is(path: Path) -> None:
    for number, make in enumerate([other_program, newer_schema, notes]):
        file = path.parent / f"{number}.sqlite"
        file.parent.mkdir(exist_ok=True)
        make(file)
        before = (file.read_bytes(), file.stat().st_mtime_ns)
        with pytest.raises(BrokenError, match=r"no memory of this program|schema 99"):
            SQLiteMemoryStore(file)
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_to_open_a_store_again_does_not_take_the_locks_of_one_that_is_writing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_sqlite, "BUSY_TIMEOUT_S", 0.01)
    first = SQLiteMemoryStore(path)
    with first.transaction(writes=True):
        SQLiteMemoryStore(path).close()
        with pytest.raises(subprocess.CalledProcessError) as refused:
            subprocess.run([sys.executable, "-c", VACUUM, str(path)], check=True, capture_output=True, text=True)
    assert "locked" in refused.value.stderr
    first.close()


VACUUM = """
import sqlite3, sys
sqlite3.connect(sys.argv[1], timeout=0).execute("PRAGMA journal_mode = DELETE")
"""


def test_an_empty_file_becomes_a_memory(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    store = SQLiteMemoryStore(path)
    assert len(remember(store, add("water is wet"))) == 1
    store.close()


def test_a_damaged_file_is_broken_and_says_which(path: Path) -> None:
    store = SQLiteMemoryStore(path)
    remember(store, *[add(f"{number} {'x' * 500}") for number in range(50)])
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(BrokenError, match=r"memory\.v2\.1\.sqlite"):
        read_all(path)


def read_all(path: Path) -> None:
    store = SQLiteMemoryStore(path)
    try:
        store.items()
    finally:
        store.close()


def test_a_document_that_was_changed_in_the_file_is_broken(store: SQLiteMemoryStore, path: Path) -> None:
    remember(store, add("water is wet"))
    connection = sqlite3.connect(path)
    connection.execute("UPDATE change SET document = CAST(replace(document, 'active', 'amused') AS BLOB)")
    connection.commit()
    connection.close()
    for read in (store.items, lambda: store.search("water")):
        with pytest.raises(BrokenError, match=r"\$\.status"):
            read()


def test_a_writer_that_holds_the_file_for_too_long_makes_others_busy(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_sqlite, "BUSY_TIMEOUT_S", 0.01)
    store = SQLiteMemoryStore(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(BusyError, match="written by others"):
        store.propose([add("water is wet")])
    assert store.search("water") == []
    holder.execute("ROLLBACK")
    holder.close()
    assert store.propose([add("water is wet")]).staged == 1
    store.close()


def test_nothing_is_asked_of_a_closed_store(path: Path) -> None:
    store = SQLiteMemoryStore(path)
    store.close()
    with pytest.raises(ContextError, match="was closed"):
        store.search("water")


SOUP = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=8).map(" ".join)
CHANGE = st.tuples(st.sampled_from(["add", "add", "add", "update", "supersede", "delete"]), SOUP, st.integers(0, 30))


def change(op: str, content: str, items: list[Document], turn: int) -> Document:
    active = [item for item in items if item["status"] == "active"]
    if op == "add" or not active:
        return add(content, scope=("global", "task", "run")[turn % 3])
    target = active[turn % len(active)]["id"]
    return {"update": update(target, content=content), "delete": delete(target)}.get(op, supersede(target, content))


def history(store: InMemoryMemoryStore | SQLiteMemoryStore, steps: list[tuple[str, str, int]]) -> list[tuple[Any, ...]]:
    """What was told of each step, and how many memories it changed."""
    made: list[tuple[Any, ...]] = []
    for op, content, turn in steps:
        proposed = store.propose([change(op, content, store.items(), turn)], HERE)
        told = (proposed.staged, len(proposed.duplicates), [one.reason for one in proposed.conflicts])
        try:
            made.append((*told, len(store.commit(proposed.batch_id).items)))
        except ConflictError:
            made.append((*told, None))
    return made


def ranked(store: InMemoryMemoryStore | SQLiteMemoryStore, query: str, **filters: Any) -> list[tuple[float, str, int]]:
    """Scores to nine digits: the two sum up in another order."""
    order = {item["id"]: place for place, item in enumerate(store.items())}
    hits = store.search(query, filters, 100)
    return sorted((-round(hit.score, 9), hit.item["content"], order[hit.item["id"]]) for hit in hits)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CHANGE, max_size=12), SOUP, st.sampled_from(["active", "superseded", "deleted", "any"]))
def test_after_any_history_a_search_finds_and_scores_what_the_store_in_memory_does(
    tmp_path: Path, steps: list[tuple[str, str, int]], query: str, status: str
) -> None:
    plain, durable = InMemoryMemoryStore(), SQLiteMemoryStore(tmp_path / os.urandom(8).hex())
    assert history(durable, steps) == history(plain, steps)
    for filters in ({}, HERE, {"scope": "task", "task_id": "t1"}):
        assert ranked(durable, query, status=status, **filters) == ranked(plain, query, status=status, **filters)
    assert counted(durable) == {
        word: sum(word in words(item["content"]) for item in plain.items()) for word in counted(durable)
    }
    durable.close()


def counted(store: SQLiteMemoryStore) -> dict[str, int]:
    connection = sqlite3.connect(store.path)
    try:
        return dict(connection.execute("SELECT word, memories FROM word"))
    finally:
        connection.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text() | st.text(alphabet="\"*^:(){}[]+-,.ANDORTeasl wt'") | st.lists(st.text()).map(" OR ".join))
def test_every_query_is_words_and_never_syntax(store: SQLiteMemoryStore, query: str) -> None:
    if not store.items():
        remember(store, add("tea and toast"), add("OR near NOT words labels"), add("salt", type="decision"))
    expected = {
        item["content"]
        for item in store.items()
        if not query.strip() or not set(words(query)).isdisjoint(words(item["content"]))
    }
    assert found(store, query) == expected


@pytest.mark.parametrize(
    "query",
    ["labels:ag", 'words : "tea"', "tea NOT toast", "t*", "NEAR(tea toast, 0)", '"', "^tea", "{words labels}: ag"],
)
def test_what_fts5_would_take_for_syntax_is_looked_up_as_words(store: SQLiteMemoryStore, query: str) -> None:
    remember(store, add("tea and toast"), add("coffee"))
    asked = set(words(query))
    assert found(store, query) == ({"tea and toast"} if asked & {"tea", "toast"} else set())


def test_a_plan_lets_rare_words_choose_and_common_ones_weigh_in() -> None:
    assert plan({}, 10) == []
    assert plan({"rare": 3, "few": 7}, 10) == [('"rare" OR "few"', 1)]
    [(expression, weight)] = plan({"rare": 3, "few": 7, "most": 900}, 10)
    assert expression == '("rare" OR "few") AND ("rare" OR "few" OR "most" OR "most")'
    assert weight == 2
    assert plan({"many": 500, "most": 900}, 10) == [('"many" AND "most"', 1), ('"many" OR "most"', 1)]
    assert plan({"most": 900}, 10) == [('"most"', 1)]
    assert plan({"most": 900, "all": COUNTED_MOST}, 10) == [('"most"', 1)]
    assert plan({"all": COUNTED_MOST + 1}, 10) == [('"all"', 1)]


def test_what_is_alike_shares_a_rare_word_or_all_the_common_ones() -> None:
    assert neighbours({}, 10) == []
    assert neighbours({"rare": 3, "few": 7}, 10) == ['"rare" OR "few"']
    assert neighbours({"rare": 3, "many": 500, "most": 900}, 10) == ['"rare"', '"many" AND "most"']


def test_among_many_a_memory_that_says_the_same_with_another_value_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_sqlite, "COMPARED_MOST", 4)
    store = SQLiteMemoryStore(path)
    for number in range(10):
        remember(store, add(f"filler{number} user prefers"), add(f"language over padding{number}"))
    [item, _, kept] = remember(
        store, add("the user prefers Cobol over any language"), add("Cobol"), add("nothing like it")
    )
    for content, reason in (("Fortran", "(0.75)"), ("Cobol not", "(0.88)")):
        conflicts = store.propose([add(f"the user prefers {content} over any language")]).conflicts
        assert [conflict.memory_id for conflict in conflicts] == [item["id"]]
        assert reason in conflicts[0].reason
    assert store.propose([update(kept["id"], content="nothing like it at all")]).conflicts == ()
    store.close()


def test_beyond_the_candidates_memories_with_a_rare_word_are_scored_as_they_are_below(path: Path) -> None:
    stores = [SQLiteMemoryStore(path.with_name(f"{most}"), Config(search_candidates=most)) for most in (5, 5_000)]
    contents = [f"common filler{number}" for number in range(20)] + ["rare common", "rare thing", "rare common common"]
    for store in stores:
        remember(store, *[add(content) for content in contents])
    pruned, exact = ([(hit.item["content"], hit.score) for hit in one.search("rare common")] for one in stores)
    assert [content for content, _ in pruned] == [content for content, _ in exact[:3]]
    assert all(math.isclose(one[1], other[1]) for one, other in zip(pruned, exact, strict=False))
    for store in stores:
        store.close()


def test_where_all_words_are_common_those_with_all_of_them_come_first_and_then_the_newest(path: Path) -> None:
    store = SQLiteMemoryStore(path, Config(search_candidates=4))
    both = [f"hot water {number}" for number in range(3)]
    remember(store, *[add(content) for content in both])
    remember(store, *[add(f"{word} {number}") for number in range(10) for word in ("hot", "water")])
    assert {hit.item["content"] for hit in store.search("water hot", {}, 3)} == set(both)
    assert {hit.item["content"] for hit in store.search("water hot", {}, 4)} == {
        f"{word} {number}" for number in (8, 9) for word in ("hot", "water")
    }
    store.close()


def test_a_memory_of_few_is_found_among_many_that_others_have(path: Path) -> None:
    store = SQLiteMemoryStore(path, Config(search_candidates=4))
    remember(store, add("common own", scope="run"), run_id="r1")
    for run in range(10):
        remember(store, add(f"common {run}", scope="run"), run_id=f"other{run}")
    assert found(store, "common", run_id="r1") == {"common own"}
    store.close()


def test_a_file_of_the_first_program_of_this_schema_gets_what_followers_need(tmp_path: Path) -> None:
    path = tmp_path / "memory.sqlite"
    with closing(SQLiteMemoryStore(path)) as store:
        remember(store, add("alpha one"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE follower")
    with closing(SQLiteMemoryStore(path)) as store:
        [change] = store.changed(0, 10)
        assert store.followed("somebody") == 0
        store.follow("somebody", change.number)
    with closing(SQLiteMemoryStore(path)) as store:
        assert (store.followed("somebody"), store.followed("nobody")) == (change.number, 0)


def test_changes_are_numbered_in_the_order_of_their_commits(tmp_path: Path) -> None:
    for store in (SQLiteMemoryStore(tmp_path / "memory.sqlite"), InMemoryMemoryStore()):
        with closing(store):
            [one, two] = remember(store, add("alpha one"), add("beta two"))
            remember(store, update(one["id"], content="gamma three"))
            changes = store.changed(0, 10)
            assert [change.item_id for change in changes] == [one["id"], two["id"], one["id"]]
            assert store.changed(changes[0].number, 1) == [changes[1]]
            assert store.changed(changes[-1].number, 10) == []


@pytest.mark.parametrize("here", [{"scope": "global"}, {"scope": "task"}, {"scope": "run"}])
def test_what_is_alike_is_found_behind_however_many_of_another_type_or_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: dict[str, str]
) -> None:
    monkeypatch.setattr(memory_sqlite, "COMPARED_MOST", 3)
    others = [{"scope": scope, "type": kind} for scope in ("global", "task", "run") for kind in ("fact", "decision")]
    with closing(SQLiteMemoryStore(tmp_path / "memory.sqlite")) as store:
        [item] = remember(store, add("alpha beta gamma", **here), **HERE)
        for other in others:
            if other != {"type": "fact", **here}:
                remember(store, *[add(f"alpha beta gamma {number}", **other) for number in range(4)], **HERE)
        found = store.propose([add("alpha beta gamma delta", **here)], HERE).conflicts
        assert [one.memory_id for one in found] == [item["id"]]
