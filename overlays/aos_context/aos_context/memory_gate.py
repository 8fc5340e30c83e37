"""The gate of memory: which proposed changes are new, what stands against them, and what they make of memory.

Functions of the proposals and of what they ask a `View` of a store; every store uses these and has no rules of its own.

Two memories are the same if their type, scope, place (the task or run where they hold) and content are. Content is
compared in NFC with white space folded; case counts, since `Foo` and `foo` can be two things: what differs in case only
is named as a conflict and nothing is lost.

A proposal that waits in another batch does not take one's own place, since nobody knows whether that batch will be
committed. It is told as a duplicate and staged all the same, and counts among what is staged; whichever batch comes
first makes the change, and the other finds it made. After `Config.proposal_max_age_days` it is told no more.

A batch of nothing but what is there already is empty, and can be committed like any other: it changes nothing.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aos_context.artifacts import Document, described, encode, json_path, now, sha256, to_json
from aos_context.config import SCHEMA_VERSION
from aos_context.errors import ConflictError, SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aos_context.config import Config

CONTENT_SHOWN = 80
"""Characters of a memory that a conflict shows."""
CONFLICTS_MOST = 10
"""Alike memories that are named for one proposal, the most alike first."""
ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_PATTERN = re.compile("[^\ud800-\udfff]{1,128}", re.DOTALL)
"""Of a writer and of who commits: text, and no half of a surrogate pair."""
ANONYMOUS = "anonymous"
_CHANGEABLE = ("type", "content", "confidence", "rationale", "source_refs")


@dataclass(frozen=True, slots=True)
class Proposer:
    """Who proposes, and which task and run it is for."""

    task_id: str | None = None
    run_id: str | None = None
    writer: str | None = None

    @classmethod
    def parse(cls, scope_filters: Mapping[str, Any] | None) -> Proposer:
        """Of `{"task_id", "run_id", "writer"}`, all optional. Raises `SchemaError`."""
        given = {} if scope_filters is None else scope_filters
        check_members("scope_filters", given, ("task_id", "run_id", "writer"))
        return cls(**given)

    def sees(self, item: Document) -> bool:
        return holds(item, task_id=self.task_id, run_id=self.run_id)


@dataclass(frozen=True, slots=True)
class Conflict:
    """What stands against a proposal: `index` is its place among those proposed (at a commit, in its batch)."""

    index: int
    memory_id: str
    content: str
    reason: str


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A proposal that is there already: as an active memory, in another batch, or earlier in its own (neither)."""

    index: int
    memory_id: str | None = None
    batch_id: str | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """What a proposal would have memory hold."""

    type: str
    scope: str
    task_id: str | None
    run_id: str | None
    content: str

    @property
    def key(self) -> str:
        """The same for memories that are the same: SHA-256, hexadecimal."""
        place = {"global": None, "task": self.task_id, "run": self.run_id}[self.scope]
        return sha256(to_json([self.type, self.scope, place, normalised(self.content)]))


@dataclass(frozen=True, slots=True)
class Staged:
    """A proposal as a batch keeps it, with its writer. Those of the same identity ask for the same."""

    mcr: Document
    identity: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """`staged` has the new ones, and those of the duplicates that wait in another batch, too."""

    staged: tuple[Staged, ...]
    duplicates: tuple[Duplicate, ...]
    conflicts: tuple[Conflict, ...]


class View(Protocol):
    """What the gate asks of a store, all of one moment. Too old is beyond `Config.proposal_max_age_days`."""

    def item(self, item_id: str) -> Document | None: ...

    def active(self, key: str) -> str | None:
        """The id of the active memory of this `Draft.key`."""

    def proposed(self, identity: str) -> str | None:
        """The id of a batch that waits, is not too old and has this `Staged.identity`."""

    def targeted(self, item_id: str) -> str | None:
        """The id of a batch that waits, is not too old and is to change this memory."""

    def alike(self, draft: Draft, least: float) -> Iterable[tuple[float, Document]]:
        """Active memories of the draft's type, scope and place, with their `similarity` to its content."""


def holds(item: Document, *, task_id: str | None, run_id: str | None) -> bool:
    """Whether a memory holds for this task and run: another one's does not, and is as if it were not there."""
    return bool(
        item["scope"] == "global"
        or (item["scope"] == "task" and item["task_id"] == task_id)
        or (item["scope"] == "run" and item["run_id"] == run_id)
    )


def normalised(content: str) -> str:
    return " ".join(unicodedata.normalize("NFC", content).split())


def ordered_id(prefix: str) -> str:
    """Later ones sort after earlier ones."""
    return f"{prefix}_{time.time_ns():016x}{os.urandom(8).hex()}"


def check_members(artifact: str, given: object, allowed: Iterable[str]) -> None:
    """Of scope and search filters: known ones, ids and writers as their schemas have them. Raises `SchemaError`."""
    if not isinstance(given, dict):
        raise SchemaError(artifact, [{"path": "$", "message": f"{described(given)} is not an object"}])
    faults = [
        {"path": json_path([name]), "message": f"not one of {', '.join(allowed)}"}
        for name in given
        if name not in allowed
    ]
    for name in ("task_id", "run_id"):
        value = given.get(name)
        if value is not None and not (isinstance(value, str) and ID_PATTERN.fullmatch(value)):
            faults.append({"path": json_path([name]), "message": f"{described(value)} is no id"})
    if faults:
        raise SchemaError(artifact, faults)
    check_name(artifact, "writer", given.get("writer"))


def check_name(artifact: str, member: str, name: object) -> None:
    """None, or text of 1 to 128 characters. Raises `SchemaError`."""
    if name is not None and not (isinstance(name, str) and NAME_PATTERN.fullmatch(name)):
        message = f"{described(name)} is not text of 1 to 128 characters"
        raise SchemaError(artifact, [{"path": json_path([member]), "message": message}])


def judge(mcrs: Sequence[Document], proposer: Proposer, view: View, config: Config) -> Judgement:
    """What becomes of a proposal. Raises `SchemaError` with paths from the list on, `$[2].target_id`."""
    proposals = _resolved(_valid(mcrs, proposer, config), proposer, view)
    staged: list[Staged] = []
    duplicates: list[Duplicate] = []
    conflicts: list[Conflict] = []
    identities: set[str] = set()
    targets: set[str] = set()
    for index, (mcr, target, draft) in enumerate(proposals):
        one = Staged(mcr, _proposal_identity(mcr, draft))
        duplicate = Duplicate(index) if one.identity in identities else _duplicate(index, one, target, draft, view)
        if duplicate is not None and duplicate.memory_id in targets:
            duplicate = None  # What is there now is changed by this batch before.
        if duplicate is not None:
            duplicates.append(duplicate)
        if duplicate is not None and duplicate.batch_id is None:
            continue
        conflicts += _against_target(index, target, targets, view if duplicate is None else None)
        conflicts += _alike(index, target, draft, view, config)
        staged.append(one)
        identities.add(one.identity)
        targets |= {mcr["target_id"]} if target else set()
    return Judgement(tuple(staged), tuple(duplicates), tuple(conflicts))


def settle(
    mcrs: Sequence[Document], proposer: Proposer, view: View, *, batch_id: str, committed_by: str | None
) -> list[Document]:
    """The memories that a batch adds or changes, as they then are. Raises `ConflictError` where one cannot be made."""
    desk = _Desk(view, {"batch_id": batch_id, "committed_by": committed_by, "updated_at": now()})
    for index, mcr in enumerate(mcrs):
        target = desk.item(mcr["target_id"]) if "target_id" in mcr else None
        if mcr["op"] == "delete":
            desk.delete(index, _known(target), mcr)
        elif mcr["op"] == "update":
            desk.update(index, _known(target), mcr)
        elif mcr["op"] == "supersede":
            desk.supersede(index, _known(target), mcr, proposer)
        else:
            desk.add(mcr, proposer)
    if desk.conflicts:
        first = desk.conflicts[0]
        detail = f"batch {batch_id} cannot be committed: {first.memory_id}: {first.reason}"
        members = [{"index": one.index, "memory_id": one.memory_id, "content": one.content, "reason": one.reason}
                   for one in desk.conflicts]  # fmt: skip
        raise ConflictError(detail, batch_id=batch_id, conflicts=members)
    return list(desk.changed.values())


class _Desk:
    """A store as it is after the changes so far, which it does not have yet."""

    def __init__(self, view: View, stamp: Document) -> None:
        self._view = view
        self._stamp = stamp
        self.changed: dict[str, Document] = {}
        self._keys: dict[str, str] = {}
        self.conflicts: list[Conflict] = []

    def item(self, item_id: str) -> Document | None:
        return self.changed.get(item_id) or self._view.item(item_id)

    def add(self, mcr: Document, proposer: Proposer) -> None:
        draft = _draft(mcr, proposer, None)
        if self._active(draft.key) is None:
            self._put(self._new(mcr, draft, supersedes=None), mcr)

    def update(self, index: int, target: Document, mcr: Document) -> None:
        if _is_so(mcr, target):
            return
        after = {**target, **{name: mcr[name] for name in _CHANGEABLE if name in mcr}}
        twin = self._active(draft_of(after).key)
        if target["status"] != "active":
            self._refuse(index, target, f"it is {target['status']}")
        elif twin is not None and twin["id"] != target["id"]:
            self._refuse(index, twin, "it has the same content")
        else:
            self._put(after, mcr)

    def supersede(self, index: int, target: Document, mcr: Document, proposer: Proposer) -> None:
        """Where the new content is an active memory already, that one takes the target's place."""
        draft = _draft(mcr, proposer, target)
        twin = self._active(draft.key)
        if target["status"] != "active":
            if twin is None or target["superseded_by"] != twin["id"]:
                self._refuse(index, target, f"it is {target['status']}")
            return
        if twin is not None and twin["id"] == target["id"]:
            return
        if twin is None:
            twin = self._new(mcr, draft, supersedes=target["id"])
        self._put({**target, "status": "superseded", "superseded_by": twin["id"]}, mcr)
        self._put({**twin, "supersedes": twin["supersedes"] or target["id"]}, mcr)

    def delete(self, index: int, target: Document, mcr: Document) -> None:
        if target["status"] == "active":
            self._put({**target, "status": "deleted"}, mcr)
        elif target["status"] != "deleted":
            self._refuse(index, target, f"it is {target['status']}")

    def _active(self, key: str) -> Document | None:
        if key in self._keys:
            return self.changed[self._keys[key]]
        found = self._view.active(key)
        return None if found is None or found in self.changed else self._view.item(found)

    def _new(self, mcr: Document, draft: Draft, *, supersedes: str | None) -> Document:
        return {
            "_schema_version": SCHEMA_VERSION,
            "id": ordered_id("mem"),
            "type": draft.type,
            "scope": draft.scope,
            "task_id": draft.task_id,
            "run_id": draft.run_id,
            "content": draft.content,
            "status": "active",
            "confidence": mcr["confidence"],
            "source_refs": mcr["source_refs"],
            "created_at": self._stamp["updated_at"],
            "supersedes": supersedes,
            "superseded_by": None,
        }

    def _put(self, item: Document, mcr: Document) -> None:
        """A version says of itself who made it and why, and nothing of who made the one before."""
        before = self.changed.get(item["id"])
        if before is not None and before["status"] == "active":
            del self._keys[draft_of(before).key]
        made_by = {"writer": mcr["writer"], "rationale": mcr.get("rationale", "")}
        self.changed[item["id"]] = {**item, **made_by, **self._stamp}
        if item["status"] == "active":
            self._keys[draft_of(item).key] = item["id"]

    def _refuse(self, index: int, item: Document, reason: str) -> None:
        self.conflicts.append(_conflict(index, item, reason))


def draft_of(item: Document) -> Draft:
    """What a memory holds."""
    return Draft(item["type"], item["scope"], item["task_id"], item["run_id"], item["content"])


def _valid(mcrs: Sequence[Document], proposer: Proposer, config: Config) -> list[Document]:
    """Each with its writer."""
    if not isinstance(mcrs, list | tuple) or not 1 <= len(mcrs) <= config.batch_max_changes:
        raise SchemaError("mcr", [{"path": "$", "message": f"not a list of 1 to {config.batch_max_changes} items"}])
    faults: list[dict[str, str]] = []
    for index, mcr in enumerate(mcrs):
        try:
            encode("mcr", mcr)
        except SchemaError as error:
            faults += [{**fault, "path": f"$[{index}]{fault['path'][1:]}"} for fault in error.faults]
    if faults:
        raise SchemaError("mcr", faults)
    return [{"writer": proposer.writer or ANONYMOUS, **mcr} for mcr in mcrs]


def _resolved(
    mcrs: list[Document], proposer: Proposer, view: View
) -> list[tuple[Document, Document | None, Draft | None]]:
    """Each with its target and what it would have memory hold (a delete nothing)."""
    resolved: list[tuple[Document, Document | None, Draft | None]] = []
    faults: list[dict[str, str]] = []
    for index, mcr in enumerate(mcrs):
        target = view.item(mcr["target_id"]) if "target_id" in mcr else None
        if "target_id" in mcr and (target is None or not proposer.sees(target)):
            faults.append({"path": f"$[{index}].target_id", "message": f"there is no memory {mcr['target_id']} here"})
            continue
        draft = None if mcr["op"] == "delete" else _draft(mcr, proposer, target)
        for kind, place in (("task", draft and draft.task_id), ("run", draft and draft.run_id)):
            if draft is not None and draft.scope == kind and place is None:
                message = f"scope {kind} needs the {kind}_id of scope_filters"
                faults.append({"path": f"$[{index}].scope", "message": message})
        resolved.append((mcr, target, draft))
    if faults:
        raise SchemaError("mcr", faults)
    return resolved


def _draft(mcr: Document, proposer: Proposer, target: Document | None) -> Draft:
    """A change stays where its target holds; one that names another scope goes where it is proposed."""
    before: Document = target or {}
    kind = mcr.get("scope", before.get("scope"))
    if target is not None and kind == target["scope"]:
        task_id, run_id = target["task_id"], target["run_id"]
    else:
        task_id = None if kind == "global" else proposer.task_id
        run_id = proposer.run_id if kind == "run" else None
    content = mcr.get("content", before.get("content"))
    return Draft(str(mcr.get("type", before.get("type"))), str(kind), task_id, run_id, str(content))


def _proposal_identity(mcr: Document, draft: Draft | None) -> str:
    """Of an add and a supersede what memory would hold, of an update what it names, of a delete its target."""
    if mcr["op"] == "update":
        named = {name: mcr[name] for name in _CHANGEABLE if name in mcr}
        if "content" in named:
            named["content"] = normalised(named["content"])
        return sha256(to_json(["update", mcr["target_id"], named]))
    return sha256(to_json([mcr["op"], mcr.get("target_id"), draft.key if draft else None]))


def _duplicate(index: int, one: Staged, target: Document | None, draft: Draft | None, view: View) -> Duplicate | None:
    """Of what is beyond the batch."""
    if target is not None and one.mcr["op"] == "update":
        if _is_so(one.mcr, target):
            return Duplicate(index, memory_id=target["id"])
    elif draft is not None:
        active = view.active(draft.key)
        if active is not None and (target is None or active == target["id"]):
            return Duplicate(index, memory_id=active)
    batch_id = view.proposed(one.identity)
    return None if batch_id is None else Duplicate(index, batch_id=batch_id)


def _is_so(mcr: Document, target: Document) -> bool:
    """Whether an update would change nothing but the writer: who proposes what is there already proposes nothing."""
    return all(target[name] == mcr.get(name, target[name]) for name in _CHANGEABLE)


def _against_target(index: int, target: Document | None, targets: set[str], view: View | None) -> list[Conflict]:
    """`view` is None where another batch is known to ask for the same."""
    if target is None:
        return []
    found = []
    if target["status"] != "active":
        found.append(_conflict(index, target, f"it is {target['status']}"))
    if target["id"] in targets:
        found.append(_conflict(index, target, "another proposal of this batch changes it"))
    batch_id = view.targeted(target["id"]) if view else None
    if batch_id is not None:
        found.append(_conflict(index, target, f"batch {batch_id} changes it"))
    return found


def _alike(index: int, target: Document | None, draft: Draft | None, view: View, config: Config) -> list[Conflict]:
    if draft is None:
        return []
    others = view.alike(draft, config.conflict_similarity)
    alike = [(share, item) for share, item in others if target is None or item["id"] != target["id"]]
    alike.sort(key=lambda one: (-one[0], one[1]["id"]))
    return [_conflict(index, item, f"its words are alike ({share:.2f})") for share, item in alike[:CONFLICTS_MOST]]


def _conflict(index: int, item: Document, reason: str) -> Conflict:
    return Conflict(index, item["id"], item["content"][:CONTENT_SHOWN], reason)


def _known(target: Document | None) -> Document:
    """A memory never leaves its store, so what was there at the proposal is there at the commit."""
    if target is None:
        raise LookupError("a proposal's target has left its store")
    return target
