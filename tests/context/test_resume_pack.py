"""Resume packs: what they hold, and that nothing of one is used unless all of it is as it was written."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aos_context import pack_content, pack_files, resume_pack
from aos_context.artifacts import decode, encode, sha256
from aos_context.config import Config
from aos_context.episode import EpisodeStore
from aos_context.errors import BrokenError, ExistsError, LimitError, NotFoundError, PackError, SchemaError
from aos_context.files import write_all
from aos_context.layout import LEDGER, PACK_MANIFEST, WORKING_SET
from aos_context.layout import PACK_MEMORY as ITEMS
from aos_context.resume_pack import CheckedPack, Snapshot, check, snapshot, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.context.conftest import OVERLAY
from tests.context.made import TIME, MadeRun, memory_item, working_set

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aos_context.artifacts import Document

LATER = "2026-01-19T00:00:00Z"
EPISODE_2 = "episodes/episode_000002.v2.1.json"


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    """A run with updates, two episodes, and an update since."""
    made = MadeRun(tmp_path / "root" / "run_1")
    for _ in range(2):
        made.update()
        made.milestone()
    made.update()
    made.commit(memory_item())
    return made


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """Where packs are checked; nothing may be left in it."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def packed(run: MadeRun, pack_id: str = "p1", *, zip_pack: bool = True, **given_: object) -> Snapshot:
    arguments: dict[str, object] = {
        "pointers": {"ledger_last_seq": 42},
        "memory_items": run.memory.values(),
        "now": TIME,
    }
    return snapshot(run.folder, pack_id=pack_id, zip_pack=zip_pack, **{**arguments, **given_})  # type: ignore[arg-type]


def files_of(pack: Path) -> dict[str, bytes]:
    if pack.is_dir():
        return {str(one.relative_to(pack)): one.read_bytes() for one in pack.rglob("*") if one.is_file()}
    with zipfile.ZipFile(pack) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_manifest(files: dict[str, bytes], /, **members: object) -> dict[str, bytes]:
    """The files, and a manifest that fits them but for `members`."""
    manifest = json.loads(files[PACK_MANIFEST])
    rest = {name: data for name, data in files.items() if name != PACK_MANIFEST}
    manifest["files"] = [
        {"path": name, "bytes": len(data), "sha256": sha256(data)} for name, data in sorted(rest.items())
    ]
    return {**rest, PACK_MANIFEST: json.dumps({**manifest, **members}).encode()}


def folder_with(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def refused(pack: Path, workspace: Path, config: Config | None = None) -> PackError:
    with pytest.raises(PackError) as error:
        check(pack, config or Config(), workspace=workspace).close()
    assert error.value.file is None or error.value.file in str(error.value)
    return error.value


def contents(pack: CheckedPack) -> tuple[object, ...]:
    return pack.manifest, pack.working_set, pack.episode, list(pack.memory_items()), pack.ledger_last_seq


# --- What a pack holds ---


@pytest.mark.parametrize("zip_pack", [True, False])
def test_a_pack_holds_state_ledger_last_episode_and_memory_and_a_manifest_of_them(
    run: MadeRun, workspace: Path, zip_pack: bool
) -> None:
    made = packed(run, zip_pack=zip_pack)
    assert made.path == run.folder / "resume" / ("pack_p1.zip" if zip_pack else "pack_p1")
    files = files_of(made.path)
    assert set(files) == {PACK_MANIFEST, WORKING_SET, LEDGER, ITEMS, EPISODE_2}
    assert files[LEDGER] == run.ledger.read_bytes()
    assert files[WORKING_SET] == run.state.read_bytes()
    assert files[ITEMS] == encode("memory_item", memory_item()) + b"\n"
    assert {one["path"]: one["sha256"] for one in made.manifest["files"]} == {
        name: sha256(data) for name, data in files.items() if name != PACK_MANIFEST
    }
    assert made.manifest_sha256 == sha256(files[PACK_MANIFEST])
    with check(made.path, workspace=workspace) as pack:
        assert pack.manifest == made.manifest
        assert pack.working_set == run.working_set
        assert pack.episode == run.episodes.last()
        assert list(pack.memory_items()) == [memory_item()]
        assert pack.manifest["pointers"] == {"ledger_last_seq": 42}


def test_the_same_run_is_the_same_zip(run: MadeRun) -> None:
    run.commit(memory_item("m1"), memory_item("m2"))
    one = packed(run).path.read_bytes()
    shutil.rmtree(run.folder / "resume")
    os.utime(run.ledger, (0, 0))
    assert packed(run, memory_items=list(run.memory.values())[::-1]).path.read_bytes() == one


def test_a_pack_is_not_written_over_another(run: MadeRun) -> None:
    first = packed(run).path.read_bytes()
    with pytest.raises(ExistsError):
        packed(run, pointers={})
    assert (run.folder / "resume" / "pack_p1.zip").read_bytes() == first


def test_a_torn_last_line_and_an_episode_without_its_event_are_not_packed(run: MadeRun, workspace: Path) -> None:
    run.milestone()
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    with check(packed(run).path, workspace=workspace) as pack:
        assert pack.ledger_last_seq == len(lines) - 1
        assert pack.episode is not None
        assert pack.episode["number"] == 2


def test_a_working_set_behind_its_ledger_is_not_packed_unless_the_caller_has_the_one_that_is_not(run: MadeRun) -> None:
    behind = run.state.read_bytes()
    run.update()
    run.state.write_bytes(behind)
    with pytest.raises(BrokenError, match="_update_seq is 3, and the ledger's is 4"):
        packed(run)
    assert packed(run, working_set=run.working_set).manifest["update_seq"] == 4


def test_a_run_whose_files_do_not_belong_together_is_not_packed(run: MadeRun) -> None:
    run.state.write_bytes(run.state.read_bytes().replace(b"step 4", b"step 5"))
    with pytest.raises(BrokenError, match="not what the ledger's last update left"):
        packed(run)
    (run.folder / EPISODE_2).unlink()
    with pytest.raises(BrokenError, match="is not there, and the ledger has it"):
        packed(run)
    assert list((run.folder / "resume").iterdir()) == []


def test_a_pack_beyond_its_limit_or_with_a_bad_name_is_not_written(run: MadeRun) -> None:
    with pytest.raises(LimitError):
        packed(run, config=Config(pack_max_bytes=1000))
    with pytest.raises(SchemaError):
        packed(run, "../../p")
    assert list((run.folder / "resume").iterdir()) == []


@pytest.mark.parametrize("zip_pack", [True, False])
@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_pack_whose_writing_fails_is_not_there(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch, zip_pack: bool, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (Path, "rename", full)))
    with pytest.raises(OSError, match="No space"):
        packed(run, zip_pack=zip_pack)
    assert list((run.folder / "resume").iterdir()) == []


# --- Packs that are not as they were written ---


def test_every_flipped_byte_of_a_zip_is_refused_or_changes_nothing(tmp_path: Path, workspace: Path) -> None:
    made = MadeRun(tmp_path / "run_1")
    made.milestone()
    pack = packed(made, memory_items=[]).path
    whole, changed, same = pack.read_bytes(), tmp_path / "changed.zip", 0
    with check(pack, workspace=workspace) as first:
        expected = contents(first)
    for place in range(len(whole)):
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ (1 + place % 255)]) + whole[place + 1 :])
        try:
            with check(changed, workspace=workspace) as found:
                assert contents(found) == expected
                same += 1
        except PackError:
            pass
    assert same < 500  # times, versions and attributes, which no content hangs on


@pytest.mark.parametrize("name", [WORKING_SET, LEDGER, ITEMS, EPISODE_2])
def test_every_flipped_byte_of_a_file_in_a_folder_is_refused_with_the_file_named(
    run: MadeRun, workspace: Path, name: str
) -> None:
    pack = packed(run, zip_pack=False).path
    file = pack / name
    whole = file.read_bytes()
    for place in range(0, len(whole), 1 + len(whole) // 200):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        assert refused(pack, workspace).file == name


def test_a_changed_manifest_is_refused_by_who_knows_its_hash(run: MadeRun, workspace: Path) -> None:
    made = packed(run, zip_pack=False)
    file = made.path / PACK_MANIFEST
    file.write_bytes(file.read_bytes().replace(b'"ledger_last_seq":42', b'"ledger_last_seq":43'))
    check(made.path, workspace=workspace).close()
    with pytest.raises(PackError, match="SHA-256 that was asked for"):
        check(made.path, workspace=workspace, manifest_sha256=made.manifest_sha256)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_put_in_cut_out_or_changed_anywhere_in_a_zip_are_refused_or_change_nothing(data: st.DataObject) -> None:
    whole, expected = small_zip()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 40)))
    changed = whole[:start] + data.draw(st.binary(max_size=40)) + whole[stop:]
    folder = Path(SCRATCH[0])
    (folder / "changed.zip").write_bytes(changed)
    try:
        with check(folder / "changed.zip", workspace=folder) as found:
            assert contents(found) == expected
    except PackError:
        pass


SCRATCH: list[str] = []
SMALL: list[tuple[bytes, tuple[object, ...]]] = []


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder for what hypothesis makes, which no function's fixture may be."""
    SCRATCH[:] = [str(tmp_path_factory.mktemp("scratch"))]


def small_zip() -> tuple[bytes, tuple[object, ...]]:
    if not SMALL:
        run = MadeRun(Path(SCRATCH[0]) / "run_1")
        run.update()
        path = packed(run).path
        with check(path, workspace=Path(SCRATCH[0])) as pack:
            SMALL.append((path.read_bytes(), contents(pack)))
    return SMALL[0]


def test_a_pack_that_is_cut_off_anywhere_is_refused(run: MadeRun, workspace: Path, tmp_path: Path) -> None:
    whole, cut = packed(run).path.read_bytes(), tmp_path / "cut.zip"
    for length in range(0, len(whole), 97):
        cut.write_bytes(whole[:length])
        refused(cut, workspace)


def test_what_is_not_there_is_not_found_and_a_file_that_is_no_zip_is_refused(tmp_path: Path, workspace: Path) -> None:
    with pytest.raises(NotFoundError):
        check(tmp_path / "none.zip", workspace=workspace)
    for data in (b"", b"PK", b"x" * 10_000, b"PK\x05\x06" + bytes(18)):
        (tmp_path / "no.zip").write_bytes(data)
        refused(tmp_path / "no.zip", workspace)


UNSAFE = [
    "/etc/passwd", "../escaped", "state/../../escaped", "state/./working_set.v2.1.json", "..\\escaped", "C:/escaped",
    "C:escaped", "state\\working_set.v2.1.json", "//host/share", "state/working_set.v2.1.json\u202e",
    "\u017ftate/working_set.v2.1.json", "state/working_set.v2.1.json ", "state//x", "", "\udcff", "state/x\ny",
    "nul\u0000x", "\uff0e\uff0e/escaped",
]  # fmt: skip
EXTRA = [
    "extra.json", "state/extra.json", "episodes/episode_000001.v2.1.json", "episodes/episode_1.v2.1.json",
    "PACK_MANIFEST.v2.1.json", "state/working_set.v2.1.json/x", "resume/pack_p1.zip", ".lock",
]  # fmt: skip


def zip_with(files: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] = lambda _: None) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            change(info)
            archive.writestr(info, data)
    return out.getvalue()


@pytest.mark.parametrize("name", [name for name in UNSAFE + EXTRA if "\udcff" not in name])
def test_a_name_in_a_zip_that_no_pack_has_is_refused_and_nothing_is_written_there(
    run: MadeRun, workspace: Path, tmp_path: Path, name: str
) -> None:
    bad = tmp_path / "bad.zip"
    bad.write_bytes(zip_with({**files_of(packed(run).path), name: b"x"}))
    before = sorted(tmp_path.rglob("*"))
    assert refused(bad, workspace).file is not None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", UNSAFE + EXTRA)
def test_a_name_in_the_manifest_that_no_pack_has_is_refused(run: MadeRun, workspace: Path, name: str) -> None:
    pack = packed(run, zip_pack=False).path
    manifest = json.loads((pack / PACK_MANIFEST).read_bytes())
    manifest["files"].append({"path": name, "bytes": 0, "sha256": sha256(b"")})
    (pack / PACK_MANIFEST).write_bytes(json.dumps(manifest).encode())
    assert refused(pack, workspace).file in (PACK_MANIFEST, name)


@pytest.mark.parametrize("name", EXTRA)
def test_a_file_in_a_folder_that_no_pack_has_is_refused(run: MadeRun, workspace: Path, name: str) -> None:
    files = files_of(packed(run, zip_pack=False).path)
    files.pop(name.rpartition("/")[0], None)
    pack = folder_with({**files, name: b""}, run.folder / "other")
    assert refused(pack, workspace).file is not None


def test_links_fifos_and_folders_in_the_place_of_files_are_refused(run: MadeRun, workspace: Path) -> None:
    secret = run.folder / "secret"
    secret.write_bytes((run.folder / LEDGER).read_bytes())
    makers: list[Callable[[Path], None]] = [lambda at: at.symlink_to(secret), Path.mkdir]
    for number, make in enumerate(makers):
        pack = packed(run, f"p{number}", zip_pack=False).path
        (pack / LEDGER).unlink()
        make(pack / LEDGER)
        assert refused(pack, workspace).file == LEDGER
    pack = packed(run, "fifo", zip_pack=False).path
    (pack / ITEMS).unlink()
    os.mkfifo(pack / ITEMS)
    assert "no regular file" in str(refused(pack, workspace))
    pack = packed(run, "linked", zip_pack=False).path
    shutil.rmtree(pack / "ledger")
    (pack / "ledger").symlink_to(run.folder / "ledger")
    error = refused(pack, workspace)
    assert error.file == "ledger"
    assert "no such file" in str(error)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR, stat.S_IFCHR])
def test_what_a_zip_says_is_no_regular_file_is_refused(
    run: MadeRun, workspace: Path, tmp_path: Path, mode: int
) -> None:
    def change(info: zipfile.ZipInfo) -> None:
        if info.filename == LEDGER:
            info.external_attr = (mode | 0o777) << 16

    (tmp_path / "bad.zip").write_bytes(zip_with(files_of(packed(run).path), change))
    assert refused(tmp_path / "bad.zip", workspace).file == LEDGER


def test_a_file_that_is_twice_in_a_zip_or_twice_in_the_manifest_is_refused(
    run: MadeRun, workspace: Path, tmp_path: Path
) -> None:
    files = files_of(packed(run).path)
    out = BytesIO(zip_with(files))
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(WORKING_SET, files[WORKING_SET])
    (tmp_path / "bad.zip").write_bytes(out.getvalue())
    assert refused(tmp_path / "bad.zip", workspace).file == WORKING_SET
    listed = json.loads(files[PACK_MANIFEST])["files"]
    pack = folder_with(with_manifest(files, files=[*listed, listed[0]]), tmp_path / "twice")
    assert refused(pack, workspace).file == listed[0]["path"]


@pytest.mark.parametrize(("flag", "method"), [(0x1, 0), (0x41, 0), (0x2000, 0), (0, 12), (0, 99)])
def test_what_is_encrypted_or_packed_in_an_odd_way_is_refused(
    run: MadeRun, workspace: Path, tmp_path: Path, flag: int, method: int
) -> None:
    data = bytearray(packed(run).path.read_bytes())
    for magic, flag_at, name_at in ((b"PK\x01\x02", 8, 46), (b"PK\x03\x04", 6, 30)):
        start = data.index(LEDGER.encode(), data.index(magic)) - name_at
        while data[start : start + 4] != magic:
            start = data.index(LEDGER.encode(), start + name_at + 1) - name_at
        data[start + flag_at : start + flag_at + 4] = flag.to_bytes(2, "little") + method.to_bytes(2, "little")
    (tmp_path / "bad.zip").write_bytes(data)
    assert refused(tmp_path / "bad.zip", workspace).file == LEDGER


def test_a_pack_that_another_program_compressed_is_read_all_the_same(
    run: MadeRun, workspace: Path, tmp_path: Path
) -> None:
    original = packed(run)
    with zipfile.ZipFile(tmp_path / "other.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state/", b"")
        for name, data in reversed(files_of(original.path).items()):
            archive.writestr(name, data)
    with check(tmp_path / "other.zip", workspace=workspace) as pack:
        assert pack.manifest == original.manifest


def test_bombs_are_refused_before_they_are_unpacked(
    run: MadeRun, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    whole = write_all

    def counting(fd: int, data: bytes) -> None:
        written.append(len(data))
        whole(fd, data)

    monkeypatch.setattr(pack_files, "write_all", counting)
    entries, bad = {**files_of(packed(run).path), ITEMS: bytes(64 << 20)}, tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    written.clear()
    assert refused(bad, workspace).file == ITEMS
    assert sum(written) < 1 << 20
    for pack in (packed(run, "zip").path, packed(run, "folder", zip_pack=False).path):
        size = sum(len(data) for data in files_of(pack).values())
        check(pack, Config(pack_max_bytes=size), workspace=workspace).close()
        assert refused(pack, workspace, Config(pack_max_bytes=size - 1)).file is not None
        assert "more than 3 files" in str(refused(pack, workspace, Config(pack_max_files=3)))


def test_a_size_that_is_not_the_one_said_is_refused(run: MadeRun, workspace: Path, tmp_path: Path) -> None:
    data = bytearray(packed(run).path.read_bytes())
    start = data.rindex(ITEMS.encode()) - 46
    size = int.from_bytes(data[start + 24 : start + 28], "little")
    for said, taken in ((size + 1, size), (size - 1, size - 1), (size + 1, size + 1), (1 << 31, 1 << 31)):
        data[start + 20 : start + 28] = taken.to_bytes(4, "little") + said.to_bytes(4, "little")
        (tmp_path / "bad.zip").write_bytes(data)
        assert refused(tmp_path / "bad.zip", workspace).file == ITEMS


def test_a_zip_with_a_comment_or_with_more_behind_its_end_is_refused(
    run: MadeRun, workspace: Path, tmp_path: Path
) -> None:
    whole, bad = packed(run).path.read_bytes(), tmp_path / "bad.zip"
    other_end = whole[:-22] + b"PK\x06\x07" + bytes(16) + whole[-22:]
    for data in (whole + b"x", whole[:-2] + b"\x01\x00x", other_end):
        bad.write_bytes(data)
        assert "more at its end" in str(refused(bad, workspace))


# --- Files that do not belong together, though each is as the manifest says ---


def lines(files: dict[str, bytes]) -> list[bytes]:
    return files[LEDGER].splitlines(keepends=True)


def edited(line: bytes, **members: object) -> bytes:
    return json.dumps({**json.loads(line), **members}).encode() + b"\n"


def other_state(files: dict[str, bytes], **members: object) -> dict[str, bytes]:
    return {**files, WORKING_SET: json.dumps({**json.loads(files[WORKING_SET]), **members}).encode()}


CHANGES: list[tuple[str, Callable[[dict[str, bytes]], dict[str, bytes]]]] = [
    (LEDGER, lambda files: {**files, LEDGER: b"".join(lines(files)[1:])}),
    (LEDGER, lambda files: {**files, LEDGER: b"".join(lines(files)[:2] + lines(files)[3:])}),
    (LEDGER, lambda files: {**files, LEDGER: b"".join(lines(files)[:-1])}),
    (LEDGER, lambda files: {**files, LEDGER: b"".join(reversed(lines(files)))}),
    (LEDGER, lambda files: {**files, LEDGER: files[LEDGER] + lines(files)[-1]}),
    (LEDGER, lambda files: {**files, LEDGER: files[LEDGER][:-1]}),
    (LEDGER, lambda files: {**files, LEDGER: files[LEDGER][:-9]}),
    (LEDGER, lambda files: {**files, LEDGER: b""}),
    (LEDGER, lambda files: {**files, LEDGER: b"\n" + files[LEDGER]}),
    (LEDGER, lambda files: {**files, LEDGER: b"".join([*lines(files)[:-1], edited(lines(files)[-1], run_id="run_2")])}),
    (LEDGER, lambda files: {**files, LEDGER: b"".join([*lines(files)[:-1], edited(lines(files)[-1], colour="red")])}),
    (WORKING_SET, lambda files: other_state(files, _update_seq=2)),
    (WORKING_SET, lambda files: other_state(files, next_action="another")),
    (WORKING_SET, lambda files: other_state(files, run_id="run_2")),
    (WORKING_SET, lambda files: other_state(files, status="ASLEEP")),
    (WORKING_SET, lambda files: {**files, WORKING_SET: b"{"}),
    (WORKING_SET, lambda files: {name: data for name, data in files.items() if name != WORKING_SET}),
    (LEDGER, lambda files: {name: data for name, data in files.items() if name != LEDGER}),
    (ITEMS, lambda files: {name: data for name, data in files.items() if name != ITEMS}),
    (ITEMS, lambda files: {**files, ITEMS: files[ITEMS] * 2}),
    (ITEMS, lambda files: {**files, ITEMS: b""}),
    (
        ITEMS,
        lambda files: {**files, ITEMS: files[ITEMS].replace(b"Prefers Python", b"Prefers poison")},
    ),
    (ITEMS, lambda files: {**files, ITEMS: files[ITEMS].replace(b'"batch_1"', b'"batch_2"')}),
    (
        ITEMS,
        lambda files: {**files, ITEMS: files[ITEMS] + files[ITEMS].replace(b'"mem_1"', b'"mem_2"')},
    ),
    (ITEMS, lambda files: {**files, ITEMS: b"{}\n"}),
    (ITEMS, lambda files: {**files, ITEMS: files[ITEMS].replace(b"0.9", b"NaN")}),
    (EPISODE_2, lambda files: {name: data for name, data in files.items() if name != EPISODE_2}),
    (EPISODE_2, lambda files: {**files, EPISODE_2: files[EPISODE_2].replace(b"checkpoint", b"checkpaint")}),
    ("episodes/episode_000003.v2.1.json", lambda files: {**files, "episodes/episode_000003.v2.1.json": b"{}"}),
]


@pytest.mark.parametrize(("file", "change"), CHANGES)
def test_files_that_do_not_fit_each_other_are_refused_with_the_one_named(
    run: MadeRun, workspace: Path, file: str, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    files = files_of(packed(run).path)
    pack = folder_with(with_manifest(change(files)), run.folder / "other")
    assert refused(pack, workspace).file == file


@pytest.mark.parametrize(
    ("file", "members"),
    [
        (WORKING_SET, {"update_seq": 2}),
        (WORKING_SET, {"thread_id": "thread_2"}),
        (LEDGER, {"ledger_last_seq": 5}),
        (PACK_MANIFEST, {"episode_id": None}),
        (PACK_MANIFEST, {"episode_id": "ep_000002_other"}),
        (PACK_MANIFEST, {"pointers": []}),
        (PACK_MANIFEST, {"colour": "red"}),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(
    run: MadeRun, workspace: Path, file: str, members: Document
) -> None:
    files = files_of(packed(run).path)
    assert refused(folder_with(with_manifest(files, **members), run.folder / "other"), workspace).file == file


def test_the_working_set_of_a_run_without_updates_is_the_one_it_was_booted_with(
    tmp_path: Path, workspace: Path
) -> None:
    files = files_of(packed(MadeRun(tmp_path / "run_1")).path)
    pack = folder_with(with_manifest(other_state(files, objective="Another.")), tmp_path / "other")
    assert refused(pack, workspace).file == WORKING_SET


def test_an_episode_whose_events_are_not_the_ledgers_is_refused(tmp_path: Path, workspace: Path) -> None:
    run = MadeRun(tmp_path / "run_1")
    run.events[0] = {**run.events[0], "timestamp": LATER}  # what the episode gets is not what the file has
    run.milestone()
    with pytest.raises(BrokenError, match="SHA-256 of: its lines 1 to 1"):
        packed(run)


@pytest.mark.parametrize("line", range(4))
def test_a_line_that_was_changed_anywhere_before_the_last_episodes_end_is_missed_by_it(
    run: MadeRun, workspace: Path, tmp_path: Path, line: int
) -> None:
    files = files_of(packed(run).path)
    changed = lines(files)
    changed[line] = edited(changed[line], actor="eve")
    files[LEDGER] = b"".join(changed)
    assert refused(folder_with(with_manifest(files), tmp_path / "pack"), workspace).file == EPISODE_2


def test_a_pack_that_changes_once_it_was_copied_is_the_one_that_was_copied(
    run: MadeRun, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, verify = packed(run, zip_pack=False).path, pack_content.verify

    def change_and_verify(*arguments: object) -> object:
        for name in files_of(pack):
            (pack / name).write_bytes(b"changed")
        return verify(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(resume_pack, "verify", change_and_verify)
    with check(pack, workspace=workspace) as checked:
        assert unpack(checked, run.folder.parent / "run_2", now=LATER, run_id="run_2")["_update_seq"] == 3
    assert (run.folder.parent / "run_2" / LEDGER).read_bytes().startswith(run.ledger.read_bytes())


# --- Unpacking ---


def loaded(run: MadeRun, pack: Path, workspace: Path, run_id: str | None) -> Path:
    folder = run.folder.parent.parent / "elsewhere" / (run_id or "run_1")
    with check(pack, workspace=workspace) as checked:
        state = unpack(checked, folder, now=LATER, run_id=run_id, actor="someone")
    assert decode("working_set", (folder / WORKING_SET).read_bytes(), "there") == state
    return folder


@pytest.mark.parametrize("run_id", [None, "run_2"])
@pytest.mark.parametrize("zip_pack", [True, False])
def test_a_pack_becomes_a_run_with_its_history_and_the_run_id_that_was_asked_for(
    run: MadeRun, workspace: Path, run_id: str | None, zip_pack: bool
) -> None:
    made = packed(run, zip_pack=zip_pack)
    folder = loaded(run, made.path, workspace, run_id)
    state = json.loads((folder / WORKING_SET).read_bytes())
    assert state == {**run.working_set, "run_id": run_id or "run_1"}
    history, last = (
        (folder / LEDGER).read_bytes()[: run.ledger.stat().st_size],
        json.loads((folder / LEDGER).read_bytes().splitlines()[-1]),
    )
    assert history == run.ledger.read_bytes()
    assert (last["seq"], last["event_type"], last["actor"]) == (8, "RESUME_PACK_LOADED", "someone")
    assert last["run_id"] == (run_id or "run_1")
    assert last["data"] == {
        "pack_id": "p1",
        "from_run_id": "run_1",
        "manifest_sha256": made.manifest_sha256,
        "pointers": {"ledger_last_seq": 42},
    }
    assert (folder / EPISODE_2).read_bytes() == (run.folder / EPISODE_2).read_bytes()
    assert stat.S_IMODE((folder / EPISODE_2).stat().st_mode) == 0o444
    assert sorted(one.name for one in folder.parent.iterdir()) == [folder.name]


def test_a_run_that_was_loaded_goes_on_with_its_episodes_and_can_be_packed_and_loaded_again(
    run: MadeRun, workspace: Path
) -> None:
    second = loaded(run, packed(run).path, workspace, "run_2")
    third = loaded(run, packed(resumed(second), "p2").path, workspace, "run_3")
    made = resumed(third)
    assert made.episodes.verify() == 1
    made.update()
    assert made.milestone()["number"] == 3
    assert made.episodes.verify() == 2
    assert [one["number"] for one in made.episodes.list()] == [2, 3]
    with check(packed(made, "p3").path, workspace=workspace) as pack:
        assert (pack.manifest["run_id"], pack.manifest["update_seq"]) == ("run_3", 4)
    (third / EPISODE_2).unlink()
    with pytest.raises(BrokenError, match="is not there"):
        made.episodes.verify()


def resumed(folder: Path) -> MadeRun:
    """A run that is there already."""
    made = MadeRun.__new__(MadeRun)
    made.folder, made.ledger, made.state = folder, folder / LEDGER, folder / WORKING_SET
    made.episodes = EpisodeStore(folder / "episodes")
    made.events = [json.loads(line) for line in made.ledger.read_bytes().splitlines()]
    made.since = next(one["data"]["last_seq"] for one in reversed(made.events) if "last_seq" in one["data"])
    made.memory = {}
    made.working_set = made.before = json.loads(made.state.read_bytes())
    return made


def test_nothing_is_unpacked_over_a_run_that_is_there(run: MadeRun, workspace: Path, tmp_path: Path) -> None:
    path = packed(run).path
    before = {one: one.read_bytes() for one in run.folder.rglob("*") if one.is_file()}
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with check(path, workspace=workspace) as pack:
        for folder in (run.folder, tmp_path / "empty", tmp_path / "link"):
            with pytest.raises(ExistsError):
                unpack(pack, folder, now=LATER)
    assert {one: one.read_bytes() for one in run.folder.rglob("*") if one.is_file()} == before


def test_of_two_that_unpack_at_one_time_one_makes_the_run(
    run: MadeRun, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run.folder.parent / "run_2"
    with check(packed(run).path, workspace=workspace) as pack:
        monkeypatch.setattr(os.path, "lexists", lambda _: False)  # neither saw the other
        unpack(pack, folder, now=LATER, run_id="run_2")
        first = (folder / LEDGER).read_bytes()
        with pytest.raises(ExistsError):
            unpack(pack, folder, now=LATER, run_id="run_2")
    assert (folder / LEDGER).read_bytes() == first


@pytest.mark.parametrize("fails_at", range(12))
def test_an_unpacking_that_fails_anywhere_leaves_no_run(
    run: MadeRun, workspace: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    folder, calls = run.folder.parent / "run_2", iter(range(1000))
    whole = os.fsync

    def failing(fd: int) -> None:
        if next(calls) == fails_at:
            raise OSError(5, "Input/output error")
        whole(fd)

    with check(packed(run).path, workspace=workspace) as pack:
        monkeypatch.setattr(os, "fsync", failing)
        try:
            unpack(pack, folder, now=LATER, run_id="run_2")
        except OSError:
            # The last sync is of the name: the run is whole then, though a power loss might take it.
            assert not folder.exists() or fails_at == SYNCS - 1
        else:
            assert fails_at >= SYNCS
    assert [one.name for one in run.folder.parent.iterdir() if one.name.startswith(".")] == []


CRASHING = """
import json, os, sys
from pathlib import Path
from aos_context.resume_pack import check, snapshot, unpack
place, at, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
pack = check(place / "run_1" / "resume" / "pack_p1.zip", workspace=place.parent) if how == "unpack" else None
calls, whole = iter(range(1000)), os.fsync
def crashing(fd):
    if next(calls) == at:
        os._exit(9)
    whole(fd)
os.fsync = crashing
if pack is not None:
    unpack(pack, place / "run_2", now="2026-01-19T00:00:00Z", run_id="run_2")
else:
    run, items = place / "run_1", json.loads(sys.argv[4])
    snapshot(run, pack_id="p2", zip_pack=how == "zip", pointers={}, memory_items=items, now="2026-01-19T00:00:00Z")
"""


@pytest.mark.parametrize("how", ["unpack", "zip", "folder"])
def test_a_crash_at_any_sync_leaves_all_of_it_or_nothing_and_it_can_be_done_again(
    run: MadeRun, tmp_path: Path, how: str
) -> None:
    packed(run)
    root, crashes, items = run.folder.parent, 0, json.dumps(list(run.memory.values()))
    made = root / "run_2" if how == "unpack" else run.folder / "resume" / ("pack_p2.zip" if how == "zip" else "pack_p2")
    while True:
        command = [sys.executable, "-c", CRASHING, str(root), str(crashes), how, items]
        ended = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(OVERLAY)}).returncode
        if made.exists():
            require_whole(made, tmp_path)
            shutil.rmtree(made) if made.is_dir() else made.unlink()
            if ended == 0:
                break
        assert ended == 9
        crashes += 1
    assert crashes == {"unpack": SYNCS, "zip": 2, "folder": 11}[how]


def require_whole(made: Path, workspace: Path) -> None:
    if made.name == "run_2":
        assert json.loads((made / WORKING_SET).read_bytes())["run_id"] == "run_2"
        assert b"RESUME_PACK_LOADED" in (made / LEDGER).read_bytes().splitlines()[-1]
        assert EpisodeStore(made / "episodes").verify() == 1
    else:
        check(made, workspace=workspace).close()


SYNCS = 11
"""Of five files, of the five folders that they lie in, and of the folder of runs."""


def test_a_bad_run_id_makes_no_run(run: MadeRun, workspace: Path) -> None:
    with check(packed(run).path, workspace=workspace) as pack, pytest.raises(SchemaError):
        unpack(pack, run.folder.parent / "run_2", now=LATER, run_id="../run_2")
    assert [one.name for one in run.folder.parent.iterdir()] == ["run_1"]
    assert working_set()["run_id"] == "run_1"
