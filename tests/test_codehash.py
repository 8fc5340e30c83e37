"""Code hashes: what changes them, what does not, and what must not hang or crash them."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import codehash
from bus.codehash import RACY_NS, CodeHash, Stamp, TooLargeError, Walk, code_hash, code_hash_under

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "overlay"
    (folder / "src").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "src" / "run.py").write_text("print(1)")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the files that were read, in order."""
    read: list[str] = []
    digest = codehash._digest

    def counting(path: str) -> str | None:
        read.append(path.rpartition("/")[2])
        return digest(path)

    monkeypatch.setattr(codehash, "_digest", counting)
    return read


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def in_the_past(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything in the folder look settled: the clock goes on, since ctime cannot be set."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10 * RACY_NS)


def test_the_hash_is_the_documented_one(folder: Path) -> None:
    (folder / "src" / "run.py").chmod(0o755)
    (folder / "link").symlink_to("manifest.json")
    records = [
        ("link", "file", "-", "manifest.json", b"{}"),
        ("manifest.json", "file", "-", "", b"{}"),
        ("src/run.py", "file", "x", "", b"print(1)"),
    ]
    total = hashlib.sha256()
    for path, kind, mode, target, content in records:
        fields = (path, kind, mode, target, hashlib.sha256(content).hexdigest())
        total.update("".join(f"{field}\0" for field in fields).encode())
    assert code_hash(folder) == total.hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "src/run.py").write_text("print(2)"),
        lambda folder: (folder / "src/run.py").chmod(0o755),
        lambda folder: (folder / "src/run.py").rename(folder / "src/run2.py"),
        lambda folder: (folder / "new").write_text(""),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "dangling").symlink_to("nowhere"),
        lambda folder: os.mkfifo(folder / "fifo"),
        lambda folder: (folder / ".aalignore").write_text("nothing"),
        lambda folder: (folder / os.fsdecode(b"\xff")).write_text("a name that is no UTF-8"),
    ],
)
def test_the_hash_changes_with_the_code(folder: Path, change: Callable[[Path], object]) -> None:
    hashes = CodeHash(folder)
    before = hashes.get()
    change(folder)
    assert hashes.get() == code_hash(folder) != before


def test_the_hash_does_not_know_where_the_folder_lies_nor_when_it_was_written(folder: Path, tmp_path: Path) -> None:
    before = code_hash(folder)
    os.utime(folder / "manifest.json", (0, 0))
    folder.rename(tmp_path / "elsewhere")
    assert code_hash(tmp_path / "elsewhere") == before


def test_excluded_and_ignored_files_do_not_count(folder: Path) -> None:
    (folder / ".aalignore").write_text("# data\n*.bin\n/models/\nsrc/gen*\n\nlogs/\n")
    before = code_hash(folder)
    ignored = ["a.bin", "src/b.bin", "models/m", "src/generated.py", "src/logs/x"]
    excluded = [".git/HEAD", "src/__pycache__/r.pyc", ".venv/bin/python", "node_modules/x/y.js"]
    for path in ignored + excluded:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    (folder / ".venv" / "lib").symlink_to("/usr/lib")
    assert code_hash(folder) == before
    assert Walk.of(folder).leading_out == []
    (folder / ".mypy_cache").mkdir()
    (folder / ".mypy_cache" / "code.py").write_text("x")
    assert code_hash(folder) != before
    shutil.rmtree(folder / ".mypy_cache")
    (folder / "logs").write_text("a file, and the rule is for folders")
    assert code_hash(folder) != before


def test_links_are_followed_and_those_that_lead_outside_are_named(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lib.py").write_text("1")
    (folder / "lib").symlink_to("../outside")
    (folder / "inside").symlink_to("src/run.py")
    before = code_hash(folder)
    assert Walk.of(folder).leading_out == [f"lib -> {outside.resolve()}"]
    assert [file.path for file in Walk.of(folder).files] == ["inside", "lib/lib.py", "manifest.json", "src/run.py"]
    (outside / "lib.py").write_text("2")
    assert code_hash(folder) != before


def test_loops_of_links_end(folder: Path) -> None:
    (folder / "src" / "up").symlink_to("..")
    (folder / "self").symlink_to("self")
    (folder / "again").symlink_to("src")
    kinds = {file.path: file.kind for file in Walk.of(folder).files}
    assert kinds["self"] == "dangling"
    assert kinds["again/up"] == "link"
    assert kinds["src"] == "link"
    assert len(code_hash(folder)) == 64


def test_a_folder_without_end_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codehash, "MAX_FILES", 10)
    for number in range(10):
        (folder / str(number)).write_text("")
    with pytest.raises(TooLargeError, match=r"\.aalignore"):
        code_hash(folder)
    (folder / ".aalignore").write_text("[0-9]\n")
    assert len(code_hash(folder)) == 64


def test_too_many_bytes_are_refused_before_they_are_read(folder: Path, reads: list[str]) -> None:
    with (folder / "model.bin").open("wb") as file:
        file.truncate(codehash.MAX_MB * 2**20 + 1)
    with pytest.raises(TooLargeError):
        code_hash(folder)
    assert reads == []


def test_an_unchanged_folder_is_not_read_again(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_past(folder, monkeypatch)
    hashes = CodeHash(folder)
    first = hashes.get()
    assert sorted(reads) == ["manifest.json", "run.py"]
    assert hashes.get() == first
    assert len(reads) == 2


def test_only_the_file_that_changed_is_read_again(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_past(folder, monkeypatch)
    hashes = CodeHash(folder)
    hashes.get()
    (folder / "src" / "run.py").write_text("print(22)")
    in_the_past(folder, monkeypatch)
    assert hashes.get() == code_hash(folder)
    assert reads[2:3] == ["run.py"]


def test_a_change_within_one_tick_of_the_clock_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp stays the same, as it may when two writes are a millisecond apart."""
    frozen = Stamp(1, 2, 0o100644, 8, 0, time.time_ns())
    monkeypatch.setattr(Stamp, "of", lambda _status: frozen)
    hashes = CodeHash(folder)
    (folder / "manifest.json").unlink()
    before = hashes.get()
    (folder / "src" / "run.py").write_text("print(2)")
    assert hashes.get() != before


def settled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CodeHash:
    """The hash of a folder in which nothing has changed for long."""
    in_the_past(folder, monkeypatch)
    hashes = CodeHash(folder)
    hashes.get()
    assert hashes.is_unchanged()
    return hashes


def release(folder: Path, program: str) -> Path:
    folder.mkdir()
    (folder / "run.py").write_text(program)
    return folder


def point(link: Path, target: Path) -> None:
    """Make a link, or move it as a deployment does."""
    link.with_name("new").symlink_to(target)
    link.with_name("new").rename(link)


def test_what_a_dangling_link_lacks_is_seen_when_it_comes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "late.py").symlink_to(tmp_path / "late.py")
    hashes = settled(folder, monkeypatch)
    (tmp_path / "late.py").write_text("print(3)")
    assert not hashes.is_unchanged()
    assert hashes.get() == code_hash(folder)


def test_a_link_outside_that_moves_on_is_seen_through_the_link_to_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old release stays as it was, and each of its files stands unchanged in the new one too."""
    old = release(tmp_path / "1", "print(1)")
    point(tmp_path / "current", old)
    (folder / "linked").symlink_to(tmp_path / "current")
    hashes = settled(folder, monkeypatch)
    shutil.copytree(old, tmp_path / "2", copy_function=os.link)
    hashes.get()  # the further hard link is a change of its own
    in_the_past(folder, monkeypatch)
    assert hashes.is_unchanged()
    (tmp_path / "2" / "more.py").write_text("print(2)")
    point(tmp_path / "current", tmp_path / "2")
    assert not hashes.is_unchanged()
    assert hashes.get() == code_hash(folder)


def test_a_second_way_to_a_folder_that_leads_elsewhere_is_seen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point(tmp_path / "current", folder / "src")
    (folder / "again").symlink_to(folder / "src")
    (folder / "zz").symlink_to(tmp_path / "current")
    assert {file.path: file.kind for file in Walk.of(folder).files}["zz"] == "link"
    hashes = settled(folder, monkeypatch)
    point(tmp_path / "current", release(tmp_path / "other", "print(4)"))
    assert not hashes.is_unchanged()


def test_a_fifo_that_gives_way_to_a_file_is_seen(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (folder / "linked").symlink_to(tmp_path / "fifo")
    hashes = settled(folder, monkeypatch)
    (tmp_path / "fifo").unlink()
    (tmp_path / "fifo").write_text("code")
    assert not hashes.is_unchanged()


def test_a_file_that_comes_while_the_walk_is_under_way_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that it comes to was listed already, and the clock is far ahead of both."""
    in_the_past(folder, monkeypatch)
    add_folder = Walk._add_folder

    def slow(walk: Walk, *arguments: Any) -> None:
        (folder / "new.py").write_text("print(5)")
        add_folder(walk, *arguments)

    hashes = CodeHash(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_add_folder", slow)
        hashes.get()
    assert not hashes.is_unchanged()
    assert hashes.get() == code_hash(folder)


def test_a_change_after_the_walk_began_is_not_settled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk took longer than the racy time: only the moment of its beginning tells."""
    began_ns = time.time_ns() - 10 * RACY_NS
    monkeypatch.setattr(time, "time_ns", lambda: began_ns)
    hashes = CodeHash(folder)
    hashes.get()
    assert not hashes.is_unchanged()


def test_a_file_that_could_not_be_read_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_past(folder, monkeypatch)
    hashes = CodeHash(folder)
    with monkeypatch.context() as patch:
        patch.setattr(codehash, "_digest", lambda _path: None)  # as where the process has no descriptor left
        spoilt = hashes.get()
        assert not hashes.is_unchanged()
    assert hashes.get() == code_hash(folder) != spoilt
    assert hashes.is_unchanged()


def test_a_link_to_a_name_that_is_no_text_is_shown_as_text(folder: Path) -> None:
    (folder / "linked").symlink_to(os.fsdecode(b"/nowhere/x\xff"))
    assert Walk.of(folder).leading_out == [r"linked -> /nowhere/x\xff"]


@pytest.mark.usefixtures("bound_by_modes")
def test_an_unreadable_file_is_named_and_not_a_crash(folder: Path) -> None:
    before = code_hash(folder)
    (folder / "src" / "run.py").chmod(0)
    assert code_hash(folder) != before
    (folder / "src").chmod(0)
    assert {file.kind for file in Walk.of(folder).files} == {"file", "unreadable"}
    (folder / "src").chmod(0o755)


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        code_hash(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null"), lambda path: path.symlink_to(path)]
)
def test_what_is_no_regular_file_is_never_opened_and_costs_no_descriptor(
    folder: Path, make: Callable[[Path], object]
) -> None:
    make(folder / ".aalignore")
    before = descriptors()
    for _ in range(3):
        with pytest.raises(OSError, match=r"directory|no file|links"):
            codehash.open_file(folder / ".aalignore")
        assert codehash._digest(f"{folder}/.aalignore") is None
        assert len(code_hash(folder)) == 64
    assert descriptors() == before


def test_a_regular_file_is_opened_and_read(folder: Path) -> None:
    with codehash.open_file(folder / "src" / "run.py") as file:
        assert file.read() == b"print(1)"


def test_a_folder_whose_manifest_alone_has_changed_is_known_by_the_hash_of_the_old_one(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text("old")
    (tmp_path / "run.sh").write_text("echo 1")
    before, of_old = code_hash(tmp_path), hashlib.sha256(b"old").hexdigest()
    manifest.write_text("new")
    assert code_hash(tmp_path) != before
    assert code_hash_under(tmp_path, of_old) == before
    (tmp_path / "run.sh").write_text("echo 2")
    assert code_hash_under(tmp_path, of_old) != before
