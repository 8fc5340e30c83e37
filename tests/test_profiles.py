"""Memory profiles by name: the operator's own files before the shipped ones, as they are at the moment of each call."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from bus import codehash, overlays, profiles, runes
from bus.overlays import Registry
from bus.profiles import Asked, Profiles
from bus.runes import RuneError
from tests.support import PATIENCE_S, InProcessRunner, a_call, add_native, add_overlay, calls, running_bus

if TYPE_CHECKING:
    from pathlib import Path

    from bus.settings import Settings

FAST = "MEM[SOFT=10,HARD=20,VOL=LOW];PRIORITY=9"
FASTER = "MEM[SOFT=100,HARD=200,VOL=LOW];PRIORITY=8"
BROKEN = "MEM[SOFT=10,HARD=20,VOL=LOW];\n\tTIER=MOON"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "profiles"
    folder.mkdir()
    return folder


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock so far ahead that no file has changed for long."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 1000 * codehash.RACY_NS)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read, in order."""
    names: list[str] = []
    read = profiles.read_text

    def counting(path: str | Path) -> str:
        names.append(str(path).rpartition("/")[2])
        return read(path)

    monkeypatch.setattr(profiles, "read_text", counting)
    return names


def refusal(found: Profiles, text: str) -> RuneError:
    with pytest.raises(RuneError) as caught:
        found.resolve(text)
    return caught.value


# --- Names and files ---------------------------------------------------------------------------------------------


def test_a_file_is_a_profile_by_its_name_beside_the_shipped_ones_and_rune_text(folder: Path) -> None:
    (folder / "FAST.rune").write_text(FAST)
    found = Profiles(folder)
    fast = found.resolve(" FAST\n")
    assert (fast.name, fast.soft_mb, fast.priority) == ("FAST", 10, 9)
    assert found.resolve("MINIMAL") == runes.profiles()["MINIMAL"]
    assert found.resolve(FASTER) == runes.parse(FASTER)


def test_the_operators_own_file_counts_in_place_of_the_shipped_one(folder: Path) -> None:
    (folder / "BALANCED.rune").write_text(FAST)
    found = Profiles(folder)
    assert (found.resolve("BALANCED").soft_mb, found.resolve("BALANCED").name) == (10, "BALANCED")
    (folder / "BALANCED.rune").unlink()
    assert found.resolve("BALANCED") == runes.profiles()["BALANCED"]


@pytest.mark.parametrize("folder_there_is", [None, "nowhere"])
def test_without_a_folder_there_are_the_shipped_ones(tmp_path: Path, folder_there_is: str | None) -> None:
    found = Profiles(folder_there_is and tmp_path / folder_there_is)  # type: ignore[arg-type]  # "" is not among them
    assert [named.name for named in found.all()] == ["BALANCED", "MINIMAL", "PERFORMANCE"]
    assert found.resolve("MINIMAL").soft_mb == 512
    assert refusal(found, "FAST").found == "'FAST'"


def test_an_unknown_name_is_refused_with_the_names_that_come_near(folder: Path) -> None:
    (folder / "FAST.rune").write_text(FAST)
    (folder / ".HIDDEN.rune").write_text(FAST)
    (folder / "a b.rune").write_text(FAST)
    error = refusal(Profiles(folder), "fats")
    assert error.near == ("FAST",)
    assert error.expected[:-1] == ("BALANCED", "FAST", "MINIMAL", "PERFORMANCE")
    assert error.detail.endswith("; did you mean FAST?")


@pytest.mark.parametrize("text", ["../FAST", "FAST.rune", "./FAST", "FAST\0", "", "a" * 65])
def test_what_is_no_name_is_never_looked_for_among_the_files(tmp_path: Path, folder: Path, text: str) -> None:
    (tmp_path / "FAST.rune").write_text(FAST)
    (folder / "FAST.rune").write_text(FAST)
    assert "'MEM'" in refusal(Profiles(folder), text).expected


# --- Changes -----------------------------------------------------------------------------------------------------


def test_a_file_that_comes_changes_and_goes_counts_from_the_next_question(folder: Path) -> None:
    found = Profiles(folder)
    assert refusal(found, "FAST").found == "'FAST'"
    for text in (FAST, FASTER, FAST):
        (folder / "FAST.rune").write_text(text)
        assert runes.format(found.resolve("FAST")) == runes.format(runes.parse(text))
    (folder / "FAST.rune").unlink()
    assert refusal(found, "FAST").found == "'FAST'"


@pytest.mark.usefixtures("settled")
def test_a_file_that_stands_still_is_read_once_and_one_that_changes_again(folder: Path, readings: list[str]) -> None:
    for name in ("FAST", "OTHER"):
        (folder / f"{name}.rune").write_text(FAST)
    found = Profiles(folder)
    assert [found.resolve("FAST").soft_mb for _ in range(3)] == [10, 10, 10]
    assert readings == ["FAST.rune"]
    (folder / "FAST.rune").write_text(FASTER)
    assert [found.resolve("FAST").soft_mb for _ in range(3)] == [100, 100, 100]
    (folder / "FAST.rune").write_text(BROKEN)
    assert {str(refusal(found, "FAST")) for _ in range(3)} == {str(refusal(found, "FAST"))}
    assert readings == ["FAST.rune"] * 3


@pytest.mark.usefixtures("settled")
def test_a_link_that_moves_on_is_followed(folder: Path) -> None:
    (folder / "one").write_text(FAST)
    (folder / "two").write_text(FASTER)
    found = Profiles(folder)
    for target, soft_mb in (("one", 10), ("two", 100), ("one", 10)):
        (folder / ".new").symlink_to(target)
        (folder / ".new").rename(folder / "FAST.rune")
        assert [found.resolve("FAST").soft_mb for _ in range(2)] == [soft_mb] * 2


def test_a_file_changed_a_moment_ago_is_read_each_time_since_its_stamp_may_stay(
    folder: Path, readings: list[str]
) -> None:
    (folder / "FAST.rune").write_text(FAST)
    found = Profiles(folder)
    for _ in range(2):
        found.resolve("FAST")
    assert readings == ["FAST.rune"] * 2


# --- What is broken ----------------------------------------------------------------------------------------------


def test_a_broken_file_is_an_error_for_its_name_with_the_place_and_harms_no_other(folder: Path) -> None:
    (folder / "BROKEN.rune").write_text(BROKEN)
    (folder / "FAST.rune").write_text(FAST)
    found = Profiles(folder)
    error = refusal(found, "BROKEN")
    assert error.detail == (
        "profiles/BROKEN.rune, line 2, column 7: found 'MOON', expected 'COLD' or 'EXTENDED' or 'LOCAL'"
    )
    assert error.hint == "Mend the file; aal runes check BROKEN shows the place."
    assert found.resolve("FAST").soft_mb == 10
    assert {named.name: named.error is None for named in found.all()} == {
        "BALANCED": True, "BROKEN": False, "FAST": True, "MINIMAL": True, "PERFORMANCE": True,
    }  # fmt: skip


def test_a_broken_file_is_never_the_shipped_profile_instead(folder: Path) -> None:
    (folder / "BALANCED.rune").write_text(BROKEN)
    assert refusal(Profiles(folder), "BALANCED").line == 2
    (entry,) = (named for named in Profiles(folder).all() if named.name == "BALANCED")
    assert (entry.profile, entry.replaces_shipped) == (None, True)


@pytest.mark.parametrize(
    ("data", "line", "column", "found"),
    [
        (b"MEM[SOFT=1,\r\n\xff", 2, 1, "the byte 0xff"),
        ("MEM[ä".encode("latin-1"), 1, 5, "the byte 0xe4"),
        (b"\xef\xbb\xbfMEM[SOFT=1,HARD=2,VOL=LOW]", 1, 1, "'\\ufeff'"),
        (b" " * (profiles.MAX_BYTES + 1), 1, 1, f"more than {profiles.MAX_BYTES} bytes"),
        (b"", 1, 1, "the end of the text"),
    ],
)
def test_a_file_that_is_no_text_of_a_rune_is_told_with_the_place(
    folder: Path, data: bytes, line: int, column: int, found: str
) -> None:
    (folder / "BAD.rune").write_bytes(data)
    error = refusal(Profiles(folder), "BAD")
    assert (error.source, error.line, error.column, error.found) == ("profiles/BAD.rune", line, column, found)


@pytest.mark.usefixtures("settled", "bound_by_modes")
def test_a_file_that_cannot_be_read_is_told_and_read_once_it_can(folder: Path) -> None:
    found = Profiles(folder)
    (folder / "DIR.rune").mkdir()
    (folder / "LINK.rune").symlink_to("nowhere")
    (folder / "BALANCED.rune").symlink_to("nowhere")
    (folder / "CLOSED.rune").write_text(FAST)
    (folder / "CLOSED.rune").chmod(0)
    for name, why in (
        ("DIR", "Is a directory"),
        ("LINK", "No such file or directory"),
        ("BALANCED", "No such file or directory"),
        ("CLOSED", "Permission denied"),
    ):
        error = refusal(found, name)
        assert error.detail.startswith(
            f"profiles/{name}.rune, line 1, column 1: found a file that cannot be read ({why})"
        )
        assert not error.is_lasting
    (folder / "nowhere").write_text(FAST)
    (folder / "CLOSED.rune").chmod(0o644)
    assert [found.resolve(name).soft_mb for name in ("LINK", "BALANCED", "CLOSED")] == [10, 10, 10]


@pytest.mark.usefixtures("settled")
def test_what_fails_without_a_change_of_the_file_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "FAST.rune").write_text(FAST)
    found = Profiles(folder)

    def refuse(_path: object) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(profiles, "open_file", refuse)
        assert "Too many open files" in refusal(found, "FAST").detail
    assert found.resolve("FAST").soft_mb == 10


def test_a_folder_that_is_a_file_is_an_error_for_every_name(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("")
    found = Profiles(tmp_path / "profiles")
    assert "(Not a directory)" in refusal(found, "MINIMAL").detail
    assert found.resolve(FAST).soft_mb == 10
    with pytest.raises(NotADirectoryError):
        found.all()


def test_a_file_whose_name_nobody_can_ask_for_is_listed_as_broken(folder: Path) -> None:
    (folder / "a b.rune").write_text(FAST)
    (entry,) = (named for named in Profiles(folder).all() if named.name == "a b")
    assert entry.error is not None
    assert entry.error.expected == ("a file's name that matches [A-Za-z0-9_-]{1,64}",)


def test_a_reader_learns_which_files_its_answers_depend_on(folder: Path) -> None:
    (folder / "FAST.rune").write_text(FAST)
    asked = Asked(Profiles(folder))
    for text in ("FAST", "MINIMAL", FASTER, " FAST"):
        asked.resolve(text)
    with pytest.raises(RuneError):
        asked.resolve("LATER")
    assert {path.rpartition("/")[2]: stamp is not None for path, stamp in asked.places} == {
        "FAST.rune": True, "MINIMAL.rune": False, "LATER.rune": False,
    }  # fmt: skip
    assert Asked(Profiles()).places == []


# --- Manifests ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path, folder: Path) -> Registry:
    (tmp_path / "overlays").mkdir()
    return Registry(tmp_path / "overlays", tmp_path / "state", profiles=Profiles(folder))


def soft_mb(registry: Registry, name: str = "a", capability: str | None = None) -> int:
    return registry.resolve(name, capability).capability.memory.soft_mb


@pytest.mark.parametrize("quiet", [True, False])
def test_an_overlay_has_the_figures_of_its_profiles_file_from_the_next_call_on(
    tmp_path: Path, folder: Path, registry: Registry, request: pytest.FixtureRequest, quiet: bool
) -> None:
    if quiet:
        request.getfixturevalue("settled")
    add_overlay(tmp_path / "overlays", "a", default_profile="FAST")
    add_overlay(tmp_path / "overlays", "b", default_profile="BALANCED")
    assert registry.entry("a").status == "broken"
    (folder / "FAST.rune").write_text(FAST)
    editions = []
    for text, expected in ((FAST, 10), (FASTER, 100), (FAST + ";TIER=COLD", 10)):
        (folder / "FAST.rune").write_text(text)
        assert [soft_mb(registry) for _ in range(2)] == [expected] * 2
        editions.append(registry.resolve("a").edition)
        assert registry.resolve("a").edition == editions[-1]
    assert len(set(editions)) == 3, "processes that were started for other figures are replaced"
    assert soft_mb(registry, "b") == 2048
    (folder / "BALANCED.rune").write_text(FAST)
    assert soft_mb(registry, "b") == 10
    (folder / "BALANCED.rune").unlink()
    assert soft_mb(registry, "b") == 2048
    (folder / "FAST.rune").unlink()
    assert registry.entry("a").status == "broken"
    assert soft_mb(registry, "b") == 2048


@pytest.mark.usefixtures("settled")
def test_a_file_written_anew_with_the_same_figures_replaces_no_process(
    tmp_path: Path, folder: Path, registry: Registry
) -> None:
    (folder / "FAST.rune").write_text(FAST)
    add_overlay(tmp_path / "overlays", "a", default_profile="FAST")
    edition = registry.resolve("a").edition
    (folder / "FAST.rune").write_text(runes.tidy(FAST))
    assert registry.resolve("a").edition == edition


@pytest.mark.usefixtures("settled")
def test_an_overlay_is_read_again_only_for_files_that_it_names(
    tmp_path: Path, folder: Path, registry: Registry, readings: list[str]
) -> None:
    (folder / "FAST.rune").write_text(FAST)
    (folder / "OTHER.rune").write_text(FAST)
    memory = {"x": "FAST", "y": FASTER}
    capabilities = {name: {"runner": "proc", "memory": text} for name, text in memory.items()}
    add_native(tmp_path / "overlays", "a", capabilities)
    assert (soft_mb(registry, "a", "x"), soft_mb(registry, "a", "y")) == (10, 100)
    (folder / "OTHER.rune").write_text(FASTER)
    (folder / "MINIMAL.rune").write_text(FASTER)
    manifest = registry.resolve("a", "x").manifest
    assert registry.resolve("a", "y").manifest is manifest
    assert readings == ["FAST.rune"]


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("fats", "'fats'.*did you mean FAST"),
        ("BROKEN", r"'BROKEN'.*profiles/BROKEN\.rune, line 2, column 7: found 'MOON'"),
    ],
)
def test_a_manifest_that_names_no_sound_profile_says_which_and_others_work(
    tmp_path: Path, folder: Path, registry: Registry, memory: str, said: str
) -> None:
    (folder / "FAST.rune").write_text(FAST)
    (folder / "BROKEN.rune").write_text(BROKEN)
    add_native(tmp_path / "overlays", "a", {"run": {"runner": "proc", "memory": memory}})
    add_overlay(tmp_path / "overlays", "b", default_profile="FAST")
    error = registry.entry("a").error
    assert error is not None
    assert [fault.path for fault in error.faults] == ["$.capabilities.run.memory"]
    with pytest.raises(Exception, match=said):
        raise error
    assert soft_mb(registry, "b") == 10


@pytest.mark.usefixtures("settled")
def test_who_names_no_profile_has_the_operators_minimal_and_the_shipped_one_where_that_is_broken(
    tmp_path: Path, folder: Path, registry: Registry
) -> None:
    add_overlay(tmp_path / "overlays", "a")
    assert soft_mb(registry) == 512
    (folder / "MINIMAL.rune").write_text(FAST)
    assert soft_mb(registry) == 10
    (folder / "MINIMAL.rune").write_text(BROKEN)
    assert soft_mb(registry) == 512
    (warning,) = registry.entry("a").warnings
    assert "profiles/MINIMAL.rune, line 2, column 7: found 'MOON'" in warning
    (folder / "MINIMAL.rune").unlink()
    assert soft_mb(registry) == 512
    assert registry.entry("a").warnings == ()


async def test_the_watch_tells_of_the_overlays_whose_figures_a_file_changes(
    tmp_path: Path, folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlays, "POLL_S", 0.02)
    (folder / "FAST.rune").write_text(FAST)
    add_overlay(tmp_path / "overlays", "a", default_profile="FAST")
    add_overlay(tmp_path / "overlays", "b")
    told: asyncio.Queue[str] = asyncio.Queue()
    watch = asyncio.create_task(registry.watch(told.put_nowait))
    await asyncio.sleep(0)
    (folder / "FAST.rune").write_text(FASTER)
    async with asyncio.timeout(PATIENCE_S):
        assert await told.get() == "a"
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    assert told.empty()


# --- Calls -------------------------------------------------------------------------------------------------------


async def test_a_call_by_a_profiles_name_has_the_figures_of_the_file_as_it_is_now(settings: Settings) -> None:
    settings.profiles.mkdir()
    add_native(settings.overlays, "echo", {"run": {"runner": "proc", "memory": "OWN"}})
    (settings.profiles / "OWN.rune").write_text(FASTER)
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        for text in (FAST, FASTER):
            (settings.profiles / "FAST.rune").write_text(text)
            (settings.profiles / "OWN.rune").write_text(text)
            for request in ({"profile": "FAST"}, {}):
                assert (await bus.invoke(a_call("echo", **request))).ok
        (settings.profiles / "FAST.rune").write_text(BROKEN)
        refused = await bus.invoke(a_call("echo", profile="FAST"))
        (settings.profiles / "FAST.rune").unlink()
        gone = await bus.invoke(a_call("echo", profile="FAST"))
        assert (await bus.invoke(a_call("echo"))).ok
    told = [(line["memory"]["profile"], line["memory"]["hard_mb"]) for line in calls(settings)[:4]]
    assert told == [("FAST", 20), ("OWN", 20), ("FAST", 200), ("OWN", 200)]
    assert [job.hard_mb for job in runner.jobs] == [20, 20, 200, 200, 200]
    assert (refused.http_status, refused.body["code"]) == (422, "ERR_BAD_RUNE")
    assert refused.body["detail"].startswith("profiles/FAST.rune, line 2, column 7: found 'MOON'")
    assert str(settings.profiles) not in str(refused.body)
    assert (gone.body["code"], "'FAST'" in gone.body["detail"]) == ("ERR_BAD_RUNE", True)


@pytest.mark.usefixtures("settled")
async def test_a_call_that_names_no_profile_asks_for_none(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    add_overlay(settings.overlays, "echo")
    async with running_bus(settings, InProcessRunner()) as bus:
        assert (await bus.invoke(a_call("echo"))).ok
        monkeypatch.setattr(bus.profiles, "resolve", None)
        answer = await bus.invoke(a_call("echo"))
    assert answer.body["memory"]["profile"] == "MINIMAL"
