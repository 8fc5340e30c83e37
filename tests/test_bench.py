"""The bench measures what it says it does. Speed is never judged here: only the form, and that no call failed."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "TOOLS" / "bench.py"
PARTS = ROOT / "TOOLS" / "bench"
LIMIT_S = 120


@dataclass(frozen=True)
class Finished:
    """A run of the bench that has ended; `report` is what it wrote with --json."""

    status: int
    stdout: str
    stderr: str
    report: dict[str, Any]

    def targets(self) -> set[str]:
        return {row["target"] for row in self.report["rows"]}


def bench(*arguments: str, file: Path | None = None, **env: str) -> Finished:
    short = ["--seconds", "0.1", "--runs", "1", "--connections", "2"]
    argv = [sys.executable, str(BENCH), *short, *arguments, *(["--json", str(file)] if file else [])]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT_S, env={**os.environ, **env})
    report = json.loads(file.read_text()) if file and file.exists() else {}
    return Finished(done.returncode, done.stdout, done.stderr, report)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Every target once. A setting of the caller must not reach the measured bus; this one would stop its start."""
    file = tmp_path_factory.mktemp("bench") / "found.json"
    return bench("--markdown", file=file, AAL_SLOTS="none at all")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the bench by its name, for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(PARTS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == PARTS:
            del sys.modules[name]


def job(part: Callable[[str], ModuleType], port: int, **changes: Any) -> Any:
    given = {"path": "/echo", "body": "{}", "connections": 3, "seconds": 0.1, "warmup_s": 0.0, "status": 200}
    return part("load").Job(**{**given, "port": port, "must": '"ok":true', **changes})


async def answering(answer: bytes) -> asyncio.Server:
    """A server that gives one fixed answer to each request, and ends the connection where the answer is empty."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answer and await reader.read(65536):
            writer.write(answer)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


def port_of(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])


def http(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def test_a_whole_run_measures_the_bus_and_its_rivals_without_an_error(whole: Finished) -> None:
    assert (whole.status, [row for row in whole.report["rows"] if row["errors"]]) == (0, []), whole.stderr
    assert whole.targets() >= {"bus-python", "bus-http", "bus-refused", "plain-python", "loop-python", "aiohttp-proxy"}
    assert all(row["cpu_ms"] > 0 for row in whole.report["rows"])


def test_a_whole_run_takes_the_ratios_of_the_bus_over_each_rival(whole: Finished) -> None:
    pairs = {(ratio["target"], ratio["against"]) for ratio in whole.report["ratios"]}
    assert pairs >= {("bus-python", "plain-python"), ("bus-python", "loop-python"), ("bus-http", "aiohttp-proxy")}
    assert all(ratio["cpu_ms"] > 0 for ratio in whole.report["ratios"])


def test_markdown_has_the_figures_the_ratios_and_the_machine(whole: Finished) -> None:
    assert "| bare Starlette echo |" in whole.stdout
    assert "| bus-refused / starlette |" in whole.stdout
    assert whole.report["machine"] in whole.stdout


def test_only_measures_what_it_names_and_leaves_no_process_behind(tmp_path: Path) -> None:
    found = bench("--only", "starlette", file=tmp_path / "found.json", TMPDIR=str(tmp_path))
    assert (found.status, found.targets(), found.report["ratios"]) == (0, {"starlette"}, [])
    assert not [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("TMPDIR") == str(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_bench_that_is_terminated_ends_its_servers(tmp_path: Path) -> None:
    argv = [sys.executable, str(BENCH), "--seconds", "60", "--only", "starlette", "--connections", "1"]
    with subprocess.Popen(argv, env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL) as running:
        started = descendants(running, "rivals.py")
        running.send_signal(signal.SIGTERM)
        assert running.wait(LIMIT_S) == 128 + signal.SIGTERM
    assert started
    assert psutil.wait_procs(started, LIMIT_S)[1] == []
    assert list(tmp_path.iterdir()) == []


def descendants(process: subprocess.Popen[bytes], script: str) -> list[psutil.Process]:
    """The descendants that run this script, as soon as there are some; none once the process has ended."""
    while process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        if found := [child for child in children if any(script in word for word in child.cmdline())]:
            return found
    return []


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    found = bench("--only", "starlet")
    assert found.status == 2
    assert "starlet unknown, allowed: aiohttp-proxy," in found.stderr


def test_a_server_that_does_not_start_is_told_with_its_own_words(part: Callable[[str], ModuleType]) -> None:
    servers = part("servers")
    with pytest.raises(servers.BenchError, match=r"http-service does not start:(.|\n)*address already in use"):
        raise_of_taken_port(servers)


def raise_of_taken_port(servers: ModuleType) -> None:
    with socket.socket() as taken, tempfile.TemporaryDirectory() as folder, servers.Servers(Path(folder)) as running:
        taken.bind(("127.0.0.1", 0))
        running.ports["http-service"] = taken.getsockname()[1]
        running.start(["http-service"])


async def test_the_load_counts_good_answers_with_their_latencies(part: Callable[[str], ModuleType]) -> None:
    async with await answering(http(200, b'{"ok":true}')) as server:
        tally = await part("load").run(job(part, port_of(server)))
    found = json.loads(tally.to_json())
    assert (found["errors"], found["first_error"]) == (0, None)
    assert 0 < found["calls"] <= found["total"]
    assert 0 < found["p50_ms"] <= found["p99_ms"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (http(500, b'{"ok":true}'), "status 500"),
        (http(200, b'{"ok":false}'), "status 200: {\"ok\":false}"),
        (b"HTTP/1.1 200 X\r\n\r\n", "without Content-Length"),
        (b"", "the connection was lost"),
    ],
)  # fmt: skip
async def test_the_load_counts_each_bad_answer_as_an_error(
    part: Callable[[str], ModuleType], answer: bytes, reason: str
) -> None:
    async with await answering(answer) as server:
        tally = await part("load").run(job(part, port_of(server)))
    assert json.loads(tally.to_json())["calls"] == 0
    assert tally.errors > 0
    assert reason in tally.first_error


async def test_a_server_that_is_not_there_is_an_error_for_each_connection(part: Callable[[str], ModuleType]) -> None:
    async with await answering(b"") as server:
        port = port_of(server)
    tally = await part("load").run(job(part, port, connections=5))
    assert tally.errors >= 5
    assert "no connection" in tally.first_error


def test_an_answer_is_read_only_when_it_is_all_there(part: Callable[[str], ModuleType]) -> None:
    answer = http(403, b"four")
    split = part("load").split_answer
    assert [split(answer[:end]) for end in range(len(answer))] == [None] * len(answer)
    assert split(answer) == (403, b"four")


def test_percentiles_are_those_of_the_nearest_rank(part: Callable[[str], ModuleType]) -> None:
    percentile_ms = part("load").percentile_ms
    ordered = [n / 1000 for n in range(1, 101)]
    assert [percentile_ms(ordered, share) for share in (0.50, 0.99)] == [50, 99]
    assert percentile_ms([0.007], 0.99) == 7
    assert percentile_ms([], 0.5) is None


def test_a_ratio_is_the_median_of_the_ratios_within_each_round(part: Callable[[str], ModuleType]) -> None:
    """The machine slows by ten in the second round: medians taken apart would give 100 / 20."""
    median_ratio = part("report").median_ratio
    assert median_ratio([100.0, 10.0, 300.0], [200.0, 20.0, 10.0]) == 0.5
    assert median_ratio([100.0, None], [200.0, 7.0]) == 0.5
    assert median_ratio([None, 1.0], [1.0, 0.0]) is None
