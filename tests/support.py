"""What the tests of the whole bus share: small overlays, a runner in process, and a server of its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import orjson

from bus import provenance, runes, schemas
from bus.dispatch import Bus
from bus.envelopes import make_invocation
from bus.hookspecs import hookimpl
from bus.model import Capability, Manifest, Permission, Phase
from bus.records import CALL_TYPES
from bus.settings import Settings
from runners.base import Job, Outcome, Share

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
    from http.client import HTTPMessage

    from bus.hookspecs import RegisterRunner, RegisterStressSource
    from bus.model import Invocation, Record

REPO = Path(__file__).resolve().parent.parent
PATIENCE_S = 20.0
"""How long a test waits for an event of another process before it fails."""


def a_capability(**changes: Any) -> Capability:
    values: dict[str, Any] = {
        "name": "run",
        "runner": "proc",
        "timeout_s": 30.0,
        "phases": tuple(Phase),
        "memory": runes.resolve("MINIMAL"),
        "argv": ("cat",),
    }
    return Capability(**values | changes)


def a_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "echo",
        "version": "1.2.3",
        "shape": "A",
        "folder": Path("/nowhere"),
        "manifest_hash": "0" * 64,
        "phases": tuple(Phase),
        "permissions": frozenset(Permission),
        "capabilities": {},
    }
    return Manifest(**values | changes)


def settings_in(folder: Path, **changes: Any) -> Settings:
    """Settings of a working folder, with short waits."""
    values: dict[str, Any] = {
        "overlays": folder / "overlays",
        "logs": folder / "logs",
        "state": folder / ".aal",
        "profiles": folder / "profiles",
        "kill_grace_s": 0.2,
        "drain_s": 5.0,
        "dev_log_payload": True,
        "hosts": "testserver",
        "sandbox": "off",  # as many overlays of tests are shell scripts that run other programs, in any phase
    }
    values["overlays"].mkdir(exist_ok=True)
    return Settings(**values | changes)


def add_overlay(
    root: Path,
    name: str = "echo",
    entrypoint: str = "cat",
    *,
    files: Mapping[str, str] | None = None,
    **members: Any,
) -> Path:
    """An overlay of shape A. `cat` answers with the envelope itself, since that has no `ok`."""
    manifest = {"name": name, "version": "1.0.0", "entrypoint": entrypoint} | members
    return write_overlay(root, name, manifest, files)


def add_script(root: Path, name: str, script: str, **members: Any) -> Path:
    """An overlay of shape A whose program is a shell script."""
    return add_overlay(root, name, "sh run.sh", files={"run.sh": script}, **members)


def add_native(root: Path, name: str, capabilities: Mapping[str, Any], **members: Any) -> Path:
    """An overlay of the native shape. Its command ignores the arguments that a capability adds, and echoes."""
    manifest = {
        "name": name,
        "version": "1.0.0",
        "permissions": ["analysis"],
        "entrypoints": {"proc": {"command": ["sh", "run.sh"]}},
        "capabilities": capabilities,
    } | members
    return write_overlay(root, name, manifest, {"run.sh": "exec cat"})


def write_overlay(root: Path, name: str, manifest: Mapping[str, Any], files: Mapping[str, str] | None = None) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in (files or {}).items():
        (folder / file).write_text(text)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def a_call(overlay: str = "echo", capability: str | None = None, **request: Any) -> Invocation:
    return make_invocation({"phase": "OPEN", "data": {}} | request, overlay, capability)


def lines(settings: Settings) -> list[Record]:
    """Every line of the ledger."""
    return list(provenance.iter_lines(settings.ledger))


def calls(settings: Settings) -> list[Record]:
    """The lines that say what came of calls."""
    return [line for line in lines(settings) if line["type"] in CALL_TYPES]


def misfits(schema: str, document: Any) -> list[str]:
    """What `schemas/<schema>.schema.json` refuses in a document that has passed through JSON."""
    read = orjson.loads(document if isinstance(document, bytes) else orjson.dumps(document))
    return [str(fault) for fault in schemas.faults(schemas.shipped(schema), read)]


@contextlib.asynccontextmanager
async def running_bus(settings: Settings, *plugins: object) -> AsyncIterator[Bus]:
    """A bus that does not watch: overlays are looked at when they are called."""
    bus = Bus(settings, plugins=plugins)
    await bus.start(watch=False)
    try:
        yield bus
    finally:
        await bus.close()


async def until(ask: Callable[[], bool]) -> None:
    """Let the event loop run until it is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not ask():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)


@dataclass
class InProcessRunner:
    """A runner without processes, as a plugin: it remembers its jobs and answers what `answer` gives."""

    answer: Callable[[Job], Outcome | Awaitable[Outcome]] = lambda job: Outcome(result=orjson.loads(job.envelope))
    name: str = "proc"
    jobs: list[Job] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    relieved: list[float] = field(default_factory=list)
    purged: list[Collection[str] | None] = field(default_factory=list)
    closed: bool = False

    @hookimpl
    def aal_register_runners(self, register: RegisterRunner) -> None:
        register(self)

    async def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        answer = self.answer(job)
        return answer if isinstance(answer, Outcome) else await answer

    def state(self, overlay: str) -> dict[str, Any]:
        return {}

    def shares(self) -> dict[str, Share]:
        return {}

    def relieve(self, idle_s: float) -> None:
        self.relieved.append(idle_s)

    def purge(self, overlays: Collection[str] | None) -> dict[str, int]:
        self.purged.append(overlays)
        return {}

    def forget(self, overlay: str) -> None:
        self.forgotten.append(overlay)

    async def close(self, *, at_once: bool = False) -> None:
        self.closed = True


@dataclass
class FixedStress:
    """A source of stress that says what it is told to, as a plugin. The machine's own sources do not count."""

    value: float = 0.0

    @hookimpl
    def aal_stress_sources(self, register: RegisterStressSource) -> None:
        register("memory", lambda: self.value)
        register("pressure", lambda: None)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: HTTPMessage
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


class Server:
    """`create_app` under uvicorn in a process of its own. Its socket listens before it runs, so nobody polls."""

    patience_s = PATIENCE_S
    """How long an answer may take, the first with what is left of the start."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = settings_in(folder)
        self._folder = folder
        self._env = {"AAL_KILL_GRACE_S": "0.2", "AAL_DEV_LOG_PAYLOAD": "1"} | {
            f"AAL_{name.upper()}": str(value) for name, value in settings.items()
        }

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AAL_")}
        command = (
            f"-m uvicorn bus.app:create_app --factory --log-level warning --loop uvloop --fd {self._socket.fileno()}"
        )
        self.process = subprocess.Popen(
            [sys.executable, *command.split()],
            cwd=self._folder,
            env=inherited | self._env | {"PYTHONPATH": str(REPO)},
            pass_fds=[self._socket.fileno()],
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self._socket.close()

    @property
    def peak_mb(self) -> float:
        """The most memory that the server's process has had resident, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def line_of(self, request_id: str) -> Record:
        """The ledger's line of a request."""
        ends = provenance.tail(self.settings.ledger, 50, types=CALL_TYPES)
        found = [line for line in ends if line["request_id"] == request_id]
        assert len(found) == 1
        return found[0]

    @contextlib.contextmanager
    def connection(self) -> Iterator[HTTPConnection]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=self.patience_s)
        with contextlib.closing(connection):
            yield connection

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, **options: Any
    ) -> Reply:
        with self.connection() as connection:
            connection.request(method, path, body, headers or {}, **options)
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())

    def get(self, path: str) -> Reply:
        return self.request("GET", path)

    def post(self, path: str, body: Any, content_type: str = "application/json") -> Reply:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, text, {"Content-Type": content_type})

    def invoke(self, overlay: str, data: Any = None, **request: Any) -> Reply:
        return self.post(f"/invoke/{overlay}", {"phase": "OPEN", "data": data or {}} | request)


@contextlib.contextmanager
def http_service(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A service in threads of this process; gives its base URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{service.server_port}"
        finally:
            service.shutdown()
            thread.join()


def eventually(ask: Callable[[], bool], what: str) -> None:
    """Wait for what another process does and nobody announces. Fails with `what` after `PATIENCE_S`."""
    give_up = time.monotonic() + PATIENCE_S
    while not ask():
        assert time.monotonic() < give_up, f"still not so after {PATIENCE_S} s: {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs. A zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}
