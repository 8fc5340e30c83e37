"""Resume packs: a run that can be carried elsewhere, as a zip or a folder.

A pack is written whole or not at all, and comes to its place last: whoever notes its manifest's hash before that leaves
no pack that nobody knows of, wherever it is killed. It is read in two steps: `check` verifies all of a private copy,
and only what that gives can be unpacked. What the manifest itself says beyond its files (the pack's id, its time, the
pointers) is held by `manifest_sha256`, which the ledger of the packed run has.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from aos_context.artifacts import Document, decode, encode, validate
from aos_context.config import DEFAULT_CONFIG, SCHEMA_VERSION, Config
from aos_context.episode import EPISODE_MODE, file_name, slice_name
from aos_context.episode_slice import SLICE_MODE
from aos_context.errors import BrokenError, ExistsError, LimitError, PackError
from aos_context.files import CHUNK_BYTES, FILE_MODE, FOLDER_MODE, make_folder, sync_folder
from aos_context.layout import EPISODES, LEDGER, PACK_MANIFEST, PACK_MEMORY, PACKS, PENDING_MEMORY, WORKING_SET
from aos_context.ledger import whole_lines
from aos_context.pack_content import History, read_items, verify
from aos_context.pack_files import FileSum, copy_pack, write_file
from aos_context.scratch import scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The first that a zip can say."""

_Options = ParamSpec("_Options")
_UNIX = 3
_FILE_ATTRIBUTES = 0o100644 << 16
_EVENT_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A pack that was written: where it lies, and what its manifest says."""

    path: Path
    manifest: Document
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class CheckedPack:
    """A pack of which all is verified, in a copy that nobody else changes. A context manager that removes the copy.

    What it is made with ends with it (`keeping`).
    """

    folder: Path
    manifest: Document
    manifest_sha256: str
    working_set: Document
    episode: Document | None
    ledger_last_seq: int
    keeping: contextlib.ExitStack = field(repr=False, compare=False)

    def memory_items(self) -> Iterator[Document]:
        """What the run had committed."""
        return read_items(self.folder)

    def episode_file(self) -> bytes:
        """Of the `episode`, which is not None."""
        return (self.folder / f"{EPISODES}/{file_name((self.episode or {})['number'])}").read_bytes()

    def close(self) -> None:
        self.keeping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


# --- Writing ---


@dataclass(frozen=True, slots=True)
class Prepared:
    """A pack that is whole and on the disk, and not yet in its place."""

    made: Path
    snapshot: Snapshot

    def place(self) -> Snapshot:
        """Raises `ExistsError`, `OSError`; then it is not there, or, where only its name could not be synced, it is."""
        _move(self.made, self.snapshot.path)
        return self.snapshot


@contextlib.contextmanager
def prepared(
    run_folder: Path,
    *,
    pack_id: str,
    zip_pack: bool,
    pointers: Mapping[str, Any],
    memory_items: Iterable[Document],
    now: str,
    packed_by: str | None = None,
    working_set: Document | None = None,
    config: Config = DEFAULT_CONFIG,
) -> Iterator[Prepared]:
    """Pack a run whose lock the caller holds. The same run, `pack_id`, `pointers` and `now` give the same bytes.

    `packed_by` is the bus's request id of the call that asks for it, None without a bus. `working_set` is for a file
    that a crash has left behind its ledger; without it the file is packed. Raises `ExistsError` where there is such a
    pack; `BrokenError` where the run's files do not belong together; `LimitError`.
    """
    resume = run_folder / PACKS
    path = resume / (f"pack_{pack_id}.zip" if zip_pack else f"pack_{pack_id}")
    if os.path.lexists(path):
        raise ExistsError(f"there is a resume pack {path.name} already", path=str(path))
    make_folder(resume)
    with scratch(resume) as temporary:
        folder = temporary / path.stem
        files, history = _gather(run_folder, folder, working_set, memory_items)
        if sum(one.size for one in files.values()) > config.pack_max_bytes:
            raise LimitError(f"the pack would have more than {config.pack_max_bytes} bytes")
        state = decode("working_set", (folder / WORKING_SET).read_bytes(), WORKING_SET)
        given = {"pack_id": pack_id, "created_at": now, "packed_by": packed_by, "pointers": dict(pointers)}
        manifest = _pack_manifest(state, history, files, **given)
        files[PACK_MANIFEST] = write_file(folder / PACK_MANIFEST, [encode("resume_pack_manifest", manifest) + b"\n"])
        try:
            contents = verify(folder, files)
        except PackError as error:
            raise BrokenError(f"the run cannot be packed: {error}", file=error.file) from None
        if zip_pack:
            folder = _zip(folder, sorted(files))
        else:
            _sync_all(folder)
        yield Prepared(folder, Snapshot(path, manifest, contents.manifest_sha256))


def _placed(prepare: Callable[_Options, AbstractContextManager[Prepared]]) -> Callable[_Options, Snapshot]:
    def placed(*args: _Options.args, **options: _Options.kwargs) -> Snapshot:
        with prepare(*args, **options) as ready:
            return ready.place()

    return placed


snapshot = _placed(prepared)
"""`prepared`, and put in its place."""


def _gather(
    run_folder: Path, folder: Path, working_set: Document | None, memory_items: Iterable[Document]
) -> tuple[dict[str, FileSum], History]:
    """Copy what a pack has of a run, but for the manifest."""
    history = History()
    files = {LEDGER: write_file(folder / LEDGER, _taken(whole_lines(run_folder / LEDGER), history))}
    state = encode("working_set", working_set) if working_set else (run_folder / WORKING_SET).read_bytes()
    files[WORKING_SET] = write_file(folder / WORKING_SET, [state])
    items = sorted(memory_items, key=lambda item: str(item["id"]))
    files[PACK_MEMORY] = write_file(folder / PACK_MEMORY, (encode("memory_item", item) + b"\n" for item in items))
    if history.episode is not None:
        name = f"{EPISODES}/{file_name(history.episode.number)}"
        if not (run_folder / name).exists():
            raise BrokenError(f"{name} is not there, and the ledger has it", file=name)
        files[name] = write_file(folder / name, _chunks(run_folder / name))
    return files, history


def _taken(lines: Iterable[bytes], history: History) -> Iterator[bytes]:
    """The lines, each known to the history once it has passed. Raises `BrokenError`."""
    for line in lines:
        history.add(line)
        yield line


def _pack_manifest(state: Document, history: History, files: Mapping[str, FileSum], **given: Any) -> Document:
    """With the members that the caller has `given`. Raises `SchemaError`."""
    manifest = {
        **given,
        "_schema_version": SCHEMA_VERSION,
        "run_id": state["run_id"],
        "task_id": state["task_id"],
        "thread_id": state["thread_id"],
        "update_seq": state["_update_seq"],
        "ledger_last_seq": history.last_seq,
        "episode_id": history.episode.episode_id if history.episode else None,
        "files": [
            {"path": name, "bytes": content.size, "sha256": content.sha256} for name, content in sorted(files.items())
        ],
    }
    return validate("resume_pack_manifest", manifest)


def _zip(folder: Path, names: list[str]) -> Path:
    """Sorted names, one time for all, nothing compressed: the same files are the same zip."""
    path = folder.with_name(folder.name + ".zip")
    with open(path, "xb", opener=_private) as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                info = zipfile.ZipInfo(name, _ZIP_TIME)
                info.create_system, info.external_attr = _UNIX, _FILE_ATTRIBUTES
                info.file_size = (folder / name).stat().st_size
                with (folder / name).open("rb") as file, archive.open(info, "w") as member:
                    shutil.copyfileobj(file, member, CHUNK_BYTES)
        out.flush()
        os.fsync(out.fileno())
    return path


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)


# --- Reading ---


def check(
    pack_path: Path,
    config: Config = DEFAULT_CONFIG,
    *,
    manifest_sha256: str | None = None,
    workspace: Path | None = None,
) -> CheckedPack:
    """Verify all of a pack, and keep the copy that was verified in a new folder in `workspace` (the system's default).

    With `manifest_sha256` it must be the pack with that manifest. Raises `NotFoundError`; `PackError` that names the
    first file that is wrong.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch(workspace)) / "pack"
        folder.mkdir(mode=FOLDER_MODE)
        found = copy_pack(pack_path, folder, config)
        contents = verify(folder, found, manifest_sha256)
        keeping = stack.pop_all()
    return CheckedPack(
        folder,
        contents.manifest,
        contents.manifest_sha256,
        contents.working_set,
        contents.episode,
        contents.ledger_last_seq,
        keeping,
    )


def unpack(
    pack: CheckedPack, run_folder: Path, *, now: str, run_id: str | None = None, actor: str | None = None
) -> Document:
    """Make a run of a pack: all of `run_folder` is there once this returns, or nothing of it. Gives the working set.

    The working set gets the run id, which is the packed run's where none is given; history stays as it was, and
    RESUME_PACK_LOADED is the next line of the ledger. What the pack remembers lies beside, and is proposed by whoever
    changes the run first (`Run.bring`). Raises `ExistsError` where the run is there.
    """
    if os.path.lexists(run_folder):
        raise ExistsError(f"the run {run_folder.name} is there already", run_id=run_folder.name)
    state = {**pack.working_set, "run_id": run_id or pack.working_set["run_id"]}
    event = {
        "_schema_version": SCHEMA_VERSION,
        "seq": pack.ledger_last_seq + 1,
        "event_id": f"evt_{os.urandom(_EVENT_ID_BYTES).hex()}",
        "event_type": "RESUME_PACK_LOADED",
        "run_id": state["run_id"],
        "timestamp": now,
        "actor": actor,
        "data": {
            "pack_id": pack.manifest["pack_id"],
            "from_run_id": pack.manifest["run_id"],
            "manifest_sha256": pack.manifest_sha256,
            "pointers": pack.manifest["pointers"],
        },
    }
    last_line = encode("ledger_event", event) + b"\n"
    make_folder(run_folder.parent)
    with scratch(run_folder.parent) as temporary:
        folder = temporary / run_folder.name
        write_file(folder / WORKING_SET, [encode("working_set", state)])
        write_file(folder / LEDGER, _then(_chunks(pack.folder / LEDGER), last_line))
        if (pack.folder / PACK_MEMORY).stat().st_size:
            write_file(folder / PENDING_MEMORY, _chunks(pack.folder / PACK_MEMORY))
        if pack.episode is not None:
            name = f"{EPISODES}/{file_name(pack.episode['number'])}"
            write_file(folder / name, _chunks(pack.folder / name))
            (folder / name).chmod(EPISODE_MODE)
            part, lines = pack.episode["ledger"], whole_lines(pack.folder / LEDGER)
            name = f"{EPISODES}/{slice_name(pack.episode['number'])}"
            write_file(folder / name, islice(lines, part["first_seq"] - 1, part["last_seq"]))
            (folder / name).chmod(SLICE_MODE)
        _sync_all(folder)
        _move(folder, run_folder)
    return state


def _then(chunks: Iterator[bytes], last: bytes) -> Iterator[bytes]:
    yield from chunks
    yield last


# --- Folders that are there whole or not at all ---


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _sync_all(folder: Path) -> None:
    """All files and names in it are on the disk from now on."""
    for inner, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(inner, name), os.O_RDONLY | os.O_CLOEXEC)  # noqa: PTH118  # os.walk gives strings
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(inner))


def _move(made: Path, place: Path) -> None:
    """Raises `ExistsError` where another process was there first."""
    try:
        if os.path.lexists(place):  # a rename would replace a file, or an empty folder
            raise ExistsError(f"{place.name} is there already", path=str(place))
        made.rename(place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY):
            raise ExistsError(f"{place.name} is there already", path=str(place)) from None
        raise
    sync_folder(place.parent)
