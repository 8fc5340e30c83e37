"""Packs that were forged with care: all hashes in them are made anew, so that only what is elsewhere can tell."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING

from aos_context.artifacts import Document, sha256, to_json
from aos_context.episode import content_id
from aos_context.episode_slice import CHAIN_START, chained
from aos_context.layout import LEDGER, PACK_MANIFEST, PACK_MEMORY, WORKING_SET

if TYPE_CHECKING:
    from pathlib import Path


def forge(pack: Path, to: Path, before: str, after: str, **manifest: object) -> Path:
    """The zipped pack with this text another everywhere, and `manifest` with these members, written to `to`."""
    with zipfile.ZipFile(pack) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files = {name: data.replace(before.encode(), after.encode()) for name, data in files.items()}
    _forge_history(files)
    made = json.loads(files[PACK_MANIFEST]) | manifest
    made["episode_id"] = _last_episode_id(files)
    for one in made["files"]:
        data = files[one["path"]]
        one["bytes"], one["sha256"] = len(data), sha256(data)
    files[PACK_MANIFEST] = to_json(made) + b"\n"
    with zipfile.ZipFile(to, "w") as archive:
        for name in sorted(files):
            archive.writestr(name, files[name])
    return to


def _forge_history(files: dict[str, bytes]) -> None:
    """Hashes of memories, states and episodes in the ledger, and of the ledger in the episode."""
    items = [json.loads(line) for line in files[PACK_MEMORY].splitlines()]
    sums = {item["id"]: sha256(to_json(item)) for item in items}
    events = [json.loads(line) for line in files[LEDGER].splitlines()]
    updates = [event["data"] for event in events if event["event_type"] == "WS_UPDATE_APPLIED"]
    if updates:
        updates[-1]["sha256"] = sha256(files[WORKING_SET])
    created = [event["data"] for event in events if event["event_type"] == "EPISODE_CREATED"]
    for event in events:
        for one in event["data"]["items"] if event["event_type"] == "MEMORY_COMMITTED" else ():
            one["sha256"] = sums[one["id"]]
    for name in [name for name in files if name.startswith("episodes/")]:
        episode = _forged_episode(json.loads(files[name]), events, [data["last_seq"] for data in created])
        files[name] = to_json(episode) + b"\n"
        created[-1] |= {"episode_id": episode["episode_id"], "sha256": sha256(files[name])}
    files[LEDGER] = b"".join(to_json(event) + b"\n" for event in events)


def _forged_episode(episode: Document, events: list[Document], ends: list[int]) -> Document:
    chain, start, part = CHAIN_START, 0, b""
    for end in ends:
        part = b"".join(to_json(event) + b"\n" for event in events[start:end])
        chain, start = chained(chain, sha256(part)), end
    ledger = episode["ledger"] | {"bytes": len(part), "sha256": sha256(part), "chain_sha256": chain}
    forged = episode | {"ledger": ledger}
    return forged | {"episode_id": content_id(forged)}


def _last_episode_id(files: dict[str, bytes]) -> str | None:
    found = [json.loads(data)["episode_id"] for name, data in files.items() if name.startswith("episodes/")]
    return found[-1] if found else None
