"""`POST /runs/resume/upload`: a zipped resume pack is the body, and a run goes on from it as `load` has it.

The body goes to a file that nobody else opens, in the folder of runs: there is room for a run, `load` takes packs from
there only, and what a kill leaves is swept. What `load` takes beside the path stands in the query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from starlette.concurrency import run_in_threadpool

from aos_context.errors import MediaTypeError, SchemaError, TooLargeError
from aos_context.operations import perform
from aos_context.scratch import scratch

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from aos_context.api.service import Service

ZIP = "application/zip"
READ_ON_BYTES = 256 << 20
"""Of a body that is too large so much more is read and dropped: a client that is still sending when the connection
closes might never see the answer."""


class Upload:
    """The handler, for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def handle(self, request: Request) -> Response:
        """Raises `MediaTypeError`, `TooLargeError`, and what `load` does."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != ZIP:
            found = request.headers.get("content-type")
            raise MediaTypeError(f"the Content-Type is {found!r}", hint=f"Send the pack with Content-Type: {ZIP}.")
        query = dict(request.query_params)
        if "pack_path" in query:
            raise SchemaError("upload request", [{"path": "$.pack_path", "message": "the pack is the body"}])
        settings = self._service.settings
        with scratch(settings.root) as folder:
            path = folder / "pack.zip"
            with path.open("wb") as file:
                await _receive(request, file, settings.config.pack_max_bytes)
            payload = {**query, "pack_path": str(path)}
            return await self._service.respond(lambda runs: perform(runs, "load", payload))


async def _receive(request: Request, file: BinaryIO, limit_bytes: int) -> None:
    """The body is in the file once this returns. Raises `TooLargeError`; `OSError`."""
    declared = request.headers.get("content-length", "")
    size = 0
    too_large = declared.isdecimal() and int(declared[:20]) > limit_bytes
    if not (too_large and "expect" in request.headers):  # else the client waits for leave to send
        async for piece in request.stream():
            size += len(piece)
            too_large = too_large or size > limit_bytes
            if size > limit_bytes + READ_ON_BYTES:
                break
            if not too_large:
                await run_in_threadpool(file.write, piece)
    if too_large:
        raise TooLargeError(f"the pack has more than {limit_bytes} bytes", limit_bytes=limit_bytes)
    await run_in_threadpool(file.flush)
