"""Fixtures of the runners' tests: both event loops, and the proof that a test left nothing behind."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests import programs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Clock:
    """The breakers' clock, in seconds. It stands still but for what a test adds."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


PATIENCE = 200
"""Turns of the event loop in which what was closed may end."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """No descriptor and no child process that was not there before."""
    before = programs.held()
    yield
    for _ in range(PATIENCE):
        if programs.held() == before:
            break
        await asyncio.sleep(0)
    assert programs.held() == before
