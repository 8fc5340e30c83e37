"""Locks of all processes: they end with their holder, and nobody waits for one without end."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from aos_context import locks
from aos_context.errors import BusyError
from aos_context.locks import TURNSTILE, locked

from tests.context import OVERLAY
from tests.context.served import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_a_thread_that_has_a_lock_may_take_it_again_and_keeps_it_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    order = []

    def other() -> None:
        with locked(path):
            order.append("other")

    thread = threading.Thread(target=other)
    with locked(path):
        with locked(tmp_path / "run" / ".." / "run" / ".lock"):
            thread.start()
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


def test_a_lock_ends_with_an_error_and_can_be_taken_by_another_thread(tmp_path: Path) -> None:
    def fail() -> None:
        with locked(tmp_path / ".lock"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    thread = threading.Thread(target=lambda: locked(tmp_path / ".lock").__enter__())
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


HOLDER = """
import sys
from pathlib import Path
from aos_context.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock and was stopped in the middle."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=OVERLAY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_that_a_stopped_process_holds_is_busy_after_its_time_and_free_once_that_ends(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aos_context.locks.LOCK_WAIT_S", 0.05)
    path = tmp_path / ".lock"
    with pytest.raises(BusyError, match=r"\.lock has been held by others for 0\.05 s") as refused, locked(path):
        pass
    assert (refused.value.status, refused.value.code) == (503, "BUSY")
    assert "stopped process" in str(refused.value.hint)
    monkeypatch.setattr("aos_context.locks.LOCK_WAIT_S", 60.0)
    holder.kill()
    with locked(path):
        pass


# --- Turns ---

TAKER = """
import os, sys
from pathlib import Path
from aos_context import locks
from aos_context.locks import locked
locks.PATIENT_S = 0.0
lock, turns, name, most = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
taken = os.open(turns, os.O_RDWR | os.O_APPEND | os.O_CREAT)
print("ready", flush=True)
sys.stdin.readline()
while True:
    with locked(lock):
        if os.fstat(taken).st_size >= most:
            break
        os.write(taken, name.encode())
        os.fsync(taken)
"""
TAKERS = "abcd"
TURNS = 400


def taken_by(tmp_path: Path) -> str:
    """Which process had each turn, all of which want the lock again as soon as they have released it."""
    turns = tmp_path / "turns"
    with ExitStack() as stack:
        takers = []
        for name in TAKERS:
            command = [sys.executable, "-c", TAKER, str(tmp_path / ".lock"), str(turns), name, str(TURNS)]
            pipe = subprocess.PIPE
            taker = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=OVERLAY))
            stack.callback(taker.kill)
            takers.append(taker)
        for taker in takers:
            assert taker.stdout is not None
            assert taker.stdout.readline() == "ready\n"
        for taker in takers:
            assert taker.stdin is not None
            taker.stdin.write("go\n")
            taker.stdin.flush()
        assert [taker.wait(PATIENCE_S) for taker in takers] == [0] * len(takers)
    return turns.read_text()


def test_processes_that_have_no_patience_have_a_lock_in_turns(tmp_path: Path) -> None:
    turns = taken_by(tmp_path)
    assert len(turns) == TURNS
    assert min(Counter(turns)[name] for name in TAKERS) >= TURNS / len(TAKERS) / 2
    runs = [len(list(run)) for _, run in itertools.groupby(turns)]
    assert sum(runs) / len(runs) <= 3, "who has released it does not take it again and again"


def test_who_has_waited_for_long_is_passed_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / ".lock", []

    def take() -> None:
        with locked(path):
            order.append("waited")

    monkeypatch.setattr(locks, "PATIENT_S", 0.0)
    waiter = threading.Thread(target=take)
    with locked(path):
        waiter.start()
        with path.with_name(path.name + TURNSTILE).open() as turnstile:
            deadline = time.monotonic() + PATIENCE_S
            while is_free(turnstile.fileno()):
                assert time.monotonic() < deadline
        monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.0)
        fd = os.open(path, os.O_RDWR)
        try:
            with pytest.raises(BusyError):
                locks._take(fd, path)
        finally:
            os.close(fd)
    waiter.join(PATIENCE_S)
    assert order == ["waited"]


def is_free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def test_who_comes_stands_behind_the_one_at_the_turnstile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.0)
    with locked(path):
        waits = path.with_name(path.name + TURNSTILE).open()
        fcntl.flock(waits, fcntl.LOCK_EX)  # as another process does that wants it
    with waits, pytest.raises(BusyError), locked(path):
        pass
    with locked(path):
        pass
