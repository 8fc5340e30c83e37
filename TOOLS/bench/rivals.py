"""What the bus is measured against. Each is the plainest good way to do the same work, and so a fair mark.

    echo     Starlette on uvicorn (uvloop, httptools, one worker, as every HTTP rival here): reads JSON, answers JSON.
             The floor of any Python HTTP server: no bus on this stack can be faster.
    ledger   the same, and each call's payload is hashed in canonical form and leaves a JSONL line, written before the
             answer. The floor of a bus that runs nothing: it has no rules, no chain and no fsync.
    plain    the endpoint that people write: JSON in, `subprocess.run([...], input=json, capture_output=True)` in the
             thread pool (what FastAPI does with a `def` endpoint, without the cost of its models), JSON out.
    worker   one worker process for all calls, one JSON line to its pipe and one back, a call at a time, as the bus has
             it. The floor of a bus that calls a worker.
    proxy    forwards the body by one pooled aiohttp client. The floor of a bus that calls an HTTP service.
    service  the HTTP echo service itself, on a bare asyncio protocol, so that it is never what is waited for.
    loop     no HTTP at all: N threads around `subprocess.run`. The bare cost of the process.

All run the same echo programs in the same environment. `loop` prints one JSON tally; all others serve until SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import orjson
import uvicorn
import uvloop
from load import Tally
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from starlette.requests import Request

PATH = "/echo"
LAST_RUN_S = 30
"""How long one run of a program may take."""


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else orjson.dumps(content)


def reply_of(document: dict[str, Any]) -> dict[str, Any]:
    """What the echo programs answer, too."""
    return {"ok": True, "result": document.get("payload", document)}


def app_of(endpoint: Callable[[Request], Awaitable[Response]], **options: Any) -> Starlette:  # noqa: ANN401
    return Starlette(routes=[Route(PATH, endpoint, methods=["POST"])], **options)


def echo_app() -> Starlette:
    async def endpoint(request: Request) -> Response:
        return JsonResponse(reply_of(orjson.loads(await request.body())))

    return app_of(endpoint)


def ledger_app(file: Path) -> Starlette:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    async def endpoint(request: Request) -> Response:
        document = orjson.loads(await request.body())
        payload_hash = hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).hexdigest()
        record = {"timestamp_ms": time.time_ns() // 1_000_000, "ok": True, "payload_hash": payload_hash}
        os.write(handle, orjson.dumps(record, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
        return JsonResponse(reply_of(document))

    return app_of(endpoint)


def plain_app(command: Sequence[str]) -> Starlette:
    def run(document: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(command, input=orjson.dumps(document), capture_output=True, check=True)
        reply: dict[str, Any] = orjson.loads(done.stdout)
        return reply

    async def endpoint(request: Request) -> Response:
        return JsonResponse(await run_in_threadpool(run, orjson.loads(await request.body())))

    return app_of(endpoint)


class Worker:
    """A worker process on two pipes. A call is one line each way, and waits until the one before it was answered."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stdin = cast("asyncio.StreamWriter", process.stdin)
        self._stdout = cast("asyncio.StreamReader", process.stdout)
        self._free = asyncio.Lock()
        self._ids = map(str, itertools.count())

    async def call(self, payload: dict[str, Any]) -> dict[str, Any]:
        async with self._free:
            request_id = next(self._ids)
            self._stdin.write(orjson.dumps({"request_id": request_id, "payload": payload}) + b"\n")
            reply: dict[str, Any] = orjson.loads(await self._stdout.readline())
        if reply.pop("request_id") != request_id:
            raise RuntimeError("a reply to another call")
        return reply

    async def close(self) -> None:
        self._stdin.close()
        await self._process.wait()


def worker_app(command: Sequence[str]) -> Starlette:
    worker: Worker

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        nonlocal worker
        pipe = asyncio.subprocess.PIPE
        worker = Worker(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
        yield
        await worker.close()

    async def endpoint(request: Request) -> Response:
        return JsonResponse(await worker.call(orjson.loads(await request.body())))

    return app_of(endpoint, lifespan=lifespan)


def proxy_app(url: str) -> Starlette:
    client: aiohttp.ClientSession

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        nonlocal client
        client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        async with client:
            yield

    async def endpoint(request: Request) -> Response:
        headers = {"Content-Type": "application/json"}
        async with client.post(url, data=await request.body(), headers=headers) as answer:
            return JsonResponse(await answer.read(), status_code=answer.status)

    return app_of(endpoint, lifespan=lifespan)


class Service(asyncio.Protocol):
    """The HTTP echo service: any POST with a Content-Length is answered with its payload."""

    def __init__(self) -> None:
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (split := self._data.find(b"\r\n\r\n")) >= 0:
            head, body = self._data[:split].lower(), split + 4
            _, found, rest = head.partition(b"\r\ncontent-length:")
            if not found:
                self._transport.write(b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\n\r\n")
                self._transport.close()
                return
            end = body + int(rest.partition(b"\r\n")[0])
            if len(self._data) < end:
                return
            self._reply(self._data[body:end])
            self._data = self._data[end:]

    def _reply(self, body: bytes) -> None:
        reply = orjson.dumps(reply_of(orjson.loads(body)))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(reply) + reply)


async def serve_service(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Service, "127.0.0.1", port)
    await server.serve_forever()


class Loop:
    """Starts the program again and again from N threads, and judges each run as the load generator does each answer."""

    def __init__(self, given: argparse.Namespace, stdin: bytes) -> None:
        self._command: list[str] = given.command
        self._stdin = stdin
        self._must: bytes = given.must.encode()
        self._tally = Tally(given.seconds)
        self._lock = threading.Lock()
        self._start: float = time.perf_counter() + given.warmup
        self._end: float = self._start + given.seconds

    def run(self, threads: int) -> Tally:
        """`cpu_s` is that of this process and of all that it started."""
        workers = [threading.Thread(target=self._work) for _ in range(threads)]
        before_s = cpu_s()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self._tally.cpu_s = cpu_s() - before_s
        return self._tally

    def _work(self) -> None:
        """One thread; it ends early where the program cannot be started, or does not end."""
        try:
            while (began := time.perf_counter()) < self._end:
                done = subprocess.run(
                    self._command, input=self._stdin, capture_output=True, check=False, timeout=LAST_RUN_S
                )
                with self._lock:
                    self._count(began, time.perf_counter(), done)
        except (OSError, subprocess.TimeoutExpired) as error:
            with self._lock:
                self._tally.fail(str(error))

    def _count(self, began: float, ended: float, done: subprocess.CompletedProcess[bytes]) -> None:
        self._tally.total += 1
        if done.returncode or self._must not in done.stdout:
            said = (done.stdout + done.stderr).decode("utf-8", "replace")
            self._tally.fail(f"exit status {done.returncode}: {said}")
        elif self._start <= ended < self._end:
            self._tally.latencies.append(ended - began)


def cpu_s() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=["echo", "ledger", "plain", "worker", "proxy", "service", "loop"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--file", type=Path, help="of ledger: where the lines go")
    parser.add_argument("--url", help="of proxy: where the calls go")
    parser.add_argument("--threads", type=int, default=16, help="of loop")
    parser.add_argument("--seconds", type=float, default=3.0, help="of loop")
    parser.add_argument("--warmup", type=float, default=0.5, help="of loop: seconds that do not count")
    parser.add_argument("--must", default='"ok":true', help="of loop: what must stand in the output")
    parser.add_argument(
        "command", nargs="*", help="of plain, worker and loop: the program; loop gives it its own stdin"
    )
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.rival == "loop":
        print(Loop(given, sys.stdin.buffer.read()).run(given.threads).to_json())
        return
    if given.rival == "service":
        uvloop.run(serve_service(given.port))
        return
    apps: dict[str, Callable[[], Starlette]] = {
        "echo": echo_app,
        "ledger": lambda: ledger_app(given.file),
        "plain": lambda: plain_app(given.command),
        "worker": lambda: worker_app(given.command),
        "proxy": lambda: proxy_app(given.url),
    }
    uvicorn.run(
        apps[given.rival](), port=given.port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )


if __name__ == "__main__":
    main()
