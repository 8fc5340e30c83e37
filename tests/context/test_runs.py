"""A folder of runs: the rule of the two keys, one event for each change, and milestones that a crash cuts off."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from aos_context import ledger as ledger_module
from aos_context import resume_pack
from aos_context import runs as runs_module
from aos_context.artifacts import sha256, to_json
from aos_context.episode import EpisodeStore
from aos_context.errors import (
    BrokenError,
    BusyError,
    ExistsError,
    ForbiddenError,
    GateError,
    NotFoundError,
    PackError,
    SchemaError,
    StaleError,
)
from aos_context.layout import DATABASE, EPISODES, LEDGER, PENDING_MEMORY, WORKING_SET
from aos_context.ledger import FileLedger
from aos_context.memory import InMemoryMemoryStore
from aos_context.memory_sqlite import SQLiteMemoryStore
from aos_context.runs import Runs
from aos_context.ws_file import Version, WorkingSetFile

from tests.context.served import FACT, a_patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.memory import Batch, CommitResult, Hit, ProposeResult
    from aos_context.run import Run

    Cutting = Callable[[pytest.MonkeyPatch], None]

BUS = "0198c0de-0000-7000-8000-000000000001"


class Cut(BaseException):
    """The process ends here."""


@contextmanager
def opened(root: Path, *, testing: bool = False) -> Iterator[Runs]:
    root.mkdir(exist_ok=True)
    with closing(SQLiteMemoryStore(root / DATABASE)) as memory:
        yield Runs(root, memory=memory, testing=testing)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    with opened(tmp_path / "runs") as given:
        yield given


def booted(runs: Runs, **members: Any) -> Run:
    return runs.open(runs.boot("Move the invoices.", **members)["run_id"])


def types(run: Run) -> list[str]:
    return [event["event_type"] for event in run.events(limit=1_000)]


def proposed(run: Run, content: str = "Sums are in pounds") -> str:
    return run.propose([FACT | {"content": content}], writer="planner").batch_id


def files(root: Path) -> dict[str, bytes]:
    """All that lies there, but for what SQLite keeps beside its file while it is open."""
    found = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_a_run_goes_from_boot_to_a_pack_and_each_change_is_one_event(runs: Runs) -> None:
    run = booted(runs, acceptance_criteria=["All are there"], actor="ada")
    run.update(a_patch(next_action="Count"), actor="ada")
    batch_id = proposed(run)
    reached = run.milestone("counted", memory_batch_id=batch_id, committed_by=BUS)
    run.snapshot()
    assert types(run) == [
        "RUN_BOOTED",
        "WS_UPDATE_APPLIED",
        "MEMORY_PROPOSED",
        "MEMORY_COMMITTED",
        "EPISODE_CREATED",
        "RESUME_PACK_CREATED",
    ]
    [item] = reached.episode["memory"]["items"]
    assert (item["committed_by"], item["writer"]) == (BUS, "planner")
    assert reached.episode["ws_before"]["_update_seq"] == 0
    assert reached.episode["ws_after"]["_update_seq"] == 1
    assert [hit.item["id"] for hit in run.search("pounds")] == [item["id"]]


def test_memory_is_committed_by_a_milestone_or_sealed_or_in_a_test_and_else_refused_with_an_event(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "runs") as runs:
        run = booted(runs)
        batch_id = proposed(run)
        for allow in (False, True):
            with pytest.raises(GateError):
                run.commit(batch_id, allow_outside_milestone=allow)
        assert types(run)[-2:] == ["MEMORY_COMMIT_REFUSED"] * 2
        assert run.search("pounds") == []
        assert len(run.commit(batch_id, sealed=True, committed_by=BUS).items) == 1
        assert run.events(limit=1)[0]["data"]["committed_by"] == BUS
    with opened(tmp_path / "tests", testing=True) as runs:
        run = booted(runs)
        batch_id = proposed(run)
        with pytest.raises(GateError):
            run.commit(batch_id)
        assert len(run.commit(batch_id, allow_outside_milestone=True).items) == 1


def test_a_list_of_runs_closes_none_that_is_open(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "OPEN_RUNS", 2)
    others = [runs.boot("x")["run_id"] for _ in range(4)]
    run = booted(runs)
    assert len(runs.list()) == len(others) + 1
    assert runs.open(run.run_id) is run


def test_a_page_of_runs_reads_the_working_sets_of_its_own_runs_only(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [runs.boot("x")["run_id"] for _ in range(9)]
    read: list[str] = []
    whole = WorkingSetFile.read

    def reading(self: WorkingSetFile) -> Version | None:
        read.append(self.path.parent.parent.name)
        return whole(self)

    monkeypatch.setattr(WorkingSetFile, "read", reading)
    first = runs.page(3)
    second = runs.page(3, first.next)
    assert [one["run_id"] for one in [*first.runs, *second.runs]] == made[:2:-1]
    assert set(read) == set(made[3:])


def test_a_run_that_changes_between_two_pages_stands_on_none_of_the_later_ones_twice(runs: Runs) -> None:
    made = [runs.boot("x")["run_id"] for _ in range(6)]
    first = runs.page(2)
    for run_id in (made[5], made[1]):  # one that was listed, and one that was not
        runs.open(run_id).update(a_patch())
    second = runs.page(2, first.next)
    last = runs.page(2, second.next)
    pages = [[one["run_id"] for one in page.runs] for page in (first, second, last)]
    assert pages == [[made[5], made[4]], [made[3], made[2]], [made[0]]]
    assert last.next is None
    assert [one["run_id"] for one in runs.list()[:2]] == [made[1], made[5]]


def test_runs_that_changed_at_one_moment_are_each_listed_once(runs: Runs) -> None:
    made = {runs.boot("x")["run_id"] for _ in range(5)}
    for run_id in made:
        os.utime(runs.root / run_id / WORKING_SET, ns=(7, 7))
    page = runs.page(2)
    found = list(page.runs)
    while page.next is not None:
        page = runs.page(2, page.next)
        found += page.runs
    assert [one["run_id"] for one in found] == sorted(made, reverse=True)


def test_a_run_whose_working_set_is_only_in_its_ledger_yet_is_listed(runs: Runs) -> None:
    before, run, after = (booted(runs) for _ in range(3))
    (run.folder / WORKING_SET).unlink()
    os.utime(run.folder / LEDGER, ns=((before.folder / WORKING_SET).stat().st_mtime_ns + 1,) * 2)
    assert [one["run_id"] for one in runs.page(3).runs] == [after.run_id, run.run_id, before.run_id]


def test_a_milestone_that_is_asked_for_again_with_its_request_id_is_one_and_without_one_two(runs: Runs) -> None:
    run = booted(runs)
    first = run.milestone("reached", request_id="r1")
    run.update(a_patch())
    again = run.milestone("reached", request_id="r1")
    assert (first.already, again.already) == (False, True)
    assert (again.episode, again.sha256) == (first.episode, first.sha256)
    for other in ({"reason": "else"}, {"reason": "reached", "next_entry_point": "x"}):
        with pytest.raises(SchemaError, match="another milestone"):
            run.milestone(**other, request_id="r1")
    assert [run.milestone("reached", request_id="r2").already, run.milestone("reached").already] == [False, False]
    assert [run.milestone("reached").already, len(run.episodes())] == [False, 4]


@pytest.mark.parametrize("with_batch", [False, True])
@pytest.mark.parametrize("opened_anew", [False, True])
def test_a_milestone_that_is_asked_for_again_after_another_is_still_the_one_that_it_was(
    runs: Runs, with_batch: bool, opened_anew: bool
) -> None:
    run = booted(runs)
    asked: dict[str, Any] = {"memory_batch_id": proposed(run)} if with_batch else {}
    first = run.milestone("one", request_id="r1", **asked)
    run.milestone("two", request_id="r2")
    run.milestone("three")
    if opened_anew:
        run = Runs(runs.root, memory=runs._means.memory).open(run.run_id)
    again = run.milestone("one", request_id="r1", **asked)
    assert (again.already, again.episode, again.sha256) == (True, first.episode, first.sha256)
    assert (again.memory and again.memory.items) == (first.memory and first.memory.items)
    with pytest.raises(SchemaError, match="that of episode 1, which is another milestone"):
        run.milestone("else", request_id="r1")
    assert len(run.episodes()) == 3


def test_a_milestone_before_the_one_that_a_pack_has_is_not_made_twice_in_the_run_that_was_loaded(runs: Runs) -> None:
    run = booted(runs)
    run.milestone("one", request_id="r1")
    second = run.milestone("two", request_id="r2")
    there = runs.load_file(run.snapshot().path, "there").run
    assert there.milestone("two", request_id="r2").episode == second.episode
    with pytest.raises(NotFoundError, match="has made episode 1, which the pack"):
        there.milestone("one", request_id="r1")
    assert there.milestone("three", request_id="r3").episode["number"] == 3


def test_a_milestone_with_a_batch_that_is_asked_for_again_gives_the_same_memory(runs: Runs) -> None:
    run = booted(runs)
    batch_id, other = proposed(run), proposed(run, "Sums are in euros")
    first = run.milestone("reached", memory_batch_id=batch_id, request_id="r1", committed_by="r1")
    run.update(a_patch())
    again = run.milestone("reached", memory_batch_id=batch_id, request_id="r1", committed_by="r1")
    assert (again.already, again.episode) == (True, first.episode)
    assert first.memory is not None
    assert again.memory is not None
    assert again.memory.items == first.memory.items
    with pytest.raises(SchemaError, match="another milestone"):
        run.milestone("reached", memory_batch_id=other, request_id="r1")
    run.milestone("alone", request_id="r2")
    with pytest.raises(SchemaError, match="another milestone"):
        run.milestone("alone", memory_batch_id=other, request_id="r2")
    assert run.search("euros") == []


@pytest.mark.parametrize(
    "pointers", [{"at": {}}, {"at": "x" * 2001}, {"a b": 1}, {f"p{number}": 1 for number in range(101)}]
)
def test_pointers_that_are_more_than_a_few_words_are_refused(runs: Runs, pointers: Document) -> None:
    run = booted(runs)
    with pytest.raises(SchemaError, match="pointers"):
        run.snapshot(pointers=pointers)
    assert run.snapshot(pointers={f"p{number}": "x" * 2000 for number in range(100)} | {"p0": None}).path.is_file()


def test_a_run_of_an_earlier_ones_name_has_nothing_of_it(runs: Runs) -> None:
    run = booted(runs, run_id="again")
    run.update(a_patch())
    run.milestone("reached")
    runs.open("again").update(a_patch(1))
    shutil.rmtree(run.folder)
    with pytest.raises(NotFoundError):
        runs.open("again")
    fresh = booted(runs, run_id="again")
    assert fresh is not run
    assert (fresh.ws()["_update_seq"], fresh.last_seq(), fresh.episodes()) == (0, 1, [])
    assert fresh.update(a_patch()).update_seq == 1
    assert fresh.milestone("reached").episode["ledger"]["first_seq"] == 1


def test_a_run_is_not_begun_where_memory_knows_an_earlier_one_of_its_name(runs: Runs) -> None:
    run = booted(runs, run_id="again")
    path = run.snapshot().path.rename(runs.root.parent / "pack_1.zip")
    run.propose([FACT | {"scope": "run"}])
    shutil.rmtree(run.folder)
    for begin in (lambda: runs.boot("x", run_id="again"), lambda: loaded_as(runs, "again")):
        with pytest.raises(ExistsError, match="memory has batches") as refused:
            begin()
        assert refused.value.hint
        assert not run.folder.exists()
    assert runs.load_file(path).run.run_id == "again"


def loaded_as(runs: Runs, run_id: str) -> Run:
    """A pack of another run, loaded under this name."""
    return runs.load_file(booted(runs).snapshot().path, run_id).run


def test_a_pack_that_many_load_at_once_is_a_run_for_each(runs: Runs) -> None:
    run = booted(runs)
    path = run.snapshot().path.rename(runs.root.parent / "pack_1.zip")
    shutil.rmtree(run.folder)
    together = threading.Barrier(8)

    def load(_: int) -> str:
        together.wait(60)
        return runs.load_file(path).run.run_id

    with ThreadPoolExecutor(8) as callers:
        loaded = list(callers.map(load, range(8)))
    assert len(set(loaded)) == len(loaded)
    assert run.run_id in loaded


def test_a_pack_whose_run_came_back_meanwhile_gets_a_new_id(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = booted(runs)
    path = run.snapshot().path.rename(runs.root.parent / "pack_1.zip")
    shutil.rmtree(run.folder)
    whole = resume_pack._move

    def outrun(made: Path, place: Path) -> None:
        if not run.folder.exists():
            runs.boot("x", run_id=run.run_id)
        whole(made, place)

    monkeypatch.setattr(resume_pack, "_move", outrun)
    assert runs.load_file(path).run.run_id != run.run_id
    with pytest.raises(ExistsError):
        runs.load_file(path, run.run_id)


def test_a_batch_of_another_run_is_not_there(runs: Runs) -> None:
    batch_id = proposed(booted(runs))
    other = booted(runs)
    with pytest.raises(NotFoundError, match=batch_id):
        other.milestone("stolen", memory_batch_id=batch_id)
    with pytest.raises(NotFoundError, match=batch_id):
        other.commit(batch_id, sealed=True)
    assert types(other) == ["RUN_BOOTED"]
    assert other.episodes() == []


def test_a_run_and_a_task_that_a_caller_names_do_not_take_the_place_of_the_runs_own(runs: Runs) -> None:
    run, other = booted(runs), booted(runs)
    for one in (run, other):
        mcrs = [FACT | {"content": f"{scope} {one.run_id}", "scope": scope} for scope in ("run", "task")]
        one.commit(one.propose(mcrs).batch_id, sealed=True)
    theirs = {"run_id": other.run_id, "task_id": other.ws()["task_id"]}
    assert {hit.item["content"] for hit in run.search("", theirs)} == {f"run {run.run_id}", f"task {run.run_id}"}


@pytest.mark.parametrize("top_k", ["3", 0, -1, 1.5, [1], True])
def test_a_number_of_hits_that_cannot_be_is_refused_with_its_path(runs: Runs, top_k: Any) -> None:
    with pytest.raises(SchemaError, match=r"\$\.top_k"):
        booted(runs).search("pounds", None, top_k)


def test_a_milestone_takes_a_batch_of_nothing_but_what_is_known(runs: Runs) -> None:
    run = booted(runs)
    run.milestone("counted", memory_batch_id=proposed(run))
    reached = run.milestone("counted again", memory_batch_id=proposed(run))
    assert reached.memory is not None
    assert reached.memory.items == []
    assert reached.episode["memory"]["items"] == []


@pytest.mark.parametrize("is_noted", [True, False], ids=["noted", "mended"])
def test_what_waits_in_another_runs_batch_is_staged_and_its_event_says_so_and_a_milestone_commits_it(
    runs: Runs, is_noted: bool
) -> None:
    first = proposed(booted(runs))
    run = booted(runs)
    with nullcontext() if is_noted else cut(cut_before("MEMORY_PROPOSED")):
        proposed(run)
    run = Runs(runs.root, memory=runs._means.memory).open(run.run_id)
    run.snapshot()
    [said] = [event["data"] for event in run.events(limit=10) if event["event_type"] == "MEMORY_PROPOSED"]
    assert (said["staged"], said["duplicates"]) == (1, 1 if is_noted else 0)
    reached = run.milestone("reached", memory_batch_id=said["batch_id"])
    assert reached.memory is not None
    assert [item["content"] for item in reached.memory.items] == ["Sums are in pounds"]
    assert first != said["batch_id"]


def test_each_episode_begins_where_the_last_one_ended(runs: Runs) -> None:
    run = booted(runs)
    for number in range(3):
        run.update(a_patch(number))
        run.milestone(f"milestone {number}")
    before, after = [[one[part] for one in run.episodes()] for part in ("ws_before", "ws_after")]
    assert before[0]["_update_seq"] == 0
    assert before[1:] == after[:-1]
    slices = [(one["ledger"]["first_seq"], one["ledger"]["last_seq"]) for one in run.episodes()]
    assert slices == [(1, 2), (3, 4), (5, 6)]


def test_a_milestone_whose_answer_was_lost_is_the_same_one_again(runs: Runs) -> None:
    run = booted(runs)
    batch_id = proposed(run)
    first = run.milestone("counted", memory_batch_id=batch_id)
    again = run.milestone("counted", memory_batch_id=batch_id)
    assert again.already
    assert (again.episode, again.sha256) == (first.episode, first.sha256)
    assert len(run.episodes()) == 1
    run.update(a_patch())
    later = run.milestone("counted", memory_batch_id=batch_id)
    assert (later.already, later.episode["number"]) == (False, 2)
    assert later.episode["memory"] == {"batch_id": None, "items": []}


# A milestone's steps, and a proposal's: the process ends before or after each


def cut_before(event_type: str) -> Cutting:
    return cut_at(event_type, is_written=False)


def cut_after(event_type: str) -> Cutting:
    return cut_at(event_type, is_written=True)


def cut_at(event_type: str, *, is_written: bool) -> Cutting:
    append = FileLedger.append

    def cutting(self: FileLedger, event: Document, **options: Any) -> Document:
        is_it = event["event_type"] == event_type
        if is_it and not is_written:
            raise Cut
        written = append(self, event, **options)
        if is_it:
            raise Cut
        return written

    return lambda patch: patch.setattr(FileLedger, "append", cutting)


def cut_before_the_episode(patch: pytest.MonkeyPatch) -> None:
    def cutting(*_: Any, **__: Any) -> Document:
        raise Cut

    patch.setattr(EpisodeStore, "create", cutting)


@contextmanager
def cut(cutting: Cutting) -> Iterator[None]:
    """The block is cut off where this says."""
    with pytest.MonkeyPatch.context() as patch:
        cutting(patch)
        with pytest.raises(Cut):
            yield


STEPS = {
    "memory without its event": cut_before("MEMORY_COMMITTED"),
    "memory with its event": cut_after("MEMORY_COMMITTED"),
    "no episode": cut_before_the_episode,
    "an episode without its event": cut_before("EPISODE_CREATED"),
    "an answer that never came": cut_after("EPISODE_CREATED"),
}


@pytest.mark.parametrize("next_step", ["the same milestone", "another milestone", "a snapshot"])
@pytest.mark.parametrize("step", STEPS)
def test_a_milestone_that_was_cut_off_is_made_good_by_the_next_change(
    tmp_path: Path, step: str, next_step: str
) -> None:
    root = tmp_path / "runs"
    with opened(root) as runs:
        run = booted(runs)
        batch_id = proposed(run)
        with cut(STEPS[step]):
            run.milestone("counted", memory_batch_id=batch_id, committed_by=BUS)
    with opened(root) as runs:
        run = runs.open(run.run_id)
        if next_step == "a snapshot":
            run.snapshot()
        else:
            reason = "counted" if next_step == "the same milestone" else "later"
            run.milestone(reason, memory_batch_id=batch_id if next_step == "the same milestone" else None)
        events = run.events(limit=100)
        committed = [event for event in events if event["event_type"] == "MEMORY_COMMITTED"]
        created = [event["data"] for event in events if event["event_type"] == "EPISODE_CREATED"]
        assert [event["data"]["committed_by"] for event in committed] == [BUS]
        assert len(run.search("pounds")) == 1
        assert [one["number"] for one in created] == [one["number"] for one in run.episodes()]
        holding = [one for one in run.episodes() if one["memory"]["items"]]
        assert len(holding) <= 1
        if next_step == "the same milestone":
            assert len(holding) == 1


def test_a_brief_has_the_memories_that_belong_to_the_run_and_no_others(runs: Runs) -> None:
    run = booted(runs)
    run.milestone("seen", memory_batch_id=proposed(run, "The server listens on port 80 in the east region"))
    for objective, is_there in (("Fix the login bug in the mobile app", False), ("Move the server to the west", True)):
        other = runs.open(runs.boot(objective)["run_id"])
        assert ("port 80" in other.brief()) is is_there
        assert "port 80" in other.brief(query="server port")


def test_a_proposal_whose_event_was_cut_off_gets_it_with_the_next_change(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with opened(root) as runs:
        run = booted(runs)
        with cut(cut_before("MEMORY_PROPOSED")):
            proposed(run)
    with opened(root) as runs:
        run = runs.open(run.run_id)
        proposed(run, "Something else altogether")
        assert types(run) == ["RUN_BOOTED", "MEMORY_PROPOSED", "MEMORY_PROPOSED"]


def test_what_was_cut_off_in_a_process_that_lives_on_is_made_good_by_its_next_proposal(runs: Runs) -> None:
    run = booted(runs)
    proposed(run)
    with cut(cut_before("MEMORY_PROPOSED")):
        proposed(run, "Cut off in the middle")
    proposed(run, "Something else altogether")
    assert types(run) == ["RUN_BOOTED", "MEMORY_PROPOSED", "MEMORY_PROPOSED", "MEMORY_PROPOSED"]


def test_reading_writes_nothing_even_where_something_was_cut_off(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with opened(root) as runs:
        run = booted(runs)
        with cut(cut_before("EPISODE_CREATED")):
            run.milestone("counted", memory_batch_id=proposed(run))
    with opened(root) as runs:
        before = files(root)
        run = runs.open(run.run_id)
        run.ws()
        run.search("pounds")
        run.brief()
        run.events(limit=10)
        run.episodes()
        run.waiting(limit=10)
        runs.list()
        assert files(root) == before


# The folder


def test_runs_are_listed_and_a_broken_one_says_so(runs: Runs) -> None:
    first, second, broken = (booted(runs) for _ in range(3))
    first.update(a_patch())
    (broken.folder / WORKING_SET).write_bytes(b"{")
    (broken.folder / LEDGER).write_bytes(b"{}\n")
    listed = {one["run_id"]: one for one in runs.list()}
    assert [run_id for run_id in listed if run_id != broken.run_id] == [first.run_id, second.run_id]
    assert listed[first.run_id]["status"] == "BUSY"
    assert listed[broken.run_id]["code"] == "BROKEN"


@pytest.mark.parametrize(
    "name", ["..", ".hidden", "a/b", "", "x" * 129, "memory.v2.1.sqlite", "memory.v2.1.sqlite-wal"]
)
def test_what_is_no_name_of_a_run_is_refused(runs: Runs, name: str) -> None:
    with pytest.raises(SchemaError, match="run_id"):
        runs.boot("Escape.", run_id=name)
    with pytest.raises(NotFoundError):
        runs.open(name)


def test_a_run_is_booted_once(runs: Runs) -> None:
    booted(runs, run_id="mine")
    with pytest.raises(ExistsError):
        booted(runs, run_id="mine")


def test_a_stale_patch_is_refused_with_the_current_seq_and_leaves_an_event(runs: Runs) -> None:
    run = booted(runs)
    run.update(a_patch())
    with pytest.raises(StaleError) as refused:
        run.update(a_patch())
    assert refused.value.current_seq == 1
    assert types(run)[-1] == "WS_UPDATE_REJECTED"


# Packs


def test_a_pack_goes_on_under_its_own_id_elsewhere_and_under_a_new_one_here(runs: Runs, tmp_path: Path) -> None:
    run = booted(runs)
    run.update(a_patch(next_action="Count"))
    run.milestone("counted")
    packed = run.snapshot(pointers={"ledger_last_seq": 42})
    here = runs.load_pack(str(packed.path))
    assert here.run.run_id != run.run_id
    assert here.run.ws()["next_action"] == "Count"
    assert here.from_run_id == run.run_id
    assert types(here.run)[-1] == "RESUME_PACK_LOADED"
    assert (here.memory, here.pointers) == (None, {"ledger_last_seq": 42})
    with opened(tmp_path / "other") as others:
        there = others.load_file(packed.path).run
        assert there.run_id == run.run_id
        there.update(a_patch(1, next_action="Go on"))
        assert there.milestone("went on").episode["number"] == 2
        assert there.snapshot().manifest["update_seq"] == 2


def test_a_run_whose_ledger_a_power_cut_has_torn_is_packed_and_its_episodes_are_whole(runs: Runs) -> None:
    run = booted(runs)
    run.milestone("counted")
    with (run.folder / LEDGER).open("ab") as ledger:
        ledger.write(b'{"event_type":"EPISODE_CREATED"' + bytes(700) + b"}\n")
    assert EpisodeStore(run.folder / EPISODES).verify() == 1
    assert runs.load_pack(str(run.snapshot().path)).run.episode(1)["reason"] == "counted"


def test_a_pack_has_the_versions_that_its_run_committed_though_another_run_has_changed_them_since(runs: Runs) -> None:
    run, other = booted(runs), booted(runs)
    reached = run.milestone("counted", memory_batch_id=proposed(run), committed_by=BUS)
    [item] = reached.episode["memory"]["items"]
    gone = {"_schema_version": "2.1", "op": "delete", "target_id": item["id"], "rationale": "wrong"}
    other.commit(other.propose([gone], writer="eve").batch_id, sealed=True, committed_by="another call")
    with resume_pack.check(run.snapshot().path) as pack:
        assert list(pack.memory_items()) == [item]
    [last] = run.search("pounds", {"status": "deleted"})
    assert (last.item["writer"], last.item["rationale"]) == ("eve", "wrong")
    assert last.item["committed_by"] == "another call"


def test_a_pack_is_not_loaded_over_a_run_that_is_there(runs: Runs) -> None:
    run = booted(runs)
    path = str(run.snapshot().path)
    with pytest.raises(ExistsError):
        runs.load_pack(path, run.run_id)
    assert runs.load_pack(path, "another").run.run_id == "another"
    with pytest.raises(SchemaError):
        runs.load_pack(path, "../another")


def test_a_pack_is_found_from_here_and_from_the_root_and_nowhere_else(runs: Runs, tmp_path: Path) -> None:
    run = booted(runs)
    packed = run.snapshot(zip_pack=False).path
    outside = tmp_path / "pack"
    packed.rename(outside)
    (runs.root / "link").symlink_to(outside)
    for path in (str(outside), "../pack", str(runs.root / "link"), "link", "/etc/passwd", "../../../../etc/passwd"):
        with pytest.raises(ForbiddenError, match="outside"):
            runs.load_pack(path)
    for path in ("missing.zip", f"{run.run_id}/resume/pack_no.zip", "a\0b", "x" * 5_000):
        with pytest.raises(NotFoundError):
            runs.load_pack(path)
    zipped = run.snapshot().path
    assert runs.load_pack(str(zipped.relative_to(runs.root))).from_run_id == run.run_id


def test_a_pack_that_was_changed_is_refused_and_makes_no_run(runs: Runs) -> None:
    run = booted(runs)
    packed = run.snapshot(zip_pack=False).path
    manifest = json.loads((packed / "manifest.v2.1.json").read_bytes())
    manifest["task_id"] = "another"
    (packed / "manifest.v2.1.json").write_text(json.dumps(manifest))
    with pytest.raises(PackError):
        runs.load_pack(str(packed), "another")
    assert [one["run_id"] for one in runs.list()] == [run.run_id]


@pytest.mark.parametrize("tail", [b'{"torn', b"\0" * 512, b"\0" * 512 + b"\n", b"\0\n\0"])
def test_a_run_whose_ledger_has_any_torn_tail_can_be_packed_and_its_episodes_verified(runs: Runs, tail: bytes) -> None:
    run = booted(runs)
    run.milestone("counted")
    ledger = run.folder / LEDGER
    with ledger.open("ab") as file:
        file.write(tail)
    assert EpisodeStore(run.folder / EPISODES).verify() == 1
    with resume_pack.check(run.snapshot().path) as pack:
        assert pack.ledger_last_seq == 2


# Two processes on one folder, and what a change costs


def test_what_another_process_has_noted_is_not_noted_again(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with opened(root) as one, opened(root) as other:
        here = booted(one)
        there = other.open(here.run_id)
        first = proposed(here)
        second = proposed(there, "Something else altogether")
        here.milestone("counted", memory_batch_id=first)
        third = proposed(there, "A third thing to know")
        here.milestone("two", memory_batch_id=second)
        there.milestone("three", memory_batch_id=third)
        here.snapshot()
        there.snapshot()
        for type_ in ("MEMORY_PROPOSED", "MEMORY_COMMITTED"):
            noted = [one["data"]["batch_id"] for one in here.events(limit=100) if one["event_type"] == type_]
            assert noted == [first, second, third]
        assert [one["memory"]["batch_id"] for one in here.episodes()] == [first, second, third]


def test_what_another_process_has_left_half_done_is_made_good_by_who_has_the_run_open(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with opened(root) as one, opened(root) as other:
        here = booted(one)
        batch_id = proposed(here)
        with cut(cut_before("MEMORY_COMMITTED")):
            other.open(here.run_id).milestone("counted", memory_batch_id=batch_id)
        here.snapshot()
        assert types(here)[-2:] == ["MEMORY_COMMITTED", "RESUME_PACK_CREATED"]


def test_a_change_of_a_whole_run_asks_neither_for_all_batches_nor_for_all_lines(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = booted(runs)
    proposed(run)
    for number in range(100):
        run.update(a_patch(number))
    proposed(run, "Something else altogether")
    passed: list[str] = []
    batches, backwards = SQLiteMemoryStore.batches, ledger_module._backwards

    def counting(fd: int, end: int) -> Iterator[tuple[int, bytes]]:
        for line in backwards(fd, end):
            passed.append("line")
            yield line

    def asked(self: SQLiteMemoryStore, run_id: str) -> list[Batch]:
        passed.append("batches")
        return batches(self, run_id)

    monkeypatch.setattr(ledger_module, "_backwards", counting)
    monkeypatch.setattr(SQLiteMemoryStore, "batches", asked)
    run.milestone("counted")
    assert "batches" not in passed
    assert len(passed) < 50


# Memories of a pack


def test_a_pack_holds_what_the_run_committed_as_it_was_then_whatever_others_made_of_it(runs: Runs) -> None:
    run, other = booted(runs), booted(runs)
    [item] = run.milestone("counted", memory_batch_id=proposed(run)).episode["memory"]["items"]
    change = {"_schema_version": "2.1", "op": "update", "target_id": item["id"], "content": "Sums are in euros"}
    other.milestone("changed", memory_batch_id=other.propose([change]).batch_id)
    noted = [event["data"]["items"] for event in run.events(limit=9) if event["event_type"] == "MEMORY_COMMITTED"]
    assert noted == [[{"id": item["id"], "sha256": sha256(to_json(item))}]]
    with resume_pack.check(run.snapshot().path) as pack:
        assert list(pack.memory_items()) == [item]
    with resume_pack.check(other.snapshot().path) as pack:
        assert [one["content"] for one in pack.memory_items()] == ["Sums are in euros"]


def test_a_run_whose_memory_is_lost_is_not_packed_and_says_why(tmp_path: Path) -> None:
    with opened(tmp_path / "runs") as runs:
        run = booted(runs)
        run.milestone("counted", memory_batch_id=proposed(run))
    without = Runs(tmp_path / "runs", memory=InMemoryMemoryStore()).open(run.run_id)
    with pytest.raises(BrokenError, match="the memory does not have it"):
        without.snapshot()


class BareStore:
    """A memory with the three members that the protocol has, and no more."""

    def __init__(self) -> None:
        self._whole = InMemoryMemoryStore()

    def search(self, query: str, filters: Mapping[str, Any] | None = None, top_k: int | None = None) -> list[Hit]:
        return self._whole.search(query, filters, top_k)

    def propose(self, mcrs: Sequence[Document], scope_filters: Mapping[str, Any] | None = None) -> ProposeResult:
        return self._whole.propose(mcrs, scope_filters)

    def commit(self, batch_id: str) -> CommitResult:
        return self._whole.commit(batch_id)


def test_a_memory_that_can_only_search_propose_and_commit_is_enough(tmp_path: Path) -> None:
    memory = BareStore()
    runs = Runs(tmp_path / "runs", memory=memory)
    run, other = booted(runs), booted(runs)
    batch_id, sealed = proposed(run), proposed(run, "Something else altogether")
    with pytest.raises(NotFoundError, match=batch_id):
        other.milestone("stolen", memory_batch_id=batch_id)
    run.commit(sealed, sealed=True)
    assert [one.batch_id for one in run.waiting(limit=9)] == [batch_id]
    with cut(cut_before("MEMORY_COMMITTED")):
        run.milestone("counted", memory_batch_id=batch_id)
    again = Runs(tmp_path / "runs", memory=memory).open(run.run_id)
    [item] = again.milestone("counted", memory_batch_id=batch_id).episode["memory"]["items"]
    assert item["content"] == "Sums are in pounds"
    assert types(again).count("MEMORY_PROPOSED") == types(again).count("MEMORY_COMMITTED") == 2
    with resume_pack.check(again.snapshot().path) as pack:
        assert len(list(pack.memory_items())) == 2
    assert len(again.search("pounds")) == 1


def test_what_a_pack_remembers_is_proposed_where_it_is_loaded_and_a_milestone_commits_it(
    runs: Runs, tmp_path: Path
) -> None:
    run = booted(runs)
    batch = [
        FACT | {"content": "Sums are in pounds", "source_refs": ["a"] * 100},
        FACT | {"content": "Old", "scope": "run"},
    ]
    items = run.milestone("a", memory_batch_id=run.propose(batch, writer="ada").batch_id).episode["memory"]["items"]
    gone = {"_schema_version": "2.1", "op": "delete", "target_id": items[1]["id"], "rationale": "wrong"}
    run.milestone("b", memory_batch_id=run.propose([gone]).batch_id)
    packed = run.snapshot()
    assert runs.load_file(packed.path).memory is None
    with opened(tmp_path / "other") as others:
        loaded = others.load_file(packed.path, actor="bob")
        there, brought = loaded.run, loaded.memory
        assert brought is not None
        assert (brought.staged, brought.duplicates, brought.left_out) == (1, 0, 0)
        assert types(there)[-2:] == ["RESUME_PACK_LOADED", "MEMORY_PROPOSED"]
        assert there.search("pounds") == []
        with pytest.raises(GateError):
            there.commit(brought.batch_id)
        [item] = there.milestone("c", memory_batch_id=brought.batch_id).episode["memory"]["items"]
        assert (item["content"], item["writer"], item["scope"]) == ("Sums are in pounds", "ada", "global")
        assert item["source_refs"][98:] == ["a", f"pack:{loaded.pack_id}/{items[0]['id']}"]
        with resume_pack.check(there.snapshot().path) as pack:
            assert [one["id"] for one in pack.memory_items()] == [item["id"]]
        assert others.load_file(packed.path).memory is None


class BusyStore(InMemoryMemoryStore):
    """A memory that others write for longer than a call waits, as long as `is_busy`."""

    is_busy = True

    def propose(self, mcrs: Sequence[Document], scope_filters: Mapping[str, Any] | None = None) -> ProposeResult:
        if self.is_busy:
            raise BusyError("others write")
        return super().propose(mcrs, scope_filters)


def test_a_pack_that_is_loaded_while_memory_is_busy_is_a_run_that_proposes_later_and_the_error_says_so(
    runs: Runs, tmp_path: Path
) -> None:
    run = booted(runs)
    run.milestone("counted", memory_batch_id=proposed(run))
    memory = BusyStore()
    others = Runs(tmp_path / "others", memory=memory)
    with pytest.raises(BusyError) as refused:
        others.load_file(run.snapshot().path, "run_2")
    assert (refused.value.members["run_id"], refused.value.hint) == (
        "run_2",
        "Run run_2 is loaded, and proposes what its pack remembers with its next change.",
    )
    there = others.open("run_2")
    assert there.update(a_patch()).update_seq == 1  # a patch needs no memory
    with pytest.raises(BusyError):
        there.snapshot()
    memory.is_busy = False
    there.snapshot()
    assert types(there)[-4:] == ["RESUME_PACK_LOADED", "WS_UPDATE_APPLIED", "MEMORY_PROPOSED", "RESUME_PACK_CREATED"]
    assert there.bring() is not None


def test_what_a_pack_remembers_and_was_damaged_since_is_named_and_can_be_moved_away(runs: Runs, tmp_path: Path) -> None:
    run = booted(runs)
    run.milestone("counted", memory_batch_id=proposed(run))
    others = Runs(tmp_path / "others", memory=BusyStore())
    with pytest.raises(BusyError):
        others.load_file(run.snapshot().path, "run_2")
    there = others.open("run_2")
    (there.folder / PENDING_MEMORY).write_bytes(b"{}\n")
    with pytest.raises(BrokenError, match="pending") as refused:
        there.milestone("later")
    assert refused.value.hint is not None
    (there.folder / PENDING_MEMORY).rename(tmp_path / "damaged")
    assert there.milestone("later").episode["number"] == 2
