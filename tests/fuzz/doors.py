"""The HTTP door of a real `aal serve`: every operation of its own `GET /openapi.json`, and damaged bytes on the socket.

Whatever comes, there is an answer or the connection ends: no 500, no status that the document does not name, JSON with
a code of the catalogue, no words of Python. At the end the server still answers, and its log has no traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from http.client import HTTPResponse, RemoteDisconnected
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hypothesis import strategies as st

from bus.errors import CATALOGUE
from tests.fuzz import documents
from tests.fuzz.campaign import HANG_S, Probe, Target
from tests.fuzz.samples import damaged_bytes, texts_of
from tests.support import PATIENCE_S, REPO, add_native, add_overlay, write_overlay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import requests
    from hypothesis.strategies import DrawFn, SearchStrategy
    from schemathesis import Case

ECHO = """
import json, sys

for line in sys.stdin:
    call = json.loads(line)
    given = call["payload"].get("reply")
    reply = given if isinstance(given, dict) else {"ok": True, "result": call["payload"]}
    print(json.dumps({**reply, "request_id": call["request_id"]}), flush=True)
"""
"""A worker that answers with the payload, or with the reply that stands in it."""

SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
NAMES = ("echo", "strict", "web", "broken")
"""The overlays of the server. Nothing listens where `web` is."""

QUIET_S = 0.05
"""How long an answer is waited for before the client says that it has sent all."""

CLIENT_TIMEOUT_S = 1
SHOWN = 500
"""Bytes of a request that are shown where its answer may not be."""

_GATEWAY = frozenset({502, 503, 504})
_PYTHON = re.compile(rb"Traceback|File \\?\"[^\"]*\.py|[a-z]Error\(")


class Door(NamedTuple):
    """A server that runs."""

    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        return (self.folder / "serve.log").read_text("utf-8", "replace")

    def send(self, data: bytes) -> bytes:
        """All that the server says to these bytes on a connection of their own, until it ends that."""
        with socket.create_connection(("127.0.0.1", self.port), HANG_S) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            return b"".join(_answers(connection))


def _answers(connection: socket.socket) -> Iterator[bytes]:
    connection.settimeout(QUIET_S)
    while True:
        try:
            data = connection.recv(65536)
        except TimeoutError:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(HANG_S)
            continue
        except ConnectionError:
            return
        if not data:
            return
        yield data


@contextlib.contextmanager
def door() -> Iterator[Door]:
    """`aal serve` in a folder of its own. Leaving it asks whether the server is well, and ends it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _lay_out(folder / "overlays")
        command = [sys.executable, "-m", "bus.cli", "-C", name, "serve", "--port", "0"]
        with (
            (folder / "serve.log").open("wb") as log,
            subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=log, text=True) as server,
        ):
            try:
                found = Door(_port(server), folder)
                yield found
                _is_well(found)
            finally:
                server.terminate()
                server.wait(PATIENCE_S)


def _lay_out(root: Path) -> None:
    proc = {"proc": {"command": [sys.executable, "run.py"], "mode": "worker"}}
    capabilities = {"run": {"runner": "proc"}}
    native = {"name": "echo", "version": "1", "permissions": ["analysis"], "capabilities": capabilities}
    write_overlay(root, "echo", native | {"entrypoints": proc}, {"run.py": ECHO})
    add_native(root, "strict", {"run": {"runner": "proc", "input_schema": SCHEMA, "output_schema": SCHEMA}})
    web = {"name": "web", "version": "1", "capabilities": {"run": {"runner": "http"}}}
    write_overlay(root, "web", web | {"entrypoints": {"http": {"base_url": "http://127.0.0.1:9"}}})
    add_overlay(root, "broken", "nowhere")


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AAL_")}
    own = {"AAL_FSYNC": "never", "AAL_LOG_LEVEL": "warning", "AAL_CLIENT_TIMEOUT_S": str(CLIENT_TIMEOUT_S)}
    return inherited | own | {"PYTHONPATH": str(REPO)}


def _port(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    said = server.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
    assert found, f"the server does not start: {said}"
    return int(found[1])


def _is_well(found: Door) -> None:
    said = found.send(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 "), said
    assert "Traceback" not in found.log(), found.log()


# Operations


@contextlib.contextmanager
def operations() -> Iterator[Probe]:
    """Calls as the document describes them, and as it does not, by schemathesis."""
    import requests  # noqa: PLC0415  # with schemathesis, which only this target needs
    import schemathesis  # noqa: PLC0415

    modes = schemathesis.GenerationMode
    with door() as found, requests.Session() as session:
        schema = schemathesis.openapi.from_url(f"{found.url}/openapi.json")
        cases = [
            _sound(operation).as_strategy(generation_mode=mode)
            for operation in schema.exclude(path="/events").get_all_operations()  # whose answer has no end
            for mode in (modes.POSITIVE, modes.NEGATIVE)
        ]
        yield Probe(st.builds(_aim, st.one_of(cases), _aims()), lambda case: _call(found, session, case))


def _sound(operation: Any) -> Any:
    """Raises what is wrong with the document where the operation makes no sense in it."""
    return operation.ok()


def _aims() -> SearchStrategy[str | None]:
    return st.none() | st.sampled_from(NAMES)


def _aim(case: Case[Any], name: str | None) -> Case[Any]:
    """A case for an overlay that is there, where a name is given: no generator guesses one."""
    if name is not None and "name" in (case.path_parameters or {}):
        case.path_parameters["name"] = name
    return case


def _call(found: Door, session: requests.Session, case: Case[Any]) -> str:
    answer = case.call(base_url=found.url, session=session, timeout=HANG_S)
    documented = case.operation.definition.raw["responses"]
    asked = case.as_curl_command()
    assert {str(answer.status_code), "default"} & documented.keys(), (asked, answer.status_code, sorted(documented))
    _judge(answer.status_code, answer.headers.get("content-type", [""])[0], answer.content, asked)
    return str(answer.status_code)


def _judge(status: int, media_type: str, body: bytes, asked: str) -> None:
    """Raise where a caller may not be answered so."""
    shown = (asked, status, media_type, body)
    assert status < 500 or status in _GATEWAY, shown
    assert not _PYTHON.search(body), shown
    if media_type.startswith("text/plain") and status == 200:  # the metrics
        return
    assert media_type.startswith("application/json"), shown
    said = json.loads(body)
    if status >= 400 and "ready" not in said:
        assert CATALOGUE[said["code"]].http_status == status, shown


# Bytes

_HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
_CALL = b'{"phase":"OPEN","data":{"text":"hello"}}'
_SOUND = (
    f"GET / HTTP/1.1\r\n{_HEAD}\r\n".encode(),
    f"GET /provenance?limit=1&ok=true HTTP/1.1\r\n{_HEAD}Accept: */*\r\n\r\n".encode(),
    f"POST /invoke/echo HTTP/1.1\r\n{_HEAD}Content-Length: {len(_CALL)}\r\n\r\n".encode() + _CALL,
    f"POST /invoke/strict/run HTTP/1.1\r\n{_HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(_CALL), _CALL),
    f"POST /invoke/echo HTTP/1.0\r\n{_HEAD}Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
)
_LINES = (
    *("Content-Length: -1", "Content-Length: 1\r\nContent-Length: 2", "Content-Length: 99999999999999999999"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Content-Encoding: gzip", "Host: evil.example"),
    *("Host: a\r\nHost: b", "Origin: null", "Origin: http://evil.example", "Authorization: Bearer \xff"),
    "X: " + "a" * 40_000,
    *("Connection: close", "Connection: upgrade\r\nUpgrade: websocket", "Upgrade: h2c", " folded", "no colon"),
    *("\0: \0", ": "),
    *("Expect: 200-ok", "X-Request-Id: " + "x" * 100, "Content-Type: text/plain", "Cookie: a\rb", "Range: bytes=0-1"),
)  # fmt: skip
_TARGETS = (
    "/invoke/%2e%2e/x",
    "//invoke/echo",
    "*",
    "http://evil.example/",
    "/" + "a" * 9000,
    "/invoke/echo?\xff",
    "/%",
    "",
)


@st.composite
def _request_bytes(draw: DrawFn) -> bytes:
    """A sound request with other header lines, another target, a body of any kind, or damaged as bytes; or two."""
    request = draw(st.sampled_from(_SOUND))
    match draw(st.sampled_from(["lines", "target", "body", "bytes", "two"])):
        case "lines":
            line, rest = request.split(b"\r\n", 1)
            added = [text.encode("latin-1") for text in draw(st.lists(st.sampled_from(_LINES), min_size=1, max_size=3))]
            return b"\r\n".join([line, *added, rest])
        case "target":
            method, _, rest = request.split(b" ", 2)
            methods = st.sampled_from((method, b"PUT", b"OPTIONS", b"TRACE", b"CONNECT", b"PRI", b"G\xe9T"))
            return b" ".join([draw(methods), draw(st.sampled_from(_TARGETS)).encode("latin-1"), rest])
        case "body":
            body = draw(texts_of(documents.REQUESTS))
            return f"POST /invoke/echo HTTP/1.1\r\n{_HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
        case "bytes":
            return draw(damaged_bytes(st.just(request)))
    return request + draw(damaged_bytes(st.sampled_from(_SOUND)))


@contextlib.contextmanager
def request_bytes() -> Iterator[Probe]:
    with door() as found:
        yield Probe(_request_bytes(), _told_by(found.send))


def _told_by(send: Callable[[bytes], bytes]) -> Callable[[bytes], str]:
    def tell(request: bytes) -> str:
        said = send(request)
        if not said:
            return "closed"
        assert said.startswith(b"HTTP/1.1 "), said
        first = _first_answer(said)
        if first is None:
            return "cut off"
        _judge(*first, repr(request[:SHOWN]))
        return str(first[0])

    return tell


class _Said:
    """What was said, as `HTTPResponse` reads it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any) -> BytesIO:
        return BytesIO(self._data)


def _first_answer(said: bytes) -> tuple[int, str, bytes] | None:
    """Status, media type and body, past a `100 Continue`; None where it has not come whole."""
    response = HTTPResponse(_Said(said))  # type: ignore[arg-type]  # all that it asks of a socket
    try:
        response.begin()
    except RemoteDisconnected:  # after the `100 Continue`
        return None
    body = response.read(response.length) if response.length else b""
    whole = response.length in {0, None} and len(body) == int(response.headers.get("Content-Length", len(body)))
    return (response.status, response.headers.get("Content-Type", ""), body) if whole else None


TARGETS = (
    Target("operations", "HTTP, by the OpenAPI document", 6, operations, frozenset({"200", "400", "404"})),
    Target("bytes", "HTTP, as bytes", 6, request_bytes, frozenset({"200", "400", "closed"})),
)
