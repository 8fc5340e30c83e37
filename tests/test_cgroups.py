"""Cgroups as far as files tell of them: in a folder like the kernel's. `test_cgroups_kernel.py` has the kernel."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runners import cgroups as module
from runners.base import Code, ProcessTarget, Workers
from runners.cgroups import Cgroups, Ground, UnavailableError, find, is_of_bus, sweep
from runners.faults import death
from runners.helper import AHEAD_AFTER
from runners.helpers import Helpers, has_namespace
from runners.process import ProcessRunner
from tests import programs
from tests.programs.a_home import COMMAND, a_home, script_of
from tests.support import PATIENCE_S, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runners.exits import Exit
    from runners.processes import Process

KERNEL_FILES = {
    "cgroup.controllers": "cpu memory pids\n",
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
    "cgroup.type": "domain\n",
    "cgroup.kill": "",
    "memory.max": "max\n",
    "memory.swap.max": "max\n",
    "memory.oom.group": "0\n",
    "memory.peak": "0\n",
    "memory.events": "low 0\nmax 0\noom 0\noom_kill 0\n",
    "memory.stat": "anon 0\nfile 0\nshmem 0\nslab_reclaimable 0\n",
}
ANOTHER = "aal-0123456789abcdef"


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": True})


@dataclass
class Tree:
    """Files that look like a tree of cgroups, and processes of which one thinks that it is in the cgroup `/unit`."""

    folder: Path
    busy: set[str] = field(default_factory=set)
    """Paths of cgroups that are not to be removed yet."""

    def __post_init__(self) -> None:
        self.root, self.proc = self.folder / "cgroup", self.folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.make(self.root)
        self.unit = self.make(self.root / "unit")
        self.be_in("/unit")
        self.mount(f"{self.root}")

    def make(self, path: str | Path) -> Path:
        """As the kernel does with mkdir(2)."""
        Path(path).mkdir()
        for name, text in KERNEL_FILES.items():
            Path(path, name).write_text(text)
        return Path(path)

    def remove(self, path: str | Path) -> None:
        """As the kernel does with rmdir(2)."""
        if str(path) in self.busy or any(entry.is_dir() for entry in Path(path).iterdir()):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        shutil.rmtree(path)

    def be_in(self, name: str) -> None:
        (self.proc / "self/cgroup").write_text(f"4:memory:/elsewhere\n0::{name}\n")

    def mount(self, place: str, root: str = "/") -> None:
        lines = "22 1 0:20 / /proc rw - proc proc rw\n"
        lines += f"31 22 0:28 {root} {place} rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
        (self.proc / "self/mountinfo").write_text(lines)

    def find(self, systemd: Path = Path("/nowhere")) -> Ground:
        return find(self.proc, systemd)

    @property
    def ours(self) -> list[str]:
        """The names of what buses have made, without their marks."""
        return sorted(path.name.rpartition("-")[2] for path in self.unit.glob("aal-*"))

    def call(self, name: str) -> Path:
        (found,) = self.unit.glob(f"aal-*-{name}")
        return found


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path / "kernel")
    monkeypatch.setattr(module, "make_folder", made.make)
    monkeypatch.setattr(module, "remove_folder", made.remove)
    return made


# Where they can be made


def test_who_is_alone_in_a_cgroup_may_have_what_is_below_it(tree: Tree) -> None:
    assert tree.find() == Ground(tree.unit, tree.unit)
    (tree.unit / "cgroup.procs").write_text(f"{os.getpid()}\n")
    assert tree.find() == Ground(tree.unit, tree.unit)


def test_a_cgroup_with_strangers_is_left_alone(tree: Tree) -> None:
    (tree.unit / "cgroup.procs").write_text(f"1\n{os.getpid()}\n77\n")
    with pytest.raises(UnavailableError, match=r"not alone in its cgroup .*: 2 other processes are there") as caught:
        tree.find()
    assert "Delegate=yes" in caught.value.hint


def test_in_the_root_of_all_strangers_do_not_count(tree: Tree) -> None:
    (tree.root / "cgroup.type").unlink()
    (tree.root / "cgroup.procs").write_text("1\n2\n")
    tree.be_in("/")
    assert tree.find() == Ground(tree.root, tree.root)


def test_where_systemd_runs_a_cgroup_is_only_ours_if_it_says_so(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match=r"systemd has not delegated .*/unit") as caught:
        tree.find(systemd=tree.folder)
    assert "Delegate=yes" in caught.value.hint
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"1" if name == "user.delegate" else b"0")
    assert tree.find(systemd=tree.folder).base == tree.unit


def test_of_a_delegated_cgroup_with_a_part_for_the_bus_the_whole_is_taken(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd's DelegateSubgroup=, where something else of the unit is beside the bus."""
    inner = tree.make(tree.unit / "main")
    (inner / "cgroup.procs").write_text("77\n")
    tree.be_in("/unit/main")
    with pytest.raises(UnavailableError, match="not alone"):
        tree.find()
    monkeypatch.setattr(os, "getxattr", lambda path, _: b"1" if path == tree.unit else b"0")
    assert tree.find(systemd=tree.folder) == Ground(tree.unit, inner)
    (tree.unit / "cgroup.procs").write_text("1\n")
    with pytest.raises(UnavailableError, match="not alone"):
        tree.find()


def test_without_the_controller_the_reason_is_told(tree: Tree) -> None:
    (tree.unit / "cgroup.controllers").write_text("cpu pids\n")
    with pytest.raises(UnavailableError, match=r"the memory controller is not to be had in .*/unit") as caught:
        tree.find()
    assert "cgroup_no_v1=all" in caught.value.hint


@pytest.mark.parametrize("name", ["", "/cgroup.procs", "/cgroup.subtree_control"])
def test_what_cannot_be_written_was_not_delegated(tree: Tree, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: str(path) != f"{tree.unit}{name}")
    with pytest.raises(UnavailableError, match=f"unit{name} cannot be written"):
        tree.find()


def test_a_cgroup_of_threads_is_none_for_memory(tree: Tree) -> None:
    (tree.unit / "cgroup.type").write_text("domain invalid\n")
    with pytest.raises(UnavailableError, match=r"for threads \(domain invalid\)"):
        tree.find()


def test_that_of_a_bus_is_not_another_bus_s(tree: Tree) -> None:
    tree.make(tree.unit / f"{ANOTHER}-bus")
    tree.be_in(f"/unit/{ANOTHER}-bus")
    with pytest.raises(UnavailableError, match="that of a bus already"):
        tree.find()


@pytest.mark.parametrize(
    ("name", "why"),
    [("/../unit", "is mounted nowhere"), ("/elsewhere", "is mounted nowhere"), (None, "no cgroup of v2")],
)
def test_a_cgroup_that_does_not_show_is_none(tree: Tree, name: str | None, why: str) -> None:
    tree.mount(str(tree.root), root="/unit")
    if name is None:
        (tree.proc / "self/cgroup").write_text("4:memory:/\n")
    else:
        tree.be_in(name)
    with pytest.raises(UnavailableError, match=why):
        tree.find()


def test_a_part_of_the_tree_may_be_mounted_and_anywhere(tree: Tree) -> None:
    place = tree.folder / "a place"
    tree.make(place)
    tree.make(place / "inner")
    tree.mount(str(place).replace(" ", r"\040"), root="/unit")
    tree.be_in("/unit/inner")
    assert tree.find().own == place / "inner"


# What a bus makes and undoes


def test_a_bus_goes_below_its_cgroup_and_comes_back(tree: Tree) -> None:
    ours = Cgroups(tree.find)
    ours.join()
    assert (ours.why_not, tree.ours) == (None, ["bus"])
    assert is_of_bus(str(tree.call("bus")))
    assert not any(map(is_of_bus, (str(tree.unit), f"{tree.unit}/{ANOTHER}-1")))
    assert (tree.call("bus") / "cgroup.procs").read_text() == "0"
    assert (tree.unit / "cgroup.subtree_control").read_text() == "+memory"
    ours.leave()
    assert (tree.unit / "cgroup.subtree_control").read_text() == "-memory"
    assert (tree.unit / "cgroup.procs").read_text() == "0"
    assert (ours.why_not, tree.ours) == ("it was closed", [])


def test_what_was_given_before_stays_given(tree: Tree) -> None:
    (tree.unit / "cgroup.subtree_control").write_text("memory pids\n")
    ours = Cgroups(tree.find)
    ours.join()
    ours.leave()
    assert (tree.unit / "cgroup.subtree_control").read_text() == "memory pids\n"


def test_all_is_undone_with_the_last_who_leaves(tree: Tree) -> None:
    ours = Cgroups(tree.find)
    ours.join()
    ours.join()
    ours.leave()
    assert tree.ours == ["bus"]
    ours.leave()
    assert tree.ours == []


def test_where_half_of_it_was_delegated_nothing_stays(tree: Tree) -> None:
    (tree.unit / "cgroup.subtree_control").unlink()
    (tree.unit / "cgroup.subtree_control").mkdir()  # which cannot be written either
    ours = Cgroups(lambda: Ground(tree.unit, tree.unit))
    ours.join()
    assert ours.why_not == f"{tree.unit}/cgroup.subtree_control: Is a directory"
    assert ours.make(1024) is None
    assert (tree.unit / "cgroup.procs").read_text() == "0"
    ours.leave()


def test_where_there_are_none_nothing_is_touched(tree: Tree) -> None:
    (tree.unit / "cgroup.procs").write_text("1\n")
    ours = Cgroups(tree.find)
    ours.join()
    assert ours.why_not is not None
    assert ours.make(1024) is None
    ours.leave()
    assert tree.ours == []
    assert (tree.unit / "cgroup.procs").read_text() == "1\n"


@pytest.fixture
def ours(tree: Tree) -> Any:
    made = Cgroups(tree.find)
    made.join()
    yield made
    made.leave()
    assert tree.ours == []


async def test_a_cgroup_has_its_limits_before_anybody_enters(tree: Tree, ours: Cgroups) -> None:
    made = ours.make(64 * 1024)
    assert made is not None
    assert {name: (tree.call("1") / name).read_text() for name in ("memory.max", "memory.swap.max")} == {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0ax\n",  # of a file that is none of the kernel's the rest stays
    }
    assert (tree.call("1") / "memory.oom.group").read_text() == "1\n"
    made.raise_to(32 * 1024)
    assert (tree.call("1") / "memory.max").read_text() == str(64 << 20)
    made.raise_to(128 * 1024)
    assert (tree.call("1") / "memory.max").read_text() == str(128 << 20)
    made.close()
    ours.release(made.path)


async def test_a_kernel_without_swap_or_groups_gives_one_too(
    tree: Tree, ours: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("memory.swap.max", "memory.oom.group"):
        monkeypatch.delitem(KERNEL_FILES, name)
    made = ours.make(1024)
    assert made is not None
    made.close()
    ours.release(made.path)


async def test_a_cgroup_that_takes_no_limit_is_no_cgroup(
    tree: Tree, ours: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(KERNEL_FILES, "memory.max")
    with pytest.raises(FileNotFoundError):
        ours.make(1024)
    await until(lambda: tree.ours == ["bus"])


async def test_one_that_is_still_being_emptied_is_removed_later(tree: Tree, ours: Cgroups) -> None:
    first, second = ours.make(1024), ours.make(1024)
    assert first is not None
    assert second is not None
    tree.busy.add(first.path)
    for made in (first, second):
        made.close()
        ours.release(made.path)
    await until(lambda: tree.ours == ["1", "bus"])
    tree.busy.clear()
    await until(lambda: tree.ours == ["bus"])


async def test_those_that_programs_have_made_go_with_it(tree: Tree, ours: Cgroups) -> None:
    made = ours.make(1024)
    assert made is not None
    tree.make(tree.make(Path(made.path, "theirs")) / "deeper")
    made.close()
    ours.release(made.path)
    await until(lambda: tree.ours == ["bus"])


# What it tells


@pytest.mark.parametrize(
    ("files", "kib"),
    [
        ({"memory.peak": "2097152\n"}, None),
        ({"memory.peak": "2097152\n", "memory.events": "oom 1\noom_kill 3\n"}, 2048),
        ({"memory.events": "oom 0\noom_kill 3\n"}, None),
        ({"memory.events": "oom 2\noom_kill 0\n"}, None),
        ({"memory.peak": None, "memory.events": "oom 1\noom_kill 1\n"}, 64 * 1024),
        ({"memory.events": None}, None),
    ],
    ids=["all is well", "over", "another's limit", "it went on", "old kernel", "gone"],
)
async def test_a_cgroup_tells_what_it_had_when_it_was_ended_at_its_limit(
    tree: Tree, ours: Cgroups, files: dict[str, str | None], kib: float | None
) -> None:
    made = ours.make(64 * 1024)
    assert made is not None
    for name, text in files.items():
        file = tree.call("1") / name
        file.write_text(text) if text is not None else file.unlink()
    assert made.excess_kib() == kib
    made.close()
    ours.release(made.path)


# What buses leave that are gone


def test_what_a_bus_has_left_that_is_gone_is_removed(tree: Tree) -> None:
    for name in (f"{ANOTHER}-bus", f"{ANOTHER}-1", f"{ANOTHER}-22", "aal-else", "other"):
        tree.make(tree.unit / name)
    sweep(tree.unit)
    assert sorted(path.name for path in tree.unit.iterdir() if path.is_dir()) == ["aal-else", "other"]


def test_what_lives_in_a_call_of_a_bus_that_is_gone_is_killed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    call = tree.make(tree.unit / f"{ANOTHER}-1")
    said: list[str] = []
    tree.busy.add(str(call))

    def look(_: float) -> None:
        said.append((call / "cgroup.kill").read_text())
        tree.busy.clear()

    monkeypatch.setattr(time, "sleep", look)
    sweep(tree.unit)
    assert said == ["1"]
    assert tree.ours == []


def test_what_a_bus_has_that_lives_stays(tree: Tree) -> None:
    for name in (f"{ANOTHER}-bus", f"{ANOTHER}-1"):
        tree.make(tree.unit / name)
    lock = os.open(tree.unit / f"{ANOTHER}-bus", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    sweep(tree.unit)
    assert tree.ours == ["1", "bus"]
    os.close(lock)
    sweep(tree.unit)
    assert tree.ours == []


def test_what_cannot_be_removed_is_said_and_keeps_nothing_else(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "ENDING_S", 0)
    stays = tree.make(tree.unit / f"{ANOTHER}-1")
    tree.make(tree.unit / "aal-ffffffffffffffff-1")
    tree.busy.add(str(stays))
    sweep(tree.unit)
    assert tree.ours == ["1"]
    assert f"of {ANOTHER} cannot be removed" in caplog.text


# What programs do with it


@dataclass
class Bench:
    tree: Tree
    mode: str
    cgroups: Cgroups
    helpers: Helpers
    stdins: list[int] = field(default_factory=list)

    async def launch(self, most_kib: int = 0) -> Process:
        """A `hostile.py`, which runs until it is killed."""
        pool = self.helpers.pool(a_home("cgroup", program=COMMAND[0]), script_of(self.mode))
        helper = pool.any()
        if helper is None:
            helper = await asyncio.wait_for(pool.ready(), PATIENCE_S)
        reader, stdin = os.pipe()
        null = os.open(os.devnull, os.O_WRONLY)
        self.stdins.append(stdin)
        try:
            return helper.launch([*COMMAND, "cgroup", "hold"], (reader, null, 2), {}, 0, most_kib, held_kib=64 * 1024)
        finally:
            os.close(reader)
            os.close(null)

    def file(self, process: Process, name: str) -> Path:
        """One of its cgroup's."""
        assert process.cgroup is not None
        return Path(process.cgroup.path, name)

    async def has_entered(self, process: Process) -> None:
        procs = self.file(process, "cgroup.procs")
        await until(lambda: procs.read_text() == "0")

    @staticmethod
    async def end(process: Process) -> Exit:
        process.signal(signal.SIGKILL)
        return await asyncio.wait_for(asyncio.shield(process.ended), PATIENCE_S)


@pytest.fixture(params=["spawn", "fork"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[True, False], ids=["namespace", "subreaper"])
async def bench(tree: Tree, mode: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    if request.param and not await has_namespace(tmp_path):
        pytest.skip("this kernel gives no pid namespace")
    before = programs.held()
    cgroups = Cgroups(tree.find)
    made = Bench(tree, mode, cgroups, Helpers(most=1, namespace=request.param, cgroups=cgroups))
    yield made
    await made.helpers.close()
    for stdin in made.stdins:
        os.close(stdin)
    assert tree.ours == []
    await until(lambda: programs.held() == before)


async def test_a_program_enters_its_cgroup_by_itself(bench: Bench) -> None:
    """Also the one that was forked ahead, which has nothing to enter any more."""
    for _ in range(5):
        process = await bench.launch()
        await bench.has_entered(process)
        assert bench.file(process, "memory.max").read_text() == str(64 << 20)
        await bench.end(process)


@pytest.mark.parametrize("mode", ["fork"])
async def test_a_fork_ahead_waits_in_the_cgroup_of_the_next_call(bench: Bench) -> None:
    for _ in range(AHEAD_AFTER):
        await bench.end(await bench.launch())
    place = str(AHEAD_AFTER + 1)
    await until(lambda: place in bench.tree.ours)
    procs = bench.tree.call(place) / "cgroup.procs"
    await until(lambda: procs.read_text() == "0")
    procs.write_text("")
    process = await bench.launch()
    assert bench.file(process, "cgroup.procs") == procs
    await process.memory_mb()  # which is told after it was started
    assert procs.read_text() == ""
    assert bench.file(process, "memory.max").read_text() == str(64 << 20)
    await bench.end(process)


async def test_several_at_once_have_one_each(bench: Bench) -> None:
    running = [await bench.launch() for _ in range(8)]
    assert len({bench.file(process, "") for process in running}) == 8
    for process in running:
        await bench.has_entered(process)
    for process in running:
        await bench.end(process)


async def test_a_program_that_cannot_enter_does_not_run(
    bench: Bench, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = bench.cgroups.make

    def with_a_full_one(limit_kib: int) -> Any:
        made = make(limit_kib)
        assert made is not None
        made.close()
        made.procs = os.open("/dev/full", os.O_WRONLY)
        return made

    monkeypatch.setattr(bench.cgroups, "make", with_a_full_one)
    process = await bench.launch()
    ended = await asyncio.wait_for(asyncio.shield(process.ended), PATIENCE_S)
    if bench.mode == "spawn":
        assert (ended.failed and ended.failed.errno) == errno.ENOSPC
    else:
        assert ended.code == os.EX_OSERR
        assert "the cgroup of the call cannot be entered: No space left on device" in capfd.readouterr().err


async def test_where_the_kernel_makes_no_more_the_call_is_only_looked_at(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: str) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    await bench.end(await bench.launch())
    monkeypatch.setattr(module, "make_folder", refuse)
    for _ in range(2):  # of which one may have what was made before
        process = await bench.launch()
        await bench.end(process)
    assert process.cgroup is None
    assert "a program of test has no cgroup: Resource temporarily unavailable" in caplog.text


async def test_an_end_at_the_limit_is_told_with_the_figure(bench: Bench) -> None:
    process = await bench.launch()
    bench.file(process, "memory.events").write_text("oom 1\noom_kill 2\n")
    bench.file(process, "memory.peak").write_text(str(64 << 20))
    ended = await bench.end(process)
    assert (ended.at_limit, ended.had_too_much, ended.peak_mb) == (True, True, 64.0)
    fault = death(ended)
    assert fault.code == Code.MEMORY_LIMIT
    assert str(fault) == "needed more memory than it may use, and was ended with 64.0 MiB"


async def test_of_what_the_kernel_has_ended_no_other_reason_is_told(bench: Bench) -> None:
    """Such as that it had too much in scratch, which is looked at once it has ended."""
    process = await bench.launch(most_kib=1)  # which its helper ends, too
    bench.file(process, "memory.events").write_text("oom 1\noom_kill 1\n")
    ended = await asyncio.wait_for(asyncio.shield(process.ended), PATIENCE_S)
    assert (ended.at_limit, ended.lost) == (True, None)


async def test_the_call_is_told_that_it_needed_more(tree: Tree) -> None:
    runner = ProcessRunner(Helpers(most=1, cgroups=Cgroups(tree.find)), kill_grace_s=0.1)
    token = f"cgroup-{os.getpid()}"
    job = programs.make_job(ProcessTarget(("sleep", "60"), {**programs.ENV, "TOKEN": token}))
    calling = asyncio.create_task(runner.run(job))
    await until(lambda: "1" in tree.ours and (tree.call("1") / "cgroup.procs").read_text() == "0")
    (tree.call("1") / "memory.events").write_text("oom 1\noom_kill 1\n")
    (tree.call("1") / "memory.peak").write_text(str(256 << 20))
    await until(lambda: len(programs.running(token)) == 1)
    os.kill(programs.running(token)[0], signal.SIGKILL)
    outcome = await asyncio.wait_for(calling, PATIENCE_S)
    await runner.close()
    assert (outcome.code, outcome.peak_mb) == (Code.MEMORY_LIMIT, 256.0)
    assert outcome.error == (
        "the program needed more memory than the 256 MiB that it may use, when it had 256.0, and was ended"
    )


async def test_a_worker_has_one_for_its_life_and_more_with_a_call_that_may_have_more(tree: Tree) -> None:
    runner = ProcessRunner(Helpers(most=1, cgroups=Cgroups(tree.find)), kill_grace_s=0.1)
    target = ProcessTarget(programs.argv("worker.py"), programs.ENV, mode="worker", workers=Workers())
    job = programs.make_job(target)
    job = job._replace(envelope=json.dumps({"request_id": job.request_id, "payload": {}}).encode())
    for hard_mb, limit_mb in ((64, 64), (32, 64), (256, 256)):
        assert (await runner.run(job._replace(hard_mb=hard_mb))).ok
        assert (tree.ours, (tree.call("1") / "memory.max").read_text()) == (["1", "bus"], str(limit_mb << 20))
    await runner.close()
    assert tree.ours == []


async def test_without_cgroups_nothing_of_them_is_there(tree: Tree, mode: str) -> None:
    made = Bench(tree, mode, Cgroups(tree.find), Helpers(most=1))
    process = await made.launch()
    assert process.cgroup is None
    await made.end(process)
    await made.helpers.close()
    os.close(made.stdins[0])
    assert tree.ours == []
