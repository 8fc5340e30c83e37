"""The whole flow: README's own commands against the service alone, and the same steps through the bus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.context.conftest import OVERLAY
from tests.context.flows import bus_with, copy_overlay, invoke, needs_curl, result, shell, uvicorn
from tests.context.served import FACT, PATIENCE_S, Service, a_patch, environment, run_cli
from tests.support import lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Server

README = (OVERLAY / "README.md").read_text("utf-8")
FENCES = [(found[1], found[2]) for found in re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
COMMANDS = [body.strip() for kind, body in FENCES if kind == "sh"]
SCRIPTS = [body for kind, body in FENCES if kind == "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_overlay(tmp_path_factory.mktemp("user") / "aos_context")


@needs_curl
def test_the_commands_of_the_readme_play_the_whole_flow_against_the_service_alone(folder: Path) -> None:
    with uvicorn(folder) as address:
        script = "\n".join(COMMANDS).replace("127.0.0.1:8000", address)
        said = shell(script + '\necho "$RUN_ID $PACK"', folder).stdout
        assert '"OUTSIDE_MILESTONE"' in said
        assert "Invoices before 2019 are in pounds" in said
        assert "Move the invoices to the new ledger." in said
        run_id, pack = said.splitlines()[-1].split()
        assert pack.startswith(f"runs/{run_id}/resume/pack_")
        again = shell(script, folder).stdout
        assert '"OUTSIDE_MILESTONE"' in again
    expected = {"state/working_set.v2.1.json", "ledger/run.v2.1.jsonl", "episodes/episode_000001.v2.1.json"}
    run = folder / "runs" / run_id
    assert expected <= {str(path.relative_to(run)) for path in run.rglob("*")}
    assert (run / "episodes/episode_000001.v2.1.json").stat().st_mode & 0o777 == 0o444
    assert (folder / "runs/memory.v2.1.sqlite").is_file()
    arguments = ("verify", str(folder / pack), "--ledger", str(run / "ledger/run.v2.1.jsonl"))
    checked = run_cli(*arguments)
    assert (checked.returncode, checked.stderr) == (1, "")
    memory, *unchecked, summary = checked.stdout.splitlines()
    assert [one.partition(",")[0] for one in unchecked] == [
        "not vouched for: the manifest's own members",
        "not vouched for: lines 1 to 6 of ledger/run.v2.1.jsonl",
    ]
    assert re.fullmatch(r"BAD  mem_[0-9a-f]+  it was committed without a bus", memory)
    assert summary.startswith("1 memories and 0 files of pack ")
    assert summary.endswith(f", run {run_id}: 1 not as they should be")
    allowed = run_cli(*arguments, "--allow-unrecorded")
    assert (allowed.returncode, allowed.stdout.splitlines()[-1]) == (
        0,
        f"{summary.partition(': ')[0]}: as they should be, as far as the ledger vouches for them",
    )


def test_the_python_of_the_readme_runs_from_inside_the_folder(folder: Path) -> None:
    assert len(SCRIPTS) == 1
    for script in SCRIPTS:
        command = [sys.executable, "-W", "error", "-c", script]
        subprocess.run(command, cwd=folder, env=environment(), check=True, timeout=PATIENCE_S)
    assert (folder / "parts/ledger/run.v2.1.jsonl").read_text().count("\n") == 1


def test_every_fence_is_of_a_kind_that_is_looked_at() -> None:
    assert {kind for kind, _ in FENCES} == {"sh", "python", "text"}


# Through the bus


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    with bus_with(folder, tmp_path_factory.mktemp("bus")) as server:
        yield server


def test_the_same_flow_goes_through_the_bus_and_its_ledger_has_who_committed(bus: Server) -> None:
    run_id = result(bus, "boot", "OPEN", objective="Move the invoices.")["run_id"]
    assert result(bus, "ws", "CLEAR", run_id=run_id)["_update_seq"] == 0
    assert result(bus, "update", "ALIGN", run_id=run_id, patch=a_patch(next_action="Count"))["update_seq"] == 1
    stale = invoke(bus, "update", "OPEN", run_id=run_id, patch=a_patch())
    assert (stale["ok"], stale["code"], stale["result"]["current_seq"]) == (False, "STALE", 1)

    batch_id = result(bus, "propose", "OPEN", run_id=run_id, mcrs=[FACT])["batch_id"]
    assert result(bus, "search", "CLEAR", run_id=run_id, q="invoices")["hits"] == []
    reached = result(bus, "milestone", "SEAL", run_id=run_id, reason="counted", memory_batch_id=batch_id)
    [item] = reached["memory"]["items"]
    line = bus.line_of(item["committed_by"])
    assert (line["capability"], line["phase"], line["ok"]) == ("milestone", "SEAL", True)

    [hit] = result(bus, "search", "CLEAR", run_id=run_id, q="invoices")["hits"]
    assert hit["item"]["id"] == item["id"]
    brief = result(bus, "brief", "CLEAR", run_id=run_id, budget=800)
    assert brief["tokens"] <= 800
    assert "Move the invoices." in brief["brief"]

    packed = result(bus, "snapshot", "OPEN", run_id=run_id)
    loaded = result(bus, "load", "ALIGN", pack_path=packed["pack_path"], new_run_id="continued")
    assert (loaded["run_id"], loaded["working_set"]["next_action"]) == ("continued", "Count")
    state = bus.settings.state_of("aos_context")
    assert (state / run_id / "episodes/episode_000001.v2.1.json").is_file()

    checked = run_cli("verify", packed["pack_path"], "--ledger", str(bus.settings.ledger), "--json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    said = json.loads(checked.stdout)
    [verdict] = said["verdicts"]
    found = (verdict["item_id"], verdict["committed_by"], verdict["seq"], verdict["reason"])
    assert found == (item["id"], item["committed_by"], line["seq"], None)
    assert (said["ok"], said["run_id"], said["pack_id"]) == (True, run_id, packed["pack_id"])
    assert ([one["reason"] for one in said["files"]], said["unchecked"]) == ([None, None], [])


def test_who_reaches_the_port_of_the_service_past_the_bus_is_refused(bus: Server) -> None:
    run_id = result(bus, "boot", "OPEN", objective="Be left alone.")["run_id"]
    port = bus.get("/overlays/aos_context").json()["running"]["service"]["port"]
    past = Service(port, bus.settings.state_of("aos_context"))
    document = {"capability": "ws", "phase": "CLEAR", "request_id": "forged", "payload": {"run_id": run_id}}
    said = past.post("/aal/ws", document)
    assert (said.status, said.json()["code"]) == (403, "FORBIDDEN")
    assert result(bus, "ws", "CLEAR", run_id=run_id)["run_id"] == run_id


def test_in_seal_a_batch_is_committed_without_a_milestone_and_in_no_other_phase(bus: Server) -> None:
    run_id = result(bus, "boot", "OPEN", objective="Commit.")["run_id"]
    mcrs = [FACT | {"content": "Committed in the phase that seals"}]
    batch_id = result(bus, "propose", "ALIGN", run_id=run_id, mcrs=mcrs)["batch_id"]
    for phase in ("OPEN", "ALIGN", "CLEAR"):
        assert invoke(bus, "commit", phase, run_id=run_id, batch_id=batch_id)["code"] == "ERR_PHASE_DENIED"
    committed = invoke(bus, "commit", "SEAL", run_id=run_id, batch_id=batch_id)
    assert committed["result"]["items"][0]["committed_by"] == committed["request_id"]
    again = result(bus, "commit", "SEAL", run_id=run_id, batch_id=batch_id)
    assert (again["already"], again["items"]) == (True, committed["result"]["items"])


@pytest.mark.parametrize("capability", ["ws", "search", "brief"])
def test_a_read_in_clear_writes_nothing(bus: Server, capability: str) -> None:
    run_id = result(bus, "boot", "OPEN", objective="Be read.")["run_id"]
    state = bus.settings.state_of("aos_context")

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in state.rglob("*") if path.is_file() and path.suffix != ".sqlite-shm"}

    before = content()
    result(bus, capability, "CLEAR", run_id=run_id)
    assert content() == before


def test_what_an_overlay_refuses_is_an_answer_of_the_bus_with_its_own_code(bus: Server) -> None:
    unknown = invoke(bus, "ws", "CLEAR", run_id="nobody")
    assert (unknown["ok"], unknown["code"]) == (False, "NOT_FOUND")
    assert invoke(bus, "ws", "CLEAR", run_id="../x")["code"] == "ERR_INPUT_SCHEMA"
    assert invoke(bus, "milestone", "OPEN", run_id="x", reason="y")["code"] == "ERR_PHASE_DENIED"
    assert [line["capability"] for line in lines(bus.settings) if "request_id" in line]
