"""Services that are called over HTTP: one pooled client for all of them.

The decision a reader could not guess: what may be sent twice. A call is tried again where nothing was sent (the
connection failed), or where its target is `repeatable`; never else, since the service may have done the work before it
fell silent. (Beneath, aiohttp sends once more what RFC 9110 calls idempotent, GET first of all.) So that an idle
connection which the service has closed meanwhile does not fail a call that may not be repeated, idle connections are
kept for less time than servers keep them, and each is looked at before it is used again.

Each overlay has a circuit breaker. What counts against a service is what speaks of its health: it cannot be reached, it
breaks off, it does not answer in time, it answers 5xx. An answer that cannot be used (4xx, not JSON, too large) came
from a service that is well. A call counts once, however often it was tried.
"""

from __future__ import annotations

import asyncio
import io
import select
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError

from runners.base import LARGE_BYTES, Code, HttpTarget, JsonError, Outcome, parse_json
from runners.breaker import Breaker
from runners.service import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

    from runners.base import Job, ServiceTarget
    from runners.breaker import Admission

KEEPALIVE_S = 1.5
"""Seconds that an idle connection is kept: less than common servers do (gunicorn 2, uvicorn and Node 5)."""

RETRY_WAITS_S = (0.05, 0.2)
"""Seconds before the second and the third try."""

TRANSIENT_STATUSES = frozenset({502, 503, 504})
"""Statuses after which a repeatable call is tried again."""

UNABLE_STATUSES = frozenset({501, 505})
"""5xx that speak of the request, not of the service's health (RFC 9110 section 15.6)."""

REDIRECTS = frozenset({301, 302, 303, 307, 308})
SAME_METHOD_REDIRECTS = frozenset({307, 308})
"""Redirects that keep method and body (RFC 9110 section 15.4); the others make a GET of anything."""

MAX_REDIRECTS = 3

STREAM_SIZE = 1024 * 1024
"""Bytes from which on a body is sent in pieces; aiohttp warns of larger ones in one piece."""

PREVIEW_LENGTH = 200
"""Characters of an unreadable answer that an error quotes."""


class ServiceStarter(Protocol):
    """Who starts the services that targets name, as far as this runner needs to know."""

    def use(self, job: Job, target: ServiceTarget) -> AbstractAsyncContextManager[str]:
        """The base URL of the running service, which is in use until the exit.

        Entering takes until `job.deadline` at most. Raises `ServiceError`.
        """

    def state(self, overlay: str) -> dict[str, Any]: ...

    async def close(self) -> None: ...


class HttpRunner:
    """Sends each job to its service. Used in one event loop only; the client is made at the first job.

    A 2xx or 4xx answer whose body is JSON is the reply. A 4xx reply without `ok` becomes
    `{"ok": false, "error": its own words, "result": its body}`.
    """

    name = "http"

    def __init__(self, services: ServiceStarter | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`services` starts what targets name; without it they are refused. `clock` is that of the breakers."""
        self._services = services
        self._clock = clock
        self._breakers: dict[str, tuple[str, Breaker]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def run(self, job: Job) -> Outcome:
        """Send the job and wait for the answer until `job.deadline`. Leaving early closes the connection."""
        target = job.target
        if not isinstance(target, HttpTarget):
            raise TypeError(f"the runner {self.name} cannot carry {target!r}")
        breaker = self._breaker(job)
        admission = breaker.admit()
        if admission is None:
            return _not_called(breaker, job)
        try:
            if target.service is None:
                return await self._send(_Call(job, target, target.url), admission)
            return await self._send_to_service(job, target, target.service, admission)
        finally:
            admission.give_back()

    def state(self, overlay: str) -> dict[str, Any]:
        """`{"breaker": {"state", "failures", "retry_in_s", "last_error"}}`, and what is known of a service started."""
        found = self._breakers.get(overlay)
        breaker = {} if found is None else {"breaker": found[1].to_json()}
        return breaker if self._services is None else breaker | self._services.state(overlay)

    async def close(self) -> None:
        """Close every connection; what still runs on one ends. Then end the services that were started."""
        self._closed = True
        try:
            if self._session is not None:
                await self._session.close()
        finally:
            if self._services is not None:
                await self._services.close()

    def _breaker(self, job: Job) -> Breaker:
        """An overlay has one base URL and so one breaker; a changed overlay begins anew."""
        code_hash, breaker = self._breakers.get(job.overlay, (None, None))
        if breaker is None or code_hash != job.code_hash:
            breaker = Breaker(clock=self._clock)
            self._breakers[job.overlay] = (job.code_hash, breaker)
        return breaker

    async def _send_to_service(
        self, job: Job, target: HttpTarget, service: ServiceTarget, admission: Admission
    ) -> Outcome:
        """A service that does not start, or not in time, is not the breaker's business: nothing was sent."""
        if self._services is None:
            return Outcome(Code.START, error="this bus starts no services", retryable=False)
        try:
            async with self._services.use(job, service) as base_url:
                return await self._send(_Call(job, target, base_url + target.url), admission)
        except ServiceError as error:
            return error.outcome

    async def _send(self, call: _Call, admission: Admission) -> Outcome:
        """Send within the deadline, and tell the breaker what came of it."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(call.job.deadline - began):
                tried = await self._try(call)
        except TimeoutError:
            waited_s = time.monotonic() - began
            fault = f"{call.place} had not answered after {waited_s:.3f} s"
            admission.timed_out(waited_s, fault)
            return Outcome(Code.TIMEOUT, error=fault)
        if tried.fault is not None:
            admission.failed(tried.fault)
        elif tried.answered:
            admission.succeeded(time.monotonic() - began)
        return tried.outcome

    async def _try(self, call: _Call) -> _Tried:
        """As often as the rules of the module allow, and the deadline."""
        for wait_s in RETRY_WAITS_S:
            tried = await self._attempt(call)
            if not tried.again or time.monotonic() + wait_s >= call.job.deadline:
                return tried
            await asyncio.sleep(wait_s)
        return await self._attempt(call)

    async def _attempt(self, call: _Call) -> _Tried:
        try:
            answer = await self._fetch(call)
        except aiohttp.ClientError as error:
            if self._closed:
                error_text = f"the runner was closed before {call.place} answered"
                return _Tried(Outcome(Code.CANCELLED, error=error_text), answered=False)
            return _failure(error, call)
        if isinstance(answer, Outcome):
            return _Tried(answer)
        outcome = await _read(answer, call)
        if answer.status < 500 or answer.status in UNABLE_STATUSES:  # noqa: PLR2004
            return _Tried(outcome)
        again = call.target.repeatable and answer.status in TRANSIENT_STATUSES
        return _Tried(outcome, again, f"{call.place} answered {answer.title}")

    async def _fetch(self, call: _Call) -> _Answer | Outcome:
        """Send, follow redirects within the service, read the body up to its cap. Raises aiohttp.ClientError."""
        url, query, redirects_left = call.url, call.target.query, MAX_REDIRECTS
        while True:
            async with self._request(url, query, call) as response:
                location = response.headers.get("Location") if response.status in REDIRECTS else None
                if location is None:
                    return await _receive(response, call)
            onward = _onward(str(response.url), location, response.status, call.target.method)
            if onward is None or not redirects_left:
                return _refused(call, response.status, location)
            url, query, redirects_left = onward, {}, redirects_left - 1

    def _request(
        self, url: str, query: Mapping[str, str], call: _Call
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._closed:
            raise aiohttp.ClientConnectionError("the runner is closed")
        session = self._session = self._session or _new_session()
        return session.request(
            call.target.method,
            url,
            params=query or None,
            data=None if call.target.method == "GET" else _body(call.job.envelope),
            headers={"X-Request-Id": call.job.request_id},
            allow_redirects=False,
        )


class _Call(NamedTuple):
    """What is sent, and where: `url` is the target's, or that of a service which was started for it."""

    job: Job
    target: HttpTarget
    url: str

    @property
    def place(self) -> str:
        """Method and address for people, without user, password and query, which may be secret."""
        bare = self.url.partition("?")[0]
        scheme, mark, rest = bare.partition("://")
        host, slash, path = rest.partition("/")
        return f"{self.target.method} {scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


class _Tried(NamedTuple):
    """What came of one try, whether another may follow, and what the breaker is to know.

    `fault` is what speaks against the service's health. It is told to other callers, and so quotes no answer.
    """

    outcome: Outcome
    again: bool = False
    fault: str | None = None
    answered: bool = True


class _Answer(NamedTuple):
    """What a service answered: the status, the words for it as they came, the whole body."""

    status: int
    reason: str | None
    body: bytes

    @property
    def title(self) -> str:
        reason = (self.reason or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return f"HTTP {self.status} {reason}".rstrip()


def _new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=_Connector(limit=0, keepalive_timeout=KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        headers={"Accept": "application/json", "User-Agent": "aal-core"},
        trust_env=False,
    )


def _body(envelope: bytes) -> aiohttp.Payload:
    if len(envelope) < STREAM_SIZE:
        return aiohttp.BytesPayload(envelope, content_type="application/json")
    return aiohttp.BytesIOPayload(io.BytesIO(envelope), content_type="application/json")


class _Connector(aiohttp.TCPConnector):
    """A pool that looks at a connection before it is used again.

    The service may have closed it a moment ago, and the event loop not have seen that yet.
    """

    def __init__(self, *, limit: int, keepalive_timeout: float) -> None:
        super().__init__(limit=limit, keepalive_timeout=keepalive_timeout)
        self._watches: weakref.WeakKeyDictionary[object, select.poll] = weakref.WeakKeyDictionary()

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
            if not self._is_stale(connection):
                return connection
            connection.close()

    def _is_stale(self, connection: Connection) -> bool:
        """Whether an idle connection was closed by its peer, or has bytes that nobody asked for."""
        transport = connection.transport
        if transport is None:
            return True
        watch = self._watches.get(connection.protocol)
        if watch is None:  # a new connection
            self._watches[connection.protocol] = watch = select.poll()
            watch.register(transport.get_extra_info("socket").fileno(), select.POLLIN | select.POLLRDHUP)
            return False
        return bool(watch.poll(0))


async def _receive(response: aiohttp.ClientResponse, call: _Call) -> _Answer | Outcome:
    """The cap counts what the body is after decompression, which aiohttp does piece by piece."""
    chunks: list[bytes] = []
    size = 0
    content = response.content
    while not content.at_eof():
        chunk = await content.readany()
        size += len(chunk)
        if size > call.job.max_output_bytes:
            response.close()
            error = f"{call.place} answered with more than {call.job.max_output_bytes} bytes"
            return Outcome(Code.OUTPUT_TOO_LARGE, error=error)
        chunks.append(chunk)
    return _Answer(response.status, response.reason, b"".join(chunks))


async def _read(answer: _Answer, call: _Call) -> Outcome:
    if answer.status // 100 not in (2, 4):
        error = f"{call.place} answered {answer.title}{_preview(answer.body)}"
        return Outcome(Code.HTTP_STATUS, error=error, log=_log(answer, call.job), output_bytes=len(answer.body))
    try:
        value = await _parse(answer.body)
    except JsonError as fault:
        what = f"what is not JSON ({fault})" if answer.body.strip() else "nothing"
        error = f"{call.place} answered {answer.title} and {what}{_preview(answer.body)}"
        return Outcome(Code.PROTOCOL, error=error, log=_log(answer, call.job), output_bytes=len(answer.body))
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


def _failure(error: aiohttp.ClientError, call: _Call) -> _Tried:
    """What came of a try without a whole answer. Of an address that is none nothing is known."""
    place = call.place
    if isinstance(error, aiohttp.ClientConnectorError):
        fault = f"{place} could not be reached: {_why(error)}"
        return _Tried(Outcome(Code.UNREACHABLE, error=fault), again=True, fault=fault)
    if isinstance(error, aiohttp.InvalidURL):
        outcome = Outcome(Code.UNREACHABLE, error=f"{place} is not an address: {error}", retryable=False)
        return _Tried(outcome, answered=False)
    if isinstance(error, aiohttp.ClientResponseError):
        return _Tried(Outcome(Code.PROTOCOL, error=f"{place} answered what is not HTTP: {error.message}"))
    if isinstance(error.__cause__, ContentEncodingError):
        return _Tried(Outcome(Code.PROTOCOL, error=f"{place} answered what cannot be decompressed: {error}"))
    moment = "in the middle of its answer" if isinstance(error, aiohttp.ClientPayloadError) else "before it answered"
    fault = f"{place} closed the connection {moment}: {error}"
    again = call.target.repeatable
    return _Tried(Outcome(Code.UNREACHABLE, error=fault, retryable=again), again, fault)


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


def _refused(call: _Call, status: int, location: str) -> Outcome:
    limits = f"only within the same service, with the same method, and at most {MAX_REDIRECTS} times"
    error = f"{call.place} answered HTTP {status} with Location {location!r}, which is not followed: {limits}"
    return Outcome(Code.HTTP_STATUS, error=error, retryable=False)


def _not_called(breaker: Breaker, job: Job) -> Outcome:
    retry_in_s = breaker.retry_in_s or 0.0
    again = f"again in {retry_in_s:.1f} s" if breaker.state == "open" else "one call is trying it now"
    failed = f"its last {breaker.failures} calls failed, the last one: {breaker.last_error}"
    return Outcome(Code.CIRCUIT_OPEN, error=f"the service of {job.overlay} is not called, {again}; {failed}")


def _preview(body: bytes) -> str:
    text = body[: 4 * PREVIEW_LENGTH].decode("utf-8", "replace").strip()[:PREVIEW_LENGTH]
    return f": {text!r}" if text else ""


def _log(answer: _Answer, job: Job) -> str:
    return answer.body[: job.max_log_bytes].decode("utf-8", "replace")
