"""What happens, told to whoever listens: `GET /events`, as server-sent events (HTML Living Standard, section 9.2).

Each event is made and spelled once for all readers, and not at all without any. A reader has a short queue of its own;
what it is too slow to take is lost, the oldest first, and shows as a gap in the ids of its type. A new reader is told
the newest event of each type at once, so it need not wait for the next, nor does one that comes back.

Another type of event needs its name in `TYPES` and somebody who publishes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from starlette.types import Receive, Scope, Send

TYPES = ("stress",)
"""The types of events that there are."""

WAITING = 16
"""Events that wait for one reader, beside what its connection holds; an older one makes room for the next."""

KEEP_ALIVE_S = 15.0
"""After so many seconds without an event a comment is sent, so that nothing between takes the connection for dead."""

RETRY_MS = 2000
"""How long a browser waits before it connects anew, in milliseconds."""

MEDIA_TYPE = "text/event-stream"

_KEEP_ALIVE = b":\n\n"
_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would keep events until it has a buffer full of them
}


class Reader:
    """One who listens to some types: a queue of events as they are sent."""

    def __init__(self, types: frozenset[str]) -> None:
        self.types = types
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._more = asyncio.Event()
        self._ended = False

    def put(self, text: bytes) -> None:
        self._waiting.append(text)
        self._more.set()

    def end(self) -> None:
        """There are no more events; those that wait are not waited for."""
        self._ended = True
        self._more.set()

    async def next(self, keep_alive_s: float = KEEP_ALIVE_S) -> bytes | None:
        """What to send next: an event, a comment after so long without one, None at the end."""
        if not self._waiting and not self._ended:
            self._more.clear()
            try:
                async with asyncio.timeout(keep_alive_s):
                    await self._more.wait()
            except TimeoutError:
                return _KEEP_ALIVE
        return None if self._ended else self._waiting.popleft()


class Events:
    """Where events are published and read. For one event loop; no locks."""

    def __init__(self) -> None:
        self._readers: set[Reader] = set()
        self._newest: dict[str, tuple[int, Callable[[], Mapping[str, Any]]]] = {}
        self._is_closed = False

    def publish(self, type_: str, number: int, make: Callable[[], Mapping[str, Any]]) -> None:
        """Tell the readers of a type an event: its number, rising within the type, and its data.

        `make` gives the data, now where there is a reader, and later for the next that comes, of the state then.
        """
        self._newest[type_] = number, make
        readers = [reader for reader in self._readers if type_ in reader.types]
        if readers:
            text = spelled(type_, number, make())
            for reader in readers:
                reader.put(text)

    @contextmanager
    def reader(self, types: Iterable[str] = TYPES) -> Iterator[Reader]:
        """A reader of these types, which has the newest of each to begin with."""
        reader = Reader(frozenset(types))
        for type_, (number, make) in self._newest.items():
            if type_ in reader.types:
                reader.put(spelled(type_, number, make()))
        if self._is_closed:
            reader.end()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    @property
    def readers(self) -> int:
        return len(self._readers)

    def close(self) -> None:
        """End every reader, now; and whoever comes later, at once."""
        self._is_closed = True
        for reader in self._readers:
            reader.end()


class EventStream(Response):
    """The answer to `GET /events`. It ends when the events do, when its client goes, or when `may_go_on` says so."""

    def __init__(self, events: Events, types: Iterable[str], may_go_on: Callable[[], bool]) -> None:
        super().__init__(media_type=MEDIA_TYPE, headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._types = tuple(types)
        self._may_go_on = may_go_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        with self._events.reader(self._types) as reader:
            tasks = asyncio.ensure_future(self._tell(reader, send)), asyncio.ensure_future(_gone(receive))
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _tell(self, reader: Reader, send: Send) -> None:
        await send(_piece(b"retry: %d\n\n" % RETRY_MS))
        while (text := await reader.next()) is not None and self._may_go_on():
            await send(_piece(text))
        await send({"type": "http.response.body", "body": b""})


def spelled(type_: str, number: int, data: Mapping[str, Any]) -> bytes:
    """One event on the wire. JSON in one line, so one field `data` holds it."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (number, type_.encode(), orjson.dumps(data))


def _piece(text: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": True}


async def _gone(receive: Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
