"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aos_context.files import FILE_MODE, FOLDER_MODE, make_folder, temporary_file, write_all, write_atomic
from aos_context.memory import InMemoryMemoryStore
from aos_context.memory_sqlite import SQLiteMemoryStore
from aos_context.opening import opened
from aos_context.resume_pack import check, snapshot, unpack
from aos_context.runs import Runs
from aos_context.settings import Settings

from tests.context.made import TIME, MadeRun
from tests.context.served import FACT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new", mode=0o400)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o400)


def test_a_temporary_file_that_is_not_moved_is_removed(tmp_path: Path) -> None:
    with temporary_file(tmp_path / "file", b"content") as temporary:
        assert temporary.read_bytes() == b"content"
        assert temporary.stat().st_mode & 0o777 == FILE_MODE
    assert list(tmp_path.iterdir()) == []


def test_every_folder_on_the_way_is_made_and_synced_in_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("aos_context.files.sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == FOLDER_MODE


def made_a_memory(folder: Path) -> Path:
    SQLiteMemoryStore(folder / "new" / "root" / "memory.sqlite").close()
    return folder / "new" / "root"


def opened_a_service(folder: Path) -> Path:
    with opened(Settings(root=folder / "new" / "root")):
        return folder / "new" / "root"


def reached_a_milestone(folder: Path) -> Path:
    made = MadeRun(folder / "run_1")
    made.milestone()
    return made.folder / "episodes"


def packed(folder: Path) -> Path:
    made = MadeRun(folder / "run_1")
    snapshot(made.folder, pack_id="p1", zip_pack=True, pointers={}, memory_items=[], now=TIME)
    return made.folder / "resume"


def unpacked(folder: Path) -> Path:
    resume = packed(folder)
    with check(resume / "pack_p1.zip") as pack:
        unpack(pack, folder / "new" / "root" / "run_1", now=TIME)
    return folder / "new" / "root"


@pytest.mark.parametrize("make", [made_a_memory, opened_a_service, reached_a_milestone, packed, unpacked])
def test_wherever_a_folder_is_made_its_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def recording(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recording)
    made = make(tmp_path)
    assert made.parent in synced
    assert made.stat().st_mode & 0o777 == FOLDER_MODE
    if made.parent.name == "new":
        assert tmp_path in synced


@pytest.fixture
def no_umask() -> Iterator[None]:
    """Nothing is taken from the mode that a program asks for."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_every_folder_of_a_run_and_of_a_pack_is_its_owners_whoever_made_it(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", memory=InMemoryMemoryStore())
    run = runs.open(runs.boot("Be private.", run_id="booted")["run_id"])
    run.milestone("one", memory_batch_id=run.propose([FACT]).batch_id)
    runs.load_file(run.snapshot().path, "loaded")
    runs.load_file(run.snapshot(zip_pack=False).path, "again")
    folders = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()
    }
    assert {"runs/booted", "runs/loaded", "runs/loaded/state", "runs/again/episodes"} <= set(folders)
    assert set(folders.values()) == {FOLDER_MODE}


def test_what_is_written_in_parts_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        write_all(fd, b"0123456789")
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"0123456789"
