"""The memory of a key: one file, for all processes that sign with it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
from typing import TYPE_CHECKING

import pytest

from bus.errors import OperatorError, SettingError
from bus.signed import Signed, SignedTrees
from tests.faults.children import Child

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.children import Say

VKEY = "example.org/aal+12345678+key"
ONE, TWO = Signed(1, b"\1" * 32), Signed(2, b"\2" * 32)
TURNS = 200


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / ".aal"


@pytest.fixture
def trees(state: Path) -> SignedTrees:
    return SignedTrees(state, VKEY)


def test_nothing_is_signed_where_there_is_no_file_and_a_look_makes_none(trees: SignedTrees, state: Path) -> None:
    assert trees.get() == ()
    assert not state.exists()


def test_what_one_process_writes_another_reads(trees: SignedTrees, state: Path) -> None:
    assert trees.change(lambda _: (ONE,)) == (ONE,)
    other = SignedTrees(state, VKEY)
    assert other.get() == (ONE,)
    other.change(lambda held: held)
    assert other.swap((ONE,), (TWO,), wait=True) == (TWO,)
    assert trees.get() == (TWO,)
    assert trees.swap((ONE,), (ONE,), wait=True) == (TWO,), "it holds something else"
    assert trees.get() == (TWO,)


def test_another_key_has_a_file_of_its_own(trees: SignedTrees, state: Path) -> None:
    trees.change(lambda _: (ONE,))
    assert SignedTrees(state, VKEY + "2").get() == ()
    trees.path.replace(SignedTrees(state, VKEY + "2").path)
    with pytest.raises(SettingError, match="something else"):
        SignedTrees(state, VKEY + "2").get()


def test_it_is_written_in_place_within_one_sector_and_is_for_its_owner_alone(trees: SignedTrees) -> None:
    trees.change(lambda _: (ONE,))
    file = trees.path.stat().st_ino
    for one in (Signed(2**62, TWO.root), ONE):
        trees.swap(trees.get(), (one,), wait=True)
        assert (trees.path.stat().st_ino, trees.path.stat().st_size) == (file, 512)
        assert json.loads(trees.path.read_bytes())["signed"] == [{"root": one.root.hex(), "size": one.size}]
    assert trees.path.stat().st_mode & 0o777 == 0o600


def test_of_a_longer_text_nothing_is_left_that_counts(trees: SignedTrees, state: Path) -> None:
    many = tuple(Signed(size, bytes([size]) * 32) for size in range(1, 9))
    assert trees.change(lambda _: many) == many
    assert SignedTrees(state, VKEY).get() == many
    trees.change(lambda _: (ONE,))
    assert trees.path.stat().st_size > 512
    assert SignedTrees(state, VKEY).get() == (ONE,)


def test_a_file_that_others_may_open_or_that_is_a_link_is_refused(trees: SignedTrees, tmp_path: Path) -> None:
    trees.change(lambda _: (ONE,))
    trees.path.chmod(0o640)
    with pytest.raises(SettingError, match="mode 640"):
        trees.get()
    trees.path.chmod(0o600)
    kept = trees.path.rename(tmp_path / "elsewhere")
    trees.path.symlink_to(kept)
    with pytest.raises(SettingError, match="symbolic link"):
        trees.get()


def test_who_does_not_wait_is_told_that_another_has_the_lock(trees: SignedTrees) -> None:
    trees.change(lambda _: (ONE,))
    with trees.path.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(OperatorError, match="temporarily unavailable"):
            trees.swap((ONE,), (TWO,), wait=False)
    assert trees.swap((ONE,), (TWO,), wait=False) == (TWO,)


def test_a_file_that_is_taken_away_is_noticed_and_made_again(trees: SignedTrees, state: Path) -> None:
    trees.change(lambda _: (ONE,))
    assert trees.sync()
    trees.path.unlink()
    assert not trees.sync()
    assert trees.change(lambda held: (*held, TWO)) == (TWO,)
    assert trees.sync()
    assert SignedTrees(state, VKEY).get() == (TWO,)


def test_it_goes_on_after_it_was_closed(trees: SignedTrees) -> None:
    trees.change(lambda _: (ONE,))
    trees.close()
    trees.close()
    assert trees.change(lambda held: (*held, TWO)) == (ONE, TWO)
    trees.close()


def test_a_lock_that_cannot_be_let_go_of_holds_nobody_up(
    trees: SignedTrees, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.change(lambda _: (ONE,))
    flock = fcntl.flock

    def fail(fd: int, how: int) -> None:
        if how == fcntl.LOCK_UN:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flock(fd, how)

    with monkeypatch.context() as broken:
        broken.setattr(fcntl, "flock", fail)
        assert trees.swap((ONE,), (TWO,), wait=True) == (TWO,)
        other = SignedTrees(state, VKEY)
        other.change(lambda held: held)
        assert other.swap((TWO,), (ONE,), wait=False) == (ONE,)
    assert trees.swap((ONE,), (TWO,), wait=False) == (TWO,)
    assert trees.sync()
    trees.close()
    assert trees.sync()


def test_what_many_processes_write_is_one_row(trees: SignedTrees, state: Path) -> None:
    """Each goes on from what stands there: of all their steps none is lost."""

    def work(name: int, say: Say) -> None:
        own = SignedTrees(state, VKEY)
        known, steps = own.change(lambda held: held), 0
        while steps < TURNS:
            new = (Signed(1 + sum(one.size for one in known), bytes([name]) * 32),)
            known = own.swap(known, new, wait=True)
            steps += known == new
        say("done")

    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(functools.partial(work, name))) for name in range(3)]
        for child in children:
            child.go()
        assert [child.lines() for child in children] == [["done"]] * 3
    assert [one.size for one in trees.get()] == [3 * TURNS]
