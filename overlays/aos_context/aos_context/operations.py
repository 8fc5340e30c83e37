"""What each capability does: a payload that its schema allows goes in, a JSON object comes out.

The HTTP API and the bus call the same ones; they differ in who calls, which `Caller` says.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aos_context import contract
from aos_context.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aos_context.artifacts import Document
    from aos_context.memory_store import CommitResult
    from aos_context.runs import Runs

FILTERS = ("scope", "status", "type", "min_confidence", "writer")


@dataclass(frozen=True, slots=True)
class Caller:
    """`request_id` is the bus's, None without one. `is_sealed`: the bus has called in its phase SEAL.

    `max_tokens` is what the bus lets a context have while memory is short.
    """

    request_id: str | None = None
    is_sealed: bool = False
    max_tokens: int | None = None

    def actor(self, payload: Document) -> str | None:
        """Who stands in the ledger."""
        named: str | None = payload.get("actor", self.request_id)
        return named


NOBODY = Caller()


def perform(runs: Runs, name: str, payload: object, caller: Caller = NOBODY) -> Document:
    """Raises `ContextError`."""
    valid = contract.capability(name).check_input(payload)
    return _OPERATIONS[name](runs, valid, caller)


def _boot(runs: Runs, payload: Document, caller: Caller) -> Document:
    given = {name: value for name, value in payload.items() if name != "actor"}
    ws = runs.boot(**given, actor=caller.actor(payload))
    return {name: ws[name] for name in ("run_id", "task_id", "thread_id")} | {"working_set": ws}


def _ws(runs: Runs, payload: Document, _: Caller) -> Document:
    return runs.open(payload["run_id"]).ws()


def _update(runs: Runs, payload: Document, caller: Caller) -> Document:
    run = runs.open(payload["run_id"])
    with _within("$.patch"):
        applied = run.update(payload["patch"], actor=caller.actor(payload))
    return {
        "working_set": applied.working_set,
        "evicted": list(applied.evicted),
        "update_seq": applied.update_seq,
    }


def _milestone(runs: Runs, payload: Document, caller: Caller) -> Document:
    reached = runs.open(payload["run_id"]).milestone(
        payload["reason"],
        next_entry_point=payload.get("next_entry_point"),
        memory_batch_id=payload.get("memory_batch_id"),
        request_id=payload.get("request_id", caller.request_id),
        committed_by=caller.request_id,
        actor=caller.actor(payload),
    )
    memory = None if reached.memory is None else _committed(reached.memory)
    return {"episode": reached.episode, "sha256": reached.sha256, "memory": memory, "already": reached.already}


def _propose(runs: Runs, payload: Document, caller: Caller) -> Document:
    run, where = runs.open(payload["run_id"]), payload.get("scope_filters", {})
    for name, own in (("run_id", run.run_id), ("task_id", run.ws()["task_id"])):
        if where.get(name, own) != own:
            message = f"is {where[name]!r}, and the run that proposes is of {own!r}"
            raise SchemaError("propose request", [{"path": f"$.scope_filters.{name}", "message": message}])
    writer = payload.get("writer", where.get("writer"))
    with _within("$.mcrs"):
        proposed = run.propose(payload["mcrs"], writer=writer, actor=caller.actor(payload))
    return dataclasses.asdict(proposed)


def _commit(runs: Runs, payload: Document, caller: Caller) -> Document:
    committed = runs.open(payload["run_id"]).commit(
        payload["batch_id"],
        sealed=caller.is_sealed,
        allow_outside_milestone=payload.get("allow_outside_milestone", False),
        committed_by=caller.request_id,
        actor=caller.actor(payload),
    )
    return _committed(committed)


def _search(runs: Runs, payload: Document, _: Caller) -> Document:
    filters = {name: payload[name] for name in FILTERS if name in payload}
    hits = runs.open(payload["run_id"]).search(payload.get("q", ""), filters, payload.get("top_k"))
    return {"hits": [{"score": hit.score, "item": hit.item} for hit in hits]}


def _brief(runs: Runs, payload: Document, caller: Caller) -> Document:
    asked: int = payload.get("budget", runs.config.brief_max_tokens)
    budget = asked if caller.max_tokens is None else min(asked, caller.max_tokens)
    text = runs.open(payload["run_id"]).brief(budget_tokens=budget, query=payload.get("q"))
    return {"brief": text, "tokens": runs.count(text), "budget": budget}


def _snapshot(runs: Runs, payload: Document, caller: Caller) -> Document:
    packed = runs.open(payload["run_id"]).snapshot(
        zip_pack=payload.get("zip_pack", True),
        pointers=payload.get("pointers", {}),
        packed_by=caller.request_id,
        actor=caller.actor(payload),
    )
    return {
        "pack_id": packed.manifest["pack_id"],
        "pack_path": str(packed.path),
        "manifest": packed.manifest,
        "manifest_sha256": packed.manifest_sha256,
    }


def _load(runs: Runs, payload: Document, caller: Caller) -> Document:
    loaded = runs.load_pack(payload["pack_path"], payload.get("new_run_id"), actor=caller.actor(payload))
    return {
        "run_id": loaded.run.run_id,
        "from_run_id": loaded.from_run_id,
        "pack_id": loaded.pack_id,
        "working_set": loaded.run.ws(),
        "memory": None if loaded.memory is None else dataclasses.asdict(loaded.memory),
        "pointers": loaded.pointers,
    }


def _committed(committed: CommitResult) -> Document:
    return {"batch_id": committed.batch_id, "items": list(committed.items), "already": committed.already}


@contextlib.contextmanager
def _within(path: str) -> Iterator[None]:
    """Paths of faults begin at the payload and not at the document in it."""
    try:
        yield
    except SchemaError as error:
        faults = [{**fault, "path": path + fault["path"].removeprefix("$")} for fault in error.faults]
        raise SchemaError(str(error.members["artifact"]), faults) from None


_OPERATIONS: dict[str, Callable[[Runs, Document, Caller], Document]] = {
    "boot": _boot,
    "ws": _ws,
    "update": _update,
    "milestone": _milestone,
    "propose": _propose,
    "commit": _commit,
    "search": _search,
    "brief": _brief,
    "snapshot": _snapshot,
    "load": _load,
}
