"""A folder of runs, where all comes together.

    ROOT/memory.v2.1.sqlite                          long-term memory of all runs
    ROOT/<run_id>/state/working_set.v2.1.json        the working set, and state/.lock, the lock of the run
    ROOT/<run_id>/ledger/run.v2.1.jsonl              the ledger, and ledger/.lock
    ROOT/<run_id>/episodes/episode_000001.v2.1.json  read-only; .jsonl beside it: its lines of the ledger
    ROOT/<run_id>/resume/pack_<pack_id>.zip          or a folder of that name without .zip
    ROOT/<run_id>/memory/pending.v2.1.jsonl          what the pack of a loaded run remembers, until it is proposed

Several processes may work on one folder: what is kept in memory here is only what the files say anew.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aos_context import resume_pack
from aos_context.artifacts import described, now
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.errors import ContextError, ExistsError, ForbiddenError, NotFoundError, SchemaError
from aos_context.files import make_folder
from aos_context.layout import DATABASE, LEDGER, WORKING_SET
from aos_context.ledger import FileLedger
from aos_context.memory_store import RecordingMemoryStore
from aos_context.run import Brought, Means, Run, random_id
from aos_context.scratch import sweep
from aos_context.tokens import estimate
from aos_context.ws_manager import WorkingSetManager

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aos_context.artifacts import Document
    from aos_context.memory_store import MemoryStore
    from aos_context.tokens import Count

RUN_ID = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ID_SHOWN = 100
"""Characters of what is no id that its refusal shows."""
OPEN_RUNS = 1_000
"""So many runs are kept open; one more closes the one that was not asked for the longest."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """`from_run_id` is the run that was packed; `memory` what its pack has brought, None where nothing is new."""

    run: Run
    from_run_id: str
    pack_id: str
    memory: Brought | None
    pointers: Document
    """As `snapshot` was given them."""


class Page(NamedTuple):
    """Some of the runs, as `Runs.list` has them."""

    runs: list[Document]
    next: str | None
    """What is to be given as `after` for the next page; None where this is the last."""


class _Change(NamedTuple):
    """When a run changed last, by which runs are listed."""

    mtime_ns: int
    run_id: str


class _Open(NamedTuple):
    run: Run
    folder: tuple[int, int, int]
    """Device, inode and time of the folder: what a run knows is of that folder, and not of another of its name."""


class Runs:
    """The runs in a folder, which is made with the first one."""

    def __init__(
        self,
        root: Path,
        *,
        memory: MemoryStore,
        config: Config = DEFAULT_CONFIG,
        count: Count = estimate,
        testing: bool = False,
    ) -> None:
        self.root = root
        self.config, self.count = config, count
        self._means = Means(memory, config, count, testing)
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._mutex = threading.Lock()

    def sweep(self) -> None:
        """Remove what was left by processes that were killed while they loaded a pack; others' work is left alone."""
        sweep(self.root)

    def boot(
        self,
        objective: str,
        *,
        acceptance_criteria: Sequence[str] = (),
        constraints: Sequence[str] = (),
        run_id: str | None = None,
        task_id: str | None = None,
        thread_id: str | None = None,
        actor: str | None = None,
    ) -> Document:
        """The working set of a new run. Raises `ExistsError`, `SchemaError`, `LimitError`."""
        if run_id is None:
            run_id = random_id("run")
        else:
            self._refuse_heir(run_id)
        folder = self._folder(run_id)
        ledger = FileLedger(folder / LEDGER, run_id=run_id)
        working_set = WorkingSetManager(
            folder / WORKING_SET, config=self.config, ledger=ledger, count=self._means.count
        )
        return working_set.create_initial(
            task_id=random_id("task") if task_id is None else task_id,
            thread_id=random_id("thread") if thread_id is None else thread_id,
            run_id=run_id,
            objective=objective,
            acceptance_criteria=acceptance_criteria,
            constraints=constraints,
            actor=actor,
        )

    def open(self, run_id: str) -> Run:
        """Raises `NotFoundError`. Nothing is written."""
        require_run_id(run_id)
        if not _is_run(self.root / run_id):
            raise NotFoundError(f"there is no run {run_id!r}", run_id=run_id)
        with self._mutex:
            run = self._look_up(run_id)
            self._open[run_id] = run
            self._open.move_to_end(run_id)
            if len(self._open) > OPEN_RUNS:
                self._open.popitem(last=False)
        return run.run

    def list(self) -> list[Document]:
        """What each run is about and where it stands, the one that changed last first; a broken one says so.

        When a run changed is the time of its working set's file, and for runs of one time their ids decide.
        """
        return [self._summary(change.run_id) for change in sorted(self._changes(), reverse=True)]

    def page(self, limit: int, after: str | None = None) -> Page:
        """At most `limit` of the list, behind what another page has as `next`. Only theirs are read of all runs.

        While the clock is not set back, no run stands on two pages. What changes between two pages moves to the front
        of the list, and may stand on none of them; so may one that is made meanwhile. `after` is what a page has as
        `next`: nanoseconds since 1970 and a run id, with a comma between; `ValueError` for what is not.
        """
        changes = self._changes()
        if after is not None:
            mtime_ns, _, run_id = after.partition(",")
            last = _Change(int(mtime_ns), run_id)
            changes = (change for change in changes if change < last)
        found = heapq.nlargest(limit + 1, changes)
        runs = [self._summary(change.run_id) for change in found[:limit]]
        return Page(runs, f"{found[limit - 1].mtime_ns},{found[limit - 1].run_id}" if len(found) > limit else None)

    def load_pack(self, pack_path: str, new_run_id: str | None = None, *, actor: str | None = None) -> Loaded:
        """`load_file` for callers who may name paths in the folder of runs only. Raises `ForbiddenError`."""
        return self.load_file(self._pack(pack_path), new_run_id, actor=actor)

    def load_file(self, path: Path, new_run_id: str | None = None, *, actor: str | None = None) -> Loaded:
        """Verify a pack and go on from it as a run of its own.

        Without a new id the run keeps its own if that is free here, else it gets a new one. Memories of the pack are
        proposed and not committed: the rule of the two keys holds for packs, too. Raises `NotFoundError`,
        `PackError`, `ExistsError`, `SchemaError`; where memory cannot be reached what it raises, and then the run is
        there (`run_id` of the error) and proposes them with its next change.
        """
        if new_run_id is not None:
            self._folder(new_run_id)
        make_folder(self.root)
        with resume_pack.check(path, self.config, workspace=self.root) as checked:
            from_run_id, pack_id = checked.manifest["run_id"], checked.manifest["pack_id"]
            run_id: str = new_run_id or from_run_id
            if run_id != from_run_id:
                self._refuse_heir(run_id)
            try:
                self._unpack(checked, run_id, actor)
            except ExistsError:
                if new_run_id is not None:
                    raise
                run_id = random_id("run")
                self._unpack(checked, run_id, actor)
        run = self.open(run_id)
        try:
            brought = run.bring()
        except ContextError as error:
            error.members["run_id"] = run_id
            error.hint = f"Run {run_id} is loaded, and proposes what its pack remembers with its next change."
            raise
        return Loaded(run, from_run_id, pack_id, brought, checked.manifest["pointers"])

    def _unpack(self, checked: resume_pack.CheckedPack, run_id: str, actor: str | None) -> None:
        resume_pack.unpack(checked, self._folder(run_id), now=now(), run_id=run_id, actor=actor)

    def _look_up(self, run_id: str) -> _Open:
        """The one that is open, if that is the one that is there. Raises `NotFoundError`."""
        folder, found = self.root / run_id, self._open.get(run_id)
        try:
            status = folder.stat()
        except FileNotFoundError:
            raise NotFoundError(f"there is no run {run_id!r}", run_id=run_id) from None
        identity = status.st_dev, status.st_ino, status.st_mtime_ns  # an inode alone may come again, too
        return found if found is not None and found.folder == identity else _Open(self._run(folder), identity)

    def _run(self, folder: Path) -> Run:
        return Run(folder, folder.name, self._means)

    def _refuse_heir(self, run_id: str) -> None:
        """Raises `ExistsError` where memory knows an earlier run of this name, whose proposals and memories it has."""
        memory = self._means.memory
        knows = isinstance(memory, RecordingMemoryStore) and bool(memory.batches(run_id))
        if knows and not _is_run(self.root / run_id):
            hint = "Take another id: what that run proposed and remembered would become this one's."
            raise ExistsError(f"memory has batches of a run {run_id!r}", hint=hint, run_id=run_id)

    def _folder(self, run_id: str) -> Path:
        """Where a new run comes to lie. Raises `SchemaError` for what is no run's name."""
        if not RUN_ID.fullmatch(run_id) or run_id.startswith(DATABASE):
            rule = "letters, digits, '.', '_' and '-', 128 at most, and no file's"
            message = f"{described(run_id)} is no name for a run: {rule}"
            raise SchemaError("working_set", [{"path": "$.run_id", "message": message}])
        return self.root / run_id

    def _pack(self, pack_path: str) -> Path:
        """The path from the current folder, or from the root of runs. Raises `ForbiddenError`, `NotFoundError`."""
        root = self.root.resolve()
        try:
            found = [path for start in (Path(), root) if (path := (start / pack_path).resolve()).is_relative_to(root)]
            there = next((path for path in found if path.exists() and path != root), None)
        except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name that is too long, links in a circle
            raise NotFoundError(f"there is no pack {pack_path[:100]!r}: {error}") from None
        if not found:
            hint = "Put the pack into the folder of runs, and give its path from there."
            raise ForbiddenError(f"{pack_path} lies outside the folder of runs", hint=hint)
        if there is None:
            raise NotFoundError(f"there is no pack {pack_path}")
        return there

    def _changes(self) -> Iterator[_Change]:
        """Of all runs, in no order."""
        if not self.root.is_dir():
            return
        with os.scandir(self.root) as entries:
            for entry in entries:
                if RUN_ID.fullmatch(entry.name):
                    mtime_ns = _changed_ns(entry.path)
                    if mtime_ns is not None:
                        yield _Change(mtime_ns, entry.name)

    def _summary(self, run_id: str) -> Document:
        try:
            ws = self._look_up(run_id).run.ws()  # a list opens none for good
        except ContextError as error:
            return {"run_id": run_id, "updated_at": "", "error": str(error), "code": error.code}
        kept = ("objective", "status", "current_stage", "_update_seq", "created_at", "updated_at", "task_id")
        return {"run_id": run_id, **{name: ws[name] for name in kept}}


def require_run_id(run_id: str) -> None:
    """Raises `NotFoundError` for what is no id: there is no run of it."""
    if not RUN_ID.fullmatch(run_id):
        shown = run_id[:ID_SHOWN]
        raise NotFoundError(f"there is no run {shown!r}", run_id=shown)


def _is_run(folder: Path) -> bool:
    return (folder / LEDGER).is_file() or (folder / WORKING_SET).is_file()


def _changed_ns(folder: str) -> int | None:
    """Of the working set's file, or, where only the ledger has the run yet, of that; None where there is no run."""
    for name in (WORKING_SET, LEDGER):
        with contextlib.suppress(OSError):  # it is not there, or is not in a folder
            found = os.stat(f"{folder}/{name}")  # noqa: PTH116  # of ten thousand runs, at a third of a Path's cost
            if stat.S_ISREG(found.st_mode):
                return found.st_mtime_ns
    return None
