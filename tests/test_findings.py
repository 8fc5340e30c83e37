"""What people are told of the memory that calls needed: the account of each step, findings, over HTTP and without."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator
from starlette.testclient import TestClient

from bus import openapi, runes
from bus.app import create_app
from bus.dispatch import Bus
from bus.model import Service
from bus.needs import KEPT, LEARNED, Learned, Needs
from runners.base import Outcome
from tests.cli_fixtures import aal, plain_environment
from tests.support import FixedStress, InProcessRunner, a_capability, a_manifest, add_native, add_overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bus.settings import Settings
    from tests.cli_fixtures import Ran

STEPS = "MEM[SOFT=100,HARD=400,VOL=LOW];DEGRADE{STEP1:CONTEXT(64),STEP2:BATCH(ASYNC)}"
KEY = "echo.run"


def learned(*calls: tuple[float, Sequence[str] | None, str], key: str = KEY) -> Needs:
    """Needs of calls, each with its peak in MiB, the steps in force and its payload."""
    needs = Needs()
    for peak_mb, applied, payload in calls:
        needs.learn(key, Learned(peak_mb, "OK", 0.1, None if applied is None else tuple(applied), payload))
    return needs


def account(needs: Needs) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = needs.report(KEY, runes.parse(STEPS))["degradation"]
    return steps


# --- The account -------------------------------------------------------------------------------------------------


def test_a_step_is_judged_by_payloads_that_came_with_it_and_without() -> None:
    first, both = ["CONTEXT(64)"], ["CONTEXT(64)", "BATCH(ASYNC)"]
    needs = learned(
        (90, [], "large"),
        (60, first, "large"),
        (50, both, "large"),
        (10, [], "small"),
        (9, first, "small"),
        (1, [], "x"),
    )
    context, batch = account(needs)
    assert context == {
        "step": "CONTEXT(64)",
        "calls": 3,
        "median_with_mb": 50,
        "median_without_mb": 10,  # small payloads came without it: the medians alone would say that it costs memory
        "payloads": 2,
        "saved_mb": 15.5,
    }
    assert (batch["calls"], batch["payloads"], batch["saved_mb"]) == (1, 1, 10)


def test_steps_that_only_come_together_are_not_told_apart() -> None:
    both = ["CONTEXT(64)", "BATCH(ASYNC)"]
    for step in account(learned((90, [], "large"), (50, both, "large"))):
        assert (step["calls"], step["median_with_mb"], step["median_without_mb"]) == (1, 50, 90)
        assert (step["payloads"], step["saved_mb"]) == (0, None)


def test_calls_under_a_profile_of_their_callers_do_not_count_for_the_steps() -> None:
    needs = learned((90, None, "large"), (60, ["CONTEXT(64)"], "large"))
    assert account(needs)[0]["median_without_mb"] is None
    assert needs.report(KEY, runes.parse(STEPS))["measured_calls"] == 2
    assert list(needs.steps()) == [(KEY, "CONTEXT(64)", True, 60)]


def test_a_payload_that_is_not_known_is_like_no_other() -> None:
    assert account(learned((90, [], ""), (60, ["CONTEXT(64)"], "")))[0]["payloads"] == 0


def test_medians_are_those_of_the_last_calls() -> None:
    needs = learned(*[(500.0, [], "old")] * 5, *[(20.0, [], "new")] * KEPT)
    assert needs.report(KEY, runes.parse(STEPS))["peak_mb"] == 20


# --- What is recalled --------------------------------------------------------------------------------------------


def line(peak_mb: Any = 20.0, **members: Any) -> dict[str, Any]:
    told = {"peak_mb": peak_mb, "applied": [], "soft_mb": 512}
    call = {"type": "invoke", "overlay": "echo", "capability": "run", "code": "OK", "duration_ms": 3, "memory": told}
    return call | {"profile": None, "payload_hash": "ab"} | members


@pytest.mark.parametrize(
    "odd",
    [
        line("20"),
        line(None),
        line(memory=None),
        line(memory=[1]),
        line(memory={"peak_mb": 5}),
        line(duration_ms={"a": 1}),
        line(type="replay"),
        {"type": "invoke"},
    ],
    ids=str,
)
def test_a_line_that_says_nothing_sensible_is_passed_over(odd: dict[str, Any]) -> None:
    needs = Needs()
    needs.recall([odd, line(30.0)])
    assert needs.peaks_mb(KEY) == [30.0]


def test_a_line_with_a_code_and_names_of_a_stranger_form_is_no_fault() -> None:
    needs = Needs()
    needs.recall([line(code={"a": 1}, overlay=5, capability=["x"], payload_hash=7)])
    assert needs.peaks_mb("5.['x']") == [20.0]


def test_what_the_ledger_tells_is_what_the_calls_told() -> None:
    needs = Needs()
    needs.recall([line(memory={"peak_mb": 9, "applied": ["CONTEXT(64)"]}), line(5, profile="MINIMAL")])
    assert list(needs.steps()) == [(KEY, "CONTEXT(64)", True, 9)]


# --- Findings ----------------------------------------------------------------------------------------------------


def findings(peaks_mb: Sequence[float], *capabilities: str) -> list[str]:
    needs = learned(*((peak, [], "p") for peak in peaks_mb))
    offered = {name: a_capability(name=name, memory=runes.parse(STEPS)) for name in capabilities or ("run",)}
    return needs.findings(a_manifest(capabilities=offered))


def test_a_capability_that_stays_above_its_soft_is_found_with_its_figures() -> None:
    said = "run: stays above its SOFT of 100 MiB: half of its last 20 calls had 150.0 MiB or more; "
    assert findings([150.0] * LEARNED) == [said + "aal overlays profile echo proposes a rune"]


def test_a_capability_that_stays_under_a_tenth_of_its_soft_is_found_by_name() -> None:
    said = "run: stays under a tenth of its SOFT of 100 MiB: 95 % of its last 20 calls had 9.5 MiB or less; "
    expected = [said + "aal overlays profile echo --capability run proposes a rune"]
    assert findings([9.5] * LEARNED, "run", "other") == expected


@pytest.mark.parametrize("peaks_mb", [[150.0] * (LEARNED - 1), [60.0] * LEARNED, [90.0] * 15 + [150.0] * 5])
def test_too_few_calls_and_a_fitting_declaration_are_no_finding(peaks_mb: list[float]) -> None:
    assert findings(peaks_mb) == []


def test_what_reserves_nothing_is_told_so() -> None:
    needs, offered = learned((50, [], "p")), {"run": a_capability(runner="http", argv=(), url="http://localhost/x")}
    external = a_manifest(capabilities=offered)
    ours = replace(external, service=Service(("python3", "serve.py")))
    by_basis = {
        "none": [needs.told(external, reserves=True), needs.told(ours, reserves=False)],
        "declared": [needs.told(ours, reserves=True)],
    }
    assert {basis: {told["run"]["basis"] for told in all_} for basis, all_ in by_basis.items()} == {
        "none": {"none"},
        "declared": {"declared"},
    }
    assert by_basis["none"][0]["run"]["reserved_mb"] == 0


# --- Over HTTP, and without a server -----------------------------------------------------------------------------


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    add_native(settings.overlays, "two", {"small": {"runner": "proc", "memory": STEPS}, "other": {"runner": "proc"}})
    add_overlay(settings.overlays, "quiet")
    (settings.overlays / "broken").mkdir()
    runner = InProcessRunner(lambda _: Outcome(result={}, peak_mb=4.0, peak_floor_mb=1.0))
    with TestClient(create_app(bus=Bus(settings, plugins=[FixedStress(0.9), runner]))) as client:
        for _ in range(LEARNED):
            assert client.post("/invoke/two/small", json={"phase": "OPEN", "data": {}}).json()["ok"]
        yield client


def test_the_list_flags_what_declares_far_from_what_it_needs(client: TestClient) -> None:
    listed = {one["name"]: one["findings"] for one in client.get("/overlays").json()["overlays"]}
    assert listed["quiet"] == listed["broken"] == []
    assert len(listed["two"]) == 1
    assert "small: stays under a tenth of its SOFT of 100 MiB" in listed["two"][0]


def test_an_overlay_is_shown_with_what_its_calls_needed(client: TestClient) -> None:
    shown = client.get("/overlays/two").json()
    measured = shown["details"]["small"]["measured"]
    figures = {name: measured[name] for name in ("measured_calls", "median_mb", "p95_mb", "peak_mb", "basis")}
    assert figures == {"measured_calls": LEARNED, "median_mb": 4, "p95_mb": 4, "peak_mb": 4, "basis": "measured"}
    assert measured["reserved_mb"] == 4.4
    assert [(step["step"], step["calls"]) for step in measured["degradation"]] == [
        ("CONTEXT(64)", LEARNED),
        ("BATCH(ASYNC)", LEARNED),
    ]
    assert shown["details"]["other"]["measured"]["measured_calls"] == 0
    assert client.get("/overlays/broken").json()["details"] == {}


def test_what_is_shown_has_the_form_that_is_promised(client: TestClient) -> None:
    validator = Draft202012Validator(openapi.document([], [], needs_token=False)["components"]["schemas"]["Overlay"])
    for name in ("two", "quiet", "broken"):
        assert list(validator.iter_errors(client.get(f"/overlays/{name}").json())) == []
    damaged = client.get("/overlays/two").json()
    del damaged["details"]["small"]["measured"]["degradation"][0]["payloads"]
    assert list(validator.iter_errors(damaged)) != []


def test_a_bus_that_starts_anew_remembers(client: TestClient, settings: Settings) -> None:
    with TestClient(create_app(bus=Bus(settings, plugins=[InProcessRunner()]))) as again:
        told = [other.get("/overlays/two").json()["details"] for other in (client, again)]
    assert told[0]["small"]["measured"] == told[1]["small"]["measured"]


def test_the_command_line_recalls_it_from_the_ledger(
    client: TestClient, plain_environment: None, aal: Callable[..., Ran]
) -> None:
    served = client.get("/overlays/two").json()
    shown = aal("overlays", "show", "two", "--json").json
    assert shown["details"]["small"]["measured"] == served["details"]["small"]["measured"]
    assert shown["findings"] == served["findings"]
    listed = {one["name"]: one["findings"] for one in aal("overlays", "list", "--json").json["overlays"]}
    assert listed == {"two": served["findings"], "quiet": [], "broken": []}
    assert f"two: {served['findings'][0]}" in aal("overlays", "list").out.splitlines()
    told = aal("overlays", "show", "two").out
    assert "median 4.0, p95 4.0, most 4.0 MiB, of the last 20 calls" in told
    assert "in force of 20 calls: median 4.0 MiB, without unknown" in told
    assert f"memory   {served['findings'][0]}" in told


def test_a_ledger_with_nonsense_keeps_no_overlay_from_being_listed(aal: Callable[..., Ran], settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    settings.logs.mkdir()
    odd = (line("x"), line(code=[1]), line(memory=3), line(overlay=7), {"type": "invoke"}, 5)
    marks = {"seq": 9, "hash": "x", "timestamp_ms": 1}
    texts = [json.dumps(marks | one if isinstance(one, dict) else one) for one in odd]
    settings.ledger.write_text("".join(f"{text}\n" for text in texts))
    assert aal("overlays", "list", "--json").json["overlays"][0]["findings"] == []
