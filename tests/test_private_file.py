"""The private files of the state folder: seen when they change, whole, and refused where they are not private."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from bus.errors import OperatorError, SettingError
from bus.private_file import PrivateFile

if TYPE_CHECKING:
    from pathlib import Path


class Words:
    """`{"words": [...]}`"""

    name = "words.json"
    allowed = "words"
    hint = "Mend it."

    def empty(self) -> tuple[str, ...]:
        return ()

    def read(self, document: Any) -> tuple[str, ...]:
        if not isinstance(document, dict):
            raise ValueError("no object")  # noqa: TRY004
        return tuple(document["words"])

    def document(self, held: tuple[str, ...]) -> object:
        return {"words": list(held)}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def file(state: Path) -> PrivateFile[tuple[str, ...]]:
    return PrivateFile(state, Words())


def write(state: Path, text: str, mode: int = 0o600) -> None:
    state.mkdir(exist_ok=True)
    (state / "words.json").write_text(text)
    (state / "words.json").chmod(mode)


def test_no_file_holds_nothing_and_makes_none(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    assert file.get() == ()
    assert not state.exists()


def test_what_is_changed_is_read_by_others_at_once(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    other = PrivateFile(state, Words())
    assert other.get() == ()
    for number in range(3):
        assert file.change(lambda words: (*words, f"word {len(words)}"))[-1] == f"word {number}"
        assert other.get() == file.get()
    assert other.get() == ("word 0", "word 1", "word 2")


def test_equal_content_stays_the_same_object_though_the_file_is_another(
    state: Path, file: PrivateFile[tuple[str, ...]]
) -> None:
    write(state, '{"words": ["a"]}')
    first = file.get()
    write(state, '{"words":  ["a"]}')
    assert file.get() is first


def test_a_file_that_is_taken_away_holds_nothing_again(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    file.change(lambda _: ("a",))
    (state / "words.json").unlink()
    assert file.get() == ()


def test_only_its_owner_can_open_it_whatever_the_umask(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    before = os.umask(0)
    try:
        file.change(lambda _: ("a",))
    finally:
        os.umask(before)
    assert stat.S_IMODE((state / "words.json").stat().st_mode) == 0o600


def test_a_change_leaves_nothing_beside_the_file_and_its_lock(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    file.change(lambda _: ("a",))
    assert sorted(path.name for path in state.iterdir()) == ["overlays.lock", "words.json"]


def test_a_change_that_raises_leaves_the_file_as_it_was(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    file.change(lambda _: ("a",))

    def fail(_: tuple[str, ...]) -> tuple[str, ...]:
        raise OperatorError("ERR_EXISTS", "no")

    with pytest.raises(OperatorError, match="no"):
        file.change(fail)
    assert file.get() == ("a",)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_writes_belongs_to_the_owner_of_the_folder(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    state.mkdir()
    os.chown(state, 65534, 65534)
    file.change(lambda _: ("a",))
    assert (state / "words.json").stat().st_uid == 65534


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o622, 0o777])
def test_a_file_that_others_may_open_is_refused_with_what_mends_it(
    state: Path, file: PrivateFile[tuple[str, ...]], mode: int
) -> None:
    write(state, '{"words": ["a"]}', mode)
    with pytest.raises(SettingError, match=f"mode {mode:o}") as refused:
        file.get()
    assert f"chmod 600 {state}/words.json" in str(refused.value.hint)
    (state / "words.json").chmod(0o600)
    assert file.get() == ("a",)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"words": 1, "words": 2}', "\0", '{"words": NaN}'])
def test_a_file_that_makes_no_sense_is_refused_each_time_and_stays_as_it_is(
    state: Path, file: PrivateFile[tuple[str, ...]], text: str
) -> None:
    file.change(lambda _: ("a",))
    write(state, text)
    for _ in range(2):
        with pytest.raises(SettingError, match=r"words\.json: found .*, allowed: words"):
            file.get()
    with pytest.raises(SettingError):
        file.change(lambda _: ("b",))
    assert (state / "words.json").read_text() == text


def test_a_file_that_was_mended_is_read(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    write(state, "{")
    with pytest.raises(SettingError):
        file.get()
    write(state, json.dumps({"words": ["b"]}))
    assert file.get() == ("b",)


def test_a_state_folder_that_is_none_is_refused_and_not_taken_for_empty(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(SettingError, match="Not a directory"):
        PrivateFile(tmp_path / "state", Words()).get()


@pytest.mark.usefixtures("bound_by_modes")
def test_a_file_that_cannot_be_opened_is_refused_and_not_taken_for_empty(
    state: Path, file: PrivateFile[tuple[str, ...]]
) -> None:
    write(state, '{"words": []}', 0)
    with pytest.raises(SettingError, match="Permission denied"):
        file.get()


@pytest.mark.usefixtures("bound_by_modes")
def test_a_folder_that_cannot_be_written_is_told(state: Path, file: PrivateFile[tuple[str, ...]]) -> None:
    file.change(lambda _: ("a",))
    state.chmod(0o500)
    try:
        with pytest.raises(OperatorError, match="cannot write"):
            file.change(lambda _: ("b",))
    finally:
        state.chmod(0o700)
    assert file.get() == ("a",)
