"""What `GET /metrics` tells Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from bus.app import create_app
from bus.dispatch import Bus
from bus.metrics import Metrics
from runners.base import Outcome
from tests.support import FixedStress, InProcessRunner, a_call, add_native, add_overlay, running_bus, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus.settings import Settings
    from runners.base import Job

Labels = frozenset[tuple[str, str]]


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    add_overlay(settings.overlays, "echo")
    with TestClient(create_app(bus=Bus(settings, plugins=[FixedStress(0.25), InProcessRunner()]))) as client:
        yield client


def scrape(client: TestClient) -> dict[tuple[str, Labels], float]:
    """Every sample by name and labels."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def labels(**values: str) -> Labels:
    return frozenset(values.items())


def test_calls_are_counted_by_overlay_phase_and_code(client: TestClient) -> None:
    for _ in range(3):
        client.post("/invoke/echo", json={"phase": "OPEN", "data": {}})
    client.post("/invoke/echo", json={"phase": "ASCEND", "data": {}})
    samples = scrape(client)
    assert samples["aal_calls_total", labels(overlay="echo", phase="OPEN", code="OK")] == 3
    assert samples["aal_calls_total", labels(overlay="echo", phase="ASCEND", code="ERR_PERMISSION_DENIED")] == 1
    assert samples["aal_call_seconds_count", labels(overlay="echo")] == 4
    assert samples["aal_queue_seconds_count", labels(overlay="echo")] == 3


def test_names_that_do_not_exist_cannot_make_the_metrics_grow(client: TestClient) -> None:
    for n in range(5):
        client.post(f"/invoke/made-up-{n}", json={"phase": "OPEN", "data": {}})
        client.post(f"/invoke/made-up-{n}", content=b"not json", headers={"Content-Type": "application/json"})
    samples = scrape(client)
    assert samples["aal_calls_total", labels(overlay="unknown", phase="OPEN", code="ERR_UNKNOWN_OVERLAY")] == 5
    assert samples["aal_calls_total", labels(overlay="unknown", phase="", code="ERR_BAD_JSON")] == 5
    assert not any("made-up" in value for _, found in samples for _, value in found)


def test_codes_that_an_overlay_makes_up_cannot_make_the_metrics_grow(settings: Settings) -> None:
    count = iter(range(100))
    runner = InProcessRunner(lambda _: Outcome(result={"ok": False, "code": f"ERR_MADE_UP_{next(count)}"}))
    add_overlay(settings.overlays, "inventive")
    with TestClient(create_app(bus=Bus(settings, plugins=[runner]))) as client:
        for _ in range(5):
            client.post("/invoke/inventive", json={"phase": "OPEN", "data": {}})
        samples = scrape(client)
    assert samples["aal_calls_total", labels(overlay="inventive", phase="OPEN", code="ERR_OVERLAY_FAILED")] == 5


def test_the_state_of_the_bus_is_read_at_the_scrape(client: TestClient) -> None:
    before = scrape(client)
    assert before["aal_stress", labels()] == 0.25
    assert (before["aal_running", labels()], before["aal_waiting", labels()]) == (0, 0)
    assert (before["aal_ledger_healthy", labels()], before["aal_ledger_size", labels()]) == (1, 0)
    client.post("/invoke/echo", json={"phase": "OPEN", "data": {}})
    assert scrape(client)["aal_ledger_size", labels()] == 2


def test_requests_refused_before_their_caller_was_known_are_counted(client: TestClient) -> None:
    for _ in range(2):
        assert client.get("/overlays", headers={"Host": "elsewhere.example"}).status_code == 403
    assert scrape(client)["aal_refused_requests_total", labels(code="ERR_ORIGIN")] == 2


def test_two_buses_count_apart(settings: Settings, client: TestClient) -> None:
    client.post("/invoke/echo", json={"phase": "OPEN", "data": {}})
    with TestClient(create_app(settings)) as other:
        assert not any(name == "aal_calls_total" for name, _ in scrape(other))


RUNE = "MEM[SOFT=100,HARD=400,VOL=LOW];PRIORITY=0;DEGRADE{STEP1:CONTEXT(64)}"
CALL = {"phase": "OPEN", "data": {}}


@contextlib.contextmanager
def weighed(settings: Settings, peak_mb: float, stress: float) -> Iterator[TestClient]:
    """A bus under this stress whose calls all have this peak, and which has had one of them."""
    if not (settings.overlays / "heavy").exists():
        add_native(settings.overlays, "heavy", {"run": {"runner": "proc", "memory": RUNE}})
    runner = InProcessRunner(lambda _: Outcome(result={}, peak_mb=peak_mb))
    with TestClient(create_app(bus=Bus(settings, plugins=[FixedStress(stress), runner]))) as client:
        client.post("/invoke/heavy", json=CALL)
        yield client


def test_memory_is_told_by_overlay_and_capability(settings: Settings) -> None:
    with weighed(settings, 20.0, 0.25) as client:
        samples = scrape(client)
    assert samples["aal_peak_mb_bucket", labels(overlay="heavy", le="16.0")] == 0
    assert samples["aal_peak_mb_bucket", labels(overlay="heavy", le="32.0")] == 1
    assert samples["aal_peak_mb_sum", labels(overlay="heavy")] == 20
    assert samples["aal_reserved_mb", labels(overlay="heavy", capability="run")] == 100
    assert (samples["aal_memory_claimed_mb", labels()], samples["aal_evictions_total", labels()]) == (0, 0)
    assert samples["aal_memory_room_mb", labels()] > 0
    assert not any(name in {"aal_degraded_calls_total", "aal_step_median_mb"} for name, _ in samples)


def test_degradation_steps_are_counted_and_their_medians_told(settings: Settings) -> None:
    with weighed(settings, 20.0, 0.25):
        pass
    with weighed(settings, 8.0, 0.9) as client:  # it recalls the other's call from the ledger
        samples = scrape(client)
    assert samples["aal_degraded_calls_total", labels(overlay="heavy", step="CONTEXT(64)")] == 1
    where = {"overlay": "heavy", "capability": "run", "step": "CONTEXT(64)"}
    assert samples["aal_step_median_mb", frozenset({**where, "with": "yes"}.items())] == 8
    assert samples["aal_step_median_mb", frozenset({**where, "with": "no"}.items())] == 20


def test_runes_that_callers_make_up_cannot_make_the_metrics_grow(settings: Settings) -> None:
    with weighed(settings, 8.0, 0.9) as client:
        for n in range(1, 6):
            client.post("/invoke/heavy", json=CALL | {"profile": RUNE.replace("64", str(n))})
        samples = scrape(client)
    steps = {
        dict(found)["step"]: value for (name, found), value in samples.items() if name == "aal_degraded_calls_total"
    }
    assert steps == {"CONTEXT(64)": 1, "CONTEXT": 5}
    assert {dict(found)["step"] for name, found in samples if name == "aal_step_median_mb"} == {"CONTEXT(64)"}


async def test_what_calls_waited_for_is_counted(settings: Settings) -> None:
    gate, metrics = asyncio.Event(), Metrics()

    async def answer(_: Job) -> Outcome:
        await gate.wait()
        return Outcome(result={})

    add_native(settings.overlays, "one", {"run": {"runner": "proc", "concurrency": 1}})
    async with running_bus(settings, InProcessRunner(answer), metrics) as bus:
        calls = [asyncio.create_task(bus.invoke(a_call("one"))) for _ in range(3)]
        await until(lambda: bus.scheduler.waiting == 2)
        gate.set()
        assert all(answered.ok for answered in await asyncio.gather(*calls))
    waited = {
        sample.labels["reason"]: sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == "aal_waited_total"
    }
    assert waited == {"concurrency": 2}
