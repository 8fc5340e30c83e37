"""`aal replay --against`: another version of an overlay, tried with recorded good calls, apart from the live bus."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import provenance
from bus.console import Exit
from bus.dispatch import Bus
from bus.errors import BusError
from bus.gate import Gate
from bus.replay import try_all
from bus.secrets import Secrets
from runners.base import Outcome
from tests.cli_fixtures import aal, plain_environment
from tests.support import (
    PATIENCE_S,
    REPO,
    FixedStress,
    InProcessRunner,
    a_call,
    add_overlay,
    add_script,
    eventually,
    misfits,
    running_bus,
    settings_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus.replay import Trial
    from bus.settings import Settings
    from tests.cli_fixtures import Ran

__all__ = ["aal", "plain_environment"]

DETERMINISTIC: dict[str, Any] = {"policy": {"deterministic": True}}
LEDGER = "logs/provenance.jsonl"
PURE = """tr -d '\\n' | sed 's/.*"payload":\\({[^}]*}\\).*/{"ok":true,"result":\\1}/'"""
COUNTING = """n=$(cat "$OVERLAY_STATE/n" 2>/dev/null || echo 0); echo $((n + 1)) > "$OVERLAY_STATE/n"; """ + PURE
RANDOM = """echo "{\\"ok\\": true, \\"result\\": \\"$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')\\"}\""""


@pytest.fixture(autouse=True)
def _settings_of_tests(plain_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", "1")
    monkeypatch.setenv("AAL_KILL_GRACE_S", "0.2")
    monkeypatch.setenv("AAL_SANDBOX", "off")


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """The live overlay, whose answer is its payload."""
    return add_script(tmp_path / "overlays", "pure", PURE, **DETERMINISTIC)


@pytest.fixture
def recorded(aal: Callable[..., Ran], live: Path) -> int:
    """Three good calls, in lines 1, 3 and 4."""
    for number in range(3):
        assert aal("invoke", "pure", f"n={number}").code == Exit.OK
    return 3


@pytest.fixture
def candidate(live: Path, tmp_path: Path) -> Path:
    """A copy of the live overlay, in a folder of another name."""
    return shutil.copytree(live, tmp_path / "next")


def edit_manifest(folder: Path, **members: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


def verdicts(ran: Ran) -> list[str]:
    return [row["verdict"] for row in ran.json["replays"]]


def contents(root: Path) -> dict[str, str]:
    """Every file below a folder, by its path, with its SHA-256 and the time of its last change."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}


# --- Verdicts and causes -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("recorded")
def test_a_candidate_that_is_the_same_matches_whatever_its_folder_is_called(
    aal: Callable[..., Ran], candidate: Path
) -> None:
    ran = aal("replay", "--against", str(candidate), "--json")
    assert (ran.code, verdicts(ran)) == (Exit.OK, ["MATCH"] * 3)
    assert [row["seq"] for row in ran.json["replays"]] == [1, 3, 4]
    assert [row["differs"] for row in ran.json["replays"]] == [[]] * 3
    assert ran.json["totals"] == {"match": 3, "drift": 0, "failed": 0, "skipped": 0}
    told = ran.json["against"]
    assert (told["overlay"], told["version"], told["folder"]) == ("pure", "1.0.0", str(candidate))
    assert {row["outcome"]["provenance"] for row in ran.json["replays"]} == {None}
    assert [misfits("replay", row) for row in ran.json["replays"]] == [[]] * 3


@pytest.mark.usefixtures("recorded")
def test_another_result_is_a_drift_of_the_code_with_what_differs(aal: Callable[..., Ran], candidate: Path) -> None:
    (candidate / "run.sh").write_text(PURE.replace('"result":\\1', '"result":{"n":7,"more":\\1}'))
    ran = aal("replay", "--against", str(candidate), "--json")
    assert (ran.code, verdicts(ran)) == (Exit.FAILED, ["DRIFT"] * 3)
    row = ran.json["replays"][0]
    assert row["differs"] == ["result", "code"]
    assert misfits("replay", row) == []
    assert row["cause"]["names"] == ["code"]
    assert "the recorded result" in row["cause"]["why"]
    assert row["diff"] == [{"path": "/n", "was": "0", "is": "7"}, {"path": "/more", "was": None, "is": '{"n": 0}'}]
    shown = aal("replay", "1", "--against", str(candidate))
    assert "code (the version that was recorded now gives the recorded result)" in shown.out
    assert "  /n: 0 -> 7" in shown.out.splitlines()
    assert shown.out.splitlines()[-1] == "tried 1 of 1: 0 match, 1 drift, 0 failed, 0 skipped"


@pytest.mark.usefixtures("recorded")
def test_a_manifest_that_alone_changed_is_told_apart_from_the_code(aal: Callable[..., Ran], candidate: Path) -> None:
    edit_manifest(candidate, version="2.0.0")
    ran = aal("replay", "--against", str(candidate), "--json")
    assert (ran.code, verdicts(ran)) == (Exit.OK, ["MATCH"] * 3)
    assert [row["differs"] for row in ran.json["replays"]] == [["manifest"]] * 3
    (candidate / "other.sh").write_text("echo 5")
    edit_manifest(candidate, entrypoint="sh other.sh")
    both = aal("replay", "1", "--against", str(candidate), "--json").json["replays"][0]
    assert (both["verdict"], both["differs"]) == ("DRIFT", ["result", "manifest", "code"])
    assert both["cause"]["names"] == ["code", "manifest"]


def test_a_result_that_hangs_on_the_manifest_drifts_because_of_it(aal: Callable[..., Ran], tmp_path: Path) -> None:
    version = """tr -d '\\n' | sed 's/.*"version":\\("[^"]*"\\).*/{"ok":true,"result":\\1}/'"""
    folder = add_script(tmp_path / "overlays", "versioned", version, **DETERMINISTIC)
    aal("invoke", "versioned")
    other = shutil.copytree(folder, tmp_path / "next")
    edit_manifest(other, version="2.0.0")
    (row,) = aal("replay", "--against", str(other), "--json").json["replays"]
    assert (row["verdict"], row["cause"]["names"]) == ("DRIFT", ["manifest"])
    assert row["diff"] == [{"path": "", "was": '"1.0.0"', "is": '"2.0.0"'}]


@pytest.mark.usefixtures("recorded")
def test_a_random_candidate_is_not_deterministic_whatever_else_changed(
    aal: Callable[..., Ran], candidate: Path
) -> None:
    (candidate / "run.sh").write_text(RANDOM)
    ran = aal("replay", "--against", str(candidate), "--json")
    assert (ran.code, verdicts(ran)) == (Exit.FAILED, ["DRIFT"] * 3)
    for row in ran.json["replays"]:
        assert row["cause"]["names"] == ["none"]
        assert "not deterministic although it says so: two runs" in row["cause"]["why"]


def test_a_result_that_hangs_on_what_no_record_holds_is_no_fault_of_the_candidate(
    aal: Callable[..., Ran], tmp_path: Path
) -> None:
    told = tmp_path / "outside"
    told.write_text('{"answer": 1}')
    folder = add_script(tmp_path / "overlays", "outside", f"cat {told}", **DETERMINISTIC)
    aal("invoke", "outside")
    told.write_text('{"answer": 2}')
    other = shutil.copytree(folder, tmp_path / "next")
    (other / "note.txt").write_text("nothing that matters")
    (row,) = aal("replay", "--against", str(other), "--json").json["replays"]
    assert (row["verdict"], row["differs"], row["cause"]["names"]) == ("DRIFT", ["result", "code"], ["none"])
    assert "the new result, too" in row["cause"]["why"]


@pytest.mark.usefixtures("recorded")
def test_without_the_recorded_version_what_differs_is_all_that_is_known(
    aal: Callable[..., Ran], live: Path, candidate: Path
) -> None:
    (candidate / "run.sh").write_text("echo 5")
    shutil.rmtree(live)
    ran = aal("replay", "--against", str(candidate), "--json")
    assert [row["cause"] for row in ran.json["replays"]] == [{"names": ["code"], "why": "nothing else differs"}] * 3


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("least", [3, 4])
def test_a_candidate_that_was_tried_with_fewer_calls_than_the_least_has_not_passed(
    aal: Callable[..., Ran], candidate: Path, least: int
) -> None:
    ran = aal("replay", "--against", str(candidate), "--least", str(least))
    assert ran.code == (Exit.OK if least <= 3 else Exit.NOT_REPLAYABLE)
    assert ran.out.splitlines()[-1].startswith("tried 3 of 3: ")
    assert ("3 of 3 lines could be run, and --least says 4" in ran.err) == (least > 3)


@pytest.mark.parametrize("declared", ["by none", "by the record", "by both"])
@pytest.mark.parametrize("phase", ["ASCEND", "SEAL"])
def test_a_call_that_needs_consent_runs_once_and_no_experiment_is_made_with_it(
    aal: Callable[..., Ran], tmp_path: Path, phase: str, declared: str
) -> None:
    ran_live, ran_next = tmp_path / "ran-live", tmp_path / "ran-next"
    members = {"capabilities": ["analysis", "exec"], "phases": [phase]}
    members |= {} if declared == "by none" else DETERMINISTIC
    folder = add_script(tmp_path / "overlays", "writes", f"echo x >> {ran_live}; echo 1", **members)
    assert aal("invoke", "writes", "--phase", phase).code == Exit.OK
    other = shutil.copytree(folder, tmp_path / "next")
    (other / "run.sh").write_text(f"echo x >> {ran_next}; echo 2")
    if declared == "by the record":
        edit_manifest(other, policy={"deterministic": False})
    ran = aal("replay", "--against", str(other), "--live", "--json")
    (row,) = ran.json["replays"]
    assert (ran.code, row["verdict"]) == (Exit.FAILED, "DRIFT")
    is_harmless = declared == "by both"
    assert ran_next.read_text() == ("x\nx\n" if is_harmless else "x\n")
    assert ran_live.read_text() == ("x\nx\n" if is_harmless else "x\n")
    assert ("nothing more was tried" in row["cause"]["why"]) is not is_harmless
    assert "code" in row["cause"]["names"]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("hangs_on_it", [True, False])
def test_another_environment_is_told_apart_from_the_code(
    aal: Callable[..., Ran], live: Path, candidate: Path, monkeypatch: pytest.MonkeyPatch, hangs_on_it: bool
) -> None:
    """The live overlay runs beside the candidate: what both give is of the environment that they share."""
    if hangs_on_it:
        monkeypatch.setenv("LANG", "first")
        (live / "run.sh").write_text("""echo "{\\"lang\\": \\"$LANG\\"}\"""")
        assert aal("invoke", "pure").code == Exit.OK
        shutil.copy(live / "run.sh", candidate)
        monkeypatch.setenv("LANG", "second")
    else:
        (candidate / "run.sh").write_text("echo 5")
    (candidate / "note.txt").write_text("so that the code differs")
    monkeypatch.setattr("bus.gate.collect_environment", lambda _: {"python": "another"})
    (row,) = aal("replay", "--last", "1", "--against", str(candidate), "--json").json["replays"]
    assert (row["verdict"], row["differs"]) == ("DRIFT", ["result", "code", "environment"])
    assert row["cause"]["names"] == (["environment"] if hangs_on_it else ["code"])


@pytest.mark.parametrize(
    ("script", "code"),
    [("echo broken >&2; exit 3", "ERR_OVERLAY_CRASH"), ("echo '{\"ok\":false}'", "ERR_OVERLAY_FAILED")],
)
@pytest.mark.usefixtures("recorded")
def test_a_candidate_that_fails_where_the_recorded_one_did_not_has_failed(
    aal: Callable[..., Ran], candidate: Path, script: str, code: str
) -> None:
    (candidate / "run.sh").write_text(script)
    ran = aal("replay", "--against", str(candidate), "--json")
    assert (ran.code, verdicts(ran)) == (Exit.FAILED, ["FAILED"] * 3)
    assert {row["outcome"]["code"] for row in ran.json["replays"]} == {code}
    assert f"{code}: " in aal("replay", "--against", str(candidate)).out


@pytest.mark.usefixtures("recorded")
def test_a_candidate_that_does_not_serve_the_phase_has_failed(aal: Callable[..., Ran], candidate: Path) -> None:
    edit_manifest(candidate, phases=["CLEAR"])
    ran = aal("replay", "1", "--against", str(candidate), "--json")
    assert (ran.code, verdicts(ran)) == (Exit.FAILED, ["FAILED"])
    assert ran.json["replays"][0]["outcome"]["code"] == "ERR_PHASE_DENIED"


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    "manifest", ["{", '{"name": "pure"}', '{"name": "pure", "version": "1", "entrypoint": 5}', "[]"]
)
def test_a_candidate_that_does_not_load_is_told_once(aal: Callable[..., Ran], candidate: Path, manifest: str) -> None:
    (candidate / "manifest.json").write_text(manifest)
    ran = aal("replay", "--against", str(candidate))
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert ran.err.count("ERR_OVERLAY_BROKEN") == 1


async def test_a_call_that_was_degraded_is_tried_degraded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, stress = InProcessRunner(lambda job: Outcome(result=json.loads(job.envelope)["memory"])), FixedStress(0.9)
    folder = add_overlay(settings.overlays, "echo", **DETERMINISTIC)
    async with running_bus(settings, runner, stress) as bus:
        await bus.invoke(a_call("echo", profile="BALANCED"))
    (record,) = provenance.tail(settings.ledger, 1, types=("invoke",))
    assert record["memory"]["applied"]
    stress.value = 0.0
    monkeypatch.setattr("bus.gate.Bus", with_plugins(Bus, runner, stress))
    async with Gate(settings, folder, "echo") as tried:
        again = await tried.attempt(record)
    assert (again.verdict, again.differs) == ("MATCH", ())
    assert again.answer.body["result"]["applied"] == record["memory"]["applied"]


def with_plugins(make: Any, *more: object) -> Any:
    """A maker of buses that have further plugins."""
    return lambda settings, plugins, environment: make(settings, plugins=[*plugins, *more], environment=environment)


# --- Which calls -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("recorded")
def test_only_good_calls_of_the_overlay_with_their_payload_are_tried(
    aal: Callable[..., Ran], candidate: Path, live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_script(tmp_path / "overlays", "other", "echo 1", **DETERMINISTIC)
    aal("invoke", "other")
    (live / "run.sh").write_text("exit 3")
    aal("invoke", "pure")
    (live / "run.sh").write_text(PURE)
    monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", "0")
    aal("invoke", "pure")
    monkeypatch.setenv("AAL_DEV_LOG_PAYLOAD", "1")
    ran = aal("replay", "--last", "2", "--overlay", "pure", "--against", str(candidate), "--json")
    assert (ran.code, [row["seq"] for row in ran.json["replays"]]) == (Exit.OK, [3, 4])
    ran = aal("replay", "1-7", "--against", str(candidate), "--json")
    reasons = {row["seq"]: row.get("reason") for row in ran.json["replays"]}
    assert (ran.code, verdicts(ran)) == (
        Exit.OK,
        ["MATCH", "SKIPPED", "MATCH", "MATCH", "SKIPPED", "SKIPPED", "SKIPPED"],
    )
    assert "a call of other" in str(reasons[5])
    assert "no good call: it ended with ERR_OVERLAY_CRASH" in str(reasons[6])
    assert "without its payload" in str(reasons[7])
    assert len(aal("replay", "--all", "--against", str(candidate), "--json").json["replays"]) == 5


def test_what_could_change_something_is_tried_live_only(aal: Callable[..., Ran], tmp_path: Path) -> None:
    folder = add_script(tmp_path / "overlays", "plain", PURE)
    aal("invoke", "plain", "--phase", "OPEN")
    candidate = shutil.copytree(folder, tmp_path / "next")
    ran = aal("replay", "--against", str(candidate))
    assert (ran.code, "Say --live" in ran.err) == (Exit.NOT_REPLAYABLE, True)
    ran = aal("replay", "1", "--against", str(candidate), "--json")
    assert (ran.code, verdicts(ran)) == (Exit.NOT_REPLAYABLE, ["SKIPPED"])
    edit_manifest(candidate, **DETERMINISTIC)  # a candidate's word does not make another's calls harmless
    assert verdicts(aal("replay", "1", "--against", str(candidate), "--json")) == ["SKIPPED"]
    assert verdicts(aal("replay", "--against", str(candidate), "--live", "--json")) == ["MATCH"]
    aal("invoke", "plain", "--phase", "CLEAR")
    assert verdicts(aal("replay", "--against", str(candidate), "--json")) == ["MATCH"]


@pytest.mark.usefixtures("recorded")
def test_a_folder_that_is_no_candidate_is_a_wrong_use(aal: Callable[..., Ran], candidate: Path, tmp_path: Path) -> None:
    ran = aal("replay", "--against", str(tmp_path / "nowhere"))
    assert (ran.code, "there is no overlay in" in ran.err) == (Exit.USAGE, True)
    ran = aal("replay", "--overlay", "other", "--against", str(candidate))
    assert (ran.code, "is pure, and --overlay says other" in ran.err) == (Exit.USAGE, True)
    assert aal("replay", "1", "--all", "--against", str(candidate)).code == Exit.USAGE
    assert aal("replay", "9", "--against", str(candidate)).code == Exit.USAGE
    assert aal("replay", "1", "--jobs", "0", "--against", str(candidate)).code == Exit.USAGE


def test_without_a_good_call_there_is_nothing_to_try(aal: Callable[..., Ran], candidate: Path) -> None:
    ran = aal("replay", "--last", "5", "--against", str(candidate))
    assert (ran.code, "no good call of pure" in ran.err) == (Exit.NOT_REPLAYABLE, True)
    assert "AAL_DEV_LOG_PAYLOAD=1" in ran.err


@pytest.mark.usefixtures("recorded")
def test_a_line_that_was_changed_ends_it_with_4(aal: Callable[..., Ran], candidate: Path, tmp_path: Path) -> None:
    ledger = tmp_path / LEDGER
    ledger.write_bytes(ledger.read_bytes().replace(b'"n":2', b'"n":9'))
    ran = aal("replay", "--against", str(candidate))
    assert (ran.code, ran.err.startswith("ERR_LEDGER_BROKEN: line 4: ")) == (Exit.LEDGER_BROKEN, True)


# --- Apart from the live bus -------------------------------------------------------------------------------------


def test_twelve_calls_at_four_jobs_leave_ledger_and_state_byte_for_byte(
    aal: Callable[..., Ran], tmp_path: Path
) -> None:
    folder = add_script(tmp_path / "overlays", "counting", COUNTING, **DETERMINISTIC)
    for number in range(12):
        assert aal("invoke", "counting", f"n={number}").code == Exit.OK
    candidate = shutil.copytree(folder, tmp_path / "next")
    (candidate / "note.txt").write_text("so that the code differs")
    before = contents(tmp_path)
    assert (tmp_path / ".aal/state/counting/n").read_text() == "12\n"
    ran = aal("replay", "--last", "200", "--against", str(candidate), "--jobs", "4", "--json")
    assert (ran.code, ran.json["totals"]["match"]) == (Exit.OK, 12)
    assert contents(tmp_path) == before
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("aal-gate-*"))


def test_as_many_calls_run_at_once_as_jobs_say(aal: Callable[..., Ran], tmp_path: Path) -> None:
    """Each of two calls waits for the other; one after the other they would wait until their time is over."""
    meet = tmp_path / "meet"
    meet.mkdir()
    folder = add_script(tmp_path / "overlays", "meeting", "echo 1", timeout_ms=20_000, **DETERMINISTIC)
    for number in range(2):
        aal("invoke", "meeting", f"n={number}")
    candidate = shutil.copytree(folder, tmp_path / "next")
    waiting = f"touch {meet}/$$; while [ $(ls {meet} | wc -l) -lt 2 ]; do sleep 0.01; done; echo 1"
    (candidate / "run.sh").write_text(waiting)
    ran = aal("replay", "--against", str(candidate), "--jobs", "2", "--json")
    assert verdicts(ran) == ["MATCH", "MATCH"]


@pytest.mark.usefixtures("recorded")
def test_a_candidate_with_links_has_the_code_hash_that_it_will_have(aal: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "overlays/pure"
    (tmp_path / "shared.sh").write_text(PURE)
    (folder / "run.sh").unlink()
    (folder / "run.sh").symlink_to("../../shared.sh")
    aal("invoke", "pure", "n=5")
    candidate = tmp_path / "overlays/.next"
    shutil.copytree(folder, candidate, symlinks=True)
    (row,) = aal("replay", "--last", "1", "--against", str(candidate), "--json").json["replays"]
    assert (row["verdict"], row["differs"]) == ("MATCH", [])


@pytest.mark.usefixtures("recorded")
async def test_no_right_of_a_candidate_reaches_what_the_live_bus_keeps(tmp_path: Path, candidate: Path) -> None:
    settings = settings_in(tmp_path)
    for path in (settings.logs, settings.state_of("pure"), settings.overlays):
        rights = {"capabilities": {"run": {"runner": "proc", "rights": {"write": [str(path)]}}}}
        native = {"name": "pure", "version": "2", "permissions": ["analysis"]}
        native["entrypoints"] = {"proc": {"command": ["sh", "run.sh"]}}  # type: ignore[assignment]
        (candidate / "manifest.json").write_text(json.dumps(native | rights))
        with pytest.raises(BusError, match="found a right of run to "):
            async with Gate(settings, candidate, "pure"):
                pass


def test_a_candidate_gets_the_secrets_that_the_overlay_may_have(aal: Callable[..., Ran], tmp_path: Path) -> None:
    script = """echo "{\\"ok\\": true, \\"result\\": \\"$KEY\\"}\""""
    native: dict[str, Any] = {"secrets": ["KEY"], "permissions": ["analysis"], "version": "1"}
    native |= {"entrypoints": {"proc": {"command": ["sh", "run.sh"]}}, "capabilities": {"run": {"runner": "proc"}}}
    folder = add_script(tmp_path / "overlays", "keyed", script, **DETERMINISTIC)
    (folder / "manifest.json").write_text(json.dumps({"name": "keyed"} | native | DETERMINISTIC))
    secrets = Secrets(tmp_path / ".aal")
    secrets.set("KEY", ["keyed"], value="the first value")
    assert aal("invoke", "keyed").code == Exit.OK
    candidate = shutil.copytree(folder, tmp_path / "next")
    assert verdicts(aal("replay", "--against", str(candidate), "--json")) == ["MATCH"]
    secrets.set("KEY", value="the second value")
    ran = aal("replay", "--against", str(candidate))
    assert (ran.code, "DRIFT" in ran.out) == (Exit.FAILED, True)
    assert "second value" not in ran.out + ran.err


@pytest.mark.usefixtures("recorded")
async def test_a_candidate_that_changes_while_it_is_tried_has_failed(tmp_path: Path, candidate: Path) -> None:
    settings = settings_in(tmp_path)
    (record,) = provenance.tail(settings.ledger, 1)
    trials: list[Trial] = []
    async with Gate(settings, candidate, "pure") as tried:
        (candidate / "note.txt").write_text("new")
        await try_all([record], tried.attempt, jobs=1, done=trials.append)
    assert [(trial.verdict, "changed while it was tried" in trial.why) for trial in trials] == [("FAILED", True)]


def test_sigint_ends_it_with_what_was_done_so_far(aal: Callable[..., Ran], tmp_path: Path) -> None:
    folder = add_script(tmp_path / "overlays", "slow", "echo 1", timeout_ms=60_000, **DETERMINISTIC)
    for number in range(3):
        aal("invoke", "slow", f"n={number}")
    candidate = shutil.copytree(folder, tmp_path / "next")
    begun, scratch = tmp_path / "begun", tmp_path / "tmp"
    scratch.mkdir()
    stuck = f"""case "$(cat)" in *'"n":0'*) echo 1;; *) touch {begun}; exec sleep 1000;; esac"""
    (candidate / "run.sh").write_text(stuck)
    before = contents(tmp_path / "logs") | contents(tmp_path / ".aal")
    command = [sys.executable, "-m", "bus.cli", "replay", "--against", str(candidate), "--jobs", "1", "--json"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        eventually(begun.exists, "the second call has begun")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=PATIENCE_S)[0]
    told = json.loads(said)
    assert (process.returncode, told["interrupted"]) == (130, True)
    assert [(row["seq"], row["verdict"]) for row in told["replays"]] == [(1, "MATCH")]
    assert contents(tmp_path / "logs") | contents(tmp_path / ".aal") == before
    assert list(scratch.iterdir()) == []
