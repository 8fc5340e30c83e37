"""Services that are called over HTTP: one pooled client for all of them.

The decision a reader could not guess: what may be sent twice. A call is tried again where nothing was sent (the
connection failed), or where its target is `repeatable`; never else, since the service may have done the work before it
fell silent. So that an idle connection which the service has closed meanwhile does not fail a call that may not be
repeated, idle connections are kept for less time than servers keep them, and each is looked at before it is used again.
"""

from __future__ import annotations

import asyncio
import io
import select
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError

from runners.base import LARGE_BYTES, Code, HttpTarget, JsonError, Outcome, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

    from runners.base import Job

KEEPALIVE_S = 1.5
"""Seconds that an idle connection is kept: less than common servers do (gunicorn 2, uvicorn and Node 5)."""

RETRY_WAITS_S = (0.05, 0.2)
"""Seconds before the second and the third try."""

TRANSIENT_STATUSES = frozenset({502, 503, 504})
"""Statuses after which a repeatable call is tried again."""

REDIRECTS = frozenset({301, 302, 303, 307, 308})
SAME_METHOD_REDIRECTS = frozenset({307, 308})
"""Redirects that keep method and body (RFC 9110 section 15.4); the others make a GET of anything."""

MAX_REDIRECTS = 3

STREAM_SIZE = 1024 * 1024
"""Bytes from which on a body is sent in pieces; aiohttp warns of larger ones in one piece."""

PREVIEW_LENGTH = 200
"""Characters of an unreadable answer that an error quotes."""


class HttpRunner:
    """Sends each job to its service. Used in one event loop only; the client is made at the first job.

    A 2xx or 4xx answer whose body is JSON is the reply. A 4xx reply without `ok` becomes
    `{"ok": false, "error": its own words, "result": its body}`.
    """

    name = "http"

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def run(self, job: Job) -> Outcome:
        """Send the job and wait for the answer until `job.deadline`. Leaving early closes the connection."""
        target = job.target
        if not isinstance(target, HttpTarget):
            raise TypeError(f"the runner {self.name} cannot carry {target!r}")
        began = time.monotonic()
        try:
            async with asyncio.timeout(job.deadline - began):
                return await self._try(job, target)
        except TimeoutError:
            waited_s = time.monotonic() - began
            return Outcome(Code.TIMEOUT, error=f"{_place(target)} had not answered after {waited_s:.3f} s")

    def state(self, overlay: str) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        """Close every connection; what still runs on one ends."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def _try(self, job: Job, target: HttpTarget) -> Outcome:
        """As often as the rules of the module allow, and the deadline."""
        for wait_s in RETRY_WAITS_S:
            outcome, again = await self._attempt(job, target)
            if not again or time.monotonic() + wait_s >= job.deadline:
                return outcome
            await asyncio.sleep(wait_s)
        return (await self._attempt(job, target))[0]

    async def _attempt(self, job: Job, target: HttpTarget) -> tuple[Outcome, bool]:
        """The outcome of one try, and whether another may follow."""
        try:
            answer = await self._fetch(job, target)
        except aiohttp.ClientError as error:
            if self._closed:
                return Outcome(Code.CANCELLED, error=f"the runner was closed before {_place(target)} answered"), False
            return _failure(error, target)
        if isinstance(answer, Outcome):
            return answer, False
        return await _read(answer, job, target), target.repeatable and answer.status in TRANSIENT_STATUSES

    async def _fetch(self, job: Job, target: HttpTarget) -> _Answer | Outcome:
        """Send, follow redirects within the service, read the body up to its cap. Raises aiohttp.ClientError."""
        url, query, redirects_left = target.url, target.query, MAX_REDIRECTS
        while True:
            async with self._request(url, query, job, target) as response:
                location = response.headers.get("Location") if response.status in REDIRECTS else None
                if location is None:
                    return await _receive(response, job, target)
            onward = _onward(str(response.url), location, response.status, target.method)
            if onward is None or not redirects_left:
                return _refused(target, response.status, location)
            url, query, redirects_left = onward, {}, redirects_left - 1

    def _request(
        self, url: str, query: Mapping[str, str], job: Job, target: HttpTarget
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._closed:
            raise aiohttp.ClientConnectionError("the runner is closed")
        headers = {"Accept": "application/json", "X-Request-Id": job.request_id}
        data: bytes | io.BytesIO | None = None
        if target.method != "GET":
            headers["Content-Type"] = "application/json"
            data = job.envelope if len(job.envelope) < STREAM_SIZE else io.BytesIO(job.envelope)
        session = self._session = self._session or _new_session()
        return session.request(
            target.method, url, params=query or None, data=data, headers=headers, allow_redirects=False
        )


def _new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=_Connector(limit=0, keepalive_timeout=KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        headers={"User-Agent": "aal-core"},
        trust_env=False,
    )


class _Connector(aiohttp.TCPConnector):
    """A pool that looks at a connection before it is used again.

    The service may have closed it a moment ago, and the event loop not have seen that yet.
    """

    def __init__(self, *, limit: int, keepalive_timeout: float) -> None:
        super().__init__(limit=limit, keepalive_timeout=keepalive_timeout)
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109
    ) -> Connection:
        while True:
            try:
                connection = await super().connect(req, traces, timeout)
            except UnicodeError as error:  # a host name that IDNA has no form for
                raise aiohttp.InvalidURL(req.url, str(error)) from error
            if connection.protocol not in self._known:
                self._known.add(connection.protocol)
                return connection
            if not _is_stale(connection):
                return connection
            connection.close()


def _is_stale(connection: Connection) -> bool:
    """Whether an idle connection was closed by its peer, or has bytes that nobody asked for."""
    transport = connection.transport
    if transport is None:
        return True
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)
    return bool(poll.poll(0))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a service answered: the status, the words for it, the whole body."""

    status: int
    reason: str
    body: bytes

    @property
    def title(self) -> str:
        return f"HTTP {self.status} {self.reason}".rstrip()


async def _receive(response: aiohttp.ClientResponse, job: Job, target: HttpTarget) -> _Answer | Outcome:
    """The cap counts what the body is after decompression, which aiohttp does piece by piece."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > job.max_output_bytes:
            response.close()
            error = f"{_place(target)} answered with more than {job.max_output_bytes} bytes"
            return Outcome(Code.OUTPUT_TOO_LARGE, error=error)
        chunks.append(chunk)
    reason = (response.reason or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return _Answer(response.status, reason, b"".join(chunks))


async def _read(answer: _Answer, job: Job, target: HttpTarget) -> Outcome:
    if answer.status // 100 not in (2, 4):
        error = f"{_place(target)} answered {answer.title}{_preview(answer.body)}"
        return Outcome(Code.HTTP_STATUS, error=error, log=_log(answer, job), output_bytes=len(answer.body))
    try:
        value = await _parse(answer.body)
    except JsonError as fault:
        what = f"what is not JSON ({fault})" if answer.body.strip() else "nothing"
        error = f"{_place(target)} answered {answer.title} and {what}{_preview(answer.body)}"
        return Outcome(Code.PROTOCOL, error=error, log=_log(answer, job), output_bytes=len(answer.body))
    is_reply = answer.status < 400 or (isinstance(value, dict) and "ok" in value)  # noqa: PLR2004
    result = value if is_reply else _as_failure(answer, value)
    return Outcome(result=result, output_bytes=len(answer.body))


async def _parse(body: bytes) -> Any:  # noqa: ANN401
    return parse_json(body) if len(body) <= LARGE_BYTES else await asyncio.to_thread(parse_json, body)


def _as_failure(answer: _Answer, body: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"ok": False, "error": _own_words(body) or answer.title, "result": body}


def _own_words(body: Any) -> str | None:  # noqa: ANN401
    """What a service says went wrong: the text itself, or under the first of the usual keys."""
    if isinstance(body, str):
        return body
    if isinstance(body, dict):
        for key in ("error", "detail", "message"):
            if words := _own_words(body.get(key)):
                return words
    return None


def _failure(error: aiohttp.ClientError, target: HttpTarget) -> tuple[Outcome, bool]:
    """The outcome of a try without a whole answer, and whether another may follow."""
    place = _place(target)
    if isinstance(error, aiohttp.ClientConnectorError):
        return Outcome(Code.UNREACHABLE, error=f"{place} could not be reached: {_why(error)}"), True
    if isinstance(error, aiohttp.InvalidURL):
        return Outcome(Code.UNREACHABLE, error=f"{place} is not an address: {error}", retryable=False), False
    if isinstance(error, aiohttp.ClientResponseError):
        return Outcome(Code.PROTOCOL, error=f"{place} answered what is not HTTP: {error.message}"), False
    if isinstance(error.__cause__, ContentEncodingError):
        return Outcome(Code.PROTOCOL, error=f"{place} answered what cannot be decompressed: {error}"), False
    moment = "in the middle of its answer" if isinstance(error, aiohttp.ClientPayloadError) else "before it answered"
    error_text = f"{place} closed the connection {moment}: {error}"
    return Outcome(Code.UNREACHABLE, error=error_text, retryable=target.repeatable), target.repeatable


def _why(error: aiohttp.ClientConnectorError) -> str:
    cause = error.os_error
    return "connection refused" if isinstance(cause, ConnectionRefusedError) else cause.strerror or str(cause)


def _onward(url: str, location: str, status: int, method: str) -> str | None:
    """The address that a redirect leads to; None where it may not be followed."""
    if method != "GET" and status not in SAME_METHOD_REDIRECTS:
        return None
    try:
        onward = urljoin(url, location)
        return onward if _origin(onward) == _origin(url) else None
    except ValueError:  # the Location is no address
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port (RFC 6454). Raises ValueError."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _refused(target: HttpTarget, status: int, location: str) -> Outcome:
    limits = f"only within the same service, with the same method, and at most {MAX_REDIRECTS} times"
    error = f"{_place(target)} answered HTTP {status} with Location {location!r}, which is not followed: {limits}"
    return Outcome(Code.HTTP_STATUS, error=error, retryable=False)


def _place(target: HttpTarget) -> str:
    """Method and address for people, without user, password and query, which may be secret."""
    bare = target.url.partition("?")[0]
    scheme, mark, rest = bare.partition("://")
    host, slash, path = rest.partition("/")
    return f"{target.method} {scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def _preview(body: bytes) -> str:
    text = body[: 4 * PREVIEW_LENGTH].decode("utf-8", "replace").strip()[:PREVIEW_LENGTH]
    return f": {text!r}" if text else ""


def _log(answer: _Answer, job: Job) -> str:
    return answer.body[: job.max_log_bytes].decode("utf-8", "replace")
