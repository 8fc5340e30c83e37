"""The ledger over HTTP: its lines, and what an auditor holds them against."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from starlette.routing import Route

from bus import provenance
from bus.callers import EVERY_OVERLAY
from bus.errors import NotFoundError
from bus.model import Phase
from bus.proofs import Prover
from bus.schemas import show
from bus.web import JsonResponse, Query, is_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from bus.callers import Caller
    from bus.dispatch import Bus
    from bus.model import Record

_LIMIT_DEFAULT, _LIMIT_MOST = 100, 10_000
_MOST_LINES = 2**53
_MOST_BYTES = 1 << 28
"""How much of the ledger's end one request reads at most of what no index holds, yet or at all."""

T = TypeVar("T")


class LedgerApi:
    """The endpoints of one Bus's ledger that read it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def routes(self) -> list[Route]:
        return [
            Route("/provenance", self.provenance),
            Route("/provenance/checkpoint", self.checkpoint),
            Route("/provenance/consistency", self.consistency),
            Route("/provenance/{seq}", self.record),
            Route("/provenance/{seq}/proof", self.proof),
        ]

    async def provenance(self, request: Request) -> Response:
        """The last records, oldest first: `?limit=&overlay=&phase=&ok=&code=&caller=&since=&until=` (times in ms).

        Those of the caller's overlays and of none. What the index does not hold is read back to 256 MiB.
        """
        query = Query(request.query_params)
        limit = query.integer("limit", _LIMIT_DEFAULT, 1, _LIMIT_MOST)
        wanted = {
            "overlay": query.text("overlay"),
            "phase": query.one_of("phase", tuple(Phase)),
            "ok": query.boolean("ok"),
            "code": query.text("code"),
            "caller": query.text("caller"),
            "since_ms": query.integer("since", None, 0, 2**53),
            "until_ms": query.integer("until", None, 0, 2**53),
        }
        query.refuse_unknown()
        overlays = request.user.overlays
        wanted |= {"among": None if overlays == EVERY_OVERLAY else overlays, "most_bytes": _MOST_BYTES}
        events = await asyncio.to_thread(provenance.tail, self._bus.settings.ledger, limit, **wanted)
        return JsonResponse({"events": events, "count": len(events)})

    async def record(self, request: Request) -> Response:
        return JsonResponse(await self.record_of(request))

    async def record_of(self, request: Request) -> Record:
        """The line that is asked for. Raises `NotFoundError` where there is none that the caller may see."""
        seq = request.path_params["seq"]
        if not is_number(seq):
            raise NotFoundError("ERR_NOT_FOUND", f"the ledger has no line {show(seq)}")
        record = await asyncio.to_thread(provenance.read_line, self._bus.settings.ledger, int(seq))
        if not _is_shown(request.user, record):
            raise NotFoundError("ERR_NOT_FOUND", f"line {seq} of the ledger is of no overlay of the token")
        return record

    async def proof(self, request: Request) -> Response:
        """That a line is in the ledger's Merkle tree: `?size=` of its first lines, by default of all."""
        query = Query(request.query_params)
        size = query.integer("size", None, 1, _MOST_LINES)
        query.refuse_unknown()
        record = await self.record_of(request)
        proof = await asyncio.to_thread(self._proved, lambda prover: prover.inclusion(record["seq"], size))
        return JsonResponse(proof.body())

    async def consistency(self, request: Request) -> Response:
        """That the tree of `?old=` lines grew into that of `?new=`, by default into that of all."""
        query = Query(request.query_params)
        old, new = query.integer("old", 0, 0, _MOST_LINES), query.integer("new", None, 1, _MOST_LINES)
        query.refuse_unknown()
        proof = await asyncio.to_thread(self._proved, lambda prover: prover.consistency(old, new))
        return JsonResponse(proof.body())

    async def checkpoint(self, request: Request) -> Response:
        """How many lines there are now, and the root of their tree; with a key signed."""
        Query(request.query_params).refuse_unknown()
        now = await asyncio.to_thread(self._proved, lambda prover: prover.checkpoint())
        return JsonResponse(now.body())

    def _proved(self, ask: Callable[[Prover], T]) -> T:
        """What a prover says of the ledger as it is now. In a thread; raises as `Prover` and `ask`."""
        ledger, notary = self._bus.settings.ledger, self._bus.notary
        with Prover(ledger, notary, most_lines=provenance.CAUGHT_UP_LINES) as prover:
            return ask(prover)


def _is_shown(caller: Caller, record: Record) -> bool:
    """Whether a line of the ledger is of an overlay that the caller may call, or of none."""
    return record.get("overlay") is None or caller.has_overlay(record["overlay"])
