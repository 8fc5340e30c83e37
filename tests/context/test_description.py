"""The flow that users were promised, word for word: alone by their own shell, and step by step through a bus."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import pytest

from tests.context import described
from tests.context.flows import bus_with, copy_overlay, invoke, needs_curl, result, shell
from tests.context.served import FACT, PATIENCE_S, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import Popen

    from tests.support import Server

NAME = "aos_context_v2_1"
"""What the commands call the overlay's folder."""

CURLRC = 'write-out = "%{stderr}%{http_code}\\n"\n'
"""With this in its home, a shell's curl tells the status of each answer beside what the command prints."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user has the overlay's folder, under the name that the commands have for it."""
    folder = tmp_path_factory.mktemp("described")
    (folder / ".curlrc").write_text(CURLRC)
    copy_overlay(folder / NAME)
    return folder


@dataclass(frozen=True)
class Shell:
    """A user's, beside the service that they have started."""

    home: Path
    address: str

    def play(self, commands: str, **names: str) -> tuple[list[Any], list[int]]:
        """What the commands print, as JSON documents, and the statuses. `names` go in for what users fill in."""
        for name, value in ({"<run_id>": "", "batch_...": "", "<id>": ""} | names).items():
            assert value or name not in commands
            commands = commands.replace(name, value)
        said = shell(commands.replace("127.0.0.1:8000", self.address), self.home, HOME=str(self.home))
        return documents(said.stdout), [int(line) for line in said.stderr.split()]

    def one(self, commands: str, **names: str) -> Any:
        """The one document that the commands print, which answer 200."""
        [document], statuses = self.play(commands, **names)
        assert statuses == [200], document
        return document


def documents(text: str) -> list[Any]:
    found, decoder, text = [], json.JSONDecoder(), text.strip()
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:].lstrip()
    return found


@contextmanager
def started(home: Path) -> Iterator[Shell]:
    """The service as the command to start it does, but for its port, which is one that listens already."""

    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = described.SERVE.replace("--port 8000", f"--fd {listening.fileno()}")
        assert command != described.SERVE
        process: Popen[bytes] = subprocess.Popen(
            ["bash", "-euc", command.rstrip()],
            cwd=home,
            env=environment(),
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            yield Shell(home, f"127.0.0.1:{listening.getsockname()[1]}")
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def data_of(commands: str) -> dict[str, Any]:
    """What the last of the commands sends."""
    sent = re.findall(r"-d '(\{.*?\})'", commands, re.DOTALL)
    document: dict[str, Any] = json.loads(sent[-1])
    return document


def test_the_demo_is_played_by_its_command(home: Path) -> None:
    said = shell(described.DEMO, home).stdout
    assert "milestone  episode 1, 1 committed" in said
    assert (home / NAME / "runs/memory.v2.1.sqlite").is_file()


@needs_curl
def test_the_commands_one_by_one_do_what_they_were_described_to_do(home: Path) -> None:
    with started(home) as user:
        booted = user.one(described.BOOT)
        run_id = booted["run_id"]
        assert booted["working_set"]["objective"] == data_of(described.BOOT)["objective"]

        [before, updated], statuses = user.play(described.UPDATE, **{"<run_id>": run_id})
        assert (statuses, before["_update_seq"], updated["update_seq"]) == ([200, 200], 0, 1)
        assert updated["working_set"] | data_of(described.UPDATE)["patch"]["set"] == updated["working_set"]
        [_, stale], statuses = user.play(described.UPDATE, **{"<run_id>": run_id})
        assert (statuses, stale["code"], stale["current_seq"]) == ([200, 409], "STALE", 1)

        reached = user.one(described.MILESTONE, **{"<run_id>": run_id})
        assert reached["episode"] | data_of(described.MILESTONE) == reached["episode"]
        assert reached["memory"] is None

        proposed = user.one(described.PROPOSE, **{"<run_id>": run_id})
        assert proposed["staged"] == 1
        names = {"<run_id>": run_id, "batch_...": proposed["batch_id"]}
        [refused], statuses = user.play(described.COMMIT, **names)
        assert (statuses, refused["code"]) == ([403], "OUTSIDE_MILESTONE")
        assert user.one(described.SEARCH, **{"<run_id>": run_id}) == {"hits": []}

        packed = user.one(described.SNAPSHOT, **{"<run_id>": run_id})
        assert packed["manifest"]["pointers"] == data_of(described.SNAPSHOT)["pointers"]
        names = {"<run_id>": run_id, "<id>": packed["pack_id"]}
        loaded = user.one(described.LOAD, **names)
        assert loaded["from_run_id"] == run_id != loaded["run_id"]
        assert loaded["working_set"]["next_action"] == updated["working_set"]["next_action"]


@needs_curl
def test_the_whole_flow_in_one_script_ends_with_the_memory_committed_and_packed(home: Path) -> None:
    with started(home) as user:
        [updated, reached, packed], statuses = user.play(described.WHOLE)
        assert statuses == [200] * 5
        assert updated["working_set"]["next_action"] == "Test memory"
        assert [item["content"] for item in reached["memory"]["items"]] == ["Test memory item"]
        assert reached["episode"]["memory"]["batch_id"] == reached["memory"]["batch_id"]
        assert (home / NAME / packed["pack_path"]).is_file()
        assert packed["manifest"]["episode_id"] == reached["episode"]["episode_id"]


FILLED_IN = {
    '"event_id": "..."': '"event_id": "evt_1"',
    "# ... other fields": (
        '"data": {"update_seq": 1, "patch": {"_schema_version": "2.1", "expected_seq": 0, "set": {"status": "BUSY"}}, '
        '"evicted": [], "updated_at": "2026-01-18T00:00:00Z", "sha256": "0" * 64},'
    ),
    "{...}": repr(FACT),
}
"""What the Python lines leave open."""

TOLD = """
import json
print(json.dumps({
    "before": ws, "after": wsm.load(), "seq": result.update_seq, "event": next(ledger.read()),
    "items": commit_result.items, "found": len(memory.search("invoices", {}, 10)),
}))
"""


def test_the_python_lines_run_with_what_they_leave_open_filled_in(home: Path) -> None:
    script = described.PYTHON
    for open_, filled in FILLED_IN.items():
        assert open_ in script
        script = script.replace(open_, filled)
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", script + TOLD],
        cwd=home / NAME, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    ids = {name: told["before"][name] for name in ("task_id", "thread_id", "run_id")}
    assert ids == {"task_id": "task_123", "thread_id": "thread_456", "run_id": "run_789"}
    assert (told["seq"], told["after"]["_update_seq"], told["after"]["next_action"]) == (1, 1, "Do something")
    assert (told["event"]["event_id"], told["event"]["event_type"]) == ("evt_1", "WS_UPDATE_APPLIED")
    assert (told["items"][0]["content"], told["found"]) == (FACT["content"], 1)


# The same steps with the same data through the bus


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Server]:
    with bus_with(home / NAME, tmp_path_factory.mktemp("bus")) as server:
        yield server


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A service on a folder in which nothing has happened."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / ".curlrc").write_text(CURLRC)
    copy_overlay(folder / NAME)
    with started(folder) as user:
        yield user


SEARCHED = {
    name: int(value) if name == "top_k" else value
    for name, value in parse_qsl(described.SEARCH.partition("?")[2].split('"')[0])
}

WITH_MEMORY = described.MILESTONE.replace('"reason"', '"memory_batch_id": "batch_...", "reason"')


def steps_alone(user: Shell) -> dict[str, Any]:
    """The answer of each step."""
    booted = user.one(described.BOOT)
    run = {"<run_id>": booted["run_id"]}
    [ws, updated], _ = user.play(described.UPDATE, **run)
    proposed = user.one(described.PROPOSE, **run)
    reached = user.one(WITH_MEMORY, **run, **{"batch_...": proposed["batch_id"]})
    found = user.one(described.SEARCH, **run)
    packed = user.one(described.SNAPSHOT, **run)
    loaded = user.one(described.LOAD, **run, **{"<id>": packed["pack_id"]})
    return {"boot": booted, "ws": ws, "update": updated, "propose": proposed, "milestone": reached,
            "search": found, "snapshot": packed, "load": loaded}  # fmt: skip


def steps_through(bus: Server) -> dict[str, Any]:
    """The result of each step."""
    booted = result(bus, "boot", "OPEN", **data_of(described.BOOT))
    run = {"run_id": booted["run_id"]}
    ws = result(bus, "ws", "CLEAR", **run)
    updated = result(bus, "update", "OPEN", **run, **data_of(described.UPDATE))
    proposed = result(bus, "propose", "OPEN", **run, **data_of(described.PROPOSE))
    refused = invoke(bus, "commit", "OPEN", **run, **data_of(described.COMMIT) | {"batch_id": proposed["batch_id"]})
    assert refused["code"] == "ERR_PHASE_DENIED"
    named = {"memory_batch_id": proposed["batch_id"]}
    reached = result(bus, "milestone", "SEAL", **run, **data_of(WITH_MEMORY) | named)
    found = result(bus, "search", "CLEAR", **run, **SEARCHED)
    packed = result(bus, "snapshot", "OPEN", **run, **data_of(described.SNAPSHOT))
    loaded = result(bus, "load", "OPEN", **data_of(described.LOAD) | {"pack_path": packed["pack_path"]})
    return {"boot": booted, "ws": ws, "update": updated, "propose": proposed, "milestone": reached,
            "search": found, "snapshot": packed, "load": loaded}  # fmt: skip


IDS = re.compile(r"(?<![0-9a-z])([a-z]+_)?[0-9a-f]{16,}(-[0-9a-f]+)*(?![0-9a-z])")
TIMES = re.compile(r"(?!2026-01-18T00:00:00Z)\d{4}-\d\d-\d\dT[\d:.]+Z")
CALLERS_OWN = ("actor", "committed_by", "packed_by", "request_id")
"""Who called: nobody alone, the request of the call on the bus. So lines of the ledger have other sizes, too."""


def shape(answer: Any) -> Any:
    """An answer without its ids and times, which no two calls have in common."""
    if isinstance(answer, dict):
        return {name: shape(value) for name, value in answer.items() if name not in (*CALLERS_OWN, "bytes")}
    if isinstance(answer, list):
        return [shape(value) for value in answer]
    if not isinstance(answer, str):
        return answer
    text = TIMES.sub("TIME", IDS.sub(r"\1ID", answer))
    return re.sub(r"^\S*/(?=run_ID/resume/)", "", text)


@needs_curl
def test_through_the_bus_the_same_steps_have_the_same_answers_as_alone(alone: Shell, bus: Server) -> None:
    by_shell, by_bus = steps_alone(alone), steps_through(bus)
    for step, answer in by_shell.items():
        assert shape(by_bus[step]) == shape(answer), step
    [found], [same] = by_shell["search"]["hits"], by_bus["search"]["hits"]
    assert found["item"]["content"] == "User prefers Python over JavaScript"
    assert found["item"]["committed_by"] is None
    line = bus.line_of(same["item"]["committed_by"])
    assert (line["capability"], line["phase"]) == ("milestone", "SEAL")
