"""Whether the files of a resume pack belong together: its manifest, and what its documents say of each other.

The same rules hold for a pack that is written and for one that is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from aos_context.artifacts import Artifact, Document, decode, encode, sha256, to_json
from aos_context.episode import file_name, read_episode
from aos_context.episode_slice import parts
from aos_context.errors import BrokenError, PackError
from aos_context.layout import EPISODES, LEDGER, PACK_MANIFEST, PACK_MEMORY, WORKING_SET
from aos_context.pack_files import REQUIRED, FileSum, require_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MOST_DOCUMENT_BYTES = 256 << 20
"""Of one document or line, for it is parsed as a whole."""


class Created(NamedTuple):
    """An episode, as the ledger has it."""

    episode_id: str
    number: int
    sha256: str
    last_seq: int
    """The last line that it stands for."""


class Committed(NamedTuple):
    """A memory, as the ledger has it: the hash of its JSON, and the batch that last changed it."""

    sha256: str
    batch_id: str


class History:
    """What the lines of a ledger say of the run, taken in one after the other."""

    def __init__(self) -> None:
        self.last_seq = 0
        self.run_id: str | None = None
        """Of the last event."""
        self.update_seq = 0
        self.booted: Document | None = None
        self.state_sha256: str | None = None
        """Of the working set after the last update; None before the first."""
        self.state_run_id: str | None = None
        """Which run id the working set had then, where the run was loaded from a pack since."""
        self.episode: Created | None = None
        """The last one."""
        self.ends: list[int] = []
        """The last line that each episode stands for, the first first."""
        self.committed: dict[str, Committed] = {}
        """Memories by id, since the run was loaded: what it had before is in another store, if anywhere."""

    def add(self, line: bytes) -> None:
        """Raises `BrokenError` for a line that is no event or not the next one."""
        where = f"line {self.last_seq + 1}"
        if not line.endswith(b"\n"):
            raise BrokenError(f"{where} has no end")
        event = decode("ledger_event", line, where)
        if event["seq"] != self.last_seq + 1:
            raise BrokenError(f"{where} has the seq {event['seq']}")
        self.last_seq, self.run_id = event["seq"], event["run_id"]
        self._take(event["event_type"], event["data"], where)

    def _take(self, type_: str, data: Document, where: str) -> None:
        if type_ == "RUN_BOOTED":
            self.booted = data["working_set"]
        elif type_ == "WS_UPDATE_APPLIED":
            if data["update_seq"] != self.update_seq + 1:
                raise BrokenError(f"{where} has the update_seq {data['update_seq']} after {self.update_seq}")
            self.update_seq, self.state_sha256, self.state_run_id = data["update_seq"], data["sha256"], None
        elif type_ == "EPISODE_CREATED":
            self.episode = Created(data["episode_id"], data["number"], data["sha256"], data["last_seq"])
            self.ends.append(data["last_seq"])
        elif type_ == "RESUME_PACK_LOADED":
            self.state_run_id = self.state_run_id or data["from_run_id"]
            self.committed = {}
        elif type_ == "MEMORY_COMMITTED":
            self.committed |= {one["id"]: Committed(one["sha256"], data["batch_id"]) for one in data["items"]}

    def require_state(self, working_set: Document) -> None:
        """Raises `BrokenError` where the last update, or the boot, did not leave this working set."""
        if working_set["_update_seq"] != self.update_seq:
            raise BrokenError(f"_update_seq is {working_set['_update_seq']}, and the ledger's is {self.update_seq}")
        then = {**working_set, "run_id": self.state_run_id or working_set["run_id"]}
        if self.state_sha256 is not None:
            if self.state_sha256 != sha256(encode("working_set", then)):
                raise BrokenError("it is not what the ledger's last update left")
        elif self.booted is not None and self.booted != then:
            raise BrokenError("it is not what the ledger says that the run was booted with")


@dataclass(frozen=True, slots=True)
class PackDocuments:
    """The documents of a pack, all of them verified."""

    manifest: Document
    manifest_sha256: str
    working_set: Document
    episode: Document | None
    ledger_last_seq: int


def verify(folder: Path, found: Mapping[str, FileSum], manifest_sha256: str | None = None) -> PackDocuments:
    """The documents of a pack whose files lie in `folder`, where nobody changes them. Raises `PackError`.

    With `manifest_sha256`, of the pack that has the manifest with this hash.
    """
    if PACK_MANIFEST not in found:
        raise PackError("it is not there", PACK_MANIFEST)
    if manifest_sha256 not in (None, found[PACK_MANIFEST].sha256):
        raise PackError("it does not have the SHA-256 that was asked for", PACK_MANIFEST)
    manifest = read_document("resume_pack_manifest", folder, PACK_MANIFEST)
    _require_files(manifest, found)
    working_set = read_document("working_set", folder, WORKING_SET)
    for member, of_set in (("run_id", "run_id"), ("task_id", "task_id"), ("thread_id", "thread_id"),
                           ("update_seq", "_update_seq")):  # fmt: skip
        if manifest[member] != working_set[of_set]:
            raise PackError(f"{of_set} is {working_set[of_set]}, and the manifest's {manifest[member]}", WORKING_SET)
    history = _read_history(folder, manifest)
    try:
        history.require_state(working_set)
    except BrokenError as error:
        raise PackError(str(error), WORKING_SET) from None
    episode = _require_episode(folder, manifest, history, found)
    _require_memory(folder, history)
    return PackDocuments(manifest, found[PACK_MANIFEST].sha256, working_set, episode, history.last_seq)


def read_document(artifact: Artifact, folder: Path, name: str) -> Document:
    """Raises `PackError`."""
    data = _read_whole(folder, name)
    try:
        return decode(artifact, data, "it")
    except BrokenError as error:
        raise PackError(str(error), name) from None


def read_items(folder: Path, name: str = PACK_MEMORY) -> Iterator[Document]:
    """The memory items of a pack, or of another file of the same form. Raises `PackError`."""
    for number, line in enumerate(_read_lines(folder, name), 1):
        try:
            yield decode("memory_item", line, f"line {number}")
        except BrokenError as error:
            raise PackError(str(error), name) from None


def _require_files(manifest: Document, found: Mapping[str, FileSum]) -> None:
    """That exactly the files of the manifest are there, each as it says."""
    listed: set[str] = set()
    for one in manifest["files"]:
        name = one["path"]
        require_name(name)
        if name in listed or name == PACK_MANIFEST:
            raise PackError("the manifest has it twice", name)
        listed.add(name)
        if name not in found:
            raise PackError("the manifest has it, and it is not there", name)
        if found[name].size != one["bytes"]:
            raise PackError(f"it has {found[name].size} bytes, and the manifest says {one['bytes']}", name)
        if found[name].sha256 != one["sha256"]:
            raise PackError("it does not have the SHA-256 that the manifest says", name)
    for name in found:
        if name not in listed and name != PACK_MANIFEST:
            raise PackError("it is there, and the manifest does not have it", name)
    for name in REQUIRED:
        if name not in listed:
            raise PackError("a resume pack must have it", name)


def _read_history(folder: Path, manifest: Document) -> History:
    history = History()
    try:
        for line in _read_lines(folder, LEDGER):
            history.add(line)
    except BrokenError as error:
        raise PackError(str(error), LEDGER) from None
    if history.last_seq != manifest["ledger_last_seq"]:
        raise PackError(
            f"its last line is {history.last_seq}, and the manifest's ledger_last_seq {manifest['ledger_last_seq']}",
            LEDGER,
        )
    if history.run_id not in (None, manifest["run_id"]):
        raise PackError(f"its last line is of the run {history.run_id}, not of {manifest['run_id']}", LEDGER)
    return history


def _require_episode(
    folder: Path, manifest: Document, history: History, found: Mapping[str, FileSum]
) -> Document | None:
    """The one that the ledger has as its last."""
    names = [name for name in found if name.startswith(f"{EPISODES}/")]
    created = history.episode
    if manifest["episode_id"] != (created and created.episode_id):
        raise PackError(f"episode_id is {manifest['episode_id']}, and the ledger's last {created}", PACK_MANIFEST)
    wanted = f"{EPISODES}/{file_name(created.number)}" if created else None
    for name in names:
        if name != wanted:
            raise PackError("it is not the episode that the ledger has as its last", name)
    if created is None or wanted is None:
        return None
    if not names:
        raise PackError("the ledger has it, and it is not there", wanted)
    if found[wanted].sha256 != created.sha256:
        raise PackError("it is not the episode that the ledger has: its SHA-256 is another", wanted)
    try:
        episode = read_episode(_read_whole(folder, wanted), created.number, "it")
    except BrokenError as error:
        raise PackError(str(error), wanted) from None
    _require_lines(folder, history, episode["ledger"], wanted)
    return episode


def _require_lines(folder: Path, history: History, ledger: Document, name: str) -> None:
    """That the ledger has the lines that the episode has seen: its own, and by their chain those of all before it."""
    *_, own = parts(_read_lines(folder, LEDGER), history.ends)
    if not own.is_of(ledger):
        lines = f"its lines {ledger['first_seq']} to {ledger['last_seq']}, or the chain of those before"
        raise PackError(f"the ledger does not have what it has the SHA-256 of: {lines}", name)


def _require_memory(folder: Path, history: History) -> None:
    """That the memories are those that the ledger has as committed, each as it was then."""
    missing = dict(history.committed)
    for item in read_items(folder):
        id_ = item["id"]
        if id_ not in missing:
            why = "is there twice" if id_ in history.committed else "is there, and the ledger has no commit of it"
            raise PackError(f"the item {id_} {why}", PACK_MEMORY)
        if missing.pop(id_) != Committed(sha256(to_json(item)), item["batch_id"]):
            raise PackError(f"the item {id_} is not what the ledger says that its batch committed", PACK_MEMORY)
    for id_ in missing:
        raise PackError(f"the item {id_} is not there, and the ledger has its commit", PACK_MEMORY)


def _read_lines(folder: Path, name: str) -> Iterator[bytes]:
    with (folder / name).open("rb") as file:
        while line := file.readline(MOST_DOCUMENT_BYTES):
            if len(line) == MOST_DOCUMENT_BYTES:
                raise PackError(f"a line has more than {MOST_DOCUMENT_BYTES} bytes", name)
            yield line


def _read_whole(folder: Path, name: str) -> bytes:
    path = folder / name
    if path.stat().st_size > MOST_DOCUMENT_BYTES:
        raise PackError(f"it has more than {MOST_DOCUMENT_BYTES} bytes", name)
    return path.read_bytes()
