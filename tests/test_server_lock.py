"""The lock of what one server serves: it stays with its holder also where somebody removes or moves its file."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from bus import serving
from bus.errors import OperatorError
from bus.server_lock import folder_lock, ledger_lock, looked_after
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / ".aal"


def is_taken(state: Path) -> bool:
    """Whether another server of the folder is refused, since this process has the lock."""
    try:
        with folder_lock(state):
            return False
    except OperatorError as error:
        return (error.code, error.detail) == ("ERR_IN_USE", f"process {os.getpid()} serves {state.parent}")


def test_a_folder_and_a_ledger_have_one_server_until_that_lets_go(state: Path, tmp_path: Path) -> None:
    with folder_lock(state):
        assert is_taken(state)
    assert not is_taken(state)
    ledger = tmp_path / "logs" / "provenance.jsonl"
    with ledger_lock(ledger), pytest.raises(OperatorError, match=r"serves the ledger in .*/logs"), ledger_lock(ledger):
        pass


def _removed(path: Path) -> None:
    path.unlink()


def _replaced(path: Path) -> None:
    path.unlink()
    path.write_text("99999\n")


def _moved_with_its_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def _removed_with_its_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("lost", [_removed, _replaced, _moved_with_its_folder, _removed_with_its_folder])
def test_a_lock_whose_file_is_gone_is_taken_anew(
    state: Path, lost: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    with folder_lock(state) as lock:
        lock.look()
        assert not caplog.records
        lost(lock.path)
        lock.look()
        assert "is taken anew" in caplog.text
        assert is_taken(state)
        assert lock.path.read_text() == f"{os.getpid()}\n"
        caplog.clear()
        lock.look()
        assert not caplog.records
    assert not is_taken(state)


def test_where_another_server_was_quicker_both_are_told_of_and_the_lock_is_taken_back_after_it(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with folder_lock(state) as lock:
        lock.path.unlink()
        with folder_lock(state):
            lock.look()
            lock.look()
            told = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert [f"process {os.getpid()} serves {state.parent}" in record.getMessage() for record in told] == [True]
        lock.look()
        assert is_taken(state)


def test_a_lock_is_not_had_on_a_file_that_lost_its_name_meanwhile(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock
    removed: list[int] = []

    def and_remove(fd: int, how: int) -> Any:
        real(fd, how)
        if not removed:
            removed.append(fd)
            (state / serving.LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", and_remove)
    with folder_lock(state):
        assert removed
        assert is_taken(state)


def test_a_link_under_the_name_is_not_followed(state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "precious"
    other.write_text("kept")
    with folder_lock(state) as lock:
        lock.path.unlink()
        lock.path.symlink_to(other)
        lock.look()
        assert "was lost" in caplog.text
    with pytest.raises(OperatorError, match="cannot lock"), folder_lock(state):
        pass
    ledger = tmp_path / "logs" / "provenance.jsonl"
    ledger.parent.mkdir()
    ledger.with_suffix(serving.LEDGER_LOCK).symlink_to(other)
    with ledger_lock(ledger):
        assert other.read_text() == "kept"


def test_a_ledger_that_got_a_folder_only_later_is_locked_then(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.write_text("in the way")
    ledger = logs / "provenance.jsonl"
    with ledger_lock(ledger) as lock:
        logs.unlink()
        lock.look()
        with pytest.raises(OperatorError, match="serves the ledger"), ledger_lock(ledger):
            pass


def test_locks_are_looked_after_as_long_as_that_lasts(state: Path) -> None:
    with folder_lock(state) as lock, looked_after(lock, period_s=0.01):
        lock.path.unlink()
        eventually(lambda: lock.path.exists() and lock.path.read_text() == f"{os.getpid()}\n", "the lock is taken anew")
        assert is_taken(state)
