"""What the service must have answered, if a resume pack is what it says: made anew from the pack, and hashed.

The bus's ledger has of each answer its `result_hash`. The answer of a milestone holds its episode, that holds the
hashes of the run's ledger up to there, and that has the hash of each memory; the answer of a commit holds its memories;
the answer of a snapshot holds the manifest, which has the hash of every file, and the place where the pack came to lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from aos_context.artifacts import sha256, to_json
from aos_context.canonical import canonical, canonical_sha256
from aos_context.layout import LEDGER, PACKS
from aos_context.ledger import FileLedger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.resume_pack import CheckedPack

Hashes = frozenset[str]


class Commit(NamedTuple):
    """Of a batch, in line `seq` of the run's ledger; `items` have id and SHA-256 of each memory, as answered."""

    seq: int
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """The `result_hash` of each answer that would fit, of which one is enough: a repetition says that it is one."""

    milestone: Hashes
    """Of the pack's episode; empty without one."""
    has_all_of_milestone: bool
    """Whether there is no other: it may have been asked for with a batch that is not in the pack as it was left."""
    snapshot: Hashes
    commits: dict[str, Hashes]
    """By batch; empty where the pack does not have all of its memories as it left them."""
    seqs: dict[str, int]
    """In which line of the run's ledger each batch was committed."""

    def all(self) -> Hashes:
        return self.milestone.union(self.snapshot, *self.commits.values())


def answers_of(pack: CheckedPack, pack_path: Path, root: Path | None) -> Answers:
    """`root` is the folder of runs that the pack was made in; where it is None, where the pack lies is tried.

    Reads the pack's ledger and memories once. Raises as `CheckedPack.memory_items`.
    """
    commits = _commits(pack)
    items: dict[str, dict[str, Document]] = {batch_id: {} for batch_id in commits}
    for item in pack.memory_items():
        items[item["batch_id"]][item["id"]] = item
    kept = {batch_id: _kept(one, items[batch_id]) for batch_id, one in commits.items()}
    before = [batch_id for batch_id in commits if pack.episode and pack.episode["memory"]["batch_id"] is None]
    return Answers(
        milestone=_milestone(pack, {batch_id: kept[batch_id] for batch_id in before}),
        has_all_of_milestone=all(kept[batch_id] is not None for batch_id in before),
        snapshot=_snapshot(pack, _places(pack, pack_path, root)),
        commits={batch_id: frozenset(map(sha256, _committed(batch_id, held))) for batch_id, held in kept.items()},
        seqs={batch_id: one.seq for batch_id, one in commits.items()},
    )


def _commits(pack: CheckedPack) -> dict[str, Commit]:
    """By batch, since the run was loaded: of what it had before the pack has no memories."""
    found: dict[str, Commit] = {}
    for event in FileLedger(pack.folder / LEDGER).read_back({"MEMORY_COMMITTED", "RESUME_PACK_LOADED"}):
        if event["event_type"] == "RESUME_PACK_LOADED":
            break
        listed = tuple((one["id"], one["sha256"]) for one in event["data"]["items"])
        found[event["data"]["batch_id"]] = Commit(event["seq"], listed)
    return found


def _milestone(pack: CheckedPack, before: dict[str, list[Document] | None]) -> Hashes:
    """The answers to whoever asked first, and to who has asked again after a lost one, or after the commit alone.

    An episode without a batch may have been asked for with one of those that were committed `before` its slice.
    """
    episode = pack.episode
    if episode is None:
        return frozenset()
    made = episode["memory"]
    memories = [b"null"] if made["batch_id"] is None else list(_committed(made["batch_id"], made["items"]))
    memories += [one for batch_id, held in before.items() for one in _committed(batch_id, held)]
    text, sum_ = canonical(episode), canonical(sha256(pack.episode_file()))
    return frozenset(
        sha256(b'{"already":%b,"episode":%b,"memory":%b,"sha256":%b}' % (already, text, memory, sum_))
        for memory in memories
        for already in (b"false", b"true")
    )


def _kept(commit: Commit, items: dict[str, Document]) -> list[Document] | None:
    """The memories of a batch as it left them; None where a later one of the run has changed any of them."""
    held = [items[id_] for id_, sum_ in commit.items if id_ in items and sha256(to_json(items[id_])) == sum_]
    return held if len(held) == len(commit.items) else None


def _committed(batch_id: str, items: list[Document] | None) -> Iterator[bytes]:
    """What is said of a commit, the first time and later, in canonical form; nothing where the items are None."""
    if items is not None:
        for already in (False, True):
            yield canonical({"batch_id": batch_id, "items": items, "already": already})


def _snapshot(pack: CheckedPack, places: Iterator[str]) -> Hashes:
    rest = {"pack_id": pack.manifest["pack_id"], "manifest": pack.manifest, "manifest_sha256": pack.manifest_sha256}
    return frozenset(canonical_sha256({**rest, "pack_path": place}) for place in places)


def _places(pack: CheckedPack, pack_path: Path, root: Path | None) -> Iterator[str]:
    """Where the service may have said that the pack lies: as its folder of runs was named, or as that is resolved."""
    name = f"pack_{pack.manifest['pack_id']}"
    if root is None:
        folders = {pack_path.parent, pack_path.absolute().parent, pack_path.resolve().parent}
    else:
        folders = {one / pack.manifest["run_id"] / PACKS for one in (root, root.absolute(), root.resolve())}
    for folder in sorted(folders):
        yield str(folder / name)
        yield str(folder / f"{name}.zip")
