"""The working set of a run: read by anybody, changed by one patch at a time, which names the state that it saw.

With a ledger a change is written ahead. Under the run's lock the new file is made and synced beside the old one, then
the event is appended and synced, then the file takes its name. So a change counts from when its event is on the disk:
what fails before leaves nothing; what fails after raises, too, and whoever comes next makes the change again from the
event.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, NamedTuple

from aos_context.artifacts import encode, now, to_json
from aos_context.config import DEFAULT_CONFIG, SCHEMA_VERSION, Config
from aos_context.errors import BusyError, ExistsError, LimitError, NotFoundError, SchemaError, StaleError
from aos_context.eviction import evict, texts_of, tokens_of
from aos_context.locks import locked
from aos_context.patches import CONTEXTS, copied, patched, without
from aos_context.recovery import STATE_EVENTS, caught_up
from aos_context.tokens import estimate
from aos_context.ws_file import Version, WorkingSetFile, encoded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.ledger import FileLedger
    from aos_context.tokens import Count

DETAIL_CHARACTERS = 1_000
"""Of why a patch was refused, in the ledger."""


class PatchResult(NamedTuple):
    """What a patch made: the working set, the ids of the items that it drove out, and its `_update_seq`."""

    working_set: Document
    evicted: list[str]
    update_seq: int


class _Settled(NamedTuple):
    """As of this event of the ledger, the file has every change in this version."""

    seq: int
    version: Version


class WorkingSetManager:
    """The working set in one file. Any number of them, in any number of processes and threads, may be of the same."""

    def __init__(
        self,
        path: Path,
        config: Config = DEFAULT_CONFIG,
        *,
        ledger: FileLedger | None = None,
        count: Count = estimate,
    ) -> None:
        self.path = path
        self.config = config
        self.ledger = ledger
        self._count = count
        self._tokens: dict[str, int] = {}
        self._file = WorkingSetFile(path)
        self._lock = path.parent / ".lock"
        self._settled: _Settled | None = None
        self._swept = False

    def create_initial(
        self,
        *,
        task_id: str,
        thread_id: str,
        run_id: str,
        objective: str,
        acceptance_criteria: Iterable[str] = (),
        constraints: Iterable[str] = (),
        actor: str | None = None,
    ) -> Document:
        """Begin a run. Raises `SchemaError`, `LimitError`, `ExistsError`, `OSError`."""
        moment = now()
        working_set: Document = {
            "_schema_version": SCHEMA_VERSION,
            "_update_seq": 0,
            "run_id": run_id,
            "task_id": task_id,
            "thread_id": thread_id,
            "status": "IDLE",
            "current_stage": "INTAKE",
            "next_action": "",
            "objective": objective,
            "acceptance_criteria": list(acceptance_criteria),
            "constraints": list(constraints),
            "pinned_context": [],
            "sliding_context": [],
            "created_at": moment,
            "updated_at": moment,
        }
        version, text = self._encoded(working_set)
        with self.locked():
            if self.path.exists() or (self.ledger is not None and self.ledger.find_last({"RUN_BOOTED"}) is not None):
                raise ExistsError(f"run {run_id} is there already", run_id=run_id)
            self._write(version, text, ("RUN_BOOTED", {"working_set": working_set}), actor)
        return copied(working_set)

    def load(self) -> Document:
        """The working set as of the last change, with what the ledger has and the file has not. Writes nothing.

        Raises `NotFoundError`; `BrokenError` where file and ledger are not what was written.
        """
        self._require()
        found = self._file.read()
        if found is None or not self._is_settled(found):
            with self.locked():  # a change may be half made, or half made for good
                found = self._current()
        return copied(found.working_set)

    def apply_patch(self, patch: Document, *, actor: str | None = None) -> PatchResult:
        """Change the working set, if it is as the patch expects. The change is on the disk once this returns.

        Raises `StaleError`, `SchemaError` (which also has every id that would be there twice), `LimitError` (more
        pinned context, a larger item or a larger working set than is allowed), `NotFoundError`, `BrokenError`: then
        nothing is changed, and a refused patch leaves a WS_UPDATE_REJECTED event. Raises `OSError`: then nothing is
        changed, or, where the ledger has the change and the file could not be put in its place, all of it.
        """
        self._require()
        with self.locked():
            current = self._current(write=True)
            try:
                sent: Document = json.loads(encode("ws_patch", patch))  # a copy, as the ledger has it
                changed, evicted = self._changed(current.working_set, sent)
                version, text = self._encoded(changed)
            except (StaleError, SchemaError, LimitError) as error:
                self._log_rejected(error, patch, current.working_set, actor)
                raise
            data = {
                "update_seq": changed["_update_seq"],
                "patch": sent,
                "evicted": evicted,
                "updated_at": changed["updated_at"],
                "sha256": version.sha256,
            }
            self._write(version, text, ("WS_UPDATE_APPLIED", data), actor)
        return PatchResult(copied(changed), evicted, changed["_update_seq"])

    def locked(self) -> AbstractContextManager[None]:
        """The lock of the run, of all processes. A thread that has it may take it again; nothing is awaited in it."""
        return locked(self._lock)

    def _changed(self, current: Document, patch: Document) -> tuple[Document, list[str]]:
        if patch["expected_seq"] != current["_update_seq"]:
            raise StaleError(patch["expected_seq"], current["_update_seq"])
        changed = patched(current, patch, now())
        texts = {text for context in CONTEXTS for item in changed[context] for text in texts_of(item)}
        known = self._tokens  # most contents were counted for the patch before
        self._tokens = {text: known[text] if text in known else self._count(text) for text in texts}
        if "pinned_context" in {**patch.get("set", {}), **patch.get("add", {})}:
            self._limit_pinned(changed["pinned_context"])
        for part in ("set", "add"):
            self._limit_sliding(patch.get(part, {}).get("sliding_context", ()))
        _, gone = evict(changed["sliding_context"], self.config.sliding_max_tokens, self._known_tokens)
        evicted = [item["id"] for item in gone]
        return without(changed, evicted), evicted

    def _encoded(self, working_set: Document) -> tuple[Version, bytes]:
        version, text = encoded(working_set)
        most = self.config.working_set_max_bytes
        if len(text) > most:
            raise LimitError(
                f"the working set would be {len(text)} bytes; {most} bytes are allowed",
                hint="Remove items of its context in the same patch.",
                working_set_bytes=len(text),
                working_set_max_bytes=most,
            )
        return version, text

    def _limit_sliding(self, brought: Iterable[Document]) -> None:
        """An item that is alone beyond the budget would drive out all others, and then itself."""
        most = self.config.sliding_max_tokens
        for item in brought:
            tokens = tokens_of(item, self._known_tokens)
            if tokens > most:
                raise LimitError(
                    f"the item {item['id']!r} alone has {tokens} tokens; {most} tokens are allowed for all of the "
                    "sliding context",
                    hint="Make it shorter, or add it in parts.",
                    item_id=item["id"],
                    item_tokens=tokens,
                    sliding_max_tokens=most,
                )

    def _known_tokens(self, text: str) -> int:
        if text not in self._tokens:  # of an item that the patch itself replaces
            self._tokens[text] = self._count(text)
        return self._tokens[text]

    def _limit_pinned(self, pinned: list[Document]) -> None:
        tokens = sum(tokens_of(item, self._known_tokens) for item in pinned)
        most_items, most_tokens = self.config.pinned_max_items, self.config.pinned_max_tokens
        if len(pinned) > most_items or tokens > most_tokens:
            raise LimitError(
                f"the pinned context would be {len(pinned)} items of {tokens} tokens; "
                f"{most_items} items and {most_tokens} tokens are allowed",
                hint="Remove a pinned item in the same patch, or add it to the sliding context.",
                pinned_items=len(pinned),
                pinned_max_items=most_items,
                pinned_tokens=tokens,
                pinned_max_tokens=most_tokens,
            )

    def _write(
        self, version: Version, text: bytes, event: tuple[str, Document] | None = None, actor: str | None = None
    ) -> None:
        seq = 0
        with self._file.replacing(version, text):
            if self.ledger is not None and event is not None:
                run_id = version.working_set["run_id"]
                entry = {"event_type": event[0], "data": event[1], "run_id": run_id, "actor": actor}
                seq = self.ledger.append(entry)["seq"]
        if seq:
            self._settled = _Settled(seq, version)

    def _log_rejected(self, error: Exception, patch: object, current: Document, actor: str | None) -> None:
        if self.ledger is None:
            return
        expected = patch.get("expected_seq") if isinstance(patch, dict) else None
        data = {
            "code": getattr(error, "code", "ERROR"),
            "detail": str(error)[:DETAIL_CHARACTERS].encode("utf-8", "replace").decode(),
            "expected_seq": expected if type(expected) is int else None,
            "current_seq": current["_update_seq"],
        }
        entry = {"event_type": "WS_UPDATE_REJECTED", "data": data, "run_id": current["run_id"], "actor": actor}
        with contextlib.suppress(OSError, BusyError):  # nothing has changed, and the caller is told why
            self.ledger.append(entry)

    def _require(self) -> None:
        if not self.path.exists() and (self.ledger is None or not self.ledger.path.exists()):
            raise NotFoundError(f"there is no working set {self.path}")

    def _is_settled(self, found: Version) -> bool:
        if self.ledger is None:
            return True
        settled = self._settled
        return settled is not None and settled.version is found and settled.seq == self.ledger.last_seq()

    def _current(self, *, write: bool = False) -> Version:
        """Under the lock: the file with what the ledger has more, which is written to it if `write`.

        Raises `NotFoundError`, `BrokenError`.
        """
        if write and not self._swept:
            self._file.sweep()
            self._swept = True
        found = self._file.read()
        if found is not None and self._is_settled(found):
            return found
        settled = self._settled
        after = settled.seq if settled is not None and settled.version is found else 0
        seq = 0
        events: Iterator[Document] = iter(())
        if self.ledger is not None:
            with self.ledger.locked():  # an event on its way may be taken back, and its number be another's
                seq = self.ledger.last_seq()
            events = self.ledger.read_back(STATE_EVENTS, after)
        version = caught_up(self.path, found, events)
        if version is None:
            raise NotFoundError(f"there is no working set {self.path}")
        if version is not found and write:
            self._write(version, to_json(version.working_set))
            found = version
        if version is found:
            self._settled = _Settled(seq, version)
        return version
