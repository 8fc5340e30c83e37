"""The places of the tiers: memory where nothing is set for LOCAL, folders for the others."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from bus import runes
from runners import tiers
from runners.base import TIERS
from runners.tiers import Place, Tiers, file_system

OWN = Path("/srv/bus/.aal/scratch")
MB = {"LOCAL": 1, "EXTENDED": 2, "COLD": 3}


def places(**folders: str) -> Tiers:
    return Tiers(OWN, MB, {tier: Path(folders[tier]) for tier in TIERS if tier in folders})  # type: ignore[arg-type]


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has a /dev/shm that is memory."""
    monkeypatch.setattr(tiers, "shared_memory_is_usable", lambda: True)


def test_the_tiers_of_the_runners_are_those_of_the_rune_language() -> None:
    assert get_args(runes.Tier) == TIERS


def test_local_is_memory_of_the_helpers_own_and_the_others_are_the_folder_of_the_bus() -> None:
    found = [places().place(tier, namespace=True) for tier in TIERS]
    assert found == [Place(OWN, 1, mounts=True), Place(OWN, 2), Place(OWN, 3)]


@pytest.mark.usefixtures("shared_memory")
def test_without_a_namespace_local_is_shared_memory() -> None:
    assert places().place("LOCAL", namespace=False) == Place(Path("/dev/shm"), 1)
    assert places().place("COLD", namespace=False) == Place(OWN, 3)


def test_where_there_is_no_memory_at_all_local_is_the_folder_of_the_bus_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "shared_memory_is_usable", lambda: False)
    found = places().place("LOCAL", namespace=False)
    assert (found.root, found.mounts) == (OWN, False)
    assert "not in memory" in str(found.gap)


def test_what_is_set_is_where_it_is() -> None:
    given = places(LOCAL="/mnt/ram", COLD="/mnt/disk")
    for namespace in (True, False):
        assert given.place("LOCAL", namespace=namespace) == Place(Path("/mnt/ram"), 1)
        assert given.place("EXTENDED", namespace=namespace) == Place(OWN, 2)
        assert given.place("COLD", namespace=namespace) == Place(Path("/mnt/disk"), 3)
    assert set(given.kept()) == {Path("/mnt/ram"), Path("/mnt/disk")}


@pytest.mark.usefixtures("shared_memory")
def test_a_folder_in_shared_memory_is_the_helpers_own_where_a_namespace_covers_that() -> None:
    given = places(COLD="/dev/shm/cold")
    assert given.place("COLD", namespace=True) == Place(OWN, 3, mounts=True)
    assert given.place("COLD", namespace=False) == Place(Path("/dev/shm"), 3)
    assert list(given.kept()) == []


@pytest.mark.usefixtures("shared_memory")
def test_every_folder_that_may_be_a_root_is_named_once() -> None:
    assert sorted(places(COLD="/mnt/disk").roots()) == [Path("/dev/shm"), Path("/mnt/disk"), OWN]


MOUNTED = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /dev rw shared:2 - devtmpfs udev rw
23 22 0:6 / /dev/shm rw shared:3 - tmpfs tmpfs rw
24 21 8:2 / /mnt/my\040disk rw - xfs /dev/sdb1 rw
25 21 8:3 / /mnt/cold rw - vfat /dev/sdc1 rw
26 21 8:4 / /mnt/cold rw - btrfs /dev/sdd1 rw
""".lstrip()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "ext4"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shmem", "devtmpfs"),
        ("/mnt/my disk/a/b", "xfs"),
        ("/mnt/cold/x", "btrfs"),
    ],
)
def test_a_file_system_is_that_of_the_innermost_and_latest_mount(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTED)
    monkeypatch.setattr(tiers, "MOUNTS", tmp_path / "mountinfo")
    assert file_system(Path(path)) == name


def test_this_machine_has_file_systems_and_without_a_list_of_them_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert file_system(Path("/proc/self")) == "proc"
    monkeypatch.setattr(tiers, "MOUNTS", tmp_path / "none")
    assert file_system(Path("/proc/self")) == ""
