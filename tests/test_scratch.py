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


# What is in one


def counted(folder: Path) -> scratch.Count:
    count = scratch.Count(os.fsencode(folder))
    assert count.go_on(scratch.NEVER)
    return count


def own_kib(folder: Path) -> int:
    """What a folder counts itself."""
    return max(scratch.ENTRY_KIB, folder.stat().st_blocks // 2)


def test_what_the_file_system_has_given_out_counts_and_no_hole(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 40)
    assert counted(tmp_path).kib == own_kib(tmp_path) + scratch.ENTRY_KIB
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/full").write_bytes(os.urandom(1 << 20))
    assert 1024 <= counted(tmp_path).kib <= 1024 + 16 * scratch.ENTRY_KIB


def test_a_file_of_two_names_counts_once_and_a_link_for_nothing_but_itself(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/large").write_bytes(os.urandom(4 << 20))
    (tmp_path / "top").mkdir()
    (tmp_path / "top/a").write_bytes(os.urandom(1 << 20))
    (tmp_path / "top/b").hardlink_to(tmp_path / "top/a")
    (tmp_path / "top/away").symlink_to(tmp_path / "outside")
    (tmp_path / "top/round").symlink_to(tmp_path / "top")
    assert 1024 <= counted(tmp_path / "top").kib < 2048


def test_a_link_in_the_place_of_the_folder_is_not_counted_for_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/large").write_bytes(os.urandom(4 << 20))
    (tmp_path / "top").symlink_to(tmp_path / "outside")
    assert counted(tmp_path / "top").kib == scratch.ENTRY_KIB


def test_empty_files_count_and_no_more_of_them_than_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (tmp_path / str(number)).touch()
    assert counted(tmp_path).kib == own_kib(tmp_path) + 50 * scratch.ENTRY_KIB
    monkeypatch.setattr(scratch, "MOST_ENTRIES", 49)
    assert counted(tmp_path).fault == "too much in scratch: more than 49 files and folders"


def test_a_tree_that_no_path_reaches_the_end_of_is_too_much(tmp_path: Path) -> None:
    nested(tmp_path / "top", 1000)  # of 7 bytes each, and PATH_MAX is 4096
    assert counted(tmp_path / "top").fault == scratch.TOO_DEEP
    scratch.remove_tree(str(tmp_path / "top"))


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400])
def test_what_is_in_a_folder_that_nobody_may_look_into_counts(tmp_path: Path, mode: int) -> None:
    (tmp_path / "top/closed").mkdir(parents=True)
    (tmp_path / "top/closed/full").write_bytes(os.urandom(1 << 20))
    (tmp_path / "top/closed").chmod(mode)

    def at_least_a_mib() -> None:
        assert counted(tmp_path / "top").kib >= 1024

    assert as_a_plain_owner(at_least_a_mib) == 0


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o400])
def test_a_folder_that_cannot_be_looked_into_is_too_much_where_no_mode_can_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    (tmp_path / "top/closed").mkdir(parents=True)
    (tmp_path / "top/closed/file").touch()
    (tmp_path / "top/closed").chmod(mode)

    def refused(*_: object) -> None:
        raise PermissionError

    def is_too_much() -> None:
        assert counted(tmp_path / "top").fault == scratch.TOO_CLOSED

    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", refused)
        assert as_a_plain_owner(is_too_much) == 0
    scratch.remove_tree(str(tmp_path / "top"))


def test_a_count_goes_on_where_it_stopped(tmp_path: Path) -> None:
    for number in range(3 * scratch.BATCH):
        (tmp_path / str(number)).touch()
    count = scratch.Count(os.fsencode(tmp_path))
    seen = [count.kib for _ in range(4) if not count.go_on(0.0)]
    assert seen == sorted(seen)
    assert count.go_on(scratch.NEVER)
    assert count.kib == own_kib(tmp_path) + 3 * scratch.BATCH * scratch.ENTRY_KIB


def test_what_lies_beside_the_folders_of_calls_goes_and_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "TIDY_S", 0.0)
    made = scratch.Scratch(os.fsencode(tmp_path), shared_memory=False, most_kib=1024)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/file").touch()
    running, ended = (Path(os.fsdecode(made.make(number))) for number in (1, 2))
    assert made.remove(2) is None
    assert (list(tmp_path.iterdir()), ended.exists()) == ([running], False)
    (tmp_path / "again").touch()
    assert made.excess(1) is None
    assert list(tmp_path.iterdir()) == [running]


def test_memory_of_its_own_that_is_not_half_full_is_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scratch.Scratch(str(tmp_path), shared_memory=False, most_kib=1024, mounted=True)
    folder = made.make(1)
    assert isinstance(folder, str)
    Path(folder, "full").write_bytes(os.urandom(2 << 20))
    whole = os.statvfs(tmp_path)

    def with_used(kib: int) -> None:
        free = whole.f_blocks - kib * 1024 // whole.f_frsize
        used = os.statvfs_result((*whole[:3], free, free, 4, 4, *whole[7:]))
        monkeypatch.setattr(os, "statvfs", lambda _: used)

    with_used(1000)
    assert made.excess(1) is None
    with_used(1100)
    assert "too much in scratch" in str(made.excess(1))
    with_used(1000)
    assert made.remove(1) is None


def test_a_call_that_ended_with_too_much_is_told_the_figure(tmp_path: Path) -> None:
    made = scratch.Scratch(str(tmp_path), shared_memory=False, most_kib=1024)
    for number, mib, is_over in ((1, 1, False), (2, 2, True)):
        folder = made.make(number)
        assert isinstance(folder, str)
        Path(folder, "full").write_bytes(os.urandom(mib << 20))
        excess = made.remove(number)
        assert (excess is not None) == is_over
        assert list(tmp_path.iterdir()) == []
    assert excess is not None
    assert excess.endswith(" KiB, where 1024 are allowed")


def test_a_place_that_was_made_unusable_is_made_usable_again(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "1").mkdir()
    (place / "1" / "file").write_text("text")
    place.chmod(0)
    assert as_a_plain_owner(scratch.Scratch(str(place), shared_memory=False).make, 1) == 0
    assert list(place.iterdir()) == [place / "1"]
    assert list((place / "1").iterdir()) == []
