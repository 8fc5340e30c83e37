"""HTTP/1.1 connections that give a client only so much time, and only so large a head.

uvicorn waits for ever for a request that comes byte by byte, and keeps whatever head it is sent. Here one timer for
all connections looks at each a few times in `client_timeout_s`, and ends those whose client is too slow: to begin a
request, to send all of it, or to take its answer; and those that are idle for `IDLE_S`. So a request costs no timer of
its own, as it does uvicorn. A connection on which the bus itself is at work (a call runs, or reading is paused until it
has) is never late.

An answer that is complete before its request has come whole is the last of its connection, and says so. The rest of the
request is not waited for, but neither is the connection closed at once: what arrives at a closed socket is answered by
a reset, which can take the answer from a client that has yet to read it (RFC 9112 section 9.6). So the bus stops to
write, reads on a little, then not at all, and ends the connection soon after.

What is refused here never became a request for the application: it is counted by its code, and logged nowhere, because
whoever reaches the port could fill a log with it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bus.errors import BusError

if TYPE_CHECKING:
    import asyncio
    from collections import Counter
    from collections.abc import Callable, Iterable

    from starlette.types import ASGIApp
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

HEAD_BYTES = 32 * 1024
"""Bytes of a request's head, of its headers' names and values where it has come whole.

And of what stands before, between and after the pieces of a body that comes in chunks (RFC 9112 section 7.1).
"""

HEADERS = 100
URL_BYTES = 8 * 1024

LOOKS = 8
"""How often a connection is looked at in the time that a client has; it has so much longer at most, and 1/8."""

LOOK_S = 1.0
"""Seconds from one look to the next, at most."""

IDLE_S = 5.0
"""How long a connection is kept for a further request, at most, in seconds; uvicorn's own figure."""

TAKEN_BYTES_S = 64 * 1024
"""What a client has to take of an answer, on the average, in bytes a second."""

LINGER_S = 1.0
"""How long a client has to read its last answer while its request still comes; until the look after that."""

LINGER_BYTES = 2**20
"""How much of that rest is read and thrown away, give or take one piece; what is more waits with its sender."""


class Config(uvicorn.Config):
    """uvicorn's, for this protocol. `refused` counts by code what was refused here.

    `client_timeout_s` is how long a client may take for its request, in seconds; `connections` how many there are at
    most: a further one is closed at once, so that the descriptors which calls need are not used up.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        client_timeout_s: float,
        connections: int,
        refused: Counter[str],
        **options: Any,  # noqa: ANN401  # uvicorn's own
    ) -> None:
        super().__init__(app, http=Protocol, **options)
        self.sweep = Sweep(client_timeout_s)
        self.most = connections
        self.refused = refused


class Sweep:
    """Looks at the open connections of one server from time to time, as long as there are any."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._pause_s = min(LOOK_S, timeout_s / LOOKS)
        self._connections: Iterable[object] = ()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, connections: Iterable[object]) -> None:
        """Look after `connections`, the server's own collection, until it is empty."""
        if self._timer is None:
            self._connections = connections
            self._timer = loop.call_later(self._pause_s, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        open_now = [one for one in self._connections if isinstance(one, Protocol)]
        for connection in open_now:
            connection.look(now, self._timeout_s)
        if open_now:
            self.begin(loop, self._connections)


class Protocol(HttpToolsProtocol):
    """One connection. `_begun` is when the request on its way in began, None where none is; of the loop's clock."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._own = cast("Config", config)
        self._begun: float | None = None
        self._waiting: float | None = None
        """Since when it has been seen with nothing on its way, which may be the last look; None since it had work."""
        self._unread: tuple[int, float] | None = None
        """Bytes that the client had yet to take of what it was sent, and when it has to have taken all of them."""
        self._in_head = False
        self._head_bytes = 0
        """An upper bound of what came of the head so far; 0 where it follows another request in the same piece.

        After the head: what came since the last piece of the body began, but for the rest of the piece that was read.
        """
        self._fault: BusError | None = None
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the last that came, which may wait behind it."""
        self._lingers: float | None = None
        """Since when the last answer is out and only the client's end is waited for."""
        self._thrown_away = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > self._own.most:
            self._own.refused["ERR_BUSY"] += 1
            transport.abort()
            return
        self._own.sweep.begin(self.loop, self.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._tell_gone()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The transport closes next; a client that has gone and one that only sends no more look the same."""
        self._tell_gone()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, without its warnings, and with an end to what a head may be."""
        if self._lingers is not None:
            self._throw_away(data)
            return
        if self._begun is None:
            self._head_bytes = len(data)
        else:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # to what is not spoken here: the request is answered as any other
            self._hang_up_after_the_answer()
        except httptools.HttpParserError as error:
            self._refuse(self._fault or BusError("ERR_BAD_HTTP", f"what was sent is not HTTP/1.1: {_why(error)}"))
        else:
            if self._begun is not None:
                self._expect_more()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = self.loop.time()
        self._waiting = None
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is of the trailer, which nobody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._fault = self._fault_of_head()
        if self._fault is not None:
            raise self._fault  # the parser stops at it
        self._head_bytes = 0
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._head_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._begun = None
        self._head_bytes = 0
        if self.cycle.transport is not self.transport:  # no longer `_expect_more`
            self.cycle.transport = self.transport
            self.cycle.default_headers = self.server_state.default_headers
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """As uvicorn's, but for its timer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def shutdown(self) -> None:
        """As uvicorn's; one that lingers ends soon by itself, and its client may have yet to read the answer."""
        if self._lingers is None:
            super().shutdown()

    def resume_writing(self) -> None:
        self._unread = None  # all but a little was taken; what is written from now on has its own time
        super().resume_writing()

    def look(self, now: float, timeout_s: float) -> None:
        """End the connection where its client has been too slow for `timeout_s`."""
        if self._is_stuck(now, timeout_s):
            self._abort()
        elif self.transport.is_closing():
            return
        elif self._lingers is not None:
            if self.transport.get_write_buffer_size():  # the answer is not out yet
                self._lingers = now
            elif now - self._lingers > min(LINGER_S, timeout_s):
                self._abort()
        elif self._begun is not None:
            if self.flow.read_paused:  # the bus takes its time, not the client
                self._begun = now
            elif now - self._begun > timeout_s:
                self._refuse(BusError("ERR_SLOW_CLIENT", f"the request had not arrived after {timeout_s:g} s"))
        elif self._is_busy() or self._unread is not None:
            self._waiting = None
        elif self._waiting is None:
            self._waiting = now
        elif now - self._waiting > (timeout_s if self.cycle is None else min(IDLE_S, timeout_s)):
            self._abort()

    def _is_stuck(self, now: float, timeout_s: float) -> bool:
        """Whether its client has not taken what it was sent in `timeout_s`, and the time that its size gives it.

        Only what was written since gives more time: a client that takes a little now and then keeps no answer here.
        """
        unread = self.transport.get_write_buffer_size()
        if not unread:
            self._unread = None
        elif self._unread is None or unread > self._unread[0]:
            self._unread = (unread, now + timeout_s + unread / TAKEN_BYTES_S)
        else:
            self._unread = (unread, self._unread[1])
        return self._unread is not None and now > self._unread[1]

    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _fault_of_head(self) -> BusError | None:
        if len(self.url) > URL_BYTES:
            return _too_large(f"an address of {len(self.url)} bytes", f"{URL_BYTES}")
        if not self.url.startswith(b"/"):  # that of a proxy's request, or `*`: its host could contradict the header
            return BusError("ERR_BAD_HTTP", "the request asks for no path of this server")
        if len(self.headers) > HEADERS:
            return _too_large(f"{len(self.headers)} headers", f"{HEADERS}")
        if not 0 < self._head_bytes <= HEAD_BYTES:
            size = sum(len(name) + len(value) for name, value in self.headers)
            return _too_large(f"{size} bytes", f"{HEAD_BYTES}") if size > HEAD_BYTES else None
        return None

    def _expect_more(self) -> None:
        """Where a request has begun and did not end with what came: whatever answers it now is the last answer."""
        if self._head_bytes > HEAD_BYTES:
            part = "head" if self._in_head else "trailer, or the head of a chunk,"
            self._refuse(_too_large(f"more than {HEAD_BYTES} bytes", f"{HEAD_BYTES}", part))
        elif not self._in_head and self.cycle.transport is self.transport:
            self.cycle.transport = cast("asyncio.Transport", _Ahead(self.transport, self._linger))
            self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    def _linger(self) -> None:
        """Write no more, and leave the client some time to read what was written; then the connection ends."""
        if self.transport.is_closing():
            return
        self._lingers = self.loop.time()
        with contextlib.suppress(OSError):  # its client has gone, which the transport is told next
            self.transport.write_eof()

    def _throw_away(self, data: bytes) -> None:
        self._thrown_away += len(data)
        if self._thrown_away >= LINGER_BYTES:
            self.flow.pause_reading()

    def _hang_up_after_the_answer(self) -> None:
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _refuse(self, refusal: BusError) -> None:
        """Say why, where that can only be the answer to this request, and end the connection."""
        self._own.refused[refusal.code] += 1
        was_read = self._begun is not None and not self._in_head and self._fault is None and self._is_busy()
        is_owed_another = bool(self.pipeline) or (self._is_busy() and not was_read)
        is_untold = refusal.code == "ERR_SLOW_CLIENT" and not was_read
        if is_owed_another or is_untold or (was_read and self.cycle.response_started):
            self._abort()
            return
        self._tell_gone()  # the application may wait for the rest of the request
        self.transport.write(_answer(refusal))
        self._linger()

    def _abort(self) -> None:
        self._tell_gone()
        self.transport.abort()

    def _tell_gone(self) -> None:
        """Tell the application that nobody waits for an answer, before it writes one to what is closed already."""
        for cycle in (self._running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.waiting_for_100_continue = False  # it would be written as soon as the application reads
                cycle.message_event.set()


class _Ahead:
    """The transport of an answer that is written while its request still comes: its end is `end`."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = end


def _answer(refusal: BusError) -> bytes:
    body = orjson.dumps(refusal.body(), option=orjson.OPT_APPEND_NEWLINE)
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[refusal.entry.http_status] + head + body


def _too_large(found: str, allowed: str, part: str = "head") -> BusError:
    return BusError("ERR_HEAD_TOO_LARGE", f"the {part} of the request has {found}, allowed: {allowed}")


def _why(error: httptools.HttpParserError) -> str:
    """In the parser's words; those of an exception in one of its callbacks are not for callers."""
    return "unreadable" if isinstance(error, httptools.HttpParserCallbackError) else str(error)
