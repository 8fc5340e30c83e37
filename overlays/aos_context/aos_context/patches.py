"""What a patch makes of a working set: a function of the two, so that a patch in the ledger can be applied again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aos_context.artifacts import json_path
from aos_context.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aos_context.artifacts import Artifact, Document

CONTEXTS = ("pinned_context", "sliding_context")

Place = tuple[list[str | int], str]
"""Where an item's id stands in a document, as the steps of a JSON path, and the id."""


def patched(working_set: Document, patch: Document, updated_at: str) -> Document:
    """The working set after a patch that its schema allows, before anything is evicted. Neither argument is changed.

    `set` takes effect first, then `remove`, then `add`: an item is replaced where one of its id is, else it is the
    last. An id that is to be removed may be missing. Raises `SchemaError` for an id that is there twice.
    """
    _refuse_repeated("ws_patch", [*_places(patch, "set"), *_places(patch, "add")], per_list=True)
    changed = {**working_set, **patch.get("set", {})}
    for context in CONTEXTS:
        gone = set(patch.get("remove", {}).get(context, ()))
        items = {item["id"]: item for item in changed[context] if item["id"] not in gone}
        items.update((item["id"], item) for item in patch.get("add", {}).get(context, ()))
        changed[context] = list(items.values())
    _refuse_shared(changed, patch)
    changed["_update_seq"] = working_set["_update_seq"] + 1
    changed["updated_at"] = updated_at
    return changed


def without(working_set: Document, evicted: list[str]) -> Document:
    """The working set less these items of its sliding context."""
    gone = set(evicted)
    kept = [item for item in working_set["sliding_context"] if item["id"] not in gone]
    return {**working_set, "sliding_context": kept}


def check_ids(working_set: Document) -> None:
    """Raises `SchemaError` where two items of the context have one id."""
    _refuse_repeated("working_set", list(_places(working_set)), per_list=False)


def copied(working_set: Document) -> Document:
    """One that shares nothing that can be changed with the other."""
    return {key: _copied(value) for key, value in working_set.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(one) for one in value]
    if isinstance(value, dict):
        return {key: _copied(one) if isinstance(one, list) else one for key, one in value.items()}
    return value


def _places(document: Document, *steps: str) -> Iterator[Place]:
    for step in steps:
        document = document.get(step, {})
    for context in CONTEXTS:
        for index, item in enumerate(document.get(context, ())):
            yield [*steps, context, index, "id"], item["id"]


def _refuse_shared(changed: Document, patch: Document) -> None:
    """Of pinned and sliding context, one has an id: what the patch brought of those that both have is named."""
    pinned = {item["id"] for item in changed["pinned_context"]}
    shared = pinned.intersection(item["id"] for item in changed["sliding_context"])
    if shared:
        brought = [place for place in (*_places(patch, "set"), *_places(patch, "add")) if place[1] in shared]
        _refuse("ws_patch", [(steps, f"{name!r} is both pinned and sliding") for steps, name in brought])


def _refuse_repeated(artifact: Artifact, places: list[Place], *, per_list: bool) -> None:
    seen: set[tuple[object, ...]] = set()
    faults = []
    for steps, name in places:
        key = (*steps[:-2], name) if per_list else (name,)
        if key in seen:
            faults.append((steps, f"{name!r} is there twice"))
        seen.add(key)
    if faults:
        _refuse(artifact, faults)


def _refuse(artifact: Artifact, faults: list[tuple[list[str | int], str]]) -> None:
    raise SchemaError(artifact, [{"path": json_path(steps), "message": why} for steps, why in faults])
