"""`POST /aal/{capability}`: the bus's envelope goes in, its protocol's reply comes out.

The bus has checked payload and phase before; both are checked here again, since a service that runs alone has this
address, too. What went wrong is HTTP 200 with `ok` false: the service did its job, and the bus counts nothing against
its health. Phase SEAL opens the gate of memory only for a service that the bus has started; that only the bus calls it
then is for `guard` to see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aos_context import contract
from aos_context.api.answers import as_context_error, json_response
from aos_context.api.bodies import read_object
from aos_context.errors import ContextError, RequestError
from aos_context.operations import Caller, perform

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from aos_context.api.service import Service
    from aos_context.artifacts import Document

LONGEST_ID = 128


class BusRoute:
    """The handler, for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def handle(self, request: Request) -> Response:
        settings, name = self._service.settings, request.path_params["capability"]
        try:
            envelope = await read_object(request, settings.config.body_max_bytes)
            wanted = contract.capability(name)
            phase, payload = _member(envelope, "phase", str), _member(envelope, "payload", dict)
            if envelope.get("capability", name) != name:
                raise RequestError(f"the envelope is for another capability, and its address is {name}'s")
            wanted.check_phase(phase)
            caller = Caller(_request_id(envelope), settings.on_bus and phase == "SEAL", _max_tokens(envelope))
            return await self._service.respond(
                lambda runs: {"ok": True, "result": perform(runs, name, payload, caller)}
            )
        except OSError as error:
            return json_response(_failure(as_context_error(error)))
        except ContextError as error:
            return json_response(_failure(error))


def _failure(error: ContextError) -> Document:
    said = {"ok": False, "error": str(error), "code": error.code, "retryable": error.retryable}
    return said | {"result": {"hint": error.hint, "status": error.status, **error.members}}


def _request_id(envelope: Document) -> str:
    request_id: str = _member(envelope, "request_id", str)
    if not 0 < len(request_id) <= LONGEST_ID:
        raise RequestError(f"the envelope's request_id has {len(request_id)} characters; allowed: 1 to {LONGEST_ID}")
    return request_id


def _max_tokens(envelope: Document) -> int | None:
    """What the bus allows a context while memory is short."""
    given = envelope.get("memory")
    most = given.get("max_context_tokens") if isinstance(given, dict) else None
    return most if isinstance(most, int) and most > 0 else None


def _member(envelope: Document, name: str, kind: type) -> Any:  # of that kind
    value = envelope.get(name)
    if not isinstance(value, kind):
        raise RequestError(f"the envelope's {name} is missing or not of the type that schemas/overlay_request has")
    return value
