"""The HTTP side: `create_app(settings)`, the routes, and the one error handler. Everything else is the Bus.

Reading order: `Api.routes` is the table of contents. The Bus starts at lifespan, or at the first request where the
server has none.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from bus import envelopes, provenance, resources
from bus import settings as bus_settings
from bus.dispatch import Bus
from bus.errors import BusError, NotFoundError, RequestError
from bus.schemas import show
from runners.base import LARGE_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping

    from starlette.routing import BaseRoute
    from starlette.types import Receive, Scope, Send

    from bus.course import Answer
    from bus.overlay_entry import Entry
    from bus.settings import Settings

log = logging.getLogger(__name__)

WATCH_AFTER_S = 0.02
"""How long a call runs before the bus listens for its client's leaving, in seconds."""

_PARTS = ("name", "capability")
_CLIENT_GONE = 499
"""The status of an answer that nobody will read; nginx's number for it."""

_LIMIT_DEFAULT, _LIMIT_MOST = 100, 10_000
_DIGITS_MOST = 16


class JsonResponse(Response):
    """JSON by orjson, with a line's end for people at a terminal."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


def create_app(settings: Settings | None = None, bus: Bus | None = None) -> Starlette:
    """The ASGI application of one Bus, made from `settings` (default: those of the current folder) or given."""
    bus = bus or Bus(settings or bus_settings.load())
    api = Api(bus)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with bus:
            yield

    return _Application(
        api,
        routes=[*api.routes(), *bus.plugins.routes(bus)],
        lifespan=lifespan,
        exception_handlers={BusError: api.bus_error, HTTPException: api.http_error, Exception: api.unexpected_error},
    )


class _Application(Starlette):
    """Starlette, but for plain calls of a bus that has started: they go to their endpoint past middleware and routes.

    These take a tenth of the time of a call, and do nothing for it.
    """

    def __init__(self, api: Api, **options: Any) -> None:  # noqa: ANN401  # Starlette's own
        super().__init__(**options)
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        called = _called(scope) if self._api.invoke.is_ready else None
        if called is None:
            await super().__call__(scope, receive, send)
            return
        scope["path_params"] = called
        try:
            await self._api.invoke(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # the outer edge, as Starlette's
            response = await self._api.unexpected_error(Request(scope), error)
            await response(scope, receive, send)


def _called(scope: Scope) -> dict[str, str] | None:
    """What the routes of calls find in the path of one; None for anything else."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["root_path"]:
        return None
    empty, invoke, *parts = scope["path"].split("/")
    if empty or invoke != "invoke" or len(parts) > len(_PARTS) or not all(parts):
        return None
    return dict(zip(_PARTS, parts, strict=False)) or None


class Api:
    """The endpoints of one Bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.invoke = _Invoke(bus)

    def routes(self) -> list[BaseRoute]:
        """In the order in which a path is held against them: calls first."""
        return [
            Route("/invoke/{name}", self.invoke, methods=["POST"]),
            Route("/invoke/{name}/{capability}", self.invoke, methods=["POST"]),
            Route("/", self.root),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/overlays", self.overlays),
            Route("/overlays/{name}", self.overlay),
            Route("/provenance", self.provenance),
            Route("/provenance/{seq}", self.record),
            Route("/stress", self.stress),
        ]

    async def root(self, request: Request) -> Response:
        paths = [route.path for route in request.app.routes if isinstance(route, Route)]
        status = self._status()
        return JsonResponse({"service": "aal-core", "version": resources.version(), "status": status, "paths": paths})

    async def health(self, _: Request) -> Response:
        """The process answers, and is not about to end; `/ready` says whether it can work."""
        return JsonResponse({"status": self._status()}, status_code=503 if self._bus.is_closing else 200)

    def _status(self) -> str:
        return "shutting down" if self._bus.is_closing else "ok"

    async def ready(self, _: Request) -> Response:
        reason = await self._bus.not_ready()
        if reason is None:
            return JsonResponse({"ready": True})
        return JsonResponse({"ready": False, "reason": reason}, status_code=503)

    async def overlays(self, _: Request) -> Response:
        await self._bus.start()
        entries = self._bus.registry.entries()
        return JsonResponse({"overlays": [entry.summary() | {"running": self._running(entry)} for entry in entries]})

    async def overlay(self, request: Request) -> Response:
        await self._bus.start()
        entry = self._bus.registry.entry(request.path_params["name"])
        return JsonResponse(entry.detail() | {"running": self._running(entry)})

    def _running(self, entry: Entry) -> dict[str, Any]:
        """What the runners keep for an overlay from call to call: helpers, workers, service, circuit breaker."""
        return {
            name: state for runner in self._bus.runners.values() for name, state in runner.state(entry.name).items()
        }

    async def provenance(self, request: Request) -> Response:
        """The last records, oldest first: `?limit=&overlay=&ok=&since=` (milliseconds since the epoch)."""
        query = _Query(request.query_params)
        limit, since_ms = query.integer("limit", _LIMIT_DEFAULT, 1, _LIMIT_MOST), query.integer("since", None, 0, 2**53)
        overlay, ok = query.text("overlay"), query.boolean("ok")
        query.refuse_unknown()
        ledger = self._bus.settings.ledger
        events = await asyncio.to_thread(provenance.tail, ledger, limit, overlay=overlay, ok=ok, since_ms=since_ms)
        return JsonResponse({"events": events, "count": len(events)})

    async def record(self, request: Request) -> Response:
        seq = request.path_params["seq"]
        if not _is_number(seq):
            raise NotFoundError("ERR_NOT_FOUND", f"the ledger has no line {show(seq)}")
        return JsonResponse(await asyncio.to_thread(provenance.read_line, self._bus.settings.ledger, int(seq)))

    async def stress(self, _: Request) -> Response:
        await self._bus.start()
        return JsonResponse(self._bus.stress.report() | {"scheduler": self._bus.scheduler.report()})

    async def bus_error(self, _: Request, error: Exception) -> Response:
        if not isinstance(error, BusError):
            raise error
        return _error_response(error)

    async def http_error(self, request: Request, error: Exception) -> Response:
        """What the router itself refuses: unknown paths and methods."""
        if not isinstance(error, HTTPException):
            raise error
        code = "ERR_METHOD" if error.status_code == 405 else "ERR_NOT_FOUND"  # noqa: PLR2004
        response = _error_response(NotFoundError(code, f"{request.method} {request.url.path}"))
        response.headers.update(error.headers or {})
        return response

    async def unexpected_error(self, request: Request, error: Exception) -> Response:
        """The outer edge: the caller learns a code, the log gets the traceback."""
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _error_response(BusError("ERR_INTERNAL", f"{request.method} {request.url.path}"))


class _Invoke:
    """One call. The capability may stand in the path, behind a dot in the name, or in the body.

    A bare ASGI application: the request and response objects of a function's route cost as much as all checks together.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    @property
    def is_ready(self) -> bool:
        return self._bus.is_started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._bus.start()
        name, capability = scope["path_params"]["name"], scope["path_params"].get("capability")
        try:
            answer = await self._answer(name, capability, dict(scope["headers"]), receive)
        except ClientDisconnect:
            await Response(status_code=_CLIENT_GONE)(scope, receive, send)
        else:
            await _send(answer, send)

    async def _answer(
        self, name: str, capability: str | None, headers: Mapping[bytes, bytes], receive: Receive
    ) -> Answer:
        """Raises `ClientDisconnect` where nobody waits for an answer any more."""
        try:
            body = await self._body(headers, receive)
            read = envelopes.read_invocation
            if len(body) > LARGE_BYTES:
                call = await asyncio.to_thread(read, body, name, capability)
            else:
                call = read(body, name, capability)
        except RequestError as error:
            return await self._bus.refuse(error, name, capability)
        return await _unless_disconnected(receive, self._bus.invoke(call))

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The body, read no further than it may be long. Raises `RequestError` for its type or its size."""
        limit = self._bus.settings.max_body_bytes
        _check_headers(headers, limit)
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":  # in the middle of its request, so no call was made
                raise ClientDisconnect
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise _too_large(f"more than {limit}", limit)
            more = message.get("more_body", False)
        return b"".join(chunks)


def _check_headers(headers: Mapping[bytes, bytes], limit: int) -> None:
    """Raise `RequestError` for what is not plain JSON, or is longer than `limit` bytes by its own account."""
    media_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise RequestError("ERR_CONTENT_TYPE", f"content type {media_type or 'none'!r}, allowed: application/json")
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding != "identity":
        raise RequestError("ERR_CONTENT_TYPE", f"content encoding {show(encoding)}, allowed: identity")
    declared = headers.get(b"content-length", b"").decode("latin-1")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(declared, limit)


class _Query:
    """Reads a query string; everything wrong in it is ERR_BAD_QUERY."""

    def __init__(self, params: Mapping[str, str]) -> None:
        self._params = params
        self._known: list[str] = []

    def text(self, name: str) -> str | None:
        self._known.append(name)
        return self._params.get(name)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:  # noqa: ANN401
        raw = self.text(name)
        if raw is None:
            return default
        if not (_is_number(raw) and low <= int(raw) <= high):
            raise RequestError("ERR_BAD_QUERY", f"{name}={show(raw)}, allowed: a whole number, {low} to {high}")
        return int(raw)

    def boolean(self, name: str) -> bool | None:
        raw = self.text(name)
        if raw is None:
            return None
        if raw.lower() not in {"true", "false", "1", "0"}:
            raise RequestError("ERR_BAD_QUERY", f"{name}={show(raw)}, allowed: true or false")
        return raw.lower() in {"true", "1"}

    def refuse_unknown(self) -> None:
        if unknown := [name for name in self._params if name not in self._known]:
            raise RequestError("ERR_BAD_QUERY", f"unknown: {show(unknown)}; known: {', '.join(self._known)}")


async def _unless_disconnected(receive: Receive, call: Coroutine[Any, Any, Answer]) -> Answer:
    """Raises `ClientDisconnect` once the client has gone; then the call was cancelled and has left its line."""
    watch = _ClientWatch(receive)
    try:
        return await call
    except asyncio.CancelledError:
        if watch.has_fired and watch.caller.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watch.end()


def _is_number(text: str) -> bool:
    """Whether `int` reads it, and quickly."""
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MOST


class _ClientWatch:
    """Cancels the current task once its client has gone. Begins after `WATCH_AFTER_S`: most calls are over by then."""

    def __init__(self, receive: Receive) -> None:
        loop = asyncio.get_running_loop()
        caller = asyncio.current_task(loop)
        if caller is None:
            raise RuntimeError("a request is handled in a task")
        self.caller: asyncio.Task[Any] = caller
        self.has_fired = False
        self._receive = receive
        self._task: asyncio.Task[None] | None = None
        self._timer = loop.call_later(WATCH_AFTER_S, self._begin)

    def end(self) -> None:
        self._timer.cancel()
        if self._task:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_fired = True
        self.caller.cancel()


async def _send(answer: Answer, send: Send) -> None:
    body = answer.json
    headers = [
        (b"content-length", b"%d" % len(body)),
        (b"content-type", b"application/json"),
        (b"x-request-id", answer.body["request_id"].encode()),
    ]
    if answer.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % answer.retry_after_s))
    await send({"type": "http.response.start", "status": answer.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _error_response(error: BusError) -> Response:
    return JsonResponse(error.body(), status_code=error.entry.http_status)


def _too_large(found: str, limit: int) -> RequestError:
    return RequestError("ERR_TOO_LARGE", f"the body has {found} bytes, allowed: {limit}")
