"""The command `aal`: in process where it can be, as a process where signals, sockets and streams matter."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import typer.main

from bus import cli, cli_replay, doctor, provenance, templates, verification
from bus.canonical import canonical
from bus.console import Exit, printable
from bus.records import parse_or_none
from bus.settings import explain, load, table
from tests import programs
from tests.cli_fixtures import aal, plain_environment
from tests.support import PATIENCE_S, REPO, add_overlay, add_script, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cli_fixtures import Ran

FIXED = """echo '{"ok": true, "result": {"answer": 42}}'"""
LEDGER = "logs/provenance.jsonl"


@pytest.fixture(autouse=True)
def _settings_of_tests(plain_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", "1")
    monkeypatch.setenv("AAL_KILL_GRACE_S", "0.2")


@pytest.fixture
def overlays(tmp_path: Path) -> Path:
    """A folder with `echo`, which answers with its envelope, and `fixed`, whose answer never changes."""
    root = tmp_path / "overlays"
    add_overlay(root)
    add_script(root, "fixed", FIXED, policy={"deterministic": True})
    return root


# --- The command itself ------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its whole name, those in groups of groups too."""
    groups: list[tuple[str, Any]] = [("", typer.main.get_command(cli.app))]
    for before, group in groups:  # grows while it is walked
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                groups.append((f"{before}{name} ", command))
            else:
                yield f"{before}{name}", command


@pytest.mark.parametrize(("name", "command"), [*commands()], ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_explains_itself_with_an_example(name: str, command: Any) -> None:
    assert f"aal {name}" in command.help.partition("Example: ")[2]


@pytest.mark.parametrize(("name", "command"), [*commands()], ids=lambda value: value if isinstance(value, str) else "")
def test_help_names_no_types_of_python_and_cuts_nothing_short(aal: Callable[..., Ran], name: str, command: Any) -> None:
    told = aal(*name.split(), "--help").out + aal(*name.split()[:-1], "--help").out
    assert not re.search(r"<\w|range>|list\[|[^]]\.\.\.$", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("invoke echo --phase NOPE", "'NOPE' is not one of OPEN, ALIGN, ASCEND, CLEAR, SEAL"),
        ("overlays new x --runner ftp", "'ftp' is not one of proc, worker, http, service"),
        ("invoke echo --timeout-ms x", "'x' is not a whole number of 1 or more"),
        ("serve --port 65536", "'65536' is not a whole number from 0 to 65535"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(aal: Callable[..., Ran], arguments: str, why: str) -> None:
    ran = aal(*arguments.split())
    assert (ran.code, why in ran.err) == (Exit.USAGE, True)
    assert not re.search("Value error|Input should", ran.err)


def test_help_stays_quick_since_nothing_heavy_is_imported_for_it() -> None:
    heavy = {"aiohttp", "starlette", "uvicorn", "uvloop", "jsonschema", "lark", "watchfiles", "prometheus_client"}
    program = f"import sys, bus.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=REPO, text=True).strip() == "[]"


def test_version_names_the_distribution(aal: Callable[..., Ran]) -> None:
    assert aal("--version").out.startswith("aal-core ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["invoke"],
        ["invoke", "echo", "--phase", "SHUT"],
        ["invoke", "echo", "a"],
        ["invoke", "echo", "=a"],
        ["invoke", "echo", "a=@/no/such/file"],
        ["invoke", "echo", "--data", "{"],
        ["invoke", "echo", "--data", "[]"],
        ["invoke", "echo", "--timeout-ms", "0"],
        ["invoke", "\udcff"],
        ["invoke", "echo.\udcff"],
        ["invoke", "echo", "--seed", "1" * 5000],
        ["invoke", "echo", "--seed=-" + "1" * 5000],
        ["invoke", "echo", "--timeout-ms", "1" * 5000],
        ["invoke", "echo", "--data", '{"n": ' + "1" * 5000 + "}"],
        ["replay"],
        ["replay", "0"],
        ["replay", "1" * 5000],
        ["replay", "1-" + "1" * 5000],
        ["replay", "\u0663"],
        ["provenance", "show", "1" * 5000],
        ["replay", "9-3"],
        ["replay", "1-"],
        ["replay", "1", "--all"],
        ["replay", "--last", "0"],
        ["provenance", "tail", "-n", "0"],
        ["provenance", "tail", "--since", "yesterday"],
        ["provenance", "tail", "--phase", "DOOR"],
        ["overlays", "new", "Not A Name"],
        ["serve", "--port", "65536"],
        ["serve", "--log-level", "loud"],
        ["serve", "--host", "0.0.0.0"],
        ["-C", "/no/such/folder", "config"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_wrong_usage_exits_with_2_and_says_why(aal: Callable[..., Ran], overlays: Path, arguments: list[str]) -> None:
    ran = aal(*arguments)
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert ran.err
    assert not overlays.with_name("logs").exists() or not provenance.tail(overlays.parent / LEDGER, 1)


@pytest.mark.parametrize(
    "arguments",
    [["--profile", ""], ["--seed", "1" * 20], ["--timeout-ms", "1" * 400], ["n=" + "1" * 20], ["--seed", "x" * 300]],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_a_call_that_is_no_request_exits_with_2_and_leaves_its_line(
    aal: Callable[..., Ran], overlays: Path, tmp_path: Path, arguments: list[str]
) -> None:
    ran = aal("invoke", "echo", *arguments)
    assert (ran.code, ran.err.startswith("ERR_BAD_")) == (Exit.USAGE, True)
    assert re.fullmatch(r"echo ERR_BAD_\w+ [0-9.]+ ms, line 1 \w+\n", ran.out)
    assert provenance.read_line(tmp_path / LEDGER, 1)["ok"] is False


def run_in_shell(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = ["sh", "-c", script.replace("AAL", f"{sys.executable} -m bus.cli")]
    env = {**os.environ, "PYTHONPATH": str(REPO), **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=PATIENCE_S, check=False)


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    ran = run_in_shell('rmdir "$PWD"; AAL config', tmp_path / "gone")
    assert (ran.returncode, b"has been removed" in ran.stderr) == (Exit.USAGE, True)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(overlays: Path, tmp_path: Path, closed: str) -> None:
    ran = run_in_shell(f"AAL invoke fixed {closed}", tmp_path)
    assert (ran.returncode, ran.stderr) == (Exit.OK, b"")
    assert verification.verify(tmp_path / LEDGER).ok


def test_output_is_utf_8_whatever_the_locale(overlays: Path, tmp_path: Path) -> None:
    ran = run_in_shell("AAL invoke echo a=\u20ac --json", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (ran.returncode, ran.stderr) == (Exit.OK, b"")
    assert "\u20ac" in json.loads(ran.stdout)["result"]["payload"].values()


def test_a_bad_setting_stops_every_command_with_2(aal: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAL_SLOTS", "many")
    monkeypatch.setenv("AAL_PROT", "1")
    ran = aal("overlays", "list")
    assert ran.code == Exit.USAGE
    assert "slots: found 'many'" in ran.err
    assert "AAL_PORT" in ran.err


def test_an_error_for_people_has_code_detail_and_hint(aal: Callable[..., Ran], overlays: Path) -> None:
    ran = aal("overlays", "show", "ecco")
    assert ran.code == Exit.FAILED
    first, second = ran.err.splitlines()
    assert first == "ERR_UNKNOWN_OVERLAY: no overlay 'ecco'; did you mean echo?"
    assert second.startswith("hint: ")


def test_an_error_for_programs_is_the_body_that_http_answers(aal: Callable[..., Ran], overlays: Path) -> None:
    ran = aal("overlays", "show", "ecco", "--json")
    body = json.loads(ran.err)
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert (body["ok"], body["code"], body["category"]) == (False, "ERR_UNKNOWN_OVERLAY", "VALIDATION")


def test_control_characters_reach_a_terminal_only_spelled_out() -> None:
    assert printable("a\x1b[31m\x07\u202e\ud800 ü\n") == "a\\x1b[31m\\x07\\u202e\\ud800 ü\n"


def test_files_that_cannot_be_read_are_an_error_without_a_traceback(aal: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / LEDGER).mkdir(parents=True)
    for command in (["provenance", "verify"], ["provenance", "tail"], ["replay", "--all"]):
        ran = aal(*command)
        assert (ran.code, ran.err.startswith("ERR_FILES: ")) == (Exit.FAILED, True)


# --- aal invoke --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("a=text", "text"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a=12", 12),
        ("a=1.5", 1.5),
        ("a=true", True),
        ("a=null", None),
        ('a="12"', "12"),
        ('a={"b": [1]}', {"b": [1]}),
        ("a={b}", "{b}"),
        ("a=NaN", "NaN"),
        ("a=zwei Wörter", "zwei Wörter"),
    ],
)
def test_a_value_is_json_where_it_is_json_and_text_where_not(
    aal: Callable[..., Ran], overlays: Path, argument: str, value: object
) -> None:
    ran = aal("invoke", "echo", argument, "--json")
    assert ran.code == Exit.OK
    assert ran.json["result"]["payload"] == {"a": value}


def test_data_comes_from_an_argument_a_file_or_stdin_and_members_win(
    aal: Callable[..., Ran], overlays: Path, tmp_path: Path
) -> None:
    file = tmp_path / "data.json"
    file.write_text('{"a": 1, "b": 2}')

    def payload(*arguments: str, **options: str) -> object:
        return aal("invoke", "echo", *arguments, "--json", **options).json["result"]["payload"]

    assert payload("--data", '{"a": 1}', "c=3") == {"a": 1, "c": 3}
    assert payload("--data", f"@{file}", "b=x") == {"a": 1, "b": "x"}
    assert payload("--data", "-", stdin='{"a": "ü"}') == {"a": "ü"}
    assert payload(f"text=@{file}") == {"text": '{"a": 1, "b": 2}'}


@pytest.mark.parametrize(
    ("given", "seed"), [("7", 7), ("-5", -5), ("--5", "--5"), ("-", "-"), ("\u0663", "\u0663"), ("5-", "5-"), ("", "")]
)
def test_a_seed_is_a_whole_number_where_it_is_one_and_text_where_not(
    aal: Callable[..., Ran], overlays: Path, given: str, seed: str | int
) -> None:
    assert aal("invoke", "echo", f"--seed={given}", "--json").json["result"]["seed"] == seed


def test_options_reach_the_call(aal: Callable[..., Ran], overlays: Path) -> None:
    options = ["--phase", "clear", "--profile", "BALANCED", "--seed", "7", "--timeout-ms", "5000"]
    body = aal("invoke", "echo.run", *options, "--json").json
    assert (body["phase"], body["capability"]) == ("CLEAR", "run")
    assert (body["result"]["seed"], body["result"]["memory"]["profile"]) == (7, "BALANCED")
    assert body["result"]["deadline_ms"] - body["timestamp_ms"] <= 5000


def test_people_see_the_result_and_a_line_on_how_it_went(aal: Callable[..., Ran], overlays: Path) -> None:
    ran = aal("invoke", "fixed")
    result, _, line = ran.out.rstrip("\n").rpartition("\n")
    assert json.loads(result) == {"answer": 42}
    assert line.startswith("fixed.run OPEN OK ")
    assert ", line 1 " in line
    assert "\x1b" not in ran.out


def test_record_prints_the_line_too_with_long_texts_cut_for_people(
    aal: Callable[..., Ran], overlays: Path, tmp_path: Path
) -> None:
    told = aal("invoke", "fixed", "text=Grüße" + "x" * 500, "--json", "--record").json
    assert (told["outcome"]["result"], told["outcome"]["provenance"]["seq"]) == ({"answer": 42}, 1)
    assert canonical(told["record"]).decode() == (tmp_path / LEDGER).read_text().splitlines()[0]
    shown = aal("invoke", "fixed", "text=Grüße" + "x" * 500, "--record").out
    assert f"Grüße{'x' * 195}… 505 characters" in shown
    assert '"payload_hash": ' in shown
    assert aal("invoke", "no.body", "--json", "--record").json["record"]["code"] == "ERR_UNKNOWN_OVERLAY"


def test_a_member_that_is_said_twice_is_refused_and_one_over_data_is_not(
    aal: Callable[..., Ran], overlays: Path
) -> None:
    ran = aal("invoke", "echo", "a=1", "a=2")
    assert (ran.code, "'a' is said twice" in ran.err) == (Exit.USAGE, True)
    assert aal("invoke", "echo", "a=1", "--data", '{"a": 2}').code == Exit.OK


def test_a_failed_call_shows_what_the_program_said(aal: Callable[..., Ran], overlays: Path) -> None:
    add_script(overlays, "crashes", "echo 'no \x1b tea' >&2; exit 3")
    ran = aal("invoke", "crashes")
    first, second, third = ran.err.splitlines()
    assert first.startswith("ERR_OVERLAY_CRASH: ")
    assert (second, third.startswith("hint: ")) == ("  no \\x1b tea", True)


def test_a_call_where_there_are_no_overlays_tells_where_they_could_be(aal: Callable[..., Ran], tmp_path: Path) -> None:
    ran = aal("invoke", "echo")
    assert (ran.code, "aal init" in ran.err, "AAL_OVERLAYS" in ran.err) == (Exit.FAILED, True, True)
    add_overlay(tmp_path / ".aal/overlays")
    assert "set AAL_OVERLAYS=.aal/overlays, or" in aal("invoke", "echo").err
    add_overlay(tmp_path / "overlays", "other")
    assert "AAL_OVERLAYS" not in aal("invoke", "echo").err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("in_background", [False, True], ids=["in front", "in the background"])
def test_a_call_ended_by_a_signal_leaves_its_line_and_no_process(
    overlays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, in_background: bool
) -> None:
    monkeypatch.setenv("AAL_SANDBOX", "off")  # it writes beside its folder
    add_script(overlays, "slow", "echo $$ > ../slow.pid.new; mv ../slow.pid.new ../slow.pid; sleep 600")
    command = [sys.executable, "-m", "bus.cli", "-C", str(tmp_path), "invoke", "slow"]
    if in_background:  # as a shell starts it
        command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    with process(command) as running:
        eventually((overlays / "slow.pid").exists, "the program runs")
        running.send_signal(number)
        _, errors = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, errors) == (128 + signal.SIGINT, "")
    assert not programs.running(str(tmp_path))
    assert [line["code"] for line in provenance.tail(tmp_path / LEDGER, 1, overlay="slow")] == ["ERR_CANCELLED"]


def test_a_hangup_that_is_ignored_stays_ignored(
    overlays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AAL_SANDBOX", "off")  # it writes beside its folder
    add_script(overlays, "waits", "echo > ../waits.new; until [ -e ../go ]; do sleep 0.01; done; echo 7")
    command = [sys.executable, "-m", "bus.cli", "-C", str(tmp_path), "invoke", "waits", "--json"]
    with process(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command]) as running:
        eventually((overlays / "waits.new").exists, "the program runs")
        running.send_signal(signal.SIGHUP)
        (overlays / "go").touch()
        out, _ = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, json.loads(out)["result"]) == (Exit.OK, 7)


def test_a_failed_call_exits_with_1_and_tells_why_on_stderr(aal: Callable[..., Ran], overlays: Path) -> None:
    add_script(overlays, "fails", """printf '{"ok": false, "error": "no \\\\u001b[31m tea", "code": "ERR_TEA"}'""")
    ran = aal("invoke", "fails")
    assert ran.code == Exit.FAILED
    assert "ERR_TEA: no \\x1b[31m tea" in ran.err
    assert ran.out.startswith("fails.run OPEN ERR_TEA ")


def test_a_call_of_no_overlay_fails_and_leaves_its_line(aal: Callable[..., Ran], tmp_path: Path) -> None:
    ran = aal("invoke", "nobody", "--json")
    assert (ran.code, ran.json["code"]) == (Exit.FAILED, "ERR_UNKNOWN_OVERLAY")
    assert provenance.read_line(tmp_path / LEDGER, 1)["overlay"] == "nobody"


# --- aal overlays ------------------------------------------------------------------------------------------------


def test_list_shows_broken_and_disabled_overlays_too(aal: Callable[..., Ran], overlays: Path) -> None:
    (overlays / "half").mkdir()
    assert aal("overlays", "disable", "fixed").code == Exit.OK
    listed = {overlay["name"]: overlay["status"] for overlay in aal("overlays", "list", "--json").json["overlays"]}
    assert listed == {"echo": "active", "fixed": "disabled", "half": "broken"}
    rows = aal("overlays", "list").out.splitlines()
    assert [row.split()[0] for row in rows] == ["name", "echo", "fixed", "half"]
    assert "manifest.json" in rows[3]


def test_show_has_everything_about_each_capability(aal: Callable[..., Ran], overlays: Path) -> None:
    shown = aal("overlays", "show", "fixed", "--json").json
    assert shown["details"]["run"]["argv"] == ["sh", "run.sh"]
    told = aal("overlays", "show", "fixed").out
    assert re.search(r"^name +fixed$", told, re.MULTILINE)
    assert re.search(r"^command +sh run.sh$", told, re.MULTILINE)
    assert shown["scratch"] == {"LOCAL": {"place": "memory", "mb": 256}}
    assert re.search(r"^scratch +LOCAL: memory, 256 MiB a call$", told, re.MULTILINE)
    assert not re.search(r"^\w+$", told, re.MULTILINE)


def test_check_prints_every_fault_and_warning(aal: Callable[..., Ran], overlays: Path, tmp_path: Path) -> None:
    assert aal("overlays", "check", "echo", "fixed").code == Exit.OK
    add_overlay(overlays, "odd", colour="red")
    bad = add_overlay(tmp_path / "elsewhere", "bad", phases=["SHUT"], timeout_ms=-1)
    assert aal("overlays", "check", "odd").code == Exit.OK
    assert "warning  $.colour" in aal("overlays", "check", "odd").out
    ran = aal("overlays", "check", "echo", str(bad))
    assert ran.code == Exit.FAILED
    assert ran.out.splitlines()[:2] == ["ok echo", "fail bad"]
    assert "$.phases[0]" in ran.out
    assert "$.timeout_ms" in ran.out
    verdict = aal("overlays", "check", str(bad), "--json").json["overlays"][0]
    assert (verdict["ok"], len(verdict["faults"])) == (False, 2)


def test_only_what_could_be_added_again_is_offered_back(aal: Callable[..., Ran], overlays: Path) -> None:
    (overlays / "half").mkdir()
    ran = aal("overlays", "remove", "half")
    assert (ran.code, "it lies in" in ran.out, "overlays add" in ran.out) == (Exit.OK, True, False)


def test_check_shows_the_warnings_beside_the_faults(aal: Callable[..., Ran], overlays: Path) -> None:
    add_overlay(overlays, "odd", phases=["SHUT"], colour="red")
    told = aal("overlays", "check", "odd").out
    assert "  fault    $.phases[0]" in told
    assert "  warning  $.colour" in told


def test_check_goes_on_after_a_name_of_nothing(aal: Callable[..., Ran], overlays: Path) -> None:
    ran = aal("overlays", "check", "ecco", "/no/where", "echo")
    assert ran.code == Exit.FAILED
    heads = [line for line in ran.out.splitlines() if not line.startswith(" ")]
    assert heads == ["fail ecco", "fail /no/where", "ok echo"]
    assert "did you mean echo?" in ran.out
    assert [found["ok"] for found in aal("overlays", "check", "ecco", "echo", "--json").json["overlays"]] == [
        False,
        True,
    ]


@pytest.mark.parametrize("name", ["minA", "\udcff", "a b"])
def test_a_folder_whose_name_no_overlay_can_have_is_checked_shown_and_removed(
    aal: Callable[..., Ran], tmp_path: Path, name: str
) -> None:
    add_overlay(tmp_path / "drafts", "fine").rename(tmp_path / "drafts" / name)
    (tmp_path / "drafts").rename(tmp_path / "overlays")
    shown = aal("overlays", "list", "--json").json["overlays"][0]["name"]
    for given in {name, shown, printable(name)}:
        ran = aal("overlays", "check", given)
        assert (ran.code, ran.out.startswith("fail "), "did you mean" in ran.out) == (Exit.FAILED, True, False)
        assert aal("overlays", "show", given).code == Exit.OK
    moved = Path(aal("overlays", "remove", shown, "--json").json["path"])
    assert list((tmp_path / "overlays").iterdir()) == []
    assert (moved / "manifest.json").is_file()


def test_check_refuses_a_folder_that_no_overlay_can_have(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_overlay(tmp_path, "UPPER")
    ran = aal("overlays", "check", f"{tmp_path}/UPPER")
    assert (ran.code, "'UPPER'" in ran.out) == (Exit.FAILED, True)
    assert "there is no folder" in aal("overlays", "check", f"{tmp_path}/none").out
    assert "no overlay 'none'" in aal("overlays", "check", "none").out


def test_disable_enable_and_remove_persist(aal: Callable[..., Ran], overlays: Path, tmp_path: Path) -> None:
    aal("overlays", "disable", "fixed")
    assert aal("invoke", "fixed", "--json").json["code"] == "ERR_OVERLAY_DISABLED"
    aal("overlays", "enable", "fixed")
    assert aal("invoke", "fixed").code == Exit.OK
    ran = aal("overlays", "remove", "fixed")
    assert ran.code == Exit.OK
    assert not (overlays / "fixed").exists()
    back = shlex.split(ran.out.partition("bring it back:")[2])
    assert aal(*back[1:]).code == Exit.OK
    assert aal("invoke", "fixed").code == Exit.OK
    assert list((tmp_path / ".aal/removed").glob("*/fixed/manifest.json"))


def test_add_copies_a_sound_overlay_in_and_refuses_another(
    aal: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = add_script(tmp_path / "elsewhere", "fixed", FIXED)
    monkeypatch.chdir(source)
    assert aal("overlays", "add", ".").code == Exit.OK
    assert aal("invoke", "fixed").code == Exit.OK
    assert "ERR_EXISTS" in aal("overlays", "add", str(source)).err
    (source / "manifest.json").write_text("{")
    assert "ERR_OVERLAY_BROKEN" in aal("overlays", "add", str(source)).err


def test_what_changes_overlays_tells_programs_so(aal: Callable[..., Ran], tmp_path: Path) -> None:
    made = aal("overlays", "new", "counter", "--json").json
    assert (made["name"], made["path"], made["status"]) == ("counter", f"{tmp_path}/overlays/counter", "active")
    assert aal("overlays", "disable", "counter", "--json").json == {"name": "counter", "enabled": False}
    assert aal("overlays", "enable", "counter", "--json").json == {"name": "counter", "enabled": True}
    moved = aal("overlays", "remove", "counter", "--json").json["path"]
    assert aal("overlays", "add", moved, "--json").json["path"] == made["path"]
    assert aal("init", f"{tmp_path}/new", "--json").json == {
        "folder": f"{tmp_path}/new",
        "overlays": ["abraxas"],
        "files": ["aal.toml", ".gitignore"],
    }


def test_add_of_no_folder_says_so(aal: Callable[..., Ran]) -> None:
    ran = aal("overlays", "add", "/no/where")
    assert (ran.code, ran.err.splitlines()[0]) == (Exit.FAILED, "ERR_FILES: there is no folder /no/where")
    assert "check NAME" not in ran.err


def test_new_services_have_ports_of_their_own(aal: Callable[..., Ran]) -> None:
    for name in ("one", "two"):
        aal("overlays", "new", name, "--runner", "http")
    urls = [aal("overlays", "show", name, "--json").json["details"]["count"]["url"] for name in ("one", "two")]
    assert urls == ["http://127.0.0.1:8101/count", "http://127.0.0.1:8102/count"]


def test_new_prints_a_command_that_runs_its_test(
    aal: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = aal("overlays", "new", "my-tool").out
    command = shlex.split(told.partition("its test:")[2].splitlines()[0])
    assert command == ["python3", "overlays/my-tool/tests/test_my_tool.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_new_overlays_pass_the_tests_that_they_come_with(aal: Callable[..., Ran], tmp_path: Path) -> None:
    names = {"my-9-tool": "proc", "0service": "http"}
    for name, runner in names.items():
        assert aal("overlays", "new", name, "--runner", runner).code == Exit.OK
    assert aal("overlays", "check").out.splitlines() == ["ok 0service", "ok my-9-tool"]
    folders = [str(tmp_path / "overlays" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *folders]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ran.returncode, "4 passed" in ran.stdout) == (0, True), ran.stdout
    alone = [sys.executable, "tests/test_my_9_tool.py"]
    assert subprocess.run(alone, cwd=folders[0], capture_output=True, check=False).returncode == 0


def test_a_new_program_is_callable_through_the_bus(aal: Callable[..., Ran]) -> None:
    aal("overlays", "new", "counter")
    assert aal("invoke", "counter", "text=two words", "--json").json["result"] == {"words": 2, "characters": 9}
    assert aal("invoke", "counter.count", "text=2", "--json").json["code"] == "ERR_INPUT_SCHEMA"
    assert "ERR_EXISTS" in aal("overlays", "new", "counter").err


def test_a_new_service_is_callable_through_the_bus(aal: Callable[..., Ran], tmp_path: Path) -> None:
    port = free_port()
    aal("overlays", "new", "counter", "--runner", "http", "--port", str(port))
    command = [sys.executable, str(tmp_path / "overlays/counter/service.py")]
    with process(command) as service:
        assert first_line(service) == f"counter listens on http://127.0.0.1:{port}"
        assert aal("invoke", "counter", "text=two words", "--json").json["result"] == {"words": 2, "characters": 9}


@pytest.mark.parametrize("kind", ["worker", "service"])
def test_a_new_overlay_that_the_bus_keeps_running_answers_at_once(aal: Callable[..., Ran], kind: str) -> None:
    assert aal("overlays", "new", "counter", "--runner", kind).code == Exit.OK
    assert aal("invoke", "counter", "text=two words", "--json").json["result"] == {"words": 2, "characters": 9}


@pytest.mark.parametrize("kind", get_args(templates.Kind))
def test_a_new_overlays_own_codes_look_like_none_of_the_bus(kind: templates.Kind) -> None:
    programs = "".join(templates.overlay_files("mine", kind, 8101).values())
    codes = re.findall(r'"code": "(\w+)"', programs)
    assert codes
    assert all(re.fullmatch("[A-Z][A-Z0-9_]{0,63}", code) and not code.startswith("ERR_") for code in codes)


def test_new_writes_elsewhere_if_told(aal: Callable[..., Ran], tmp_path: Path) -> None:
    assert aal("overlays", "new", "counter", "--dir", str(tmp_path / "drafts")).code == Exit.OK
    assert (tmp_path / "drafts/counter/src/run.py").exists()
    assert not (tmp_path / "overlays").exists()


@pytest.mark.parametrize("name", ["a", "7", "a_-b", "0-0"])
@pytest.mark.parametrize("kind", get_args(templates.Kind))
def test_the_programs_of_a_new_overlay_are_valid_under_any_name(name: str, kind: templates.Kind) -> None:
    files = templates.overlay_files(name, kind, 8101)
    programs = {path: text for path, text in files.items() if path.endswith(".py")}
    assert len(programs) == 2
    for path, text in programs.items():
        assert compile(text, path, "exec")


# --- aal provenance ----------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(aal: Callable[..., Ran], overlays: Path, tmp_path: Path) -> Path:
    """Lines: 1 `fixed`, 2 the environment, 3 a refused call, 4 `echo`."""
    aal("invoke", "fixed")
    aal("invoke", "fixed", "--phase", "ASCEND")
    aal("invoke", "echo")
    return tmp_path / LEDGER


def test_tail_filters_and_gives_programs_the_lines_themselves(aal: Callable[..., Ran], ledger: Path) -> None:
    written = ledger.read_text().splitlines()
    assert aal("provenance", "tail", "--json").out.splitlines() == written
    assert aal("provenance", "tail", "-n", "1", "--json").out.splitlines() == written[-1:]
    assert aal("provenance", "tail", "--overlay", "fixed", "--ok", "--json").out.splitlines() == written[:1]
    assert aal("provenance", "tail", "--failed", "--json").out.splitlines() == [written[2]]
    for option, value in (("--code", "ERR_PERMISSION_DENIED"), ("--since", "2001-01-01"), ("--until", "9" * 13)):
        assert written[2] in aal("provenance", "tail", option, value, "--json").out.splitlines(), option
    for option, value in (("--caller", "nobody"), ("--until", "2001-01-01T00:00:00+00:00"), ("--phase", "seal")):
        assert aal("provenance", "tail", option, value, "--json").out == "", option


def test_tail_shows_people_one_row_a_line(aal: Callable[..., Ran], ledger: Path) -> None:
    rows = aal("provenance", "tail").out.splitlines()
    assert [row.split()[0] for row in rows] == ["seq", "1", "2", "3", "4"]
    assert "ERR_PERMISSION_DENIED" in rows[3]


def test_tail_of_no_ledger_is_empty(aal: Callable[..., Ran]) -> None:
    assert aal("provenance", "tail", "--json") == (Exit.OK, "", "")
    assert aal("provenance", "tail").out == "No call was made here yet.\n"
    ran = aal("provenance", "verify")
    assert (ran.code, ran.err.splitlines()[1]) == (Exit.FAILED, "hint: No call was made here yet.")


STRANGE = [
    {},
    {"seq": 1, "type": "invoke", "timestamp_ms": 1},
    {"seq": 5, "type": "invoke", "timestamp_ms": "today", "hash": "x"},
]


@pytest.mark.parametrize("line", STRANGE)
def test_a_line_that_is_no_record_is_left_out_of_the_tail_and_ends_a_replay_with_4(
    aal: Callable[..., Ran], ledger: Path, line: dict[str, Any]
) -> None:
    with ledger.open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert [row.split()[0] for row in aal("provenance", "tail").out.splitlines()] == ["seq", "1", "2", "3", "4"]
    for arguments in (["--all"], ["5"], ["1-5"]):
        ran = aal("replay", *arguments)
        assert (ran.code, ran.err.startswith("ERR_LEDGER_BROKEN")) == (Exit.LEDGER_BROKEN, True)
    assert aal("provenance", "verify").code == Exit.LEDGER_BROKEN


def test_tail_shows_a_line_whose_members_are_not_what_they_should_be(aal: Callable[..., Ran], ledger: Path) -> None:
    record = json.loads(ledger.read_text().splitlines()[0])
    record |= {"seq": 5, "timestamp_ms": 10**15, "overlay": 5, "capability": ["x"], "code": {"a": 1}, "phase": 1.5}
    with ledger.open("a") as file:
        file.write(json.dumps(record) + "\n")
    assert aal("provenance", "tail", "-n", "1").out.splitlines()[1].split()[:4] == [
        "5",
        f"{10**15}",
        "invoke",
        "5.['x']",
    ]


def test_the_log_of_another_program_is_kept_and_the_doctor_says_so_before(
    aal: Callable[..., Ran], overlays: Path, tmp_path: Path
) -> None:
    log = tmp_path / LEDGER
    log.parent.mkdir()
    log.write_text('{"request_id": "old", "ok": true}\n')
    findings = {finding["name"]: finding for finding in aal("doctor", "--json").json["findings"]}
    assert (findings["ledger"]["mark"], "another program" in findings["ledger"]["found"]) == ("warn", True)
    assert aal("provenance", "verify").code == Exit.LEDGER_BROKEN
    assert aal("invoke", "fixed").code == Exit.OK
    assert aal("provenance", "verify").code == Exit.OK
    assert log.with_name("provenance.jsonl.before-1").read_text() == '{"request_id": "old", "ok": true}\n'


def test_show_gives_one_line(aal: Callable[..., Ran], ledger: Path) -> None:
    assert aal("provenance", "show", "1", "--json").out == ledger.read_text().splitlines(keepends=True)[0]
    assert json.loads(aal("provenance", "show", "3").out)["code"] == "ERR_PERMISSION_DENIED"
    assert "no line 5" in aal("provenance", "show", "5").err


def test_verify_gives_lines_and_head(aal: Callable[..., Ran], ledger: Path) -> None:
    head = provenance.read_line(ledger, 4)["hash"]
    assert aal("provenance", "verify").out == f"ok 4 lines, head {head}\n"
    report = aal("provenance", "verify", "--json").json
    assert (report["ok"], report["lines"], report["head_hash"]) == (True, 4, head)


def change_line(ledger: Path, seq: int) -> None:
    written = ledger.read_bytes().splitlines(keepends=True)
    written[seq - 1] = written[seq - 1].replace(b'"phase":"', b'"phase":"X')
    ledger.write_bytes(b"".join(written))


def test_verify_exits_with_4_at_the_first_bad_line(aal: Callable[..., Ran], ledger: Path) -> None:
    change_line(ledger, 3)
    ran = aal("provenance", "verify")
    assert (ran.code, ran.out) == (Exit.LEDGER_BROKEN, "")
    assert "ERR_LEDGER_BROKEN: line 3: " in ran.err
    ran = aal("provenance", "verify", "--json")
    assert (ran.code, ran.json["first_bad"], ran.json["fault"]) == (Exit.LEDGER_BROKEN, 3, "hash")
    assert aal("provenance", "show", "3").code == Exit.LEDGER_BROKEN


# --- aal replay --------------------------------------------------------------------------------------------------


def test_replay_of_one_line_prints_it_its_outcome_and_the_verdict(aal: Callable[..., Ran], ledger: Path) -> None:
    ran = aal("replay", "1")
    assert ran.code == Exit.OK
    assert ran.out.splitlines()[:4] == ["Replaying event from line 1", "overlay: fixed", "phase: OPEN", "{"]
    assert ran.out.splitlines()[-1] == "verdict: MATCH"
    outcome = ran.out[ran.out.index("{") : ran.out.rindex("}") + 1]
    body = json.loads(outcome)
    assert body["result"] == {"answer": 42}
    assert outcome == json.dumps(body, indent=2, sort_keys=True)


def test_replay_tells_what_drifted_and_exits_with_1(aal: Callable[..., Ran], ledger: Path, overlays: Path) -> None:
    (overlays / "fixed/run.sh").write_text(FIXED.replace("42", "43"))
    ran = aal("replay", "1")
    assert (ran.code, ran.out.splitlines()[-1]) == (Exit.FAILED, "verdict: DRIFT (result, code)")


def test_a_drift_has_its_difference_and_its_cause(aal: Callable[..., Ran], ledger: Path, overlays: Path) -> None:
    (overlays / "fixed/run.sh").write_text(FIXED.replace("42", "43"))
    told = aal("replay", "1").out.splitlines()
    assert told[-4:-1] == ["recorded -> now:", "  /answer: 42 -> 43", "cause: code (nothing else differs)"]
    body = aal("replay", "1", "--json").json
    assert (body["diff"], body["cause"]["names"]) == ([{"path": "/answer", "was": "42", "is": "43"}], ["code"])


def test_several_lines_run_at_once_where_that_is_said(aal: Callable[..., Ran], ledger: Path) -> None:
    ran = aal("replay", "1-4", "4", "1", "--live", "--jobs", "3", "--json")
    assert (ran.code, [row["seq"] for row in ran.json["replays"]]) == (Exit.FAILED, [1, 2, 3, 4])
    assert [verdicts(ran)[seq] for seq in (1, 4)] == ["MATCH", "DRIFT"]


def test_replay_notes_what_else_changed_beside_a_match(aal: Callable[..., Ran], ledger: Path, overlays: Path) -> None:
    (overlays / "fixed/run.sh").write_text(f"{FIXED} # the same\n")
    ran = aal("replay", "1")
    assert (ran.code, ran.out.splitlines()[-2]) == (Exit.OK, "verdict: MATCH")
    assert ran.out.splitlines()[-1].startswith("note: ")
    assert ran.out.splitlines()[-1].endswith(": code")


def test_replay_for_programs_is_one_document(aal: Callable[..., Ran], ledger: Path) -> None:
    body = aal("replay", "1", "--json").json
    assert (body["seq"], body["verdict"], body["outcome"]["result"]) == (1, "MATCH", {"answer": 42})
    assert [line["type"] for line in provenance.tail(ledger, 1)] == ["replay"]


@pytest.mark.parametrize(("seq", "why"), [("2", "environment"), ("3", "denied"), ("4", "may write or exec")])
def test_a_line_that_cannot_be_replayed_exits_with_3(aal: Callable[..., Ran], ledger: Path, seq: str, why: str) -> None:
    ran = aal("replay", seq)
    assert (ran.code, why in ran.err) == (Exit.NOT_REPLAYABLE, True)
    assert len(provenance.tail(ledger, 100)) == 4


def test_a_line_without_its_payload_exits_with_3(
    aal: Callable[..., Ran], overlays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AAL_DEV_LOG_PAYLOAD")
    aal("invoke", "fixed")
    ran = aal("replay", "1")
    assert (ran.code, "AAL_DEV_LOG_PAYLOAD" in ran.err) == (Exit.NOT_REPLAYABLE, True)


def test_what_could_change_something_is_replayed_live_only(aal: Callable[..., Ran], ledger: Path) -> None:
    ran = aal("replay", "4", "--live")
    assert (ran.code, ran.out.splitlines()[-1]) == (Exit.FAILED, "verdict: DRIFT (result)")


def test_replay_of_no_such_line_exits_with_2(aal: Callable[..., Ran], ledger: Path) -> None:
    for lines in (["9"], ["1-9"], ["1", "9"]):
        ran = aal("replay", *lines)
        assert (ran.code, "no line" in ran.err) == (Exit.USAGE, True)


@pytest.mark.parametrize("command", ["provenance show 3", "replay 3", "replay 1 3", "replay 1-4"])
def test_a_broken_line_is_named(aal: Callable[..., Ran], ledger: Path, command: str) -> None:
    written = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*written[:2], b"{}\n", *written[3:]]))
    ran = aal(*command.split())
    assert (ran.code, ran.err.startswith("ERR_LEDGER_BROKEN: line 3: ")) == (Exit.LEDGER_BROKEN, True)


def test_a_changed_line_among_several_is_named(aal: Callable[..., Ran], ledger: Path) -> None:
    change_line(ledger, 1)
    assert aal("replay", "--all").err.startswith("ERR_LEDGER_BROKEN: line 1: ")


def test_replay_of_a_broken_line_exits_with_4(aal: Callable[..., Ran], ledger: Path) -> None:
    change_line(ledger, 1)
    assert aal("replay", "1").code == Exit.LEDGER_BROKEN
    assert aal("replay", "--all").code == Exit.LEDGER_BROKEN


def verdicts(ran: Ran) -> dict[int, str]:
    return {row["seq"]: row["verdict"] for row in ran.json["replays"]}


def test_several_lines_give_a_row_each_and_skip_what_cannot_be(aal: Callable[..., Ran], ledger: Path) -> None:
    ran = aal("replay", "1-4", "--json")
    assert (ran.code, verdicts(ran)) == (Exit.OK, {1: "MATCH", 2: "SKIPPED", 3: "SKIPPED", 4: "SKIPPED"})
    assert ran.json["totals"] == {"match": 1, "drift": 0, "failed": 0, "skipped": 3}
    ran = aal("replay", "1", "3")
    assert [row.split()[0] for row in ran.out.splitlines()[:3]] == ["seq", "1", "3"]
    assert ran.out.splitlines()[-1] == "tried 1 of 2: 1 match, 0 drift, 0 failed, 1 skipped"


def test_all_takes_every_call_and_never_the_replays(aal: Callable[..., Ran], ledger: Path) -> None:
    assert aal("replay", "1").code == Exit.OK
    assert verdicts(aal("replay", "--all", "--json")) == {1: "MATCH", 4: "SKIPPED"}
    assert verdicts(aal("replay", "--all", "--overlay", "fixed", "--json")) == {1: "MATCH"}
    assert verdicts(aal("replay", "--all", "--live", "--json")) == {1: "MATCH", 4: "DRIFT"}


def test_last_takes_the_last_calls_that_can_be_replayed(
    aal: Callable[..., Ran], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aal("invoke", "fixed", "n=2")
    monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", "0")
    for _ in range(3):
        aal("invoke", "fixed")
    assert verdicts(aal("replay", "--last", "1", "--json")) == {5: "MATCH"}
    assert verdicts(aal("replay", "--last", "9", "--overlay", "fixed", "--json")) == {1: "MATCH", 5: "MATCH"}


def test_for_the_last_calls_each_line_is_read_once_and_no_more_of_them_than_are_meant(
    aal: Callable[..., Ran], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", "0")
    for _ in range(9):
        aal("invoke", "fixed")
    read: list[bytes] = []

    def noting(line: bytes) -> dict[str, Any] | None:
        read.append(line)
        return parse_or_none(line)

    monkeypatch.setattr(provenance, "parse_or_none", noting)
    ran = aal("replay", "--last", "1", "--overlay", "fixed", "--json")
    assert (verdicts(ran), "note: " in ran.err) == ({1: "MATCH"}, False)
    assert 13 <= len(read) <= 15
    read.clear()
    monkeypatch.setattr(cli_replay, "LOOKED_BACK_LINES", 5)
    ran = aal("replay", "--last", "2", "--overlay", "fixed")
    assert (ran.code, len(read)) == (Exit.NOT_REPLAYABLE, 6)
    assert "note: 0 of 2 calls were found; no more than 5 lines are read for them" in ran.err


def test_fewer_lines_than_the_least_exit_with_3(aal: Callable[..., Ran], ledger: Path) -> None:
    ran = aal("replay", "1-4", "--least", "2")
    assert (ran.code, ran.out.splitlines()[-1].split(":")[0]) == (Exit.NOT_REPLAYABLE, "tried 1 of 4")
    assert "ERR_NOT_REPLAYABLE: 1 of 4 lines could be run, and --least says 2" in ran.err
    assert aal("replay", "1", "--least", "2").code == Exit.NOT_REPLAYABLE
    ran = aal("replay", "1-4", "--least", "2", "--json")
    assert (ran.code, ran.json["tried"], ran.json["of"], ran.json["least"]) == (Exit.NOT_REPLAYABLE, 1, 4, 2)
    assert json.loads(ran.err)["code"] == "ERR_NOT_REPLAYABLE"
    assert aal("replay", "1-4", "--least", "1").code == Exit.OK
    assert aal("replay", "1-4", "--least", "3", "--live").code == Exit.FAILED
    assert aal("replay", "1-4", "--least", "0").code == Exit.USAGE


def test_a_call_of_an_overlay_that_has_gone_fails_beside_the_others(
    aal: Callable[..., Ran], ledger: Path, overlays: Path
) -> None:
    shutil.rmtree(overlays / "fixed")
    ran = aal("replay", "1", "4", "--live", "--json")
    assert (ran.code, verdicts(ran)[1]) == (Exit.FAILED, "FAILED")
    assert "ERR_UNKNOWN_OVERLAY" in ran.json["replays"][0]["reason"]


def test_nothing_to_replay_exits_with_3(aal: Callable[..., Ran]) -> None:
    for which in (["--all"], ["--last", "2"]):
        ran = aal("replay", *which)
        said = "tried 0 of 0: 0 match, 0 drift, 0 failed, 0 skipped\n"
        assert (ran.code, ran.out) == (Exit.NOT_REPLAYABLE, said)
        first, second = ran.err.splitlines()
        assert first == "ERR_NOT_REPLAYABLE: there is no line with a stored payload"
        assert "AAL_DEV_LOG_PAYLOAD=1" in second
        assert aal("replay", *which, "--json").json["replays"] == []


def test_the_script_replays_as_the_command_does(ledger: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "TOOLS/replay.py"), "1"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.splitlines()[0]) == (Exit.OK, "Replaying event from line 1"), ran.stderr
    assert ran.stdout.splitlines()[-1] == "verdict: MATCH"


def run_lone_script(root: Path) -> subprocess.CompletedProcess[str]:
    """The script in a checkout without the bus, under a Python without any package."""
    script = root / "TOOLS/replay.py"
    script.parent.mkdir(exist_ok=True)
    shutil.copy(REPO / "TOOLS/replay.py", script)
    command = [sys.executable, "-I", "-S", str(script), "7"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_without_its_dependencies_hands_over_to_the_checkouts_own_python(tmp_path: Path) -> None:
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "handed over: $*"\n')
    python.chmod(0o755)
    assert run_lone_script(tmp_path).stdout == f"handed over: {tmp_path}/TOOLS/replay.py 7\n"


def test_the_script_without_its_dependencies_says_what_is_missing(tmp_path: Path) -> None:
    ran = run_lone_script(tmp_path)
    assert ran.returncode == Exit.FAILED
    assert "No module named 'bus'" in ran.stderr
    assert "pip install" in ran.stderr


# --- aal stress, config, doctor, init ----------------------------------------------------------------------------


def test_stress_is_a_figure_with_its_sources(aal: Callable[..., Ran]) -> None:
    report = aal("stress", "--json").json
    assert 0 <= report["stress"] <= 1
    assert set(report["sources"]) == {"memory", "pressure"}
    assert aal("stress").out.startswith("stress ")


def test_config_names_the_source_of_each_value(
    aal: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aal.toml").write_text("slots = 3\n")
    monkeypatch.setenv("AAL_PORT", "0")
    told = {row["name"]: (row["value"], row["source"]) for row in aal("config", "--json").json["settings"]}
    assert set(told) == {row.name for row in table()}
    assert (told["slots"], told["port"]) == ((3, "aal.toml"), (0, "environment"))
    assert told["overlays"] == (str(tmp_path / "overlays"), "default")
    assert len(aal("config").out.splitlines()) == len(told) + 1


def test_config_shows_the_table_with_what_cannot_be_marked(
    aal: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aal.toml").write_text("port = 3\n")
    monkeypatch.setenv("AAL_SLOTS", "many")
    monkeypatch.setenv("AAL_PROT", "1")
    ran = aal("config")
    assert (ran.code, "AAL_PROT" in ran.err) == (Exit.USAGE, True)
    rows = {row.split()[0]: row for row in ran.out.splitlines()}
    assert re.fullmatch(r"slots +'many' +environment +64 +allowed: 1 to 4096", rows["slots"])
    assert rows["port"].split()[:3] == ["port", "3", "aal.toml"]
    (tmp_path / "aal.toml").write_text("port = 'x'\n")
    ran = aal("config")
    assert (ran.code, "slots" in ran.err, "port" in ran.err) == (Exit.USAGE, True, True)


def test_doctor_is_content_with_a_sound_folder(aal: Callable[..., Ran], ledger: Path) -> None:
    ran = aal("doctor", "--json")
    marks = {finding["name"]: finding["mark"] for finding in ran.json["findings"]}
    assert (ran.code, ran.json["ok"]) == (Exit.OK, True)
    assert marks["ledger"] == marks["overlay fixed"] == marks["logs"] == "ok"
    assert aal("doctor").out.startswith("ok")


def test_doctor_fails_for_broken_overlays_missing_programs_and_a_broken_ledger(
    aal: Callable[..., Ran], ledger: Path, overlays: Path
) -> None:
    (overlays / "half").mkdir()
    add_overlay(overlays, "lacks", "no-such-program-here now")
    add_overlay(overlays, "lacks-too", "./none.sh")
    change_line(ledger, 1)
    ran = aal("doctor", "--json")
    failed = {f["name"]: f["found"] for f in ran.json["findings"] if f["mark"] == "fail"}
    assert ran.code == Exit.FAILED
    assert set(failed) == {"ledger", "overlay half", "overlay lacks", "overlay lacks-too"}
    assert "no-such-program-here" in failed["overlay lacks"]
    aal("overlays", "disable", "lacks")
    names = {f["name"] for f in aal("doctor", "--json").json["findings"] if f["mark"] == "fail"}
    assert "overlay lacks" not in names


def test_doctor_finds_the_programs_of_an_overlays_own_environment(aal: Callable[..., Ran], tmp_path: Path) -> None:
    folder = add_overlay(tmp_path / "overlays", "own", "own-python run.py")
    program = folder / ".venv/bin/own-python"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert aal("doctor").code == Exit.OK


def test_doctor_finds_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    in_the_way = tmp_path / "logs"
    in_the_way.write_text("a file")
    assert doctor.writable("logs", in_the_way / "below").mark == "fail"
    assert doctor.writable("logs", tmp_path / "new/folder").mark == "ok"
    assert not (tmp_path / "new").exists()


def test_doctor_leaves_nothing_behind(aal: Callable[..., Ran], tmp_path: Path) -> None:
    aal("doctor")
    assert list(tmp_path.iterdir()) == []


def test_init_lays_out_a_folder_that_works(aal: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "new/bus"
    ran = aal("init", str(folder))
    assert (ran.code, "aal serve" in ran.out) == (Exit.OK, True)
    assert {path.name for path in folder.iterdir()} == {"overlays", "aal.toml", ".gitignore"}
    body = aal("-C", str(folder), "invoke", "abraxas", "prompt=hello", "--json").json
    assert (body["ok"], body["result"]["counts"]["words"]) == (True, 1)


def test_init_writes_every_setting_as_a_comment_that_holds_the_default(tmp_path: Path) -> None:
    text = templates.settings_file(table())
    assert tomllib.loads(text) == {}
    settings = [line.removeprefix("# ") for line in text.splitlines() if " = " in line]
    (tmp_path / "aal.toml").write_text("\n".join(settings))
    loaded, rows = explain(tmp_path, env={})
    other = load(tmp_path / "elsewhere", env={}, overrides=paths_in(tmp_path))
    assert loaded == replace(other, file=loaded.file)
    assert {row.source for row in rows} == {"aal.toml"}


def paths_in(folder: Path) -> dict[str, Path]:
    return {row.name: folder / row.default for row in table() if isinstance(row.default, Path)}


def test_init_makes_a_folder_whose_name_is_not_utf_8(tmp_path: Path, aal: Callable[..., Ran]) -> None:
    ran = aal("init", f"{tmp_path}/\udcff")
    assert (ran.code, "\\udcff" in ran.out) == (Exit.OK, True)
    assert (tmp_path / "\udcff" / "aal.toml").is_file()


def test_init_keeps_what_is_there(aal: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "aal.toml").write_text("slots = 3\n")
    assert aal("init", str(tmp_path)).code == Exit.OK
    assert (tmp_path / "aal.toml").read_text() == "slots = 3\n"
    ran = aal("init", str(tmp_path))
    assert (ran.code, "ERR_EXISTS" in ran.err) == (Exit.FAILED, True)


# --- aal serve ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended, and whose pipes are closed."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO) as running:
        try:
            yield running
        finally:
            running.kill()


def first_line(running: subprocess.Popen[str]) -> str:
    """What the process says when it is ready; its errors, if it says nothing."""
    assert running.stdout
    assert running.stderr
    return running.stdout.readline().rstrip("\n") or running.stderr.read()


def served(folder: Path, *options: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return process([sys.executable, "-m", "bus.cli", "-C", str(folder), "serve", *options])


def test_serve_answers_until_it_is_told_to_end_and_then_exits_with_0(overlays: Path, tmp_path: Path) -> None:
    (overlays / "half").mkdir()
    with served(tmp_path, "--port", "0") as server:
        said = first_line(server)
        address = said.partition("http://")[2].split()[0]
        assert said.endswith("with 3 overlays (broken: half)")
        connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(
                "POST", "/invoke/fixed", '{"phase": "OPEN", "data": {}}', {"Content-Type": "application/json"}
            )
            answer = json.loads(connection.getresponse().read())
        assert (answer["result"], answer["provenance"]["seq"]) == ({"answer": 42}, 1)
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=PATIENCE_S)
    assert (server.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert verification.verify(tmp_path / LEDGER).ok


@pytest.mark.parametrize("level", ["info", "debug"])
def test_the_log_of_a_server_has_no_line_for_each_file_that_changes(level: str) -> None:
    program = (
        f"import logging, bus.serve; bus.serve._log_to_stderr({level!r});"
        "logging.getLogger('watchfiles.main').info('1 change detected'); logging.getLogger('bus').info('heard')"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    assert ("heard" in ran.stderr, "change" in ran.stderr) == (True, False)


def test_a_folder_has_one_server(aal: Callable[..., Ran], overlays: Path, tmp_path: Path) -> None:
    with served(tmp_path, "--port", "0") as server:
        assert "listens on" in first_line(server)
        ran = aal("serve", "--port", "0")
        assert (ran.code, ran.out) == (Exit.FAILED, "")
        assert f"ERR_IN_USE: process {server.pid} serves {tmp_path}" in ran.err
        assert aal("invoke", "fixed").code == Exit.OK
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE_S) == 0


def test_serve_on_a_port_that_is_taken_exits_with_1(aal: Callable[..., Ran], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = aal("serve", "--port", str(taken.getsockname()[1]))
    assert (ran.code, "ERR_ADDRESS" in ran.err) == (Exit.FAILED, True)
    assert not (tmp_path / LEDGER).exists()


def test_serve_beyond_loopback_is_refused_with_what_to_do(aal: Callable[..., Ran]) -> None:
    ran = aal("serve", "--host", "0.0.0.0")
    assert ran.code == Exit.USAGE
    assert "hint: Make one first, with aal token create" in ran.err


def test_a_line_for_programs_is_canonical(aal: Callable[..., Ran], ledger: Path) -> None:
    line = aal("provenance", "show", "1", "--json").out.rstrip("\n")
    assert canonical(json.loads(line)).decode() == line
