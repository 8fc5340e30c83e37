"""The load generator: N keep-alive connections against one server, in a closed loop or at a given rate.

A process of its own, so that its work is not the server's; raw sockets on uvloop and no HTTP library, so that the
figures are the server's. It reads one `Job` as JSON on stdin and writes a `Tally` as a line of JSON on stdout: one at
the end, and where `every_s` is given one for each such interval. Each answer is checked. Answers that come before
`warmup_s` has passed are counted in `total` only.

At a rate, call n is due n / rate seconds after the start, whatever became of those before it. Where all connections are
still waiting for answers then, its latency counts from when it was due: a server that stalls is charged for the calls
that it kept from being made.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, cast

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LAST_ANSWER_S = 30.0
"""How long the last answers may take after the end, before the calls count as errors."""
RECONNECT_S = 0.01
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Job:
    """What to send and what must come back: this status, and a body in which `must` stands.

    The calls take the `paths` in turn. `rate` is in calls a second; None is a closed loop. `token` is the caller's.
    """

    port: int
    paths: Sequence[str]
    body: str
    connections: int
    seconds: float
    warmup_s: float
    status: int
    must: str
    method: str = "POST"
    rate: float | None = None
    every_s: float | None = None
    token: str | None = None

    def requests(self) -> list[bytes]:
        return [self._request(path) for path in self.paths]

    def _request(self, path: str) -> bytes:
        body = self.body.encode()
        known = "" if self.token is None else f"Authorization: Bearer {self.token}\r\n"
        head = (
            f"{self.method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n{known}"
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


class Answer(NamedTuple):
    """One HTTP answer; `closes` where the server ends the connection after it."""

    status: int
    body: bytes
    closes: bool = False


def split_answer(data: bytes) -> Answer | None:
    """A whole HTTP/1.1 answer, or None while it is not all there.

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
    return Answer(int(head[9:12]), body, b"\r\nconnection: close" in head) if len(body) >= length else None


class Load:
    """One job while it runs. `say` gets the tally of each interval."""

    def __init__(self, job: Job, say: Callable[[Tally], None] = lambda _: None) -> None:
        self.job = job
        self.must = job.must.encode()
        self.tally = Tally(job.seconds)
        self.done = asyncio.Event()
        began = perf_counter()
        self.start = began + job.warmup_s
        self.end = self.start + job.seconds
        self._requests = itertools.cycle(job.requests())
        self._due = itertools.repeat(0.0) if job.rate is None else (began + n / job.rate for n in itertools.count())
        self._say = say
        self._since = self.start
        self._open = job.connections
        self._connecting: set[asyncio.Task[None]] = set()

    async def run(self) -> Tally:
        """Run to the end; the tally of the last interval. Connections open `LAST_ANSWER_S` after the end are errors."""
        reporting = asyncio.ensure_future(self._report())
        await asyncio.gather(*(self.connect() for _ in range(self.job.connections)))
        try:
            async with asyncio.timeout(self.job.warmup_s + self.job.seconds + LAST_ANSWER_S):
                await self.done.wait()
        except TimeoutError:
            for _ in range(self._open):
                self.tally.fail(f"no answer within {LAST_ANSWER_S} s")
        reporting.cancel()
        return self._interval()

    async def _report(self) -> None:
        while self.job.every_s is not None and (left_s := self.end - perf_counter()) > self.job.every_s:
            await asyncio.sleep(min(left_s, self.job.every_s))
            self._say(self._interval())

    def _interval(self) -> Tally:
        """The tally since the last one, and a new one in its place."""
        now = min(perf_counter(), self.end)
        tally, self.tally = self.tally, Tally(self.job.seconds)
        tally.seconds, self._since = now - self._since, now
        return tally

    def next_call(self) -> tuple[bytes, float]:
        """What to send next and when it is due, on the clock of `perf_counter`; 0 is at once."""
        return next(self._requests), next(self._due)

    async def connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Connection(self), "127.0.0.1", self.job.port)
        except OSError as error:
            self.lost(f"no connection: {error}")

    def answered(self, began: float, answer: Answer) -> bool:
        """Judge one answer; says whether to go on."""
        now = perf_counter()
        self.tally.total += 1
        if answer.status != self.job.status or self.must not in answer.body:
            self.tally.fail(f"status {answer.status}: {answer.body.decode('utf-8', 'replace')}")
        elif self.start <= now < self.end:
            self.tally.latencies.append(now - began)
        return now < self.end

    def lost(self, reason: str) -> None:
        """A connection broke with a call under way: an error, and a new connection while there is time."""
        self.tally.fail(reason)
        if perf_counter() < self.end:
            loop = asyncio.get_running_loop()
            loop.call_later(RECONNECT_S, self.reconnect)
        else:
            self.finish()

    def reconnect(self) -> None:
        task = asyncio.ensure_future(self.connect())
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

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
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        self._data += data
        try:
            answer = split_answer(self._data)
        except ValueError as error:
            self._load.tally.fail(str(error))
            self._transport.abort()
            return
        if answer is not None:
            self._data = b""
            self._waiting = False
            self._go_on(answer)

    def _go_on(self, answer: Answer) -> None:
        if not self._load.answered(self._began, answer):
            self._finish()
        elif answer.closes:
            self._transport.close()
            self._load.reconnect()
        else:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._load.lost(f"the connection was lost: {exc or 'closed by the server'}")
        elif self._timer is not None:  # a server may close what is idle: no call is lost by that
            self._timer.cancel()
            self._load.reconnect()

    def _next(self) -> None:
        """Send the next call now, or when it is due."""
        request, due = self._load.next_call()
        now = perf_counter()
        if due <= now:
            self._send(request, due or now)
        elif due < self._load.end:
            self._timer = asyncio.get_running_loop().call_later(due - now, self._send_due, request)
        else:
            self._finish()

    def _send_due(self, request: bytes) -> None:
        self._timer = None
        self._send(request, perf_counter())

    def _send(self, request: bytes, began: float) -> None:
        self._waiting = True
        self._began = began
        self._transport.write(request)

    def _finish(self) -> None:
        self._transport.close()
        self._load.finish()


async def run(job: Job, say: Callable[[Tally], None] = lambda _: None) -> Tally:
    return await Load(job, say).run()


def _print(tally: Tally) -> None:
    print(tally.to_json(), flush=True)


def main() -> None:
    job = Job(**json.loads(sys.stdin.read()))
    _print(uvloop.run(run(job, _print)))


if __name__ == "__main__":
    main()
