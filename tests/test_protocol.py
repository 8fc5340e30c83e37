"""Connections: what comes too slowly, too large or as no HTTP ends; what comes in order is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from uvicorn.server import ServerState

from bus import protocol
from bus.app import create_app
from bus.model import Phase
from bus.protocol import HEAD_BYTES, HEADERS, LINGER_BYTES, LINGER_S, TAKEN_BYTES_S, URL_BYTES, Protocol
from bus.tokens import SCOPES, Tokens
from tests.runner_fixtures import anyio_backend  # noqa: F401  # pytest finds it by its name
from tests.support import PATIENCE_S, InProcessRunner, add_overlay, running_bus, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Receive, Scope, Send

    from bus.settings import Settings

HEAD = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
WHOLE = HEAD + b"body"
QUICK_S = 0.2
"""The time that clients have in tests of slow ones."""

PIECE = 256 * 1024
"""What a transport reads at once, at most."""


class App:
    """Reads each request to its end and says it back; `go` lets the answers to `/wait` out."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.gone = 0
        self.waiting = 0
        self.served = 0
        self.answer = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/refused":
            await self._say(send, 403, b"no")
            return
        if scope["path"] == "/early":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            body += message["body"]
            more = message["more_body"]
        if scope["path"] == "/wait":
            self.waiting += 1
            await self.go.wait()
        self.served += 1
        if scope["path"] == "/early":
            await send({"type": "http.response.body", "body": body})
            return
        await self._say(send, 200, self.answer or body)

    async def _say(self, send: Send, status: int, body: bytes) -> None:
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Counted(Protocol):
    """Counts the bytes that were read of its client."""

    heard = 0

    def data_received(self, data: bytes) -> None:
        self.heard += len(data)
        super().data_received(data)


class Served:
    """A server of an `App` in this loop, or of `other`, and its clients. `made` has all connections there were."""

    def __init__(self, client_timeout_s: float, connections: int, other: ASGIApp | None = None) -> None:
        self.app = App()
        self.made: list[Counted] = []
        self.refused: Counter[str] = Counter()
        self.state = ServerState()
        self.config = protocol.Config(
            other or self.app,
            client_timeout_s=client_timeout_s,
            connections=connections,
            refused=self.refused,
            ws="none",
            lifespan="off",
            log_config=None,
        )
        self.config.load()
        self._writers: list[asyncio.StreamWriter] = []

    def protocol(self) -> Counted:
        self.made.append(Counted(self.config, self.state, {}, asyncio.get_running_loop()))
        return self.made[-1]

    async def open(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(self.protocol, "127.0.0.1", 0)
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()

    async def connect(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.address)
        self._writers.append(writer)
        writer.write(data)
        return reader, writer

    async def close(self) -> None:
        self.app.go.set()
        for writer in self._writers:
            writer.close()
        for connection in list(self.state.connections):
            connection.transport.abort()
        self._server.close()
        await asyncio.gather(*self.state.tasks, *map(closed, self._writers))


async def closed(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(
    client_timeout_s: float = 600.0, connections: int = 1000, other: ASGIApp | None = None
) -> AsyncIterator[Served]:
    served = Served(client_timeout_s, connections, other)
    await served.open()
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield served
    finally:
        await served.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the connection ends, however it does."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            data += piece
    return data


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The next answer on the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return int(head.split()[1]), await reader.readexactly(int(length.split(b":")[1]))


async def refusal(served: Served, data: bytes) -> tuple[int, dict[str, Any]]:
    """The one answer to `data`, after which the server ends the connection."""
    reader, _ = await served.connect(data)
    status, body = await answer(reader)
    assert await rest(reader) == b""
    return status, json.loads(body)


def with_headers(count: int, size: int = 1) -> bytes:
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"v" * size) for number in range(count - 1))
    return b"GET / HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n"


# --- What is served ----------------------------------------------------------------------------------------------


async def test_requests_are_served_one_after_another_whole_in_pieces_and_ahead_of_their_answers() -> None:
    async with serving() as served:
        reader, writer = await served.connect(WHOLE)
        assert await answer(reader) == (200, b"body")
        for piece in (WHOLE[:3], WHOLE[3:40], WHOLE[40:-2], WHOLE[-2:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        assert await answer(reader) == (200, b"body")
        writer.write(WHOLE * 5)
        assert [await answer(reader) for _ in range(5)] == [(200, b"body")] * 5
    assert not served.refused


@pytest.mark.parametrize(
    "data",
    [
        with_headers(HEADERS),
        with_headers(30, 900),
        b"GET /" + b"x" * (URL_BYTES - 1) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        WHOLE[:-6].replace(b"4", b"%d" % (4 * HEAD_BYTES)) + b"\r\n" + b"x" * 4 * HEAD_BYTES,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
    ],
    ids=["headers", "head", "url", "body", "chunked", "upgrade", "1.0"],
)
async def test_what_is_as_large_as_it_may_be_or_a_little_unusual_is_served(data: bytes) -> None:
    async with serving() as served:
        reader, _ = await served.connect(data)
        assert (await answer(reader))[0] == 200
    assert not served.refused


async def test_many_requests_that_come_at_once_are_no_large_head() -> None:
    small = with_headers(10, 100)
    async with serving() as served:
        reader, writer = await served.connect(small * 100 + small[:50])
        assert [(await answer(reader))[0] for _ in range(100)] == [200] * 100
        writer.write(small[50:])
        assert (await answer(reader))[0] == 200
    assert not served.refused


# --- What is too large, or no HTTP -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        with_headers(HEADERS + 1),
        with_headers(40, 1000),
        b"GET / HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES,
        b"GET / HTTP/1.1\r\n" + b"X" * HEAD_BYTES,
        b"GET /" + b"x" * URL_BYTES + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"x" * HEAD_BYTES,
    ],
    ids=["count", "sum", "value", "name", "url", "endless url"],
)
async def test_a_head_that_is_too_large_is_refused_with_what_is_allowed(data: bytes) -> None:
    async with serving() as served:
        status, body = await refusal(served, data)
    assert (status, body["code"]) == (431, "ERR_HEAD_TOO_LARGE")
    assert "allowed: " in body["detail"]
    assert served.refused == {"ERR_HEAD_TOO_LARGE": 1}
    assert served.app.served == 0


IN_CHUNKS = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
LINE = b"X-Y: " + b"z" * 1000 + b"\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET / HTTP/1.1\r\n", LINE),
        (IN_CHUNKS + b"0\r\n", LINE),
        (IN_CHUNKS + b"0\r\nX: ", bytes(1000).replace(b"\0", b"z")),
        (IN_CHUNKS + b"1;", bytes(1000).replace(b"\0", b"z")),
    ],
    ids=["head", "trailer", "trailer of one line", "head of a chunk"],
)
async def test_a_head_that_never_ends_is_refused_while_it_comes(begin: bytes, more: bytes) -> None:
    async with serving() as served:
        reader, writer = await served.connect(begin)
        told = asyncio.ensure_future(rest(reader))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not told.done() and sent < 100 * HEAD_BYTES:
                writer.write(more)
                await writer.drain()
                await asyncio.sleep(0)
                sent += 1000
        assert sent < 100 * HEAD_BYTES
        assert b"431 Request Header Fields Too Large" in await told
        await asyncio.gather(*served.state.tasks)
    assert served.refused == {"ERR_HEAD_TOO_LARGE": 1}
    assert served.app.served == 0


async def test_nothing_of_a_trailer_is_kept_and_what_follows_it_is_served() -> None:
    connection, transport, served = connected()
    connection.data_received(IN_CHUNKS + b"0\r\n" + LINE * 200)
    assert connection.headers == [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")]
    connection.data_received(LINE + b"\r\n" + WHOLE)
    assert connection.headers == [(b"host", b"localhost"), (b"content-length", b"4")]
    await until(lambda: served.app.served == 2)
    assert transport.written.count(b"200 OK") == 2


async def test_many_small_chunks_are_no_large_head() -> None:
    async with serving() as served:
        reader, writer = await served.connect(IN_CHUNKS)
        for _ in range(20):
            writer.write(b"1;x=y\r\n{\r\n" * 500)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert await answer(reader) == (200, b"{" * 10_001)
    assert not served.refused


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://localhost/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: local\x00host\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody!",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\nxyz\r\n",
    ],
)
async def test_what_is_no_http_is_refused_in_json_and_logged_nowhere(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as served:
        status, body = await refusal(served, data)
    assert (status, body["code"]) == (400, "ERR_BAD_HTTP")
    assert "Error" not in body["detail"]
    assert served.refused == {"ERR_BAD_HTTP": 1}
    assert served.app.served == 0
    assert caplog.text == ""


async def test_what_follows_a_request_as_no_http_is_never_told_as_its_answer() -> None:
    async with serving() as served:
        reader, _ = await served.connect(WHOLE.replace(b"/x", b"/wait") + b"nonsense\r\n\r\n")
        assert await rest(reader) == b""
    assert served.refused == {"ERR_BAD_HTTP": 1}


@pytest.mark.parametrize("more", [b"nonsense\r\n\r\n", WHOLE + b"nonsense\r\n\r\n", None], ids=["one", "two", "close"])
async def test_who_is_cut_off_is_told_to_the_application_before_it_answers(
    more: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    connection, transport, served = connected()
    connection.data_received(WHOLE.replace(b"/x", b"/wait"))
    await until(lambda: served.app.waiting == 1)
    if more is None:
        connection.eof_received()
    else:
        connection.data_received(more)
        assert transport.aborted
    served.app.go.set()
    await asyncio.gather(*served.state.tasks)
    assert (transport.written, caplog.text) == (b"", "")


# --- Who is answered before the request has come whole -----------------------------------------------------------


OWED = b"POST /invoke/echo HTTP/1.1\r\nHost: localhost\r\n"
ANNOUNCED = b"Content-Length: %d\r\n" % 2**40
CHUNKED = b"Transfer-Encoding: chunked\r\n"
JSON = b"Content-Type: application/json\r\n"
ZEROS = bytes(65536)
CHUNK = b"%x\r\n%b\r\n" % (len(ZEROS), ZEROS)


async def pour(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Send without end, until the server ends the connection."""
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("head", "piece", "status"),
    [
        (OWED + JSON + ANNOUNCED, ZEROS, 413),
        (OWED + JSON + CHUNKED, CHUNK, 413),
        (OWED + ANNOUNCED, ZEROS, 415),
        (OWED.replace(b"localhost", b"evil.example") + JSON + CHUNKED, CHUNK, 403),
        (OWED + JSON + ANNOUNCED, ZEROS, 401),
    ],
    ids=["size", "chunks", "type", "host", "token"],
)
async def test_who_is_refused_reads_why_and_the_rest_of_a_large_body_is_not_read(
    settings: Settings, head: bytes, piece: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    _, secret = Tokens(settings.state).create("ci", overlays=("*",), phases=tuple(Phase), scopes=SCOPES)
    known = b"" if status == 401 else b"Authorization: Bearer %b\r\n" % secret.encode()
    add_overlay(settings.overlays, "echo")
    async with (
        running_bus(replace(settings, max_body_mb=PIECE / 2**20), InProcessRunner()) as bus,
        serving(other=create_app(bus=bus)) as served,
    ):
        reader, writer = await served.connect(head + known + b"\r\n")
        pouring = asyncio.ensure_future(pour(writer, piece))
        start = await reader.readuntil(b"\r\n\r\n")
        assert int(start.split()[1]) == status
        assert start.count(b"connection: close\r\n") == 1
        assert json.loads(await rest(reader))["ok"] is False
        await pouring
        await until(lambda: not served.state.connections)
    assert served.made[0].heard <= LINGER_BYTES + 5 * PIECE
    assert caplog.text == ""


@pytest.mark.parametrize(
    "head",
    [
        b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (LINGER_BYTES // 2),
        b"POST / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES,
    ],
    ids=["refused", "no http", "head"],
)
async def test_who_sends_all_before_it_reads_still_reads_its_answer_and_an_end(head: bytes) -> None:
    def exchange() -> bytes:
        with socket.create_connection(served.address, PATIENCE_S) as client:
            client.sendall(head)
            for _ in range(8):
                client.sendall(bytes(LINGER_BYTES // 16))
            return b"".join(iter(lambda: client.recv(65536), b""))

    async with serving() as served:
        answered = await asyncio.to_thread(exchange)
        await until(lambda: not served.state.connections)
    assert answered.startswith(b"HTTP/1.1 4")
    assert b"connection: close\r\n" in answered


async def test_a_connection_on_which_all_came_before_the_answer_stays() -> None:
    refused = WHOLE.replace(b"/x", b"/refused")
    async with serving() as served:
        reader, writer = await served.connect(refused)
        assert await answer(reader) == (403, b"no")
        writer.write(refused + WHOLE)
        assert [await answer(reader) for _ in range(2)] == [(403, b"no"), (200, b"body")]


async def test_a_request_that_came_in_pieces_before_its_answer_does_not_end_the_connection() -> None:
    connection, transport, served = connected()
    connection.data_received(HEAD.replace(b"/x", b"/refused"))
    connection.data_received(b"body")
    await asyncio.gather(*served.state.tasks)
    assert b"403" in transport.written
    assert b"connection: close" not in transport.written
    assert not transport.ended


async def test_an_unfinished_request_that_waited_for_its_turn_ends_the_connection_with_its_answer() -> None:
    async with serving() as served:
        reader, _ = await served.connect(WHOLE + HEAD.replace(b"/x", b"/refused"))
        assert await answer(reader) == (200, b"body")
        assert await answer(reader) == (403, b"no")
        assert await rest(reader) == b""


async def test_what_is_said_early_and_ends_after_its_request_ends_the_connection() -> None:
    async with serving() as served:
        reader, writer = await served.connect(HEAD.replace(b"/x", b"/early"))
        assert b"connection: close\r\n" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"body")
        assert await rest(reader) == b"body"


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"/x", b"/refused"),
        HEAD.replace(b"/x", b"/refused").replace(b"POST", b"HEAD"),  # its answer is written at once, and then ended
        b"hello\r\n\r\n",
    ],
    ids=["answer", "head", "refusal"],
)
async def test_a_client_that_goes_before_its_answer_is_no_error(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served:
        for number in range(20):
            with socket.create_connection(served.address) as client:
                client.sendall(data)
            await until(lambda: len(served.made) > number and not served.state.connections)  # noqa: B023  # at once
    assert caplog.text == ""


async def test_the_time_to_read_the_last_answer_begins_when_it_is_out() -> None:
    connection, transport, served = connected()
    connection.data_received(HEAD.replace(b"/x", b"/refused"))
    await asyncio.gather(*served.state.tasks)
    now = asyncio.get_running_loop().time()
    assert transport.ended
    transport.unread = 1000
    connection.look(now + 10, 30)
    transport.unread = 0
    connection.look(now + 10 + 0.9 * LINGER_S, 30)
    connection.shutdown()
    assert not transport.closing
    connection.look(now + 10 + 1.1 * LINGER_S, 30)
    assert transport.aborted


# --- Who is too slow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\r\n", b"GET", HEAD[:-2]], ids=["nothing", "empty lines", "method", "head"])
async def test_a_client_that_sends_no_whole_head_is_cut_off(data: bytes) -> None:
    async with serving(QUICK_S) as served:
        reader, _ = await served.connect(data)
        assert await rest(reader) == b""


@pytest.mark.parametrize("more", [b"\r\n", b"GET"], ids=["empty lines, which are no request", "a second request"])
async def test_what_begins_after_an_answer_keeps_no_connection_open(more: bytes) -> None:
    connection, transport, served = connected()
    connection.data_received(WHOLE)
    await asyncio.gather(*served.state.tasks)
    assert transport.written.endswith(b"body")
    answered = transport.written
    now = asyncio.get_running_loop().time()
    connection.data_received(more)
    connection.look(now, 30)
    assert not transport.closing
    connection.look(now + 31, 30)
    assert transport.aborted
    assert transport.written == answered


@pytest.mark.parametrize("data", [HEAD, WHOLE[:-1]])
async def test_a_client_that_sends_no_whole_body_is_told_and_cut_off(data: bytes) -> None:
    async with serving(QUICK_S) as served:
        status, body = await refusal(served, data)
        assert (status, body["code"], body["retryable"]) == (408, "ERR_SLOW_CLIENT", True)
        await asyncio.gather(*served.state.tasks)
    assert served.refused == {"ERR_SLOW_CLIENT": 1}
    assert (served.app.gone, served.app.served) == (1, 0)


async def test_a_client_that_drips_is_cut_off_all_the_same() -> None:
    async with serving(QUICK_S) as served:
        reader, writer = await served.connect(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            while not (reader.at_eof() or writer.is_closing()):
                writer.write(b"X: y\r\n")
                await writer.drain()
                await asyncio.sleep(QUICK_S / 20)
        assert served.app.served == 0
    assert served.refused == {"ERR_SLOW_CLIENT": 1}


async def test_a_refused_client_that_goes_on_sending_slowly_is_cut_off_without_a_second_answer() -> None:
    connection, transport, served = connected()
    connection.data_received(HEAD.replace(b"/x", b"/refused"))
    await asyncio.gather(*served.state.tasks)
    assert b"403" in transport.written
    refused, now = transport.written, asyncio.get_running_loop().time()
    connection.look(now, 30)
    connection.data_received(b"b")
    assert not transport.aborted
    connection.look(now + 31, 30)
    assert transport.aborted
    assert transport.written == refused
    assert not served.refused


class Unread:
    """A transport whose peer takes nothing; it remembers how it ended."""

    def __init__(self, unread: int = 0) -> None:
        self.unread = unread
        self.aborted = False
        self.closing = False
        self.ended = False
        self.written = b""

    def get_extra_info(self, name: str) -> object:
        return None

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = self.closing = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def connected(unread: int = 0) -> tuple[Protocol, Any, Served]:
    served = Served(30.0, 1000)
    connection, transport = served.protocol(), Unread(unread)
    connection.connection_made(transport)  # type: ignore[arg-type]
    return connection, transport, served


@pytest.mark.parametrize("closing", [False, True])
async def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(*, closing: bool) -> None:
    connection, transport, served = connected()
    now = asyncio.get_running_loop().time()
    connection.data_received(WHOLE)
    await asyncio.gather(*served.state.tasks)
    transport.closing, transport.unread = closing, 1000
    connection.look(now, 30)
    connection.look(now + 29, 30)
    assert not transport.aborted
    connection.look(now + 31, 30)
    assert transport.aborted


async def test_a_client_that_takes_its_answer_byte_by_byte_has_the_time_that_its_size_gives() -> None:
    connection, transport, served = connected()
    now = asyncio.get_running_loop().time()
    connection.data_received(WHOLE)
    await asyncio.gather(*served.state.tasks)
    for later in range(90):
        transport.unread = 60 * TAKEN_BYTES_S - later
        connection.look(now + later, 30)
    assert not transport.aborted
    transport.unread -= 1
    connection.look(now + 91, 30)
    assert transport.aborted


@pytest.mark.parametrize("waited", [False, True])
async def test_what_is_written_after_the_rest_was_taken_has_its_own_time(*, waited: bool) -> None:
    """`waited`: for the client, before it was written; else more is there than before."""
    connection, transport, served = connected()
    now = asyncio.get_running_loop().time()
    connection.data_received(WHOLE)
    await asyncio.gather(*served.state.tasks)
    transport.unread = TAKEN_BYTES_S
    connection.look(now, 30)
    if waited:
        connection.pause_writing()
        connection.resume_writing()
    else:
        transport.unread += 1
    connection.look(now + 30, 30)
    connection.look(now + 60, 30)
    assert not transport.aborted
    connection.look(now + 62, 30)
    assert transport.aborted


async def test_a_client_that_waits_for_its_answer_is_never_late() -> None:
    connection, transport, served = connected()
    now = asyncio.get_running_loop().time()
    connection.data_received(WHOLE.replace(b"/x", b"/wait") + b"\r\n")
    for later in (0, 100, 10_000):
        connection.look(now + later, 30)
    assert not transport.closing
    served.app.go.set()
    await asyncio.gather(*served.state.tasks)
    assert b"200 OK" in transport.written


async def test_a_request_that_has_to_wait_for_the_one_before_is_not_late() -> None:
    connection, transport, served = connected()
    now = asyncio.get_running_loop().time()
    connection.data_received(WHOLE.replace(b"/x", b"/wait") + HEAD)  # from here on the bus reads no more
    for later in (0, 100, 10_000):
        connection.look(now + later, 30)
    assert not transport.closing
    served.app.go.set()
    await until(lambda: b"200 OK" in transport.written)
    connection.look(now + 10_029, 30)
    assert not transport.closing
    connection.look(now + 10_031, 30)
    assert b"408 Request Timeout" in transport.written
    await asyncio.gather(*served.state.tasks)


async def test_a_connection_is_kept_a_while_after_each_request() -> None:
    connection, transport, served = connected()
    now = asyncio.get_running_loop().time()
    connection.look(now, 30)
    for later in (29, 33, 37):  # the first may come late
        connection.data_received(WHOLE)
        await asyncio.gather(*served.state.tasks)
        connection.look(now + later, 30)
    connection.look(now + 41, 30)
    assert not transport.closing
    connection.look(now + 43, 30)
    assert transport.aborted


async def test_no_timer_runs_where_nobody_is_connected() -> None:
    async with serving(QUICK_S) as served:
        reader, _ = await served.connect(b"GET")
        assert await rest(reader) == b""
        await until(lambda: vars(served.config.sweep)["_timer"] is None)
        second, _ = await served.connect(b"GET")
        assert await rest(second) == b""
    assert served.refused == {"ERR_SLOW_CLIENT": 2}


async def test_one_connection_too_many_is_closed_and_the_others_are_served() -> None:
    async with serving(connections=2) as served:
        first, first_writer = await served.connect(WHOLE)
        second, _ = await served.connect(WHOLE)
        assert (await answer(first), await answer(second)) == ((200, b"body"), (200, b"body"))
        third, _ = await served.connect(WHOLE)
        assert await rest(third) == b""
        first_writer.write(WHOLE)
        assert await answer(first) == (200, b"body")
    assert served.refused == {"ERR_BUSY": 1}
