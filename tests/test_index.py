"""The index of the ledger: it finds what reading all lines finds, and where it is wrong or not there, they are read."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import index as index_module
from bus import index_file, index_view, proofs, provenance, segments
from bus.index import Index
from bus.index_view import Filter
from bus.merkle import Subtree, root_of
from bus.proofs import Prover
from bus.provenance import iter_lines, raw_lines, read_line, tail
from bus.records import BrokenLineError, parse_or_none
from bus.segments import Segments, closed_path, compress
from tests.ledgers import append, call, iter_hashes, opened, synthesize, write

if TYPE_CHECKING:
    from collections.abc import Iterator

NARROWED: list[dict[str, Any]] = [
    {"overlay": "a"},
    {"overlay": "nobody"},
    {"phase": "CLEAR", "ok": True},
    {"code": "ERR_TIMEOUT"},
    {"caller": "ann", "since_ms": 1100},
    {"until_ms": 1050},
    {"since_ms": 1010, "until_ms": 1020, "ok": False},
    {"types": ("denied", "replay")},
    {"among": ("a",)},
    {"among": ("[ab]", "x"), "ok": False},
    {"among": ("é*",), "overlay": "a"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, batches and tiles so small that a short log has many, and an index is worth it."""
    for name, value in {"WORTH_BYTES": 0, "BATCH_LINES": 37}.items():
        monkeypatch.setattr(index_module, name, value)
    sizes = {"BLOCK_LINES": 16, "_BLOCKS_AT_ONCE": 3, "EVERY": 4, "_KEPT": 2, "TILE_LEVELS": 2, "TILE": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(index_view, name, value)
    monkeypatch.setattr(segments, "MEMBER_BYTES", 3000)


def records(count: int) -> Iterator[dict[str, Any]]:
    """Calls of all sorts, not quite in the order of their times."""
    for number in range(count):
        ok = number % 3 > 0
        yield call(
            str(number),
            type=("invoke", "invoke", "replay", "denied")[number % 4],
            overlay=(None, "a", "b", "é\x00'")[number % 4],
            phase=("OPEN", "CLEAR", None)[number % 3],
            ok=ok,
            code="OK" if ok else ("ERR_TIMEOUT", "ERR_CRASH")[number % 2],
            caller=("ann", None, "bob")[number // 7 % 3],
            timestamp_ms=1000 + number - 5 * (number % 2),
            error="x" * (number % 90),
        )


def slowly(path: Path, limit: int, **narrowed: Any) -> list[dict[str, Any]]:
    """What a tail is, by all lines."""
    wanted = Filter(**narrowed)
    return [record for record in iter_lines(path) if wanted.fits(record)][-limit:]


def seqs(found: list[dict[str, Any]]) -> list[int]:
    return [record["seq"] for record in found]


@pytest.mark.parametrize("packed", [False, True])
def test_every_line_is_found_by_its_number(path: Path, packed: bool) -> None:
    count = synthesize(path, records(200), segment_lines=45)
    if packed:
        compress(path)
    assert Index(path).refresh() == count
    lines = list(raw_lines(path))
    with Index(path).reading() as view:
        assert view is not None
        assert view.size == count
        assert [view.line(seq) for seq in range(1, count + 1)] == lines
        assert [list(view.lines(seq, 9)) for seq in (1, 40, 88)] == [lines[s - 1 : s + 8] for s in (1, 40, 88)]
    assert read_line(path, 120)["seq"] == 120


def test_an_index_outlives_the_compression_of_its_segments(path: Path) -> None:
    synthesize(path, records(100), segment_lines=30)
    Index(path).refresh()
    before = path.with_suffix(".index").stat().st_ino
    compress(path)
    with Index(path).reading() as view:
        assert view is not None
        assert [view.line(seq) for seq in range(1, 101)] == list(raw_lines(path))
    Index(path).refresh()
    assert path.with_suffix(".index").stat().st_ino == before


@pytest.mark.parametrize("narrowed", NARROWED)
@pytest.mark.parametrize("held", [0, 37, 200])
def test_a_narrowed_tail_is_what_reading_all_lines_finds(
    path: Path, narrowed: dict[str, Any], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(path, records(200), segment_lines=45)
    compress(path)
    Index(path).refresh(most_lines=held)
    monkeypatch.setattr(provenance, "CAUGHT_UP_LINES", 0)
    for limit in (1, 7, 1000):
        assert tail(path, limit, **narrowed) == slowly(path, limit, **narrowed)
    assert (
        seqs(tail(path, 3, **narrowed, shown=lambda record: record["seq"] < 90))
        == [seq for seq in seqs(slowly(path, 1000, **narrowed)) if seq < 90][-3:]
    )


@pytest.mark.parametrize("among", [("seldom",), ("sel*", "never-?")])
def test_lines_of_a_seldom_used_overlay_are_found_without_reading_those_of_others(
    path: Path, among: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["often"] * 200
    names[20] = names[90] = "seldom"
    synthesize(path, (call(str(number), overlay=name) for number, name in enumerate(names)), segment_lines=45)
    Index(path).refresh()
    parsed: list[bytes] = []
    real = parse_or_none

    def noting(line: bytes) -> dict[str, Any] | None:
        parsed.append(line)
        return real(line)

    monkeypatch.setattr(provenance, "parse_or_none", noting)
    assert seqs(tail(path, 100, among=among)) == [21, 91]
    assert len(parsed) < 10


def test_a_tail_reads_no_more_bytes_than_it_may_of_what_the_index_lacks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(path, records(200), segment_lines=45)
    most = sum(map(len, list(raw_lines(path))[-10:]))
    assert seqs(tail(path, 200, types=("invoke", "replay", "denied"), most_bytes=most))[0] == 1
    Index(path).drop()
    Index(path).refresh(most_lines=100)
    monkeypatch.setattr(provenance, "CAUGHT_UP_LINES", 0)
    behind = sum(map(len, list(raw_lines(path))[100:]))
    some: dict[str, Any] = {"types": ("invoke", "replay", "denied")}
    assert seqs(tail(path, 200, **some, most_bytes=most)) == list(range(191, 201))
    assert seqs(tail(path, 200, **some, most_bytes=behind + 1)) == list(range(1, 201))
    Index(path).drop()
    assert seqs(tail(path, 200, **some, most_bytes=most)) == list(range(191, 201))
    assert seqs(tail(path, 200, **some, most_lines=7)) == list(range(194, 201))


calls: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    overlay=st.sampled_from([None, "a", "b", "", "c" * 300, "c" * 299 + "d"]),
    phase=st.sampled_from(["OPEN", "SEAL", None]),
    ok=st.booleans(),
    code=st.sampled_from(["OK", "ERR_TIMEOUT"]),
    caller=st.sampled_from([None, "ann", "bob"]),
    timestamp_ms=st.integers(0, 30),
    type=st.sampled_from(["invoke", "denied", "replay"]),
)
narrowings = st.fixed_dictionaries(
    {},
    optional={
        "overlay": st.sampled_from(["a", "", "c" * 300, "nobody"]),
        "phase": st.sampled_from(["OPEN", "SEAL"]),
        "ok": st.booleans(),
        "code": st.sampled_from(["OK", "ERR_TIMEOUT"]),
        "caller": st.sampled_from(["ann", "bob"]),
        "since_ms": st.integers(0, 30),
        "until_ms": st.integers(0, 30),
        "types": st.sampled_from([("invoke",), ("denied", "replay"), ()]),
        "among": st.sampled_from([(), ("a",), ("a", "b"), ("[ab]",), ("c*d",), ("nobody",)]),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    log=st.lists(calls, max_size=60),
    lines=st.integers(1, 40),
    batches=st.lists(st.integers(1, 30), max_size=3),
    narrowed=narrowings,
    limit=st.integers(1, 70),
    packed=st.booleans(),
)
def test_an_index_agrees_with_a_slow_reader_whatever_the_log_and_the_question(
    *,
    log: list[dict[str, Any]],
    lines: int,
    batches: list[int],
    narrowed: dict[str, Any],
    limit: int,
    packed: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "provenance.jsonl"
        synthesize(path, (call(str(number), **members) for number, members in enumerate(log)), lines)
        for most in batches:
            Index(path).refresh(most_lines=most)
        if packed:
            compress(path)
        assert tail(path, limit, **narrowed) == slowly(path, limit, **narrowed)
        assert Index(path).refresh() == len(log)
        with Index(path).reading() as view:
            assert (view.size if view else 0) == len(log)
            if view:
                assert seqs(slowly(path, 1000, **narrowed)) == [
                    seq
                    for seq in reversed(list(view.newest(Filter(**narrowed))))
                    if Filter(**narrowed).fits(read_line(path, seq))
                ]


# --- The tree ---


def test_the_hash_of_every_perfect_subtree_is_that_of_its_leaves(path: Path) -> None:
    synthesize(path, records(150), segment_lines=40)
    compress(path)
    for most in (3, 50, 60, 1000):
        Index(path).refresh(most_lines=most)
    leaves = list(iter_hashes(path))
    with Index(path).reading() as view:
        assert view is not None
        for level in range(8):
            for number in range(150 >> level):
                part = Subtree(level, number)
                assert view.hash_of(part) == root_of(leaves[number << level : number + 1 << level]), part
            with pytest.raises(ValueError, match="150 lines"):
                view.hash_of(Subtree(level, 150 >> level))


@pytest.mark.parametrize("held", [0, 64, 90, 150])
def test_proofs_are_the_same_with_an_index_and_without(path: Path, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(path, records(150), segment_lines=40)
    Index(path).refresh(most_lines=held)
    monkeypatch.setattr(Index, "refresh", lambda *_, **__: 0)
    with monkeypatch.context() as without:
        without.setattr(proofs, "index_of", lambda _: None)
        slow = Prover(path)
    with Prover(path) as quick:
        assert quick.size == slow.size == 150
        for size in (1, 63, 64, 65, 100, 150):
            for seq in {1, size // 2 + 1, size}:
                assert quick.inclusion(seq, size) == slow.inclusion(seq, size)
            assert quick.consistency(size // 3, size) == slow.consistency(size // 3, size)
        assert quick.checkpoint() == slow.checkpoint()


def test_a_proof_is_made_though_the_index_lacks_what_it_should_hold(path: Path) -> None:
    synthesize(path, records(150), segment_lines=40)
    Index(path).refresh()
    with Prover(path) as prover:
        right = prover.inclusion(3)
    alter(path, "DELETE FROM tiles")
    with Prover(path) as prover:
        assert prover.inclusion(3) == right


WRONG = [
    "UPDATE tiles SET hashes = zeroblob(length(hashes))",
    "UPDATE tiles SET hashes = zeroblob(length(hashes)) WHERE level = 2 AND n = 3",
    "UPDATE tiles SET hashes = zeroblob(length(hashes)) WHERE level = 4",
    "UPDATE tiles SET hashes = 'text'",
    "UPDATE places SET place = -1",
    "UPDATE places SET place = 'text'",
    "UPDATE state SET seq = seq - 7",
    "UPDATE state SET hash = 'text'",
    "DELETE FROM state",
    "DELETE FROM places",
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_wrong_index_leads_to_no_wrong_proof(
    path: Path, wrong: str, refreshed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(path, records(150), segment_lines=40)
    Index(path).refresh(most_lines=140)
    leaves = list(iter_hashes(path))
    alter(path, wrong)
    if not refreshed:
        monkeypatch.setattr(Index, "refresh", lambda *_, **__: 0)
    for size in (1, 14, 63, 100, 150):
        with Prover(path) as prover:
            root = root_of(leaves[:size]).hex()
            assert prover.inclusion(1, size).root == root
            assert prover.inclusion(size, size).hash == leaves[size - 1].hex()
            assert prover.consistency(size // 3, size).new_root == root
            checkpoint = prover.checkpoint()
            assert (checkpoint.tree_size, checkpoint.root) == (150, root_of(leaves).hex())


def test_an_index_whose_tree_is_not_that_of_the_log_is_dropped(path: Path) -> None:
    synthesize(path, records(150), segment_lines=40)
    Index(path).refresh()
    alter(path, WRONG[0])
    with Prover(path) as prover:
        assert not Index(path).exists()
        assert prover.checkpoint().root == root_of(iter_hashes(path)).hex()


def test_an_index_whose_places_are_wrong_is_dropped_where_the_log_reads_well(path: Path) -> None:
    synthesize(path, records(150), segment_lines=40)
    Index(path).refresh()
    alter(path, "UPDATE places SET place = 100000000")
    with Prover(path) as prover:
        assert prover.inclusion(3).root == root_of(iter_hashes(path)).hex()
        assert not Index(path).exists()


def test_an_index_is_kept_where_it_is_a_checkpoint_of_the_log_that_is_wrong(path: Path) -> None:
    with opened(path, segment_bytes=5000) as ledger:
        for number in range(30):
            append(ledger, call(str(number)))
    Index(path).refresh()
    path.write_bytes(path.read_bytes().replace(b'"nodes":["', b'"nodes":["00'))
    with pytest.raises(BrokenLineError) as caught:
        Prover(path)
    assert caught.value.fault == "hash"
    assert Index(path).exists()


def test_an_index_that_names_another_number_than_its_last_line_is_not_of_the_log(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh(most_lines=50)
    alter(path, "UPDATE state SET seq = seq - 7")
    assert held(path) == 0
    assert Index(path).refresh() == held(path) == 60


def test_a_prover_reads_back_to_the_last_checkpoint_and_no_further(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path, segment_bytes=5000) as ledger:
        for number in range(60):
            append(ledger, call(str(number)))
    Index(path).refresh()
    read: list[bytes] = []
    backwards = Segments.backwards

    def noted(log: Segments) -> Iterator[bytes]:
        for line in backwards(log):
            read.append(line)
            yield line

    monkeypatch.setattr(Segments, "backwards", noted)
    with Prover(path) as prover:
        assert prover.checkpoint().root == root_of(iter_hashes(path)).hex()
    assert 0 < len(read) < 15
    assert b'"type":"checkpoint"' in read[-1]


def test_a_prover_that_cannot_be_made_lets_go_of_the_index(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    with path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(BrokenLineError) as caught:
        Prover(path)
    Index(path).drop()
    assert caught.value.fault == "hash"
    assert not Index(path).exists()


def test_a_prover_has_the_index_take_in_no_more_lines_than_it_is_told_to(path: Path) -> None:
    synthesize(path, records(150), segment_lines=40)
    with Prover(path, most_lines=50) as prover:
        assert prover.checkpoint().root == root_of(iter_hashes(path)).hex()
    assert held(path) == 50


def test_a_prover_keeps_little_more_than_the_hashes_of_lines_that_no_index_holds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = synthesize(path, (call() for _ in range(5000)), segment_lines=1000)
    monkeypatch.setattr(proofs, "index_of", lambda _: None)
    tracemalloc.start()
    try:
        with Prover(path) as prover:
            assert prover.size == count
            assert tracemalloc.get_traced_memory()[0] < 48 * count
    finally:
        tracemalloc.stop()


MISNAMED = [
    "UPDATE runs SET lines = 'text'",
    "UPDATE runs SET lines = x'000000'",
    "UPDATE runs SET lines = zeroblob(2000000)",
    "UPDATE runs SET lines = zeroblob(length(lines))",
    "UPDATE runs SET lines = replace(lines, x'0100', x'ffff') WHERE typeof(lines) = 'blob'",
    "DELETE FROM runs",
    "DELETE FROM runs WHERE block > 1",
    "DELETE FROM runs WHERE block = 0",
    "DELETE FROM kinds WHERE ok = 'True'",
    "UPDATE runs SET lines = x'' WHERE block = 2",
    "UPDATE runs SET block = block + 100 WHERE block = 1",
]


@pytest.mark.parametrize("wrong", MISNAMED)
def test_an_index_that_does_not_name_every_line_once_is_done_without_and_dropped(path: Path, wrong: str) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    alter(path, wrong)
    assert seqs(tail(path, 100, ok=True)) == seqs(slowly(path, 100, ok=True))
    assert not Index(path).exists()


ENDLESS = (
    "ALTER TABLE runs RENAME TO others",
    """CREATE VIEW runs AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)
       SELECT kind, block, oldest, newest, lines FROM others, c WHERE x < 0""",
)


@pytest.mark.parametrize(
    "statements",
    [
        ENDLESS,
        ("CREATE TRIGGER t AFTER UPDATE ON state BEGIN DELETE FROM runs; END",),
        ("CREATE INDEX i ON runs (block)",),
        ("ALTER TABLE kinds ADD COLUMN more GENERATED ALWAYS AS (zeroblob(1000000000))",),
        ("DROP TABLE tiles",),
        ("ALTER TABLE places RENAME COLUMN place TO here",),
    ],
)
def test_an_index_with_another_schema_is_not_asked_and_is_built_anew(path: Path, statements: tuple[str, ...]) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh(most_lines=50)
    for statement in statements:
        alter(path, statement)
    assert held(path) == 0
    assert seqs(tail(path, 100, ok=True)) == seqs(slowly(path, 100, ok=True))
    assert Index(path).refresh() == held(path) == 60


def test_a_statement_that_takes_too_much_is_ended_and_the_index_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    with contextlib.closing(index_file.opened(path.with_suffix(".index"))) as base:
        assert index_file.is_ours(base)
        with pytest.raises(sqlite3.OperationalError, match="interrupted") as ended:
            base.execute("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c WHERE x < 0")
        assert index_file.is_malformed(ended.value)
        assert base.execute("SELECT seq FROM state").fetchone() == (60,)
    monkeypatch.setattr(index_file, "MOST_STEPS", 0)
    monkeypatch.setattr(index_file, "_STEPS_AT_ONCE", 20)
    monkeypatch.setattr(Index, "refresh", lambda *_, **__: 0)
    assert seqs(tail(path, 100, ok=True)) == seqs(slowly(path, 100, ok=True))


def test_an_index_that_a_killed_writer_left_unfinished_is_not_believed_and_no_journal_played_back(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    journal = path.with_name("provenance.index-journal")
    journal.write_bytes(b"anything")
    assert held(path) == 0
    assert Index(path).refresh() == held(path) == 60
    assert not journal.exists()


def test_who_reads_an_index_writes_nothing(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    base = index_file.opened(path.with_suffix(".index"))
    with contextlib.closing(base), pytest.raises(sqlite3.OperationalError, match="readonly"):
        base.execute("DELETE FROM runs")


# --- When it does not fit ---


def alter(path: Path, statement: str) -> None:
    """Change the index as somebody else might."""
    with contextlib.closing(sqlite3.connect(path.with_suffix(".index"))) as base:
        base.execute(statement)
        base.commit()


def held(path: Path) -> int:
    """How many lines an index holds that fits the log; 0 without one."""
    with Index(path).reading() as view:
        return view.size if view else 0


def test_new_lines_are_taken_in_and_no_others(path: Path) -> None:
    with opened(path, segment_bytes=5000) as ledger:
        for number in range(30):
            append(ledger, call(str(number)))
            assert Index(path).refresh() == sum(1 for _ in raw_lines(path))
    seen: list[int] = []
    write(path, *(call() for _ in range(80)), segment_bytes=5000)
    before, count = held(path), sum(1 for _ in raw_lines(path))
    assert Index(path).refresh(seen.append) == count
    assert seen == [before + 37, before + 74, count]


def test_an_index_of_a_log_that_was_cut_back_is_built_anew(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert held(path) == 0
    assert seqs(tail(path, 3, ok=True)) == seqs(slowly(path, 3, ok=True))
    assert Index(path).refresh() == 59


def test_an_index_of_another_chain_is_built_anew(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    synthesize(path, (call(str(number), overlay="a") for number in range(60)), segment_lines=25)
    assert held(path) == 0
    assert Index(path).refresh() == 60
    assert seqs(tail(path, 100, overlay="a")) == list(range(1, 61))


def test_an_index_whose_places_are_wrong_is_not_believed(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    first = closed_path(path, 1)
    first.write_bytes(first.read_bytes().replace(b'"request_id":"1"', b'"request_id":"10000"', 1))
    assert held(path) == 60
    assert read_line(path, 20)["seq"] == 20
    assert seqs(tail(path, 100, ok=True)) == seqs(slowly(path, 100, ok=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: os.urandom(len(whole)),
        lambda whole: whole[:100] + os.urandom(len(whole) - 100),
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-5000] + os.urandom(5000),
        lambda whole: b"SQLite format 3\x00" + bytes(5000),
    ],
)
def test_a_damaged_index_is_done_without_and_heals(path: Path, damage: Any) -> None:
    synthesize(path, records(200), segment_lines=45)
    Index(path).refresh()
    file = path.with_suffix(".index")
    file.write_bytes(damage(file.read_bytes()))
    for narrowed in NARROWED:
        assert tail(path, 1000, **narrowed) == slowly(path, 1000, **narrowed)
    assert [read_line(path, seq)["seq"] for seq in (1, 77, 200)] == [1, 77, 200]
    Index(path).drop()
    assert Index(path).refresh() == 200


def test_an_index_of_another_form_is_built_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh()
    monkeypatch.setattr(index_file, "SCHEMA", 99)
    assert held(path) == 0
    assert Index(path).refresh() == held(path) == 60


def test_where_no_index_can_be_written_all_is_read_as_without_one(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    path.with_suffix(".index").mkdir()
    assert Index(path).refresh() == held(path) == 0
    assert seqs(tail(path, 100, ok=True)) == seqs(slowly(path, 100, ok=True))
    assert read_line(path, 3)["seq"] == 3


def test_the_index_stops_at_a_line_that_is_no_record_and_the_tail_does_not(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"{}\n", *lines[5:]]))
    assert Index(path).refresh() == 54
    assert seqs(tail(path, 1000, ok=True)) == [n + 1 for n in range(60) if n % 3 and n != 54]


def test_a_log_that_is_small_gets_no_index(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "WORTH_BYTES", 1 << 20)
    write(path, call())
    assert seqs(tail(path, 1, ok=True)) == [1]
    assert not path.with_suffix(".index").exists()


def test_an_index_is_no_more_open_to_others_than_the_log(path: Path) -> None:
    write(path, call())
    Index(path).refresh()
    assert path.with_suffix(".index").stat().st_mode & 0o777 == 0o640


def test_one_process_takes_lines_in_at_a_time_and_none_while_others_read(path: Path) -> None:
    synthesize(path, records(60), segment_lines=25)
    Index(path).refresh(most_lines=30)
    with Index(path).reading() as view:
        assert view is not None
        assert Index(path).refresh() == 0
        Index(path).drop()
        assert view.line(3)
    assert Index(path).refresh() == 60
