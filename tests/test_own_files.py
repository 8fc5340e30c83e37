"""Files beside the ledger: who may write its folder cannot make the bus write, cut off, copy or remove another file."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from bus import checkpoints, index, own_files, segments, server_lock, starts
from bus.checkpoints import Checkpoints
from bus.errors import OperatorError
from bus.ledger import LedgerError
from bus.starts import Starts
from runners.logs import OverlayLogs, path_of
from tests.ledgers import append, call, opened, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECRET = b'{"signed": {}}\n'
"""What stands in the file that a link leads to."""


@dataclass(frozen=True, slots=True)
class Ground:
    """A ledger's path, and a file of the bus's state that nobody else may write."""

    path: Path
    victim: Path

    def plant(self, name: str, to: Path | None = None) -> None:
        """Put a link beside the ledger, by default to that file, in place of what has the name."""
        link = self.path.parent / name
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            link.rename(link.with_name(f"{link.name}.hidden"))
        link.symlink_to(to or self.victim)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    state = tmp_path / ".aal"
    state.mkdir()
    victim = state / "tokens.json"
    victim.write_bytes(SECRET)
    return Ground(tmp_path / "logs" / "provenance.jsonl", victim)


# --- Names of files that are made ---


def cut_a_torn_tail(ground: Ground) -> None:
    write(ground.path, call())
    with ground.path.open("ab") as file:
        file.write(b'{"forged": true}')
    ground.plant("provenance.jsonl.torn.part")
    write(ground.path, call())
    [kept] = ground.path.parent.glob("*.torn-*")
    assert kept.read_bytes() == b'{"forged": true}'


def probe(ground: Ground) -> None:
    with opened(ground.path) as ledger:
        ground.plant(f"provenance.jsonl.probe-{os.getpid()}")
        assert ledger.probe()


def rotate(ground: Ground) -> None:
    with opened(ground.path, segment_bytes=1) as ledger:
        append(ledger, call())
        ground.plant("provenance.jsonl.next")
        append(ledger, call())
    assert len(segments.closed_firsts(ground.path)) >= 1


def compress(ground: Ground) -> None:
    write(ground.path, call(), call(), segment_bytes=1)
    [first, *_] = segments.closed_firsts(ground.path)
    ground.plant(f"{segments.packed_path(ground.path, first).name}.part")
    assert segments.compress(ground.path) >= 1


def keep_a_note(ground: Ground) -> None:
    ground.plant(f"checkpoints/.{7:012}-{os.getpid()}")
    checkpoints.Checkpoints(ground.path, None)._put(7, "note\n")
    assert (ground.path.parent / f"checkpoints/{7:012}").read_text() == "note\n"


def mark_a_start(ground: Ground) -> None:
    async def begin() -> None:
        with opened(ground.path) as ledger:
            started = Starts(ledger)
            ground.plant(f"{starts.FOLDER}/.{started._writer}")
            await started.begin({"request_id": "r", "overlay": "o", "phase": "SEAL"})
            started.close()

    asyncio.run(begin())


MADE = [cut_a_torn_tail, probe, rotate, compress, keep_a_note, mark_a_start]


@pytest.mark.parametrize("step", MADE, ids=lambda step: step.__name__)
def test_a_link_under_the_name_of_a_file_that_is_made_is_replaced(
    ground: Ground, step: Callable[[Ground], None]
) -> None:
    step(ground)
    assert ground.victim.read_bytes() == SECRET


# --- Names of files that are opened ---


def append_to_the_log(ground: Ground) -> None:
    ground.plant(ground.path.name)
    with opened(ground.path) as ledger, pytest.raises(LedgerError, match="symbolic link"):
        append(ledger, call())


def go_on_with_the_log(ground: Ground) -> None:
    with opened(ground.path) as ledger:
        append(ledger, call())
        ground.plant(ground.path.name)
        with pytest.raises(LedgerError, match="symbolic link"):
            append(ledger, call())


def lock_the_log(ground: Ground) -> None:
    ground.plant(segments.lock_path(ground.path).name, ground.victim.with_name("made"))
    with opened(ground.path) as ledger, pytest.raises(LedgerError, match="symbolic link"):
        append(ledger, call())


def lock_to_compress(ground: Ground) -> None:
    write(ground.path, call(), call(), segment_bytes=1)
    ground.plant("provenance.compressing", ground.victim.with_name("made"))
    with pytest.raises(OSError, match="symbolic link"):
        segments.compress(ground.path)


def compress_a_link(ground: Ground) -> None:
    write(ground.path, call(), call(), segment_bytes=1)
    [first, *_] = segments.closed_firsts(ground.path)
    ground.plant(segments.closed_path(ground.path, first).name)
    with pytest.raises(OSError, match="symbolic link"):
        segments.compress(ground.path)
    assert not [one for one in ground.path.parent.glob("*.gz") if gzip.decompress(one.read_bytes()) == SECRET]


def read_a_link(ground: Ground) -> None:
    write(ground.path, call(), call(), segment_bytes=1)
    [first, *_] = segments.closed_firsts(ground.path)
    ground.plant(segments.closed_path(ground.path, first).name)
    with segments.Segments(ground.path) as log, pytest.raises(OSError, match="symbolic link"):
        list(log.lines())


def write_the_index(ground: Ground) -> None:
    write(ground.path, call())
    ground.victim.write_bytes(b"")  # which SQLite would take for a new database
    ground.plant("provenance.index")
    assert index.Index(ground.path).refresh() == 0
    assert ground.victim.read_bytes() == b""
    ground.victim.write_bytes(SECRET)


def read_the_index(ground: Ground) -> None:
    write(ground.path, call())
    index.Index(ground.path).refresh()
    elsewhere = ground.victim.with_name("index")
    (ground.path.parent / "provenance.index").rename(elsewhere)
    ground.plant("provenance.index", elsewhere)
    with index.Index(ground.path).reading() as view:
        assert view is None


def lock_the_index(ground: Ground) -> None:
    write(ground.path, call())
    ground.plant("provenance.indexing", ground.victim.with_name("made"))
    assert index.Index(ground.path).refresh() == 0


def serve_the_ledger(ground: Ground) -> None:
    ground.plant("provenance.serving")
    with server_lock.ledger_lock(ground.path):
        assert ground.victim.read_bytes() == SECRET


def serve_the_folder(ground: Ground) -> None:
    ground.plant("../.aal/serve.lock")
    with pytest.raises(OperatorError, match="symbolic link"), server_lock.folder_lock(ground.victim.parent):
        pass


def write_a_log_of_an_overlay(ground: Ground) -> None:
    async def say() -> None:
        logs = OverlayLogs(ground.path.parent, 1000)
        ground.plant(path_of(ground.path.parent, "echo").name)
        logs.append("echo", b"forged\n")
        logs.close()

    asyncio.run(say())


OPENED = [
    append_to_the_log,
    go_on_with_the_log,
    lock_the_log,
    lock_to_compress,
    compress_a_link,
    read_a_link,
    write_the_index,
    read_the_index,
    lock_the_index,
    serve_the_ledger,
    serve_the_folder,
    write_a_log_of_an_overlay,
]


@pytest.mark.parametrize("step", OPENED, ids=lambda step: step.__name__)
def test_a_link_under_the_name_of_a_file_that_is_opened_is_not_followed(
    ground: Ground, step: Callable[[Ground], None]
) -> None:
    step(ground)
    assert ground.victim.read_bytes() == SECRET
    assert not ground.victim.with_name("made").exists()


# --- Names of folders ---


def test_a_link_in_place_of_the_folder_of_starts_costs_no_file_that_it_leads_to(ground: Ground) -> None:
    with opened(ground.path) as ledger:
        ground.plant(starts.FOLDER, ground.victim.parent)
        asyncio.run(Starts(ledger).close_left())
        with pytest.raises(LedgerError, match=starts.FOLDER):
            asyncio.run(Starts(ledger).begin({"request_id": "r", "overlay": "o", "phase": "SEAL"}))
    assert [one.name for one in ground.victim.parent.iterdir()] == [ground.victim.name]


def test_the_files_of_a_folder_that_is_swapped_for_a_link_meanwhile_are_removed_where_they_were(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ground.path.parent / starts.FOLDER
    folder.mkdir(parents=True)
    (folder / ground.victim.name).write_bytes(b"no number")
    read = starts._Marker.read

    def swapped(self: starts._Marker) -> int | None:
        ground.plant(starts.FOLDER, ground.victim.parent)
        return read(self)

    monkeypatch.setattr(starts._Marker, "read", swapped)
    monkeypatch.setattr(starts._Marker, "is_in_place", lambda _: True)
    with opened(ground.path) as ledger:
        asyncio.run(Starts(ledger).close_left())
    assert ground.victim.read_bytes() == SECRET
    assert not (folder.with_name(f"{folder.name}.hidden") / ground.victim.name).exists()


def test_a_link_in_place_of_the_folder_of_notes_gets_none(ground: Ground, caplog: pytest.LogCaptureFixture) -> None:
    ground.plant(checkpoints.FOLDER, ground.victim.parent)
    ground.victim.with_name("7").write_text("a name of digits")
    kept = Checkpoints(ground.path, None)
    kept._put(9, "note\n")
    assert checkpoints.FOLDER in caplog.text
    assert sorted(one.name for one in ground.victim.parent.iterdir()) == ["7", ground.victim.name]
    assert not kept.is_kept({"size": 7, "note": "a name of digits"})


# --- Of themselves ---


def test_what_is_made_is_new_and_of_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("left by a killed process")
    fd = own_files.make_own(file, 0o600)
    try:
        assert (os.fstat(fd).st_size, stat.S_IMODE(os.fstat(fd).st_mode)) == (0, 0o600)
        assert not os.get_inheritable(fd)
        assert os.path.samestat(os.fstat(fd), file.stat())
    finally:
        os.close(fd)


def test_what_somebody_makes_just_then_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_bytes(SECRET)
    unlink = os.unlink

    def raced(path: str, **options: int | None) -> None:
        with contextlib.suppress(FileNotFoundError):
            unlink(path, **options)
        (tmp_path / "file").symlink_to("victim")

    monkeypatch.setattr(os, "unlink", raced)
    with pytest.raises(FileExistsError):
        own_files.make_own(tmp_path / "file", 0o600)
    assert (tmp_path / "victim").read_bytes() == SECRET
