from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bus import ledger as ledger_module
from bus import provenance, records, resources, schemas
from bus.canonical import canonical
from bus.errors import NotFoundError
from bus.ledger import Fsync, Ledger, LedgerError, Receipt
from bus.provenance import iter_lines, read_line, tail, verify
from bus.records import GENESIS, BrokenLineError, collect_environment, environment_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "python": "CPython 3.11.9",
    "platform": "Linux 6.1",
    "machine": "x86_64",
    "git_commit": None,
    "bus_version": "0.1.0",
}
HASH = "ab" * 32

WRITER = """
import asyncio, json, os, pathlib, sys
from bus.ledger import Ledger
async def main(path, fsync, environment, name, callers, calls):
    ledger = Ledger(pathlib.Path(path), fsync=fsync, environment=environment)
    ledger.open()
    async def caller(number):
        for call in range(calls):
            request_id = f"{name}-{number}-{call}"
            receipt = await ledger.append({"type": "invoke", "timestamp_ms": 1, "request_id": request_id,
                                           "ok": True, "code": "OK", "error": "x" * 200})
            os.write(1, f"{receipt.seq} {receipt.hash} {request_id}\\n".encode())
    await asyncio.gather(*map(caller, range(callers)))
    ledger.close()
asyncio.run(main(*json.loads(sys.argv[1])))
"""

LIMITED = """
import json, pathlib, resource, sys
from bus.ledger import Ledger, LedgerError
from bus.provenance import verify
path = pathlib.Path(sys.argv[1])
ledger = Ledger(path, fsync="batch", environment=json.loads(sys.argv[2]))
ledger.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
written = 0
call = {"type": "invoke", "timestamp_ms": 1, "request_id": "r", "ok": True, "code": "OK", "error": "x" * 3000}
try:
    while True:
        ledger.append_sync(call)
        written += 1
except LedgerError as error:
    failed = error
assert failed.code == "ERR_LEDGER" and not ledger.healthy and "File too large" in ledger.reason, ledger.reason
assert not ledger.probe() and not list(path.parent.glob('*.torn-*'))
assert verify(path).lines == ledger.size == written, (verify(path), ledger.size, written)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert ledger.probe() and ledger.healthy
assert ledger.append_sync(call).seq == written + 1
ledger.close()
print(written, verify(path).lines)
"""


def call(request_id: str = "r", **members: Any) -> dict[str, Any]:
    return {"type": "invoke", "timestamp_ms": 1, "request_id": request_id, "ok": True, "code": "OK", **members}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


@contextlib.contextmanager
def opened(path: Path, fsync: Fsync = "never", environment: dict[str, Any] = ENVIRONMENT) -> Iterator[Ledger]:
    ledger = Ledger(path, fsync=fsync, environment=environment)
    ledger.open()
    try:
        yield ledger
    finally:
        ledger.close()


def ledger_size(path: Path) -> int:
    return path.stat().st_size


def append_until_it_fails(ledger: Ledger) -> int:
    """Fill the file system; gives the number of lines that went in."""
    written = 0
    with contextlib.suppress(LedgerError):
        while written < 1000:
            ledger.append_sync(call(error="x" * 3000))
            written += 1
    return written


def write(path: Path, *records: dict[str, Any]) -> list[Receipt]:
    with opened(path) as ledger:
        return [ledger.append_sync(record) for record in records]


def start(path: Path, name: str, callers: int, calls: int) -> subprocess.Popen[str]:
    arguments = json.dumps([str(path), "batch", ENVIRONMENT, name, callers, calls])
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def assert_all_there(path: Path, acknowledged: list[str]) -> None:
    lines = {record["seq"]: record for record in iter_lines(path)}
    for line in acknowledged:
        seq, hash_, request_id = line.split()
        assert lines[int(seq)]["hash"] == hash_
        assert lines[int(seq)]["request_id"] == request_id


# --- What is written ---


def test_a_record_is_one_canonical_line_of_the_schema_with_null_for_what_does_not_apply(path: Path) -> None:
    memory = {"profile": "MINIMAL", "soft_mb": 512, "hard_mb": 1024, "tier": "LOCAL", "stress": 0.125, "applied": []}
    write(
        path,
        call(environment_hash=environment_hash(ENVIRONMENT), phase="OPEN", duration_ms=1.5),
        call(type="replay", replay_of=1, memory={**memory, "peak_mb": 9.5}, sandbox={"scope": "none"}, seed=7),
        call(type="denied", ok=False, code="ERR_PHASE_DENIED", error="no", payload={"a": 1}, result=None),
    )
    records = list(iter_lines(path))
    assert [record["type"] for record in records] == ["invoke", "environment", "replay", "denied"]
    for record, line in zip(records, path.read_bytes().splitlines(), strict=True):
        assert schemas.faults(schemas.shipped("record"), record) == []
        assert canonical(record) == line
    assert records[0]["caller"] is None
    assert "payload" not in records[0]


def test_the_schema_of_a_record_names_what_an_overlay_is_told_of_memory_and_the_peak() -> None:
    record: Any = resources.load_json("schemas/record.schema.json")
    request: Any = resources.load_json("schemas/overlay_request.schema.json")
    told = request["$defs"]["memory"]["properties"]
    assert {**told, "peak_mb": record["$defs"]["memory"]["properties"]["peak_mb"]} == (
        record["$defs"]["memory"]["properties"]
    )


@pytest.mark.parametrize("member", ["nonsense", "hash", "seq"])
def test_the_schema_and_the_ledger_refuse_a_member_that_is_not_theirs(path: Path, member: str) -> None:
    with opened(path) as ledger, pytest.raises(ValueError, match=f"no member {member}"):
        ledger.append_sync({**call(), member: 1})
    (receipt,) = write(path, call())
    record = read_line(path, receipt.seq)
    assert schemas.faults(schemas.shipped("record"), {**record, "nonsense": 1}) != []


def test_the_hash_is_that_of_the_bytes_without_its_own_member_and_prev_is_the_hash_before(path: Path) -> None:
    write(path, call("a"), call("b"))
    prev = GENESIS
    for line in path.read_bytes().splitlines():
        cut = re.sub(rb'"hash":"[0-9a-f]{64}",', b"", line, count=1)
        record = json.loads(line)
        assert record["hash"] == hashlib.sha256(cut).hexdigest()
        assert record["prev"] == prev
        prev = record["hash"]


def test_text_and_payloads_that_look_like_the_hash_do_not_disturb_it(path: Path) -> None:
    fake = f'x","hash":"{HASH}","prev":"{HASH}",'
    write(path, call(caller=fake, code=fake, error=fake, payload={"hash": HASH, "a": {"hash": HASH}}, result=[fake]))
    assert verify(path).lines == 1
    assert read_line(path, 1)["payload"]["hash"] == HASH


def test_an_object_before_the_hash_may_not_hold_a_member_of_that_name(path: Path) -> None:
    with opened(path) as ledger, pytest.raises(ValueError, match="holds a key of that name"):
        ledger.append_sync(call(caller={"deep": [{"hash": HASH}]}))


def test_a_payload_may_be_given_as_its_canonical_bytes(path: Path) -> None:
    payload = {"z": 1.5, "a": ["\u20ac"]}
    write(path, call(payload=orjson.Fragment(canonical(payload))))
    assert read_line(path, 1)["payload"] == payload
    assert canonical(read_line(path, 1)) == path.read_bytes()[:-1]


def test_a_fragment_that_could_break_the_line_is_refused(path: Path) -> None:
    with opened(path) as ledger, pytest.raises(ValueError, match="NUL"):
        ledger.append_sync(call(payload=orjson.Fragment(b'"\x00"')))


async def test_a_record_that_is_not_json_fails_alone(path: Path) -> None:
    with opened(path) as ledger:
        results = await asyncio.gather(
            ledger.append(call("a")),
            ledger.append(call(error="\ud800")),
            ledger.append(call("b")),
            return_exceptions=True,
        )
    assert isinstance(results[1], ValueError)
    assert [record["request_id"] for record in iter_lines(path)] == ["a", "b"]


def test_the_environment_stands_behind_the_first_record_that_names_it_and_is_not_repeated(path: Path) -> None:
    named = call(environment_hash=environment_hash(ENVIRONMENT))
    receipts = write(path, call(), named, named)
    assert [(receipt.seq, receipt.tree_size) for receipt in receipts] == [(1, 1), (2, 3), (4, 4)]
    write(path, named)
    other = {**ENVIRONMENT, "machine": "aarch64"}
    with opened(path, environment=other) as ledger:
        ledger.append_sync(call(environment_hash=environment_hash(other)))
    assert [record["type"] for record in iter_lines(path)] == [
        "invoke", "invoke", "environment", "invoke", "invoke", "invoke", "environment",
    ]  # fmt: skip
    assert environment_hash(read_line(path, 3)["environment"]) == read_line(path, 3)["environment_hash"]


def test_the_environment_is_written_again_once_it_lies_far_back(path: Path) -> None:
    named = call(environment_hash=environment_hash(ENVIRONMENT))
    write(path, named, call(error="x" * 300_000))
    write(path, named)
    assert [record["type"] for record in iter_lines(path)] == [
        "invoke",
        "environment",
        "invoke",
        "invoke",
        "environment",
    ]


def test_a_payload_cannot_pass_for_an_environment(path: Path) -> None:
    hash_ = environment_hash(ENVIRONMENT)
    write(path, call(payload={"type": "environment", "environment_hash": hash_, "environment": {}}))
    write(path, call(environment_hash=hash_))
    assert read_line(path, 3)["type"] == "environment"


# --- Many callers ---


async def test_sixty_four_callers_share_one_chain_and_are_answered_in_its_order(path: Path) -> None:
    answered: list[int] = []

    async def caller(ledger: Ledger, number: int) -> None:
        for turn in range(20):
            receipt = await ledger.append(call(f"{number}-{turn}"))
            answered.append(receipt.seq)
            assert receipt.tree_size >= receipt.seq

    with opened(path, "batch") as ledger:
        await asyncio.gather(*(caller(ledger, number) for number in range(64)))
        assert ledger.size == 1280
    assert answered == sorted(answered)
    assert verify(path).lines == 1280
    assert len({record["request_id"] for record in iter_lines(path)}) == 1280


def test_loops_in_several_threads_and_callers_without_one_share_a_ledger(path: Path) -> None:
    async def several(ledger: Ledger) -> None:
        await asyncio.gather(*(ledger.append(call()) for _ in range(50)))

    with opened(path) as ledger:
        threads = [threading.Thread(target=lambda: asyncio.run(several(ledger))) for _ in range(3)]
        threads.append(threading.Thread(target=lambda: [ledger.append_sync(call()) for _ in range(50)]))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify(path).lines == 200


def test_two_processes_write_one_chain_and_lose_nothing(path: Path) -> None:
    writers = [start(path, name, callers=8, calls=40) for name in ("a", "b")]
    outputs = [writer.communicate(timeout=60) for writer in writers]
    assert [errors for _, errors in outputs] == ["", ""]
    assert verify(path).ok
    assert verify(path).lines == 640
    assert_all_there(path, [line for output, _ in outputs for line in output.splitlines()])


def test_two_ledgers_on_one_file_take_turns(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        assert [one.append_sync(call()).seq, other.append_sync(call()).seq, one.append_sync(call()).seq] == [1, 2, 3]
    assert verify(path).lines == 3


async def test_a_cancelled_caller_does_not_lose_its_line(path: Path) -> None:
    with opened(path) as ledger:
        task = asyncio.create_task(ledger.append(call("gone")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ledger.append(call("next"))
    assert [record["request_id"] for record in iter_lines(path)] == ["gone", "next"]


async def test_close_writes_and_answers_what_still_waits(path: Path) -> None:
    with opened(path) as ledger:
        waiting = [asyncio.ensure_future(ledger.append(call())) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.to_thread(ledger.close)
        assert sorted(receipt.seq for receipt in await asyncio.gather(*waiting)) == list(range(1, 101))
        with pytest.raises(LedgerError, match="not open"):
            await ledger.append(call())
        assert not ledger.healthy
    assert verify(path).lines == 100


def test_a_loop_that_ended_before_its_answer_does_not_disturb_the_writer(path: Path) -> None:
    async def leave(ledger: Ledger) -> None:
        task = asyncio.ensure_future(ledger.append(call("left")))
        await asyncio.sleep(0)
        task.cancel()

    with opened(path) as ledger:
        asyncio.run(leave(ledger))
        ledger.append_sync(call("stayed"))
    assert [record["request_id"] for record in iter_lines(path)] == ["left", "stayed"]


def test_another_process_cannot_wait_for_the_writer_of_this_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as ledger:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(LedgerError, match="another process"):
            ledger.append_sync(call())


# --- Power loss, full disks, missing files ---


@pytest.mark.parametrize(("fsync", "least", "most"), [("always", 20, 20), ("batch", 1, 20), ("never", 0, 0)])
async def test_each_fsync_mode_syncs_before_the_answer_as_often_as_it_says(
    path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Fsync, least: int, most: int
) -> None:
    sizes: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        sizes.append(ledger_size(path))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    with opened(path, fsync) as ledger:
        receipts = await asyncio.gather(*(ledger.append(call()) for _ in range(20)))
        assert least <= len(sizes) <= most
        assert len(receipts) == verify(path).lines == 20
        if fsync != "never":
            assert sizes[-1] == ledger_size(path)


def test_a_failed_sync_leaves_no_line_and_a_later_success_makes_the_ledger_well(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(path, "batch") as ledger:
        ledger.append_sync(call("good"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(LedgerError, match="Input/output error") as caught:
                ledger.append_sync(call("lost"))
            assert caught.value.retry_after_s == 1
            assert not ledger.healthy
            assert verify(path).lines == ledger.size == 1
        assert ledger.append_sync(call("again")).seq == 2
        assert ledger.healthy
    assert [record["request_id"] for record in iter_lines(path)] == ["good", "again"]


def test_a_tail_that_cannot_be_cut_off_after_a_failed_write_is_healed_at_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def half(fd: int, data: memoryview) -> int:
        if len(data) > 300:
            return real(fd, data[:300])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(_fd: int, _size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(path) as ledger:
        ledger.append_sync(call("good"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            patch.setattr(os, "ftruncate", fail)
            with pytest.raises(LedgerError):
                ledger.append_sync(call("lost"))
        assert verify(path).fault == "torn"
        ledger.append_sync(call("again"))
    assert [record["type"] for record in iter_lines(path)] == ["invoke", "recovered", "invoke"]
    assert verify(path).ok


def test_a_full_disk_refuses_lines_and_keeps_those_that_were_answered(path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), json.dumps(ENVIRONMENT)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    written, lines = map(int, ran.stdout.split())
    assert lines == written + 1
    assert verify(path).lines == lines


def test_a_full_file_system_is_survived_and_noticed_when_it_has_room_again(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system here")
    try:
        with opened(tmp_path / "logs" / "provenance.jsonl", "batch") as ledger:
            ballast = tmp_path / "ballast"
            ballast.write_bytes(bytes(60_000))
            written = append_until_it_fails(ledger)
            assert "No space left" in (ledger.reason or "")
            assert not ledger.probe()
            assert verify(ledger.path).lines == written > 0
            ballast.unlink()
            assert ledger.probe()
            assert ledger.append_sync(call()).seq == written + 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_truncation_at_any_byte_of_the_last_two_lines_heals_and_loses_nothing_before_it(path: Path) -> None:
    receipts = write(path, call("a"), call("b"), call("c"))
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 0x0A]
    for size in range(ends[0], len(whole)):
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        torn = whole[ends[kept - 1] : size]
        with opened(path) as ledger:
            assert ledger.healthy
            assert ledger.size == kept + bool(torn)
        assert verify(path).lines == kept + bool(torn)
        assert read_line(path, kept)["hash"] == receipts[kept - 1].hash
        if torn:
            record = read_line(path, kept + 1)
            assert (record["type"], record["cut_bytes"]) == ("recovered", len(torn))
            assert path.with_name(record["kept_as"]).read_bytes() == torn
    assert schemas.faults(schemas.shipped("record"), record) == []


def test_a_tail_of_blocks_that_never_reached_the_disk_is_cut_off(path: Path) -> None:
    write(path, call("a"))
    with path.open("ab") as file:
        file.write(b'{"caller":' + bytes(5000) + b'"}\n' + bytes(3000))
    write(path, call("b"))
    assert [record["type"] for record in iter_lines(path)] == ["invoke", "recovered", "invoke"]
    assert verify(path).ok


def test_bytes_kept_from_an_earlier_tear_are_not_written_over(path: Path) -> None:
    for torn in (b"first", b"second"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(torn)
        write(path)
    assert path.with_name("provenance.jsonl.torn-1").read_bytes() == b"first"
    assert path.with_name("provenance.jsonl.torn-1-2").read_bytes() == b"second"


def test_a_torn_tail_is_not_cut_where_its_bytes_cannot_be_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, call("a"))
    with path.open("ab") as file:
        file.write(b'{"caller"')
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with opened(path, "batch") as ledger:
            assert not ledger.healthy
    assert path.read_bytes() == before
    assert list(path.parent.glob("*.torn-*")) == []


def test_a_writer_killed_in_the_middle_leaves_every_answered_line(path: Path) -> None:
    writer = start(path, "w", callers=16, calls=100_000)
    assert writer.stdout is not None
    assert writer.stderr is not None
    acknowledged = [writer.stdout.readline() for _ in range(300)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += [line for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()
    writer.stderr.close()
    (after,) = write(path, call("after"))
    assert verify(path).lines == after.seq
    assert_all_there(path, acknowledged)


def test_an_unlinked_log_is_begun_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(path) as ledger:
        write_two = [ledger.append_sync(call()) for _ in range(2)]
        path.unlink()
        assert ledger.append_sync(call()).seq == 1
        assert verify(path).lines == 1
    assert [receipt.seq for receipt in write_two] == [1, 2]
    assert "removed or replaced" in caplog.text


def test_a_log_moved_away_goes_on_in_a_new_file_with_its_environment(path: Path) -> None:
    named = call(environment_hash=environment_hash(ENVIRONMENT))
    with opened(path) as ledger:
        ledger.append_sync(named)
        path.rename(path.with_name("old.jsonl"))
        ledger.append_sync(named)
    assert verify(path.with_name("old.jsonl")).lines == verify(path).lines == 2


def test_a_log_that_another_took_the_place_of_is_continued(path: Path) -> None:
    other = path.with_name("other.jsonl")
    receipts = write(other, call("a"), call("b"), call("c"))
    with opened(path) as ledger:
        ledger.append_sync(call())
        other.rename(path)
        assert ledger.append_sync(call()).seq == 4
    assert read_line(path, 4)["prev"] == receipts[-1].hash


def test_a_removed_folder_is_made_again(path: Path) -> None:
    with opened(path) as ledger:
        ledger.append_sync(call())
        shutil.rmtree(path.parent)
        assert ledger.append_sync(call()).seq == 1
        with opened(path) as other:
            assert other.append_sync(call()).seq == 2


@pytest.mark.usefixtures("bound_by_modes")
def test_a_folder_that_may_not_be_written_makes_the_ledger_unwell_and_says_so(path: Path) -> None:
    path.parent.mkdir(mode=0o555)
    with opened(path) as ledger:
        assert not ledger.healthy
        assert "Permission denied" in (ledger.reason or "")
        assert not ledger.probe()
        with pytest.raises(LedgerError, match="Permission denied"):
            ledger.append_sync(call())
        path.parent.chmod(0o755)
        assert ledger.append_sync(call()).seq == 1


def test_a_folder_that_cannot_be_makes_the_ledger_unwell_until_it_can(path: Path) -> None:
    path.parent.write_text("in the way")
    with opened(path) as ledger:
        assert not ledger.healthy
        assert not ledger.probe()
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.append_sync(call())
        path.parent.unlink()
        assert ledger.probe()
        assert ledger.healthy
        assert ledger.append_sync(call()).seq == 1


@pytest.mark.parametrize("unwell_from_the_start", [True, False])
def test_an_unwell_ledger_tries_again_by_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch, unwell_from_the_start: bool
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.01)
    well = threading.Event()
    probe = Ledger.probe

    def watched(ledger: Ledger) -> bool:
        if probe(ledger):
            well.set()
        return ledger.healthy

    monkeypatch.setattr(Ledger, "probe", watched)
    if unwell_from_the_start:
        path.parent.write_text("in the way")
    with opened(path) as ledger:
        if not unwell_from_the_start:
            shutil.rmtree(path.parent)
            path.parent.write_text("in the way")
            ledger.probe()
        assert not ledger.healthy
        path.parent.unlink()
        assert well.wait(30)
        assert ledger.healthy


def test_a_closed_ledger_is_not_made_well_by_a_probe(path: Path) -> None:
    ledger = Ledger(path, fsync="never", environment=ENVIRONMENT)
    assert not ledger.probe()
    ledger.open()
    ledger.close()
    assert not ledger.probe()
    assert ledger.reason == "the ledger is closed"


def test_a_probe_leaves_nothing_behind(path: Path) -> None:
    with opened(path, "batch") as ledger:
        ledger.append_sync(call())
        before = path.read_bytes()
        assert ledger.probe()
        assert path.read_bytes() == before
        assert {file.name for file in path.parent.iterdir()} == {"provenance.jsonl", "provenance.lock"}


@pytest.mark.parametrize("line", [b'{"request_id": "old", "ok": true}\n', b"not json\n", b"[]\n"])
def test_a_file_that_is_not_a_ledger_is_not_written_to(path: Path, line: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(line)
    with opened(path) as ledger:
        assert not ledger.healthy
        with pytest.raises(LedgerError):
            ledger.append_sync(call())
    assert path.read_bytes() == line


def test_an_error_that_nobody_thought_of_answers_the_callers_and_is_logged(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unthought of")

    with opened(path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with caplog.at_level(logging.ERROR), pytest.raises(LedgerError, match="unthought of"):
                ledger.append_sync(call())
        assert "Traceback" in caplog.text
        assert ledger.append_sync(call()).seq == 1


# --- Verifying ---


def test_a_bit_flipped_at_any_byte_is_found(path: Path) -> None:
    write(path, call("a", environment_hash=environment_hash(ENVIRONMENT)), call("b", payload={"hash": HASH}))
    whole = path.read_bytes()
    assert verify(path).lines == 3
    for index in range(len(whole)):
        changed = bytearray(whole)
        changed[index] ^= 1 << index % 8
        path.write_bytes(changed)
        report = verify(path)
        assert report.first_bad == whole.count(b"\n", 0, index) + 1, (index, report)


def _without_line_2(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1]]


def _not_json(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"[]\n", lines[2]]


def _empty(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"\n", *lines[1:]]


def _changed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"ok":true', b'"ok":false'), lines[2]]


def _cut_off(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1][:-1]]


def _from_another_chain(lines: list[bytes]) -> list[bytes]:
    record = orjson.loads(lines[1])
    record["prev"] = HASH
    del record["hash"]
    record["hash"] = hashlib.sha256(canonical(record)).hexdigest()
    return [lines[0], canonical(record) + b"\n", lines[2]]


def _without_a_hash(lines: list[bytes]) -> list[bytes]:
    record = orjson.loads(lines[1])
    del record["hash"]
    return [lines[0], canonical(record) + b"\n", lines[2]]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_without_line_2, "seq"),
        (_swapped, "seq"),
        (_not_json, "json"),
        (_empty, "json"),
        (_changed, "hash"),
        (_without_a_hash, "hash"),
        (_cut_off, "torn"),
        (_from_another_chain, "chain"),
    ],
)
def test_a_damaged_log_is_told_by_what_is_wrong_with_which_line(
    path: Path, damage: Callable[[list[bytes]], list[bytes]], fault: str
) -> None:
    receipts = write(path, call("a"), call("b"), call("c"))
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    report = verify(path)
    assert (report.lines, report.first_bad, report.fault) == (1, 2, fault)
    assert report.head_hash == receipts[0].hash
    assert report.reason
    assert not report.ok


def test_a_whole_log_is_verified_with_progress(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PROGRESS_LINES", 2)
    receipts = write(path, *(call() for _ in range(5)))
    seen: list[int] = []
    report = verify(path, seen.append)
    assert (report.ok, report.lines, report.head_hash) == (True, 5, receipts[-1].hash)
    assert seen == [2, 4]


def test_an_empty_log_is_whole_and_a_missing_one_is_an_error(path: Path) -> None:
    with pytest.raises(NotFoundError):
        verify(path)
    write(path)
    assert verify(path) == provenance.VerifyReport(0, GENESIS)


def test_a_log_without_its_lock_file_is_verified(path: Path) -> None:
    write(path, call())
    path.with_name("provenance.lock").unlink()
    assert verify(path).lines == 1


async def test_a_log_is_verified_while_it_is_written(path: Path) -> None:
    with opened(path) as ledger:
        written = asyncio.gather(*(ledger.append(call(error="x" * 5000)) for _ in range(500)))
        reports = [await asyncio.to_thread(verify, path) for _ in range(10)]
        await written
    assert all(report.ok for report in reports)


# --- Reading ---


def test_a_line_is_found_by_its_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, *(call(str(number), error="x" * number) for number in range(1, 41)))
    for block in (1, 7, 1000, 1 << 20):
        monkeypatch.setattr(provenance, "_LARGEST_BLOCK", block)
        assert [read_line(path, seq)["request_id"] for seq in range(1, 41)] == [str(n) for n in range(1, 41)]


@pytest.mark.parametrize("seq", [-1, 0, 3, 10**9])
def test_a_line_that_is_not_there_is_not_found(path: Path, seq: int) -> None:
    write(path, call("a"), call("b"))
    with path.open("ab") as file:
        file.write(b'{"torn"')
    with pytest.raises(NotFoundError, match=f"no line {seq}"):
        read_line(path, seq)


def test_without_a_log_there_is_nothing_to_read(path: Path) -> None:
    assert tail(path, 10) == []
    assert list(iter_lines(path)) == []
    with pytest.raises(NotFoundError):
        read_line(path, 1)


def test_a_line_that_was_changed_is_not_given_out(path: Path) -> None:
    write(path, call("a"), call("b"))
    path.write_bytes(path.read_bytes().replace(b'"request_id":"b"', b'"request_id":"c"'))
    assert read_line(path, 1)["request_id"] == "a"
    with pytest.raises(BrokenLineError) as caught:
        read_line(path, 2)
    assert (caught.value.fault, caught.value.code) == ("hash", "ERR_LEDGER_BROKEN")


def test_lines_are_read_from_any_one_on_and_a_tail_that_is_being_written_is_not_yet_a_line(path: Path) -> None:
    write(path, call("a"), call("b"), call("c"))
    with path.open("ab") as file:
        file.write(b'{"caller":null')
    assert [record["request_id"] for record in iter_lines(path, 2)] == ["b", "c"]
    assert list(iter_lines(path, 9)) == []
    assert [record["request_id"] for record in tail(path, 2)] == ["b", "c"]


def test_a_line_that_is_not_json_ends_the_reading_and_is_left_out_of_the_tail(path: Path) -> None:
    write(path, call("a"))
    with path.open("ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(BrokenLineError):
        list(iter_lines(path))
    assert [record["request_id"] for record in tail(path, 5)] == ["a"]


@pytest.mark.parametrize("block", [1, 2, 100, 701, 1 << 16])
def test_the_tail_is_read_backwards_through_blocks_of_any_size(
    path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    write(path, *(call(str(number), error="x" * (number * 97 % 1500)) for number in range(30)))
    monkeypatch.setattr(provenance, "_BLOCK", block)
    monkeypatch.setattr(provenance, "_LARGEST_BLOCK", 2 * block)
    assert [record["request_id"] for record in tail(path, 100)] == [str(number) for number in range(30)]
    assert [record["request_id"] for record in tail(path, 3)] == ["27", "28", "29"]


def test_the_tail_can_be_narrowed_down(path: Path) -> None:
    write(
        path,
        call("1", overlay="a", environment_hash=environment_hash(ENVIRONMENT)),
        call("2", overlay="b", timestamp_ms=5),
        call("3", overlay="a", ok=False, timestamp_ms=9),
        call("4", overlay="a", timestamp_ms=7, type="replay"),
    )

    def ids(**narrowed: Any) -> list[str]:
        return [record["request_id"] for record in tail(path, 10, types=("invoke", "replay"), **narrowed)]

    assert ids() == ["1", "2", "3", "4"]
    assert ids(overlay="a") == ["1", "3", "4"]
    assert ids(ok=False) == ["3"]
    assert ids(ok=True, overlay="a") == ["1", "4"]
    assert ids(since_ms=6) == ["3", "4"]
    assert [record["type"] for record in tail(path, 10)] == ["invoke", "environment", "invoke", "invoke", "replay"]
    assert [record["request_id"] for record in tail(path, 1, overlay="a", types=("invoke",))] == ["3"]
    assert tail(path, 0) == []


# --- The environment ---


def test_the_environment_names_the_commit_of_the_folder(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    if shutil.which("git") is None:
        pytest.skip("no git here")
    subprocess.run([*git, "init", "-q"], check=True)
    assert collect_environment(tmp_path)["git_commit"] is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert collect_environment(tmp_path)["git_commit"] == head


def test_the_environment_is_collected_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = collect_environment(tmp_path)
    assert environment["git_commit"] is None
    record_schema: Any = resources.load_json("schemas/record.schema.json")
    validator = schemas.compiled(record_schema["$defs"]["environment"]["properties"]["environment"])
    assert schemas.faults(validator, environment) == []


def test_a_git_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "git"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(records, "_GIT_TIMEOUT_S", 0.05)
    assert collect_environment(tmp_path)["git_commit"] is None


def test_the_hash_of_an_environment_does_not_depend_on_the_order_of_its_members() -> None:
    assert environment_hash(ENVIRONMENT) == environment_hash(dict(reversed(ENVIRONMENT.items())))
    assert environment_hash(ENVIRONMENT) != environment_hash({**ENVIRONMENT, "machine": "aarch64"})
