"""Who calls: many threads, some of which hang up in the middle; and what became of each call."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from tests.chaos import overlays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.chaos.overlays import Order, Overlay
    from tests.chaos.server import Server

CLIENTS = 16
ANSWER_S = 60.0
"""How long a client waits for an answer, whatever it asked for."""

LEAVES = 0.15
"""The share of calls in whose middle the client hangs up."""

LEAVES_AFTER_S = 0.3
PAUSE_S = 0.05
"""At most, before a client hangs up, and between two calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is over. `left`: the client hung up; `cut`: the connection ended without an answer.

    `told`: by then the server had been told to end. `sent`: all of the request was sent before that.
    """

    order: Order
    end: Literal["answered", "left", "cut"]
    told: bool
    status: int = 0
    body: Any = None
    error: str = ""
    sent: bool = False

    @property
    def code(self) -> str:
        return str(self.body["code"]) if self.end == "answered" else self.end


def make(server: Server, order: Order, leaves_after: threading.Event | None = None, leaves_s: float = 0.0) -> Call:
    """Make one call. With an event, hang up once it is set or so many seconds have passed."""
    connection = http.client.HTTPConnection(*server.address, timeout=ANSWER_S)
    sent = False
    with contextlib.closing(connection):
        try:
            path, headers = f"/invoke/{order.overlay.name}", {"Content-Type": "application/json"}
            connection.request("POST", path, order.body(), headers)
            sent = not server.told
            if leaves_after is not None:
                leaves_after.wait(leaves_s)
                return Call(order, "left", server.told)
            response = connection.getresponse()
            body = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return Call(order, "cut", server.told, error=f"{type(error).__name__}: {error}", sent=sent)
        return Call(order, "answered", server.told, response.status, body)


class Crowd:
    """Clients that call one after the other, from `start` until `join`, or until the server is gone."""

    def __init__(self, server: Server, seed: int, choice: tuple[Overlay, ...]) -> None:
        self._server = server
        self._choice = choice
        self._enough = threading.Event()
        self._calls: list[list[Call]] = [[] for _ in range(CLIENTS)]
        rng = Random(seed)
        self._threads = [
            threading.Thread(target=self._work, args=(Random(rng.getrandbits(64)), calls)) for calls in self._calls
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> Sequence[Call]:
        """Let them finish what they have begun."""
        self._enough.set()
        for thread in self._threads:
            thread.join()
        return [call for calls in self._calls for call in calls]

    def _work(self, rng: Random, calls: list[Call]) -> None:
        while not self._enough.is_set():
            order = overlays.order(rng, self._choice)
            leaves = rng.random() < LEAVES
            calls.append(make(self._server, order, self._enough if leaves else None, rng.uniform(0, LEAVES_AFTER_S)))
            if self._server.told and calls[-1].end != "answered":
                break
            self._enough.wait(rng.uniform(0, PAUSE_S))
