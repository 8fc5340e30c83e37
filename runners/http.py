"""Services that are called over HTTP: when to send, when again, and what an answer means.

The decision a reader could not guess: what may be sent twice. A call is tried again where nothing was sent (the
connection failed), or where its target is `repeatable`; never else, since the service may have done the work before it
fell silent. Of a service that the bus starts, each try asks anew where it is: it may be another one by then.

Each overlay has a circuit breaker. What counts against a service is what speaks of its health: it cannot be reached, it
breaks off, it crashes, it does not answer in time, it answers 5xx. An answer that cannot be used (4xx, not JSON, too
large) came from a service that is well; where the bus itself ended it, nothing is known. A call counts once, however
often it was tried, and as its last try did.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urljoin, urlsplit

from runners.base import LARGE_BYTES, Code, HttpTarget, JsonError, Outcome, Sandbox, parse_json
from runners.breaker import Breaker
from runners.confinement import RIGHTS
from runners.faults import ServiceError
from runners.http_client import (
    BrokenOffError,
    ClosedError,
    ConnectError,
    DeadlineError,
    ExchangeError,
    HttpClient,
    Request,
    TooLargeError,
    UnreadableError,
)
from runners.output import preview
from runners.purges import Purges

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import AbstractAsyncContextManager

    from runners.base import Job, ServiceTarget, Share
    from runners.breaker import Admission
    from runners.faults import End
    from runners.http_client import Answer

RETRY_WAITS_S = (0.05, 0.2)
"""Seconds before the second and the third try."""

NEWS_S = 0.05
"""Seconds for which the news of a service's end is waited for: it comes after that of its connections."""

TRANSIENT_STATUSES = frozenset({502, 503, 504})
"""Statuses after which a repeatable call is tried again."""

UNABLE_STATUSES = frozenset({501, 505})
"""5xx that speak of the request, not of the service's health (RFC 9110 section 15.6)."""

SAME_METHOD_REDIRECTS = frozenset({307, 308})
"""Redirects that keep method and body (RFC 9110 section 15.4); the others make a GET of anything."""

MAX_REDIRECTS = 3

EXTERNAL = Sandbox("none", (), tuple(f"{right}: not our process" for right in RIGHTS))
"""What is known of a service that the bus has not started."""


class RunningService(Protocol):
    """A service that the bus has started, as long as a call uses it."""

    @property
    def url(self) -> str:
        """Its base URL."""

    @property
    def token(self) -> str:
        """What calls bring, so that it may tell them from others."""

    memory_mb: float | None
    """What it had when it was last looked at, in MiB."""

    @property
    def sandbox(self) -> Sandbox | None:
        """What the kernel holds it to."""

    def end(self) -> End | None:
        """For a call that got no answer: how the service has ended meanwhile, None where no more is known."""


class ServiceStarter(Protocol):
    """Who starts the services that targets name, as far as this runner needs to know."""

    def use(self, job: Job, target: ServiceTarget) -> AbstractAsyncContextManager[RunningService]:
        """The running service, which is in use until the exit.

        Entering takes until `job.deadline` at most. Raises `ServiceError`.
        """

    def state(self, overlay: str) -> dict[str, Any]: ...

    def shares(self) -> dict[str, Share]: ...

    def relieve(self, idle_s: float) -> None: ...

    def ready(self, overlay: str) -> RunningService | None:
        """The overlay's service, while one can be called."""

    def forget(self, overlay: str) -> None: ...

    async def close(self, *, at_once: bool = False) -> None: ...


class HttpRunner:
    """Sends each job to its service. Used in one event loop only; the client is made at the first job.

    A 2xx or 4xx answer whose body is JSON is the reply. A 4xx reply without `ok` becomes
    `{"ok": false, "error": its own words, "result": its body}`.
    """

    name = "http"

    def __init__(
        self,
        services: ServiceStarter | None = None,
        *,
        targets: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`services` starts what jobs name; without it they are refused. `clock` is that of the breakers.

        `targets` are the hosts, or hosts with ports, that all other services may be on; any where there are none.
        """
        self._services = services
        self._targets = targets
        self._clock = clock
        self._breakers: dict[str, tuple[int, Breaker]] = {}
        self._purges = Purges(self._open_client)
        self._client: HttpClient | None = None
        self._closed = False

    async def run(self, job: Job) -> Outcome:
        """Send the job and wait for the answer until `job.deadline`. Leaving early ends the connection."""
        target = job.target
        if not isinstance(target, HttpTarget):
            raise TypeError(f"the runner {self.name} cannot carry {target!r}")
        breaker = self._breaker(job, target)
        admission = breaker.admit()
        if admission is None:
            return _not_called(breaker, job)
        try:
            tried = await self._try(job, target)
            _tell(admission, tried)
            return tried.outcome
        finally:
            admission.give_back()

    def state(self, overlay: str) -> dict[str, Any]:
        """`{"breaker": {"state", "failures", "retry_in_s", "last_error"}}`, and what is known of a service started.

        Where the service was told of a purge, also that of `Purges.state`.
        """
        found = self._breakers.get(overlay)
        told = ({} if found is None else {"breaker": found[1].to_json()}) | self._purges.state(overlay)
        return told if self._services is None else told | self._services.state(overlay)

    def shares(self) -> dict[str, Share]:
        return {} if self._services is None else self._services.shares()

    def relieve(self, idle_s: float) -> None:
        if self._services is not None:
            self._services.relieve(idle_s)

    def purge(self, overlays: Collection[str] | None) -> dict[str, int]:
        """Tell the services that take it: those that the bus has started and that run, and others that were called."""
        told: dict[str, int] = {}
        if self._closed:
            return told
        for overlay, target in self._purges.targets(overlays):
            service = None if self._services is None else self._services.ready(overlay)
            if target.service is None:
                self._purges.tell(overlay, str(target.purge_url), None)
            elif service is not None:
                self._purges.tell(overlay, f"{service.url}{target.purge_url}", service.token)
            else:
                continue
            told[overlay] = 1
        return told

    def forget(self, overlay: str) -> None:
        """Keep nothing of the overlay from now on; a service that was started for it ends once its calls have."""
        self._breakers.pop(overlay, None)
        self._purges.forget(overlay)
        if self._services is not None:
            self._services.forget(overlay)

    async def close(self, *, at_once: bool = False) -> None:
        """End what still runs and close every connection. Then end the services that were started."""
        self._closed = True
        try:
            await self._purges.close()
            if self._client is not None:
                await self._client.close()
        finally:
            if self._services is not None:
                await self._services.close(at_once=at_once)

    def _breaker(self, job: Job, target: HttpTarget) -> Breaker:
        """An overlay has one base URL and so one breaker; a later edition begins anew.

        A call of an edition before that has one for itself alone.
        """
        edition, breaker = self._breakers.get(job.overlay, (None, None))
        if breaker is not None and edition == job.edition:
            return breaker
        fresh = Breaker(clock=self._clock)
        if edition is None or edition < job.edition:
            self._breakers[job.overlay] = (job.edition, fresh)
            self._purges.serve(job.overlay, target)
        return fresh

    async def _try(self, job: Job, target: HttpTarget) -> _Tried:
        """As often as the rules of the module allow, and the deadline."""
        for wait_s in RETRY_WAITS_S:
            tried = await self._attempt(job, target)
            if not tried.again or time.monotonic() + wait_s >= job.deadline:
                return tried
            await asyncio.sleep(wait_s)
        return await self._attempt(job, target)

    async def _attempt(self, job: Job, target: HttpTarget) -> _Tried:
        """One try, at the service that is there now. That it cannot be had is not the breaker's business."""
        if target.service is None:
            return (await self._exchange(_Call(job, target, target.url, EXTERNAL))).held_to(EXTERNAL)
        if self._services is None:
            return _Tried(Outcome(Code.START, error="this bus starts no services", retryable=False))
        try:
            async with self._services.use(job, target.service) as service:
                tried = await self._exchange(
                    _Call(job, target, service.url + target.url, service.sandbox, service.token)
                )
                broke_off = tried.fault is not None and not tried.answered
                ended = await _end_of(service, job.deadline) if broke_off else None
                sandbox, peak_mb = service.sandbox, service.memory_mb
        except ServiceError as error:
            return _Tried(error.outcome)
        tried = (tried if ended is None else _of_end(ended, tried)).held_to(sandbox)
        return tried._replace(outcome=tried.outcome._replace(peak_mb=peak_mb))

    async def _exchange(self, call: _Call) -> _Tried:
        """Send it, and judge what came of it."""
        began = time.monotonic()
        try:
            answer = await self._fetch(call)
        except ExchangeError as error:
            return _unanswered(error, call, time.monotonic() - began)
        took_s = time.monotonic() - began
        outcome = await _read(answer, call)
        if answer.status < 500 or answer.status in UNABLE_STATUSES:  # noqa: PLR2004
            return _Tried(outcome, answered=True, took_s=took_s)
        again = call.target.repeatable and answer.status in TRANSIENT_STATUSES
        return _Tried(outcome, again, f"{call.place} answered {answer.title}", answered=True, took_s=took_s)

    async def _fetch(self, call: _Call) -> Answer:
        """Send it, and follow redirects. One that may not be followed is the answer. Raises `ExchangeError`."""
        job, target = call.job, call.target
        body = None if target.method == "GET" else job.envelope
        request = Request(target.method, call.url, target.query, job.request_id, body, call.token)
        client = self._open_client()
        for _ in range(MAX_REDIRECTS):
            answer = await client.fetch(request, deadline=job.deadline, limit=job.max_output_bytes)
            onward = _onward(answer, target.method)
            if onward is None:
                return answer
            request = request._replace(url=onward, query={})
        return await client.fetch(request, deadline=job.deadline, limit=job.max_output_bytes)

    def _open_client(self) -> HttpClient:
        if self._client is None:
            if self._closed:
                raise ClosedError
            self._client = HttpClient(self._targets)
        return self._client


class _Call(NamedTuple):
    """What is sent, and where: `url` is the target's, or that of a service which was started for it.

    `sandbox` is what the kernel holds the service to, `token` what such a service knows the bus by.
    """

    job: Job
    target: HttpTarget
    url: str
    sandbox: Sandbox | None
    token: str | None = None

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
    `answered` tells that there was an answer, be it a bad one; `took_s`, in how many seconds, or how long none came.
    """

    outcome: Outcome
    again: bool = False
    fault: str | None = None
    answered: bool = False
    took_s: float = 0.0

    def held_to(self, sandbox: Sandbox | None) -> _Tried:
        """Of a service that the kernel holds to this."""
        if self.outcome.sandbox is sandbox:
            return self
        return self._replace(outcome=self.outcome._replace(sandbox=sandbox))


def _tell(admission: Admission, tried: _Tried) -> None:
    """What a try says of the service's health; nothing where there was neither an answer nor a fault."""
    if tried.fault is None:
        if tried.answered:
            admission.succeeded(tried.took_s)
    elif tried.outcome.code == Code.TIMEOUT:
        admission.timed_out(tried.took_s, tried.fault)
    else:
        admission.failed(tried.fault)


def _unanswered(error: ExchangeError, call: _Call, took_s: float) -> _Tried:
    """What came of a try without a whole answer."""
    words = f"{call.place} {error}"
    match error:
        case ConnectError():
            return _Tried(Outcome(Code.UNREACHABLE, error=words), again=True, fault=words)
        case BrokenOffError():
            again = call.target.repeatable
            return _Tried(Outcome(Code.UNREACHABLE, error=words, retryable=again), again, fault=words)
        case DeadlineError():
            words = f"{call.place} had not answered after {took_s:.3f} s"
            return _Tried(Outcome(Code.TIMEOUT, error=words), fault=words, took_s=took_s)
        case ClosedError():
            return _Tried(Outcome(Code.CANCELLED, error=f"the runner was closed before {call.place} answered"))
        case TooLargeError() | UnreadableError():
            code = Code.OUTPUT_TOO_LARGE if isinstance(error, TooLargeError) else Code.PROTOCOL
            return _Tried(Outcome(code, error=words), answered=True, took_s=took_s)
        case _:  # an address that is none: nothing is known of who is there
            return _Tried(Outcome(Code.UNREACHABLE, error=words, retryable=False))


async def _end_of(service: RunningService, deadline: float) -> End | None:
    """How a service has ended that did not answer; None where it seems to be there still."""
    ended = service.end()
    left_s = deadline - time.monotonic()
    if ended is None and left_s > 0:
        await asyncio.sleep(min(NEWS_S, left_s))
        ended = service.end()
    return ended


def _of_end(ended: End, tried: _Tried) -> _Tried:
    """A try that found no answer because its service has ended. That the bus ended it says nothing of its health."""
    if ended.by_bus:
        return _Tried(ended.outcome)
    return _Tried(ended.outcome, tried.again, fault=ended.outcome.error or tried.fault)


async def _read(answer: Answer, call: _Call) -> Outcome:
    if answer.location is not None:
        return _not_followed(answer, call)
    if answer.status // 100 not in (2, 4):
        error = f"{call.place} answered {answer.title}{_preview(answer.body)}"
        return Outcome(Code.HTTP_STATUS, error=error, log=_log(answer, call.job), output_bytes=len(answer.body))
    try:
        large = len(answer.body) > LARGE_BYTES
        value = await asyncio.to_thread(parse_json, answer.body) if large else parse_json(answer.body)
    except JsonError as fault:
        what = f"what is not JSON ({fault})" if answer.body.strip() else "nothing"
        error = f"{call.place} answered {answer.title} and {what}{_preview(answer.body)}"
        return Outcome(Code.PROTOCOL, error=error, log=_log(answer, call.job), output_bytes=len(answer.body))
    is_reply = answer.status < 400 or (isinstance(value, dict) and "ok" in value)  # noqa: PLR2004
    result = value if is_reply else _as_failure(answer, value)
    return Outcome(result=result, output_bytes=len(answer.body), sandbox=call.sandbox)


def _as_failure(answer: Answer, body: Any) -> dict[str, Any]:  # noqa: ANN401
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


def _onward(answer: Answer, method: str) -> str | None:
    """The address that a redirect leads to; None where there is none, or it may not be followed."""
    if answer.location is None or (method != "GET" and answer.status not in SAME_METHOD_REDIRECTS):
        return None
    try:
        onward = urljoin(answer.url, answer.location)
        return onward if _origin(onward) == _origin(answer.url) else None
    except ValueError:  # the Location is no address
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port (RFC 6454). Raises ValueError."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _not_followed(answer: Answer, call: _Call) -> Outcome:
    limits = f"only within the same service, with the same method, and at most {MAX_REDIRECTS} times"
    error = (
        f"{call.place} answered HTTP {answer.status} with Location {answer.location!r}, which is not followed: {limits}"
    )
    return Outcome(Code.HTTP_STATUS, error=error, retryable=False)


def _not_called(breaker: Breaker, job: Job) -> Outcome:
    retry_in_s = breaker.retry_in_s or 0.0
    again = f"again in {retry_in_s:.1f} s" if breaker.state == "open" else "one call is trying it now"
    failed = f"its last {breaker.failures} calls failed, the last one: {breaker.last_error}"
    return Outcome(Code.CIRCUIT_OPEN, error=f"the service of {job.overlay} is not called, {again}; {failed}")


def _preview(body: bytes) -> str:
    text = body.strip()
    return f": {preview(text)}" if text else ""


def _log(answer: Answer, job: Job) -> str:
    return answer.body[: job.max_log_bytes].decode("utf-8", "replace")
