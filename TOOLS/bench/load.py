"""The load generator: N keep-alive connections in a closed loop against one path of one server.

A process of its own, so that its work is not the server's; raw sockets on uvloop and no HTTP library, so that the
figures are the server's. It reads one `Job` as JSON on stdin and writes one `Tally` as JSON on stdout. Each answer is
checked. Answers that come before `warmup_s` has passed are counted in `total` only.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, cast

import uvloop

if TYPE_CHECKING:
    from collections.abc import Sequence

LAST_ANSWER_S = 30.0
"""How long the last answers may take after the end, before the calls count as errors."""
RECONNECT_S = 0.01
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Job:
    """What to send and what must come back: this status, and a body in which `must` stands."""

    port: int
    path: str
    body: str
    connections: int
    seconds: float
    warmup_s: float
    status: int
    must: str

    def request(self) -> bytes:
        body = self.body.encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(slots=True)
class Tally:
    """What was measured. `calls` are good answers within the `seconds`; `total` all answers, `errors` all failures."""

    seconds: float
    calls: int = 0
    total: int = 0
    errors: int = 0
    first_error: str | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_s: float | None = None
    latencies: list[float] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or reason[:_SHOWN]

    def to_json(self) -> str:
        self.latencies.sort()
        self.calls = len(self.latencies)
        self.p50_ms = percentile_ms(self.latencies, 0.50)
        self.p99_ms = percentile_ms(self.latencies, 0.99)
        return json.dumps({name: value for name, value in asdict(self).items() if name != "latencies"})


def percentile_ms(ordered_s: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile of sorted seconds, in milliseconds; None of nothing."""
    if not ordered_s:
        return None
    return round(ordered_s[max(0, math.ceil(share * len(ordered_s)) - 1)] * 1000, 4)


def split_answer(data: bytes) -> tuple[int, bytes] | None:
    """Status and body of a whole HTTP/1.1 answer, or None while it is not all there.

    Raises ValueError where it has no Content-Length, which every server here sends.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    at = head.find(b"\r\ncontent-length:")
    if at < 0:
        raise ValueError(f"an answer without Content-Length: {head!r}")
    length = int(head[at + 17 :].split(b"\r\n", 1)[0])
    body = data[end + 4 :]
    return (int(head[9:12]), body) if len(body) >= length else None


class Load:
    """One job while it runs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.request = job.request()
        self.must = job.must.encode()
        self.tally = Tally(job.seconds)
        self.done = asyncio.Event()
        self.start = perf_counter() + job.warmup_s
        self.end = self.start + job.seconds
        self._open = job.connections

    async def run(self) -> Tally:
        """Run to the end. Every connection still open `LAST_ANSWER_S` after it is an error."""
        await asyncio.gather(*(self.connect() for _ in range(self.job.connections)))
        try:
            async with asyncio.timeout(self.job.warmup_s + self.job.seconds + LAST_ANSWER_S):
                await self.done.wait()
        except TimeoutError:
            for _ in range(self._open):
                self.tally.fail(f"no answer within {LAST_ANSWER_S} s")
        return self.tally

    async def connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Connection(self), "127.0.0.1", self.job.port)
        except OSError as error:
            self.lost(f"no connection: {error}")

    def answered(self, began: float, status: int, body: bytes) -> bool:
        """Judge one answer; says whether to go on."""
        now = perf_counter()
        self.tally.total += 1
        if status != self.job.status or self.must not in body:
            self.tally.fail(f"status {status}: {body.decode('utf-8', 'replace')}")
        elif self.start <= now < self.end:
            self.tally.latencies.append(now - began)
        return now < self.end

    def lost(self, reason: str) -> None:
        """A connection broke with a call under way: an error, and a new connection while there is time."""
        self.tally.fail(reason)
        if perf_counter() < self.end:
            loop = asyncio.get_running_loop()
            loop.call_later(RECONNECT_S, lambda: loop.create_task(self.connect()))
        else:
            self.finish()

    def finish(self) -> None:
        self._open -= 1
        if self._open == 0:
            self.done.set()


class Connection(asyncio.Protocol):
    """One connection: sends, waits for the whole answer, sends again."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._data = b""
        self._began = 0.0
        self._waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            answer = split_answer(self._data)
        except ValueError as error:
            self._load.tally.fail(str(error))
            self._transport.abort()
            return
        if answer is None:
            return
        self._data = b""
        self._waiting = False
        if self._load.answered(self._began, *answer):
            self._send()
        else:
            self._transport.close()
            self._load.finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._load.lost(f"the connection was lost: {exc or 'closed by the server'}")

    def _send(self) -> None:
        self._waiting = True
        self._began = perf_counter()
        self._transport.write(self._load.request)


async def run(job: Job) -> Tally:
    return await Load(job).run()


def main() -> None:
    job = Job(**json.loads(sys.stdin.read()))
    print(uvloop.run(run(job)).to_json())


if __name__ == "__main__":
    main()
