"""What lines of the ledger cost: to append, verify, prove and find, beside what people would use instead.

    python TOOLS/bench/lines.py [--lines 1000000] [--rounds 5] [--json]

Each round appends the same records, in groups of 16 as calls come, to the ledger, to a file by `write` (a line each),
and to SQLite (a row each, in WAL mode, one transaction a group); without a sync and with one for each group. Then one
ledger of so many lines is verified, proved and searched. Two processes on one ledger are measured beside two with one
each, and calls of a worker with the ledger beside calls without any, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from bus import provenance, segments  # noqa: E402
from bus.chain import Chain  # noqa: E402
from bus.dispatch import Bus  # noqa: E402
from bus.envelopes import read_invocation  # noqa: E402
from bus.groups import Receipt  # noqa: E402
from bus.index import index_of  # noqa: E402
from bus.ledger import Ledger  # noqa: E402
from bus.model import new_request_id, now_ms  # noqa: E402
from bus.proofs import Prover  # noqa: E402
from bus.records import draft_call, environment_hash  # noqa: E402
from bus.settings import load  # noqa: E402
from bus.verification import verify  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bus.chain import Fsync
    from bus.model import Record
    from bus.verification import VerifyReport

GROUP = 16
ROUND_LINES = 20_000
SYNCED_LINES = 3_200
SEGMENT_BYTES = 64 << 20
LOOKS = 200
CALLERS = 16
CALLS = 4_000
ENVIRONMENT = {
    "python": "CPython 3.11",
    "platform": "Linux",
    "machine": "x86_64",
    "git_commit": None,
    "bus_version": "0",
}
ENVIRONMENT_HASH = environment_hash(ENVIRONMENT)
WORKER = ROOT / "TOOLS" / "bench" / "echo_worker.py"
BODY = b'{"phase": "OPEN", "data": {"text": "hello world", "x": 1}}'


def record(number: int) -> Record:
    """A call's record, as large as one is."""
    return {
        "type": "invoke",
        "timestamp_ms": now_ms(),
        "request_id": new_request_id(),
        "run_id": f"{number:064x}",
        "caller": "ci",
        "overlay": f"overlay-{number % 20}",
        "version": "1.0.0",
        "manifest_hash": "ab" * 32,
        "code_hash": "cd" * 32,
        "capability": "run",
        "phase": ("OPEN", "ALIGN", "CLEAR")[number % 3],
        "runner": "proc",
        "payload_hash": f"{number * 7:064x}",
        "result_hash": f"{number * 11:064x}",
        "ok": number % 50 != 0,
        "code": "OK" if number % 50 else "ERR_TIMEOUT",
        "duration_ms": 2.345,
        "queue_ms": 0.012,
        "cpu_ms": 1.234,
        "exit_code": 0,
        "admission": {"reserved_mb": 13.08, "basis": "measured", "waited_for": [], "ahead": 0, "evictions": 0},
        "memory": {"profile": "MINIMAL", "soft_mb": 512, "hard_mb": 1024, "tier": "LOCAL", "stress": 0.014,
                   "applied": [], "peak_mb": 11.879, "peak_floor_mb": 6.488},
        "sandbox": {"mode": "best-effort", "scope": "call", "enforced": ["read", "write", "network"], "missing": []},
        "deterministic": False,
        "environment_hash": ENVIRONMENT_HASH,
        "prev_size": number,
        "cost_cents": 0,
        "timeout_ms": 30000,
    }  # fmt: skip


def groups(count: int) -> Iterator[list[Record]]:
    for start in range(0, count, GROUP):
        yield [record(number) for number in range(start, min(count, start + GROUP))]


# Appending


def by_ledger(folder: Path, made: Sequence[list[Record]], fsync: Fsync) -> float:
    """Seconds, with everything that a line is: its canonical form, hash, chain and tree."""
    ledger = Ledger(folder / "provenance.jsonl", fsync=fsync, environment=ENVIRONMENT)
    ledger.open()

    async def append() -> float:
        began = time.perf_counter()
        for group in made:
            await asyncio.gather(*(ledger.submit(one) for one in group))
        return time.perf_counter() - began

    try:
        return uvloop.run(append())
    finally:
        ledger.close()


def by_file(folder: Path, made: Sequence[list[Record]], fsync: Fsync) -> float:
    """Seconds to write each record's JSON to a file of its own accord: no hash, no chain."""
    began = time.perf_counter()
    with open(folder / "plain.jsonl", "ab", buffering=0) as file:  # noqa: PTH123
        for group in made:
            file.writelines(json.dumps(one).encode() + b"\n" for one in group)  # unbuffered: a write(2) for each
            if fsync == "batch":
                os.fdatasync(file.fileno())
    return time.perf_counter() - began


def by_sqlite(folder: Path, made: Sequence[list[Record]], fsync: Fsync) -> float:
    """Seconds to insert each record's JSON with three columns to search by."""
    connection = sqlite3.connect(folder / "lines.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={'FULL' if fsync == 'batch' else 'OFF'}")
    connection.execute("CREATE TABLE line (seq INTEGER PRIMARY KEY, overlay TEXT, code TEXT, at INTEGER, record TEXT)")
    began = time.perf_counter()
    for group in made:
        connection.execute("BEGIN")
        for one in group:
            row = (one["overlay"], one["code"], one["timestamp_ms"], json.dumps(one))
            connection.execute("INSERT INTO line (overlay, code, at, record) VALUES (?, ?, ?, ?)", row)
        connection.execute("COMMIT")
    took = time.perf_counter() - began
    connection.close()
    return took


WAYS: dict[str, Callable[[Path, Sequence[list[Record]], Fsync], float]] = {
    "the ledger": by_ledger,
    "write() a line": by_file,
    "SQLite": by_sqlite,
}


def appending(rounds: int) -> dict[str, Any]:
    """Microseconds a line, by way, without and with a sync for each group; medians, and the ratios of each round."""
    found: dict[str, Any] = {}
    kinds: tuple[tuple[Fsync, int], ...] = (("never", ROUND_LINES), ("batch", SYNCED_LINES))
    for fsync, count in kinds:
        made = list(groups(count))
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(rounds):
            names = list(WAYS) if number % 2 else list(WAYS)[::-1]
            for name in names:
                with tempfile.TemporaryDirectory() as folder:
                    times[name].append(WAYS[name](Path(folder), made, fsync) / count * 1e6)
        ours = times["the ledger"]
        found[fsync] = {
            name: {
                "us": statistics.median(took),
                "ratio": statistics.median(a / b for a, b in zip(ours, took, strict=True)),
            }
            for name, took in times.items()
        }
    return found


# One ledger of many lines


def many(folder: Path, lines: int, say: Callable[[str], None]) -> dict[str, Any]:
    path = folder / "provenance.jsonl"
    say(f"writing {lines:,} lines")
    chain = Chain(path, "never", ENVIRONMENT, segment_bytes=SEGMENT_BYTES)
    groups_s = []
    with chain.locked():
        for group in groups(lines):
            drafts = [draft_call(one) for one in group]
            groups_s.append(_timed_ms(partial(chain.extend, drafts)) / 1000)
    chain.close()
    plain_bytes = segments.total_bytes(path)
    say("verifying")
    plain_ms = _verified_ms(path)
    say("compressing")
    compressed_ms = _timed_ms(partial(segments.compress, path))
    packed_bytes = segments.total_bytes(path)
    say("verifying what is compressed")
    packed_ms = _verified_ms(path)
    say("indexing")
    index = index_of(path)
    indexed_ms = 0.0 if index is None else _timed_ms(index.refresh)
    count = chain.seq
    return {
        "lines": count,
        "segments": len(segments.closed_firsts(path)) + 1,
        "written_per_s": count / sum(groups_s),
        "slowest_group_ms": max(groups_s) * 1000,
        "bytes_a_line": plain_bytes / count,
        "packed_bytes_a_line": packed_bytes / count,
        "index_bytes_a_line": path.with_suffix(".index").stat().st_size / count,
        "verified_per_s": count / plain_ms * 1000,
        "verified_packed_per_s": count / packed_ms * 1000,
        "compressed_s": compressed_ms / 1000,
        "indexed_s": indexed_ms / 1000,
        **_searched(path, count, say),
    }


def _verified_ms(path: Path) -> float:
    report: list[VerifyReport] = []
    took_ms = _timed_ms(lambda: report.append(verify(path)))
    if not report[0].ok:
        raise SystemExit(f"the ledger does not verify: line {report[0].first_bad}: {report[0].reason}")
    return took_ms


def _searched(path: Path, lines: int, say: Callable[[str], None]) -> dict[str, Any]:
    draw = random.Random(1)
    wanted = [draw.randint(1, lines) for _ in range(LOOKS)]
    say("finding")
    found = [_timed_ms(partial(provenance.read_line, path, seq)) for seq in wanted]
    say("filtering")
    filtered = [_timed_ms(lambda: provenance.tail(path, 10, overlay="overlay-7", ok=False)) for _ in range(LOOKS // 10)]
    say("proving")
    proofs = [_timed_ms(partial(_proved, path, seq)) for seq in wanted]
    return {"find": spread(found), "filter": spread(filtered), "prove": spread(proofs)}


def _proved(path: Path, seq: int) -> None:
    with Prover(path) as prover:
        prover.inclusion(seq)


def _timed_ms(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1000


def spread(figures_ms: Sequence[float]) -> dict[str, float]:
    ordered = sorted(figures_ms)
    return {"p50_ms": statistics.median(ordered), "p99_ms": ordered[int(0.99 * (len(ordered) - 1))]}


# Several processes


_WRITER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[1] + "/TOOLS/bench")
from pathlib import Path
import uvloop
import lines
from bus.ledger import Ledger
ledger = Ledger(Path(sys.argv[2]), fsync="batch", environment=lines.ENVIRONMENT)
ledger.open()
async def caller(count):
    for number in range(count):
        await ledger.submit(lines.record(number))
async def main():
    await caller(10)
    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(*(caller(int(sys.argv[3])) for _ in range(lines.CALLERS)))
uvloop.run(main())
ledger.close()
"""


def together(rounds: int) -> dict[str, float]:
    """Lines a second of two processes on one ledger, of two with one each, and the ratio; medians."""
    shared, apart = [], []
    for _ in range(rounds):
        shared.append(_two(["one", "one"]))
        apart.append(_two(["one", "other"]))
    ratio = statistics.median(a / b for a, b in zip(shared, apart, strict=True))
    return {"shared_per_s": statistics.median(shared), "apart_per_s": statistics.median(apart), "ratio": ratio}


def _two(names: Sequence[str], calls: int = 600) -> float:
    with tempfile.TemporaryDirectory() as folder:
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", _WRITER, str(ROOT), str(Path(folder) / name / "provenance.jsonl"), str(calls)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for name in names
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        began = time.perf_counter()
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
        if any(writer.wait() for writer in writers):
            raise SystemExit("a writer failed")
        took = time.perf_counter() - began
        for name in set(names):
            if not verify(Path(folder) / name / "provenance.jsonl").ok:
                raise SystemExit("a shared ledger does not verify")
        for writer in writers:
            writer.communicate()
        return len(names) * CALLERS * calls / took


# The path of a call


def of_a_call(rounds: int) -> dict[str, float]:
    """Calls a second of a worker, 16 at once, with the ledger and without any, in turn; medians."""
    with tempfile.TemporaryDirectory() as folder:
        return uvloop.run(_of_a_call(Path(folder), rounds))


async def _of_a_call(folder: Path, rounds: int) -> dict[str, float]:
    home = folder / "overlays" / "echo"
    home.mkdir(parents=True)
    shutil.copy(WORKER, home / "worker.py")
    manifest = {
        "name": "echo",
        "version": "1",
        "phases": ["OPEN"],
        "entrypoints": {"proc": {"command": ["python3", "worker.py"], "mode": "worker"}},
        "capabilities": {"echo": {"runner": "proc"}},
    }
    (home / "manifest.json").write_text(json.dumps(manifest))
    async with Bus(load(folder, {})) as bus:
        submit: Any = bus.ledger.submit
        rates: dict[bool, list[float]] = {True: [], False: []}
        await _calls(bus, CALLS // 4)
        for number in range(2 * rounds):
            writes = bool((number + number // 2) % 2)
            setattr(bus.ledger, "submit", submit if writes else _kept_nowhere)  # noqa: B010  # mypy would not have it
            rates[writes].append(await _calls(bus, CALLS))
        setattr(bus.ledger, "submit", submit)  # noqa: B010  # as above
    ratio = statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True))
    return {
        "with_per_s": statistics.median(rates[True]),
        "without_per_s": statistics.median(rates[False]),
        "ratio": ratio,
    }


def _kept_nowhere(
    _: Record, *, placed: Callable[[Receipt], object], written: Callable[[Receipt], object]
) -> asyncio.Future[Receipt]:
    """What a ledger does, but for the line."""
    future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
    receipt = Receipt(1, "0" * 64, 1)
    placed(receipt)
    written(receipt)
    future.set_result(receipt)
    return future


async def _calls(bus: Bus, count: int) -> float:
    async def caller() -> None:
        for _ in range(count // CALLERS):
            answer = await bus.invoke(read_invocation(BODY, "echo"))
            if not answer.ok:
                raise SystemExit(f"a call failed: {answer.body}")

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    say("appending")
    found: dict[str, Any] = {"append": appending(given.rounds)}
    say("two processes")
    found["together"] = together(8 * given.rounds)
    say("calls")
    found["call"] = of_a_call(4 * given.rounds)  # whole calls drift most
    with tempfile.TemporaryDirectory() as folder:
        found["many"] = many(Path(folder), given.lines, say)
    if given.json:
        print(json.dumps(found, indent=2))
        return
    tell(found)


def tell(found: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    for fsync, ways in found["append"].items():
        print(f"appending, {'no sync' if fsync == 'never' else 'one sync for each group of 16'}:")
        for name, took in ways.items():
            print(f"  {name:16} {took['us']:8.1f} us a line   the ledger takes x {took['ratio']:.2f}")
    shared, call, all_ = found["together"], found["call"], found["many"]
    print(f"two processes on one ledger: {shared['shared_per_s']:,.0f} lines/s, x {shared['ratio']:.2f} of one each")
    print(f"a worker's calls: {call['with_per_s']:,.0f}/s, x {call['ratio']:.3f} of those without a ledger")
    print(f"{all_['lines']:,} lines in {all_['segments']} segments of {SEGMENT_BYTES >> 20} MiB:")
    sizes = (all_["bytes_a_line"], all_["packed_bytes_a_line"], all_["index_bytes_a_line"])
    print("  on the disk {:.0f} bytes a line, closed and compressed {:.0f}, the index {:.1f}".format(*sizes))
    slowest = f"slowest group of {GROUP} {all_['slowest_group_ms']:.1f} ms"
    print(f"  chained and written {all_['written_per_s']:,.0f}/s ({slowest}: one that closes a segment)")
    verified = (all_["verified_per_s"], all_["verified_packed_per_s"])
    print("  verified {:,.0f}/s, compressed {:,.0f}/s".format(*verified))
    print(f"  compressed in {all_['compressed_s']:.1f} s, indexed in {all_['indexed_s']:.1f} s")
    for name in ("find", "filter", "prove"):
        print(f"  {name:8} p50 {all_[name]['p50_ms']:.3f} ms, p99 {all_[name]['p99_ms']:.3f} ms")


if __name__ == "__main__":
    main()
