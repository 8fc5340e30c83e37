"""`aal overlays profile` on real programs: each way to run, payloads of each kind, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from bus import cli_profile, provenance, runes
from bus.console import Exit
from tests.cli_fixtures import aal, plain_environment
from tests.support import REPO, add_overlay, add_script, write_overlay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli_fixtures import Ran

TAKES = """
import json, mmap, sys
payload = json.load(sys.stdin)["payload"]
kept = b"x" * (payload.get("mb", 0) << 20)
untouched = mmap.mmap(-1, payload.get("mapped_mb", 1) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
json.dump({"ok": not payload.get("fail"), "result": len(kept), "error": "so it was told"}, sys.stdout)
"""
"""Takes `mb` of memory, maps `mapped_mb` that it never touches, and fails where it is told to."""

RUNE = "MEM[SOFT=400,HARD=600,VOL=HIGH];TIER=EXTENDED;PRIORITY=7;DEGRADE{STEP1:CONTEXT(64)}"


@pytest.fixture(autouse=True)
def _settings_of_tests(plain_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", "1")
    monkeypatch.setenv("AAL_KILL_GRACE_S", "0.2")


def add_program(tmp_path: Path, name: str = "takes", mode: str = "fork", **members: Any) -> None:
    """An overlay of the native shape that takes memory."""
    manifest = {
        "name": name,
        "version": "1.0.0",
        "permissions": ["analysis"],
        "entrypoints": {"proc": {"command": ["python3", "run.py"], "mode": mode}},
        "capabilities": {"run": {"runner": "proc", "memory": RUNE}},
    }
    write_overlay(tmp_path / "overlays", name, manifest | members, {"run.py": TAKES})


def pasted(manifest: Path, ran: Ran) -> str:
    """The rune that was printed, put into the manifest as it was printed."""
    member, rune = json.loads("{" + ran.out.splitlines()[-1] + "}").popitem()
    document = json.loads(manifest.read_text())
    holder = document["capabilities"]["run"] if isinstance(document["capabilities"], dict) else document
    holder[member] = rune
    manifest.write_text(json.dumps(document))
    return str(rune)


@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_a_program_is_measured_and_its_rune_proposed(aal: Callable[..., Ran], tmp_path: Path, mode: str) -> None:
    add_program(tmp_path, mode=mode)
    payloads = ["--payload", '{"mb": 40}', "--payload", '{"mb": 60}']
    ran = aal("overlays", "profile", "takes", *payloads, "--runs", "4", "--json")
    assert ran.code == Exit.OK
    told = ran.json
    assert (told["runs"], told["payloads"], told["counted"], told["failures"]) == (4, 2, 4, [])
    assert [call["payload"] for call in told["calls"]] == [1, 2, 1, 2]
    assert {call["phase"] for call in told["calls"]} == {"CLEAR"}
    peak = told["measured"]["peak_mb"]
    assert 40 < peak["least"] < 60 < peak["most"] < 120
    assert told["measured"]["cpu_ms"]["least"] > 0
    found = runes.parse(told["proposed"]["rune"])
    assert peak["p95"] < found.soft_mb < found.hard_mb < 400
    assert (found.tier, found.priority, [*map(str, found.steps)]) == ("EXTENDED", 7, ["CONTEXT(64)"])
    assert told["declared"]["rune"] == RUNE


def test_people_see_the_declared_the_measured_and_a_rune_to_paste(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_program(tmp_path)
    ran = aal("overlays", "profile", "takes", "--payload", '{"mb": 40}', "--runs", "3")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["MiB", "declared", "measured", "proposed"] in lines
    assert ["400", "SOFT"] in lines
    assert ["600", "HARD"] in lines
    assert sum("█" in line for line in ran.out.splitlines()) >= 1
    assert "note: 3 runs count: from 20 on the figures say something" in ran.out.splitlines()
    rune = pasted(tmp_path / "overlays/takes/manifest.json", ran)
    shown = aal("overlays", "show", "takes", "--json").json
    assert (shown["error"], shown["details"]["run"]["memory"]["hard_mb"]) == (None, runes.parse(rune).hard_mb)
    assert aal("invoke", "takes", "mb=40", "--phase", "CLEAR").code == Exit.OK


def test_the_rune_of_an_older_manifest_has_the_name_that_it_takes(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_overlay(tmp_path / "overlays", "old", capabilities=["analysis"])
    ran = aal("overlays", "profile", "old", "--payload", "{}", "--runs", "2")
    assert ran.out.splitlines()[-1].startswith('"default_profile": "MEM[')
    pasted(tmp_path / "overlays/old/manifest.json", ran)
    assert aal("overlays", "check", "old", "--json").json["overlays"][0]["warnings"] == []


def test_a_hard_under_which_a_run_would_fail_is_not_proposed(aal: Callable[..., Ran], tmp_path: Path) -> None:
    """What a program maps and never touches is in no peak, and yet counts for the kernel's limit."""
    add_program(tmp_path)
    told = aal("overlays", "profile", "takes", "--payload", '{"mapped_mb": 300}', "--runs", "2", "--json").json
    assert told["measured"]["peak_mb"]["most"] < 60
    assert told["too_low_mb"][0] == 64
    assert told["proposed"]["hard_mb"] == 2 * told["too_low_mb"][-1] > 128
    assert any("runs did not end as before" in note for note in told["notes"])
    tried = aal("invoke", "takes", "mapped_mb=300", "--phase", "CLEAR", "--profile", told["proposed"]["rune"])
    assert tried.code == Exit.OK


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        ('{"mb": 80}', "ERR_MEMORY_LIMIT"),  # seen to have more
        ('{"mb": 300}', "ERR_OVERLAY_CRASH"),  # given no more, of which the program died
    ],
)
def test_a_run_for_which_its_hard_is_too_low_is_shown_and_a_higher_one_proposed(
    aal: Callable[..., Ran], tmp_path: Path, payload: str, code: str
) -> None:
    narrow = {"runner": "proc", "memory": "MEM[SOFT=30,HARD=60,VOL=LOW]"}
    add_program(tmp_path, capabilities={"run": narrow})
    asked = ["overlays", "profile", "takes", "--payload", payload, "--payload", "{}", "--runs", "2"]
    ran = aal(*asked, "--json")
    assert (ran.code, [(fault["code"], fault["runs"]) for fault in ran.json["failures"]]) == (Exit.FAILED, [(code, 1)])
    assert ran.json["proposed"]["hard_mb"] >= 120
    told = aal(*asked)
    assert "note: 1 run had too little with the HARD of 60 MiB" in told.out
    assert (told.code, code in told.out) == (Exit.FAILED, True)


def test_an_overlay_that_says_it_failed_is_measured_and_fails_the_command(
    aal: Callable[..., Ran], tmp_path: Path
) -> None:
    add_program(tmp_path)
    ran = aal("overlays", "profile", "takes", "--payload", '{"fail": true}', "--runs", "2", "--json")
    assert (ran.code, ran.json["counted"]) == (Exit.FAILED, 2)
    assert ran.json["failures"] == [{"code": "ERR_OVERLAY_FAILED", "runs": 2, "error": "so it was told"}]


def test_runs_of_which_none_came_to_its_end_propose_nothing(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_script(tmp_path / "overlays", "breaks", "exit 3")
    for as_json in ([], ["--json"]):
        ran = aal("overlays", "profile", "breaks", "--payload", "{}", "--runs", "2", "--phase", "CLEAR", *as_json)
        assert ran.code == Exit.FAILED
        assert "ERR_NOT_MEASURED" in ran.err
        assert "breaks.run: no run was measured to its end" in ran.err
        assert "ERR_OVERLAY_CRASH" in ran.out
    assert ran.json["proposed"] is None


# --- What is kept from call to call ------------------------------------------------------------------------------


def test_a_worker_is_looked_at_after_each_run(aal: Callable[..., Ran], tmp_path: Path) -> None:
    proc = {"command": ["python3", "worker.py"], "mode": "worker"}
    manifest = {
        "name": "keeps",
        "version": "1.0.0",
        "permissions": ["analysis"],
        "entrypoints": {"proc": proc},
        "capabilities": {"run": {"runner": "proc", "memory": RUNE}},
    }
    program = (REPO / "tests/programs/worker.py").read_text()
    write_overlay(tmp_path / "overlays", "keeps", manifest, {"worker.py": program})
    ran = aal("overlays", "profile", "keeps", "--payload", '{"do": "grow", "mb": 50}', "--runs", "2", "--json")
    assert ran.code == Exit.OK
    first, second = (call["peak_mb"] for call in ran.json["calls"])
    assert 50 < first < second - 40  # each run keeps 50 MiB more, and what the one before it took is seen by then
    lines = provenance.tail(tmp_path / "logs/provenance.jsonl", 100, types=("invoke",))
    peaks = [line["memory"]["peak_mb"] for line in lines]
    assert peaks[1:3] == [first, second]  # one more before them, that starts the process


def test_what_somebody_else_serves_is_told_to_be_out_of_sight(aal: Callable[..., Ran], tmp_path: Path) -> None:
    manifest = {
        "name": "remote",
        "version": "1.0.0",
        "entrypoints": {"http": {"base_url": "http://127.0.0.1:9"}},
        "capabilities": {"ask": {"runner": "http", "path": "/ask"}},
    }
    write_overlay(tmp_path / "overlays", "remote", manifest)
    ran = aal("overlays", "profile", "remote", "--payload", "{}")
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert ran.err.startswith("ERR_NOT_MEASURED: remote.ask is answered by a service that the bus does not start")
    assert provenance.tail(tmp_path / "logs/provenance.jsonl", 1) == []


# --- Payloads ----------------------------------------------------------------------------------------------------


def test_payloads_come_from_files_too_one_a_line_or_one_in_all(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_overlay(tmp_path / "overlays")
    many, one = tmp_path / "many.jsonl", tmp_path / "one.json"
    many.write_text('{"n": 1}\n\n{"n": 2}\n')
    one.write_text('{\n  "n": 3\n}\n')
    given = ["--payload", str(many), "--payload", f"@{one}", "--payload", '{"n": 4}', "--payload", "-"]
    ran = aal("overlays", "profile", "echo", *given, "--runs", "5", "--json", stdin='{"n": 5}')
    assert (ran.code, ran.json["payloads"]) == (Exit.OK, 5)
    lines = provenance.tail(tmp_path / "logs/provenance.jsonl", 100, types=("invoke",))
    assert [line["payload"]["n"] for line in lines[:5]] == [1, 2, 3, 4, 5]


def test_there_is_a_run_for_each_payload_where_they_are_many(
    aal: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_profile, "RUNS", 2)
    add_overlay(tmp_path / "overlays")
    one = ["--payload", "{}"]
    assert aal("overlays", "profile", "echo", *one, "--json").json["runs"] == 2
    assert aal("overlays", "profile", "echo", *one * 3, "--json").json["runs"] == 3


def test_recorded_payloads_are_run_again_in_their_phase_with_their_seed(
    aal: Callable[..., Ran], tmp_path: Path
) -> None:
    add_overlay(tmp_path / "overlays", policy={"deterministic": True})
    for n, phase in enumerate(("SEAL", "OPEN", "CLEAR")):
        aal("invoke", "echo", f"n={n}", "--phase", phase, "--seed", f"{n}")
    ran = aal("overlays", "profile", "echo", "--recorded", "2", "--runs", "3", "--json")
    assert (ran.code, ran.json["payloads"]) == (Exit.OK, 2)
    lines = provenance.tail(tmp_path / "logs/provenance.jsonl", 100, types=("invoke",))[3:6]
    assert [(line["payload"], line["phase"], line["seed"]) for line in lines] == [
        ({"n": 1}, "OPEN", 1),
        ({"n": 2}, "CLEAR", 2),
        ({"n": 1}, "OPEN", 1),
    ]
    only = aal("overlays", "profile", "echo", "--phase", "SEAL", "--runs", "1", "--json")
    assert [(call["phase"], only.json["payloads"]) for call in only.json["calls"]] == [("SEAL", 1)]


def test_nothing_recorded_exits_with_3_and_says_what_to_do(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_overlay(tmp_path / "overlays")
    ran = aal("overlays", "profile", "echo")
    assert ran.code == Exit.NOT_REPLAYABLE
    assert "the ledger has no call of echo.run with its payload" in ran.err
    assert "Give --payload, or make calls with AAL_DEV_LOG_PAYLOAD=1" in ran.err


def test_what_could_change_something_is_run_live_only(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_overlay(tmp_path / "overlays")
    asked = ["overlays", "profile", "echo", "--payload", "{}", "--runs", "1", "--phase", "OPEN"]
    ran = aal(*asked)
    assert ran.code == Exit.NOT_REPLAYABLE
    assert "phase OPEN may write or exec, and echo is not declared deterministic" in ran.err
    assert provenance.tail(tmp_path / "logs/provenance.jsonl", 1) == []
    assert aal(*asked, "--live").code == Exit.OK


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["echo", "--payload", "[1]"], Exit.USAGE, "'[1]' is not a JSON object"),
        (["echo", "--payload", "{1}"], Exit.USAGE, "'{1}' is not JSON"),
        (["echo", "--payload", "no-such-file"], Exit.USAGE, "cannot read 'no-such-file'"),
        (["echo", "--payload", "/dev/null"], Exit.USAGE, "there is no payload in it"),
        (["echo", "--payload", "{}", "--recorded", "1"], Exit.USAGE, "not both"),
        (["echo", "--payload", "{}", "--runs", "0"], Exit.USAGE, "'0' is not a whole number of 1 or more"),
        (["echo", "--payload", "{}", "--capability", "x"], Exit.FAILED, "ERR_UNKNOWN_CAPABILITY"),
        (["nobody", "--payload", "{}"], Exit.FAILED, "ERR_UNKNOWN_OVERLAY"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    aal: Callable[..., Ran], tmp_path: Path, arguments: list[str], code: Exit, said: str
) -> None:
    add_overlay(tmp_path / "overlays")
    ran = aal("overlays", "profile", *arguments)
    assert (ran.code, said in ran.err) == (code, True)
    assert provenance.tail(tmp_path / "logs/provenance.jsonl", 1) == []


def test_a_bad_line_of_a_file_is_named(aal: Callable[..., Ran], tmp_path: Path) -> None:
    add_overlay(tmp_path / "overlays")
    (tmp_path / "many.jsonl").write_text('{"n": 1}\n\n{"n": }\n')
    ran = aal("overlays", "profile", "echo", "--payload", str(tmp_path / "many.jsonl"))
    assert (ran.code, "line 3 of" in ran.err) == (Exit.USAGE, True)
