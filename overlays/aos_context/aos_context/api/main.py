"""The application: `uvicorn aos_context.api.main:app`, or `create_app` with settings of one's own.

Importing it reads and writes nothing; the server's lifespan opens the folder of runs.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from aos_context.api import answers
from aos_context.api.guard import Guard
from aos_context.api.routes import Routes
from aos_context.api.service import Service
from aos_context.errors import ContextError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aos_context.settings import Settings

STATIC = Path(__file__).parent.parent / "static"


def create_app(settings: Settings | None = None) -> Starlette:
    """Without settings those of the environment count, when it starts."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.open():
            yield

    return Starlette(
        routes=[
            *Routes(service).all(),
            Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        ],
        middleware=[Middleware(Guard, settings=lambda: service.settings)],
        exception_handlers={
            ContextError: answers.refuse,
            OSError: answers.refuse,
            ClientDisconnect: answers.went_away,
            404: answers.no_such_address,
            405: answers.wrong_method,
            Exception: answers.failed,
        },
        lifespan=lifespan,
    )


app = create_app()
