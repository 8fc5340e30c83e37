"""What is answered: JSON, and every error in the one form that `ContextError.body` has."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.responses import Response

from aos_context.artifacts import to_json
from aos_context.errors import BrokenError, ContextError, MethodError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

_log = logging.getLogger(__name__)


def json_response(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(document), status, headers, media_type="application/json")


def as_context_error(error: Exception) -> ContextError:
    """Of an `OSError`: a disk that is full, say."""
    _log.error("a file could not be read or written", exc_info=error)
    return BrokenError(f"a file could not be read or written: {error}")


async def refuse(_: Request, error: Exception) -> Response:
    """The handler of `ContextError`, and of `OSError`."""
    refused = error if isinstance(error, ContextError) else as_context_error(error)
    return json_response(refused.body(), refused.status)


async def no_such_address(request: Request, _: Exception) -> Response:
    """The handler of status 404."""
    path = request.url.path
    return await refuse(request, NotFoundError(f"there is nothing at {path}", hint="GET /health has the paths."))


async def wrong_method(request: Request, error: Exception) -> Response:
    """The handler of status 405."""
    allowed = (getattr(error, "headers", None) or {}).get("Allow", "")
    refused = MethodError(f"{request.url.path} does not take {request.method}", hint=f"It takes {allowed}.")
    return json_response(refused.body(), refused.status, {"Allow": allowed})


async def went_away(_: Request, __: Exception) -> Response:
    """The handler of a client that closes before it has sent all: nobody reads the answer."""
    return Response(status_code=400)


async def failed(_: Request, error: Exception) -> Response:
    """The handler of what should not have happened; the log has the traceback."""
    error = ContextError(f"the service failed where it should not: {type(error).__name__}", hint="Its log says more.")
    return json_response(error.body(), error.status)
