"""The addresses for people and programs. Each takes what its capability in the manifest takes.

A payload is the body, or the query of a GET, with the run from the address.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from aos_context import contract
from aos_context.api.answers import json_response
from aos_context.api.bodies import read_object
from aos_context.api.bus_route import BusRoute
from aos_context.api.guard import is_of_bus
from aos_context.api.queries import LARGEST, LINES, LISTED, MOST, NOTHING, RUNS, read_query
from aos_context.api.upload import Upload
from aos_context.errors import NotFoundError, SchemaError
from aos_context.memory_gate import CONTENT_SHOWN
from aos_context.operations import perform
from aos_context.runs import require_run_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from aos_context.api.service import Service
    from aos_context.artifacts import Document
    from aos_context.memory_store import Waiting

CAPABILITIES = (
    ("POST", "/runs/boot", "boot"),
    ("POST", "/runs/resume/load", "load"),
    ("GET", "/runs/{run_id}/ws", "ws"),
    ("POST", "/runs/{run_id}/step/update", "update"),
    ("POST", "/runs/{run_id}/milestone", "milestone"),
    ("POST", "/runs/{run_id}/memory/propose", "propose"),
    ("POST", "/runs/{run_id}/memory/commit", "commit"),
    ("GET", "/runs/{run_id}/memory/search", "search"),
    ("GET", "/runs/{run_id}/brief", "brief"),
    ("POST", "/runs/{run_id}/resume/snapshot", "snapshot"),
)
PAGE = "/static/index.html"


class Routes:
    """The handlers, for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Route]:
        """In the order in which they are looked at."""
        return [
            Route("/", self._page, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/runs", self._list, methods=["GET"]),
            *(Route(path, self._handler(name), methods=[method]) for method, path, name in CAPABILITIES),
            Route("/runs/resume/upload", Upload(self._service).handle, methods=["POST"]),
            Route("/runs/{run_id}/memory/waiting", self._waiting, methods=["GET"]),
            Route("/runs/{run_id}/ledger", self._ledger, methods=["GET"]),
            Route("/runs/{run_id}/episodes", self._episodes, methods=["GET"]),
            Route("/runs/{run_id}/episodes/{number}", self._episode, methods=["GET"]),
            Route("/runs/{run_id}/resume/{name}", self._pack, methods=["GET"]),
            Route("/aal/{capability}", BusRoute(self._service).handle, methods=["POST"]),
        ]

    def _handler(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            schema = contract.capability(name).input_schema
            where = _where(request)
            if request.method == "POST":
                payload = await read_object(request, self._service.settings.config.body_max_bytes)
            else:
                payload = read_query(request.query_params, schema)
            if "run_id" in where and "run_id" in payload:
                fault = {"path": "$.run_id", "message": "the run stands in the address"}
                raise SchemaError(f"{name} request", [fault])
            payload |= where
            if name == "brief" and "text/markdown" in request.headers.get("accept", ""):
                found = await self._service.ask(lambda runs: perform(runs, name, payload))
                return PlainTextResponse(found["brief"], media_type="text/markdown")
            return await self._service.respond(lambda runs: perform(runs, name, payload))

        return handle

    async def _page(self, _: Request) -> Response:
        return RedirectResponse(PAGE)

    async def _health(self, request: Request) -> Response:
        NOTHING.read(request.query_params)
        settings = self._service.settings
        said = {
            "ok": True,
            "service": "aos_context",
            "version": contract.version(),
            "testing": settings.testing,
            "paths": sorted(route.path for route in self.all() if not settings.on_bus or is_of_bus(route.path)),
        }
        return json_response(said)

    async def _list(self, request: Request) -> Response:
        asked: Document = {"limit": LISTED} | RUNS.read(request.query_params)
        return await self._service.respond(lambda runs: runs.page(**asked)._asdict())

    async def _ledger(self, request: Request) -> Response:
        run_id = _where(request)["run_id"]
        asked: Document = {"limit": LISTED} | LINES.read(request.query_params)
        return await self._service.respond(lambda runs: {"run_id": run_id, "events": runs.open(run_id).events(**asked)})

    async def _waiting(self, request: Request) -> Response:
        run_id = _where(request)["run_id"]
        asked: Document = {"limit": LISTED} | MOST.read(request.query_params)
        return await self._service.respond(
            lambda runs: {"run_id": run_id, "batches": [_shown(one) for one in runs.open(run_id).waiting(**asked)]}
        )

    async def _episodes(self, request: Request) -> Response:
        run_id = _where(request)["run_id"]
        asked: Document = {"limit": LISTED} | LINES.read(request.query_params)
        kept = ("episode_id", "number", "reason", "next_entry_point", "created_at", "summary")
        return await self._service.respond(
            lambda runs: {
                "run_id": run_id,
                "episodes": [{name: one[name] for name in kept} for one in runs.open(run_id).episodes(**asked)],
            }
        )

    async def _episode(self, request: Request) -> Response:
        run_id, number = _where(request)["run_id"], request.path_params["number"]
        NOTHING.read(request.query_params)
        if not (number.isascii() and number.isdecimal() and len(number) < len(str(LARGEST))):
            raise NotFoundError(f"run {run_id} has no episode {number!r}")
        return await self._service.respond(lambda runs: runs.open(run_id).episode(int(number)))

    async def _pack(self, request: Request) -> Response:
        run_id, name = _where(request)["run_id"], request.path_params["name"]
        NOTHING.read(request.query_params)
        path = await self._service.ask(lambda runs: runs.open(run_id).pack(name))
        return FileResponse(path, media_type="application/zip", filename=name)


def _shown(batch: Waiting) -> Document:
    """What it would change, in short."""
    first = batch.first
    if first is not None:
        first = {name: first.get(name) for name in ("op", "target_id", "content", "writer")}
        first["content"] = first["content"] and first["content"][:CONTENT_SHOWN]
    return {**dataclasses.asdict(batch), "first": first}


def _where(request: Request) -> Document:
    """What the address says. Raises `NotFoundError` for what is no id of a run, before all else is looked at."""
    if "run_id" in request.path_params:
        require_run_id(request.path_params["run_id"])
    return request.path_params
