"""Hostile clients: each does one bad thing to a server, over and over, and counts what came of it.

A process of its own, as the load generator is. It reads one `Siege` as a line of JSON on stdin, says `begun` once every
client has connected for the first time, goes on until stdin ends, and then writes its counts as a line of JSON:
`{kind: {outcome: count}}`. An outcome is the status of an answer, `closed` where there was none, or `held` where the
server still bore with the client at the end.

Those who pour out bytes share the speed of a line of 1 Gbit/s: on a loopback the copying would be all that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

import uvloop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

SLOW_S = 1.0
"""Between two bytes of a slow client."""
BODY_MB = 100
CHUNK = b" " * 65536
LINE_BYTES_S = 125_000_000
"""What those who pour out bytes send together, in bytes a second."""

END_S = 1.0
"""How long a client may take to say its last words."""
PAUSE_S = 0.01
"""What a client that was cut off waits before it comes again, as the load generator does."""


@dataclass(frozen=True, slots=True)
class Siege:
    """Whom to besiege, with how many clients: a call of `path` needs the `token`."""

    port: int
    path: str
    token: str
    clients: int

    @property
    def share_bytes_s(self) -> float:
        """Of the line, for each of those who pour out bytes."""
        kinds = list(islice(cycle(KINDS), self.clients))
        return LINE_BYTES_S / max(1, sum(kind in POURING for kind in kinds))

    def head(self, *lines: str, token: str | None = None) -> bytes:
        """The head of a call with further lines, from whoever has the token."""
        known = [f"Authorization: Bearer {self.token if token is None else token}"]
        request = [f"POST {self.path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        return "\r\n".join([*request, *known, *lines, "\r\n"]).encode()


class Client:
    """One connection of a hostile client."""

    def __init__(self, siege: Siege, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.siege = siege
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def send_slowly(self, data: bytes) -> None:
        """One byte a second, until the server has had enough."""
        for at in range(len(data)):
            if self._reader.at_eof():
                return
            await self.send(data[at : at + 1])
            await asyncio.sleep(SLOW_S)

    async def answer(self) -> str:
        """The status of the next answer, whose body is read; `closed` where none comes."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
            await self._reader.readexactly(int(length or 0))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return "closed"
        return head[9:12].decode("latin-1")

    def half_close(self) -> None:
        self._writer.write_eof()


async def oversized(client: Client) -> str:
    """As many bytes as were announced, until the server stops reading."""
    await client.send(client.siege.head(f"Content-Length: {BODY_MB * 2**20}"))
    return await _pour(client, CHUNK)


async def oversized_chunks(client: Client) -> str:
    """The same without a word of how many come."""
    await client.send(client.siege.head("Transfer-Encoding: chunked"))
    return await _pour(client, b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))


async def _pour(client: Client, chunk: bytes) -> str:
    due = asyncio.get_running_loop().time()
    with contextlib.suppress(ConnectionError):  # it has heard enough, and may have said so
        for _ in range(BODY_MB * 2**20 // len(CHUNK)):
            await client.send(chunk)
            due += len(chunk) / client.siege.share_bytes_s
            await asyncio.sleep(due - asyncio.get_running_loop().time())
    return await client.answer()


async def slow_head(client: Client) -> str:
    await client.send_slowly(client.siege.head("Content-Length: 2"))
    return await client.answer()


async def slow_body(client: Client) -> str:
    await client.send(client.siege.head("Content-Length: 10000"))
    await client.send_slowly(b" " * 10_000)
    return await client.answer()


async def malformed_http(client: Client) -> str:
    await client.send(b"GE\0T / HTTP/9.9\r\n: \r\n\r\n")
    return await client.answer()


async def malformed_json(client: Client) -> str:
    body = b'{"phase":"OPEN","data":{"a":[1,2,'
    await client.send(client.siege.head(f"Content-Length: {len(body)}") + body)
    return await client.answer()


async def unauthenticated(client: Client) -> str:
    body = b'{"phase":"OPEN","data":{}}'
    await client.send(client.siege.head(f"Content-Length: {len(body)}", token="aal_" + "x" * 43) + body)
    return await client.answer()


async def half_open(client: Client) -> str:
    """Half of a head, and then no more than silence."""
    await client.send(client.siege.head()[:40])
    return await client.answer()


KINDS: Mapping[str, Callable[[Client], Awaitable[str]]] = {
    kind.__name__: kind
    for kind in (
        oversized,
        slow_head,
        malformed_json,
        unauthenticated,
        oversized_chunks,
        slow_body,
        malformed_http,
        half_open,
    )
}
POURING = {oversized.__name__, oversized_chunks.__name__}


class Besiegers:
    """The clients of one siege: the kinds in turn, until there are as many as asked for."""

    def __init__(self, siege: Siege) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._siege = siege
        self._unbegun = siege.clients
        self.begun = asyncio.Event()

    def start(self) -> list[asyncio.Task[None]]:
        return [asyncio.ensure_future(self._besiege(kind)) for kind in islice(cycle(KINDS), self._siege.clients)]

    async def _besiege(self, kind: str) -> None:
        await self._connect(kind, is_first=True)
        while True:
            await self._connect(kind)

    async def _connect(self, kind: str, *, is_first: bool = False) -> None:
        """One connection, until the server ends it."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._siege.port)
        except OSError:
            self.counts[kind]["no connection"] += 1
            await asyncio.sleep(PAUSE_S)
            return
        finally:
            if is_first:
                self._has_begun()
        try:
            await self._use(kind, Client(self._siege, reader, writer))
        finally:
            writer.transport.abort()

    async def _use(self, kind: str, client: Client) -> None:
        outcome = ""
        while outcome != "closed":
            try:
                outcome = await KINDS[kind](client)
            except ConnectionError:
                outcome = "closed"
            except asyncio.CancelledError:  # the server still bears with it at the end
                self.counts[kind]["held"] += 1
                raise
            self.counts[kind][outcome] += 1
        await asyncio.sleep(PAUSE_S)

    def _has_begun(self) -> None:
        self._unbegun -= 1
        if not self._unbegun:
            self.begun.set()


async def run(siege: Siege, wait_for_end: Callable[[], Awaitable[object]], say: Callable[[str], None]) -> None:
    """Besiege until the end; `say` gets `begun`, and then the counts."""
    besiegers = Besiegers(siege)
    clients = besiegers.start()
    await besiegers.begun.wait()
    say("begun")
    await wait_for_end()
    for client in clients:
        client.cancel()
    await asyncio.wait(clients, timeout=END_S)
    say(json.dumps(besiegers.counts))


def main() -> None:
    siege = Siege(**json.loads(sys.stdin.readline()))
    end = asyncio.to_thread
    uvloop.run(run(siege, lambda: end(sys.stdin.read), lambda text: print(text, flush=True)))


if __name__ == "__main__":
    main()
