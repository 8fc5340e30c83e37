"""A pack that was made through a real bus and forged with care, against that bus's ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aos_context.layout import PACK_MANIFEST
from aos_context.pack_check import check_against_ledger
from aos_context.resume_pack import check

from tests.context.flows import bus_with, copy_overlay, result
from tests.context.forged import forge
from tests.context.served import FACT, a_patch, run_cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aos_context.pack_check import Report

    from tests.support import Server

EPISODE = "episodes/episode_000002.v2.1.json"


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    overlay = copy_overlay(tmp_path_factory.mktemp("user") / "aos_context")
    with bus_with(overlay, tmp_path_factory.mktemp("bus")) as server:
        yield server


@pytest.fixture(scope="module")
def packed(bus: Server) -> dict[str, Any]:
    """Two milestones with a memory each, then a memory that is committed without one, and a patch."""
    run_id = result(bus, "boot", "OPEN", objective="Be packed.", run_id="packed")["run_id"]

    def proposed(content: str, confidence: float) -> str:
        mcrs = [FACT | {"content": content, "confidence": confidence}]
        batch_id: str = result(bus, "propose", "OPEN", run_id=run_id, mcrs=mcrs)["batch_id"]
        return batch_id

    first, second, third = (
        proposed("Salt is in pounds", 1),
        proposed("Tea is in chests", 1e-7),
        proposed("Oil is out", 1.0),
    )
    result(bus, "milestone", "SEAL", run_id=run_id, reason="one", memory_batch_id=first)
    result(bus, "milestone", "SEAL", run_id=run_id, reason="two", memory_batch_id=second)
    result(bus, "commit", "SEAL", run_id=run_id, batch_id=third)
    result(bus, "update", "OPEN", run_id=run_id, patch=a_patch(next_action="Count the chests"))
    return result(bus, "snapshot", "OPEN", run_id=run_id)


@pytest.fixture
def state(bus: Server) -> Path:
    return bus.settings.state_of("aos_context")


def reported(bus: Server, pack: Path, root: Path | None = None) -> Report:
    return check_against_ledger(pack, bus.settings.ledger, root=root)


def test_all_of_a_pack_is_vouched_for_where_it_was_made_and_elsewhere_with_its_root(
    bus: Server, packed: dict[str, Any], tmp_path: Path, state: Path
) -> None:
    place = Path(packed["pack_path"])
    carried = Path(shutil.copy(place, tmp_path / "carried.zip"))
    for found in (reported(bus, place), reported(bus, carried, state)):
        assert [one.reason for one in found.verdicts] == [None] * 3
        assert [(one.file, one.reason) for one in found.files] == [(EPISODE, None), (PACK_MANIFEST, None)]
        assert found.ok(strict=True)
        assert found.is_vouched
    said = run_cli("verify", str(place), "--ledger", str(bus.settings.ledger), "--strict")
    assert (said.returncode, said.stdout.splitlines()[-1].endswith(": all as they should be")) == (0, True)


def test_elsewhere_the_milestones_line_vouches_for_all_memories_and_what_is_left_is_said(
    bus: Server, packed: dict[str, Any], tmp_path: Path
) -> None:
    carried = Path(shutil.copy(packed["pack_path"], tmp_path / "carried.zip"))
    found = reported(bus, carried)
    assert [one.reason for one in found.verdicts] == [None] * 3
    assert [(one.file, one.is_open) for one in found.files] == [(EPISODE, False), (PACK_MANIFEST, True)]
    with check(carried) as pack:
        assert pack.episode is not None
        behind = f"lines {pack.episode['ledger']['last_seq'] + 1} to {pack.ledger_last_seq} of ledger/run.v2.1.jsonl"
    assert [one.partition(",")[0] for one in found.unchecked] == ["the manifest's own members", behind]
    assert (found.ok(), found.ok(strict=True), found.is_vouched) == (True, False, False)
    with_hash = check_against_ledger(carried, bus.settings.ledger, manifest_sha256=packed["manifest_sha256"])
    assert with_hash.unchecked == ()


@pytest.mark.parametrize("is_carried", [False, True])
@pytest.mark.parametrize(
    "change", [("Salt is in pounds", "Salt is in DOLLARS"), ("Tea is in chests", "Tea is in CRATES")]
)
def test_a_memory_that_was_changed_at_any_milestone_is_a_fault_of_the_episode(
    bus: Server, packed: dict[str, Any], tmp_path: Path, change: tuple[str, str], is_carried: bool
) -> None:
    place = Path(packed["pack_path"])
    forged = forge(place, (tmp_path if is_carried else place.parent) / "forged.zip", *change)
    with check(forged):
        pass  # of itself it is without a fault
    found = reported(bus, forged)
    assert [one.file for one in found.file_faults()] == [EPISODE]
    assert len(found.faults()) == 2
    said = run_cli("verify", str(forged), "--ledger", str(bus.settings.ledger))
    assert (said.returncode, f"BAD  {EPISODE}  line " in said.stdout) == (1, True)
    answer = json.loads(run_cli("verify", str(forged), "--ledger", str(bus.settings.ledger), "--json").stdout)
    assert answer["ok"] is False


def test_a_memory_that_was_committed_without_a_milestone_and_changed_is_a_fault(
    bus: Server, packed: dict[str, Any], tmp_path: Path
) -> None:
    found = reported(bus, forge(Path(packed["pack_path"]), tmp_path / "forged.zip", "Oil is out", "Oil is in"))
    assert ["did not commit this content" in str(one.reason) for one in found.faults()] == [True]
    assert found.file_faults() == []


def test_what_came_behind_the_last_episode_and_was_changed_is_open_and_a_fault_where_its_place_is_known(
    bus: Server, packed: dict[str, Any], tmp_path: Path, state: Path
) -> None:
    forged = forge(Path(packed["pack_path"]), tmp_path / "forged.zip", "Count the chests", "Burn the chests")
    found = reported(bus, forged)
    assert (found.ok(), found.is_vouched, found.ok(strict=True)) == (True, False, False)
    assert [one.file for one in found.file_faults(strict=True)] == [PACK_MANIFEST]
    assert [one.file for one in reported(bus, forged, state).file_faults()] == [PACK_MANIFEST]


@pytest.mark.parametrize(
    ("packed_by", "reason"), [(None, None), ("nobody", "no line on the call"), ("milestone", 'is "milestone", not')]
)
def test_a_manifest_that_names_another_call_is_a_fault_and_one_that_names_none_is_not_vouched_for(
    bus: Server, packed: dict[str, Any], tmp_path: Path, packed_by: str | None, reason: str | None
) -> None:
    if packed_by == "milestone":
        with check(Path(packed["pack_path"])) as pack:
            packed_by = next(iter(pack.memory_items()))["committed_by"]
    found = reported(bus, forge(Path(packed["pack_path"]), tmp_path / "forged.zip", "-", "-", packed_by=packed_by))
    if reason is None:
        assert [one.file for one in found.files] == [EPISODE]
        assert not found.is_vouched
    else:
        assert reason in str(found.file_faults()[0].reason)


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_milestone_that_was_asked_for_with_a_batch_of_an_episode_before_is_no_fault(
    bus: Server, tmp_path: Path, is_changed: bool
) -> None:
    """Its answer has the batch, and its episode has not; once a later batch has changed it, nobody can tell."""
    run_id = result(bus, "boot", "OPEN", objective="Be asked twice.")["run_id"]
    told = FACT | {"content": f"Coal is in sacks, {is_changed}"}
    batch_id = result(bus, "propose", "OPEN", run_id=run_id, mcrs=[told])["batch_id"]
    [item] = result(bus, "commit", "SEAL", run_id=run_id, batch_id=batch_id)["items"]
    result(bus, "milestone", "SEAL", run_id=run_id, reason="one")
    reached = result(bus, "milestone", "SEAL", run_id=run_id, reason="two", memory_batch_id=batch_id)
    assert (reached["episode"]["memory"]["batch_id"], reached["memory"]["already"]) == (None, True)
    if is_changed:
        mcr = {"_schema_version": "2.1", "op": "delete", "target_id": item["id"], "rationale": "It is gone"}
        later = result(bus, "propose", "OPEN", run_id=run_id, mcrs=[mcr])["batch_id"]
        result(bus, "commit", "SEAL", run_id=run_id, batch_id=later)
    place = Path(result(bus, "snapshot", "OPEN", run_id=run_id)["pack_path"])
    assert reported(bus, place).file_faults() == []
    carried = reported(bus, Path(shutil.copy(place, tmp_path / "carried.zip")))
    assert (carried.ok(), carried.files[0].is_open) == (True, is_changed)
