"""A Bus for code without an event loop: `aal invoke`, `aal replay`, scripts and notebooks. No socket is opened."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

import uvloop

from bus import replay
from bus import settings as bus_settings
from bus.dispatch import Bus
from bus.envelopes import make_invocation
from bus.errors import RequestError
from bus.model import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from bus.course import Answer
    from bus.model import Record
    from bus.overlays import Registry
    from bus.replay import Replay, Trial
    from bus.settings import Settings


class LocalBus:
    """A Bus on an event loop of its own. Use it in a `with` block and from one thread."""

    def __init__(self, settings: Settings | None = None, *, plugins: Iterable[object] = ()) -> None:
        self.settings = settings or bus_settings.load()
        self._plugins = plugins
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)

    def __enter__(self) -> Self:
        try:
            self._bus = Bus(self.settings, plugins=self._plugins)
            self._runner.run(self._bus.start(watch=False))
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._runner.run(self._bus.close())
        finally:
            self._runner.close()

    @property
    def registry(self) -> Registry:
        return self._bus.registry

    def invoke(self, request: Mapping[str, Any], overlay: str, capability: str | None = None) -> Answer:
        """One call, from a request as in `schemas/invocation.schema.json`; of `overlay`, or `overlay.capability`."""
        try:
            call = make_invocation(dict(request), overlay, capability)
        except RequestError as error:
            return self._runner.run(self._bus.refuse(error, overlay, capability))
        return self._runner.run(self._bus.invoke(call))

    def call(
        self,
        capability: str,
        payload: Mapping[str, Any],
        *,
        phase: str = Phase.OPEN,
        profile: str | None = None,
        seed: str | int | None = None,
        timeout_ms: int | None = None,
    ) -> dict[str, Any]:
        """Call `overlay` or `overlay.capability` and give the answer's body, as `POST /invoke` would."""
        request = {"phase": phase, "data": payload, "profile": profile, "seed": seed, "timeout_ms": timeout_ms}
        return self.invoke(request, capability).body

    def replay(self, seq: int, *, live: bool = False) -> Replay:
        """Run line `seq` of the ledger again; see `bus.replay.replay`."""
        return self._runner.run(replay.replay(self._bus, seq, live=live))

    def replay_all(
        self,
        records: Iterable[Record],
        *,
        jobs: int = 1,
        live: bool = False,
        done: Callable[[Trial], object],
    ) -> None:
        """Run the lines of these records again, `jobs` at once; `done` is told of each trial as it ends.

        Raises `BrokenLineError`, and `KeyboardInterrupt` once what was running has ended.
        """

        async def attempt(record: Record) -> Replay:
            return await replay.replay(self._bus, record["seq"], live=live)

        self._runner.run(replay.try_all(records, attempt, jobs=jobs, done=done))

    def rest(self, seconds: float) -> None:
        """Let the event loop run without a call: what the bus looks at every now and then is looked at."""
        self._runner.run(asyncio.sleep(seconds))
