"""A working set made again from the ledger's events, where a crash came between an event and its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aos_context.errors import BrokenError, SchemaError
from aos_context.patches import patched, without
from aos_context.ws_file import Version, encoded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.artifacts import Document

STATE_EVENTS = frozenset({"RUN_BOOTED", "WS_UPDATE_APPLIED", "RESUME_PACK_LOADED"})
"""Of which a working set can be made again."""


def caught_up(path: Path, found: Version | None, events: Iterator[Document]) -> Version | None:
    """What is in the file, with the changes that only the ledger has: `found` itself where that has none more.

    `events` are the state events, the last first; so many are read as are needed. Raises `BrokenError` where file and
    ledger cannot both be what was written.
    """
    missing: list[Document] = []
    for event in events:
        if found is not None and _is_in(found, event):
            _check_last(path, found, event, moved=any(one["event_type"] == "RESUME_PACK_LOADED" for one in missing))
            break
        missing.append(event)
        if event["event_type"] == "RUN_BOOTED":
            break
    version = found
    for event in reversed(missing):
        version = _replayed(path, version, event)
    return version


def _is_in(found: Version, event: Document) -> bool:
    if event["event_type"] == "RESUME_PACK_LOADED":  # makes no other _update_seq
        return False
    return _update_seq(event) <= found.update_seq


def _update_seq(event: Document) -> int:
    seq: int = event["data"].get("update_seq", 0)
    return seq


def _check_last(path: Path, found: Version, event: Document, *, moved: bool) -> None:
    """The file is what the last change in it had made, unless it was moved to another run since."""
    if _update_seq(event) != found.update_seq:
        raise _broken(path, f"is at _update_seq {found.update_seq}, and its ledger only at {_update_seq(event)}")
    if moved or event["run_id"] != found.working_set["run_id"]:
        return
    data = event["data"]
    made = data["sha256"] if "sha256" in data else encoded(data["working_set"])[0].sha256
    if made != found.sha256:
        raise _broken(path, f"is not what event {event['seq']} of its ledger had made")


def _replayed(path: Path, version: Version | None, event: Document) -> Version | None:
    """What an event made of it the first time."""
    data = event["data"]
    if event["event_type"] == "RUN_BOOTED":
        return encoded(data["working_set"])[0]
    if event["event_type"] == "RESUME_PACK_LOADED":
        if version is None or version.working_set["run_id"] == event["run_id"]:
            return version
        return encoded({**version.working_set, "run_id": event["run_id"]})[0]
    why = f"cannot be made from event {event['seq']} of its ledger"
    if version is None or version.update_seq + 1 != _update_seq(event):
        raise _broken(path, f"{why}: what was before is missing")
    try:
        made, _ = encoded(without(patched(version.working_set, data["patch"], data["updated_at"]), data["evicted"]))
    except SchemaError as error:
        raise _broken(path, f"{why}: {error}") from None
    if made.sha256 != data["sha256"]:
        raise _broken(path, f"{why}: its hash would be another")
    return made


def _broken(path: Path, why: str) -> BrokenError:
    hint = "Where its ledger is whole, move the file away: it is made again from there."
    return BrokenError(f"{path} {why}", hint=hint, file=str(path))
