"""The HTTP side: `create_app(settings)`, the routes, and the one error handler. Everything else is the Bus.

Reading order: `Api.routes` is the table of contents. Every request passes the guard before anything else, in
`_Application`. The Bus starts at lifespan, or at the first request where the server has none.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route

from bus import envelopes, events, guard, openapi, replay, resources
from bus import settings as bus_settings
from bus.app_ledger import LedgerApi
from bus.dispatch import Bus
from bus.errors import BusError, CallerError, NotFoundError, RequestError
from bus.guard import Guard
from bus.model import new_request_id
from bus.plugins import cases_of, scratch_of
from bus.schemas import show
from bus.web import JsonResponse, Query
from runners.base import LARGE_BYTES, JsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from starlette.routing import BaseRoute
    from starlette.types import Receive, Scope, Send

    from bus.callers import Caller
    from bus.course import Answer
    from bus.overlay_entry import Entry
    from bus.settings import Settings

log = logging.getLogger(__name__)

Result = TypeVar("Result")

WATCH_AFTER_S = 0.02
"""How long a call runs at least before the bus listens for its client's leaving, in seconds; at most twice as long."""

REFUSED_S = 0.05
"""How long who is not let in waits for that answer, in seconds."""

_PARTS = ("name", "capability")
_FIELDS = "aal.fields"
"""Where a scope has its headers as a mapping, once the guard has seen them."""

_CLIENT_GONE = 499
"""The status of an answer that nobody will read; nginx's number for it."""

_UNAUTHORIZED = 401
_CHALLENGE = (b"www-authenticate", b"Bearer")
_POLICY_VIOLATION = 1008
"""Why a web socket is closed (RFC 6455 section 7.4.1)."""

_PATH_SHOWN = 200


def create_app(settings: Settings | None = None, bus: Bus | None = None) -> Starlette:
    """The ASGI application of one Bus, made from `settings` (default: those of the current folder) or given."""
    bus = bus or Bus(settings or bus_settings.load())
    door = Guard(bus.settings, bus.callers, bus.refused_before_auth)
    api = Api(bus, door)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with bus:
            yield

    return _Application(
        api,
        door,
        routes=[*api.routes(), *bus.plugins.routes(bus)],
        lifespan=lifespan,
        exception_handlers={BusError: api.bus_error, HTTPException: api.http_error, Exception: api.unexpected_error},
    )


class _Application(Starlette):
    """Starlette behind the guard. Calls go from there to their endpoint, past middleware and routes.

    These take a tenth of the time of a call, and do nothing for it.
    """

    def __init__(self, api: Api, door: Guard, **options: Any) -> None:  # noqa: ANN401  # Starlette's own
        super().__init__(**options)
        self._api = api
        self._guard = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        fields = scope[_FIELDS] = dict(scope["headers"])
        try:
            place = self._guard.place(scope, fields)
            if place.origin is not None:
                send = guard.adding(send, place.headers)
            called = _called(scope)
            if called is None:
                await self._other(place, scope, receive, send)
                return
            scope["user"] = self._guard.identify(scope, fields)
            scope["path_params"] = called
            await self._api.invoke(scope, receive, send)
        except BusError as refusal:
            await _refuse(refusal, scope, receive, send)
        except Exception as error:  # noqa: BLE001  # the outer edge, as Starlette's
            response = await self._api.unexpected_error(Request(scope), error)
            await response(scope, receive, send)

    async def _other(self, place: guard.Place, scope: Scope, receive: Receive, send: Send) -> None:
        """Anything but a call. Raises `BusError` for a caller who may not ask it."""
        fields = scope[_FIELDS]
        send = guard.adding(send, [(b"x-request-id", _request_id(fields))])
        if place.allows_preflight(scope, fields):
            await Response(status_code=204)(scope, receive, guard.adding(send, guard.PREFLIGHT_HEADERS))
            return
        try:
            self._admit(scope, fields)
        except BusError as refusal:
            await _refuse(refusal, scope, receive, send)
            return
        await super().__call__(scope, receive, send)

    def _admit(self, scope: Scope, fields: guard.Fields) -> None:
        """Raises `BusError`."""
        if guard.needs_nobody(scope):
            return
        caller = scope["user"] = self._guard.identify(scope, fields)
        self._guard.allow(caller, guard.right_for(scope))
        if scope["type"] == "http" and scope["method"] not in guard.BODILESS and self._has_route(scope):
            guard.require_json(fields)

    def _has_route(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self.routes)


def _called(scope: Scope) -> dict[str, str] | None:
    """The overlay and the capability in the path of a call; None for anything else."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    path: str = scope["path"]
    empty, invoke, *parts = path.removeprefix(scope.get("root_path", "")).split("/")
    if empty or invoke != "invoke" or len(parts) > len(_PARTS) or not all(parts):
        return None
    return dict(zip(_PARTS, parts, strict=False)) or None


def _request_id(fields: guard.Fields) -> bytes:
    """What the answer names its request by: the client's own word for it, else one of ours."""
    return guard.own_request_id(fields) or new_request_id().encode()


class Api:
    """The endpoints of one Bus."""

    def __init__(self, bus: Bus, door: Guard) -> None:
        self._bus = bus
        self._guard = door
        self._clients = _Clients()
        self.ledger = LedgerApi(bus)
        self.invoke = _Invoke(bus, door, self._clients)

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
            Route("/overlays/{name}/purge", self.purge, methods=["POST"]),
            *self.ledger.routes(),
            Route("/provenance/{seq}/replay", self.replay, methods=["POST"]),
            Route("/stress", self.stress),
            Route("/events", self.events),
            Route("/openapi.json", self.openapi),
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

    async def overlays(self, request: Request) -> Response:
        await self._bus.start()
        entries = self._entries_of(request.user)
        return JsonResponse({"overlays": [entry.summary() | self._now(entry) for entry in entries]})

    async def overlay(self, request: Request) -> Response:
        await self._bus.start()
        entry = self._bus.registry.entry(self._own_name(request))
        scratch = {} if entry.manifest is None else scratch_of(entry.manifest, self._bus.confinement.tiers)
        return JsonResponse(entry.detail(self._measured(entry)) | {"scratch": scratch} | self._now(entry))

    async def purge(self, request: Request) -> Response:
        """Tell an overlay's workers and service to let go of their caches: whom that reached, by runner."""
        await self._bus.start()
        name = self._own_name(request)
        return JsonResponse({"name": name, "told": self._bus.purge(name)})

    def _own_name(self, request: Request) -> str:
        """The overlay that is asked for. Raises `NotFoundError` for one that is not among those of the token."""
        caller: Caller = request.user
        name: str = request.path_params["name"]
        if not caller.has_overlay(name):
            among = ", ".join(caller.overlays)
            raise NotFoundError("ERR_UNKNOWN_OVERLAY", f"no overlay {show(name)} among those of the token: {among}")
        return name

    def _entries_of(self, caller: Caller) -> list[Entry]:
        """What there is of the overlays that the caller may call."""
        return [entry for entry in self._bus.registry.entries() if caller.has_overlay(entry.name)]

    def _now(self, entry: Entry) -> dict[str, Any]:
        """What no file says of an overlay.

        That is what of its rights this kernel cannot hold, what of it runs, and what it declares of memory that is far
        from what it needs.
        """
        confinement = self._bus.confinement
        missing = [] if entry.manifest is None else confinement.gaps(cases_of(entry.manifest))
        return {
            "sandbox": {"mode": confinement.mode, "missing": missing},
            "running": self._running(entry),
            "findings": [] if entry.manifest is None else self._bus.needs.findings(entry.manifest),
        }

    def _measured(self, entry: Entry) -> dict[str, dict[str, Any]]:
        if entry.manifest is None:
            return {}
        reserves = self._bus.settings.admission == "memory"
        return self._bus.needs.told(entry.manifest, reserves=reserves, room_mb=self._bus.scheduler.room_mb)

    def _running(self, entry: Entry) -> dict[str, Any]:
        """What the runners keep for an overlay from call to call: helpers, workers, service, circuit breaker.

        Without secrets: the last words of a process, or of a service, may have one.
        """
        runners = self._bus.runners.values()
        kept = {name: state for runner in runners for name, state in runner.state(entry.name).items()}
        told: dict[str, Any] = self._bus.secrets.redactor.json(kept)
        return told

    async def replay(self, request: Request) -> Response:
        """Run a line again, as a call of the caller's: the body is {} or {"live": true}. A phase refused has its line.

        The answer is 200 whatever the verdict.
        """
        await self._bus.start()
        caller: Caller = request.user
        try:
            live = _read_live(await _read_body(request.scope[_FIELDS], request.receive, self._bus.settings))
            recorded = await self.ledger.record_of(request)
            again = replay.run_again(self._bus, recorded, live=live, caller=caller)
            done = await self._clients.unless_gone(request.receive, again)
        except CallerError as refusal:
            await self._bus.refuse(refusal, recorded["overlay"], recorded["capability"], caller.name)
            raise
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        return JsonResponse(done.body())

    async def stress(self, _: Request) -> Response:
        await self._bus.start()
        return JsonResponse(self._bus.stress_report() | {"history": self._bus.stress.history()})

    async def events(self, request: Request) -> Response:
        """What happens, as it does: `?types=` names the types of events, separated by commas; all by default."""
        query = Query(request.query_params)
        types = query.members("types", events.TYPES)
        query.refuse_unknown()
        await self._bus.start()
        return events.EventStream(self._bus.events, types, partial(self._may_go_on, request.scope))

    def _may_go_on(self, scope: Scope) -> bool:
        """Whether who was let in for a long answer still would be: its token may be revoked, or expire, meanwhile."""
        try:
            caller = self._guard.identify(scope, scope[_FIELDS])
            if right := guard.right_for(scope):
                caller.require(right)
        except BusError:
            return False
        return True

    async def openapi(self, request: Request) -> Response:
        """What can be asked and what is answered, for programs; with a path for each capability of the caller's."""
        await self._bus.start()
        routes = [route for route in request.app.routes if isinstance(route, Route)]
        caller: Caller = request.user
        manifests = [entry.manifest for entry in self._entries_of(caller) if entry.enabled and entry.manifest]
        return JsonResponse(openapi.document(routes, manifests, needs_token=caller.name is not None))

    async def bus_error(self, _: Request, error: Exception) -> Response:
        if not isinstance(error, BusError):
            raise error
        return _error_response(error)

    async def http_error(self, request: Request, error: Exception) -> Response:
        """What the router itself refuses: unknown paths and methods."""
        if not isinstance(error, HTTPException):
            raise error
        code = "ERR_METHOD" if error.status_code == 405 else "ERR_NOT_FOUND"  # noqa: PLR2004
        response = _error_response(NotFoundError(code, _asked(request)))
        response.headers.update(error.headers or {})
        return response

    async def unexpected_error(self, request: Request, error: Exception) -> Response:
        """The outer edge: the caller learns a code and the number under which the log has the traceback."""
        number = new_request_id()
        log.error("%s failed, request %s", _asked(request), number, exc_info=error)
        response = _error_response(BusError("ERR_INTERNAL", f"{_asked(request)}, request {number}"))
        response.headers["x-request-id"] = number
        return response


class _Invoke:
    """One call. The capability may stand in the path, behind a dot in the name, or in the body.

    A bare ASGI application: the request and response objects of a function's route cost as much as all checks together.
    """

    def __init__(self, bus: Bus, door: Guard, clients: _Clients) -> None:
        self._bus = bus
        self._guard = door
        self._clients = clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._bus.start()
        name, capability = scope["path_params"]["name"], scope["path_params"].get("capability")
        fields = scope[_FIELDS]
        try:
            answer = await self._answer(name, capability, scope["user"], fields, receive)
        except ClientDisconnect:
            await Response(status_code=_CLIENT_GONE)(scope, receive, send)
        else:
            await _send(answer, guard.own_request_id(fields), send)

    async def _answer(
        self, name: str, capability: str | None, caller: Caller, fields: guard.Fields, receive: Receive
    ) -> Answer:
        """Raises `ClientDisconnect` once nobody waits for an answer, `CallerError` for what is only counted."""
        try:
            self._guard.allow(caller, "invoke")  # before the body, which then need not be read
            body = await _read_body(fields, receive, self._bus.settings)
            read = envelopes.read_invocation
            if len(body) > LARGE_BYTES:
                call = await asyncio.to_thread(read, body, name, capability, caller=caller.name)
            else:
                call = read(body, name, capability, caller=caller.name)
        except (RequestError, CallerError) as error:
            if self._guard.is_only_counted(error, caller):
                raise
            return await self._bus.refuse(error, name, capability, caller.name)
        return await self._clients.unless_gone(receive, self._bus.invoke(call, caller))


async def _read_body(fields: guard.Fields, receive: Receive, settings: Settings) -> bytes:
    """The body, read no further than it may be long. Raises `RequestError` for its type or its size."""
    limit = settings.max_body_bytes
    guard.require_json(fields)
    declared = fields.get(b"content-length", b"").decode("latin-1")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(declared, limit)
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


def _read_live(body: bytes) -> bool:
    """Whether the body of a replay says `live`; no body is the same as {}. Raises `RequestError`."""
    try:
        wish = parse_json(body) if body else {}
    except JsonError as error:
        raise RequestError("ERR_BAD_JSON", str(error)) from None
    if not isinstance(wish, dict) or wish.keys() - {"live"} or not isinstance(wish.get("live", False), bool):
        hint = 'Send {}, or {"live": true} where running the line again may change something.'
        raise RequestError("ERR_BAD_REQUEST", f"the body is {show(wish)}, allowed: live, true or false", hint=hint)
    return bool(wish.get("live"))


class _Clients:
    """Cancels calls whose clients have gone. It listens for that once a call has run for `WATCH_AFTER_S`.

    Most calls are over by then. So one timer serves all: when it ends it begins to listen for those that were there
    when it was set.
    """

    def __init__(self) -> None:
        self._new: set[_Client] = set()
        self._waiting: set[_Client] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The one with the timer, where that is set."""

    async def unless_gone(self, receive: Receive, call: Coroutine[Any, Any, Result]) -> Result:
        """Raises `ClientDisconnect` once the client has gone; then the call was cancelled and has left its line."""
        client = _Client(receive)
        self._new.add(client)
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._set_timer(loop)
        try:
            return await call
        except asyncio.CancelledError:
            if client.has_gone and client.caller.uncancel() == 0:
                raise ClientDisconnect from None
            raise
        finally:
            self._new.discard(client)
            self._waiting.discard(client)
            client.end()

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiting, self._new = self._new, set()
        self._loop = loop
        loop.call_later(WATCH_AFTER_S, self._listen, loop)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = None
        for client in self._waiting:
            client.begin()
        self._waiting = set()
        if self._new:
            self._set_timer(loop)


class _Client:
    """Who waits for a call, which is the current task."""

    __slots__ = ("_receive", "_watch", "caller", "has_gone")

    def __init__(self, receive: Receive) -> None:
        caller = asyncio.current_task()
        if caller is None:
            raise RuntimeError("a request is handled in a task")
        self.caller: asyncio.Task[Any] = caller
        self.has_gone = False
        self._receive = receive
        self._watch: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._watch = asyncio.ensure_future(self._cancel_when_gone())

    def end(self) -> None:
        if self._watch:
            self._watch.cancel()

    async def _cancel_when_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_gone = True
        self.caller.cancel()


async def _send(answer: Answer, request_id: bytes | None, send: Send) -> None:
    """`request_id` is the client's own; the body always has ours."""
    body = answer.json
    headers = [
        (b"content-length", b"%d" % len(body)),
        (b"content-type", b"application/json"),
        (b"x-request-id", request_id or answer.body["request_id"].encode()),
    ]
    if answer.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % answer.retry_after_s))
    if answer.http_status == _UNAUTHORIZED:
        headers.append(_CHALLENGE)
    await send({"type": "http.response.start", "status": answer.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse(refusal: BusError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what is not let in, after a moment: such requests cost less than calls, and many would take their turns.

    Of a web socket nothing was accepted yet, so it is closed.
    """
    await asyncio.sleep(REFUSED_S)
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        return
    response = _error_response(refusal)
    await response(scope, receive, guard.adding(send, [(b"x-request-id", _request_id(scope[_FIELDS]))]))


def _error_response(error: BusError) -> Response:
    response = JsonResponse(error.body(), status_code=error.entry.http_status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(error.retry_after_s)
    if error.entry.http_status == _UNAUTHORIZED:
        response.raw_headers.append(_CHALLENGE)
    return response


def _asked(request: Request) -> str:
    """Method and path for people, and for a log whose lines nobody else may write."""
    return f"{request.method} {quote(request.scope['path'])[:_PATH_SHOWN]}"


def _too_large(found: str, limit: int) -> RequestError:
    return RequestError("ERR_TOO_LARGE", f"the body has {found} bytes, allowed: {limit}")
