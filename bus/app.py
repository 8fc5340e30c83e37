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
from starlette.requests import ClientDisconnect
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

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from bus.course import Answer
    from bus.settings import Settings

log = logging.getLogger(__name__)

WATCH_AFTER_S = 0.02
"""How long a call runs before the bus listens for its client's leaving, in seconds."""

_CLIENT_GONE = 499
"""The status of an answer that nobody will read; nginx's number for it."""

_LIMIT_DEFAULT, _LIMIT_MOST = 100, 10_000
_DIGITS_MOST = 16


class JsonResponse(Response):
    """JSON by orjson, with a line's end for people at a terminal."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


def create_app(settings: Settings | None = None, bus: Bus | None = None) -> Starlette:
    """The ASGI application of one Bus, made from `settings` (default: those of the current folder) or given."""
    bus = bus or Bus(settings or bus_settings.load())
    api = Api(bus)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with bus:
            yield

    return Starlette(
        routes=[*api.routes(), *bus.plugins.routes(bus)],
        lifespan=lifespan,
        exception_handlers={BusError: api.bus_error, HTTPException: api.http_error, Exception: api.unexpected_error},
    )


class Api:
    """The endpoints of one Bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/", self.root),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/overlays", self.overlays),
            Route("/overlays/{name}", self.overlay),
            Route("/invoke/{name}", self.invoke, methods=["POST"]),
            Route("/invoke/{name}/{capability}", self.invoke, methods=["POST"]),
            Route("/provenance", self.provenance),
            Route("/provenance/{seq}", self.record),
            Route("/stress", self.stress),
        ]

    async def root(self, request: Request) -> Response:
        paths = [route.path for route in request.app.routes if isinstance(route, Route)]
        return JsonResponse({"service": "aal-core", "version": resources.version(), "status": "ok", "paths": paths})

    async def health(self, _: Request) -> Response:
        """The process answers; `/ready` says whether it can work."""
        return JsonResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        reason = await self._bus.not_ready()
        if reason is None:
            return JsonResponse({"ready": True})
        return JsonResponse({"ready": False, "reason": reason}, status_code=503)

    async def overlays(self, _: Request) -> Response:
        await self._bus.start()
        return JsonResponse({"overlays": [entry.summary() for entry in self._bus.registry.entries()]})

    async def overlay(self, request: Request) -> Response:
        await self._bus.start()
        return JsonResponse(self._bus.registry.entry(request.path_params["name"]).detail())

    async def invoke(self, request: Request) -> Response:
        """One call. The capability may stand in the path, behind a dot in the name, or in the body."""
        await self._bus.start()
        name, capability = request.path_params["name"], request.path_params.get("capability")
        try:
            body = await self._body(request)
            read = envelopes.read_invocation
            if len(body) > LARGE_BYTES:
                call = await asyncio.to_thread(read, body, name, capability)
            else:
                call = read(body, name, capability)
        except RequestError as error:
            return _respond(await self._bus.refuse(error, name, capability))
        except ClientDisconnect:  # in the middle of its request, so no call was made
            return Response(status_code=_CLIENT_GONE)
        answer = await _unless_disconnected(request, self._bus.invoke(call))
        return Response(status_code=_CLIENT_GONE) if answer is None else _respond(answer)

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

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than it may be long. Raises `RequestError` for its type or its size."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json" and not media_type.endswith("+json"):
            raise RequestError("ERR_CONTENT_TYPE", f"content type {media_type or 'none'!r}, allowed: application/json")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise RequestError("ERR_CONTENT_TYPE", f"content encoding {show(encoding)}, allowed: identity")
        limit = self._bus.settings.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(declared, limit)
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(f"more than {limit}", limit)
            chunks.append(chunk)
        return b"".join(chunks)


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


async def _unless_disconnected(request: Request, call: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The answer, or None once the client has gone; then the call was cancelled and has left its line."""
    watch = _ClientWatch(request)
    try:
        return await call
    except asyncio.CancelledError:
        if watch.has_fired and watch.caller.uncancel() == 0:
            return None
        raise
    finally:
        watch.end()


def _is_number(text: str) -> bool:
    """Whether `int` reads it, and quickly."""
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MOST


class _ClientWatch:
    """Cancels the current task once its client has gone. Begins after `WATCH_AFTER_S`: most calls are over by then."""

    def __init__(self, request: Request) -> None:
        caller = asyncio.current_task()
        if caller is None:
            raise RuntimeError("a request is handled in a task")
        self.caller: asyncio.Task[Any] = caller
        self.has_fired = False
        self._request = request
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def end(self) -> None:
        self._timer.cancel()
        if self._task:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.has_fired = True
        self.caller.cancel()


def _respond(answer: Answer) -> Response:
    headers = {"X-Request-Id": answer.body["request_id"]}
    if answer.retry_after_s is not None:
        headers["Retry-After"] = str(answer.retry_after_s)
    return JsonResponse(answer.json(), status_code=answer.http_status, headers=headers)


def _error_response(error: BusError) -> Response:
    return JsonResponse(error.body(), status_code=error.entry.http_status)


def _too_large(found: str, limit: int) -> RequestError:
    return RequestError("ERR_TOO_LARGE", f"the body has {found} bytes, allowed: {limit}")
