"""Bad input of every kind over HTTP: a clear answer, a line in the ledger, and a server that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import pytest

from bus import verification
from tests.programs import running
from tests.support import REPO, Server, add_native, add_overlay, http_service, misfits, write_overlay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support import Reply

PROGRAMS = REPO / "tests/programs"
MB = 2**20
LET_GO = threading.Event()
"""Ends the services that hang."""


class Hostile(BaseHTTPRequestHandler):
    """A service that answers badly; which way stands in the path."""

    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # the bus hangs up on what is too large or too late
            super().handle()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        getattr(self, self.path.removeprefix("/"))()

    def say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def well(self) -> None:
        self.say(200, b'{"ok":true,"result":"well"}')

    def hangs(self) -> None:
        LET_GO.wait()
        self.close_connection = True

    def redirects(self) -> None:
        self.say(302, b"", Location="http://example.invalid/elsewhere")

    def fails(self) -> None:
        self.say(500, b'{"ok":true,"result":"not to be believed"}')

    def html(self) -> None:
        self.say(200, b"<html>hello</html>", Content_Type="text/html")

    def half(self) -> None:
        self.say(200, b'{"ok":true,"result":', Content_Length="1000")
        self.close_connection = True

    def large(self) -> None:
        self.say(200, b'"' + b"x" * (20 * MB) + b'"')

    def unheard(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole file, and an overlay for each way to go wrong."""
    folder = tmp_path_factory.mktemp("bad-input")
    LET_GO.clear()
    with Server(folder) as server, http_service(Hostile) as url, socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        add_process_overlays(server.settings.overlays)
        add_http_overlays(server.settings.overlays, url, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        try:
            yield server
        finally:
            LET_GO.set()


def add_process_overlays(root: Path) -> None:
    add_overlay(root, "echo")
    add_overlay(root, "off")
    state = root.parent / ".aal"
    state.mkdir()
    (state / "overlays.json").write_text(json.dumps({"disabled": ["off"]}))
    members: dict[str, Any] = {"phases": ["OPEN", "ASCEND"], "capabilities": ["analysis", "exec"]}
    add_overlay(root, "missing", "./nowhere")
    add_overlay(root, "not_executable", "./data.txt", files={"data.txt": "just text"})
    add_overlay(root, "missing_script", "python3 run.py")
    shebang = add_overlay(root, "bad_shebang", "./run", files={"run": "#!/nowhere/interpreter\n"}, **members)
    (shebang / "run").chmod(0o755)
    add_native(root, "strict", {"run": {"runner": "proc", "input_schema": {"required": ["text"]}}})
    write_overlay(root, "broken", {"name": "broken"})
    for program in (*PROGRAMS.glob("*.sh"), PROGRAMS / "grandchild.py"):
        if program.stem != "echo":
            shutil.copy(program, add_overlay(root, program.stem, f"./{program.name}", **members))


def add_http_overlays(root: Path, url: str, deaf: str) -> None:
    ways = ["well", "hangs", "redirects", "fails", "html", "half", "large", "unheard"]
    capabilities = {way: {"runner": "http", "path": f"/{way}"} for way in ways}
    manifest = {"version": "1", "capabilities": capabilities}
    write_overlay(root, "web", manifest | {"name": "web", "entrypoints": {"http": {"base_url": url}}})
    write_overlay(root, "deaf", manifest | {"name": "deaf", "entrypoints": {"http": {"base_url": deaf}}})


def assert_told(server: Server, reply: Reply, status: int, code: str) -> dict[str, Any]:
    """The answer has its form, status and code, its line says the same, and the next call works."""
    body: dict[str, Any] = reply.json()
    assert (reply.status, body["code"]) == (status, code)
    assert misfits("outcome", body) == []
    assert body["ok"] or (body["error"] and body["detail"] and body["message"])
    line = server.line_of(body["request_id"])
    assert misfits("record", line) == []
    assert line["code"] == code
    assert reply.headers["X-Request-Id"] == body["request_id"]
    assert server.invoke("echo", {"still": "there"}).json()["result"]["payload"] == {"still": "there"}
    return body


# --- Requests ----------------------------------------------------------------------------------------------------

DEEP = b'{"phase":"OPEN","data":{"a":' + b"[" * 5000 + b"]" * 5000 + b"}}"
REQUESTS = {
    "not JSON": (b"hello", 400, "ERR_BAD_JSON", "line 1 column 1"),
    "nothing": (b"", 400, "ERR_BAD_JSON", "line 1 column 1"),
    "half a JSON": (b'{"phase":"OPEN","data":{', 400, "ERR_BAD_JSON", "column"),
    "not UTF-8": (b'{"phase":"OPEN","data":{"a":"\xe4"}}', 400, "ERR_BAD_JSON", "not UTF-8"),
    "NaN": (b'{"phase":"OPEN","data":{"a":NaN}}', 400, "ERR_BAD_JSON", "NaN is not a JSON value"),
    "infinity": (b'{"phase":"OPEN","data":{"a":1e999}}', 400, "ERR_BAD_JSON", "/data/a"),
    "a duplicate key": (b'{"phase":"OPEN","data":{"a":1,"a":2}}', 400, "ERR_BAD_JSON", "'a' stands twice"),
    "deep nesting": (DEEP, 400, "ERR_BAD_JSON", "nested deeper than 64 levels"),
    "deeper nesting": (b"[" * MB, 400, "ERR_BAD_JSON", "nested deeper than 64 levels"),
    "a big integer": (b'{"phase":"OPEN","data":{"a":[9007199254740993]}}', 400, "ERR_BAD_JSON", "/data/a/0"),
    "a huge integer": (b'{"phase":"OPEN","data":{"a":' + b"9" * 10_000 + b"}}", 400, "ERR_BAD_JSON", ""),
    "a lone surrogate": (b'{"phase":"OPEN","data":{"a":"\\ud800"}}', 400, "ERR_BAD_JSON", "/data/a"),
    "a lone surrogate in the seed": (b'{"phase":"OPEN","seed":"\\ud800"}', 400, "ERR_BAD_JSON", "/seed"),
    "a lone surrogate in the phase": (b'{"phase":"\\ud800"}', 400, "ERR_BAD_JSON", "/phase"),
    "an array": (b"[]", 400, "ERR_BAD_REQUEST", "$: found []"),
    "an unknown key": (b'{"phase":"OPEN","dta":{}}', 400, "ERR_BAD_REQUEST", "did you mean 'data'?"),
    "no phase": (b'{"data":{}}', 400, "ERR_BAD_REQUEST", "$.phase: found nothing"),
    "an unknown phase": (b'{"phase":"OPNE","data":{}}', 400, "ERR_UNKNOWN_PHASE", "OPEN, ALIGN, ASCEND, CLEAR, SEAL"),
    "a phase that is no text": (b'{"phase":1,"data":{}}', 400, "ERR_BAD_REQUEST", "$.phase: found 1"),
    "a payload that is a list": (b'{"phase":"OPEN","data":[1]}', 400, "ERR_BAD_REQUEST", "$.data: found [1]"),
    "a payload that is null": (b'{"phase":"OPEN","data":null}', 400, "ERR_BAD_REQUEST", "$.data: found null"),
    "an unknown profile": (b'{"phase":"OPEN","profile":"HUGE"}', 422, "ERR_BAD_RUNE", "HUGE"),
    "an unknown capability": (b'{"phase":"OPEN","capability":"nope"}', 404, "ERR_UNKNOWN_CAPABILITY", "nope"),
    "a phase that is refused": (b'{"phase":"ASCEND","data":{}}', 403, "ERR_PERMISSION_DENIED", "'exec'"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code", "said"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_bad_request(server: Server, body: bytes, status: int, code: str, said: str) -> None:
    told = assert_told(server, server.post("/invoke/echo", body), status, code)
    assert said in told["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_a_wrong_content_type(server: Server, content_type: str) -> None:
    reply = server.post("/invoke/echo", {"phase": "OPEN", "data": {}}, content_type)
    assert_told(server, reply, 415, "ERR_CONTENT_TYPE")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/a+json"])
def test_a_content_type_that_means_json(server: Server, content_type: str) -> None:
    assert server.post("/invoke/echo", {"phase": "OPEN", "data": {}}, content_type).status == 200


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("nobody", 404, "ERR_UNKNOWN_OVERLAY"),
        ("ECHO", 404, "ERR_UNKNOWN_OVERLAY"),
        ("..%2Fecho", 404, "ERR_UNKNOWN_OVERLAY"),
        ("../echo", 404, "ERR_UNKNOWN_OVERLAY"),
        ("..", 404, "ERR_UNKNOWN_OVERLAY"),
        ("%2e%2e", 404, "ERR_UNKNOWN_OVERLAY"),
        ("echo%00", 404, "ERR_UNKNOWN_OVERLAY"),
        ("%ff%fe", 404, "ERR_UNKNOWN_OVERLAY"),
        ("x" * 4000, 404, "ERR_UNKNOWN_OVERLAY"),
        ("echo/" + "x" * 4000, 404, "ERR_UNKNOWN_CAPABILITY"),
        ("echo.nope", 404, "ERR_UNKNOWN_CAPABILITY"),
        ("off", 409, "ERR_OVERLAY_DISABLED"),
        ("broken", 409, "ERR_OVERLAY_BROKEN"),
        ("strict", 422, "ERR_INPUT_SCHEMA"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_overlay_that_cannot_be_called(server: Server, name: str, status: int, code: str) -> None:
    assert_told(server, server.invoke(name), status, code)


@pytest.mark.parametrize("name", ["nobody", "x" * 4000, "%ff"])
def test_a_bad_body_for_an_overlay_that_does_not_exist(server: Server, name: str) -> None:
    assert_told(server, server.post(f"/invoke/{name}/{name}", b"{"), 400, "ERR_BAD_JSON")


def test_a_hundred_megabytes_that_are_announced_are_refused_unread(server: Server) -> None:
    before_mb = server.peak_mb
    with server.connection() as connection:
        connection.putrequest("POST", "/invoke/echo")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(100 * MB))
        connection.endheaders()
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["code"]) == (413, "ERR_TOO_LARGE")
    assert server.peak_mb - before_mb < 16


def test_a_hundred_megabytes_in_chunks_are_refused_without_being_kept(server: Server) -> None:
    before_mb = server.peak_mb
    headers = {"Content-Type": "application/json"}
    chunks = (b" " * MB for _ in range(100))
    reply = server.request("POST", "/invoke/echo", chunks, headers, encode_chunked=True)
    assert_told(server, reply, 413, "ERR_TOO_LARGE")
    assert server.peak_mb - before_mb < 50  # the 16 MiB that may come, as chunks and joined, and not the other 84


# --- Programs ----------------------------------------------------------------------------------------------------

PROGRAM_FAULTS = {
    "missing": (409, "ERR_OVERLAY_BROKEN", "nowhere"),
    "not_executable": (409, "ERR_OVERLAY_BROKEN", "data.txt"),
    "missing_script": (409, "ERR_OVERLAY_BROKEN", "run.py"),
    "bad_shebang": (502, "ERR_OVERLAY_START", "interpreter"),
    "exits_1": (502, "ERR_OVERLAY_CRASH", "1"),
    "writes_nothing": (502, "ERR_OVERLAY_PROTOCOL", "wrote nothing"),
    "writes_html": (502, "ERR_OVERLAY_PROTOCOL", "html"),
    "writes_100_mb": (502, "ERR_OUTPUT_TOO_LARGE", "16"),
    "half_json": (502, "ERR_OVERLAY_PROTOCOL", ""),
    "half_json_lines": (502, "ERR_OVERLAY_PROTOCOL", ""),
    "double_keys": (502, "ERR_OVERLAY_PROTOCOL", "ok"),
    "writes_nan": (502, "ERR_OVERLAY_PROTOCOL", "NaN"),
    "big_int": (502, "ERR_OVERLAY_PROTOCOL", "2^53"),
    "dies_of_signal": (502, "ERR_OVERLAY_CRASH", "SIGSEGV"),
    "exits_3_with_reply": (200, "ERR_OVERLAY_FAILED", "no such model"),
    "exits_3_with_value": (502, "ERR_OVERLAY_CRASH", "3"),
}


@pytest.mark.parametrize(("name", "status", "code", "said"), [(name, *told) for name, told in PROGRAM_FAULTS.items()])
def test_a_program_that_goes_wrong(server: Server, name: str, status: int, code: str, said: str) -> None:
    told = assert_told(server, server.invoke(name, phase="ASCEND"), status, code)  # some run other programs
    assert said in told["error"]


@pytest.mark.parametrize(
    ("name", "result"),
    [("noise_before_json", "after the noise"), ("closes_stdin", "stdin closed"), ("floods_stderr", 1)],
)
def test_a_program_that_behaves_oddly_and_answers(server: Server, name: str, result: Any) -> None:
    assert assert_told(server, server.invoke(name), 200, "OK")["result"] == result


def test_a_program_that_never_reads_eight_megabytes(server: Server) -> None:
    reply = server.invoke("never_reads_stdin", {"text": "x" * (8 * MB)})
    assert assert_told(server, reply, 200, "OK")["result"] == "unread"


def test_a_grandchild_that_holds_stdout_is_gone_with_its_call(server: Server) -> None:
    assert_told(server, server.invoke("grandchild"), 200, "OK")
    assert running(str(server.settings.state)) == []


def test_a_child_left_in_the_background_is_gone_with_its_call(server: Server) -> None:
    assert_told(server, server.invoke("background_child"), 200, "OK")
    assert running(str(server.settings.state)) == []


def test_a_program_that_ignores_sigterm_is_killed_when_its_time_is_over(server: Server, tmp_path: Path) -> None:
    fifo = tmp_path / "started"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        reply = server.invoke("ignores_term", {"started": str(fifo)}, timeout_ms=300)
        told = assert_told(server, reply, 504, "ERR_TIMEOUT")
    finally:
        os.close(reader)
    assert told["retryable"] is True
    assert server.line_of(told["request_id"])["exit_code"] == -signal.SIGKILL


# --- Services ----------------------------------------------------------------------------------------------------

SERVICE_FAULTS = {
    "refuses": ("deaf.well", 502, "ERR_HTTP_UNREACHABLE", ""),
    "hangs": ("web.hangs", 504, "ERR_TIMEOUT", ""),
    "redirects": ("web.redirects", 502, "ERR_HTTP_STATUS", "example.invalid"),
    "answers 500": ("web.fails", 502, "ERR_HTTP_STATUS", "500"),
    "answers HTML": ("web.html", 502, "ERR_OVERLAY_PROTOCOL", "html"),
    "closes in the middle": ("web.half", 502, "ERR_HTTP_UNREACHABLE", ""),
    "closes without an answer": ("web.unheard", 502, "ERR_HTTP_UNREACHABLE", ""),
    "answers too much": ("web.large", 502, "ERR_OUTPUT_TOO_LARGE", "16"),
}


@pytest.mark.parametrize(("address", "status", "code", "said"), SERVICE_FAULTS.values(), ids=SERVICE_FAULTS.keys())
def test_a_service_that_goes_wrong(server: Server, address: str, status: int, code: str, said: str) -> None:
    told = assert_told(server, server.invoke(address, timeout_ms=300 if code == "ERR_TIMEOUT" else None), status, code)
    assert said in told["error"]


def test_a_service_that_answers_well(server: Server) -> None:
    assert assert_told(server, server.invoke("web.well"), 200, "OK")["result"] == "well"


def test_after_all_that_the_ledger_is_whole(server: Server) -> None:
    assert server.get("/ready").json() == {"ready": True}
    assert verification.verify(server.settings.ledger).ok
