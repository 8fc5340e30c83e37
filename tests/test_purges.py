"""Purges: who is told to let go of its caches, when, by whom, and what an operator is told of it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from starlette.testclient import TestClient

from bus import remote, resources, runes, schemas
from bus.app import create_app
from bus.balance import Balance
from bus.errors import BusError, DeniedError
from bus.model import Phase
from bus.purges import AGAIN_S, UnderStress, occasions, require_on_event
from bus.scheduler import Scheduler
from bus.stress import StressMonitor
from bus.tokens import Tokens
from runners.base import PURGE, Workers
from tests import programs
from tests.cli_fixtures import aal, plain_environment
from tests.support import (
    FixedStress,
    InProcessRunner,
    Server,
    a_call,
    a_capability,
    a_manifest,
    add_native,
    eventually,
    running_bus,
    settings_in,
    write_overlay,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bus.model import Manifest
    from bus.purges import Occasion
    from bus.settings import Settings
    from bus.stress import Band
    from bus.tokens import Scope
    from tests.cli_fixtures import Ran

MEM = "MEM[SOFT=10,HARD=20,VOL=LOW]"
CAPABILITIES: dict[str, Any] = {"run": {"runner": "proc"}}

SERVICE = """
import http.server, json, os

class Handler(http.server.BaseHTTPRequestHandler):
    told = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/purge":
            self.told.append(body)
        text = json.dumps(self.told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["OVERLAY_PORT"])), Handler).serve_forever()
"""


def rune(purge: str | None) -> str:
    return MEM if purge is None else f"{MEM};KV[CAP=0.2,POLICY=LRU,PURGE={purge}]"


def declaring(*rules: str | None) -> Manifest:
    """A manifest whose workers take purges, with a capability for each rule of a rune's KV."""
    capabilities = {f"c{number}": a_capability(memory=runes.resolve(rune(rule))) for number, rule in enumerate(rules)}
    return a_manifest(mode="worker", workers=Workers(purge=True), capabilities=capabilities)


def add_worker(root: Path, name: str, purge: str | None = None, *, takes: bool = True) -> None:
    """An overlay with the worker of the tests, which counts what it was told."""
    entrypoint = {
        "command": [sys.executable, "-I", "-S", str(programs.FOLDER / "worker.py")],
        "mode": "worker",
        "workers": {"purge": takes},
    }
    add_native(root, name, {"run": {"runner": "proc", "memory": rune(purge)}}, entrypoints={"proc": entrypoint})


def add_service(root: Path, name: str) -> None:
    entrypoints = {"http": {"command": [sys.executable, "service.py"], "purge_path": "/purge"}}
    capabilities = {"told": {"runner": "http", "path": "/told"}}
    manifest = {"name": name, "version": "1", "entrypoints": entrypoints, "capabilities": capabilities}
    write_overlay(root, name, manifest, {"service.py": SERVICE})


# When


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (("ON_STRESS",), ["stress"]),
        (("ON_EVENT",), ["event"]),
        (("ON_STRESS_OR_EVENT",), ["stress", "event"]),
        (("ON_EVENT", "ON_STRESS"), ["stress", "event"]),
        (("ON_EVENT", None), ["event"]),
        ((None,), ["stress", "event"]),
    ],
)
def test_the_runes_say_when_and_both_where_none_has_kv(rules: tuple[str | None, ...], told: list[Occasion]) -> None:
    assert occasions(declaring(*rules)) == told


def test_what_is_told_is_what_the_schema_says() -> None:
    request = resources.load_json("schemas/overlay_request.schema.json")
    validator = schemas.compiled({"$ref": "#/$defs/purge", "$defs": request["$defs"]})
    assert list(validator.iter_errors(orjson.loads(PURGE))) == []
    assert list(validator.iter_errors({"event": "purge", "request_id": "1"})) != []


def test_who_does_not_take_purges_is_never_told() -> None:
    capability = a_capability(memory=runes.resolve(rune("ON_STRESS_OR_EVENT")))
    for changes in ({}, {"mode": "worker"}, {"mode": "spawn", "workers": Workers(purge=True)}):
        assert occasions(a_manifest(capabilities={"run": capability}, **changes)) == []


@pytest.mark.parametrize(
    ("manifest", "why"),
    [(declaring("ON_STRESS"), "its runes say PURGE=ON_STRESS"), (a_manifest(), "neither its workers nor its service")],
)
def test_an_operator_is_told_why_an_overlay_is_not(manifest: Manifest, why: str) -> None:
    with pytest.raises(DeniedError, match=why) as refused:
        require_on_event(manifest)
    assert refused.value.code == "ERR_NO_PURGE"
    require_on_event(declaring("ON_EVENT"))


def test_it_is_due_at_each_rise_to_high_and_critical_and_again_while_that_lasts() -> None:
    now = 0.0
    under_stress = UnderStress(lambda: now)
    steps: list[tuple[float, Band, bool]] = [
        (0.0, "LOW", False),
        (0.0, "MODERATE", False),
        (0.0, "HIGH", True),
        (AGAIN_S, "HIGH", False),
        (0.0, "CRITICAL", True),
        (AGAIN_S - 1, "CRITICAL", False),
        (1.0, "CRITICAL", True),
        (0.0, "HIGH", False),
        (1.0, "CRITICAL", True),
        (0.0, "LOW", False),
        (0.0, "CRITICAL", True),
        (0.0, "MODERATE", False),
        (0.0, "HIGH", True),
    ]
    for number, (passed_s, band, due) in enumerate(steps):
        now += passed_s
        assert under_stress.is_due(band) is due, number


# Under stress


def test_the_balance_tells_at_high_and_at_critical_and_every_so_often(settings: Settings) -> None:
    stress, now = 0.0, 0.0
    runner = InProcessRunner()
    monitor = StressMonitor({"memory": lambda: stress, "pressure": lambda: None}, window=1)
    balance = Balance(settings, {"proc": runner}, lambda: ["one"], lambda: now)
    balance.between(monitor, Scheduler(slots=1, queue_limit=1, stress=lambda: 0.0))
    for value, passed_s in ((0.3, 0), (0.6, 1), (0.6, AGAIN_S), (0.9, 1), (0.9, 1), (0.9, AGAIN_S), (0.1, 1), (0.6, 1)):
        stress, now = value, now + passed_s
        monitor.sample()
        balance.sampled()
    assert runner.purged == [["one"]] * 4


def test_a_runner_that_fails_to_tell_keeps_no_other_from_it(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(InProcessRunner):
        def purge(self, overlays: object) -> dict[str, int]:
            raise RuntimeError

    class Telling(InProcessRunner):
        def purge(self, overlays: object) -> dict[str, int]:
            return {"one": 2}

    balance = Balance(settings, {"proc": Failing(name="proc"), "http": Telling(name="http")})
    assert balance.purge(["one"]) == {"one": {"http": 2}}
    assert "the runner proc could not tell of a purge" in caplog.text


async def test_under_stress_those_are_told_that_were_called_and_whose_runes_allow_it(settings: Settings) -> None:
    stress, runner = FixedStress(), InProcessRunner()
    for name, purge in (("both", "ON_STRESS_OR_EVENT"), ("event", "ON_EVENT"), ("plain", None)):
        add_worker(settings.overlays, name, purge)
    add_worker(settings.overlays, "uncalled", "ON_STRESS")
    add_worker(settings.overlays, "deaf", "ON_STRESS", takes=False)
    async with running_bus(settings, stress, runner) as bus:
        for name in ("both", "event", "plain", "deaf"):
            await bus.invoke(a_call(name))
        stress.value = 0.6
        for _ in range(5):
            bus.stress.sample()
            bus.balance.sampled()
    assert runner.purged == [["both", "plain"]]


async def test_under_stress_a_real_worker_lets_go(settings: Settings) -> None:
    stress = FixedStress()
    add_worker(settings.overlays, "model", "ON_STRESS")
    async with running_bus(settings, stress) as bus:
        assert (await bus.invoke(a_call("model"))).body["ok"]
        stress.value = 0.6
        for _ in range(5):
            bus.stress.sample()
            bus.balance.sampled()
        told = await bus.invoke(a_call("model", data={"do": "purges"}))
    assert told.body["result"] == 1


# When the operator asks


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    overlays = settings_in(tmp_path).overlays
    add_worker(overlays, "model", "ON_EVENT")
    add_worker(overlays, "stressed", "ON_STRESS")
    add_service(overlays, "served")
    with Server(tmp_path, sandbox="off") as running:
        yield running


def test_the_server_tells_workers_and_services_and_says_whom(server: Server) -> None:
    for name in ("model", "served"):
        assert server.invoke(name).json()["ok"]
    assert server.post("/overlays/model/purge", {}).json() == {"name": "model", "told": {"proc": 1}}
    assert server.invoke("model", {"do": "purges"}).json()["result"] == 1
    assert server.post("/overlays/served/purge", {}).json() == {"name": "served", "told": {"http": 1}}

    def state() -> Any:
        return server.get("/overlays/served").json()["running"]["purge"]

    eventually(lambda: state()["purges"] == 1, "the service has answered")
    assert state()["last_error"] is None
    assert server.invoke("served").json()["result"] == [{"event": "purge"}]


def test_what_does_not_run_is_not_told(server: Server) -> None:
    for name in ("model", "served"):
        assert server.post(f"/overlays/{name}/purge", {}).json() == {"name": name, "told": {}}


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("stressed", 409, "ERR_NO_PURGE"), ("nobody", 404, "ERR_UNKNOWN_OVERLAY"), ("..", 404, None)],
)
def test_a_purge_that_cannot_be_is_refused(server: Server, name: str, status: int, code: str | None) -> None:
    refused = server.post(f"/overlays/{name}/purge", {})
    assert refused.status == status
    assert code is None or refused.json()["code"] == code


def test_a_purge_is_for_administrators_of_the_overlay(settings: Settings) -> None:
    add_worker(settings.overlays, "model")
    with TestClient(create_app(settings)) as client:
        tokens = Tokens(settings.state)

        def status(name: str, scope: Scope, overlays: str = "*") -> int:
            _, text = tokens.create(name, overlays=(overlays,), phases=tuple(Phase), scopes=(scope,))
            headers = {"Authorization": f"Bearer {text}"}
            return client.post("/overlays/model/purge", json={}, headers=headers).status_code

        assert status("plain", "invoke") == 403
        assert status("narrow", "admin", "other") == 404
        assert status("admin", "admin") == 200


# The command line


def test_the_command_tells_a_running_server_and_shows_whom_it_reached(aal: Callable[..., Ran], server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}"
    assert aal("overlays", "purge", "model", "--url", url).out.startswith("told model: nothing of it runs")
    server.invoke("model")
    assert aal("overlays", "purge", "model", "--url", url, "--json").json == {"name": "model", "told": {"proc": 1}}
    assert aal("overlays", "purge", "model", "--url", url).out == "told model: 1 of the runner proc\n"
    refused = aal("overlays", "purge", "stressed", "--url", url)
    assert refused.code == 1
    assert "ERR_NO_PURGE" in refused.err
    assert "hint:" in refused.err


def test_without_a_server_the_command_says_so(aal: Callable[..., Ran]) -> None:
    ran = aal("overlays", "purge", "model")
    assert ran.code == 1
    assert "ERR_NO_SERVER" in ran.err
    assert "aal serve" in ran.err


def test_a_token_comes_from_the_environment_and_is_sent(
    aal: Callable[..., Ran], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{server.port}"
    made = aal("token", "create", "--name", "ops", "--scopes", "admin", "--json").json["token"]
    assert "ERR_UNAUTHORIZED" in aal("overlays", "purge", "model", "--url", url).err
    monkeypatch.setenv("AAL_TOKEN", made)
    assert aal("overlays", "purge", "model", "--url", url, "--json").json["told"] == {}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[", "nowhere", "ftp://127.0.0.1"])
def test_an_address_where_no_server_answers_is_told(url: str) -> None:
    with pytest.raises(BusError) as refused:
        remote.purge(url, "model")
    assert refused.value.code == "ERR_NO_SERVER"
