"""psyfi: a small HTTP service that simulates qubits losing their coherence (`coherence.py`).

    python3 service.py [--host 127.0.0.1] [--port 8787]

POST /run takes the bus's envelope or a bare {"simulation_type", "parameters", "seed"}; GET /health tells that it is up.
Every answer is {"ok": true, "result"} or {"ok": false, "error", "code"}: 400 for what is not a request, 422 for a
parameter that cannot be. Port 0 takes a free one; the first line printed is the address. SIGTERM and SIGINT end it
once the requests in hand are answered; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import TYPE_CHECKING, Any, NoReturn

from coherence import BadParameter, Parameters, read_parameters, simulate

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_PORT = 8787
DEFAULT_SEED = "0"
MAX_BODY_BYTES = 1 << 20
IDLE_S = 75
"""How long a kept connection may stay silent."""

STOP_POLL_S = 0.1
"""How often the service looks whether it shall end."""

DRAIN_S = 30
"""How long the requests in hand may take once the service shall end."""

LENGTH = re.compile("[0-9]{1,18}")
ROUTES = {"/run": "POST", "/health": "GET"}
EXTRAS = ("standard_error", "inversion", "closed_form")


class HttpError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def bad_request(message: str) -> HttpError:
    return HttpError(400, "BAD_INPUT", message)


def unprocessable(message: str) -> HttpError:
    return HttpError(422, "BAD_INPUT", message)


def run(body: bytes) -> dict[str, Any]:
    """The result for one request body. Raises `HttpError`."""
    request = read_object(body)
    payload = member(request, "payload", {}) if "payload" in request else request
    kind = payload.get("simulation_type")
    if not isinstance(kind, str) or kind not in SIMULATIONS:
        raise unprocessable(f"simulation_type is {json.dumps(kind)}; known: {', '.join(SIMULATIONS)}")
    try:
        parameters = read_parameters(member(payload, "parameters", {}))
    except BadParameter as error:
        raise unprocessable(str(error)) from None
    seed = seed_of(request, payload)
    parameters, extras, note = degrade(parameters, member(request, "memory", {}))
    return {"simulation_type": kind, "seed": seed, **SIMULATIONS[kind](parameters, seed, extras=extras), **note}


def read_object(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body, parse_constant=not_json)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise bad_request("the body must be one JSON object")
    return request


def not_json(name: str) -> NoReturn:
    """Refuse the constants NaN and Infinity, which Python would read."""
    raise ValueError(f"{name} is not a JSON value")


def member(parent: dict[str, Any], name: str, default: dict[str, Any]) -> dict[str, Any]:
    value = parent.get(name, default)
    if not isinstance(value, dict):
        raise bad_request(f"{name} must be an object")
    return value


def seed_of(request: dict[str, Any], payload: dict[str, Any]) -> str:
    """The envelope's seed, else the payload's, else a fixed one: without a seed, too, the answer is the same."""
    given = request.get("seed")
    seed = payload.get("seed") if given is None else given
    if seed is None:
        return DEFAULT_SEED
    if isinstance(seed, bool) or not isinstance(seed, (str, int)):
        raise unprocessable("seed must be a string or a whole number")
    return str(seed)


def degrade(parameters: Parameters, memory: dict[str, Any]) -> tuple[Parameters, bool, dict[str, Any]]:
    """What the envelope's `memory` asks to save: the parameters, whether extras are made, and what to say of it."""
    fraction, no_extras = memory.get("max_fraction"), memory.get("disable_nonessential") is True
    if fraction is None and not no_extras:
        return parameters, True, {}
    share = 1.0 if fraction is None else fraction
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise bad_request(f"memory.max_fraction is {fraction!r}; allowed: a number from 0 to 1")
    fewer = dataclasses.replace(parameters, members=max(1, int(parameters.members * share)))
    said = {"members_asked": parameters.members, "left_out": list(EXTRAS) if no_extras else []}
    return fewer, not no_extras, {"degraded": said}


SIMULATIONS = {"quantum_coherence": simulate}


def health() -> dict[str, Any]:
    return {"status": "ok", "service": "psyfi", "version": version(), "simulations": list(SIMULATIONS)}


@cache
def version() -> str:
    """As the manifest beside this file has it."""
    manifest = json.loads(Path(__file__).with_name("manifest.json").read_text(encoding="utf-8"))
    return str(manifest["version"])


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open between requests."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "psyfi"
    timeout = IDLE_S
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave in one write

    error_content_type = "application/json"
    error_message_format = '{"ok":false,"error":"%(code)d: %(explain)s","code":"BAD_INPUT"}'

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a caller that went away is no fault of the service
            super().handle()

    def handle_one_request(self) -> None:
        with contextlib.ExitStack() as self.in_hand:
            super().handle_one_request()

    def parse_request(self) -> bool:
        """The first line has come: from here on the request is in hand, before its caller is told to send a body."""
        self.in_hand.enter_context(self.server.request_in_hand())
        return super().parse_request()

    def answer(self) -> None:
        """Serve one request of any method."""
        try:
            status, reply = 200, {"ok": True, "result": self.result()}
        except HttpError as error:
            status, reply = error.status, {"ok": False, "error": str(error), "code": error.code, "retryable": False}
        self.send(status, reply)
        self.wfile.flush()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer  # noqa: N815

    def handle_expect_100(self) -> bool:
        """Tell a caller that waits for it to send its body, at once and not with the answer."""
        goes_on = super().handle_expect_100()
        self.wfile.flush()
        return goes_on

    def result(self) -> dict[str, Any]:
        body = self.body()  # read first: what stays unread would be taken for the next request
        path = self.path.partition("?")[0]
        method = ROUTES.get(path)
        if method is None:
            raise HttpError(404, "NO_SUCH_PATH", f"there is nothing at {path}; known: {', '.join(ROUTES)}")
        if self.command != method:
            raise HttpError(405, "WRONG_METHOD", f"{path} takes {method}")
        return run(body) if path == "/run" else health()

    def body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not LENGTH.fullmatch(length):
            self.close_connection = True
            raise HttpError(411, "BAD_INPUT", "send the body's length in Content-Length")
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise HttpError(413, "BAD_INPUT", f"the body has {length} bytes; allowed: {MAX_BODY_BYTES}")
        return self.rfile.read(int(length))

    def send(self, status: int, reply: dict[str, Any]) -> None:
        body = json.dumps(reply, sort_keys=True, separators=(",", ":")).encode()
        self.close_connection = self.close_connection or self.server.is_ending
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == 405:  # noqa: PLR2004
            self.send_header("Allow", ROUTES[self.path.partition("?")[0]])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing of a served request: the bus keeps the record."""


class Server(ThreadingTCPServer):
    """A thread for each connection. Not HTTPServer, which looks its own name up in the DNS before it listens."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.is_ending = False
        self._in_hand = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def request_in_hand(self) -> Iterator[None]:
        with self._changed:
            self._in_hand += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_hand -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Take no more connections, and wait `DRAIN_S` at most for the requests in hand."""
        self.is_ending = True
        self.shutdown()
        self.server_close()
        with self._changed:
            self._changed.wait_for(lambda: self._in_hand == 0, DRAIN_S)


def serve(host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # where it ends the service at once, without a traceback
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before the first thread, so that all of them leave it to sigwait
    try:
        server = Server(host, port)
    except OSError as error:
        sys.stderr.write(f"psyfi cannot listen on {host}:{port}: {error.strerror or error}\n")
        return 1
    with server:
        threading.Thread(target=server.serve_forever, args=(STOP_POLL_S,), daemon=True).start()
        print(f"psyfi listens on http://{host}:{server.server_address[1]}", flush=True)
        signal.sigwait(stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop)
        server.end()
    return 0


def main() -> int:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="Simulate how an ensemble of qubits loses its coherence, over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    port = os.environ.get("OVERLAY_PORT", DEFAULT_PORT)
    parser.add_argument("--port", type=int, default=port, help="0 takes a free one (default: OVERLAY_PORT or 8787)")
    options = parser.parse_args()
    return serve(options.host, options.port)


if __name__ == "__main__":
    sys.exit(main())
