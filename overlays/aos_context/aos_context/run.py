"""One run: its working set, ledger, episodes, memory and packs, changed under one lock.

The decision that a reader could not guess: a milestone is four steps (memory, its event, the episode, its event), and
no step is undone. A run that was cut off between them is made good by whoever changes it next: what stands in the
memory store or among the episodes without its event gets the event, and what the pack of a loaded run remembers is
proposed, if it was not. Readers change nothing. That something was cut off is seen by a file that lies there during a
change; who opens a run looks once in any case, for a power cut may have taken that file.

The double-key rule stands here and not in the store: memory is proposed at any time, and committed as part of a
milestone, or by the bus in its phase SEAL.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aos_context import context_brief, resume_pack
from aos_context.artifacts import now, sha256, to_json
from aos_context.episode import EpisodeStore
from aos_context.errors import (
    BrokenError,
    BusyError,
    GateError,
    NotFoundError,
    PackError,
    SchemaError,
    UnreachableError,
)
from aos_context.files import FILE_MODE
from aos_context.layout import CHANGING, EPISODES, LEDGER, PACKS, PENDING_MEMORY, WORKING_SET
from aos_context.ledger import FileLedger
from aos_context.memory_store import CommitResult, ProposeResult, RecordingMemoryStore, Waiting
from aos_context.noted import Noted
from aos_context.pack_content import read_items
from aos_context.recall import recalled
from aos_context.scratch import sweep
from aos_context.ws_manager import WorkingSetManager

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.config import Config
    from aos_context.memory_store import Batch, Hit, MemoryStore
    from aos_context.resume_pack import Snapshot
    from aos_context.tokens import Count
    from aos_context.ws_manager import PatchResult

SOURCE_REFS_MOST = 100
"""Of one memory, as its schema has it."""


@dataclass(frozen=True, slots=True)
class Means:
    """What all runs of a root share. `testing` lets a caller commit memory outside a milestone."""

    memory: MemoryStore
    config: Config
    count: Count
    testing: bool = False


@dataclass(frozen=True, slots=True)
class Milestone:
    """`already`: the same milestone was reached before, and this is its episode."""

    episode: Document
    sha256: str
    memory: CommitResult | None
    already: bool = False


class Checked(NamedTuple):
    """How many events and episodes a run has, all looked at; `shown` is the last line that an episode stands for."""

    events: int
    episodes: int
    shown: int


@dataclass(frozen=True, slots=True)
class Brought:
    """What a pack has brought: it waits in a batch. `left_out`: how many were more than one batch holds."""

    batch_id: str
    staged: int
    duplicates: int
    left_out: int


class Run:
    """A run that is there. Safe to use from several threads, and beside other processes."""

    def __init__(self, folder: Path, run_id: str, means: Means) -> None:
        self.folder, self.run_id = folder, run_id
        self._means = means
        self._ledger = FileLedger(folder / LEDGER, run_id=run_id)
        self._working_set = WorkingSetManager(
            folder / WORKING_SET, config=means.config, ledger=self._ledger, count=means.count
        )
        self._episodes = EpisodeStore(folder / EPISODES)
        self._noted = Noted(self._ledger)
        self._records = means.memory if isinstance(means.memory, RecordingMemoryStore) else None
        self._was_mended = False
        """Whether all that was cut off before this was opened is made good."""

    # What is read: nothing is written for it

    def ws(self) -> Document:
        """Raises `NotFoundError`, `BrokenError`."""
        return self._working_set.load()

    def events(self, *, limit: int, after: int | None = None) -> list[Document]:
        """The events behind line `after`, else the last ones; the oldest first."""
        return self._ledger.tail(limit) if after is None else list(self._ledger.read(after=after, limit=limit))

    def last_seq(self) -> int:
        return self._ledger.last_seq()

    def episodes(self, *, limit: int | None = None, after: int | None = None) -> list[Document]:
        """The first first; with a limit the last ones, or those behind `after`. `BrokenError` where one was changed."""
        return self._episodes.list(limit=limit, after=after)

    def episode(self, number: int) -> Document:
        """Raises `NotFoundError`, `BrokenError`."""
        return self._episodes.load(number)

    def search(self, query: str, filters: Mapping[str, Any] | None = None, top_k: int | None = None) -> list[Hit]:
        """What is remembered for all runs, for this task and for this run. Raises `SchemaError`."""
        ws = self.ws()
        here = {"task_id": ws["task_id"], "run_id": self.run_id}
        config = self._means.config
        wanted = config.search_top_k if top_k is None else top_k
        if isinstance(wanted, int):  # the store says what is wrong with any other
            wanted = min(wanted, config.search_max_hits)
        return self._means.memory.search(query, {**(filters or {}), **here}, wanted)

    def waiting(self, *, limit: int) -> list[Waiting]:
        """The last batches that this run has proposed and that a milestone of it can still commit, oldest first."""
        if self._records is not None:
            return self._records.waiting(self.run_id, limit)
        with self._working_set.locked():
            self._noted.catch_up()
            return [Waiting(one) for one in sorted(self._noted.proposed - self._noted.committed.keys())[-limit:]]

    def brief(self, *, budget_tokens: int | None = None, query: str | None = None) -> str:
        """Markdown for a model's prompt, with what memory has on the query, else on objective and next action.

        What a memory must have in common with it is in `recall`.
        """
        ws = self.ws()
        words = f"{ws['objective']} {ws['next_action']}" if query is None else query
        config = self._means.config
        budget = config.brief_max_tokens if budget_tokens is None else budget_tokens
        hits, last = recalled(self.search, words, config.search_top_k), self._episodes.last()
        return context_brief.render(ws, hits, budget_tokens=budget, count=self._means.count, last_episode=last)

    def check(self) -> Checked:
        """Look at the working set, at each event and at each episode, from the first to the last.

        The lines up to `shown` are those that were written, for the episodes have their hashes. Of those behind only
        the form is known, and that the working set is as they left it. Raises `BrokenError` that names the first file
        that is not what was written.
        """
        self.ws()
        last = self._episodes.last()
        events, episodes = sum(1 for _ in self._ledger.read()), self._episodes.verify()
        return Checked(events, episodes, last["ledger"]["last_seq"] if last else 0)

    def pack(self, name: str) -> Path:
        """A zipped resume pack of this run. Raises `NotFoundError`."""
        path = self.folder / PACKS / name
        if "/" in name or not name.startswith("pack_") or not name.endswith(".zip") or not path.is_file():
            hint = "Only a pack that was made with zip_pack true can be downloaded."
            raise NotFoundError(f"run {self.run_id} has no pack {name!r}", hint=hint)
        return path

    # What changes the run: under its lock, and each with its event

    def update(self, patch: Document, *, actor: str | None = None) -> PatchResult:
        """Raises `StaleError`, `SchemaError`, `LimitError`."""
        if (self.folder / PENDING_MEMORY).exists():
            with contextlib.suppress(BusyError, UnreachableError), self._changing():  # no patch waits for memory
                pass
        return self._working_set.apply_patch(patch, actor=actor)

    def propose(
        self, mcrs: Sequence[Document], *, writer: str | None = None, actor: str | None = None
    ) -> ProposeResult:
        """Stage changes of memory, which wait for a milestone. Raises `SchemaError`, `NotFoundError`."""
        with self._changing():
            return self._propose(mcrs, writer, actor)

    def bring(self) -> Brought | None:
        """Propose what the pack remembers that this run was loaded from, where no change of it has done so before.

        Those are its active memories that this memory does not have, as one batch. None where nothing is new. Raises
        as `propose`; then the next change of the run does it.
        """
        with self._changing():
            said = self._noted.brought
        if said is None or not said["staged"]:
            return None
        return Brought(said["batch_id"], said["staged"], said["duplicates"], said["pack"]["left_out"])

    def commit(
        self,
        batch_id: str,
        *,
        sealed: bool = False,
        allow_outside_milestone: bool = False,
        committed_by: str | None = None,
        actor: str | None = None,
    ) -> CommitResult:
        """Outside a milestone: for the bus in SEAL, and where tests ask for it. Raises `GateError`, `NotFoundError`."""
        with self._changing():
            if sealed or (allow_outside_milestone and self._means.testing):
                return self._commit(batch_id, committed_by, actor)
            why = "memory is committed at a milestone only"
            if allow_outside_milestone:
                why += "; allow_outside_milestone is for a service that was started with --testing"
            self._note("MEMORY_COMMIT_REFUSED", actor, batch_id=batch_id, detail=why)
            raise GateError(f"batch {batch_id}: {why}", batch_id=batch_id)

    def milestone(
        self,
        reason: str,
        *,
        next_entry_point: str | None = None,
        memory_batch_id: str | None = None,
        request_id: str | None = None,
        committed_by: str | None = None,
        actor: str | None = None,
    ) -> Milestone:
        """Commit the batch, then make the episode. Raises `NotFoundError` (the batch), `SchemaError`.

        With the `request_id` of an episode it is that one again; without one only a batch tells a repetition, and only
        that of the last one. Raises `NotFoundError`, too, for an episode that the pack of a loaded run does not have.
        """
        with self._changing():
            ws, last = self.ws(), self._episodes.last()
            same = self._of_request(request_id)
            if same is not None:
                self._require_same(same, reason, next_entry_point, memory_batch_id)
            memory = None if memory_batch_id is None else self._commit(memory_batch_id, committed_by, actor)
            if same is None and last is not None and memory is not None:
                same = last if self._is_repeated(last, memory, reason, next_entry_point) else None
            if same is not None:
                return Milestone(same, self._episodes.sha256(same["number"]), memory, already=True)
            episode = self._create_episode(ws, last, memory, reason, next_entry_point, request_id=request_id)
            file_sha256 = self._note_episode(episode, actor)
        return Milestone(episode, file_sha256, memory)

    def snapshot(
        self,
        *,
        zip_pack: bool = True,
        pointers: Document | None = None,
        packed_by: str | None = None,
        actor: str | None = None,
    ) -> Snapshot:
        """Pack the run as it is now; `packed_by` as the bus's request. Raises `SchemaError`, `LimitError`."""
        with self._changing():
            packing = resume_pack.prepared(
                self.folder,
                pack_id=secrets.token_hex(8),
                zip_pack=zip_pack,
                pointers=pointers or {},
                packed_by=packed_by,
                memory_items=self._remembered(),
                now=now(),
                working_set=self.ws(),
                config=self._means.config,
            )
            with packing as ready:
                self._note_pack(ready.snapshot, actor)
                return ready.place()

    # The steps, under the lock

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the run's lock, and make good first what was cut off, where that may be."""
        mark = self.folder / CHANGING
        with self._working_set.locked():
            self._noted.catch_up()
            if mark.exists() or not self._was_mended:
                self._mend()
            mark.touch(FILE_MODE)
            self._was_mended = True
            yield
            mark.unlink()  # what ends with an error leaves it, as a kill does

    def _propose(self, mcrs: Sequence[Document], writer: str | None, actor: str | None) -> ProposeResult:
        proposed = self._stage(mcrs, writer)
        self._note_proposed(proposed, actor)
        return proposed

    def _stage(self, mcrs: Sequence[Document], writer: str | None) -> ProposeResult:
        where = {"task_id": self.ws()["task_id"], "run_id": self.run_id}
        return self._means.memory.propose(mcrs, where if writer is None else {**where, "writer": writer})

    def _has(self, item_id: str) -> bool:
        """Where the memory cannot say it, its gate tells duplicates all the same."""
        return self._records is not None and self._records.item(item_id) is not None

    def _commit(self, batch_id: str, committed_by: str | None, actor: str | None) -> CommitResult:
        self._require_own(batch_id)
        if self._records is None:
            committed = self._means.memory.commit(batch_id)
        else:
            committed = self._records.commit(batch_id, committed_by=committed_by)
        self._note_committed(committed, committed_by, actor)
        return committed

    def _require_own(self, batch_id: str) -> None:
        """Raises `NotFoundError` for a batch that this run has not proposed."""
        if batch_id in self._noted.proposed:
            return
        batch = None if self._records is None else self._records.batch(batch_id)
        if batch is None or batch.run_id != self.run_id:
            raise NotFoundError(f"run {self.run_id} has proposed no batch {batch_id}", batch_id=batch_id)
        self._note_proposed(ProposeResult(batch_id, len(batch.mcrs)), None)

    def _remembered(self) -> list[Document]:
        """What this run has committed, each memory as the last of its batches left it, whatever others made of it."""
        found: dict[str, Document] = {}
        for batch_id in self._noted.committed:
            try:
                found |= {item["id"]: item for item in self._recorded(batch_id)}
            except NotFoundError:
                why = f"run {self.run_id} has committed the batch {batch_id}, and the memory does not have it"
                raise BrokenError(why, hint="Use the memory that the run was made with.") from None
        return list(found.values())

    def _recorded(self, batch_id: str) -> list[Document]:
        """Raises `NotFoundError`."""
        return self._means.memory.commit(batch_id).items if self._records is None else self._records.recorded(batch_id)

    def _of_request(self, request_id: str | None) -> Document | None:
        """The episode that was made for it. Raises `NotFoundError` where that was left where the run was packed."""
        number = None if request_id is None else self._noted.requests.get(request_id)
        if number is None:
            return None
        if number not in self._episodes.numbers():
            why = f"the request {request_id} has made episode {number}, which the pack of this run did not bring"
            raise NotFoundError(why, hint="Ask with another request_id for another milestone.", number=number)
        return self._episodes.load(number)

    def _is_repeated(self, last: Document, memory: CommitResult, reason: str, next_entry_point: str | None) -> bool:
        """Whether the last episode is that of the same request: its answer was lost, and it is made once more."""
        happened = self._noted.episode_seq < self._ledger.last_seq()
        same = (last["reason"], last["next_entry_point"]) == (reason, next_entry_point)
        return memory.already and same and last["memory"]["batch_id"] == memory.batch_id and not happened

    def _require_same(self, last: Document, reason: str, next_entry_point: str | None, batch_id: str | None) -> None:
        """Raises `SchemaError` where a request that is repeated asks for another milestone than the first time."""
        same = (last["reason"], last["next_entry_point"]) == (reason, next_entry_point)
        made = last["memory"]["batch_id"]
        if made is None and batch_id is not None:  # an episode before may have had it
            same = same and batch_id in self._noted.committed
        elif made != batch_id:
            same = False
        if not same:
            message = f"is that of episode {last['number']}, which is another milestone"
            raise SchemaError("milestone request", [{"path": "$.request_id", "message": message}])

    def _create_episode(
        self,
        ws: Document,
        last: Document | None,
        memory: CommitResult | None,
        reason: str,
        next_entry_point: str | None,
        *,
        request_id: str | None,
    ) -> Document:
        first_seq = 1 if last is None else last["ledger"]["last_seq"] + 1
        if memory is not None and self._noted.committed.get(memory.batch_id, 0) < first_seq:
            memory = None  # an episode before has it
        return self._episodes.create(
            run_id=self.run_id,
            task_id=ws["task_id"],
            reason=reason,
            next_entry_point=next_entry_point,
            request_id=request_id,
            ws_before=self._booted(ws) if last is None else last["ws_after"],
            ws_after=ws,
            ledger_lines=self._ledger.lines(first_seq - 1),
            first_seq=first_seq,
            memory_batch_id=None if memory is None else memory.batch_id,
            memory_items=[] if memory is None else list(memory.items),
        )

    def _booted(self, otherwise: Document) -> Document:
        """The working set that the run began with."""
        first = next(iter(self._ledger.read(limit=1)), None)
        is_boot = first is not None and first["event_type"] == "RUN_BOOTED"
        booted: Document = first["data"]["working_set"] if first is not None and is_boot else otherwise
        return booted

    # Events, and what makes up for missing ones

    def _mend(self) -> None:
        """Give an event to what a crash has left without one, and remove what it has left half written."""
        self._episodes.sweep()
        sweep(self.folder / PACKS)
        loaded = self._owed()
        for batch in () if self._records is None else self._records.batches(self.run_id):
            if batch.batch_id not in self._noted.proposed:
                pack = None if loaded is None else _pack_of(batch, loaded["data"]["pack_id"])
                self._note_proposed(ProposeResult(batch.batch_id, len(batch.mcrs)), None, pack)
            if batch.state == "committed" and batch.batch_id not in self._noted.committed:
                items = self._recorded(batch.batch_id)
                self._note_committed(CommitResult(batch.batch_id, items, already=True), batch.committed_by, None)
        if max(self._episodes.numbers(), default=0) > self._noted.episode:
            last = self._episodes.last()
            if last is not None:
                self._note_episode(last, None)
        if loaded is not None:
            if self._noted.brought is None:
                self._bring(loaded["data"]["pack_id"], loaded["actor"])
            (self.folder / PENDING_MEMORY).unlink()

    def _owed(self) -> Document | None:
        """The event of the pack that the run was loaded from, whose memories may not be proposed yet."""
        is_owed = (self.folder / PENDING_MEMORY).exists()
        return self._ledger.find_last({"RESUME_PACK_LOADED"}) if is_owed else None

    def _bring(self, pack_id: str, actor: str | None) -> None:
        try:
            items = read_items(self.folder, PENDING_MEMORY)
            new = [item for item in items if item["status"] == "active" and not self._has(item["id"])]
        except PackError as error:
            hint = "Move the file away: the run goes on without what its pack remembers."
            raise BrokenError(str(error), hint=hint, file=str(self.folder / PENDING_MEMORY)) from None
        if new:
            most = self._means.config.batch_max_changes
            proposed = self._stage([_as_proposal(item, pack_id) for item in new[:most]], None)
            self._note_proposed(proposed, actor, {"pack_id": pack_id, "left_out": len(new[most:])})

    def _note_proposed(self, proposed: ProposeResult, actor: str | None, pack: Document | None = None) -> None:
        """`pack` says that it is what a pack remembers."""
        data: Document = {"batch_id": proposed.batch_id, "staged": proposed.staged}
        data |= {"duplicates": len(proposed.duplicates), "conflicts": len(proposed.conflicts)}
        self._note("MEMORY_PROPOSED", actor, **data, **({} if pack is None else {"pack": pack}))

    def _note_committed(self, committed: CommitResult, committed_by: str | None, actor: str | None) -> None:
        """Once for each batch."""
        if committed.batch_id not in self._noted.committed:
            items = [{"id": item["id"], "sha256": sha256(to_json(item))} for item in committed.items]
            self._note("MEMORY_COMMITTED", actor, batch_id=committed.batch_id, items=items, committed_by=committed_by)

    def _note_episode(self, episode: Document, actor: str | None) -> str:
        """Returns the SHA-256 of the episode's file."""
        number = episode["number"]
        file_sha256 = self._episodes.sha256(number)
        data = {"episode_id": episode["episode_id"], "number": number, "sha256": file_sha256}
        data |= {"last_seq": episode["ledger"]["last_seq"], "request_id": episode["request_id"]}
        self._note("EPISODE_CREATED", actor, **data)
        return file_sha256

    def _note_pack(self, made: Snapshot, actor: str | None) -> None:
        """Before the pack comes to its place: one that lies there has its hash in the ledger."""
        pack_id, path = made.manifest["pack_id"], f"{PACKS}/{made.path.name}"
        self._note("RESUME_PACK_CREATED", actor, pack_id=pack_id, path=path, manifest_sha256=made.manifest_sha256)

    def _note(self, event_type: str, actor: str | None, **data: Any) -> None:
        self._noted.add(self._ledger.append({"event_type": event_type, "actor": actor, "data": data}))


def _as_proposal(item: Document, pack_id: str) -> Document:
    """The change that would make this memory, with where it was."""
    kept = ("_schema_version", "type", "scope", "content", "confidence", "rationale", "writer")
    refs = [*item["source_refs"][: SOURCE_REFS_MOST - 1], f"pack:{pack_id}/{item['id']}"]
    return {"op": "add", "source_refs": refs, **{name: item[name] for name in kept}}


def _pack_of(batch: Batch, pack_id: str) -> Document | None:
    """What its event says of the pack, if it is the one that `_as_proposal` has made of that."""
    is_of = any(ref.startswith(f"pack:{pack_id}/") for mcr in batch.mcrs for ref in mcr.get("source_refs", ()))
    return {"pack_id": pack_id, "left_out": 0} if is_of else None


def random_id(kind: str) -> str:
    """`run_5f0c…`: 64 random bits."""
    return f"{kind}_{secrets.token_hex(8)}"
