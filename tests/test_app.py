"""The HTTP side: the shapes that clients rely on, and what only a real server shows."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from bus import envelopes, provenance, resources
from bus.app import create_app
from bus.dispatch import Bus
from tests.programs import running
from tests.support import (
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

    from bus.settings import Settings

OPEN = {"phase": "OPEN", "data": {}}
ERROR_BODY = {"ok", "error", "code", "category", "message", "detail", "hint", "retryable", "faults"}


@pytest.fixture
def stress() -> FixedStress:
    return FixedStress(0.25)


@pytest.fixture
def client(settings: Settings, stress: FixedStress) -> Iterator[TestClient]:
    add_overlay(settings.overlays, "echo", description="Says it again.")
    add_native(settings.overlays, "two", {"ping": {"runner": "proc"}, "pong": {"runner": "proc"}})
    write_overlay(settings.overlays, "broken", {"name": "broken"})
    bus = Bus(replace(settings, stress_period_s=0.01), plugins=[InProcessRunner(), stress])
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
    assert client.get("/overlays/broken").json()["error"]
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
        ("limt=1", 'unknown: ["limt"]; known: limit, since, overlay, ok'),
    ],
)
def test_a_query_that_cannot_be_is_refused_with_what_is_allowed(client: TestClient, query: str, said: str) -> None:
    response = client.get(f"/provenance?{query}")
    assert (response.status_code, response.json()["code"]) == (400, "ERR_BAD_QUERY")
    assert said in response.json()["detail"]


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


def test_a_client_that_goes_away_takes_its_call_with_it(server: Server, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    add_script(server.settings.overlays, "slow", f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; sleep 600")
    body = json.dumps(OPEN).encode()
    head = f"POST /invoke/slow HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + b"\r\n" + body)
        eventually(pid_file.exists, "the program runs")
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
    assert provenance.verify(server.settings.ledger).ok


def test_the_list_tells_what_runs_for_an_overlay(server: Server) -> None:
    add_script(server.settings.overlays, "quick", say("done"))
    server.invoke("quick", {})
    listed = {one["name"]: one["running"] for one in server.get("/overlays").json()["overlays"]}
    assert [(helper["mode"], helper["running"]) for helper in listed["quick"]["helpers"]] == [("spawn", 0)]
    assert server.get("/overlays/quick").json()["running"]["helpers"][0]["pid"] > 0
