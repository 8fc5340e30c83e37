"""`aal serve` as a process: how it ends, and what becomes of the calls that still run then."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus import provenance, remote, verification
from bus.errors import OperatorError, SettingError
from bus.model import Phase
from bus.serve import serve
from bus.tokens import SCOPES, Tokens
from tests.programs import running
from tests.support import (
    PATIENCE_S,
    REPO,
    Server,
    add_overlay,
    add_script,
    eventually,
    settings_in,
    write_overlay,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOW = "trap '' TERM; echo $$ > ../slow.pid.new; mv ../slow.pid.new ../slow.pid; sleep 600"


class Caller(threading.Thread):
    """A client that makes one call and waits for whatever comes."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
        self.status = 0
        self.answer: Any = None

    def run(self) -> None:
        self.connection.request("POST", "/invoke/slow", '{"phase":"OPEN"}', {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        self.status, self.answer = response.status, json.loads(response.read())
        self.connection.close()


@contextmanager
def serving(folder: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of `folder`, and its address. What it calls here writes beside its folder and starts programs."""
    command = [sys.executable, "-m", "bus.cli", "-C", str(folder), "serve", "--port", "0"]
    env = {"PATH": "/usr/bin:/bin", "AAL_SANDBOX": "off"} | {
        f"AAL_{name.upper()}": value for name, value in settings.items()
    }
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://([\d.:]+)", server.stdout.readline())
            assert found
            yield server, found[1]
        finally:
            server.kill()


def ended_in_order(server: subprocess.Popen[str], caller: Caller, folder: Path) -> None:
    """The call was answered, the server has said nothing bad, and nothing runs any more."""
    _, log = server.communicate(timeout=PATIENCE_S)
    assert (caller.status, caller.answer["code"]) == (503, "ERR_SHUTTING_DOWN")
    assert server.returncode == 0
    assert "Traceback" not in log
    assert not running(str(folder))


@contextmanager
def calling(folder: Path, address: str) -> Iterator[Caller]:
    """A call of an overlay that sleeps and ignores TERM; its program runs when the block begins."""
    caller = Caller(address)
    caller.start()
    eventually((folder / "overlays/slow.pid").exists, "the program runs")
    yield caller
    caller.join()


@pytest.mark.parametrize(
    ("signals", "drain_s", "kill_grace_s"),
    [
        ([signal.SIGTERM], "0.2", "0.2"),
        ([signal.SIGHUP], "0.2", "0.2"),
        ([signal.SIGINT, signal.SIGINT], "600", "60"),  # a second one waits for nothing
        ([signal.SIGTERM, signal.SIGTERM], "600", "60"),
        ([signal.SIGHUP, signal.SIGTERM], "600", "60"),
        ([signal.SIGINT, signal.SIGINT], "0", "60"),  # nor for the grace of a call that is being ended already
    ],
)
def test_a_call_that_does_not_finish_in_time_is_ended_answered_and_written_down(
    tmp_path: Path, signals: list[signal.Signals], drain_s: str, kill_grace_s: str
) -> None:
    add_script(tmp_path / "overlays", "slow", SLOW)
    with serving(tmp_path, drain_s=drain_s, kill_grace_s=kill_grace_s) as (server, address):
        with calling(tmp_path, address) as caller:
            for number in signals:  # one by one: the kernel makes one of two that wait
                server.send_signal(number)
                eventually(lambda: caller.answer or not is_ready(address), "the server has seen the signal")
        _, log = server.communicate(timeout=PATIENCE_S)
    assert (caller.status, caller.answer["code"], caller.answer["retryable"]) == (503, "ERR_SHUTTING_DOWN", True)
    assert server.returncode == 0
    assert "Traceback" not in log
    assert not running(str(tmp_path))
    ledger = settings_in(tmp_path).ledger
    line = provenance.read_line(ledger, 1)
    assert (line["request_id"], line["code"]) == (caller.answer["request_id"], "ERR_SHUTTING_DOWN")
    assert verification.verify(ledger).ok


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])
def test_while_it_drains_it_is_neither_healthy_nor_ready_and_refuses_calls_with_a_line(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    add_script(tmp_path / "overlays", "slow", "touch ../slow.pid; until [ -e ../go ]; do sleep 0.01; done; echo 1")
    with serving(tmp_path, drain_s="600") as (server, address), calling(tmp_path, address) as caller:
        assert asked(address, "GET", "/health") == (200, {"status": "ok"})
        for number in signals:
            server.send_signal(number)
            eventually(lambda: not is_ready(address), "the server has seen the signal")
        assert asked(address, "GET", "/health") == (503, {"status": "shutting down"})
        status, root = asked(address, "GET", "/")
        assert (status, root["status"]) == (200, "shutting down")
        status, late = asked(address, "POST", "/invoke/slow", '{"phase":"OPEN"}')
        (tmp_path / "overlays/go").touch()
        _, log = server.communicate(timeout=PATIENCE_S)
    assert (status, late["code"]) == (503, "ERR_SHUTTING_DOWN")
    assert (caller.status, caller.answer["result"]) == (200, 1)
    assert server.returncode == 0
    assert "Traceback" not in log
    codes = [line["code"] for line in provenance.iter_lines(settings_in(tmp_path).ledger) if "code" in line]
    assert codes == ["ERR_SHUTTING_DOWN", "OK"]


HALF_A_REQUEST = (
    b"POST /invoke/x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
)

WORKER = "trap '' TERM; read -r line; " + SLOW.partition("; ")[2]

SERVICE = """
import os, pathlib, signal, socket, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
listener = socket.create_server(("127.0.0.1", int(os.environ["OVERLAY_PORT"])))
while not (connection := listener.accept()[0]).recv(1):
    connection.close()
pathlib.Path("../slow.pid").touch()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("entrypoints", "runner", "script"),
    [
        ({"proc": {"command": ["sh", "run"], "mode": "worker"}}, "proc", WORKER),
        ({"http": {"command": [sys.executable, "run"]}}, "http", SERVICE),
    ],
    ids=["worker", "service"],
)
def test_a_second_signal_ends_a_worker_and_a_service_at_once_too(
    tmp_path: Path, entrypoints: dict[str, Any], runner: str, script: str
) -> None:
    capabilities = {"run": {"runner": runner, "timeout_s": 600}}
    manifest = {"name": "slow", "version": "1", "entrypoints": entrypoints, "capabilities": capabilities}
    write_overlay(tmp_path / "overlays", "slow", manifest, {"run": script})
    with serving(tmp_path, drain_s="600", kill_grace_s="60") as (server, address):
        with calling(tmp_path, address) as caller:
            server.send_signal(signal.SIGINT)
            eventually(lambda: not is_ready(address), "the server has seen the signal")
            server.send_signal(signal.SIGINT)
        ended_in_order(server, caller, tmp_path)
    ledger = settings_in(tmp_path).ledger
    assert [line["request_id"] for line in provenance.iter_lines(ledger) if "request_id" in line] == [
        caller.answer["request_id"]
    ]
    assert verification.verify(ledger).ok


def test_a_second_signal_waits_for_no_request_that_is_still_on_its_way(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, address):
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(HALF_A_REQUEST)
            eventually(lambda: asked(address, "GET", "/ready")[0] == 200, "the server has read what came before")
            server.send_signal(signal.SIGINT)
            eventually(lambda: not is_ready(address), "the server has seen the signal")
            server.send_signal(signal.SIGINT)
            _, log = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0
    assert "timeout graceful shutdown exceeded" not in log
    assert "Traceback" not in log


def test_a_service_that_is_still_starting_does_not_hold_up_the_end(tmp_path: Path) -> None:
    manifest = {
        "name": "slow",
        "version": "1",
        "entrypoints": {"http": {"command": ["sh", "run.sh"], "start_timeout_s": 600}},
        "capabilities": {"run": {"runner": "http", "timeout_s": 600}},
    }
    write_overlay(tmp_path / "overlays", "slow", manifest, {"run.sh": SLOW})
    with serving(tmp_path, drain_s="0.2", kill_grace_s="0.2") as (server, address):
        with calling(tmp_path, address) as caller:
            server.send_signal(signal.SIGTERM)
        ended_in_order(server, caller, tmp_path)


def test_the_next_call_sees_a_change_however_many_others_come_with_it(tmp_path: Path) -> None:
    done = threading.Event()

    def call_on(server: Server) -> None:
        while not done.is_set():
            assert server.invoke("echo").status == 200

    add_overlay(tmp_path / "overlays")
    with Server(tmp_path) as server, ThreadPoolExecutor(8) as others:
        under_way = [others.submit(call_on, server) for _ in range(8)]
        try:
            for number in range(12):
                changed = add_overlay(tmp_path / f"changed-{number}", version=f"1.0.{number}") / "manifest.json"
                changed.rename(tmp_path / "overlays/echo/manifest.json")
                assert server.invoke("echo").json()["result"]["version"] == f"1.0.{number}"
        finally:
            done.set()
        for one in under_way:
            one.result()


def test_a_client_that_is_too_slow_is_cut_off_and_the_next_one_served(tmp_path: Path) -> None:
    with serving(tmp_path, client_timeout_s="0.2") as (_, address):
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
            connection.sendall(HALF_A_REQUEST)
            told = b""
            while piece := connection.recv(65536):
                told += piece
        assert told.startswith(b"HTTP/1.1 408 ")
        assert json.loads(told.partition(b"\r\n\r\n")[2])["code"] == "ERR_SLOW_CLIENT"
        assert asked(address, "GET", "/ready") == (200, {"ready": True})


def test_beyond_loopback_nobody_is_served_before_there_is_a_token(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"0\.0\.0\.0") as refused:
        serve(replace(settings_in(tmp_path), host="0.0.0.0", port=0), lambda *_: None)
    assert "aal token create" in str(refused.value.hint)
    assert not (tmp_path / ".aal").exists()


def test_beyond_loopback_each_request_needs_a_token_and_without_the_last_one_nobody_is_served(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / ".aal")
    text = tokens.create("ci", overlays=("*",), phases=tuple(Phase), scopes=SCOPES)[1]
    with serving(tmp_path, host="0.0.0.0") as (_, address):
        port = address.rpartition(":")[2]
        at = f"127.0.0.1:{port}"
        assert asked(at, "GET", "/overlays")[0] == 401
        assert asked(at, "GET", "/overlays", token=text) == (200, {"overlays": []})
        tokens.revoke("ci")
        assert asked(at, "GET", "/overlays", token=text)[0] == 401
        assert asked(at, "GET", "/overlays")[0] == 401
        assert asked(at, "GET", "/health")[0] == 200


def test_the_log_of_a_server_says_no_secret() -> None:
    program = (
        "import logging, bus.serve; bus.serve._log_to_stderr('info');"
        "bus.serve._redact_logs(lambda text: text.replace('hidden', '[secret KEY]'));"
        "logging.getLogger('bus').warning('it said %s', 'hidden')\n"
        "try: raise ValueError('hidden')\n"
        "except ValueError: logging.getLogger('other').exception('so')"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    assert " WARNING bus: it said [secret KEY]\n" in ran.stderr
    assert "ValueError: [secret KEY]" in ran.stderr
    assert "hidden" not in ran.stderr.replace("raise ValueError('hidden')", "")


def is_ready(address: str) -> bool:
    """Whether it takes calls; not where it is no longer there."""
    try:
        return asked(address, "GET", "/ready")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def asked(
    address: str, method: str, path: str, body: str | None = None, *, token: str | None = None
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    headers = {"Content-Type": "application/json"} if body else {}
    connection.request(method, path, body, headers | ({"Authorization": f"Bearer {token}"} if token else {}))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_who_wants_to_ask_a_server_finds_it_while_it_runs(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with serving(tmp_path) as (_, address):
        assert remote.address_of(settings.state) == f"http://{address}"
    with pytest.raises(OperatorError, match="no server runs"):
        remote.address_of(settings.state)


def test_a_ledger_has_one_server_whatever_the_folders_of_their_states(tmp_path: Path) -> None:
    other = str(tmp_path / "other-state")
    command = [sys.executable, "-m", "bus.cli", "-C", str(tmp_path), "serve", "--port", "0"]
    with serving(tmp_path) as (server, _):
        env = {"PATH": "/usr/bin:/bin", "AAL_SANDBOX": "off", "AAL_STATE": other}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert f"ERR_IN_USE: process {server.pid} serves the ledger in {tmp_path / 'logs'}" in ran.stderr
        server.kill()
        server.wait(PATIENCE_S)
        with serving(tmp_path, state=other) as (_, address):
            assert address


def test_a_second_server_is_refused_also_after_the_files_of_the_locks_were_removed(tmp_path: Path) -> None:
    locks = [tmp_path / ".aal/serve.lock", tmp_path / "logs/provenance.serving"]
    elsewhere: list[dict[str, str]] = [{"AAL_LOGS": str(tmp_path / "other")}, {"AAL_STATE": str(tmp_path / "other")}]
    command = [sys.executable, "-m", "bus.cli", "-C", str(tmp_path), "serve", "--port", "0"]
    with serving(tmp_path) as (server, _):
        own = f"{server.pid}\n"
        for lock in locks:
            lock.unlink()
        eventually(lambda: all(lock.exists() and lock.read_text() == own for lock in locks), "the locks are taken anew")
        for settings in elsewhere:
            env = {"PATH": "/usr/bin:/bin", "AAL_SANDBOX": "off"} | settings
            ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
            assert (ran.returncode, ran.stdout) == (1, "")
            assert f"ERR_IN_USE: process {server.pid} serves" in ran.stderr
