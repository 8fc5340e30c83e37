"""Whatever a program leaves is removed, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runners import sandbox, scratch


def as_a_plain_owner(function: object, *arguments: object) -> int:
    """The exit status of a process without capabilities that calls it."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            sandbox.drop_capabilities(0)
            function(*arguments)  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nested(top: Path, depth: int) -> None:
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("folder", dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        below = os.open("folder", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def test_a_tree_of_ten_thousand_levels_is_removed(tmp_path: Path) -> None:
    nested(tmp_path / "top", 10_000)
    scratch.remove_tree(str(tmp_path / "top"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o400, 0o500, 0o600])
def test_folders_of_any_mode_are_removed_by_their_owner(tmp_path: Path, mode: int) -> None:
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "empty").mkdir(mode)
    (top / "a" / "b" / "file").write_text("text")
    for folder in (top / "a" / "b", top / "a", top):
        folder.chmod(mode)
    assert as_a_plain_owner(scratch.remove_tree, str(top)) == 0
    assert list(tmp_path.iterdir()) == []


def test_names_of_any_bytes_and_every_kind_of_file_are_removed(tmp_path: Path) -> None:
    top = os.fsencode(tmp_path / "top")
    Path(os.fsdecode(top + b"/\xff\xfe")).mkdir(parents=True)
    for name in (b"/\xff\xfe/\n", b"/ ", b"/-rf", b"/\xc3\x28"):
        os.close(os.open(top + name, os.O_CREAT | os.O_WRONLY))
    os.mkfifo(top + b"/fifo")
    scratch.remove_tree(os.fsdecode(top))
    assert list(tmp_path.iterdir()) == []


def test_links_are_removed_and_what_they_lead_to_is_not(tmp_path: Path) -> None:
    kept, top = tmp_path / "kept", tmp_path / "top"
    kept.mkdir(0o500)
    top.mkdir()
    (tmp_path / "file").write_text("text")
    (top / "link").symlink_to(kept)
    (top / "other").symlink_to(tmp_path / "file")
    (top / "same").hardlink_to(tmp_path / "file")
    (tmp_path / "direct").symlink_to(kept)
    for path in (top, tmp_path / "direct"):
        scratch.remove_tree(str(path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept"]
    assert kept.stat().st_mode & 0o777 == 0o500


def test_a_file_and_what_is_not_there_are_removed_as_well(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for _ in range(2):
        scratch.remove_tree(str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_removal_stops_where_the_tree_is_moved_from_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    (tmp_path / "top" / "a" / "b").mkdir(parents=True)
    (tmp_path / "top" / "a" / "b" / "file").write_text("text")
    most = scratch._remove_most

    def moved_meanwhile(fd: int) -> list[str]:
        left = most(fd)
        if Path(f"/proc/self/fd/{fd}").resolve().name == "b":
            (tmp_path / "top" / "a" / "b").rename(tmp_path / "outside" / "b")
        return left

    monkeypatch.setattr(scratch, "_remove_most", moved_meanwhile)
    with pytest.raises(OSError, match="Stale file handle"):
        scratch.remove_tree(str(tmp_path / "top"))
    assert (tmp_path / "outside" / "kept").read_text() == "kept"


def test_it_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    nested(tmp_path / "top", 10)
    scratch.remove_tree(str(tmp_path / "top"))
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_place_that_was_made_unusable_is_made_usable_again(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "1").mkdir()
    (place / "1" / "file").write_text("text")
    place.chmod(0)
    assert as_a_plain_owner(scratch.Scratch(str(place), shared_memory=False).make, 1) == 0
    assert list(place.iterdir()) == [place / "1"]
    assert list((place / "1").iterdir()) == []
