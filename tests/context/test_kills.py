"""`kill -9` of a service in the middle of what it does: what was acknowledged is there, and the rest is made good."""

from __future__ import annotations

import http.client
import itertools
import random
import subprocess
import sys
import threading
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from aos_context.artifacts import sha256
from aos_context.layout import DATABASE, PENDING_MEMORY
from aos_context.memory import InMemoryMemoryStore
from aos_context.memory_sqlite import SQLiteMemoryStore
from aos_context.resume_pack import check
from aos_context.runs import Runs

from tests.context import OVERLAY
from tests.context.served import FACT, PATIENCE_S, Service, a_patch, environment

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 8
CALLERS = 3
RUN = "hammered"


@dataclass
class Acknowledged:
    """What the service has answered to all callers together."""

    updates: list[int] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    episodes: dict[int, str] = field(default_factory=dict)
    more: threading.Condition = field(default_factory=threading.Condition)

    def count(self) -> int:
        return len(self.updates) + len(self.batches) + len(self.episodes)

    def note_milestone(self, answer: dict[str, object], batch_id: str) -> None:
        with self.more:
            episode = answer["episode"]
            assert isinstance(episode, dict)
            self.episodes[episode["number"]] = str(answer["sha256"])
            self.batches.append(batch_id)
            self.more.notify_all()

    def note_update(self, update_seq: int) -> None:
        with self.more:
            self.updates.append(update_seq)
            self.more.notify_all()


def call_on(service: Service, name: str, told: Acknowledged) -> None:
    """Patch, propose and reach milestones until the service is gone."""
    expected, number = 0, 0
    with suppress(OSError, http.client.HTTPException):
        while True:
            number += 1
            reply = service.post(f"/runs/{RUN}/step/update", {"patch": a_patch(expected, next_action=name)})
            if reply.status == 409:
                expected = reply.json()["current_seq"]
                continue
            expected = reply.json()["update_seq"]
            told.note_update(expected)
            mcrs = [FACT | {"content": f"memory {name} {number}"}]
            batch_id = service.post(f"/runs/{RUN}/memory/propose", {"mcrs": mcrs}).json()["batch_id"]
            body = {"reason": f"{name} {number}", "memory_batch_id": batch_id}
            told.note_milestone(service.post(f"/runs/{RUN}/milestone", body).json(), batch_id)


def hammer_and_kill(root: Path, told: Acknowledged, round_: int, enough: int) -> None:
    """Start a service, let callers work until so much more was acknowledged, and kill it."""
    command = [sys.executable, "-m", "aos_context.cli", "serve", "--port", "0", "--root", str(root)]
    with subprocess.Popen(command, cwd=OVERLAY, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        service = Service(int(process.stdout.readline().rpartition(":")[2]), root)
        service.post("/runs/boot", {"objective": "Survive.", "run_id": RUN})
        goal = told.count() + enough
        names = [f"caller {round_}-{number}" for number in range(CALLERS)]
        callers = [threading.Thread(target=call_on, args=(service, name, told)) for name in names]
        for caller in callers:
            caller.start()
        with told.more:
            reached = told.more.wait_for(lambda: told.count() >= goal, PATIENCE_S)
        process.kill()
        for caller in callers:
            caller.join()
    assert reached


def test_what_was_acknowledged_is_there_after_kills_and_the_rest_is_made_good(tmp_path: Path) -> None:
    root, told, random_ = tmp_path / "runs", Acknowledged(), random.Random(7)
    for round_ in range(ROUNDS):
        hammer_and_kill(root, told, round_, random_.randint(1, 20))
    with closing(SQLiteMemoryStore(root / DATABASE)) as memory:
        run = Runs(root, memory=memory).open(RUN)
        packed = run.snapshot()
        events = run.events(limit=100_000)
        of_type = {kind: [one["data"] for one in events if one["event_type"] == kind] for kind in
                   ("WS_UPDATE_APPLIED", "MEMORY_PROPOSED", "MEMORY_COMMITTED", "EPISODE_CREATED")}  # fmt: skip

        applied = [data["update_seq"] for data in of_type["WS_UPDATE_APPLIED"]]
        assert applied == list(range(1, run.ws()["_update_seq"] + 1))
        assert set(told.updates) <= set(applied)
        assert len(told.updates) == len(set(told.updates))

        batches = {batch.batch_id: batch.state for batch in memory.batches(RUN)}
        assert sorted(data["batch_id"] for data in of_type["MEMORY_PROPOSED"]) == sorted(batches)
        committed = sorted(batch_id for batch_id, state in batches.items() if state == "committed")
        assert sorted(data["batch_id"] for data in of_type["MEMORY_COMMITTED"]) == committed
        assert set(told.batches) <= set(committed)
        assert len(memory.items(run_id=RUN)) == len(committed)

        files = {number: sha256(path.read_bytes()) for number, path in
                 enumerate(sorted((root / RUN / "episodes").glob("episode_*.json")), 1)}  # fmt: skip
        assert {data["number"]: data["sha256"] for data in of_type["EPISODE_CREATED"]} == files
        assert told.episodes.items() <= files.items()
        assert [one["number"] for one in run.episodes()] == list(files)
        assert packed.manifest["update_seq"] == len(applied)


SNAPSHOT = """
import os, sys
from pathlib import Path
from aos_context.resume_pack import check
from aos_context.runs import Runs
from aos_context.memory import InMemoryMemoryStore
run = Runs(Path(sys.argv[1]), memory=InMemoryMemoryStore()).open("run_1")
calls, at = iter(range(1000)), int(sys.argv[2])
def crashing(whole):
    def call(*arguments):
        if next(calls) == at:
            os._exit(9)
        return whole(*arguments)
    return call
os.fsync, os.fdatasync, os.rename = map(crashing, (os.fsync, os.fdatasync, os.rename))
run.snapshot(zip_pack=sys.argv[3] == "zip")
"""


@pytest.mark.parametrize("how", ["zip", "folder"])
def test_a_pack_that_lies_there_has_its_hash_in_the_ledger_wherever_its_maker_was_killed(
    tmp_path: Path, how: str
) -> None:
    runs = Runs(tmp_path, memory=InMemoryMemoryStore())
    run = runs.open(runs.boot("Survive.", run_id="run_1")["run_id"])
    for crashes in itertools.count():
        command = [sys.executable, "-c", SNAPSHOT, str(tmp_path), str(crashes), how]
        ended = subprocess.run(command, cwd=OVERLAY, check=False).returncode
        noted = {one["data"].get("manifest_sha256") for one in run.events(limit=1_000)}
        for pack in (run.folder / "resume").glob("pack_*"):
            with check(pack) as checked:
                assert checked.manifest_sha256 in noted
        if ended == 0:
            break
        assert ended == 9
    assert crashes > 2
    assert list((run.folder / "resume").glob(".*")) == []


LOAD = """
import os, sys
from pathlib import Path
from aos_context.layout import PENDING_MEMORY
from aos_context.ledger import FileLedger
from aos_context.memory_sqlite import SQLiteMemoryStore
from aos_context.runs import Runs
root, pack, where = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def ended(*_, **__):
    os._exit(9)
def ending_after(whole):
    return lambda *given, **named: ended(whole(*given, **named))
if where == "nothing is proposed":
    SQLiteMemoryStore.propose = ended
elif where == "the proposal has no event":
    SQLiteMemoryStore.propose = ending_after(SQLiteMemoryStore.propose)
else:
    unlink = Path.unlink
    Path.unlink = lambda path, **named: ended() if str(path).endswith(PENDING_MEMORY) else unlink(path, **named)
Runs(root, memory=SQLiteMemoryStore(root / "memory.v2.1.sqlite")).load_file(pack, "run_2", actor="ada")
"""


@pytest.mark.parametrize("next_change", ["a patch", "a proposal", "a snapshot"])
@pytest.mark.parametrize("where", ["nothing is proposed", "the proposal has no event", "only its file is left"])
def test_what_a_pack_remembers_is_proposed_once_though_its_loading_was_killed(
    tmp_path: Path, where: str, next_change: str
) -> None:
    with closing(SQLiteMemoryStore(tmp_path / "there.sqlite")) as memory:
        runs = Runs(tmp_path / "there", memory=memory)
        run = runs.open(runs.boot("Survive.", run_id="run_1")["run_id"])
        run.milestone("one", memory_batch_id=run.propose([FACT]).batch_id)
        packed = run.snapshot().path
    root = tmp_path / "here"
    command = [sys.executable, "-c", LOAD, str(root), str(packed), where]
    assert subprocess.run(command, cwd=OVERLAY, check=False).returncode == 9
    with closing(SQLiteMemoryStore(root / DATABASE)) as memory:
        run = Runs(root, memory=memory).open("run_2")
        if next_change == "a patch":
            run.update(a_patch())
        elif next_change == "a proposal":
            run.propose([FACT | {"content": "Something else"}])
        else:
            run.snapshot()
        run.update(a_patch(run.ws()["_update_seq"]))
        events = run.events(limit=100)
        [said] = [one for one in events if one["event_type"] == "MEMORY_PROPOSED" and "pack" in one["data"]]
        assert (said["data"]["staged"], f"pack_{said['data']['pack']['pack_id']}.zip") == (1, packed.name)
        assert len(memory.batches("run_2")) == 1 + (next_change == "a proposal")
        [item] = run.milestone("two", memory_batch_id=said["data"]["batch_id"]).episode["memory"]["items"]
        assert item["content"] == FACT["content"]
        assert not (run.folder / PENDING_MEMORY).exists()


def test_what_a_killed_writer_of_an_episode_left_is_removed_by_the_next_change(tmp_path: Path) -> None:
    runs = Runs(tmp_path, memory=InMemoryMemoryStore())
    run = runs.open(runs.boot("Survive.")["run_id"])
    run.milestone("one")
    left = [run.folder / f"episodes/.episode_000002.v2.1.{kind}.1-a" for kind in ("json", "jsonl")]
    for path in left:
        path.touch()
    Runs(tmp_path, memory=InMemoryMemoryStore()).open(run.run_id).milestone("two")
    assert [path.exists() for path in left] == [False, False]
