"""The registry: folders come, change and go, operators act, and nothing broken harms what is sound."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import codehash, manifests, overlays
from bus.errors import BusError, DeniedError, NotFoundError, OperatorError, SettingError
from bus.overlays import ManifestError, Registry, code_hash

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from bus.model import Manifest

PATIENCE_S = 20.0
"""How long a test waits for an event before it fails."""


def put(folder: Path, **changes: Any) -> Path:
    """An overlay's folder with one program."""
    (folder / "src").mkdir(parents=True, exist_ok=True)
    (folder / "src" / "run.py").write_text("print('{}')")
    document = {"name": folder.name, "version": "1", "entrypoint": "python3 src/run.py"} | changes
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def put_started_service(folder: Path, *command: str) -> Path:
    """An overlay's folder with a service that the bus starts and with a worker."""
    folder.mkdir()
    document = {
        "name": folder.name,
        "version": "1",
        "entrypoints": {
            "proc": {"command": ["cat"], "mode": "worker", "workers": {"count": 2}},
            "http": {"command": [*command], "ready_path": "/health"},
        },
        "capabilities": {"ping": {"runner": "http", "path": "/ping"}, "echo": {"runner": "proc"}},
    }
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def put_service(folder: Path) -> Path:
    """An overlay's folder with two capabilities over HTTP."""
    capability = {"runner": "http", "path": "/ping", "method": "GET"}
    document = {
        "name": folder.name,
        "version": "1",
        "entrypoints": {"http": {"base_url": "http://user:secret@127.0.0.1:1"}},
        "capabilities": {"ping": capability, "psyfi.run": capability},
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "overlays"
    root.mkdir()
    return root


@pytest.fixture
def registry(root: Path, tmp_path: Path) -> Registry:
    return Registry(root, tmp_path / "state")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock so far ahead that everything on disk has not changed for long."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 1000 * codehash.RACY_NS)


def point(link: Path, target: Path) -> None:
    """Make a link, or move it as a deployment does."""
    link.with_name(".new").symlink_to(target)
    link.with_name(".new").rename(link)


def names(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.entries()]


def statuses(registry: Registry) -> dict[str, str]:
    return {entry.name: entry.status for entry in registry.entries()}


# Finding overlays


def test_overlays_are_listed_by_name_and_nothing_else_is(root: Path, registry: Registry) -> None:
    for name in ("b", "a"):
        put(root / name)
    put(root / ".tmp-c")
    (root / "__pycache__").mkdir()
    (root / "README.md").write_text("not an overlay")
    registry.load()
    assert statuses(registry) == {"a": "active", "b": "active"}


def test_a_root_that_does_not_exist_has_no_overlays(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "nowhere", tmp_path / "state")
    registry.load()
    assert registry.entries() == []
    put(tmp_path / "nowhere" / "late")
    assert names(registry) == ["late"]


def test_one_broken_overlay_never_keeps_another_from_loading(root: Path, registry: Registry) -> None:
    put(root / "sound")
    put(root / "worse", phases=["NAP"], timeout_ms=-1)
    put(root / "Bad Name")
    (root / "empty").mkdir()
    (root / "nowhere").symlink_to("no-such-folder")
    (root / "loop").symlink_to("loop")
    registry.load()
    assert statuses(registry) == {
        "Bad Name": "broken",
        "empty": "broken",
        "loop": "broken",
        "nowhere": "broken",
        "sound": "active",
        "worse": "broken",
    }
    worse = registry.entry("worse").error
    assert worse is not None
    assert [fault.path for fault in worse.faults] == ["$.phases[0]", "$.timeout_ms"]
    assert registry.resolve("sound").capability.name == "run"


@pytest.mark.usefixtures("bound_by_modes")
def test_an_unreadable_folder_is_broken_and_says_why(root: Path, registry: Registry) -> None:
    put(root / "sound")
    put(root / "closed").chmod(0)
    try:
        assert statuses(registry) == {"closed": "broken", "sound": "active"}
        assert "Permission denied" in str(registry.entry("closed").error)
    finally:
        (root / "closed").chmod(0o755)


def test_an_overlay_that_holds_too_much_is_broken_and_says_what_to_do(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "big")
    monkeypatch.setattr(codehash, "MAX_FILES", 1)
    assert ".aalignore" in str(registry.entry("big").error)


def test_a_check_may_keep_an_overlay_out(root: Path, tmp_path: Path) -> None:
    def check(manifest: Manifest, folder: Path) -> list[str]:
        assert folder == (root / manifest.name).resolve()
        return ["no license"] if not (folder / "LICENSE").exists() else []

    registry = Registry(root, tmp_path / "state", check=check)
    put(root / "a")
    with pytest.raises(DeniedError, match="no license") as caught:
        registry.resolve("a")
    assert caught.value.code == "ERR_OVERLAY_BROKEN"
    (root / "a" / "LICENSE").write_text("yours")
    assert registry.resolve("a").manifest.name == "a"


def test_the_default_timeout_is_that_of_the_registry(root: Path, tmp_path: Path) -> None:
    put(root / "a")
    registry = Registry(root, tmp_path / "state", default_timeout_s=3.5)
    assert registry.resolve("a").capability.timeout_s == 3.5


# Changes on disk


def test_what_comes_changes_and_goes_is_seen_at_the_next_use(root: Path, registry: Registry) -> None:
    registry.load()
    with pytest.raises(NotFoundError):
        registry.resolve("a")
    put(root / "a")
    assert registry.resolve("a").manifest.version == "1"
    put(root / "a", version="2")
    assert registry.resolve("a").manifest.version == "2"
    shutil.rmtree(root / "a")
    with pytest.raises(NotFoundError):
        registry.resolve("a")
    assert registry.entries() == []


def test_a_half_copied_folder_is_broken_and_heals_by_itself(root: Path, registry: Registry) -> None:
    (root / "a").mkdir()
    assert statuses(registry) == {"a": "broken"}
    whole = json.dumps({"name": "a", "version": "1", "entrypoint": "./run.sh"})
    (root / "a" / "manifest.json").write_text(whole[:20])
    with pytest.raises(DeniedError) as caught:
        registry.resolve("a")
    assert caught.value.code == "ERR_OVERLAY_BROKEN"
    assert caught.value.faults
    (root / "a" / "manifest.json").write_text(whole)
    with pytest.raises(DeniedError, match="which is not there"):
        registry.resolve("a")
    (root / "a" / "run.sh").write_text("#!/bin/sh\n")
    with pytest.raises(DeniedError, match="cannot be executed"):
        registry.resolve("a")
    (root / "a" / "run.sh").chmod(0o755)
    assert registry.resolve("a").capability.argv == ("./run.sh",)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("command", "path"),
    [
        ("./late.sh --fast", "late.sh"),
        ("sh -eu src/late.sh", "src/late.sh"),
        ("late", ".venv/bin/late"),
        ("build/late", "build/late"),
    ],
)
def test_a_program_that_comes_after_its_manifest_heals_it_and_one_that_goes_breaks_it(
    root: Path, registry: Registry, command: str, path: str
) -> None:
    put(root / "a", entrypoint=command)
    (root / "a" / ".aalignore").write_text("build/")
    for folder in ("build", ".venv/bin"):
        (root / "a" / folder).mkdir(parents=True)
    for _ in range(2):
        assert statuses(registry) == {"a": "broken"}
        assert [fault.path for fault in error_of(registry).faults] == ["$.entrypoint"]
        assert "late" in str(error_of(registry))
        (root / "a" / path).write_text("#!/bin/sh\n")
        (root / "a" / path).chmod(0o755)
        assert statuses(registry) == {"a": "active"}
        (root / "a" / path).unlink()


@pytest.mark.usefixtures("settled")
def test_a_program_that_loses_its_right_to_be_executed_is_seen(root: Path, registry: Registry) -> None:
    put(root / "a", entrypoint="src/run.py")
    (root / "a" / "src" / "run.py").chmod(0o755)
    assert statuses(registry) == {"a": "active"}
    (root / "a" / "src" / "run.py").chmod(0o644)
    assert statuses(registry) == {"a": "broken"}


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m mod",
        "python3 -c 'import nowhere.py'",
        "python3 -W ignore nowhere.py",
        "sh -c ./nowhere.sh",
        "bash -ec ./nowhere.sh",
        "sh run",
        "sh",
        "python3 - nowhere.py",
        "python3 --version nowhere.py",
        "/bin/sh /nowhere/run.sh",
        "cat nowhere.py",
        "env python3 nowhere.py",
        "sh src/run.py nowhere.sh",
    ],
)
def test_only_a_script_that_an_interpreter_is_sure_to_run_must_be_there(
    root: Path, registry: Registry, command: str
) -> None:
    put(root / "a", entrypoint=command)
    assert statuses(registry) == {"a": "active"}


@pytest.mark.parametrize("command", ["python3 nowhere.py", "python3.11 -Bu nowhere.py", "/bin/sh -x ./nowhere.sh x"])
def test_a_script_that_is_not_there_is_a_fault(root: Path, registry: Registry, command: str) -> None:
    put(root / "a", entrypoint=command)
    assert "nowhere" in " ".join(fault.found for fault in error_of(registry).faults)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("command", "path", "at"),
    [
        (["./late"], "late", "$.entrypoints.http.command[0]"),
        (["sh", "late.sh"], "late.sh", "$.entrypoints.http.command"),
    ],
)
def test_the_program_of_a_service_is_looked_for_too(
    root: Path, registry: Registry, command: list[str], path: str, at: str
) -> None:
    put_started_service(root / "a", *command)
    for _ in range(2):
        assert [fault.path for fault in error_of(registry).faults] == [at]
        (root / "a" / path).write_text("#!/bin/sh\n")
        (root / "a" / path).chmod(0o755)
        assert statuses(registry) == {"a": "active"}
        (root / "a" / path).unlink()


def test_missing_programs_are_told_with_the_warnings_and_once_each(root: Path, registry: Registry) -> None:
    document = json.loads((put(root / "a") / "manifest.json").read_text())
    document |= {"entrypoints": {"proc": {"command": ["./nowhere"]}}, "extra": 1}
    document["capabilities"] = {name: {"runner": "proc", "path": name} for name in ("x", "y")}
    del document["entrypoint"]
    (root / "a" / "manifest.json").write_text(json.dumps(document))
    summary = registry.entry("a").summary()
    assert [fault["path"] for fault in summary["faults"]] == ["$.entrypoints.proc.command[0]"]
    assert ["$.extra" in warning for warning in summary["warnings"]] == [True]


def error_of(registry: Registry) -> ManifestError:
    """What is wrong with the overlay `a`."""
    error = registry.entry("a").error
    assert error is not None
    return error


# What is broken is not read over and over


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The overlays whose manifest was read, in order."""
    names: list[str] = []
    read = manifests.read

    def counting(folder: Path, **options: Any) -> Manifest:
        names.append(folder.name)
        return read(folder, **options)

    monkeypatch.setattr(manifests, "read", counting)
    return names


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [{"version": 1}, {"entrypoint": "./nowhere"}])
def test_a_broken_overlay_that_stands_still_is_read_once(
    root: Path, registry: Registry, readings: list[str], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    put(root / "a", **change)
    monkeypatch.setattr(overlays, "RETRY_S", 0.0)
    for _ in range(3):
        assert statuses(registry) == {"a": "broken"}
    assert readings == ["a"]
    put(root / "a")
    assert registry.resolve("a").manifest.version == "1"


@pytest.mark.usefixtures("settled")
def test_what_may_pass_without_a_change_is_read_again_after_a_while(
    root: Path, tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a")
    said = ["no license"]
    registry = Registry(root, tmp_path / "state", check=lambda _manifest, _folder: said)
    monkeypatch.setattr(overlays, "RETRY_S", 3600.0)
    assert [statuses(registry) for _ in range(2)] == [{"a": "broken"}] * 2
    assert readings == ["a"]
    said.clear()
    monkeypatch.setattr(overlays, "RETRY_S", 0.0)
    assert statuses(registry) == {"a": "active"}


def test_a_patient_look_lets_a_broken_overlay_rest_and_a_call_does_not(
    root: Path, registry: Registry, readings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlays, "RETRY_S", 3600.0)
    put(root / "a", version=1)
    for _ in range(3):
        assert [entry.status for entry in registry.entries(patient=True)] == ["broken"]
    assert readings == ["a"]
    put(root / "a")
    assert registry.resolve("a").manifest.name == "a"


def test_what_is_too_large_heals_as_soon_as_it_is_left_out(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a")
    (root / "a" / "x.bin").write_text("")
    monkeypatch.setattr(codehash, "MAX_FILES", 3)
    monkeypatch.setattr(overlays, "RETRY_S", 3600.0)
    (root / "a" / "y.bin").write_text("")
    assert statuses(registry) == {"a": "broken"}
    (root / "a" / ".aalignore").write_text("*.bin")
    assert statuses(registry) == {"a": "active"}


def test_a_manifest_that_is_a_folder_costs_no_descriptors(root: Path, registry: Registry) -> None:
    (root / "a" / "manifest.json").mkdir(parents=True)
    registry.entries()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        assert [entry.status for entry in registry.entries()] == ["broken"]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.usefixtures("settled")
def test_overlays_are_kept_while_their_folder_cannot_be_listed(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a")
    registry.load()

    def refuse(_path: Path) -> object:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        assert statuses(registry) == {"a": "active"}
    shutil.rmtree(root)
    assert registry.entries() == []


@pytest.mark.usefixtures("bound_by_modes")
def test_a_link_into_a_closed_folder_harms_no_other_overlay(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(root / "sound")
    (tmp_path / "closed").mkdir()
    (root / "a").symlink_to(tmp_path / "closed" / "a")
    (tmp_path / "closed").chmod(0)
    try:
        assert statuses(registry) == {"a": "broken", "sound": "active"}
    finally:
        (tmp_path / "closed").chmod(0o755)


def test_an_overlay_behind_a_link_is_followed_when_the_link_moves(
    root: Path, tmp_path: Path, registry: Registry
) -> None:
    for version in ("1", "2"):
        put(tmp_path / f"release{version}" / "a", version=version)
    (root / "a").symlink_to(tmp_path / "release1" / "a")
    assert registry.resolve("a").manifest.version == "1"
    (root / "a").unlink()
    (root / "a").symlink_to(tmp_path / "release2" / "a")
    resolved = registry.resolve("a")
    assert (resolved.manifest.version, resolved.manifest.folder) == ("2", (tmp_path / "release2" / "a").resolve())
    assert resolved.code_hash == code_hash(tmp_path / "release2" / "a")


def test_a_release_of_hard_links_is_told_from_the_one_before(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(tmp_path / "release1" / "a")
    shutil.copytree(tmp_path / "release1", tmp_path / "release2", copy_function=os.link)
    (root / "a").symlink_to(tmp_path / "release1" / "a")
    registry.resolve("a")
    (root / "a").unlink()
    (root / "a").symlink_to(tmp_path / "release2" / "a")
    assert registry.resolve("a").manifest.folder == (tmp_path / "release2" / "a").resolve()


@pytest.mark.usefixtures("settled")
def test_a_link_that_moves_is_seen_by_the_next_call_even_if_both_releases_are_old(
    root: Path, tmp_path: Path, registry: Registry
) -> None:
    for version in ("1", "2"):
        put(tmp_path / version / "a", version=version)
    for version in ("1", "2", "1"):
        point(root / "a", tmp_path / version / "a")
        assert [registry.resolve("a").manifest.version for _ in range(2)] == [version, version]
        assert registry.resolve("a").code_hash == code_hash(tmp_path / version / "a")


@pytest.mark.usefixtures("settled")
def test_a_folder_that_another_takes_the_place_of_is_seen_by_the_next_call(
    root: Path, tmp_path: Path, registry: Registry
) -> None:
    for version in ("1", "2"):
        put(tmp_path / version / "a", version=version)
    (tmp_path / "1" / "a").rename(root / "a")
    assert registry.resolve("a").manifest.version == "1"
    (root / "a").rename(tmp_path / "old")
    (tmp_path / "2" / "a").rename(root / "a")
    resolved = registry.resolve("a")
    assert (resolved.manifest.version, resolved.code_hash) == ("2", code_hash(root / "a"))


@pytest.mark.usefixtures("settled")
def test_a_release_that_is_renamed_runs_from_where_it_is_now(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(tmp_path / "old" / "a")
    point(root / "a", tmp_path / "old" / "a")
    registry.resolve("a")
    (tmp_path / "old").rename(tmp_path / "new")
    point(root / "a", tmp_path / "new" / "a")
    assert registry.resolve("a").manifest.folder == (tmp_path / "new" / "a").resolve()


def move_while_it_is_read(link: Path, targets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """After each reading of a manifest the link moves to the next target, while there is one."""
    read = manifests.read

    def moving(folder: Path, **options: Any) -> Manifest:
        manifest = read(folder, **options)
        if targets:
            point(link, targets.pop(0))
        return manifest

    monkeypatch.setattr(manifests, "read", moving)


@pytest.mark.usefixtures("settled")
def test_a_call_gets_manifest_and_code_of_the_same_release_when_the_link_moves_between(
    root: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = [put(tmp_path / version / "a", version=version) for version in ("1", "2")]
    point(root / "a", releases[0])
    move_while_it_is_read(root / "a", [releases[1]], monkeypatch)
    resolved = [registry.resolve("a") for _ in range(2)]
    assert [(each.manifest.version, each.code_hash) for each in resolved] == [("2", code_hash(releases[1]))] * 2


@pytest.mark.usefixtures("settled")
def test_an_overlay_that_never_stands_still_is_refused_and_heals(
    root: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = [put(tmp_path / version / "a", version=version) for version in ("1", "2")]
    point(root / "a", releases[0])
    move_while_it_is_read(root / "a", [releases[1], releases[0], releases[1]], monkeypatch)
    with pytest.raises(DeniedError, match="stands still") as caught:
        registry.resolve("a")
    assert caught.value.code == "ERR_OVERLAY_BROKEN"
    assert registry.resolve("a").manifest.version == "2"


@pytest.mark.usefixtures("settled")
def test_links_and_watched_folders_follow_the_code_and_not_only_the_manifest(
    root: Path, tmp_path: Path, registry: Registry
) -> None:
    put(root / "a")
    registry.load()
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "a" / "src" / "lib").symlink_to(outside)
    assert registry.entry("a").links == (f"src/lib -> {outside.resolve()}",)
    assert str(outside.resolve()) in registry._watched()
    (root / "a" / "src" / "lib").unlink()
    assert registry.entry("a").links == ()
    assert str(outside.resolve()) not in registry._watched()


def test_the_code_hash_of_a_call_is_that_of_the_moment(root: Path, registry: Registry) -> None:
    put(root / "a")
    before = registry.resolve("a").code_hash
    assert before == code_hash(root / "a")
    (root / "a" / "src" / "run.py").write_text("print('other')")
    assert registry.resolve("a").code_hash == code_hash(root / "a") != before


def test_links_that_lead_outside_are_shown(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(root / "a")
    assert registry.entry("a").links == ()
    (root / "a" / "data").symlink_to(tmp_path)
    assert registry.entry("a").links == (f"data -> {tmp_path.resolve()}",)
    fresh = Registry(root, tmp_path / "state")
    assert fresh.entry("a").links == (f"data -> {tmp_path.resolve()}",)


# Names


def test_an_unknown_overlay_is_answered_with_names_that_come_near(root: Path, registry: Registry) -> None:
    put(root / "abraxas")
    with pytest.raises(NotFoundError, match="did you mean abraxas") as caught:
        registry.entry("abraxsa")
    assert caught.value.code == "ERR_UNKNOWN_OVERLAY"


@pytest.mark.parametrize(
    "name", ["../overlays/a", "a/", "/etc", "..", ".", "", "a\0", "A", "a\n", ".hidden", "a.b.", "ä"]
)
def test_a_name_that_cannot_be_is_unknown_and_never_touches_the_disk(
    root: Path, registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a")
    put(root / ".hidden")
    monkeypatch.setattr(overlays, "_look", lambda _folder: pytest.fail("the disk was touched"))
    with pytest.raises(NotFoundError) as caught:
        registry.entry(name)
    assert caught.value.code == "ERR_UNKNOWN_OVERLAY"
    caught.value.detail.encode()


def test_a_capability_is_found_by_either_of_its_names(root: Path, registry: Registry) -> None:
    put_service(root / "psyfi")
    for name, capability in [("psyfi", "ping"), ("psyfi", "psyfi.ping"), ("psyfi.ping", None)]:
        assert registry.resolve(name, capability).capability.name == "ping"
    assert registry.resolve("psyfi.run").capability.name == "run"


@pytest.mark.parametrize("capability", [None, "", "pong", "other.ping", "psyfi."])
def test_without_a_capability_that_is_there_all_are_listed(
    root: Path, registry: Registry, capability: str | None
) -> None:
    put_service(root / "psyfi")
    with pytest.raises(NotFoundError, match="ping, run") as caught:
        registry.resolve("psyfi", capability)
    assert caught.value.code == "ERR_UNKNOWN_CAPABILITY"


def test_a_name_that_ends_in_a_dot_is_no_overlay(root: Path, registry: Registry) -> None:
    put(root / "a")
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("a.")
    assert caught.value.code == "ERR_UNKNOWN_OVERLAY"


# What operators do


def test_a_disabled_overlay_is_refused_by_every_registry_until_it_is_enabled(
    root: Path, tmp_path: Path, registry: Registry
) -> None:
    put(root / "a")
    serving = Registry(root, tmp_path / "state")
    assert serving.resolve("a").manifest.name == "a"
    registry.disable("a")
    with pytest.raises(DeniedError) as caught:
        serving.resolve("a")
    assert caught.value.code == "ERR_OVERLAY_DISABLED"
    assert statuses(serving) == {"a": "disabled"}
    registry.enable("a")
    assert serving.resolve("a").manifest.name == "a"
    assert statuses(serving) == {"a": "active"}


def test_an_unknown_overlay_cannot_be_disabled_but_one_that_has_gone_can_be_enabled(
    root: Path, registry: Registry
) -> None:
    put(root / "a")
    for act in (registry.disable, registry.enable):
        with pytest.raises(NotFoundError):
            act("b")
    registry.disable("a")
    shutil.rmtree(root / "a")
    registry.enable("a")
    put(root / "a")
    assert statuses(registry) == {"a": "active"}


def disable_and_enable(root: Path, state: Path, name: str) -> None:
    registry = Registry(root, state)
    for _ in range(20):
        registry.disable(name)
        registry.enable(name)
    registry.disable(name)


def test_processes_that_disable_at_once_lose_nothing(root: Path, tmp_path: Path, registry: Registry) -> None:
    some = ["a", "b", "c"]
    for name in some:
        put(root / name)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=disable_and_enable, args=(root, tmp_path / "state", name)) for name in some]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert statuses(registry) == dict.fromkeys(some, "disabled")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"disabled": [1]}', b'{"disabled": "a"}'])
def test_a_list_of_disabled_overlays_that_makes_no_sense_stops_the_start(
    root: Path, tmp_path: Path, registry: Registry, text: bytes
) -> None:
    put(root / "a")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "overlays.json").write_bytes(text)
    with pytest.raises(SettingError, match=r"overlays\.json"):
        registry.load()
    with pytest.raises(SettingError):
        registry.enable("a")
    assert (tmp_path / "state" / "overlays.json").read_bytes() == text


def test_an_overlay_is_added_whole_with_its_links(root: Path, tmp_path: Path, registry: Registry) -> None:
    source = put(tmp_path / "downloads" / "a")
    (source / "link").symlink_to("src/run.py")
    (source / "src" / "run.py").chmod(0o755)
    entry = registry.add(source)
    assert (entry.name, entry.status, entry.folder) == ("a", "active", root / "a")
    assert (root / "a" / "link").readlink() == Path("src/run.py")
    assert code_hash(root / "a") == code_hash(source)
    assert [path.name for path in root.iterdir()] == ["a"]


def test_adding_makes_the_root(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "new" / "overlays", tmp_path / "state")
    assert registry.add(put(tmp_path / "a")).status == "active"


def test_a_broken_overlay_is_not_added_and_every_fault_is_told(root: Path, tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ManifestError) as caught:
        registry.add(put(tmp_path / "a", version=1, phases=["NAP"]))
    assert [fault.path for fault in caught.value.faults] == ["$.phases[0]", "$.version"]
    with pytest.raises(ManifestError):
        registry.add(tmp_path / "nowhere")
    assert list(root.iterdir()) == []


def test_a_name_that_is_taken_is_not_added(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(root / "a", version="first")
    (root / "b").symlink_to("nowhere")
    for name in ("a", "b"):
        with pytest.raises(OperatorError) as caught:
            registry.add(put(tmp_path / name))
        assert caught.value.code == "ERR_EXISTS"
    assert registry.resolve("a").manifest.version == "first"


def test_a_copy_that_fails_leaves_nothing(root: Path, tmp_path: Path, registry: Registry) -> None:
    source = put(tmp_path / "a")
    os.mkfifo(source / "fifo")
    with pytest.raises(OperatorError, match="fifo") as caught:
        registry.add(source)
    assert caught.value.code == "ERR_FILES"
    assert list(root.iterdir()) == []


def test_a_folder_that_holds_the_overlays_is_not_copied_into_them(tmp_path: Path) -> None:
    source = put(tmp_path / "a")
    registry = Registry(source / "overlays", tmp_path / "state")
    with pytest.raises(OperatorError, match="within"):
        registry.add(source)


def test_a_removed_overlay_is_kept_and_is_no_longer_disabled(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(root / "a")
    registry.disable("a")
    moved = registry.remove("a")
    assert (moved.name, moved.parent.parent) == ("a", tmp_path / "state" / "removed")
    assert (moved / "src" / "run.py").exists()
    assert registry.entries() == []
    assert registry.add(moved).status == "active"
    assert registry.remove("a") != moved
    with pytest.raises(NotFoundError):
        registry.remove("a")


def test_of_a_linked_overlay_only_the_link_is_removed(root: Path, tmp_path: Path, registry: Registry) -> None:
    target = put(tmp_path / "elsewhere" / "a")
    (root / "a").symlink_to(target)
    moved = registry.remove("a")
    assert moved.is_symlink()
    assert moved.readlink() == target
    assert (target / "manifest.json").exists()


@pytest.fixture
def across(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder that looks as if it lay on another file system than the overlays."""
    rename = os.rename

    def refusing(source: Any, target: Any) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)


@pytest.mark.usefixtures("across")
def test_removing_works_across_file_systems(root: Path, tmp_path: Path, registry: Registry) -> None:
    before = code_hash(put(root / "a"))
    assert code_hash(registry.remove("a")) == before
    (root / "b").symlink_to(tmp_path)
    assert registry.remove("b").readlink() == tmp_path
    assert list(root.iterdir()) == []


@pytest.mark.usefixtures("across")
def test_a_removal_that_fails_half_way_leaves_the_overlay_where_it_was(
    root: Path, registry: Registry, tmp_path: Path
) -> None:
    put(root / "a")
    os.mkfifo(root / "a" / "fifo")
    with pytest.raises(OperatorError):
        registry.remove("a")
    assert statuses(registry) == {"a": "active"}
    assert list((tmp_path / "state" / "removed").iterdir()) == []


def test_a_state_folder_that_cannot_be_is_an_operator_error(root: Path, tmp_path: Path) -> None:
    put(root / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises((OperatorError, SettingError)):
        Registry(root, tmp_path / "file").disable("a")


def test_a_list_that_cannot_be_written_stays_as_it_was(
    root: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a")
    put(root / "b")
    registry.disable("a")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OperatorError, match="No space left"):
        registry.disable("b")
    assert json.loads((tmp_path / "state" / "overlays.json").read_text()) == {"disabled": ["a"]}
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["overlays.json", "overlays.lock"]


# What people and programs are shown


def test_everything_shown_is_text_whatever_the_names_on_disk_are(root: Path, registry: Registry) -> None:
    bad = os.fsdecode(b"bad\xff")
    (put(root / "a") / "data").symlink_to(f"/nowhere/{bad}")
    (root / bad).mkdir()
    (root / f"link{bad}").symlink_to(root / bad)
    put(root / f"full{bad}")
    shown = [entry.detail() for entry in registry.entries()]
    json.dumps(shown, ensure_ascii=False).encode()
    assert [entry["name"] for entry in shown] == ["a", r"bad\xff", r"fullbad\xff", r"linkbad\xff"]
    assert [entry["folder"] for entry in shown] == [entry["name"] for entry in shown]
    assert shown[0]["links"] == [r"data -> /nowhere/bad\xff"]


def test_every_error_is_text_whatever_the_names_on_disk_are(root: Path, tmp_path: Path, registry: Registry) -> None:
    bad = os.fsdecode(b"bad\xff")
    (root / bad).mkdir()
    source = put(tmp_path / bad / "a")
    os.mkfifo(source / "fifo")
    entry = next(iter(registry.entries()))
    for refused in (lambda: registry.entry("b"), entry.usable, lambda: registry.add(source)):
        with pytest.raises(BusError) as caught:
            refused()
        assert r"bad" in caught.value.detail
        json.dumps(caught.value.body(), ensure_ascii=False).encode()


def test_the_paths_of_rights_are_text_whatever_folder_the_overlays_lie_in(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"bad\xff")
    capability = {"runner": "proc", "rights": {"read": ["data"], "write": ["out"]}}
    put(root / "a", entrypoint=None)
    document = {"name": "a", "version": "1", "entrypoints": {"proc": {"command": ["cat"]}}}
    (root / "a" / "manifest.json").write_text(json.dumps(document | {"capabilities": {"run": capability}}))
    rights = Registry(root, tmp_path / "state").entry("a").detail()["details"]["run"]["rights"]
    assert rights["read"] == [rf"{tmp_path.resolve()}/bad\xff/a/data"]
    assert rights["write"] == [rf"{tmp_path.resolve()}/bad\xff/a/out"]


def test_what_cannot_be_held_is_shown_as_a_warning(root: Path, registry: Registry) -> None:
    put_service(root / "psyfi")
    document = json.loads((root / "psyfi" / "manifest.json").read_text())
    for capability in document["capabilities"].values():
        capability["rights"] = {"write": []}
    (root / "psyfi" / "manifest.json").write_text(json.dumps(document))
    warnings = registry.entry("psyfi").summary()["warnings"]
    assert warnings
    assert all("cannot be held" in warning for warning in warnings)


def test_the_summary_of_shape_a_shows_permissions_as_capabilities(root: Path, registry: Registry) -> None:
    put(root / "a", capabilities=["exec", "analysis"], status="experimental", extra=1)
    summary = registry.entry("a").summary()
    assert summary["capabilities"] == summary["permissions"] == ["analysis", "exec"]
    assert (summary["name"], summary["version"], summary["status"]) == ("a", "1", "experimental")
    assert summary["phases"] == ["OPEN", "ALIGN", "CLEAR", "SEAL"]
    assert (summary["runners"], summary["folder"], summary["error"]) == (["proc"], "a", None)
    assert "$.extra" in summary["warnings"][0]


def test_a_broken_overlay_is_shown_with_every_fault(root: Path, registry: Registry) -> None:
    put(root / "a", timeout_ms=-1, version=2)
    shown = registry.entry("a").detail()
    assert (shown["status"], shown["version"], shown["details"]) == ("broken", None, {})
    assert [fault["path"] for fault in shown["faults"]] == ["$.timeout_ms", "$.version"]
    assert "$.timeout_ms" in shown["error"]


def test_details_are_json_and_hide_the_password_of_a_url(root: Path, registry: Registry) -> None:
    put_service(root / "psyfi")
    put(root / "a", op_policy={"hash": ["analysis"]})
    shown = [json.loads(json.dumps(entry.detail())) for entry in registry.entries()]
    assert [entry["name"] for entry in shown] == ["a", "psyfi"]
    ping = shown[1]["details"]["ping"]
    assert (ping["url"], ping["method"], ping["argv"]) == ("http://127.0.0.1:1/ping", "GET", [])
    assert ping["memory"]["profile"] == "MINIMAL"
    assert shown[0]["details"]["run"]["argv"] == ["python3", "src/run.py"]
    assert shown[0]["op_policy"] == {"hash": ["analysis"]}


def test_details_tell_how_the_programs_run(root: Path, registry: Registry) -> None:
    put_started_service(root / "a", "cat")
    put_service(root / "b")
    put(root / "c")
    shown = [json.loads(json.dumps(entry.detail())) for entry in registry.entries()]
    keys = ("mode", "stdin", "preload", "workers")
    workers = {
        "count": 2,
        "max_calls": 10_000,
        "max_mb": None,
        "start_timeout_s": 30.0,
        "tier": "LOCAL",
        "purge": False,
    }
    assert [[detail[key] for key in keys] for detail in shown] == [
        ["worker", "pipe", [], workers],
        [None, None, [], None],
        ["auto", "file", [], None],
    ]
    service = {"argv": ["cat"], "ready_path": "/health", "start_timeout_s": 30.0, "idle_s": 300.0, "max_mb": None}
    service["tier"] = "LOCAL"
    assert [detail["service"] for detail in shown] == [service, None, None]
    assert shown[0]["details"]["ping"]["url"] == "/ping"


# Editions


def edit_code(folder: Path) -> None:
    (folder / "src" / "run.py").write_text("# edited")


def edit_manifest(folder: Path) -> None:
    put(folder, version="2")


def replace_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name(".new"))
    shutil.rmtree(folder)
    folder.with_name(".new").rename(folder)


def install_package(folder: Path) -> None:
    (site_packages(folder) / "addon").mkdir(parents=True)


def begin_venv(folder: Path) -> None:
    (folder / ".venv").mkdir()


def make_venv(folder: Path) -> None:
    site_packages(folder).mkdir(parents=True)


def install_node_module(folder: Path) -> None:
    (folder / "node_modules" / "left-pad").mkdir(parents=True)


def site_packages(folder: Path) -> Path:
    return folder / ".venv" / "lib" / "python3.11" / "site-packages"


def put_with_packages(folder: Path) -> Path:
    """An overlay with a `.venv` and with `node_modules`."""
    make_venv(put(folder))
    (folder / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin")
    (folder / "node_modules").mkdir()
    return folder


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("packages", [False, True])
def test_an_overlay_that_stands_still_is_of_one_edition(root: Path, registry: Registry, packages: bool) -> None:
    (put_with_packages if packages else put)(root / "a")
    put(root / "b")
    numbers = {registry.resolve("a").edition for _ in range(3)}
    registry.entries()
    edit_code(root / "b")
    registry.resolve("b")
    assert numbers == {registry.resolve("a").edition}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [edit_code, edit_manifest, replace_folder, install_package, install_node_module])
def test_each_change_makes_another_edition_with_a_higher_number(
    root: Path, registry: Registry, change: Callable[[Path], None]
) -> None:
    put_with_packages(root / "a")
    before = registry.resolve("a").edition
    change(root / "a")
    registry.entries()  # which reads what has changed, before the call does
    after = [registry.resolve("a").edition for _ in range(2)]
    assert after[0] == after[1] > before


@pytest.mark.usefixtures("settled")
def test_packages_count_from_the_moment_when_there_is_a_place_for_them(root: Path, registry: Registry) -> None:
    put(root / "a")
    registry.resolve("a")
    for make in (begin_venv, make_venv, install_package, install_node_module):
        before = registry.resolve("a").edition
        make(root / "a")
        assert registry.resolve("a").edition > before


def test_packages_that_change_make_one_edition_and_one_more_once_they_have_come_to_rest(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_with_packages(root / "a")
    before = registry.resolve("a").edition
    install_package(root / "a")
    monkeypatch.setattr(codehash, "RACY_NS", 10**18)
    (changed,) = {registry.resolve("a").edition for _ in range(3)}
    monkeypatch.setattr(codehash, "RACY_NS", -(10**18))
    (at_rest,) = {registry.resolve("a").edition for _ in range(3)}
    assert before < changed < at_rest


def test_packages_behind_a_link_count_once_it_leads_somewhere(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(root / "a")
    (root / "a" / ".venv").symlink_to(tmp_path / "elsewhere")
    before = registry.resolve("a").edition
    (tmp_path / "elsewhere" / "lib").mkdir(parents=True)
    (tmp_path / "elsewhere" / "pyvenv.cfg").touch()
    assert registry.resolve("a").edition > before


@pytest.mark.usefixtures("settled")
def test_an_overlay_that_comes_back_never_has_a_number_again(root: Path, tmp_path: Path, registry: Registry) -> None:
    put(root / "a")
    before = registry.resolve("a").edition
    (root / "a").rename(tmp_path / "a")
    assert names(registry) == []
    (tmp_path / "a").rename(root / "a")
    assert registry.resolve("a").edition > before


@pytest.mark.usefixtures("settled")
def test_an_overlay_is_renewed_on_demand_and_once(root: Path, registry: Registry) -> None:
    put(root / "a")
    before = registry.resolve("a")
    registry.renew("a")
    registry.renew("unknown")
    after = [registry.resolve("a") for _ in range(2)]
    assert after[0].edition == after[1].edition > before.edition
    assert after[0].code_hash == before.code_hash


@pytest.mark.usefixtures("settled")
def test_after_a_folder_that_never_stood_still_the_code_hash_is_that_of_the_call(
    root: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a")
    registry.resolve("a")
    look, clock = overlays._look, itertools.count()

    def look_again(folder: Path) -> object:
        """As if the manifest were another one at each look."""
        seen = look(folder)
        assert seen
        assert seen.manifest
        return seen._replace(manifest=seen.manifest._replace(mtime_ns=next(clock)))

    with monkeypatch.context() as patch:
        patch.setattr(overlays, "_look", look_again)
        edit_code(root / "a")
        with pytest.raises(DeniedError, match="stands still"):
            registry.resolve("a")
    registry.entries()
    assert registry.resolve("a").code_hash == code_hash(root / "a")


# Watching


@contextlib.asynccontextmanager
async def watching(registry: Registry) -> AsyncIterator[asyncio.Queue[str]]:
    """What a running `watch` tells of: a name, and how that overlay stands then."""
    told: asyncio.Queue[str] = asyncio.Queue()

    def tell(name: str) -> None:
        found = {entry.name: entry for entry in registry.entries()}.get(name)
        manifest = found.manifest if found else None
        told.put_nowait(f"{name} {manifest.version if manifest else found.status if found else 'gone'}")

    task = asyncio.create_task(registry.watch(tell))
    await asyncio.sleep(0)
    try:
        yield told
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def tells(told: asyncio.Queue[str], news: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await told.get() != news:
            pass


async def test_watch_tells_of_what_comes_changes_and_goes(root: Path, registry: Registry) -> None:
    async with watching(registry) as told:
        put(root / "a")
        await tells(told, "a 1")
        put(root / "a", version="2")
        await tells(told, "a 2")
        (root / "a" / "manifest.json").write_text("{")
        await tells(told, "a broken")
        shutil.rmtree(root / "a")
        await tells(told, "a gone")


async def test_watch_lives_on_beside_a_folder_whose_name_is_no_text(root: Path, registry: Registry) -> None:
    (root / os.fsdecode(b"bad\xff")).mkdir()
    async with watching(registry) as told:
        put(root / "a")
        await tells(told, "a 1")
        (root / os.fsdecode(b"bad\xfe")).mkdir()
        await tells(told, r"bad\xfe gone")
        put(root / "a", version="2")
        await tells(told, "a 2")


async def test_watch_outlives_what_nobody_expected(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(overlays, "POLL_S", 0.02)
    owners, trouble = overlays._owners, [ValueError("no UTF-8"), KeyError("a")]

    def failing(path: str, watched: Any) -> set[str]:
        if trouble:
            raise trouble.pop()
        return owners(path, watched)

    monkeypatch.setattr(overlays, "_owners", failing)
    async with watching(registry) as told:
        put(root / "a")
        await tells(told, "a 1")
        while trouble:
            put(root / "a", version="2")
            await asyncio.sleep(0.01)
        put(root / "a", version="3")
        await tells(told, "a 3")
    assert [record.levelname for record in caplog.records if "cannot watch" in record.message] == ["ERROR", "ERROR"]


async def test_a_name_of_two_lines_is_told_in_one_line_of_the_log(
    root: Path, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bus.overlays")
    async with watching(registry) as told:
        put(root / "a\nb")
        await tells(told, "a\nb broken")
    assert [record.getMessage() for record in caplog.records if "changed" in record.msg][:1] == [
        r"overlay 'a\nb' changed"
    ]


async def test_watch_tells_of_code_that_changes_at_any_depth(root: Path, registry: Registry) -> None:
    put(root / "a")
    async with watching(registry) as told:
        (root / "a" / "src" / "run.py").write_text("# edited")
        await tells(told, "a 1")


async def test_watch_follows_links_and_tells_when_they_move(root: Path, tmp_path: Path, registry: Registry) -> None:
    for version in ("1", "2"):
        put(tmp_path / version / "a", version=version)
    (root / "a").symlink_to(tmp_path / "1" / "a")
    async with watching(registry) as told:
        (tmp_path / "1" / "a" / "src" / "run.py").write_text("# edited")
        await tells(told, "a 1")
        (root / "a").unlink()
        (root / "a").symlink_to(tmp_path / "2" / "a")
        await tells(told, "a 2")
        put(tmp_path / "2" / "a", version="3")
        await tells(told, "a 3")


async def test_watch_waits_for_a_root_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlays, "POLL_S", 0.02)
    registry = Registry(tmp_path / "later" / "overlays", tmp_path / "state")
    async with watching(registry) as told:
        put(tmp_path / "later" / "overlays" / "a")
        await tells(told, "a 1")


async def test_watch_polls_where_no_events_come(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_paths: object, **_options: object) -> object:
        raise OSError(28, "No space left on device")  # what inotify says when its watches are used up

    monkeypatch.setattr(overlays, "awatch", refuse)
    monkeypatch.setattr(overlays, "POLL_S", 0.02)
    async with watching(registry) as told:
        put(root / "a")
        await tells(told, "a 1")
        put(root / "a", version="2")
        await tells(told, "a 2")


async def test_watch_goes_on_when_the_list_of_disabled_overlays_breaks(
    root: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlays, "POLL_S", 0.02)
    (tmp_path / "state").mkdir()
    async with watching(registry) as told:
        (tmp_path / "state" / "overlays.json").write_text("{")
        put(root / "a")
        assert registry._states() is None
        (tmp_path / "state" / "overlays.json").write_text('{"disabled": []}')
        await tells(told, "a 1")


async def test_watch_tells_after_each_look_what_is_there_and_not_disabled(
    root: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlays, "POLL_S", 0.02)
    for name in ("a", "b", "c"):
        put(root / name)
    (root / "c" / "manifest.json").write_text("{")
    looks: asyncio.Queue[set[str]] = asyncio.Queue()
    task = asyncio.create_task(registry.watch(on_look=lambda offered: looks.put_nowait(set(offered))))
    try:
        await sees(looks, {"a", "b", "c"})
        Registry(root, tmp_path / "state").disable("a")
        await sees(looks, {"b", "c"})
        shutil.rmtree(root / "b")
        await sees(looks, {"c"})
        await sees(looks, {"c"})  # that nothing is new is told, too
        (tmp_path / "state" / "overlays.json").write_text("{")
        (tmp_path / "state" / "overlays.json").write_text('{"disabled": []}')
        await sees(looks, {"a", "c"})
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def sees(looks: asyncio.Queue[set[str]], offered: set[str]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await looks.get() != offered:
            pass


async def test_excluded_folders_are_not_watched(root: Path, registry: Registry) -> None:
    put(root / "a")
    (root / "a" / ".venv" / "lib").mkdir(parents=True)
    registry.load()
    assert all(".venv" not in folder for folder in registry._watched())
    assert overlays._owners(f"{root}/a/__pycache__", registry._watched()) == set()
    assert overlays._owners(f"{root}/a/src/run.py", registry._watched()) == {"a"}
    assert overlays._owners(f"{root}/new", registry._watched()) == {"new"}
