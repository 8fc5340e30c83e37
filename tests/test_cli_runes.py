"""`aal runes`: profiles by name, verdicts on rune text, and the canonical form."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from bus import profiles, runes, serve
from bus.console import Exit
from tests.cli_fixtures import aal, plain_environment
from tests.support import add_overlay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus.settings import Settings
    from tests.cli_fixtures import Ran

FAST = "MEM[SOFT=01,HARD=64 ,VOL=LOW];DEGRADE{STEP3:SHRINK_KV(.50)}"
TIDY = "MEM[SOFT=1,HARD=64,VOL=LOW];\nTIER=LOCAL;\nPRIORITY=5;\nDEGRADE{\n  STEP1:SHRINK_KV(0.5)\n}\n"
BROKEN = "MEM[SOFT=1,HARD=2,VOL=LOW];\r\n\tTIER=MOON;\r\nPRIORITY=1\r\n"
FAULT = "line 2, column 7: found 'MOON', expected 'COLD' or 'EXTENDED' or 'LOCAL'"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The operator's own profiles: one sound, one broken, one in place of a shipped one."""
    folder = tmp_path / "profiles"
    folder.mkdir()
    for name, text in (("FAST", FAST), ("BROKEN", BROKEN), ("MINIMAL", TIDY)):
        (folder / f"{name}.rune").write_bytes(text.encode())
    return folder


# --- list, show --------------------------------------------------------------------------------------------------


def test_the_list_has_every_profile_with_its_origin_and_figures(aal: Callable[..., Ran], folder: Path) -> None:
    listed = {one["name"]: one for one in aal("runes", "list", "--json").json["profiles"]}
    assert list(listed) == ["BALANCED", "BROKEN", "FAST", "MINIMAL", "PERFORMANCE"]
    assert listed["FAST"] == {
        "name": "FAST",
        "source": "file",
        "file": str(folder / "FAST.rune"),
        "replaces_shipped": False,
        "profile": {
            "soft_mb": 1,
            "hard_mb": 64,
            "volatility": "LOW",
            "kv": None,
            "tier": "LOCAL",
            "priority": 5,
            "steps": ["SHRINK_KV(0.5)"],
            "rune": "MEM[SOFT=1,HARD=64,VOL=LOW];TIER=LOCAL;PRIORITY=5;DEGRADE{STEP1:SHRINK_KV(0.5)}",
        },
        "error": None,
    }
    assert (listed["MINIMAL"]["replaces_shipped"], listed["MINIMAL"]["profile"]["soft_mb"]) == (True, 1)
    assert (listed["BALANCED"]["source"], listed["BALANCED"]["file"]) == ("shipped", None)
    assert listed["BALANCED"]["profile"]["kv"] == {"cap": 0.2, "policy": "WINDOW", "purge": "ON_STRESS"}
    error = listed["BROKEN"]["error"]
    assert listed["BROKEN"]["profile"] is None
    assert (error["line"], error["column"], error["found"], error["expected"]) == (
        2, 7, "'MOON'", ["'COLD'", "'EXTENDED'", "'LOCAL'"],
    )  # fmt: skip


def test_people_see_in_the_list_what_is_shipped_what_is_replaced_and_what_is_broken(
    aal: Callable[..., Ran], folder: Path
) -> None:
    ran = aal("runes", "list")
    lines = {line.split()[0]: line for line in ran.out.splitlines()}
    assert ran.code == Exit.OK
    assert " shipped " in lines["BALANCED"]
    assert f"{folder / 'MINIMAL.rune'}, in place of the shipped one" in lines["MINIMAL"]
    assert f"profiles/BROKEN.rune, {FAULT}" in lines["BROKEN"]


def test_a_setting_names_another_folder(
    aal: Callable[..., Ran], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(tmp_path / "mine")
    assert "FAST" not in aal("runes", "list").out
    monkeypatch.setenv("AAL_PROFILES", "mine")
    assert "FAST" in aal("runes", "list").out


def test_a_server_takes_the_folder_of_profiles_from_its_command_line(
    aal: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []
    monkeypatch.setattr(serve, "serve", lambda settings, _announce: given.append(settings))
    assert aal("serve", "--profiles", "/srv/profiles").code == Exit.OK
    assert [str(settings.profiles) for settings in given] == ["/srv/profiles"]


@pytest.mark.usefixtures("folder")
def test_one_profile_is_shown_with_its_figures_or_as_the_text_that_makes_it(aal: Callable[..., Ran]) -> None:
    shown = aal("runes", "show", "FAST").out
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith(("soft", "hard", "degrade"))] == [
        "1", "64", "SHRINK_KV(0.5)",
    ]  # fmt: skip
    assert aal("runes", "show", "FAST", "--rune").out == TIDY
    assert aal("runes", "show", "FAST", "--json").json["profile"]["hard_mb"] == 64


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "said"), [("BROKEN", FAULT), ("FSAT", "did you mean FAST?"), ("a b", "'a b'")])
def test_a_profile_that_is_broken_or_not_there_cannot_be_shown(aal: Callable[..., Ran], name: str, said: str) -> None:
    ran = aal("runes", "show", name)
    assert (ran.code, ran.out, said in ran.err) == (Exit.FAILED, "", True)
    assert aal("runes", "show", name, "--json").out == ""


def test_a_folder_of_profiles_that_is_none_is_told(aal: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("")
    ran = aal("runes", "list")
    assert (ran.code, "Not a directory" in ran.err) == (Exit.FAILED, True)


# --- check -------------------------------------------------------------------------------------------------------


def test_check_takes_texts_files_names_and_stdin(aal: Callable[..., Ran], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(FAST)
    given = ["MEM[SOFT=1,HARD=2,VOL=LOW]", str(tmp_path / "text"), "FAST", "BALANCED", "-"]
    ran = aal("runes", "check", *given, "--json", stdin=TIDY)
    assert ran.code == Exit.OK
    assert [(one["name"], one["ok"], one["error"]) for one in ran.json["runes"]] == [
        (name, True, None) for name in [*given[:2], str(folder / "FAST.rune"), *given[3:]]
    ]
    assert [one["profile"]["hard_mb"] for one in ran.json["runes"]] == [2, 64, 64, 4096, 64]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["MEM[SOFT=1"], "rune, line 1, column 11: found the end of the text, expected ',' or ']'"),
        (["no/such.rune"], "no/such.rune: No such file or directory"),
        (["FSAT"], "did you mean FAST?"),
        (["-"], f"stdin, {FAULT}"),
        (["BROKEN"], f"BROKEN.rune, {FAULT}"),
        (["MEM[\udcff"], "rune, line 1, column 5"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_check_names_each_that_is_faulty_and_still_looks_at_the_others(
    aal: Callable[..., Ran], given: list[str], said: str
) -> None:
    ran = aal("runes", "check", *given, "FAST", stdin=BROKEN)
    assert (ran.code, said in ran.out, ran.err) == (Exit.FAILED, True, "")
    assert ran.out.splitlines()[-1].startswith("ok ")
    verdicts = aal("runes", "check", *given, "FAST", "--json", stdin=BROKEN).json["runes"]
    assert [verdict["ok"] for verdict in verdicts] == [False, True]
    assert said in verdicts[0]["error"]["detail"]


def test_without_an_argument_check_looks_at_every_profile_of_the_operator(
    aal: Callable[..., Ran], folder: Path
) -> None:
    (folder / "a b.rune").write_text(FAST)
    (folder / "LINK.rune").symlink_to("nowhere")
    ran = aal("runes", "check")
    marks = {line.split("/")[-1]: line.split()[0] for line in ran.out.splitlines() if line.startswith(("ok", "fail"))}
    assert marks == {
        "BROKEN.rune": "fail", "FAST.rune": "ok", "LINK.rune": "fail", "MINIMAL.rune": "ok", "a b.rune": "fail",
    }  # fmt: skip
    assert ran.code == Exit.FAILED
    assert "expected a file's name that matches" in ran.out


def test_with_no_profile_of_the_operators_own_check_says_so(aal: Callable[..., Ran]) -> None:
    ran = aal("runes", "check")
    assert (ran.code, "no profiles of your own" in ran.out) == (Exit.OK, True)
    assert aal("runes", "check", "--json").json == {"runes": []}


# --- fmt ---------------------------------------------------------------------------------------------------------


def test_fmt_prints_the_canonical_form_of_files_and_of_stdin(aal: Callable[..., Ran], folder: Path) -> None:
    assert aal("runes", "fmt", stdin=FAST).out == TIDY
    assert aal("runes", "fmt", "-", stdin=FAST.replace(";", "\r\n;\r\n")).out == TIDY
    assert aal("runes", "fmt", str(folder / "FAST.rune"), str(folder / "MINIMAL.rune")).out == TIDY * 2
    assert (folder / "FAST.rune").read_text() == FAST
    assert aal("runes", "fmt", stdin=TIDY).out == TIDY


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (BROKEN, ["stdin, " + FAULT, "   TIER=MOON;", "        ^"]),
        ("MEM[SOFT=1,\n  HARD=2\n", ["stdin, line 2, column 9: found the end of the text, expected ',' or ']'",
                                     "    HARD=2", "          ^"]),
        ("\u4e00\0 MEM[", ["stdin, line 1, column 1: found '\u4e00', expected 'DEGRADE' or 'KV' or 'MEM'",
                           "  \u4e00\\x00 MEM[", "  ^"]),
        (f"MEM[SOFT=1,HARD=2,VOL=LOW];{' ' * 200}TIER=MOON", ["stdin, line 1, column 233", f"  …{' ' * 55}TIER=MOON",
                                                               f"  {' ' * 61}^"]),
    ],
)  # fmt: skip
def test_fmt_shows_the_line_of_an_error_with_a_caret_below_the_place(
    aal: Callable[..., Ran], text: str, shown: list[str]
) -> None:
    ran = aal("runes", "fmt", stdin=text.encode())
    told = ran.err.splitlines()
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert told[0].startswith(f"ERR_BAD_RUNE: {shown[0]}")
    assert told[1:] == shown[1:]


def test_fmt_tells_the_place_of_a_byte_that_is_no_text(aal: Callable[..., Ran]) -> None:
    ran = aal("runes", "fmt", stdin=b"MEM[\n\xff")
    assert ran.err == "ERR_BAD_RUNE: stdin, line 2, column 1: found the byte 0xff, expected UTF-8\n"


def test_fmt_formats_the_sound_ones_beside_a_faulty_one(aal: Callable[..., Ran], folder: Path) -> None:
    files = [str(folder / f"{name}.rune") for name in ("BROKEN", "FAST", "NOWHERE")]
    ran = aal("runes", "fmt", *files)
    assert (ran.code, ran.out) == (Exit.FAILED, TIDY)
    assert f"{files[0]}, {FAULT}" in ran.err
    assert f"ERR_FILES: {files[2]}: No such file or directory" in ran.err


def test_fmt_check_names_the_files_that_would_change_and_changes_none(aal: Callable[..., Ran], folder: Path) -> None:
    fast, tidy = str(folder / "FAST.rune"), str(folder / "MINIMAL.rune")
    ran = aal("runes", "fmt", "--check", fast, tidy)
    assert (ran.code, ran.out, ran.err) == (Exit.FAILED, f"would change {fast}\n", "")
    assert (folder / "FAST.rune").read_text() == FAST
    ran = aal("runes", "fmt", "--check", tidy)
    assert (ran.code, ran.out, ran.err) == (Exit.OK, "", "")
    crlf = folder / "CRLF.rune"
    crlf.write_bytes(TIDY.replace("\n", "\r\n").encode())
    assert aal("runes", "fmt", "--check", str(crlf)).code == Exit.FAILED


def test_fmt_write_changes_what_is_not_canonical_and_keeps_mode_and_link(
    aal: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    (folder / "FAST.rune").chmod(0o640)
    (tmp_path / "link").symlink_to(folder / "FAST.rune")
    before = (folder / "MINIMAL.rune").stat().st_ino
    files = [str(tmp_path / "link"), str(folder / "MINIMAL.rune"), str(folder / "BROKEN.rune")]
    ran = aal("runes", "fmt", "--write", *files)
    assert (ran.code, ran.out) == (Exit.FAILED, f"wrote {files[0]}\n")
    assert ((folder / "FAST.rune").read_text(), (tmp_path / "link").is_symlink()) == (TIDY, True)
    assert (folder / "FAST.rune").stat().st_mode & 0o777 == 0o640
    assert (folder / "MINIMAL.rune").stat().st_ino == before
    assert (folder / "BROKEN.rune").read_bytes() == BROKEN.encode()
    assert aal("runes", "fmt", "--check", *files[:2]).code == Exit.OK
    assert {file.name for file in folder.iterdir()} == {"FAST.rune", "BROKEN.rune", "MINIMAL.rune"}


@pytest.mark.usefixtures("bound_by_modes")
def test_fmt_says_which_file_it_cannot_write(aal: Callable[..., Ran], folder: Path) -> None:
    folder.chmod(0o500)
    ran = aal("runes", "fmt", "--write", str(folder / "FAST.rune"))
    folder.chmod(0o700)
    assert (ran.code, f"ERR_FILES: {folder / 'FAST.rune'}: Permission denied" in ran.err) == (Exit.FAILED, True)
    assert (folder / "FAST.rune").read_text() == FAST


def test_fmt_says_for_programs_what_changed_and_what_is_wrong(aal: Callable[..., Ran], folder: Path) -> None:
    ran = aal("runes", "fmt", "--json", str(folder / "FAST.rune"), str(folder / "BROKEN.rune"))
    fast, broken = ran.json["runes"]
    assert (ran.code, ran.err) == (Exit.FAILED, "")
    assert (fast["ok"], fast["changed"], fast["text"], fast["error"]) == (True, True, TIDY, None)
    assert (broken["ok"], broken["changed"], broken["text"], broken["error"]["line"]) == (False, False, None, 2)


@pytest.mark.parametrize("arguments", [["--write"], ["--write", "-"], ["--write", "--check", "FILE"]])
def test_fmt_refuses_what_cannot_be_written(aal: Callable[..., Ran], arguments: list[str]) -> None:
    assert aal("runes", "fmt", *arguments, stdin=FAST).code == Exit.USAGE


def test_fmt_reads_no_more_than_a_rune_can_have(aal: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * (profiles.MAX_BYTES + 1))
    (tmp_path / "long").write_bytes(b" " * (runes.MAX_CHARS + 1))
    os.mkfifo(tmp_path / "fifo")
    ran = aal("runes", "fmt", *(str(tmp_path / name) for name in ("large", "long", "fifo")))
    said = [line for line in ran.err.splitlines() if line.startswith("ERR_")]
    assert ["more than 16384 bytes" in said[0], "4097 characters" in said[1], "no file" in said[2]] == [True] * 3


# --- Manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_overlays_check_tells_of_a_profile_that_is_not_there_with_the_names_that_come_near(
    aal: Callable[..., Ran], tmp_path: Path
) -> None:
    add_overlay(tmp_path / "overlays", "bad", default_profile="FATS")
    add_overlay(tmp_path / "overlays", "good", default_profile="FAST")
    ran = aal("overlays", "check")
    assert (ran.code, "$.default_profile: found 'FATS'" in ran.out, "did you mean FAST?" in ran.out) == (1, True, True)
    assert aal("overlays", "check", "good").code == Exit.OK
    assert "FAST: 1 to 64 MiB" in aal("overlays", "show", "good").out
