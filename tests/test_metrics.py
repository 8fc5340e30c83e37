"""What `GET /metrics` tells Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from bus.app import create_app
from bus.dispatch import Bus
from runners.base import Outcome
from tests.support import FixedStress, InProcessRunner, add_overlay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus.settings import Settings

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
