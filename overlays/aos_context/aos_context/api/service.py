"""The folder of runs that the application serves, from its start to its end, and how requests come to it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, TypeVar

from starlette.concurrency import run_in_threadpool

from aos_context.api.answers import json_response
from aos_context.errors import ContextError
from aos_context.opening import opened
from aos_context.settings import from_environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.responses import Response

    from aos_context.runs import Runs
    from aos_context.settings import Settings

Answer = TypeVar("Answer")


class Service:
    """Without settings those of the environment are taken, when it opens."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._given = settings
        self._opened: tuple[Settings, Runs] | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Raises `ContextError`, `OSError`."""
        settings = from_environment(os.environ) if self._given is None else self._given
        with opened(settings) as runs:
            self._opened = settings, runs
            try:
                yield
            finally:
                self._opened = None

    @property
    def settings(self) -> Settings:
        return self._both()[0]

    @property
    def runs(self) -> Runs:
        return self._both()[1]

    async def ask(self, question: Callable[[Runs], Answer]) -> Answer:
        """What the runs say, in a thread. Raises `ContextError`, `OSError`."""
        return await run_in_threadpool(question, self.runs)

    async def respond(self, question: Callable[[Runs], object]) -> Response:
        """The same as JSON, which is made in the thread, too. Raises `ContextError`, `OSError`."""
        return await self.ask(lambda runs: json_response(question(runs)))

    def _both(self) -> tuple[Settings, Runs]:
        if self._opened is None:
            raise ContextError("the service has not started: its server has to run its lifespan")
        return self._opened
