"""The HTTP side: the shapes that clients rely on, and what only a real server shows."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from bus import envelopes, provenance, resources, verification
from bus.app import WATCH_AFTER_S, _Clients, create_app
from bus.dispatch import Bus
from bus.hookspecs import hookimpl
from bus.model import Phase
from bus.tokens import SCOPES, Rate, Tokens
from runners.base import Outcome
from runners.kernel import Kernel
from tests.programs import running
from tests.support import (
    PATIENCE_S,
    FixedStress,
    InProcessRunner,
    Server,
    add_native,
    add_overlay,
    add_script,
    calls,
    eventually,
    misfits,
    write_overlay,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.requests import Request
    from starlette.websockets import WebSocket

    from bus.hookspecs import RegisterRoutes
    from bus.settings import Settings

OPEN = {"phase": "OPEN", "data": {}}
JSON = {"Content-Type": "application/json"}
ERROR_BODY = {"ok", "error", "code", "category", "message", "detail", "hint", "retryable", "faults"}


@pytest.fixture
def stress() -> FixedStress:
    return FixedStress(0.25)


@pytest.fixture
def bus(settings: Settings, stress: FixedStress) -> Bus:
    return Bus(replace(settings, stress_period_s=0.01), plugins=[InProcessRunner(), stress])


@pytest.fixture
def client(settings: Settings, bus: Bus) -> Iterator[TestClient]:
    add_overlay(settings.overlays, "echo", description="Says it again.")
    add_native(settings.overlays, "two", {"ping": {"runner": "proc"}, "pong": {"runner": "proc"}})
    write_overlay(settings.overlays, "broken", {"name": "broken"})
    with TestClient(create_app(bus=bus)) as client:
        yield client


# --- Shapes ------------------------------------------------------------------------------------------------------


def test_the_root_says_what_this_is_and_where_to_go(client: TestClient) -> None:
    body = client.get("/").json()
    assert (body["service"], body["version"], body["status"]) == ("aal-core", resources.version(), "ok")
    assert {"/overlays", "/invoke/{name}", "/provenance", "/stress", "/metrics", "/health"} <= set(body["paths"])


def test_health_and_ready(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"ready": True}


def test_the_list_of_overlays_shows_the_good_and_the_broken(client: TestClient) -> None:
    overlays = {entry["name"]: entry for entry in client.get("/overlays").json()["overlays"]}
    assert list(overlays) == ["broken", "echo", "two"]
    echo = overlays["echo"]
    assert (echo["version"], echo["status"], echo["description"]) == ("1.0.0", "active", "Says it again.")
    assert echo["phases"] == ["OPEN", "ALIGN", "CLEAR", "SEAL"]
    assert echo["capabilities"] == ["analysis"]
    assert overlays["two"]["capabilities"] == ["ping", "pong"]
    assert overlays["broken"]["status"] == "broken"
    assert overlays["broken"]["faults"]


def test_one_overlay_is_shown_with_its_capabilities(client: TestClient) -> None:
    assert set(client.get("/overlays/two").json()["details"]) == {"ping", "pong"}
    assert client.get("/overlays/two").json()["scratch"] == {"LOCAL": {"place": "memory", "mb": 256}}
    broken = client.get("/overlays/broken").json()
    assert (bool(broken["error"]), broken["scratch"]) == (True, {})
    missing = client.get("/overlays/nobody")
    assert (missing.status_code, missing.json()["code"]) == (404, "ERR_UNKNOWN_OVERLAY")


def test_an_answer_has_its_form_and_names_its_request(client: TestClient, settings: Settings) -> None:
    response = client.post("/invoke/echo", json={"phase": "OPEN", "data": {"a": 1}})
    body = response.json()
    assert response.status_code == 200
    assert misfits("outcome", body) == []
    assert response.headers["X-Request-Id"] == body["request_id"]
    assert body["result"]["payload"] == {"a": 1}
    (line,) = calls(settings)
    assert (line["request_id"], line["hash"]) == (body["request_id"], body["provenance"]["hash"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/invoke/two/pong", OPEN),
        ("/invoke/two.pong", OPEN),
        ("/invoke/two", OPEN | {"capability": "pong"}),
        ("/invoke/two/two.pong", OPEN),
        ("/invoke/two", OPEN | {"capability": "two.pong"}),
    ],
)
def test_a_capability_stands_in_the_path_behind_a_dot_or_in_the_body(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["capability"]) == (200, "pong")


def test_a_capability_must_be_named_where_there_are_two(client: TestClient) -> None:
    response = client.post("/invoke/two", json=OPEN)
    assert (response.status_code, response.json()["code"]) == (404, "ERR_UNKNOWN_CAPABILITY")
    assert "ping" in response.json()["detail"]


def test_a_disabled_overlay_is_409_until_it_is_enabled(client: TestClient, settings: Settings) -> None:
    settings.state.mkdir(exist_ok=True)
    state = settings.state / "overlays.json"
    state.write_text(json.dumps({"disabled": ["echo"]}))
    response = client.post("/invoke/echo", json=OPEN)
    assert (response.status_code, response.json()["code"]) == (409, "ERR_OVERLAY_DISABLED")
    assert "aal overlays enable" in response.json()["hint"]
    state.unlink()
    assert client.post("/invoke/echo", json=OPEN).status_code == 200


def test_a_refusal_for_want_of_room_says_when_to_come_again(client: TestClient, stress: FixedStress) -> None:
    stress.value = 1.0
    eventually(lambda: client.get("/stress").json()["stress"] == 1.0, "the stress is sampled")
    response = client.post("/invoke/echo", json=OPEN)
    assert (response.status_code, response.json()["code"]) == (503, "ERR_STRESS")
    assert int(response.headers["Retry-After"]) >= 1


def test_stress_is_told_with_its_sources_and_what_the_scheduler_does(client: TestClient) -> None:
    body = client.get("/stress").json()
    assert (body["stress"], body["band"]) == (0.25, "MODERATE")
    assert body["sources"] == {"memory": 0.25, "pressure": None}
    assert body["machine"]["total_mb"] > 0
    assert (body["scheduler"]["running"], body["scheduler"]["waiting"]) == (0, 0)


def test_the_metrics_name_the_calls(client: TestClient) -> None:
    client.post("/invoke/echo", json=OPEN)
    assert 'aal_calls_total{code="OK",overlay="echo",phase="OPEN"} 1.0' in client.get("/metrics").text


# --- The ledger over HTTP ----------------------------------------------------------------------------------------


def test_the_ledger_is_told_oldest_first_with_its_count(client: TestClient) -> None:
    assert client.get("/provenance").json() == {"events": [], "count": 0}
    for name in ("echo", "nobody", "two/ping"):
        client.post(f"/invoke/{name}", json=OPEN)
    body = client.get("/provenance").json()
    assert [event["type"] for event in body["events"]] == ["invoke", "environment", "denied", "invoke"]
    assert body["count"] == 4
    assert [event["seq"] for event in client.get("/provenance?limit=2").json()["events"]] == [3, 4]
    assert [event["seq"] for event in client.get("/provenance?overlay=two").json()["events"]] == [4]
    assert [event["seq"] for event in client.get("/provenance?ok=false").json()["events"]] == [3]
    (failed,) = client.get("/provenance?ok=false&phase=OPEN&until=9007199254740992").json()["events"]
    assert client.get(f"/provenance?code={failed['code']}").json()["events"] == [failed]
    assert client.get("/provenance?caller=nobody").json()["count"] == 0
    assert client.get("/provenance?until=1").json()["count"] == 0
    since = body["events"][-1]["timestamp_ms"] + 1
    assert client.get(f"/provenance?since={since}").json() == {"events": [], "count": 0}


def test_one_line_is_told_as_it_stands(client: TestClient, settings: Settings) -> None:
    client.post("/invoke/echo", json=OPEN)
    assert client.get("/provenance/1").json() == next(provenance.iter_lines(settings.ledger))
    for seq in ("3", "0", "99999999999999999999", "9" * 5000, "-1", "x"):
        response = client.get(f"/provenance/{seq}")
        assert (response.status_code, response.json()["code"]) == (404, "ERR_NOT_FOUND")


def test_a_body_that_is_encoded_is_refused_with_what_is_allowed(client: TestClient) -> None:
    response = client.post("/invoke/echo", json=OPEN, headers={"Content-Encoding": "gzip"})
    assert (response.status_code, response.json()["code"]) == (415, "ERR_CONTENT_TYPE")
    assert 'content encoding "gzip", allowed: identity' in response.json()["detail"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("limit=0", 'limit="0", allowed: a whole number, 1 to'),
        ("limit=-1", 'limit="-1"'),
        ("limit=1e3", 'limit="1e3"'),
        ("limit=²", 'limit="²"'),
        ("limit=99999999999", 'limit="99999999999"'),
        ("limit=" + "9" * 5000, 'limit="999'),
        ("limit=٣", 'limit="٣"'),
        ("ok=maybe", 'ok="maybe", allowed: true or false'),
        ("since=yesterday", 'since="yesterday"'),
        ("until=-1", 'until="-1"'),
        ("phase=open", 'phase="open", allowed: OPEN, ALIGN'),
        ("limt=1", 'unknown: ["limt"]; known: limit, overlay, phase, ok, code, caller, since, until'),
    ],
)
def test_a_query_that_cannot_be_is_refused_with_what_is_allowed(client: TestClient, query: str, said: str) -> None:
    response = client.get(f"/provenance?{query}")
    assert (response.status_code, response.json()["code"]) == (400, "ERR_BAD_QUERY")
    assert said in response.json()["detail"]


# --- Replay over HTTP --------------------------------------------------------------------------------------------


@pytest.fixture
def steady(settings: Settings) -> Iterator[TestClient]:
    """A bus whose overlays answer the same each time; `pure` says so, `plain` does not."""
    add_overlay(settings.overlays, "pure", policy={"deterministic": True})
    add_overlay(settings.overlays, "plain")
    runner = InProcessRunner(lambda job: Outcome(result=json.loads(job.envelope)["payload"]))
    with TestClient(create_app(bus=Bus(settings, plugins=[runner]))) as client:
        yield client


def test_a_line_is_run_again_over_http_and_leaves_its_own(steady: TestClient, settings: Settings) -> None:
    steady.post("/invoke/pure", json={"phase": "OPEN", "data": {"n": 1}})
    ways: tuple[dict[str, Any], ...] = ({"json": {}}, {"json": {"live": False}}, {"headers": JSON})
    for sent in ways:
        response = steady.post("/provenance/1/replay", **sent)
        body = response.json()
        assert (response.status_code, body["verdict"], body["outcome"]["result"]) == (200, "MATCH", {"n": 1})
        assert misfits("replay", body) == []
    assert [(line["type"], line["replay_of"]) for line in calls(settings)] == [("invoke", None), *[("replay", 1)] * 3]


def test_a_drift_over_http_has_its_difference_and_its_cause(settings: Settings) -> None:
    folder = add_script(settings.overlays, "pure", "echo '{\"n\": 1}'", policy={"deterministic": True})
    with TestClient(create_app(settings)) as client:
        client.post("/invoke/pure", json=OPEN)
        (folder / "run.sh").write_text("echo '{\"n\": 2}'")
        body = client.post("/provenance/1/replay", json={}).json()
    assert misfits("replay", body) == []
    assert (body["verdict"], body["diff"]) == ("DRIFT", [{"path": "/n", "was": "1", "is": "2"}])
    assert body["cause"]["names"] == ["code"]


def test_what_could_change_something_is_run_again_only_where_that_is_said(
    steady: TestClient, settings: Settings
) -> None:
    steady.post("/invoke/plain", json=OPEN)
    response = steady.post("/provenance/1/replay", json={})
    assert (response.status_code, response.json()["code"]) == (409, "ERR_NEEDS_LIVE")
    assert '{"live": true}' in response.json()["hint"]
    assert len(calls(settings)) == 1
    assert steady.post("/provenance/1/replay", json={"live": True}).json()["verdict"] == "MATCH"


@pytest.mark.parametrize(
    ("seq", "content", "status", "code"),
    [
        ("1", b'{"live": 1}', 400, "ERR_BAD_REQUEST"),
        ("1", b'{"liv": true}', 400, "ERR_BAD_REQUEST"),
        ("1", b"[]", 400, "ERR_BAD_REQUEST"),
        ("1", b"{", 400, "ERR_BAD_JSON"),
        ("1", b" " * 2_000_000, 413, "ERR_TOO_LARGE"),
        ("2", b"{}", 409, "ERR_NOT_REPLAYABLE"),
        ("9", b"{}", 404, "ERR_NOT_FOUND"),
        ("x", b"{}", 404, "ERR_NOT_FOUND"),
    ],
)
def test_a_replay_that_cannot_be_is_refused_with_its_reason(
    settings: Settings, seq: str, content: bytes, status: int, code: str
) -> None:
    add_overlay(settings.overlays, "pure", policy={"deterministic": True})
    bus = Bus(replace(settings, max_body_mb=1), plugins=[InProcessRunner()])
    with TestClient(create_app(bus=bus)) as client:
        client.post("/invoke/pure", json=OPEN)
        response = client.post(f"/provenance/{seq}/replay", content=content, headers=JSON)
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert client.post("/provenance/1/replay", content=b"live=1").status_code == 415
    assert len(calls(settings)) == 1


def test_a_token_runs_again_what_it_may_call_and_nothing_else(steady: TestClient, settings: Settings) -> None:
    steady.post("/invoke/pure", json=OPEN)
    own = make_token(settings, "own", overlays=("pure",), scopes=("replay",))
    for name, limits, status, code in (
        ("reader", {"scopes": ("invoke", "read-ledger")}, 403, "ERR_FORBIDDEN"),
        ("other", {"overlays": ("plain",)}, 404, "ERR_NOT_FOUND"),
        ("clear", {"phases": (Phase.CLEAR,)}, 403, "ERR_FORBIDDEN"),
    ):
        response = steady.post(
            "/provenance/1/replay", json={"live": True}, headers=make_token(settings, name, **limits)
        )
        assert (response.status_code, response.json()["code"]) == (status, code)
    assert steady.post("/provenance/1/replay", json={}).status_code == 401
    assert steady.post("/provenance/1/replay", json={}, headers=own).json()["verdict"] == "MATCH"
    told = [(line["type"], line["caller"], line["code"]) for line in calls(settings)[1:]]
    assert told == [("denied", "clear", "ERR_FORBIDDEN"), ("replay", "own", "OK")]


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing/here", 404, "ERR_NOT_FOUND"),
        ("GET", "/provenance/first", 404, "ERR_NOT_FOUND"),
        ("GET", "/invoke/echo", 405, "ERR_METHOD"),
        ("POST", "/overlays", 405, "ERR_METHOD"),
        ("DELETE", "/", 405, "ERR_METHOD"),
    ],
)
def test_an_address_or_method_that_is_not_there_has_the_error_body(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert set(response.json()) == ERROR_BODY
    assert (status == 405) == ("Allow" in response.headers)


def test_a_fault_of_the_bus_is_500_with_a_code_and_no_traceback(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Bus(settings)

    def fail() -> None:
        raise ZeroDivisionError("a secret of the bus")

    monkeypatch.setattr(bus.stress, "report", fail)
    with TestClient(create_app(bus=bus), raise_server_exceptions=False) as client:
        response = client.get("/stress")
    assert (response.status_code, response.json()["code"]) == (500, "ERR_INTERNAL")
    assert "a secret of the bus" not in response.text
    assert "a secret of the bus" in caplog.text


def test_a_fault_in_a_call_is_500_with_a_code_and_no_traceback(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret of the bus")

    monkeypatch.setattr(envelopes, "read_invocation", fail)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        for _ in range(2):  # the first one starts the bus
            response = client.post("/invoke/echo", json=OPEN)
            assert (response.status_code, response.json()["code"]) == (500, "ERR_INTERNAL")
            assert "a secret of the bus" not in response.text
    assert caplog.text.count("POST /invoke/echo failed") == 2


@pytest.mark.parametrize("path", ["/invoke", "/invoke/", "/invoke/a/b/c", "/invoke//b"])
def test_a_path_that_names_no_call_is_not_found(client: TestClient, path: str) -> None:
    response = client.post(path, json=OPEN, follow_redirects=False)
    assert (response.status_code, response.json()["code"]) == (404, "ERR_NOT_FOUND")


def test_a_bus_that_cannot_write_is_not_ready_and_yet_alive(settings: Settings) -> None:
    settings.logs.write_text("a file in the place of the folder")
    with TestClient(create_app(settings)) as client:
        response = client.get("/ready")
        assert (response.status_code, response.json()["ready"]) == (503, False)
        assert "cannot be written" in response.json()["reason"]
        assert client.get("/health").status_code == 200
        refused = client.post("/invoke/nobody", json=OPEN)
        assert refused.json()["code"] == "ERR_UNKNOWN_OVERLAY"
        assert refused.json()["provenance"] is None


def test_without_lifespan_the_bus_starts_at_the_first_request(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    bus = Bus(settings, plugins=[InProcessRunner()])
    client = TestClient(create_app(bus=bus))
    assert client.post("/invoke/echo", json=OPEN).status_code == 200
    assert len(calls(settings)) == 1
    bus.ledger.close()


def test_the_largest_body_is_a_setting(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    with TestClient(create_app(bus=Bus(replace(settings, max_body_mb=0.001), plugins=[InProcessRunner()]))) as client:
        assert client.post("/invoke/echo", json=OPEN | {"data": {"a": "x" * 900}}).status_code == 200
        refused = client.post("/invoke/echo", json=OPEN | {"data": {"a": "x" * 1100}})
    assert (refused.status_code, refused.json()["code"]) == (413, "ERR_TOO_LARGE")
    assert "allowed: 1048" in refused.json()["detail"]


# --- Who asks, and from where ------------------------------------------------------------------------------------

FOREIGN = [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("path", ["/", "/health", "/overlays", "/provenance", "/nothing", "/invoke/echo"])
def test_what_comes_from_a_foreign_place_is_refused_counted_and_not_written_down(
    client: TestClient, settings: Settings, bus: Bus, path: str, headers: dict[str, str]
) -> None:
    for number, method in enumerate(("GET", "POST", "OPTIONS"), 1):
        response = client.request(method, path, headers=headers, json=OPEN if method == "POST" else None)
        assert (response.status_code, response.json()["code"]) == (403, "ERR_ORIGIN")
        assert set(response.json()) == ERROR_BODY
        assert response.headers["X-Request-Id"]
        assert bus.refused_before_auth == {"ERR_ORIGIN": number}
    assert calls(settings) == []


def test_no_browser_is_told_that_it_may_read_an_answer(client: TestClient) -> None:
    preflight = {"Origin": "http://testserver", "Access-Control-Request-Method": "POST"}
    for response in (
        client.get("/overlays", headers={"Origin": "http://testserver"}),
        client.post("/invoke/echo", json=OPEN, headers={"Origin": "http://testserver"}),
        client.options("/invoke/echo", headers=preflight),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert client.options("/invoke/echo", headers=preflight).status_code == 405


def test_pages_of_a_listed_origin_may_call_and_read(settings: Settings) -> None:
    add_overlay(settings.overlays, "echo")
    page = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
    make_token(settings, scopes=("invoke",))
    with TestClient(
        create_app(bus=Bus(replace(settings, origins="https://app.example"), plugins=[InProcessRunner()]))
    ) as client:
        asked = client.options("/invoke/echo", headers=page | {"Access-Control-Request-Method": "POST"})
        refused = client.post("/invoke/echo", json=OPEN, headers=page)
    assert (asked.status_code, asked.content) == (204, b"")
    assert "authorization" in asked.headers["Access-Control-Allow-Headers"]
    assert refused.status_code == 401
    for response in (asked, refused):
        assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "Access-Control-Allow-Credentials" not in response.headers


def make_token(settings: Settings, name: str = "ci", **limits: Any) -> dict[str, str]:
    """A token that allows everything but what `limits` say; gives the header that shows it."""
    values: dict[str, Any] = {"overlays": ("*",), "phases": tuple(Phase), "scopes": SCOPES}
    return {"Authorization": f"Bearer {Tokens(settings.state).create(name, **values | limits)[1]}"}


def test_with_tokens_each_request_needs_one_but_those_that_ask_whether_it_lives(
    client: TestClient, settings: Settings, bus: Bus
) -> None:
    assert client.get("/overlays").status_code == 200
    known = make_token(settings)
    for path in ("/", "/overlays", "/provenance", "/stress", "/metrics", "/openapi.json", "/nothing"):
        response = client.get(path)
        assert (response.status_code, response.json()["code"]) == (401, "ERR_UNAUTHORIZED")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert client.get(path, headers=known).status_code == (404 if path == "/nothing" else 200)
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200
    assert calls(settings) == []
    assert bus.refused_before_auth == {"ERR_UNAUTHORIZED": 7}


def test_a_call_carries_its_callers_name_into_the_ledger(client: TestClient, settings: Settings) -> None:
    known = make_token(settings)
    unknown = client.post("/invoke/echo", json=OPEN)
    assert (unknown.status_code, unknown.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert client.post("/invoke/echo", json=OPEN, headers=known).status_code == 200
    assert client.post("/invoke/echo", content=b"{", headers=known | JSON).status_code == 400
    assert [(line["caller"], line["code"]) for line in calls(settings)] == [("ci", "OK"), ("ci", "ERR_BAD_JSON")]
    Tokens(settings.state).revoke("ci")
    make_token(settings, "other")
    assert client.post("/invoke/echo", json=OPEN, headers=known).status_code == 401


def test_a_call_that_a_token_does_not_allow_is_refused_by_name_and_written_down(
    client: TestClient, settings: Settings
) -> None:
    reader = make_token(settings, "reader", scopes=("read-ledger",))
    limited = make_token(settings, "limited", overlays=("two",), phases=(Phase.CLEAR,))
    for headers, path, lacking in (
        (reader, "/invoke/echo", "scope invoke"),
        (limited, "/invoke/echo", "overlay"),
        (limited, "/invoke/two/ping", "phase OPEN"),
    ):
        response = client.post(path, json=OPEN, headers=headers)
        assert (response.status_code, response.json()["code"]) == (403, "ERR_FORBIDDEN")
        assert lacking in response.json()["detail"]
        assert misfits("outcome", response.json()) == []
    told = [(line["caller"], line["overlay"], line["code"], line["type"]) for line in calls(settings)]
    assert told == [
        ("reader", "echo", "ERR_FORBIDDEN", "denied"),
        ("limited", "echo", "ERR_FORBIDDEN", "denied"),
        ("limited", "two", "ERR_FORBIDDEN", "denied"),
    ]


def test_a_call_that_comes_too_soon_is_told_when_to_come_again_and_written_down(
    client: TestClient, settings: Settings
) -> None:
    slow = make_token(settings, "slow", rate=Rate(1, "h"))
    assert client.post("/invoke/echo", json=OPEN, headers=slow).status_code == 200
    for path in ("/invoke/echo", "/overlays"):
        response = client.request("POST" if "invoke" in path else "GET", path, headers=slow)
        assert (response.status_code, response.json()["code"]) == (429, "ERR_RATE_LIMITED")
        assert int(response.headers["Retry-After"]) > 3000
    assert [(line["caller"], line["code"]) for line in calls(settings)] == [
        ("slow", "OK"),
        ("slow", "ERR_RATE_LIMITED"),
    ]


@pytest.mark.parametrize("scopes", [SCOPES, ("read-ledger",)], ids=["may call", "may not call"])
def test_who_is_refused_again_and_again_leaves_few_lines(
    client: TestClient, settings: Settings, bus: Bus, scopes: tuple[Any, ...]
) -> None:
    known = make_token(settings, rate=Rate(1, "h"), scopes=scopes)
    client.post("/invoke/echo", json=OPEN, headers=known)
    assert client.get("/overlays", headers=known).status_code == 429  # leaves no line, and is not the one that does
    for number in range(20):
        response = client.post("/invoke/echo", json=OPEN, headers=known)
        assert (response.status_code, response.json()["code"]) == (429, "ERR_RATE_LIMITED")
        assert int(response.headers["Retry-After"]) > 3000
        assert bus.refused_before_auth["ERR_RATE_LIMITED"] == number
    assert [line["code"] for line in calls(settings)][1:] == ["ERR_RATE_LIMITED"]


def test_a_token_is_shown_its_own_overlays_only(client: TestClient, settings: Settings) -> None:
    narrow = make_token(settings, overlays=("ec*", "nobody"))
    listed = client.get("/overlays", headers=narrow).json()["overlays"]
    assert [entry["name"] for entry in listed] == ["echo"]
    assert client.get("/overlays/echo", headers=narrow).status_code == 200
    told = [client.get(f"/overlays/{name}", headers=narrow) for name in ("two", "twx", "broken")]
    assert [(answer.status_code, answer.json()["code"]) for answer in told] == [(404, "ERR_UNKNOWN_OVERLAY")] * 3
    assert len({re.sub('"[a-z]+"', "NAME", answer.json()["detail"]) for answer in told}) == 1
    paths = client.get("/openapi.json", headers=narrow).json()["paths"]
    assert "/invoke/echo" in paths
    assert not [path for path in paths if "two" in path]


def test_a_token_reads_the_lines_of_its_own_overlays_only(client: TestClient, settings: Settings) -> None:
    everything, narrow = make_token(settings, "all"), make_token(settings, overlays=("ec*",))
    for name in ("echo", "two", "echo"):
        client.post(f"/invoke/{name}", json={"phase": "OPEN"}, headers=everything)
    assert [line["overlay"] for line in calls(settings)] == ["echo", "two", "echo"]
    seqs = {line["overlay"]: line["seq"] for line in calls(settings)}
    shown = client.get("/provenance", headers=narrow).json()["events"]
    assert [line["overlay"] for line in shown if line["type"] == "invoke"] == ["echo", "echo"]
    assert "two" in client.get("/provenance?overlay=two", headers=everything).text
    assert client.get("/provenance?overlay=two", headers=narrow).json()["count"] == 0
    assert client.get(f"/provenance/{seqs['echo']}", headers=narrow).json()["overlay"] == "echo"
    assert client.get(f"/provenance/{seqs['two']}", headers=everything).json()["overlay"] == "two"
    refused = client.get(f"/provenance/{seqs['two']}", headers=narrow)
    assert (refused.status_code, refused.json()["code"]) == (404, "ERR_NOT_FOUND")


def test_what_runs_for_an_overlay_is_told_without_secrets(
    client: TestClient, settings: Settings, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus.secrets.redactor.learn([("API_KEY", "a value that nobody may see")])
    (runner,) = (runner for runner in bus.runners.values() if isinstance(runner, InProcessRunner))
    state = {"service": {"last_error": "refused: a value that nobody may see"}}
    monkeypatch.setattr(runner, "state", lambda _: state)
    one = client.get("/overlays/echo").json()["running"]
    (listed,) = (entry for entry in client.get("/overlays").json()["overlays"] if entry["name"] == "echo")
    assert one == listed["running"] == {"service": {"last_error": "refused: [secret API_KEY]"}}


def test_what_is_not_a_call_is_held_to_its_scope_too(client: TestClient, settings: Settings) -> None:
    caller = make_token(settings, scopes=("invoke",))
    for path, scope in (("/provenance", "read-ledger"), ("/metrics", "admin"), ("/stress", "admin")):
        response = client.get(path, headers=caller)
        assert (response.status_code, response.json()["code"]) == (403, "ERR_FORBIDDEN")
        assert scope in response.json()["detail"]
    assert client.get("/overlays", headers=caller).status_code == 200
    assert calls(settings) == []


def test_an_overlay_that_wants_to_know_its_callers_challenges_who_has_no_token(
    client: TestClient, settings: Settings
) -> None:
    add_native(settings.overlays, "shy", {"run": {"runner": "proc"}}, policy={"requires_auth": True})
    response = client.post("/invoke/shy", json=OPEN)
    assert (response.status_code, response.json()["code"]) == (401, "ERR_CALLER_UNKNOWN")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert client.post("/invoke/shy", json=OPEN, headers=make_token(settings)).status_code == 200


@pytest.mark.parametrize("path", ["/invoke/echo", "/overlays", "/nothing", "/invoke/nobody"])
def test_a_clients_own_request_id_comes_back_and_the_bodys_stays_ours(client: TestClient, path: str) -> None:
    method = "POST" if "invoke" in path else "GET"
    known = client.request(method, path, headers={"X-Request-Id": "mine-1"}, json=OPEN)
    assert known.headers["X-Request-Id"] == "mine-1"
    assert known.json().get("request_id") != "mine-1"
    for headers in ({}, {"X-Request-Id": "not <a> word"}, {"X-Request-Id": "x" * 65}):
        answer = client.request(method, path, headers=headers, json=OPEN)
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f-]{21}", answer.headers["X-Request-Id"])


class OwnRoutes:
    """A plugin with a page to send to and a web socket."""

    def __init__(self) -> None:
        self.changes: list[str | None] = []

    @hookimpl
    def aal_routes(self, register: RegisterRoutes) -> None:
        methods = ["POST", "PUT", "DELETE"]
        paths = ("/own", "/overlays/{name}", "/overlays/{name}/disable", "/health", "/health/deep")
        register([*(Route(path, self.change, methods=methods) for path in paths), WebSocketRoute("/talk", self.talk)])

    def change(self, request: Request) -> Response:
        self.changes.append(request.user.name)
        return Response(status_code=204)

    async def talk(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()


def test_the_routes_of_plugins_are_guarded_too(settings: Settings) -> None:
    plugin = OwnRoutes()
    with TestClient(create_app(bus=Bus(settings, plugins=[plugin]))) as client:
        for headers in FOREIGN:
            assert client.post("/own", json={}, headers=headers).status_code == 403
            with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/talk", headers=headers):
                pass
            assert closed.value.code == 1008
        assert client.post("/own", data={"a": "form"}).status_code == 415
        assert client.post("/own", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
        assert plugin.changes == []
        assert client.post("/own", json={}).status_code == 204
        with client.websocket_connect("/talk"):
            pass
        caller, admin = make_token(settings, "caller", scopes=("invoke",)), make_token(settings, "admin")
        assert client.post("/own", json={}, headers=caller).status_code == 403
        assert client.post("/own", json={}, headers=admin).status_code == 204
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk"):
            pass
    assert plugin.changes == [None, "admin"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/overlays/echo", "/overlays/echo/disable", "/health", "/health/deep"])
def test_a_plugins_route_beside_one_of_the_bus_is_for_administrators_and_takes_no_form(
    settings: Settings, method: str, path: str
) -> None:
    plugin = OwnRoutes()
    with TestClient(create_app(bus=Bus(settings, plugins=[plugin]))) as client:
        caller, admin = make_token(settings, "caller", scopes=("invoke",)), make_token(settings, "admin")
        refused = [client.request(method, path, json={}, headers=headers) for headers in ({}, caller)]
        assert [answer.status_code for answer in refused] == [401, 403]
        assert client.request(method, path, data={"a": "form"}, headers=admin).status_code == 415
        assert plugin.changes == []
        assert client.request(method, path, json={}, headers=admin).status_code == 204
    assert plugin.changes == ["admin"]


def test_nobody_writes_lines_of_their_own_into_the_servers_log(
    client: TestClient, bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bus.registry, "entry", fail)
    quiet = TestClient(client.app, raise_server_exceptions=False)
    response = quiet.get("/overlays/x%0AERROR forged")
    assert (response.status_code, response.json()["code"]) == (500, "ERR_INTERNAL")
    assert "GET /overlays/x%0AERROR%20forged failed" in caplog.text
    assert response.headers["X-Request-Id"] in caplog.text


# --- What only a real server shows -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="module")
def server_behind_link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose overlays are reached through a parent that is a symbolic link."""
    folder = tmp_path_factory.mktemp("linked")
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    with Server(folder / "real", overlays=folder / "link/overlays") as server:
        yield server


@pytest.fixture(scope="module")
def server_behind_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose overlays are a bind mount of another folder."""
    folder = tmp_path_factory.mktemp("mounted")
    (folder / "source").mkdir()
    (folder / "overlays").mkdir()
    mount = ["mount", "--bind", str(folder / "source"), str(folder / "overlays")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a folder here")
    try:
        with Server(folder, overlays=folder / "overlays") as server:
            yield server
    finally:
        subprocess.run(["umount", str(folder / "overlays")], check=True)


@pytest.fixture(params=["server", "server_behind_link", "server_behind_mount"])
def any_server(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


def status_of(server: Server, name: str) -> str | None:
    """An overlay's status in the list; None where it is not listed."""
    overlays = server.get("/overlays").json()["overlays"]
    return next((entry["status"] for entry in overlays if entry["name"] == name), None)


def say(word: str) -> str:
    return f"""echo '{{"ok":true,"result":"{word}"}}'"""


def test_a_client_that_goes_away_takes_its_call_with_it(server: Server) -> None:
    rights = {"capabilities": ["analysis", "exec"], "phases": ["ASCEND"]}
    add_script(server.settings.overlays, "slow", 'echo > "$OVERLAY_STATE/runs"; sleep 600', **rights)
    runs = server.settings.state / "state/slow/runs"
    body = b'{"phase":"ASCEND"}'
    head = "POST /invoke/slow HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + b"\r\n" + body)
        eventually(runs.exists, "the program runs")
        assert running(str(server.settings.state))
    eventually(lambda: not running(str(server.settings.state)), "the program is gone")
    eventually(lambda: calls(server.settings) != [], "its line is written")
    line = calls(server.settings)[-1]
    assert (line["overlay"], line["code"], line["ok"]) == ("slow", "ERR_CANCELLED", False)
    assert misfits("record", line) == []


def test_a_folder_is_callable_as_soon_as_it_is_copied_in_and_new_when_it_is_edited(
    any_server: Server, tmp_path: Path
) -> None:
    root = any_server.settings.overlays
    source = add_script(tmp_path, "fresh", say("first"))
    assert any_server.invoke("fresh").status == 404

    shutil.copytree(source, root / "fresh")
    assert any_server.invoke("fresh").json()["result"] == "first"
    assert status_of(any_server, "fresh") == "active"

    (root / "fresh/run.sh").write_text(say("second"))
    assert any_server.invoke("fresh").json()["result"] == "second"

    manifest = json.loads((root / "fresh/manifest.json").read_text())
    (root / "fresh/manifest.json").write_text(json.dumps(manifest | {"version": "2.0.0", "phases": ["CLEAR"]}))
    assert any_server.invoke("fresh").json()["code"] == "ERR_PHASE_DENIED"
    answer = any_server.invoke("fresh", phase="CLEAR").json()
    assert any_server.line_of(answer["request_id"])["version"] == "2.0.0"

    shutil.rmtree(root / "fresh")
    assert any_server.invoke("fresh").status == 404
    assert status_of(any_server, "fresh") is None


def test_a_half_copied_folder_is_listed_as_broken_and_heals(any_server: Server, tmp_path: Path) -> None:
    root = any_server.settings.overlays
    text = (add_script(tmp_path, "halved", say("whole")) / "manifest.json").read_text()
    (root / "halved").mkdir()
    assert status_of(any_server, "halved") == "broken"
    (root / "halved/manifest.json").write_text(text[: len(text) // 2])
    assert status_of(any_server, "halved") == "broken"
    refused = any_server.invoke("halved")
    assert (refused.status, refused.json()["code"]) == (409, "ERR_OVERLAY_BROKEN")

    (root / "halved/manifest.json").write_text(text)
    (root / "halved/run.sh").write_text(say("whole"))
    assert any_server.invoke("halved").json()["result"] == "whole"
    assert status_of(any_server, "halved") == "active"


def test_an_overlay_that_is_a_link_to_elsewhere_reloads_too(any_server: Server, tmp_path: Path) -> None:
    source = add_script(tmp_path, "linked", say("first"))
    (any_server.settings.overlays / "linked").symlink_to(source)
    assert any_server.invoke("linked").json()["result"] == "first"
    (source / "run.sh").write_text(say("second"))
    assert any_server.invoke("linked").json()["result"] == "second"


def test_many_clients_at_once_each_get_their_own_answer(server: Server) -> None:
    add_overlay(server.settings.overlays, "echo")
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda n: server.invoke("echo", {"n": n}).json(), range(64)))
    assert [reply["result"]["payload"]["n"] for reply in replies] == list(range(64))
    assert len({reply["provenance"]["seq"] for reply in replies}) == 64
    assert verification.verify(server.settings.ledger).ok


def test_the_list_tells_what_runs_for_an_overlay(server: Server) -> None:
    add_script(server.settings.overlays, "quick", say("done"))
    server.invoke("quick", {})
    listed = {one["name"]: one["running"] for one in server.get("/overlays").json()["overlays"]}
    assert [(helper["mode"], helper["running"]) for helper in listed["quick"]["helpers"]] == [("spawn", 0)]
    assert server.get("/overlays/quick").json()["running"]["helpers"][0]["pid"] > 0


@pytest.mark.parametrize(
    ("on", "missing"),
    [
        (Kernel(7, None, None), []),
        (Kernel(2, None, None), ["write: Landlock lets files be emptied (ABI 3 does not)"]),
        (Kernel(0, "no Landlock", None), ["read: no Landlock", "write: no Landlock", "exec: no Landlock"]),
    ],
)
def test_the_list_tells_what_of_their_rights_the_kernel_cannot_hold_before_anything_runs(
    client: TestClient, bus: Bus, settings: Settings, on: Kernel, missing: list[str]
) -> None:
    add_script(settings.overlays, "quick", say("done"), phases=["CLEAR", "ASCEND"], capabilities=["analysis", "exec"])
    held = bus.confinement = replace(bus.confinement, mode="best-effort", kernel=on)
    served = {"entrypoints": {"http": {"command": ["python3", "serve.py"]}}, "phases": ["CLEAR"]}
    folder = add_native(settings.overlays, "served", {"ask": {"runner": "http"}}, **served)
    (folder / "serve.py").touch()
    listed = {one["name"]: one["sandbox"] for one in client.get("/overlays").json()["overlays"]}
    assert listed["quick"] == {"mode": "best-effort", "missing": missing}
    assert listed["broken"]["missing"] == []
    assert client.get("/overlays/quick").json()["sandbox"] == listed["quick"]
    assert any(gap.startswith("network: ") and "may listen" in gap for gap in listed["served"]["missing"])
    bus.confinement = replace(held, mode="off")
    assert len(client.get("/overlays/quick").json()["sandbox"]["missing"]) == 7


async def test_each_client_that_leaves_is_heard_however_the_calls_overlap() -> None:
    """They share a timer: one comes before it is set, one while it runs, one ends before it does."""
    clients = _Clients()
    leaves = [asyncio.Event() for _ in range(3)]
    ended: list[int] = []

    async def call(number: int) -> Any:
        async def receive() -> dict[str, str]:
            await leaves[number].wait()
            return {"type": "http.disconnect"}

        async def work() -> Any:
            await asyncio.sleep(0 if number == 1 else PATIENCE_S)

        try:
            await clients.unless_gone(receive, work())
        except ClientDisconnect:
            ended.append(number)

    first = asyncio.create_task(call(0))
    await asyncio.sleep(WATCH_AFTER_S / 2)
    others = [asyncio.create_task(call(number)) for number in (1, 2)]
    await others[0]
    leaves[2].set()
    await others[1]
    assert ended == [2]
    leaves[0].set()
    await first
    assert ended == [2, 0]
    assert vars(clients)["_loop"] is None
