"""Services that refuse, hang, redirect, break off or lie: each gets an outcome with a code."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import aiohttp.connector
import pytest
from aiohttp import ThreadedResolver, web

from runners import breaker, http, purges
from runners.base import Code, HttpTarget, Outcome, Sandbox, ServiceTarget
from runners.breaker import FAILURES, FIRST_WAIT_S
from runners.faults import End, ServiceError
from runners.http import HttpRunner
from tests import programs
from tests.runner_fixtures import PATIENCE, anyio_backend, clock, nothing_left
from tests.support import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from runners.base import Job, Share
    from tests.runner_fixtures import Clock


OK_ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"ok":true}'


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RETRY_WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(http, "NEWS_S", 0.0)


@pytest.fixture
async def runner(nothing_left: None) -> AsyncIterator[HttpRunner]:
    runner = HttpRunner()
    yield runner
    await runner.close()


@contextlib.asynccontextmanager
async def service(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A service that answers every address and method with `handle`; its base URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    server = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{server.addresses[0][1]}"
    finally:
        await server.cleanup()


class RawService:
    """A service that answers its n-th connection with the n-th bytes, or the last ones, and closes it then."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []

    async def start(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._handle, sock=listener)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/run"

    async def __aenter__(self) -> RawService:
        await self.start(socket.create_server(("127.0.0.1", 0)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await read_request(reader))
        writer.write(self.answers[min(len(self.requests), len(self.answers)) - 1])
        await writer.drain()
        writer.close()
        await writer.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
    return head + await reader.readexactly(length)


@contextlib.asynccontextmanager
async def talking(
    converse: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """A service that converses so on each connection, and closes it then; its base URL."""
    conversations: set[asyncio.Future[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            conversations.add(conversation := asyncio.ensure_future(converse(reader, writer)))
            await asyncio.wait({conversation})

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}/run"
    finally:
        server.close()
        for conversation in conversations:
            conversation.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)
        await server.wait_closed()


def answering(
    body: str | bytes, status: int = 200, headers: dict[str, str] | None = None
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(_: web.Request) -> web.StreamResponse:
        raw = body.encode() if isinstance(body, str) else body
        return web.Response(body=raw, status=status, headers={"Content-Type": "application/json", **(headers or {})})

    return handle


def error_of(outcome: Outcome) -> str:
    assert outcome.error is not None
    return outcome.error


# What is sent


async def test_a_post_sends_the_envelope_as_json_with_the_request_id(runner: HttpRunner) -> None:
    async def handle(request: web.Request) -> web.Response:
        names = ("Content-Type", "X-Request-Id", "Cookie")
        return web.json_response({"body": await request.json(), **{name: request.headers.get(name) for name in names}},
                                 headers={"Set-Cookie": "session=1"})  # fmt: skip

    async with service(handle) as url:
        job = programs.make_job(HttpTarget(url), {"n": 1})
        first = await runner.run(job)
        second = await runner.run(job)
    assert first.result == second.result
    assert first.result == {
        "body": {"payload": {"n": 1}},
        "Content-Type": "application/json",
        "X-Request-Id": job.request_id,
        "Cookie": None,
    }


async def test_a_get_sends_the_query_beside_that_of_its_address_and_no_body(runner: HttpRunner) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response([request.method, dict(request.query), await request.text()])

    async with service(handle) as url:
        target = HttpTarget(f"{url}/ping?key=1", "GET", {"text": "a&b=č"})
        outcome = await runner.run(programs.make_job(target))
    assert outcome.result == ["GET", {"key": "1", "text": "a&b=č"}, ""]


async def test_a_body_of_any_size_arrives_whole(runner: HttpRunner) -> None:
    async with RawService(OK_ANSWER) as raw:
        for size in (0, 1, 64 * 1024, 5 * 2**20):
            job = programs.make_job(HttpTarget(raw.url, "PUT"))._replace(envelope=b"x" * size)
            assert (await runner.run(job)).result == {"ok": True}
            assert raw.requests[-1].partition(b"\r\n\r\n")[2] == job.envelope


async def test_the_user_and_the_password_of_an_address_are_sent_as_such(runner: HttpRunner) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response([request.headers["Authorization"], request.headers["Host"], request.path])

    async with service(handle) as url:
        host = url.partition("//")[2]
        outcome = await runner.run(programs.make_job(HttpTarget(f"http://user:secret@{host}/run")))
    assert outcome.result == ["Basic dXNlcjpzZWNyZXQ=", host, "/run"]


async def test_what_a_field_cannot_hold_adds_no_field(runner: HttpRunner) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response([request.headers["X-Request-Id"], "X-Evil" in request.headers])

    async with service(handle) as url:
        job = programs.make_job(HttpTarget(url))._replace(request_id="č\r\nX-Evil: 1")
        outcome = await runner.run(job)
    assert outcome.result == ["%C4%8D%0D%0AX-Evil%3A%201", False]


async def test_calls_share_a_connection(runner: HttpRunner) -> None:
    async def handle(request: web.Request) -> web.Response:
        assert request.transport is not None
        return web.json_response(request.transport.get_extra_info("peername")[1])

    async with service(handle) as url:
        ports = {(await runner.run(programs.make_job(HttpTarget(url)))).result for _ in range(5)}
    assert len(ports) == 1


async def test_proxies_of_the_environment_are_not_used(runner: HttpRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with service(answering("1")) as url:
        assert (await runner.run(programs.make_job(HttpTarget(url)))).result == 1


# What comes back


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"error": "no such model"}, "no such model"),
        ({"detail": "not found"}, "not found"),
        ({"error": {"message": "bad key", "type": "auth"}}, "bad key"),
        ({"detail": [{"loc": ["body"]}]}, "HTTP 404 Not Found"),
        (["odd"], "HTTP 404 Not Found"),
        ("gone", "gone"),
    ],
)
async def test_a_4xx_without_ok_is_a_reply_that_says_no(runner: HttpRunner, body: Any, error: str) -> None:
    async with service(answering(json.dumps(body), 404)) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.code is Code.OK
    assert outcome.result == {"ok": False, "error": error, "result": body}


async def test_a_4xx_with_ok_is_the_reply_itself(runner: HttpRunner) -> None:
    async with service(answering('{"ok":false,"error":"no","code":"ERR_MINE"}', 422)) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.result == {"ok": False, "error": "no", "code": "ERR_MINE"}


async def test_a_4xx_that_is_not_json_names_its_status(runner: HttpRunner) -> None:
    async with service(answering("<h1>lost</h1>", 404)) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.code is Code.PROTOCOL
    assert "HTTP 404 Not Found" in error_of(outcome)
    assert "<h1>lost</h1>" in error_of(outcome)


@pytest.mark.parametrize("status", [304, 500, 503])
async def test_another_status_is_an_error_of_the_service(runner: HttpRunner, status: int) -> None:
    async with service(answering("" if status == 304 else '{"ok":true}', status)) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.code is Code.HTTP_STATUS
    assert f"HTTP {status}" in error_of(outcome)
    assert outcome.result is None
    assert outcome.log == ("" if status == 304 else '{"ok":true}')


async def test_an_empty_answer_is_told_as_nothing(runner: HttpRunner) -> None:
    async with service(answering("", 204)) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.code is Code.PROTOCOL
    assert error_of(outcome).endswith("answered HTTP 204 No Content and nothing")


async def test_interim_answers_are_passed_over(runner: HttpRunner) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    async with RawService(interim + OK_ANSWER) as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url)))
    assert outcome.result == {"ok": True}


async def test_a_compressed_answer_is_opened(runner: HttpRunner) -> None:
    async with service(answering(gzip.compress(b'{"ok":true}'), headers={"Content-Encoding": "gzip"})) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.result == {"ok": True}


async def test_the_cap_holds_for_what_a_compressed_answer_unfolds_to(runner: HttpRunner) -> None:
    bomb = gzip.compress(b"0" * 2**26)
    async with service(answering(bomb, headers={"Content-Encoding": "gzip"})) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url), max_output_bytes=2**20))
    assert len(bomb) < 2**20
    assert outcome.code is Code.OUTPUT_TOO_LARGE


async def test_an_answer_that_cannot_be_decompressed_is_a_broken_protocol(runner: HttpRunner) -> None:
    async with service(answering(b"plain", headers={"Content-Encoding": "gzip"})) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.code is Code.PROTOCOL
    assert "decompressed" in error_of(outcome)


async def test_what_is_not_http_is_a_broken_protocol(runner: HttpRunner) -> None:
    async with RawService(b"SSH-2.0-OpenSSH_9.6\r\n") as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url)))
    assert outcome.code is Code.PROTOCOL
    assert "not HTTP" in error_of(outcome)


# Redirects


def redirecting(status: int, location: str, hops: int = 1) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Redirects from /0 to /1 and so on, `hops` times, then echoes the method and the body."""

    async def handle(request: web.Request) -> web.StreamResponse:
        hop = int(request.path.rpartition("/")[2])
        if hop < hops:
            return web.Response(status=status, headers={"Location": location.format(hop + 1)})
        return web.json_response([request.method, await request.text(), dict(request.query)])

    return handle


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_within_the_service_that_keeps_the_method_is_followed(runner: HttpRunner, status: int) -> None:
    async with service(redirecting(status, "/there/{}", hops=3)) as url:
        job = programs.make_job(HttpTarget(f"{url}/0"), {"n": 1})
        outcome = await runner.run(job)
    assert outcome.result == ["POST", job.envelope.decode(), {}]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_get_follows_every_redirect_within_the_service(runner: HttpRunner, status: int) -> None:
    async with service(redirecting(status, "{}?from=there")) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(f"{url}/0", "GET", {"q": "1"})))
    assert outcome.result == ["GET", "", {"from": "there"}]


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_a_post_is_not_made_a_get(runner: HttpRunner, status: int) -> None:
    async with service(redirecting(status, "/{}")) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(f"{url}/0")))
    assert outcome.code is Code.HTTP_STATUS
    assert "Location '/1'" in error_of(outcome)


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1:1/{}", "https://127.0.0.1/{}", "//evil.example/{}", "http://[::1/{}", "file:///etc/passwd"],
)
async def test_a_redirect_out_of_the_service_is_refused_and_named(runner: HttpRunner, location: str) -> None:
    async with service(redirecting(307, location)) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(f"{url}/0", "GET")))
    assert outcome.code is Code.HTTP_STATUS
    assert outcome.retryable is False
    assert location.format(1) in error_of(outcome)


async def test_a_redirect_to_what_is_no_text_is_an_outcome(runner: HttpRunner) -> None:
    async with RawService(b"HTTP/1.1 307 Odd\r\nLocation: /\xff\r\nContent-Length: 0\r\n\r\n", OK_ANSWER) as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url)))
    assert outcome.code in (Code.OK, Code.UNREACHABLE)


async def test_a_fourth_redirect_is_refused(runner: HttpRunner) -> None:
    async with service(redirecting(307, "/{}", hops=4)) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(f"{url}/0")))
    assert outcome.code is Code.HTTP_STATUS
    assert "'/4'" in error_of(outcome)


# No answer


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def test_a_service_that_refuses_is_unreachable(runner: HttpRunner, deaf_port: int) -> None:
    target = HttpTarget(f"http://user:secret@127.0.0.1:{deaf_port}/run?key=secret")
    outcome = await runner.run(programs.make_job(target))
    assert outcome.code is Code.UNREACHABLE
    assert f"POST http://127.0.0.1:{deaf_port}/run could not be reached" in error_of(outcome)
    assert "secret" not in error_of(outcome)


async def test_a_name_that_nobody_knows_is_unreachable(runner: HttpRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(ThreadedResolver, "resolve", resolve)
    outcome = await runner.run(programs.make_job(HttpTarget("http://no.such.host.invalid/")))
    assert outcome.code is Code.UNREACHABLE
    assert "Name or service not known" in error_of(outcome)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "no address",
        "ftp://127.0.0.1/x",
        "http://127.0.0.1:99999/",
        "http://[::1/",
        "http://a..b/",
        "http://\udcff/",
        "http:///x",
    ],
)
async def test_what_is_no_address_is_unreachable(runner: HttpRunner, url: str) -> None:
    outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.code is Code.UNREACHABLE
    assert outcome.retryable is False


@pytest.mark.parametrize(
    ("answer", "moment"),
    [
        (b"", "before it answered"),
        (b"HTTP/1.1 200 OK\r\nX-Token: secret\r\nContent-Le", "before it answered"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"ok":', "in the middle of its answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", "in the middle of its answer"),
    ],
)
async def test_a_service_that_breaks_off_is_unreachable_and_not_asked_twice(
    runner: HttpRunner, answer: bytes, moment: str
) -> None:
    async with RawService(answer, OK_ANSWER) as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url)))
    assert outcome.code is Code.UNREACHABLE
    assert error_of(outcome).endswith(f" closed the connection {moment}")
    assert outcome.retryable is False
    assert len(raw.requests) == 1
    assert runner.state("test")["breaker"]["last_error"] == outcome.error  # which other callers see


async def test_what_the_deadline_cuts_off_is_no_answer_though_it_could_be_read_as_one(runner: HttpRunner) -> None:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n1")  # whose end is that of the connection
        await asyncio.Event().wait()

    async with talking(converse) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url), timeout_s=0.05))
    assert outcome.code is Code.TIMEOUT


async def test_a_deadline_that_has_passed_lets_nothing_out(runner: HttpRunner) -> None:
    async with RawService(OK_ANSWER) as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url), timeout_s=0.0))
    assert outcome.code is Code.TIMEOUT
    assert raw.requests == []


async def test_the_time_to_connect_counts(runner: HttpRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(ThreadedResolver, "resolve", resolve)
    outcome = await runner.run(programs.make_job(HttpTarget("http://slow.name.invalid/"), timeout_s=0.01))
    assert outcome.code is Code.TIMEOUT


# Trying again


async def test_a_repeatable_call_is_sent_again_where_the_service_broke_off(runner: HttpRunner) -> None:
    async with RawService(b"", b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"ok"', OK_ANSWER) as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url, repeatable=True), {"n": 1}))
    assert outcome.result == {"ok": True}
    assert [request.partition(b"\r\n\r\n")[2] for request in raw.requests] == [b'{"payload":{"n":1}}'] * 3


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize(("repeatable", "sent"), [(True, 3), (False, 1)])
async def test_only_a_repeatable_call_is_sent_again_where_a_kept_connection_breaks_off(
    runner: HttpRunner, method: str, repeatable: bool, sent: int
) -> None:
    requests: list[bytes] = []

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not requests:
            requests.append(await read_request(reader))
            writer.write(OK_ANSWER)
        requests.append(await read_request(reader))

    async with talking(converse) as url:
        job = programs.make_job(HttpTarget(url, method, repeatable=repeatable))
        first, second = await runner.run(job), await runner.run(job)
    assert first.ok
    assert second.code is Code.UNREACHABLE
    assert len(requests) == 1 + sent


async def test_a_repeatable_call_is_sent_three_times_at_most(runner: HttpRunner) -> None:
    async with RawService(b"", b"", b"", OK_ANSWER) as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url, repeatable=True)))
    assert outcome.code is Code.UNREACHABLE
    assert outcome.retryable is True
    assert len(raw.requests) == 3


@pytest.mark.parametrize(("repeatable", "sent"), [(True, 3), (False, 1)])
async def test_only_a_repeatable_call_is_sent_again_after_a_503(
    runner: HttpRunner, repeatable: bool, sent: int
) -> None:
    async with RawService(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n") as raw:
        outcome = await runner.run(programs.make_job(HttpTarget(raw.url, repeatable=repeatable)))
    assert outcome.code is Code.HTTP_STATUS
    assert len(raw.requests) == sent


async def test_a_connection_that_failed_is_tried_again_for_any_call(
    runner: HttpRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = RawService(OK_ANSWER)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    starting: list[asyncio.Task[None]] = []

    def waits_while_the_service_starts() -> Iterator[float]:
        yield 0.0
        listener.listen()
        starting.append(asyncio.ensure_future(raw.start(listener)))
        yield 0.0

    monkeypatch.setattr(http, "RETRY_WAITS_S", waits_while_the_service_starts())
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    outcome = await runner.run(programs.make_job(HttpTarget(url)))
    await starting[0]
    await raw.__aexit__()
    assert outcome.result == {"ok": True}


async def test_no_try_begins_that_would_wait_past_the_deadline(
    runner: HttpRunner, deaf_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "RETRY_WAITS_S", (3600.0,))
    outcome = await runner.run(programs.make_job(HttpTarget(f"http://127.0.0.1:{deaf_port}/")))
    assert outcome.code is Code.UNREACHABLE


# Connections


class ClosingService(threading.Thread):
    """A service in a thread, so that it can close an idle connection while the event loop is not looking."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self.close_now = threading.Event()
        self.closed = threading.Event()
        self.connections = 0

    def run(self) -> None:
        with self._listener:
            for _ in range(2):
                with self._listener.accept()[0] as connection:
                    self.connections += 1
                    connection.recv(65536)
                    connection.sendall(OK_ANSWER)
                    self.close_now.wait(60)
                self.closed.set()


async def test_an_idle_connection_that_the_service_closed_fails_no_call(runner: HttpRunner) -> None:
    silent = ClosingService()
    silent.start()
    job = programs.make_job(HttpTarget(silent.url))
    first = await runner.run(job)
    silent.close_now.set()
    silent.closed.wait(60)  # the loop stands still meanwhile, and so has not seen the end of the connection
    second = await runner.run(job)
    assert first.result == second.result == {"ok": True}
    silent.join(60)
    assert silent.connections == 2


async def test_what_nobody_asked_for_reaches_nobody(runner: HttpRunner) -> None:
    asked: list[bytes] = []
    go_on, spoke = asyncio.Event(), asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await read_request(reader))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % len(asked))
        await go_on.wait()
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"other"')
        spoke.set()
        await asyncio.Event().wait()

    async with talking(converse) as url:
        job = programs.make_job(HttpTarget(url))
        first = await runner.run(job)
        go_on.set()
        await spoke.wait()
        for _ in range(PATIENCE):  # until the client's end of the idle connection has read it
            await asyncio.sleep(0)
        second = await runner.run(job)
    assert [first.result, second.result] == [1, 2]


BODY = b"x" * (64 * 2**20)
"""More than a kernel keeps for a connection."""


async def test_what_was_not_sent_at_the_deadline_is_not_sent_any_more(runner: HttpRunner) -> None:
    go_on, ended = asyncio.Event(), asyncio.Event()
    received = 0

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await go_on.wait()
        while data := await reader.read(2**20):
            received += len(data)
        ended.set()

    async with talking(converse) as url:
        job = programs.make_job(HttpTarget(url), timeout_s=0.1)._replace(envelope=BODY)
        outcome = await runner.run(job)
        go_on.set()
        await asyncio.wait_for(ended.wait(), 60)
    assert outcome.code is Code.TIMEOUT
    assert received < len(BODY)


async def test_a_connection_on_which_not_all_was_sent_is_not_used_again(runner: HttpRunner) -> None:
    connections = 0

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK_ANSWER)
        await asyncio.Event().wait()

    async with talking(converse) as url:
        job = programs.make_job(HttpTarget(url), timeout_s=20.0)._replace(envelope=BODY)
        outcomes = [await runner.run(job) for _ in range(2)]
    assert [outcome.result for outcome in outcomes] == [{"ok": True}] * 2
    assert connections == 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that 127.0.0.1 has signed for itself, with its key."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("there is no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "own.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(path) + ".crt"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    with path.open("a") as file:
        file.write(path.with_suffix(".pem.crt").read_text())
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_a_service_whose_certificate_nobody_vouches_for_is_sent_nothing(
    runner: HttpRunner, tls: ssl.SSLContext
) -> None:
    requests: list[bytes] = []

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))

    async with talking(converse, tls) as url:
        outcome = await runner.run(programs.make_job(HttpTarget(url)))
    assert outcome.code is Code.UNREACHABLE
    assert "could not be reached" in error_of(outcome)
    assert "certificate verify failed" in error_of(outcome).lower().replace("_", " ")
    assert requests == []


async def test_a_connection_with_tls_is_kept_as_well(
    runner: HttpRunner, tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
    connections = 0

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while not reader.at_eof():
            await read_request(reader)
            writer.write(OK_ANSWER)

    async with talking(converse, tls) as url:
        job = programs.make_job(HttpTarget(url))._replace(envelope=b"x" * 2**20)
        outcomes = [await runner.run(job) for _ in range(3)]
        await runner.close()
    assert [outcome.result for outcome in outcomes] == [{"ok": True}] * 3
    assert connections == 1


async def test_cancelling_closes_the_connection(runner: HttpRunner) -> None:
    started, gone = asyncio.Event(), asyncio.Event()

    async def handle(_: web.Request) -> web.StreamResponse:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        raise AssertionError

    async with service(handle) as url:
        task = asyncio.create_task(runner.run(programs.make_job(HttpTarget(url))))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gone.wait(), 60)


async def test_a_runner_that_was_never_used_can_be_closed() -> None:
    runner = HttpRunner()
    await runner.close()
    assert (await runner.run(programs.make_job(HttpTarget("http://127.0.0.1:9/")))).code is Code.CANCELLED


async def test_what_runs_when_the_runner_is_closed_ends_as_cancelled(runner: HttpRunner) -> None:
    started = asyncio.Event()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        started.set()
        await asyncio.Event().wait()

    async with talking(converse) as url:
        job = programs.make_job(HttpTarget(url, repeatable=True))._replace(envelope=BODY)
        running = asyncio.create_task(runner.run(job))
        await started.wait()
        await runner.close()
        outcome, late = await running, await runner.run(job)
    assert (outcome.code, late.code) == (Code.CANCELLED, Code.CANCELLED)
    assert runner.state("test")["breaker"]["failures"] == 0


async def test_a_look_up_that_runs_when_the_runner_is_closed_ends_as_cancelled(
    runner: HttpRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = asyncio.Event()

    async def resolve(*_: object, **__: object) -> Any:
        started.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(ThreadedResolver, "resolve", resolve)
    running = asyncio.create_task(runner.run(programs.make_job(HttpTarget("http://slow.name.invalid/"))))
    await started.wait()
    await runner.close()
    assert (await running).code is Code.CANCELLED


# The circuit breaker


@pytest.fixture
async def guarded(nothing_left: None, clock: Clock) -> AsyncIterator[HttpRunner]:
    """A runner whose breakers only know the time that a test tells them."""
    runner = HttpRunner(clock=clock)
    yield runner
    await runner.close()


class Fickle:
    """A service that answers as it is told to, and counts its calls."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.calls = 0

    async def handle(self, _: web.Request) -> web.StreamResponse:
        self.calls += 1
        return web.json_response({"ok": True, "secret": "words of another caller"}, status=self.status)


async def breaker_after(runner: HttpRunner, *jobs: Job) -> dict[str, Any]:
    for job in jobs:
        await runner.run(job)
    found: dict[str, Any] = runner.state("test")["breaker"]
    return found


async def test_of_an_overlay_that_was_never_called_nothing_is_kept(runner: HttpRunner) -> None:
    assert runner.state("test") == {}


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_service_that_fails_again_and_again_is_left_alone(guarded: HttpRunner, status: int) -> None:
    fickle = Fickle(status)
    async with service(fickle.handle) as url:
        job = programs.make_job(HttpTarget(url))
        found = await breaker_after(guarded, *[job] * FAILURES)
        outcome = await guarded.run(job)
    assert found["state"] == "open"
    assert found["failures"] == fickle.calls == FAILURES
    assert found["retry_in_s"] == FIRST_WAIT_S
    assert f"HTTP {status}" in found["last_error"]
    assert outcome.code is Code.CIRCUIT_OPEN
    assert error_of(outcome).startswith(f"the service of test is not called, again in {FIRST_WAIT_S:.1f} s; its last")
    assert found["last_error"] in error_of(outcome)


async def test_other_callers_are_told_no_answer_that_was_not_theirs(guarded: HttpRunner) -> None:
    async with service(Fickle(500).handle) as url:
        job = programs.make_job(HttpTarget(url))
        told = await guarded.run(job)
        found = await breaker_after(guarded, *[job] * FAILURES)
        refused = await guarded.run(job)
    assert "words of another caller" in error_of(told)
    assert "words of another caller" not in found["last_error"] + error_of(refused)


@pytest.mark.parametrize("status", [200, 400, 404, 429, 304, 501, 505])
async def test_a_service_that_says_no_is_well(guarded: HttpRunner, status: int) -> None:
    fickle = Fickle(500)
    async with service(fickle.handle) as url:
        job = programs.make_job(HttpTarget(url))
        await breaker_after(guarded, *[job] * (FAILURES - 1))
        fickle.status = status
        found = await breaker_after(guarded, job)
    assert found == {"state": "closed", "failures": 0, "retry_in_s": None, "last_error": None}


@pytest.mark.parametrize("body", [b"<html>", b"", b"[" * 100, b"0" * 2000])
async def test_an_answer_that_cannot_be_used_says_that_the_service_is_well(guarded: HttpRunner, body: bytes) -> None:
    async with service(answering(body)) as url:
        job = programs.make_job(HttpTarget(url), max_output_bytes=1000)
        found = await breaker_after(guarded, *[job] * FAILURES)
    assert (found["state"], found["failures"]) == ("closed", 0)


async def test_a_service_that_cannot_be_reached_is_left_alone(guarded: HttpRunner, deaf_port: int) -> None:
    job = programs.make_job(HttpTarget(f"http://127.0.0.1:{deaf_port}/"))
    found = await breaker_after(guarded, *[job] * FAILURES)
    assert found["state"] == "open"
    assert found["last_error"].endswith("could not be reached: connection refused")


async def test_a_service_that_breaks_off_is_left_alone(guarded: HttpRunner) -> None:
    async with RawService(b"") as raw:
        found = await breaker_after(guarded, *[programs.make_job(HttpTarget(raw.url))] * FAILURES)
    assert found["state"] == "open"


async def test_what_is_no_address_says_nothing_about_a_service(guarded: HttpRunner) -> None:
    found = await breaker_after(guarded, *[programs.make_job(HttpTarget("no address"))] * FAILURES)
    assert (found["state"], found["failures"]) == ("closed", 0)


async def hanging(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize(("fair_wait_s", "state"), [(0.0, "open"), (60.0, "closed")])
async def test_silence_counts_where_the_service_had_time_to_answer(
    guarded: HttpRunner, monkeypatch: pytest.MonkeyPatch, fair_wait_s: float, state: str
) -> None:
    monkeypatch.setattr(breaker, "FAIR_WAIT_S", fair_wait_s)
    async with service(hanging) as url:
        for _ in range(FAILURES):
            outcome = await guarded.run(programs.make_job(HttpTarget(url), timeout_s=0.01))
            assert outcome.code is Code.TIMEOUT
    assert guarded.state("test")["breaker"]["state"] == state


async def test_a_call_counts_once_however_often_it_was_tried(guarded: HttpRunner) -> None:
    fickle = Fickle(503)
    async with service(fickle.handle) as url:
        found = await breaker_after(guarded, programs.make_job(HttpTarget(url, repeatable=True)))
    assert (fickle.calls, found["failures"]) == (3, 1)


async def test_a_service_that_is_well_again_is_called_again(guarded: HttpRunner, clock: Clock) -> None:
    fickle = Fickle(500)
    async with service(fickle.handle) as url:
        job = programs.make_job(HttpTarget(url))
        await breaker_after(guarded, *[job] * FAILURES)
        fickle.status = 200
        clock.now_s += FIRST_WAIT_S
        outcomes = [await guarded.run(job) for _ in range(3)]
    assert [outcome.code for outcome in outcomes] == [Code.OK] * 3


async def test_while_one_call_tries_the_service_others_are_refused(guarded: HttpRunner, clock: Clock) -> None:
    fickle = Fickle(500)
    started, go_on = asyncio.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if fickle.status == 200:
            started.set()
            await go_on.wait()
        return await fickle.handle(request)

    async with service(handle) as url:
        job = programs.make_job(HttpTarget(url))
        await breaker_after(guarded, *[job] * FAILURES)
        clock.now_s += FIRST_WAIT_S
        fickle.status = 200
        probe = asyncio.create_task(guarded.run(job))
        await started.wait()
        refused = await guarded.run(job)
        assert guarded.state("test")["breaker"]["state"] == "half-open"
        go_on.set()
        assert (await probe).ok
    assert refused.code is Code.CIRCUIT_OPEN
    assert "one call is trying it now" in error_of(refused)


async def test_a_probe_whose_caller_left_makes_room_for_the_next(guarded: HttpRunner, clock: Clock) -> None:
    fickle = Fickle(500)
    started = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if fickle.status == 200 and not started.is_set():
            started.set()
            await asyncio.Event().wait()
        return await fickle.handle(request)

    async with service(handle) as url:
        job = programs.make_job(HttpTarget(url))
        await breaker_after(guarded, *[job] * FAILURES)
        clock.now_s += FIRST_WAIT_S
        fickle.status = 200
        probe = asyncio.create_task(guarded.run(job))
        await started.wait()
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        assert (await guarded.run(job)).ok


async def test_each_overlay_has_a_circuit_of_its_own_and_a_changed_one_begins_anew(guarded: HttpRunner) -> None:
    fickle = Fickle(500)
    async with service(fickle.handle) as url:
        job = programs.make_job(HttpTarget(url))
        await breaker_after(guarded, *[job] * FAILURES)
        fickle.status = 200
        other = await guarded.run(job._replace(overlay="other"))
        same = await guarded.run(job)
        changed = await guarded.run(job._replace(edition=job.edition + 1))
    assert (other.code, same.code, changed.code) == (Code.OK, Code.CIRCUIT_OPEN, Code.OK)
    assert guarded.state("test")["breaker"]["state"] == "closed"


async def test_a_late_call_of_an_overlay_as_it_was_says_nothing_of_what_it_is(guarded: HttpRunner) -> None:
    fickle = Fickle(500)
    async with service(fickle.handle) as url:
        now = programs.make_job(HttpTarget(url))._replace(edition=2)
        await breaker_after(guarded, *[now] * FAILURES)
        fickle.status = 200
        late = await guarded.run(now._replace(edition=1))
        same = await guarded.run(now)
    assert (late.code, same.code) == (Code.OK, Code.CIRCUIT_OPEN)


async def test_a_forgotten_overlay_begins_anew(guarded: HttpRunner) -> None:
    fickle = Fickle(500)
    async with service(fickle.handle) as url:
        job = programs.make_job(HttpTarget(url))
        await breaker_after(guarded, *[job] * FAILURES)
        guarded.forget("test")
        assert guarded.state("test") == {}
        fickle.status = 200
        assert (await guarded.run(job)).ok


# Services that the bus starts

SERVICE = ServiceTarget(("serve",), {})


@dataclasses.dataclass
class FakeService:
    """`ends` is what is known of its end, from question to question; the last one for ever."""

    url: str
    ends: tuple[End | None, ...] = (None,)
    token: str = "a-token"
    sandbox: Sandbox | None = None
    memory_mb: float | None = None

    def end(self) -> End | None:
        known, *later = self.ends
        self.ends = (*later,) or (known,)
        return known


class FakeServices:
    """Gives the n-th call for a service the n-th one, or the last, or refuses with an outcome."""

    def __init__(self, *services: FakeService | Outcome) -> None:
        self.services = services
        self.is_ready = False
        self.in_use = 0
        self.used: list[ServiceTarget] = []
        self.forgotten: list[str] = []
        self.closings: list[bool] = []
        self.closing = asyncio.Event()
        self.gone = asyncio.Event()
        self.gone.set()

    @contextlib.asynccontextmanager
    async def use(self, job: Job, target: ServiceTarget) -> AsyncIterator[FakeService]:
        self.used.append(target)
        found = self.services[min(len(self.used), len(self.services)) - 1]
        if isinstance(found, Outcome):
            raise ServiceError(found)
        self.in_use += 1
        try:
            yield found
        finally:
            self.in_use -= 1

    def state(self, overlay: str) -> dict[str, Any]:
        return {"service": {"state": "ready"}} if self.used else {}

    def shares(self) -> dict[str, Share]:
        return {}

    def relieve(self, idle_s: float) -> None:
        pass

    def ready(self, overlay: str) -> FakeService | None:
        [found] = self.services
        assert isinstance(found, FakeService)
        return found if self.is_ready else None

    def forget(self, overlay: str) -> None:
        self.forgotten.append(overlay)

    async def close(self, *, at_once: bool = False) -> None:
        self.closings.append(at_once)
        self.closing.set()
        if at_once:
            self.gone.set()
        await self.gone.wait()


async def test_a_service_is_in_use_while_it_is_called_at_its_base_url(nothing_left: None) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response([services.in_use, request.path])

    async with service(handle) as url:
        services = FakeServices(FakeService(url))
        runner = HttpRunner(services)
        outcome = await runner.run(programs.make_job(HttpTarget("/echo", service=SERVICE)))
        await runner.close()
    assert outcome.result == [1, "/echo"]
    assert services.used == [SERVICE]
    assert services.in_use == 0
    assert services.closings == [False]


async def test_a_redirect_out_of_a_started_service_is_refused(nothing_left: None) -> None:
    async with service(redirecting(307, "http://127.0.0.1:1/{}")) as url:
        runner = HttpRunner(FakeServices(FakeService(url)))
        outcome = await runner.run(programs.make_job(HttpTarget("/0", service=SERVICE)))
        await runner.close()
    assert outcome.code is Code.HTTP_STATUS
    assert f"POST {url}/0 answered" in error_of(outcome)


async def test_where_targets_are_listed_only_they_are_called_and_services_of_the_bus(nothing_left: None) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response("here")

    async with service(handle) as url:
        listed, other = frozenset({url.removeprefix("http://")}), frozenset({"other.example"})
        own = HttpTarget("/", service=SERVICE)
        found = []
        for targets, target in ((listed, HttpTarget(url)), (other, own), (other, HttpTarget(url))):
            runner = HttpRunner(FakeServices(FakeService(url)), targets=targets)
            found.append(await runner.run(programs.make_job(target)))
            await runner.close()
    assert [outcome.result for outcome in found] == ["here", "here", None]
    assert (found[2].code, found[2].retryable) == (Code.UNREACHABLE, False)
    assert "is none of the targets that requests may go to: other.example" in error_of(found[2])


async def test_a_service_that_does_not_start_is_no_failure_of_its_circuit(nothing_left: None) -> None:
    refusal = Outcome(Code.START, error="still starting", log="the end of its log")
    runner = HttpRunner(FakeServices(refusal))
    job = programs.make_job(HttpTarget("/echo", service=SERVICE))
    outcomes = [await runner.run(job) for _ in range(FAILURES + 1)]
    assert outcomes == [refusal] * (FAILURES + 1)
    assert runner.state("test")["breaker"]["failures"] == 0
    await runner.close()


async def test_a_started_service_that_fails_is_left_alone_too(nothing_left: None) -> None:
    async with service(Fickle(500).handle) as url:
        services = FakeServices(FakeService(url))
        runner = HttpRunner(services)
        job = programs.make_job(HttpTarget("/echo", service=SERVICE))
        codes = [(await runner.run(job)).code for _ in range(FAILURES + 1)]
        await runner.close()
    assert codes == [Code.HTTP_STATUS] * FAILURES + [Code.CIRCUIT_OPEN]
    assert len(services.used) == FAILURES
    assert runner.state("test").keys() == {"breaker", "service"}


async def test_a_runner_without_services_refuses_what_needs_one(runner: HttpRunner) -> None:
    outcome = await runner.run(programs.make_job(HttpTarget("/echo", service=SERVICE)))
    assert outcome.code is Code.START
    assert outcome.retryable is False


async def test_a_service_that_the_bus_starts_knows_its_calls_by_a_token_and_others_are_given_none(
    nothing_left: None,
) -> None:
    asked: list[tuple[str, str | None]] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append((request.path, request.headers.get("Authorization")))
        if request.path == "/moved":
            return web.Response(status=307, headers={"Location": "/there"})
        return web.json_response(1)

    async with service(handle) as url:
        services = FakeServices(FakeService(url, token="of-this-start"))
        services.is_ready = True
        runner = HttpRunner(services)
        await runner.run(programs.make_job(HttpTarget("/moved", service=SERVICE, purge_url="/purge")))
        runner.purge(None)
        await until(lambda: told_of(runner)["purges"] == 1)
        await runner.run(programs.make_job(HttpTarget(f"{url}/external"))._replace(overlay="another"))
        await runner.close()
    bearer = "Bearer of-this-start"
    assert asked == [("/moved", bearer), ("/there", bearer), ("/purge", bearer), ("/external", None)]


async def test_each_try_asks_anew_where_the_service_is(nothing_left: None, deaf_port: int) -> None:
    async with service(answering("1")) as url:
        services = FakeServices(FakeService(f"http://127.0.0.1:{deaf_port}"), FakeService(url))
        runner = HttpRunner(services)
        outcome = await runner.run(programs.make_job(HttpTarget("/echo", service=SERVICE)))
        await runner.close()
    assert outcome.result == 1
    assert len(services.used) == 2


CRASHED = End(Outcome(Code.CRASH, error="the service was ended by SIGSEGV"), by_bus=False)
REPLACED = End(Outcome(Code.CRASH, error="the service is replaced: its overlay has changed"), by_bus=True)


@pytest.mark.parametrize(
    ("ends", "repeatable", "tries", "failures"),
    [
        ((REPLACED,), True, 1, 0),
        ((CRASHED,), False, 1, 1),
        ((CRASHED,), True, 3, 1),
        pytest.param((None, CRASHED), False, 1, 1, id="the news of it comes after that of the connection"),
    ],
)
async def test_how_a_service_has_ended_is_the_answer_of_a_call_that_got_none(
    nothing_left: None, ends: tuple[End, ...], repeatable: bool, tries: int, failures: int
) -> None:
    """It speaks against the service only where the bus did not end it."""
    async with RawService(b"") as raw:
        services = FakeServices(FakeService(raw.url, ends))
        runner = HttpRunner(services)
        outcome = await runner.run(programs.make_job(HttpTarget("/echo", repeatable=repeatable, service=SERVICE)))
        await runner.close()
    assert outcome == ends[-1].outcome
    assert len(services.used) == tries
    assert runner.state("test")["breaker"]["failures"] == failures


async def test_an_answer_counts_though_the_service_has_ended_since(nothing_left: None) -> None:
    async with service(answering('{"n": 1}')) as good, service(answering("", 500)) as bad:
        for url, code in ((good, Code.OK), (bad, Code.HTTP_STATUS)):
            runner = HttpRunner(FakeServices(FakeService(url, (CRASHED,))))
            assert (await runner.run(programs.make_job(HttpTarget("/echo", service=SERVICE)))).code is code
            await runner.close()


async def test_a_service_is_forgotten_with_its_overlay(nothing_left: None) -> None:
    services = FakeServices()
    runner = HttpRunner(services)
    runner.forget("test")
    await runner.close()
    assert services.forgotten == ["test"]


async def test_a_second_closing_can_be_quicker_than_the_first(nothing_left: None) -> None:
    services = FakeServices()
    services.gone.clear()
    runner = HttpRunner(services)
    patient = asyncio.create_task(runner.close())
    await services.closing.wait()
    await runner.close(at_once=True)
    await patient
    assert services.closings == [False, True]


# Purges


class Purged:
    """A service that is told of purges: what it was sent, and what it answers once `may_answer` is set."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: list[Any] = []
        self.status = status
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def handle(self, request: web.Request) -> web.Response:
        if request.path != "/purge":
            return web.json_response(1)
        self.bodies.append((request.method, request.content_type, await request.json()))
        await self.may_answer.wait()
        return web.json_response({}, status=self.status)


def told_of(runner: HttpRunner) -> Any:
    return runner.state("test").get("purge", {})


@contextlib.asynccontextmanager
async def a_called_runner(purged: Purged) -> AsyncIterator[HttpRunner]:
    """A runner that has called an external service which takes purges."""
    async with service(purged.handle) as url:
        runner = HttpRunner()
        assert (await runner.run(programs.make_job(HttpTarget(url, purge_url=f"{url}/purge")))).ok
        try:
            yield runner
        finally:
            await runner.close()


async def test_a_service_that_takes_purges_is_sent_one_and_nobody_waits(nothing_left: None) -> None:
    purged = Purged()
    async with a_called_runner(purged) as runner:
        assert "purge" not in runner.state("test")
        before = time.time_ns() // 1_000_000
        assert runner.purge(None) == {"test": 1}
        await until(lambda: bool(told_of(runner)["purges"]))
        assert purged.bodies == [("POST", "application/json", {"event": "purge"})]
        assert told_of(runner)["last_purge_ms"] >= before
        assert (told_of(runner)["failures"], told_of(runner)["last_error"]) == (0, None)


async def test_a_service_has_one_purge_at_a_time(nothing_left: None) -> None:
    purged = Purged()
    purged.may_answer.clear()
    async with a_called_runner(purged) as runner:
        assert [runner.purge({"test"}) for _ in range(3)] == [{"test": 1}] * 3
        await until(lambda: len(purged.bodies) == 1)
        assert runner.purge({"test"}) == {"test": 1}
        purged.may_answer.set()
        await until(lambda: told_of(runner)["purges"] == 1)
        runner.purge({"test"})
        await until(lambda: told_of(runner)["purges"] == 2)
    assert len(purged.bodies) == 2


async def test_a_purge_that_fails_is_counted_and_is_nobodys_error(
    nothing_left: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "runners.purges")
    async with a_called_runner(Purged(status=500)) as runner:
        runner.purge(None)
        await until(lambda: bool(told_of(runner)["failures"]))
        assert told_of(runner)["last_error"] == "the service answered HTTP 500 Internal Server Error"
        assert (told_of(runner)["purges"], told_of(runner)["last_purge_ms"]) == (0, None)
        assert runner.state("test")["breaker"]["failures"] == 0
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


async def test_a_purge_that_nobody_answers_ends_in_time(nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purges, "ANSWER_S", 0.05)
    purged = Purged()
    purged.may_answer.clear()
    async with a_called_runner(purged) as runner:
        runner.purge(None)
        await until(lambda: bool(told_of(runner)["failures"]))
        assert told_of(runner)["last_error"] == "the service had not answered after 0.05 s"


async def test_closing_ends_a_purge_that_is_not_answered_and_begins_none(nothing_left: None) -> None:
    purged = Purged()
    purged.may_answer.clear()
    async with a_called_runner(purged) as runner:
        runner.purge(None)
        await until(lambda: bool(purged.bodies))
        await runner.close()
        assert runner.purge(None) == {}


@pytest.mark.parametrize("overlays", [{"another"}, set[str]()])
async def test_no_other_service_is_told_of_a_purge(nothing_left: None, overlays: set[str]) -> None:
    async with a_called_runner(Purged()) as runner:
        assert runner.purge(overlays) == {}
        runner.forget("test")
        assert runner.purge({"test"}) == {}


async def test_a_service_without_a_place_for_purges_is_not_told(nothing_left: None) -> None:
    async with service(Purged().handle) as url:
        runner = HttpRunner()
        await runner.run(programs.make_job(HttpTarget(url, purge_url=f"{url}/purge")))
        await runner.run(programs.make_job(HttpTarget(url))._replace(edition=1))
        assert runner.purge(None) == {}
        await runner.close()


async def test_a_service_that_the_bus_starts_is_told_only_while_it_runs(nothing_left: None) -> None:
    purged = Purged()
    async with service(purged.handle) as url:
        services = FakeServices(FakeService(url))
        runner = HttpRunner(services, targets=frozenset({"elsewhere.example"}))
        await runner.run(programs.make_job(HttpTarget("/x", service=SERVICE, purge_url="/purge")))
        assert runner.purge(None) == {}
        services.is_ready = True
        assert runner.purge(None) == {"test": 1}
        await until(lambda: told_of(runner)["purges"] == 1)
        await runner.close()
    assert len(purged.bodies) == 1
