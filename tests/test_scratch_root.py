"""The scratch root: what a bus that is gone has left there is removed, and nothing that another needs."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from runners import scratch_root
from runners.scratch_root import ScratchRoot

if TYPE_CHECKING:
    from pathlib import Path

OURS, ANOTHERS = "aal-" + "0" * 16, "aal-" + "f" * 16


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave(folder: Path, mark: str) -> None:
    """What a helper without a namespace leaves when it is killed together with its bus."""
    inner = folder / f"{mark}-7" / "3" / "deep"
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    inner.chmod(0)


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    root = ScratchRoot(tmp_path / "state" / "scratch", OURS)
    assert (tmp_path / "state" / "scratch").stat().st_mode & 0o777 == 0o700
    root.close()
    assert names(tmp_path / "state" / "scratch") == set()


@pytest.mark.parametrize("lock", [True, False], ids=["with its lock", "without"])
def test_what_a_bus_that_is_gone_has_left_is_removed(tmp_path: Path, lock: bool) -> None:
    leave(tmp_path, ANOTHERS)
    if lock:
        (tmp_path / f"{ANOTHERS}.lock").touch()
    root = ScratchRoot(tmp_path, OURS)
    root.sweep()
    assert names(tmp_path) == {f"{OURS}.lock"}
    root.close()


def test_what_a_bus_has_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    another = ScratchRoot(tmp_path, ANOTHERS)
    leave(tmp_path, ANOTHERS)
    root = ScratchRoot(tmp_path, OURS)
    root.sweep()
    assert names(tmp_path) == {f"{ANOTHERS}-7", f"{ANOTHERS}.lock", f"{OURS}.lock"}
    another.close()
    root.sweep()
    assert names(tmp_path) == {f"{OURS}.lock"}
    root.close()


def test_what_buses_of_another_user_have_left_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, ANOTHERS)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    scratch_root.sweep(tmp_path)
    assert names(tmp_path) == {f"{ANOTHERS}-7"}
    monkeypatch.undo()
    scratch_root.sweep(tmp_path)
    assert names(tmp_path) == set()


def test_its_own_calls_and_what_is_of_no_bus_are_left_alone(tmp_path: Path) -> None:
    root = ScratchRoot(tmp_path, OURS)
    leave(tmp_path, OURS)
    (tmp_path / "notes").write_text("x")
    (tmp_path / "aal-backup-1").mkdir()
    root.sweep()
    assert names(tmp_path) == {f"{OURS}-7", f"{OURS}.lock", "notes", "aal-backup-1"}
    root.close()


def test_a_lock_is_not_followed_to_another_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leave(tmp_path, ANOTHERS)
    (tmp_path / f"{ANOTHERS}.lock").symlink_to(tmp_path / "elsewhere")
    root = ScratchRoot(tmp_path, OURS)
    root.sweep()
    assert "cannot be removed" in caplog.text
    assert not (tmp_path / "elsewhere").exists()
    root.close()


def test_buses_that_start_together_each_have_their_lock(tmp_path: Path) -> None:
    marks = [f"aal-{number:016x}" for number in range(8)]
    roots: list[ScratchRoot] = []

    def begin(mark: str) -> None:
        root = ScratchRoot(tmp_path, mark)
        root.sweep()
        roots.append(root)

    threads = [threading.Thread(target=begin, args=(mark,)) for mark in marks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == {f"{mark}.lock" for mark in marks}
    for root in roots:
        root.close()
    assert names(tmp_path) == set()
