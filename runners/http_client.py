"""One request to an HTTP service and its answer, over one pool of connections for all services.

The decision a reader could not guess: this stands on aiohttp's connector and on the protocol of its connections, one
floor below `aiohttp.ClientSession`. Pool, name lookup, TLS, parsing and decompression are aiohttp's. The session is
left out because it sends what RFC 9110 calls idempotent (GET, PUT, DELETE) a second time by itself where a connection
breaks, and cannot be told not to; here a request is sent once. It also costs more CPU than all that is below it.

So that an idle connection which the service has closed meanwhile fails no request, idle connections are kept for less
time than servers keep them, and each is looked at before it is used again. What ends a request early (its deadline, a
cancellation, the end of the client) aborts its connection: what was not sent by then is not sent any more.

Where a request may go is judged twice: the address as it is written, against the list of targets, and each IP address
that its name stands for, when it is connected to. Addresses at which clouds keep the keys of their machines are never
connected to; a manifest has no business there, and a name that changes its address cannot lead there.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import math
import select
import socket
import time
import weakref
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from yarl import URL

from runners.alarm import Alarm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.abc import ResolveResult
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.streams import StreamReader

KEEPALIVE_S = 1.5
"""Seconds that an idle connection is kept: less than common servers do (gunicorn 2, uvicorn and Node 5)."""

HEADERS = {"Accept": "application/json", "User-Agent": "aal-core"}
"""What every request says, beside the host, the encodings that can be opened, and the user of the address."""

REDIRECTS = frozenset({301, 302, 303, 307, 308})

ADDRESSES = 1024
"""How many addresses are kept ready to be called, the last used ones."""

SEPARATE_BYTES = 64 * 1024
"""From this size on a body is written after its head, not copied to it."""

SWITCHING_PROTOCOLS = 101

FORBIDDEN = tuple(
    map(
        ipaddress.ip_network,
        (
            "169.254.0.0/16",  # link-local (RFC 3927): the metadata of nearly every cloud
            "fe80::/10",  # link-local (RFC 4291)
            "fd00:ec2::254/128",  # AWS
            "fd20:ce::254/128",  # Google Cloud
            "100.100.100.200/32",  # Alibaba Cloud
            "168.63.129.16/32",  # Azure
            "192.0.0.192/32",  # Oracle Cloud
        ),
    )
)
"""Where no request goes: link-local addresses, and those at which a cloud tells a machine its keys."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses whose last 32 bits are the IPv4 address that a translator connects to (RFC 6052)."""


class Request(NamedTuple):
    """What is sent. `query` is added to that of the address; `body` is JSON text, None where the method has no body.

    `token` is that of a service which the bus has started, and goes with the request as a bearer token (RFC 6750); the
    list of targets does not apply there. None for all others.
    """

    method: str
    url: str
    query: Mapping[str, str]
    request_id: str
    body: bytes | None
    token: str | None = None


class Answer(NamedTuple):
    """The status, the words for it as they came, the whole body, decompressed.

    `location` is where a redirect leads, as it came, from the address `url`; the body of a redirect is not read.
    """

    status: int
    reason: str | None
    body: bytes
    location: str | None = None
    url: str = ""

    @property
    def title(self) -> str:
        """The status and its words, for people."""
        reason = (self.reason or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return f"HTTP {self.status} {reason}".rstrip()


class ExchangeError(Exception):
    """There is no whole answer. The words go on from the method and the address."""


class AddressError(ExchangeError):
    """The address is none: nothing was sent."""


class ForbiddenError(AddressError):
    """The address is one that nothing is sent to."""


class ConnectError(ExchangeError):
    """There is no connection: nothing was sent."""


class BrokenOffError(ExchangeError):
    """The connection ended before the answer did. What was asked may have been done."""


class UnreadableError(ExchangeError):
    """What was answered is not HTTP, or cannot be decompressed."""


class TooLargeError(ExchangeError):
    """The body, decompressed, is larger than it may be."""


class DeadlineError(ExchangeError):
    """The deadline passed before there was a whole answer."""


class ClosedError(ExchangeError):
    """The client was closed before there was a whole answer."""


class HttpClient:
    """Used in one event loop only, and made in it."""

    def __init__(self, targets: frozenset[str] = frozenset()) -> None:
        """`targets` are the hosts (`example.org`, `[::1]`), or hosts with ports (`example.org:8080`), that requests
        may go to; where there are none, they may go to any."""
        self._loop = asyncio.get_running_loop()
        self._targets = frozenset(target.lower() for target in targets)
        self._resolver = _Resolver()
        self._connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, resolver=self._resolver)
        self._watches: weakref.WeakKeyDictionary[ResponseHandler, select.poll] = weakref.WeakKeyDictionary()
        self._exchanges: set[_Exchange] = set()
        self._alarm = Alarm(self._loop, self._expire)
        self._address = functools.lru_cache(ADDRESSES)(_Address)

    async def fetch(self, request: Request, *, deadline: float, limit: int) -> Answer:
        """Send the request once, and read an answer of at most `limit` bytes after decompression.

        `deadline` is in seconds on the `time.monotonic` clock. Raises `ExchangeError`.
        """
        address = self._address(request.url)
        if request.token is None:
            address.require_in(self._targets)
        url = address.url(request.query)
        head = address.head(url, request)
        exchange = _Exchange(await self._connect(address, deadline), deadline)
        self._exchanges.add(exchange)
        self._alarm.set(deadline)
        try:
            exchange.send(head, request.body)
            return await exchange.receive(url, limit)
        finally:
            self._exchanges.discard(exchange)
            exchange.end()

    async def close(self) -> None:
        """End what runs, with `ClosedError`, and close every connection."""
        for exchange in self._exchanges:
            exchange.abort(ClosedError())
        self._alarm.cancel()
        await self._connector.close()
        await self._resolver.close()

    def _expire(self, now: float) -> float:
        for exchange in self._exchanges:
            if exchange.deadline <= now:
                exchange.abort(DeadlineError())
        left = (exchange.deadline for exchange in self._exchanges if exchange.deadline > now)
        return min(left, default=math.inf)

    async def _connect(self, address: _Address, deadline: float) -> Connection:
        """An idle connection that is still good, or a new one. Raises `ExchangeError`."""
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineError
            connection = await self._take(address, left_s)
            if not self._is_stale(connection):
                return connection
            connection.close()

    async def _take(self, address: _Address, timeout_s: float) -> Connection:
        if self._connector.closed:
            raise ClosedError
        timeout = aiohttp.ClientTimeout(total=None, connect=timeout_s, ceil_threshold=math.inf)
        try:
            return await self._connector.connect(address.peer, [], timeout)
        except TimeoutError as error:
            raise DeadlineError from error
        except aiohttp.ClientConnectorError as error:  # before ValueError, which a bad certificate is as well
            raise ConnectError(f"could not be reached: {_why(error)}") from error
        except ValueError as error:  # a host name that IDNA has no form for, or an odd number
            raise AddressError(f"is not an address: {error}") from error
        except aiohttp.ClientConnectionError as error:
            raise ClosedError from error
        except asyncio.CancelledError as error:
            if self._connector.closed and not _is_being_cancelled():  # then its look-ups of names were
                raise ClosedError from error
            raise

    def _is_stale(self, connection: Connection) -> bool:
        """Whether an idle connection was closed by its peer, or has bytes that nobody asked for.

        The event loop may not have seen that yet, so the kernel is asked.
        """
        protocol, transport = connection.protocol, connection.transport
        if protocol is None or transport is None:  # a new one that is lost again, which is for `_Exchange` to tell
            return False
        watch = self._watches.get(protocol)
        if watch is None:  # a new connection
            self._watches[protocol] = watch = select.poll()
            watch.register(transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)
            return False
        return protocol.should_close or bool(watch.poll(0))


class _Resolver(AbstractResolver):
    """aiohttp's own look-up of names, without the addresses that are forbidden."""

    def __init__(self) -> None:
        self._inner = aiohttp.DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Raises `ForbiddenError` where one address is forbidden: whoever has that in a name means no good."""
        found = await self._inner.resolve(host, port, family)
        for one in found:
            _require_allowed(one["host"])
        return found

    async def close(self) -> None:
        await self._inner.close()


def _require_allowed(host: str) -> None:
    """Raise `ForbiddenError` for an IP address that nothing is sent to. A name passes; its addresses come later."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    for one in (address, _carried_ipv4(address)):
        if one is not None and any(one in network for network in FORBIDDEN):
            raise ForbiddenError(f"is at {host}: nothing is sent to link-local addresses and those of cloud metadata")


def _carried_ipv4(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped (RFC 4291), 6to4 (RFC 3056) or NAT64 (RFC 6052)."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


class _Peer(aiohttp.ClientRequest):
    """Whom to connect to. Its key is that of the pool, which asks for it twice a request."""

    @functools.cached_property
    def connection_key(self) -> ConnectionKey:
        return super().connection_key


class _Address:
    """An address, read once for all requests that go there: whom to connect to, and what of their heads is alike."""

    __slots__ = ("_fields", "_names", "_url", "peer")

    def __init__(self, url: str) -> None:
        """Raises `AddressError`."""
        try:
            self._url = URL(url)
        except ValueError as error:
            raise AddressError(f"is not an address: {error}") from error
        if self._url.scheme not in {"http", "https"} or not self._url.raw_host:
            raise AddressError("is not an address of http or https")
        host = self._url.raw_host
        _require_allowed(host)
        host = f"[{host}]" if ":" in host else host.lower().rstrip(".")
        self._names = frozenset((host, f"{host}:{self._url.port}"))
        # For the connector, which looks at the address alone, and for the fields that aiohttp makes of it.
        self.peer = _Peer("GET", self._url, headers=HEADERS)
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in self.peer.headers.items())

    def require_in(self, targets: frozenset[str]) -> None:
        """Raise `ForbiddenError` where there are targets, and this is none of them."""
        if targets and not targets & self._names:
            raise ForbiddenError(f"is none of the targets that requests may go to: {', '.join(sorted(targets))}")

    def url(self, query: Mapping[str, str]) -> URL:
        """With the query of a request beside its own."""
        return self._url.extend_query(query) if query else self._url

    def head(self, url: URL, request: Request) -> bytes:
        """The request line and the fields (RFC 9112) of a request to `url`."""
        lines = f"{request.method} {url.raw_path_qs} HTTP/1.1\r\n{self._fields}"
        if request.body is not None:
            lines += f"Content-Type: application/json\r\nContent-Length: {len(request.body)}\r\n"
        if request.token is not None:
            lines += f"Authorization: Bearer {request.token}\r\n"
        return f"{lines}X-Request-Id: {_field_value(request.request_id)}\r\n\r\n".encode()


class _Exchange:
    """One request and its answer on one connection."""

    __slots__ = ("_connection", "_fault", "_protocol", "_transport", "_whole", "deadline")

    def __init__(self, connection: Connection, deadline: float) -> None:
        """Takes the connection over, until `deadline`. Raises `ConnectError` where it has just been lost."""
        if connection.closed or connection.protocol is None or connection.transport is None:
            connection.close()
            raise ConnectError("could not be reached: it closed the connection at once")
        self._connection = connection
        self._protocol = connection.protocol
        self._transport = connection.transport
        self._fault: ExchangeError | None = None
        self._whole = False
        self.deadline = deadline

    def send(self, head: bytes, body: bytes | None) -> None:
        self._protocol.set_response_params(read_until_eof=True)
        if body is None:
            self._transport.write(head)
        elif len(body) < SEPARATE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    async def receive(self, url: URL, limit: int) -> Answer:
        """Raises `ExchangeError`: that of `abort` where it was aborted."""
        try:
            answer = await self._read(url, limit)
        except HttpProcessingError as error:
            raise self._fault or UnreadableError(f"answered what is not HTTP: {error.message}") from error
        except aiohttp.ClientError as error:
            raise self._fault or _broken_off(error) from error
        if self._fault is not None:  # the end of the connection may be that of the body, too
            raise self._fault
        return answer

    def abort(self, fault: ExchangeError) -> None:
        """End the connection at once, and the exchange with this error."""
        self._fault = self._fault or fault
        self._transport.abort()

    def end(self) -> None:
        """Give the connection back where another request may follow on it."""
        if self._whole and not self._transport.get_write_buffer_size():
            self._connection.release()
        else:
            self._transport.abort()
            self._connection.close()

    async def _read(self, url: URL, limit: int) -> Answer:
        message, stream = await self._protocol.read()
        while message.code < 200 and message.code != SWITCHING_PROTOCOLS:  # noqa: PLR2004  # an interim answer
            message, stream = await self._protocol.read()
        location = message.headers.get("Location") if message.code in REDIRECTS else None
        if location is not None:
            self._whole = stream.is_eof()
            return Answer(message.code, message.reason, b"", location, str(url))
        body = await _body(stream, limit)
        self._whole = True
        return Answer(message.code, message.reason, body)


async def _body(stream: StreamReader, limit: int) -> bytes:
    """At most `limit` bytes after decompression, which aiohttp does piece by piece. Raises `TooLargeError`."""
    chunks: list[bytes] = []
    size = 0
    while not stream.at_eof():
        chunk = await stream.readany()
        size += len(chunk)
        if size > limit:
            raise TooLargeError(f"answered with more than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _broken_off(error: aiohttp.ClientError) -> ExchangeError:
    if isinstance(error.__cause__, ContentEncodingError):
        return UnreadableError(f"answered what cannot be decompressed: {error}")
    moment = "in the middle of its answer" if isinstance(error, aiohttp.ClientPayloadError) else "before it answered"
    # Only what the kernel said: the words of other errors hold the answer's head, and go to other callers as well.
    why = f": {error.strerror or error}" if isinstance(error, aiohttp.ClientOSError) else ""
    return BrokenOffError(f"closed the connection {moment}{why}")


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _why(error: aiohttp.ClientConnectorError) -> str:
    cause = error.os_error
    return "connection refused" if isinstance(cause, ConnectionRefusedError) else cause.strerror or str(cause)


def _field_value(text: str) -> str:
    """As the value of a field (RFC 9110 section 5.5), which cannot hold everything."""
    return text if text.isascii() and text.isprintable() else quote(text)
