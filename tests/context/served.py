"""What tests of the service share: the service as a process of its own, and a client that asks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

from tests.context.conftest import OVERLAY
from tests.support import Reply

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

PATIENCE_S = 60
"""How long a service may take to answer before a test fails."""

FACT = {
    "_schema_version": "2.1",
    "op": "add",
    "type": "fact",
    "scope": "global",
    "content": "The invoices before 2019 are in pounds",
    "confidence": 0.9,
    "rationale": "Seen in all of them",
    "source_refs": [],
}


def a_patch(expected_seq: int = 0, **members: Any) -> dict[str, Any]:
    return {"_schema_version": "2.1", "expected_seq": expected_seq, "set": {"status": "BUSY"} | members}


@dataclass(frozen=True)
class Service:
    """A running service."""

    port: int
    root: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def post(self, path: str, document: Any, **headers: str) -> Reply:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return self.ask("POST", path, body, {"Content-Type": "application/json", **headers})

    def boot(self, objective: str = "Move the invoices.", **members: Any) -> str:
        reply = self.post("/runs/boot", {"objective": objective, **members})
        assert reply.status == 200, reply.content
        run_id: str = reply.json()["run_id"]
        return run_id


def environment(**members: str) -> dict[str, str]:
    """As a user has it who has activated the environment that the tests run in, without settings of the overlay."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # noqa: PTH120  # not resolved: a venv is a link
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AOS_", "OVERLAY_", "AAL_"))}
    return kept | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **members}


@contextmanager
def serving(root: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> Iterator[Service]:
    """The service of a folder of runs, started from inside the overlay's folder."""
    command = [sys.executable, "-W", "error", "-m", "aos_context.cli", "serve", "--port", "0", *arguments]
    env = environment(AOS_CONTEXT_ROOT=str(root), **(variables or {}))
    with subprocess.Popen(command, cwd=OVERLAY, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            yield Service(int(said.rpartition(":")[2]), root)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
    assert process.returncode == 0


def run_cli(*arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "aos_context.cli", *arguments],
        cwd=OVERLAY,
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
