"""Many writers of one run, and writers that are killed: is every acknowledged patch there, once, and nothing torn?

    python -m tests.context.hammer --patches 10000 --processes 4 --writers 32
    python -m tests.context.hammer --kills 100 --seed 7

A writer reads the working set, adds one to the number in it, and says in its own item which of its patches it was. It
writes a line to a pipe after each patch that was applied: that is the acknowledgement, which outlives the writer.

A kill hardly ever falls between the bytes of a line, so between some kills the ledger gets a torn tail, as a power cut
leaves one: the next line up to a random byte, with or without blocks behind it that never reached the disk.

Ends with 1 where anything is not as it should be, and says what.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import selectors
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aos_context.artifacts import decode, encode
from aos_context.errors import StaleError
from aos_context.ledger import FileLedger
from aos_context.ws_manager import WorkingSetManager

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aos_context.artifacts import Document

PAUSE_S = 0.005
"""At most, for a writer that lost once; twice that for each time more in a row, up to 32 times."""
SILENCE_S = 120
"""Without an acknowledgement for so long, the writers hang."""
LOOK_EVERY = 20
"""Acknowledgements between two looks at the file."""
KILL_PROCESSES, KILL_WRITERS = 2, 3
"""At a time, and in each process."""
KILL_ACKNOWLEDGED, KILL_DELAY_S = 15, 0.005
"""A process is killed after at most so many patches more, and then so long: at any moment of a patch."""
TEAR_CHANCE = 0.5
"""That the ledger's tail is torn before new writers begin."""


class FaultError(Exception):
    """A promise that was not kept."""


class Acknowledged(NamedTuple):
    """`number` is the writer's own count of its patches, `lost` how often it was told that its patch is stale."""

    update_seq: int
    writer: str
    number: int
    lost: int


class Run:
    """The run that is written to, and what must be true of it; checked as it grows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "state" / "working_set.v2.1.json"
        self.ledger = FileLedger(root / "ledger" / "run.v2.1.jsonl")
        self.acknowledged: list[Acknowledged] = []
        self.looks = 0
        self.kinds: Counter[str] = Counter()
        self.torn = 0
        """How often the ledger's tail was torn."""
        self._applied: list[tuple[str, int]] = []
        self._read = 0
        self._checked = 0

    def manager(self) -> WorkingSetManager:
        return WorkingSetManager(self.path, ledger=FileLedger(self.ledger.path))

    def boot(self) -> None:
        self.manager().create_initial(task_id="task", thread_id="thread", run_id="run", objective="Count.")

    def take(self, lines: bytes) -> None:
        for line in lines.splitlines():
            update_seq, writer, number, lost = line.decode().split()
            self.acknowledged.append(Acknowledged(int(update_seq), writer, int(number), int(lost)))
            if len(self.acknowledged) % LOOK_EVERY == 0:
                self.look()

    def look(self) -> None:
        """Without a lock, in the middle of it all. Raises `BrokenError` for a torn file."""
        decode("working_set", self.path.read_bytes(), str(self.path))
        self.looks += 1

    def tear(self, chance: random.Random) -> None:
        """With no writer left: leave the beginning of the line that would be the next, as a power cut does."""
        event = self.ledger.tail(1)[0]
        line = encode("ledger_event", event | {"seq": event["seq"] + 1}) + b"\n"
        kept = line[: chance.randrange(1, len(line))]
        lost = chance.choice([b"", bytes(len(line) - len(kept)), bytes(len(line) - len(kept) - 1) + b"\n"])
        with self.ledger.path.open("ab") as file:
            file.write(kept + lost)
        self.torn += 1

    def check(self) -> Document:
        """With no writer left. Raises `FaultError`, `BrokenError`."""
        working_set = self.manager().load()
        for event in self.ledger.read(self._read):
            self._read = event["seq"]
            self.kinds[event["event_type"]] += 1
            if event["event_type"] == "WS_UPDATE_APPLIED":
                self._take_applied(event)
        expect("_update_seq", working_set["_update_seq"], "applied events", len(self._applied))
        expect("the number that is counted up", int(working_set["next_action"] or 0), "patches", len(self._applied))
        for one in self.acknowledged[self._checked :]:
            if one.update_seq > len(self._applied):
                raise FaultError(f"{one} was acknowledged and is not in the ledger")
            expect("the acknowledged patch", one[1:3], f"event {one.update_seq}", self._applied[one.update_seq - 1])
        self._checked = len(self.acknowledged)
        last = dict(self._applied)
        shown = {item["id"]: int(item["content"]) for item in working_set["sliding_context"]}
        expect("the writers' items", shown, "their last patches", last)
        return working_set

    def check_all(self) -> None:
        """And that the ledger alone makes the same working set."""
        alone = WorkingSetManager(self.path.with_name("none.json"), ledger=self.ledger).load()
        expect("the working set", self.check(), "that of the ledger alone", alone)
        seqs = [one.update_seq for one in self.acknowledged]
        expect("acknowledgements", len(seqs), "different ones", len(set(seqs)))

    def _take_applied(self, event: Document) -> None:
        data = event["data"]
        (item,) = data["patch"]["add"]["sliding_context"]
        self._applied.append((event["actor"], int(item["content"])))
        expect("update_seq", data["update_seq"], "applied events", len(self._applied))


def expect(what: str, found: object, of_what: str, wanted: object) -> None:
    if found != wanted:
        raise FaultError(f"{what}: {found!r}; {of_what}: {wanted!r}")


def write(manager: WorkingSetManager, writer: str, numbers: Iterable[int], chance: random.Random, pipe: int) -> None:
    """Patches until the numbers end; each is acknowledged with a line."""
    for number in numbers:
        working_set, lost = manager.load(), 0
        while True:
            item = {"id": writer, "content": str(number), "timestamp": working_set["updated_at"], "priority": 5}
            patch = {
                "_schema_version": "2.1",
                "expected_seq": working_set["_update_seq"],
                "set": {"next_action": str(int(working_set["next_action"] or 0) + 1)},
                "add": {"sliding_context": [item]},
            }
            try:
                result = manager.apply_patch(patch, actor=writer)
            except StaleError as error:
                lost += 1
                time.sleep(chance.uniform(0, PAUSE_S * 2 ** min(lost, 5)))
                working_set = manager.load()
                if working_set["_update_seq"] < error.current_seq:
                    raise FaultError(f"{error}, and then it was read at {working_set['_update_seq']}") from error
                continue
            break
        os.write(pipe, f"{result.update_seq} {writer} {number} {lost}\n".encode())


def work(run: Run, writers: Mapping[str, Iterable[int]], seed: str, pipe: int) -> None:
    """One process: a thread for each writer; they share a manager. Ends with 1 where one of them failed."""
    manager = run.manager()
    failed = threading.Event()

    def write_or_fail(writer: str, numbers: Iterable[int]) -> None:
        try:
            write(manager, writer, numbers, random.Random(f"{seed} {writer}"), pipe)
        except BaseException:
            failed.set()
            raise

    threads = [threading.Thread(target=write_or_fail, args=one) for one in writers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(failed.is_set())


class Writers:
    """Processes of writers, and their acknowledgements."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pipes = selectors.DefaultSelector()
        self.processes: list[multiprocessing.process.BaseProcess] = []

    def start(self, writers: Mapping[str, Iterable[int]], seed: str) -> None:
        read, written = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=work, args=(self._run, writers, seed, written))
        process.start()
        os.close(written)
        self._pipes.register(read, selectors.EVENT_READ, bytearray())
        self.processes.append(process)

    def take(self, most: int | None = None) -> None:
        """Acknowledgements, until no writer is left or there are so many more."""
        enough = None if most is None else len(self._run.acknowledged) + most
        while self._pipes.get_map() and (enough is None or len(self._run.acknowledged) < enough):
            ready = self._pipes.select(SILENCE_S)
            if not ready:
                raise FaultError(f"no patch was acknowledged for {SILENCE_S} s")
            for key, _ in ready:
                self._take_from(key)

    def _take_from(self, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 1 << 16)
        if not data:
            self._pipes.unregister(key.fd)
            os.close(key.fd)
        key.data.extend(data)
        whole = key.data.rfind(b"\n") + 1
        self._run.take(bytes(key.data[:whole]))
        del key.data[:whole]

    def end(self) -> None:
        """Whatever happens, no process is left. Raises nothing."""
        for process in self.processes:
            process.kill()
            process.join()
        for key in list(self._pipes.get_map().values()):
            os.close(key.fd)
        self._pipes.close()


def load(run: Run, *, patches: int, processes: int, writers: int, seed: int) -> str:
    """All patches are applied, each once, and in the ledger once; every lost race is there, too."""
    run.boot()
    began = time.perf_counter()
    crowd = Writers(run)
    try:
        for first in range(processes):
            shares = {f"w{number}": range(number, patches, writers) for number in range(first, writers, processes)}
            crowd.start(shares, f"{seed}")
        crowd.take()
        for process in crowd.processes:
            process.join()
            expect("a process's exit", process.exitcode, "one that is well", 0)
    finally:
        crowd.end()
    seconds = time.perf_counter() - began
    run.check_all()
    lost = sum(one.lost for one in run.acknowledged)
    expect("acknowledgements", len(run.acknowledged), "patches", patches)
    expect("applied events", run.kinds["WS_UPDATE_APPLIED"], "patches", patches)
    expect("rejected events", run.kinds["WS_UPDATE_REJECTED"], "lost races", lost)
    expect("their numbers", sorted(one.number for one in run.acknowledged), "all", list(range(patches)))
    return (
        f"{patches} patches by {writers} writers in {processes} processes in {seconds:.1f} s "
        f"({patches / seconds:.0f}/s), {lost} lost races; each patch is there once, in the working set and in the "
        f"ledger, and the file was whole at {run.looks} looks"
    )


def kill(run: Run, *, kills: int, seed: int) -> str:
    """After each kill every acknowledged patch is there, while the other writers go on; and then the run is whole."""
    run.boot()
    chance = random.Random(seed)
    for done in range(0, kills, KILL_PROCESSES):
        if done and (done == KILL_PROCESSES or chance.random() < TEAR_CHANCE):
            run.tear(chance)
            run.check()
        kill_some(run, f"w{done}", min(KILL_PROCESSES, kills - done), chance)
        run.check()
        if run.kinds["LEDGER_HEALED"] < run.torn:
            raise FaultError(f"{run.torn} tails were torn, and {run.kinds['LEDGER_HEALED']} healed")
    run.check_all()
    applied, known = run.kinds["WS_UPDATE_APPLIED"], len(run.acknowledged)
    return (
        f"{kills} kills (seed {seed}); each of {known} acknowledged patches is there, and {applied - known} whose "
        f"writer was killed before it said so; {run.torn} tails torn, {run.kinds['LEDGER_HEALED']} healed; "
        f"the file was whole at {run.looks} looks"
    )


def kill_some(run: Run, name: str, kills: int, chance: random.Random) -> None:
    """Begin new writers, and kill so many of their processes at some moment, and at last all."""
    crowd = Writers(run)
    try:
        for process in range(KILL_PROCESSES):
            names = [f"{name}.{process}.{writer}" for writer in range(KILL_WRITERS)]
            crowd.start({one: itertools.count() for one in names}, f"{chance.random()}")
        for victim in chance.sample(crowd.processes, kills):
            crowd.take(chance.randint(1, KILL_ACKNOWLEDGED))
            time.sleep(chance.uniform(0, KILL_DELAY_S))
            expect("a process's exit before its kill", victim.exitcode, "one that runs", None)
            victim.kill()
            victim.join()
            run.look()
            newest = max(one.update_seq for one in run.acknowledged)
            if run.manager().load()["_update_seq"] < newest:
                raise FaultError(f"patch {newest} was acknowledged and is not there")
        for rest in crowd.processes:
            rest.kill()
        crowd.take()
    finally:
        crowd.end()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.context.hammer", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--patches", type=int, default=0, help="how many are applied to one run")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--writers", type=int, default=32, help="threads, in all processes together")
    parser.add_argument("--kills", type=int, default=0, help="how many processes of writers are killed (SIGKILL)")
    parser.add_argument("--seed", type=int, default=None, help="of the pauses and of the moments of the kills")
    parser.add_argument("--root", type=Path, default=Path(), help="where the runs are made, and removed again")
    options = parser.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(dir=options.root, prefix="hammer-") as root:
        try:
            if options.patches:
                many = {"patches": options.patches, "processes": options.processes, "writers": options.writers}
                print(load(Run(Path(root) / "load"), **many, seed=seed))
            if options.kills:
                print(kill(Run(Path(root) / "kill"), kills=options.kills, seed=seed))
        except Exception as error:  # noqa: BLE001
            print(f"FAULT (seed {seed}): {type(error).__name__}: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
