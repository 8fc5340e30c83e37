"""Purges of services: a POST that tells one to let go of what it keeps in memory and can have again.

Nobody waits for it, and its failure is nobody's error: a service that does not listen keeps what it has. A service has
one such request at a time, so that one which is slow to answer does not find a queue of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runners.base import PURGE
from runners.http_client import DeadlineError, ExchangeError, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from runners.base import HttpTarget
    from runners.http_client import HttpClient

log = logging.getLogger(__name__)

ANSWER_S = 10.0
"""Seconds that a service may take to answer."""

ANSWER_BYTES = 64 * 1024
"""How long its answer may be, of which the status alone counts."""


@dataclass(slots=True)
class _Told:
    """What one overlay's service was told. `last_purge_ms`: since the epoch, when one was last answered with 2xx."""

    target: HttpTarget
    asked: int = 0
    purges: int = 0
    failures: int = 0
    last_purge_ms: int | None = None
    last_error: str | None = None
    task: asyncio.Task[None] | None = None


class Purges:
    """Of one runner. `client` gives what sends; it may raise `ExchangeError`."""

    def __init__(self, client: Callable[[], HttpClient]) -> None:
        self._client = client
        self._told: dict[str, _Told] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, overlay: str, target: HttpTarget) -> None:
        """The overlay has another edition, whose calls go to `target`: what is known of the one before is dropped."""
        self.forget(overlay)
        if target.purge_url is not None:
            self._told[overlay] = _Told(target)

    def targets(self, overlays: Collection[str] | None) -> Iterator[tuple[str, HttpTarget]]:
        """Those of these overlays, or of all, whose services take a purge."""
        for overlay, told in self._told.items():
            if overlays is None or overlay in overlays:
                yield overlay, told.target

    def tell(self, overlay: str, url: str, token: str | None) -> None:
        """Send it, unless the last one is still unanswered. `token`: of a service that the bus has started."""
        told = self._told[overlay]
        if told.task is not None:
            return
        told.asked += 1
        request = Request("POST", url, {}, f"purge-{told.asked}", PURGE, token)
        task = told.task = asyncio.get_running_loop().create_task(self._send(overlay, told, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def state(self, overlay: str) -> dict[str, Any]:
        """`{}`, or `{"purge": {"purges", "failures", "last_purge_ms", "last_error"}}` once it was told."""
        told = self._told.get(overlay)
        if told is None or not told.asked:
            return {}
        members = ("purges", "failures", "last_purge_ms", "last_error")
        return {"purge": {name: getattr(told, name) for name in members}}

    def forget(self, overlay: str) -> None:
        told = self._told.pop(overlay, None)
        if told is not None and told.task is not None:
            told.task.cancel()

    async def close(self) -> None:
        """End those that were not answered yet."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _send(self, overlay: str, told: _Told, request: Request) -> None:
        try:
            answer = await self._client().fetch(request, deadline=time.monotonic() + ANSWER_S, limit=ANSWER_BYTES)
            error = None if answer.status // 100 == 2 else f"answered {answer.title}"  # noqa: PLR2004
        except DeadlineError:
            error = f"had not answered after {ANSWER_S:g} s"
        except ExchangeError as fault:
            error = str(fault)
        finally:
            told.task = None
        if error is None:
            told.purges += 1
            told.last_purge_ms = time.time_ns() // 1_000_000
        else:
            told.failures += 1
            told.last_error = f"the service {error}"
            log.debug("overlay %s: told of a purge, the service %s", overlay, error)
