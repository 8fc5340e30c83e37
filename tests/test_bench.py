"""The bench measures what it says it does. Speed is never judged here: only the form, and that no call failed."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
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
    from collections.abc import AsyncIterator, Callable, Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "TOOLS" / "bench.py"
PARTS = ROOT / "TOOLS" / "bench"
LIMIT_S = 120
EVERYWHERE = (
    *("bus-python", "plain-python", "loop-python", "bus-c", "plain-c", "loop-c", "bus-worker", "bare-worker"),
    *("bus-http", "aiohttp-proxy", "http-service", "bus-refused", "starlette-ledger", "starlette"),
)
"""What is measured where nothing is asked for."""


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
    """Every target once but the peers. No setting of the caller may reach the bus; this one would stop its start."""
    file = tmp_path_factory.mktemp("bench") / "found.json"
    names = ",".join([*EVERYWHERE, "bus-root", "bus-root-sleepers"])
    return bench("--markdown", "--peers", "--crowd", "2", "--only", names, file=file, AAL_SLOTS="none at all")


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
    given = {"paths": ["/echo"], "body": "{}", "connections": 3, "seconds": 0.1, "warmup_s": 0.0, "status": 200}
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
    assert whole.targets() >= {
        "bus-python",
        "bus-worker",
        "bus-http",
        "bus-refused",
        "bus-root-sleepers",
        "loop-python",
    }
    cpu_ms = [row["cpu_ms"] for row in whole.report["rows"]]
    assert None not in cpu_ms
    assert sum(cpu_ms) > 0  # a row's few calls may take less than a tick of that clock, which is 10 ms


def test_a_whole_run_takes_the_ratios_of_the_bus_over_each_rival(whole: Finished) -> None:
    pairs = {(ratio["target"], ratio["against"]) for ratio in whole.report["ratios"]}
    assert pairs >= {("bus-python", "plain-python"), ("bus-worker", "bare-worker"), ("bus-http", "aiohttp-proxy")}
    assert all(ratio["cpu_ms"] > 0 for ratio in whole.report["ratios"])


def test_a_whole_run_measures_the_memory_of_a_crowd_and_holds_it_against_the_goals(whole: Finished) -> None:
    crowd = whole.report["crowd"]
    assert (crowd["overlays"], whole.report["crowd_error"]) == (2, None)
    assert crowd["called"]["rss_mb"] > 0
    assert (crowd["called"]["processes"] > 1, crowd["idle"]["processes"]) == (True, 1)
    verdicts = {goal["what"]: goal for goal in whole.report["goals"]}
    assert verdicts["the bus process, each overlay called"]["found"] == crowd["called"]["rss_mb"]
    assert verdicts["a C program / webhook"]["found"] is None
    assert "| a C program / webhook | - | >= 0.75 x | 1 x | not measured |" in whole.stdout


def test_without_names_every_target_is_measured_but_the_peers(part: Callable[[str], ModuleType]) -> None:
    targets = part("targets")
    assert tuple(target.name for target in targets.WITHOUT_PEERS) == EVERYWHERE
    assert {target.server for target in targets.BESIDE_PEERS} >= targets.PEERS


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
    assert split(answer) == (403, b"four", False)


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


@pytest.fixture
async def echoing() -> AsyncIterator[Echoing]:
    """A server that says ok to everything, with what it was asked."""
    echoing = Echoing()
    async with await asyncio.start_server(echoing.serve, "127.0.0.1", 0) as server:
        echoing.port = port_of(server)
        yield echoing


class Echoing:
    """Says ok to each request; with `closes` it ends the connection after each, and says so."""

    def __init__(self) -> None:
        self.port = 0
        self.closes = False
        self.heads: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.read(65536):
            self.heads.append(request.split(b"\r\n", 1)[0].decode())
            writer.write(
                http(200, b'{"ok":true}').replace(b"X\r\n", b"X\r\nConnection: close\r\n" * self.closes or b"X\r\n")
            )
            if self.closes:
                break
        writer.close()


async def test_calls_at_a_rate_are_no_more_than_are_due(part: Callable[[str], ModuleType], echoing: Echoing) -> None:
    tally = await part("load").run(job(part, echoing.port, rate=50.0, seconds=0.2))
    assert (tally.errors, tally.first_error) == (0, None)
    assert 0 < tally.total <= 10


async def test_calls_at_a_rate_are_charged_from_when_they_were_due(
    part: Callable[[str], ModuleType], echoing: Echoing
) -> None:
    """A million calls a second are due: each answer comes later after its call was due than the one before."""
    tally = await part("load").run(job(part, echoing.port, rate=1e6, connections=1))
    assert len(tally.latencies) > 1
    assert tally.latencies == sorted(tally.latencies)


async def test_the_load_takes_its_paths_in_turn_and_its_method(
    part: Callable[[str], ModuleType], echoing: Echoing
) -> None:
    await part("load").run(job(part, echoing.port, paths=["/a", "/b"], method="GET", connections=1))
    assert echoing.heads[:3] == ["GET /a HTTP/1.1", "GET /b HTTP/1.1", "GET /a HTTP/1.1"]


async def test_a_connection_that_the_server_ends_after_its_answer_is_made_anew(
    part: Callable[[str], ModuleType], echoing: Echoing
) -> None:
    echoing.closes = True
    tally = await part("load").run(job(part, echoing.port, connections=1))
    assert (tally.errors, tally.first_error) == (0, None)
    assert tally.total > 1


async def test_the_load_tells_of_each_interval(part: Callable[[str], ModuleType], echoing: Echoing) -> None:
    told: list[Any] = []
    last = await part("load").run(job(part, echoing.port, seconds=0.3, every_s=0.1), told.append)
    assert told
    assert sum(tally.seconds for tally in [*told, last]) == pytest.approx(0.3)
    assert len(echoing.heads) == sum(tally.total for tally in [*told, last])


def test_the_cpu_time_of_a_tree_has_that_of_children_which_have_ended(part: Callable[[str], ModuleType]) -> None:
    cpu_s = part("tree").cpu_s
    before_s = cpu_s(os.getpid())
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    assert cpu_s(os.getpid()) - before_s > 0.15


def test_a_tree_counts_its_processes_and_their_descriptors(part: Callable[[str], ModuleType]) -> None:
    look = part("tree").look
    alone = look(os.getpid())
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        together = look(os.getpid())
        assert child.stdin is not None
        child.stdin.close()
    assert together.processes == alone.processes + 1
    assert together.tree_fds >= alone.tree_fds + 4  # our end of the pipe, and three of its own
    assert together.fds == alone.fds + 1


def tree_of(part: Callable[[str], ModuleType], rss_mb: float, fds: int = 20, pss_mb: float | None = 90.0) -> Any:
    return part("tree").Tree(rss_mb=rss_mb, pss_mb=pss_mb, fds=fds, tree_fds=50, processes=5)


def test_what_grows_only_while_it_warms_up_is_flat(part: Callable[[str], ModuleType]) -> None:
    trees = [tree_of(part, rss_mb) for rss_mb in (40, 60, 70, 71, 70, 72, 71, 72)]
    assert all(found.is_flat for found in part("flat").flatness(trees))


def test_what_goes_on_growing_is_not_flat(part: Callable[[str], ModuleType]) -> None:
    trees = [tree_of(part, 70 + 3 * n, fds=20 + 4 * n) for n in range(8)]
    found = {flat.what: flat for flat in part("flat").flatness(trees)}
    assert [what for what, flat in found.items() if not flat.is_flat] == [
        "memory of the bus (RSS)",
        "descriptors of the bus",
    ]
    memory = found["memory of the bus (RSS)"]
    assert (memory.before, memory.after, memory.allowed) == (77.5, 89.5, 4)


@pytest.mark.parametrize(("looks", "pss_mb"), [(3, 90.0), (8, None)])
def test_what_cannot_be_judged_is_not_called_flat(
    part: Callable[[str], ModuleType], looks: int, pss_mb: float | None
) -> None:
    trees = [tree_of(part, 70, pss_mb=pss_mb) for _ in range(looks)]
    found = {flat.what: flat.is_flat for flat in part("flat").flatness(trees)}
    assert not found["memory of the tree (PSS)"]


def test_a_sparkline_goes_from_the_lowest_to_the_highest(part: Callable[[str], ModuleType]) -> None:
    sparkline = part("soak_report").sparkline
    assert sparkline([0, 7, None, 3.5, 0]) == "▁█ ▅▁"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([0, 1, 0, 0], width=2) == "█▁"
    assert sparkline([]) == ""


def test_a_soak_tells_of_each_interval_and_gives_a_verdict(tmp_path: Path) -> None:
    file, table = tmp_path / "found.json", tmp_path / "found.csv"
    found = bench("--soak", "0.01", "--every", "0.1", "--rate", "20", "--csv", str(table), file=file)
    assert found.status in (0, 1), found.stderr
    assert [moment["first_error"] for moment in found.report["moments"] if moment["errors"]] == []
    lines = table.read_text().splitlines()
    assert lines[0].startswith("at_s,calls,errors,first_error,p50_ms,p99_ms,rss_mb,pss_mb,fds")
    assert len(lines) == 1 + len(found.report["moments"])
    assert "the verdict: held" in found.stdout or "the verdict: NOT held" in found.stdout


def sample(part: Callable[[str], ModuleType], calls_s: float, p50_ms: float = 1.0) -> Any:
    return part("samples").Sample(calls_s, p50_ms, None, None, 0, None)


def test_a_goal_is_held_against_the_best_rival_of_each_round(part: Callable[[str], ModuleType]) -> None:
    rates = {"bus-python": (900, 800, 850), "webhook-python": (100, 80, 90), "lighttpd-python": (90, 100, 90)}
    samples = {(name, 16): [sample(part, rate) for rate in of] for name, of in rates.items()}
    verdict = part("goals").judge(samples, None)[0]
    assert (verdict.found, verdict.met, verdict.aim_met) == (9, True, False)
    assert verdict.words == "met, aim not met"


def test_a_goal_that_wants_at_most_so_much_is_not_met_above_it(part: Callable[[str], ModuleType]) -> None:
    verdict = part("goals").judge({("bus-python", 1): [sample(part, 300, p50_ms=2.6)]}, None)[1]
    assert (verdict.found, verdict.words) == (2.6, "NOT met")


def test_a_goal_that_was_not_measured_is_neither_met_nor_missed(part: Callable[[str], ModuleType]) -> None:
    verdicts = part("goals").judge({}, None)
    assert {(verdict.met, verdict.aim_met, verdict.words) for verdict in verdicts} == {(None, None, "not measured")}


def test_a_measurement_that_fails_is_an_error_and_the_others_go_on(
    part: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """There is no folder to run the loop in."""
    targets = part("targets")
    [loop] = [target for target in targets.TARGETS if target.name == "loop-c"]
    plan = targets.Plan([loop], [1], 0.1, 1)
    found = part("measure").measure(loop, 1, plan, part("servers").Servers(tmp_path))
    assert (found.errors, found.cpu_ms) == (1, None)
    assert "echo_c" in found.first_error


def test_a_program_that_does_not_start_is_an_error_of_the_loop(
    part: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    [loop] = [target for target in part("targets").TARGETS if target.name == "loop-c"]
    plan = part("targets").Plan([loop], [2], 0.1, 1)
    (tmp_path / "overlays" / "echo_c").mkdir(parents=True)
    found = part("measure").measure(loop, 2, plan, part("servers").Servers(tmp_path))
    assert found.errors == 2
    assert "No such file or directory: './echo'" in found.first_error


def test_both_peers_run_the_programs_of_the_bus_with_its_interpreter(part: Callable[[str], ModuleType]) -> None:
    peers, folder = part("peers"), Path("/work folder")
    [python, c] = peers.hooks_of(folder)
    assert python["execute-command"] == "/work folder/python/bin/python3"
    assert python["pass-arguments-to-command"] == [{"source": "string", "name": "run.py"}]
    assert c["execute-command"] == "/work folder/overlays/echo_c/echo"
    assert 'cgi.assign = (".py" => "/work folder/python/bin/python3", "/echo" => "")' in peers.lighttpd_conf(folder, 1)


PEERS = {"webhook-python", "webhook-c", "lighttpd-python", "lighttpd-c"}
NO_PEERS = not all(
    shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") for name in ("webhook", "lighttpd")
)


@pytest.mark.skipif(NO_PEERS, reason="webhook and lighttpd are not installed")
def test_the_peers_answer_every_call(tmp_path: Path) -> None:
    found = bench("--only", ",".join(PEERS), file=tmp_path / "found.json")
    assert (found.status, found.targets()) == (0, PEERS), found.stdout


@pytest.mark.parametrize("cgi", [False, True])
@pytest.mark.parametrize("program", ["python", "c"])
def test_the_echo_programs_do_the_same_for_a_server_that_gives_no_stdin(
    part: Callable[[str], ModuleType], tmp_path: Path, program: str, cgi: bool
) -> None:
    layout = part("layout")
    if program == "c" and not layout.has_cc():
        pytest.skip("there is no C compiler (cc)")
    layout.write_program(tmp_path, "echo", layout.PROGRAMS[program])
    argv, home = layout.PROGRAMS[program].command, tmp_path / "overlays" / "echo"
    env = layout.environment(tmp_path) | ({"GATEWAY_INTERFACE": "CGI/1.1"} if cgi else {})
    body = b'{"overlay":"x","payload":{"a":[1,{"b":"}"}]}}'
    by_stdin = subprocess.run(argv, cwd=home, env=env, input=body, capture_output=True, check=True).stdout
    env["REQUEST_BODY"] = body.decode()
    by_variable = subprocess.run(
        argv, cwd=home, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True
    ).stdout
    header = b"Content-Type: application/json\n\n" if cgi else b""
    assert by_stdin == by_variable == header + b'{"ok":true,"result":{"a":[1,{"b":"}"}]}}'


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Callable[[str], ModuleType]) -> Path:
    """A folder whose `apt-get` is the first on the PATH: `download NAME` gives NAME_1.deb of that folder, or fails."""
    folder = tmp_path / "apt"
    folder.mkdir()
    script = folder / "apt-get"
    script.write_text(f'#!/bin/sh\nfor name; do :; done\ncp "{folder}/${{name}}_1.deb" . || exit 100\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(part("peers"), "installed", lambda _: None)
    return folder


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb")
def test_a_peer_that_is_missing_is_fetched_and_unpacked_without_being_installed(
    apt: Path, tmp_path: Path, part: Callable[[str], ModuleType]
) -> None:
    pack(apt / "webhook_1.deb", tmp_path / "package", "webhook", "#!/bin/sh\necho webhook version 1\n")
    found = part("peers").find("webhook", tmp_path)
    assert found == tmp_path / "peers" / "usr" / "bin" / "webhook"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb")
def test_a_peer_that_does_not_run_is_told_with_its_own_words(
    apt: Path, tmp_path: Path, part: Callable[[str], ModuleType]
) -> None:
    pack(apt / "webhook_1.deb", tmp_path / "package", "webhook", "#!/bin/sh\necho no library >&2\nexit 127\n")
    with pytest.raises(part("layout").BenchError, match="webhook does not run here: no library"):
        part("peers").find("webhook", tmp_path)


def pack(package: Path, root: Path, name: str, program: str) -> None:
    """Make a Debian package with one program."""
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: d\n"
    )
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / name).write_text(program)
    (root / "usr" / "bin" / name).chmod(0o755)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, package], check=True, capture_output=True)


@pytest.mark.usefixtures("apt")
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb")
def test_a_peer_that_cannot_be_fetched_is_left_out_with_the_reason(
    tmp_path: Path, part: Callable[[str], ModuleType]
) -> None:
    options = part("options")
    plan = options.plan_of(options.parse(["--only", "webhook-python,starlette"]), tmp_path)
    assert [target.name for target in plan.targets] == ["starlette"]
    [note] = plan.notes
    assert note.startswith("webhook-python was left out: webhook is not on the PATH, and apt-get does not fetch it: ")


def test_the_plan_with_peers_is_at_1_and_16_connections_and_has_a_crowd(
    part: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = part("options")
    monkeypatch.setattr(part("peers"), "find", lambda name, _: Path(f"/found/{name}"))
    plan = options.plan_of(options.parse(["--peers"]), tmp_path)
    assert (plan.connections, plan.crowd, plan.judged) == ((1, 16), 100, True)
    assert plan.found == {name: Path(f"/found/{name}") for name in ("lighttpd", "webhook")}


def test_a_siege_measures_honest_clients_alone_and_beside_both_kinds_of_others(tmp_path: Path) -> None:
    done = bench("--hostile", "--connections", "8", file=tmp_path / "found.json")
    assert done.report["errors"] == 0, done.stdout + done.stderr
    assert {kept["path"] for kept in done.report["kept"]} == {"/invoke/echo_worker", "/"}
    assert all(kept[situation] > 0 for kept in done.report["kept"] for situation in ("alone", "fair", "besieged"))
    assert all(done.report["hostile"].values()), done.report["hostile"]
    assert "the verdict: " in done.stdout.splitlines()[-1]


async def test_hostile_clients_count_what_they_met_by_kind(part: Callable[[str], ModuleType]) -> None:
    hostile = part("hostile")
    said: list[str] = []
    met = asyncio.Event()
    kinds = len(hostile.KINDS)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"Bearer aal_xxx" in await reader.read(65536):
            writer.write(http(401, b"{}"))
            if await reader.read(1):  # it has had its answer, and comes again
                met.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        await hostile.run(hostile.Siege(port_of(server), "/invoke/x", "aal_t", kinds), met.wait, said.append)
    assert said[0] == "begun"
    counts = json.loads(said[1])
    assert counts.keys() == hostile.KINDS.keys()
    assert counts["slow_head"] == {"held": 1}
    assert counts["unauthenticated"]["401"] > 0


def a_siege(part: Callable[[str], ModuleType], *, of_fair: float = 1.0, errors: int = 0, idle: str = "") -> Any:
    siege = part("siege")
    kept = siege.Kept("/", 100.0, 50.0, 50.0 * of_fair, of_fair, 0.5)
    hostile = {kind: {} if kind == idle else {"closed": 1} for kind in siege.KINDS}
    return siege.SiegeFound(siege.SiegePlan(1.0, 1, 16), (kept,), hostile, errors, None)


def test_a_siege_holds_where_honest_clients_keep_enough_and_nothing_failed(part: Callable[[str], ModuleType]) -> None:
    assert a_siege(part, of_fair=0.8).held
    assert not a_siege(part, of_fair=0.79).held
    assert not a_siege(part, errors=1).held


def test_a_siege_without_one_of_its_kinds_does_not_hold_and_says_so(part: Callable[[str], ModuleType]) -> None:
    found = a_siege(part, idle="slow_body")
    assert (found.idle, found.held) == (["slow_body"], False)
    assert "hostile clients that did nothing: slow_body" in list(part("siege_report").tell_siege(found))
