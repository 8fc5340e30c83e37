"""Where `aal stress` has its figures from: the server of the folder if it can be reached, else samples of its own.

A watch follows the server's events, and goes over to samples of its own when the server goes, and back when one comes.
"""

from __future__ import annotations

import http.client
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import orjson

from bus import serving
from bus.plugins import Plugins
from bus.stress import StressMonitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bus.serving import Serving
    from bus.settings import Settings

CONNECT_S = 3.0
"""How long the server may take for its first answer, in seconds."""

SILENCE_S = 45.0
"""How long it may be silent in a stream, in seconds: three times as long as it ever means to be."""

Given = TypeVar("Given")

_OK = 200
_EARLY = 0.9
"""A sample of the server's is shown that part of the wished period after the last, as timers are not exact."""


@dataclass(frozen=True, slots=True)
class Report:
    """One sample. `body` is as `schemas/stress.schema.json` has it, without `history`, which stands beside it.

    `server` is the address that it is from, None where this process took it. `note` says why that was so, for people.
    """

    body: Mapping[str, Any]
    server: str | None = None
    note: str | None = None
    history: tuple[Mapping[str, Any], ...] = ()


class _UnreachableError(Exception):
    """The server is not to be had; the message says why. `refused`: it is there and does not want us."""

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


@dataclass(slots=True)
class Watch:
    """Reports of one folder. `token` is for a server that asks for one; `period_s` is how often reports are wanted.

    None is as often as the server samples, and `AAL_STRESS_PERIOD_S` for own samples.
    """

    settings: Settings
    token: str | None = None
    period_s: float | None = None
    sleep: Callable[[float], None] = time.sleep
    _monitor: StressMonitor | None = field(default=None, init=False)
    _note: str | None = field(default=None, init=False)
    _refused_by: Serving | None = field(default=None, init=False)

    def once(self) -> Report:
        """The state now. Raises `SettingError` where the server's file is damaged."""
        if (server := serving.find(self.settings.state)) is not None:
            try:
                with closing(self._connect(server)) as connection:
                    return self._state_of(server, connection)
            except _UnreachableError as why:
                self._note = str(why)
        return self._own()

    def reports(self) -> Iterator[Report]:
        """One after the other, for ever. Raises as `once`."""
        while True:
            server = serving.find(self.settings.state)
            if server is not None and server != self._refused_by:
                try:
                    yield from self._follow(server)
                except _UnreachableError as why:
                    self._note = str(why)
                    self._refused_by = server if why.refused else None
            yield self._own()
            self.sleep(self.settings.stress_period_s if self.period_s is None else self.period_s)

    def _own(self) -> Report:
        if self._monitor is None:
            self._monitor = StressMonitor(Plugins(self.settings).stress_sources())
            self._monitor.prime()
        else:
            self._monitor.sample()
        return Report(self._monitor.report(), note=self._note or "no server of this folder runs: sampled here")

    def _follow(self, server: Serving) -> Iterator[Report]:
        """The server's state, then its events. Raises `_UnreachableError` when they end."""
        with closing(self._connect(server)) as connection:
            first = self._state_of(server, connection)
            yield first
            seen, shown_at = first.body.get("sampled"), time.monotonic()
            for body in self._events_of(server, connection):
                now = time.monotonic()
                if body.get("sampled") == seen or now - shown_at < _EARLY * (self.period_s or 0):
                    continue
                shown_at = now
                yield Report(body, server.address)
        raise _UnreachableError(f"the server at {server.address} has gone: sampled here")

    def _connect(self, server: Serving) -> http.client.HTTPConnection:
        address = urlsplit(server.address)
        return http.client.HTTPConnection(address.hostname or "", address.port, timeout=CONNECT_S)

    def _state_of(self, server: Serving, connection: http.client.HTTPConnection) -> Report:
        body = _document(_read(self._ask(server, connection, "/stress"), server), server)
        history = tuple(body.pop("history", ()))
        return Report(body, server.address, history=history)

    def _events_of(self, server: Serving, connection: http.client.HTTPConnection) -> Iterator[dict[str, Any]]:
        """The data of the event `stress`, as it comes, until the stream ends."""
        answer = self._ask(server, connection, "/events?types=stress")
        if connection.sock is not None:
            connection.sock.settimeout(SILENCE_S)
        while line := _guarded(answer.readline, server):
            if line.startswith(b"data: "):  # each event has its data in one line
                yield _document(line.removeprefix(b"data: "), server)

    def _ask(self, server: Serving, connection: http.client.HTTPConnection, path: str) -> http.client.HTTPResponse:
        def ask() -> http.client.HTTPResponse:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"} if self.token else {})
            return connection.getresponse()

        answer = _guarded(ask, server)
        if answer.status != _OK:
            told = _document(_read(answer, server), server)
            hint = "" if self.token else " (AAL_TOKEN has the token for it)"
            why = f"the server at {server.address} answers {told.get('code')}{hint}: sampled here"
            raise _UnreachableError(why, refused=True)
        return answer


def _guarded(ask: Callable[[], Given], server: Serving) -> Given:
    try:
        return ask()
    except (OSError, http.client.HTTPException) as error:
        why = f"the server at {server.address} cannot be reached ({error or type(error).__name__}): sampled here"
        raise _UnreachableError(why) from error


def _read(answer: http.client.HTTPResponse, server: Serving) -> bytes:
    return _guarded(answer.read, server)


def _document(text: bytes, server: Serving) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _UnreachableError(f"what answers at {server.address} is no bus: sampled here", refused=True)
    return found
