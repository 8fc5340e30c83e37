"""The ledger in several files: rotation, compression, and readers and writers that go on meanwhile."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from bus import chain, members, schemas, segments, upkeep
from bus import index as index_module
from bus.errors import NotFoundError
from bus.ledger import LedgerError
from bus.merkle import check_inclusion, root_of
from bus.proofs import Prover
from bus.provenance import backwards, first_line, iter_lines, raw_lines, read_line, tail
from bus.records import BrokenLineError
from bus.segments import Segments, closed_firsts, closed_path, compress, packed_path
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, append, appended, call, iter_hashes, opened, synthesize, write
from tests.support import eventually

if TYPE_CHECKING:
    from pathlib import Path

SMALL = 3000
"""Bytes of a segment of some four lines."""

KILLED = """
import asyncio, json, os, pathlib, signal, sys
from bus.ledger import Ledger
from bus.segments import compress
path, task, at, behind = json.loads(sys.argv[1])
path, count = pathlib.Path(path), 0

def dies_at(name):
    step = getattr(os, name)
    def stepped(*args, **options):
        global count
        count += 1
        if count == at and not behind:
            os.kill(os.getpid(), signal.SIGKILL)
        is_it = count == at
        try:
            return step(*args, **options)
        finally:
            if is_it and behind:
                os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, name, stepped)

def arm():
    for name in ("open", "fsync", "rename", "replace", "unlink", "close"):
        dies_at(name)

def rotating():
    ledger = Ledger(path, fsync="batch", environment=json.loads(sys.argv[2]), segment_bytes=3000)
    ledger.open()
    async def submit():
        call = {"type": "invoke", "timestamp_ms": 1, "request_id": "r", "ok": True, "code": "OK"}
        receipt = await ledger.submit(call)
        os.write(1, f"{receipt.seq} {receipt.hash}\\n".encode())
    while path.stat().st_size < 3000:
        asyncio.run(submit())
    arm()
    asyncio.run(submit())
    ledger.close()

if task == "rotate":
    rotating()
else:
    arm()
    compress(path)
print("alive", flush=True)
"""

WRITER = """
import asyncio, json, os, pathlib, sys
from bus.ledger import Ledger
path, environment, name, callers, calls = json.loads(sys.argv[1])
async def main():
    ledger = Ledger(pathlib.Path(path), fsync="batch", environment=environment, segment_bytes=8000)
    ledger.open()
    async def caller(number):
        for call in range(calls):
            receipt = await ledger.submit({"type": "invoke", "timestamp_ms": 1, "request_id": f"{name}-{number}-{call}",
                                           "ok": True, "code": "OK"})
            os.write(1, f"{receipt.seq} {receipt.hash}\\n".encode())
    await asyncio.gather(*map(caller, range(callers)))
    ledger.close()
asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


def ids(path: Path) -> list[str]:
    return [record["request_id"] for record in iter_lines(path) if record["type"] == "invoke"]


def names(path: Path) -> set[str]:
    return {one.name for one in path.parent.iterdir()}


def assert_one_chain(path: Path) -> int:
    """Verified from its first line to its last, forwards and backwards; gives the number of lines."""
    report = verify(path)
    assert report.ok, report
    lines = list(raw_lines(path))
    with Segments(path) as found:
        assert list(found.backwards()) == lines[::-1]
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, report.lines + 1))
    return report.lines


# --- Rotation ---


def test_a_ledger_goes_on_over_many_segments(path: Path) -> None:
    receipts = write(path, *(call(str(number)) for number in range(40)), segment_bytes=SMALL)
    firsts = closed_firsts(path)
    assert len(firsts) > 5
    assert firsts[0] == 1
    assert assert_one_chain(path) == receipts[-1].seq
    assert ids(path) == [str(number) for number in range(40)]
    assert [read_line(path, receipt.seq)["hash"] for receipt in receipts] == [receipt.hash for receipt in receipts]
    assert first_line(path) == closed_path(path, 1).read_bytes().splitlines(keepends=True)[0]
    for first, following in zip(firsts, [*firsts[1:], None], strict=True):
        lines = closed_path(path, first).read_bytes().splitlines()
        assert json.loads(lines[0])["seq"] == first
        assert following is None or json.loads(lines[-1])["seq"] == following - 1


def test_reading_begins_at_any_line_of_any_segment(path: Path) -> None:
    write(path, *(call(str(number)) for number in range(20)), segment_bytes=SMALL)
    lines = list(raw_lines(path))
    compress(path)
    for start in range(1, len(lines) + 1):
        assert list(raw_lines(path, start)) == lines[start - 1 :]
        assert read_line(path, start)["seq"] == start
    assert list(raw_lines(path, len(lines) + 1)) == []
    assert [record["seq"] for record in tail(path, 1000)] == list(range(1, len(lines) + 1))
    assert list(iter_hashes(path)) == [bytes.fromhex(json.loads(line)["hash"]) for line in lines]


def test_who_opens_a_new_segment_reads_none_before_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, *(call() for _ in range(7)), segment_bytes=SMALL)
    leaves = list(iter_hashes(path))

    def never(_: Path) -> Any:
        raise AssertionError("a closed segment was read")
        yield

    monkeypatch.setattr(chain, "closed_backwards", never)
    with opened(path) as ledger:
        receipt = append(ledger, call())
    assert (receipt.seq, json.loads(list(raw_lines(path))[-1])["prev"]) == (len(leaves) + 1, leaves[-1].hex())
    assert verify(path).root == root_of(iter_hashes(path)).hex()
    assert json.loads(path.read_bytes().splitlines()[0])["type"] == "checkpoint"


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_open_segment_goes_on_from_the_last_closed_one(path: Path, packed: bool) -> None:
    write(path, *(call(str(number)) for number in range(8)), segment_bytes=SMALL)
    whole = verify(path).lines
    path.rename(closed_path(path, _first_of(path)))
    path.touch()
    if packed:
        compress(path)
    (receipt,) = write(path, call("after"))
    assert receipt.seq == whole + 2
    assert assert_one_chain(path) == whole + 2
    assert json.loads(path.read_bytes().splitlines()[0])["type"] == "checkpoint"


def _first_of(path: Path) -> int:
    return int(json.loads(path.read_bytes().splitlines()[0])["seq"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_where_the_open_segment_was_removed_the_chain_goes_on_and_says_so(
    path: Path, packed: bool, running: bool
) -> None:
    with opened(path, segment_bytes=SMALL) as ledger:
        for _ in range(8):
            append(ledger, call())
        if packed:
            compress(path)
        last = _first_of(path) - 1
        path.unlink()
        if running:
            append(ledger, call("after"))
    if not running:
        write(path, call("after"))
    lines = [record for record in iter_lines(path) if record["seq"] > last]
    assert [record["type"] for record in lines[:3]] == ["checkpoint", "recovered", "invoke"]
    assert (lines[1]["cut_bytes"], lines[1]["kept_as"]) == (None, None)
    assert schemas.faults(schemas.shipped("record"), lines[1]) == []
    assert_one_chain(path)


def test_a_torn_tail_of_a_new_segment_is_cut_off(path: Path) -> None:
    write(path, *(call() for _ in range(8)), segment_bytes=SMALL)
    whole = verify(path).lines
    path.rename(closed_path(path, _first_of(path)))
    path.write_bytes(b'{"torn":')
    write(path, call("after"))
    assert [record["type"] for record in iter_lines(path, whole + 1)] == ["checkpoint", "recovered", "invoke"]
    assert path.with_name(f"{path.name}.torn-{whole + 1}").read_bytes() == b'{"torn":'
    assert_one_chain(path)


def test_a_closed_segment_is_never_written_over(path: Path) -> None:
    with opened(path, segment_bytes=SMALL) as ledger:
        while not closed_firsts(path):
            append(ledger, call())
        taken = closed_path(path, _first_of(path))
        taken.write_bytes(b"another's\n")
        while path.stat().st_size < SMALL:
            append(ledger, call())
        with pytest.raises(LedgerError, match="cannot be written"):
            append(ledger, call())
        assert taken.read_bytes() == b"another's\n"
        taken.unlink()
        append(ledger, call())
    assert_one_chain(path)


def test_without_a_size_nothing_is_closed(path: Path) -> None:
    write(path, *(call() for _ in range(40)))
    assert closed_firsts(path) == []


def test_two_processes_write_one_chain_over_many_segments(path: Path) -> None:
    arguments = [json.dumps([str(path), ENVIRONMENT, name, 8, 25]) for name in "ab"]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, one], stdout=subprocess.PIPE) for one in arguments]
    acknowledged = [line.split() for writer in writers for line in writer.communicate()[0].splitlines()]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(closed_firsts(path)) > 10
    assert_one_chain(path)
    hashes = [line.hex() for line in iter_hashes(path)]
    assert len(acknowledged) == 400
    assert all(hashes[int(seq) - 1] == hash_.decode() for seq, hash_ in acknowledged)


def test_a_log_that_others_rotated_is_not_called_removed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(path) as ours, opened(path, segment_bytes=SMALL) as theirs:
        append(ours, call())
        while not closed_firsts(path):
            append(theirs, call())
        append(ours, call())
    assert "removed" not in caplog.text
    assert_one_chain(path)


def test_a_listing_of_the_segments_that_a_signal_interrupts_is_begun_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, *(call() for _ in range(8)), segment_bytes=SMALL)
    whole, real, interrupts = closed_firsts(path), os.listdir, [InterruptedError(errno.EINTR, "a signal")]

    def interrupted(folder: Path) -> list[str]:
        if interrupts:
            raise interrupts.pop()
        return real(folder)

    monkeypatch.setattr(os, "listdir", interrupted)
    assert closed_firsts(path) == whole != []
    assert interrupts == []


# --- Compression ---


def test_a_compressed_segment_reads_as_before_and_is_gzip_for_all_the_world(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MEMBER_BYTES", 1000)
    write(path, *(call(str(number)) for number in range(40)), segment_bytes=20_000)
    plain = {first: closed_path(path, first).read_bytes() for first in closed_firsts(path)}
    lines = list(raw_lines(path))
    assert compress(path) == len(plain)
    assert compress(path) == 0
    for first, text in plain.items():
        assert not closed_path(path, first).exists()
        assert gzip.decompress(packed_path(path, first).read_bytes()) == text
        with packed_path(path, first).open("rb") as file:
            assert len(members.members(file.fileno())) > 5
        assert packed_path(path, first).stat().st_mode & 0o777 == 0o640
    assert list(raw_lines(path)) == lines
    assert assert_one_chain(path) == len(lines)


def test_a_segment_that_another_program_compressed_is_read(path: Path) -> None:
    write(path, *(call() for _ in range(12)), segment_bytes=SMALL)
    lines = list(raw_lines(path))
    for first in closed_firsts(path):
        packed_path(path, first).write_bytes(gzip.compress(closed_path(path, first).read_bytes()))
        closed_path(path, first).unlink()
    assert list(raw_lines(path)) == lines
    assert [list(raw_lines(path, start)) for start in (2, 6)] == [lines[1:], lines[5:]]
    assert_one_chain(path)


def test_where_both_forms_are_there_the_plain_one_counts(path: Path) -> None:
    write(path, *(call() for _ in range(8)), segment_bytes=SMALL)
    whole = verify(path)
    for first in closed_firsts(path):
        packed_path(path, first).write_bytes(b"half of it")
    assert verify(path) == whole
    compress(path)
    assert verify(path) == whole


def test_a_bit_flipped_at_any_byte_of_a_compressed_segment_is_found(path: Path) -> None:
    synthesize(path, (call(str(number)) for number in range(4)), segment_lines=2)
    compress(path)
    packed = packed_path(path, 1)
    whole = packed.read_bytes()
    assert verify(path).lines == 4
    for index in range(len(whole)):
        changed = bytearray(whole)
        changed[index] ^= 1 << index % 8
        packed.write_bytes(changed)
        report = verify(path)
        assert report.first_bad == 1, (index, report)
        assert report.reason


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_compressed_segment_that_is_cut_off_is_found(path: Path, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MEMBER_BYTES", 1)
    synthesize(path, (call(str(number)) for number in range(6)), segment_lines=3)
    compress(path)
    packed = packed_path(path, 1)
    with packed.open("rb") as file:
        second = members.members(file.fileno())[1].offset
    packed.write_bytes(packed.read_bytes()[: second + left])
    report = verify(path)
    assert (report.first_bad, report.ok) == (2, False)


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_compressed_segment_that_is_cut_off_is_found_whichever_way_it_is_read(
    path: Path, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MEMBER_BYTES", 1)
    synthesize(path, (call(str(number)) for number in range(6)), segment_lines=3)
    compress(path)
    packed = packed_path(path, 1)
    with packed.open("rb") as file:
        second = members.members(file.fileno())[1].offset
    packed.write_bytes(packed.read_bytes()[: second + left if left > 0 else left])
    with pytest.raises(BrokenLineError, match="unpacked"):
        list(raw_lines(path))
    with pytest.raises(BrokenLineError, match="unpacked"):
        list(backwards(path))
    with Segments(path) as log, log.content(0) as content, pytest.raises(BrokenLineError, match="unpacked"):
        content.count()


@pytest.mark.parametrize("packed", [0, 1, 37, 2**32 - 1])
def test_a_member_that_cannot_be_as_long_as_it_says_is_read_as_another_programs(path: Path, packed: int) -> None:
    synthesize(path, (call(str(number)) for number in range(6)), segment_lines=3)
    lines = list(raw_lines(path))
    compress(path)
    file = packed_path(path, 1)
    member = file.read_bytes()
    header = member[:16] + struct.pack("<I", packed) + member[20:28]
    file.write_bytes(header + struct.pack("<H", zlib.crc32(header) & 0xFFFF) + member[30:])
    assert list(raw_lines(path)) == lines
    assert list(backwards(path)) == lines[::-1]
    with Segments(path) as log, log.content(0) as content:
        assert content.count() == 3


def test_one_process_compresses_at_a_time(path: Path) -> None:
    write(path, *(call() for _ in range(8)), segment_bytes=SMALL)
    inside, go_on = threading.Event(), threading.Event()

    def is_over() -> bool:
        inside.set()
        go_on.wait()
        return False

    first = threading.Thread(target=compress, args=(path, is_over))
    first.start()
    inside.wait()
    assert compress(path) == 0
    go_on.set()
    first.join()
    assert not any(closed_path(path, first).exists() for first in closed_firsts(path))


def test_compressing_ends_when_it_is_told_to_and_leaves_nothing_half_done(path: Path) -> None:
    write(path, *(call() for _ in range(12)), segment_bytes=SMALL)
    before = names(path)
    answers = iter([False, True])
    assert compress(path, lambda: next(answers, True)) == 0
    assert names(path) == before | {"provenance.compressing"}
    assert compress(path) == len(closed_firsts(path))


def test_a_server_compresses_what_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "PERIOD_S", 0.01)
    with opened(path, segment_bytes=SMALL, serves=True) as ledger:
        for _ in range(12):
            append(ledger, call())
        eventually(lambda: not any(closed_path(path, first).exists() for first in closed_firsts(path)), "compressed")
        append(ledger, call())
    assert closed_firsts(path)
    assert_one_chain(path)


def test_a_server_keeps_an_index_of_a_log_that_is_worth_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "PERIOD_S", 0.01)
    monkeypatch.setattr(index_module, "WORTH_BYTES", 5000)

    def held() -> int:
        with index_module.Index(path).reading() as view:
            return view.size if view else 0

    with opened(path, serves=True) as ledger:
        append(ledger, call())
        assert held() == 0
        last = [append(ledger, call()) for _ in range(12)][-1]
        eventually(lambda: held() >= last.seq, "indexed")


def test_upkeep_that_fails_is_said_and_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, *(call() for _ in range(8)), segment_bytes=SMALL)
    lines = list(raw_lines(path))
    with monkeypatch.context() as full:
        full.setattr(segments, "pack", _no_room)
        upkeep.Upkeep(path).look()
    assert "No space left" in caplog.text
    assert not [name for name in names(path) if name.endswith((".part", ".gz"))]
    upkeep.Upkeep(path).look()
    assert list(raw_lines(path)) == lines
    assert not any(closed_path(path, first).exists() for first in closed_firsts(path))


def _no_room(_: bytes) -> bytes:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- Killed in between ---


def killed(path: Path, task: str, at: int, behind: bool) -> tuple[bool, list[list[str]]]:
    """Whether the process outlived it, and what it had answered."""
    arguments = [json.dumps([str(path), task, at, behind]), json.dumps(ENVIRONMENT)]
    ran = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
    said = ran.stdout.splitlines()
    return ran.returncode == 0, [line.split() for line in said if line != "alive"]


@pytest.mark.parametrize("behind", [False, True])
def test_a_rotation_killed_at_any_step_loses_nothing_and_doubles_nothing(tmp_path: Path, behind: bool) -> None:
    for at in range(1, 100):
        path = tmp_path / str(at) / "provenance.jsonl"
        outlived, answered = killed(path, "rotate", at, behind)
        (after,) = write(path, call("after"), segment_bytes=SMALL)
        assert assert_one_chain(path) == after.seq
        assert [read_line(path, int(seq))["hash"] for seq, _ in answered] == [hash_ for _, hash_ in answered]
        assert not [record for record in iter_lines(path) if record["type"] == "recovered"]
        assert f"{path.name}.next" not in names(path)
        if outlived:
            break
    assert outlived
    assert at > 6


@pytest.mark.parametrize("behind", [False, True])
def test_a_compression_killed_at_any_step_leaves_one_good_copy_and_is_tidied(tmp_path: Path, behind: bool) -> None:
    for at in range(1, 100):
        path = tmp_path / str(at) / "provenance.jsonl"
        synthesize(path, (call(str(number)) for number in range(7)), segment_lines=3)
        lines = list(raw_lines(path))
        outlived, _ = killed(path, "compress", at, behind)
        assert list(raw_lines(path)) == lines
        assert_one_chain(path)
        compress(path)
        assert list(raw_lines(path)) == lines
        compressed = {packed_path(path, first).name for first in (1, 4)}
        assert names(path) == compressed | {path.name, "provenance.compressing"}
        if outlived:
            break
    assert outlived
    assert at > 10


# --- Readers meanwhile ---


async def test_readers_see_one_chain_while_segments_rotate_and_are_compressed(path: Path) -> None:
    over = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not over.is_set():
            records = list(iter_lines(path))
            assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
            last = tail(path, 5)
            assert [record["seq"] for record in last] == list(range(last[-1]["seq"] - 4, last[-1]["seq"] + 1))
            report = verify(path)
            assert report.ok, report
            seen.append(report.lines)

    with opened(path, segment_bytes=SMALL) as ledger:
        await asyncio.gather(*(appended(ledger, call()) for _ in range(10)))
        readers = [asyncio.create_task(asyncio.to_thread(read)) for _ in range(2)]
        for _ in range(60):
            await asyncio.gather(*(appended(ledger, call()) for _ in range(4)))
            await asyncio.to_thread(compress, path)
        over.set()
        await asyncio.gather(*readers)
    assert seen
    assert len(closed_firsts(path)) > 30
    assert_one_chain(path)


def test_a_segment_that_is_compressed_between_listing_and_opening_is_read(path: Path) -> None:
    write(path, *(call() for _ in range(12)), segment_bytes=SMALL)
    lines = list(raw_lines(path))
    with Segments(path) as found:
        compress(path)
        assert list(found.lines()) == lines


def test_a_segment_that_was_removed_is_named(path: Path) -> None:
    write(path, *(call() for _ in range(12)), segment_bytes=SMALL)
    with Segments(path) as found:
        gone = closed_path(path, closed_firsts(path)[1])
        gone.unlink()
        with pytest.raises(BrokenLineError, match=gone.name):
            list(found.lines())
    assert verify(path).first_bad == int(gone.stem.rpartition("-")[2])


def test_segments_that_were_archived_are_not_there_and_the_others_are(path: Path) -> None:
    write(path, *(call() for _ in range(12)), segment_bytes=SMALL)
    last = verify(path).lines
    for first in closed_firsts(path):
        closed_path(path, first).unlink()
    assert read_line(path, last)["seq"] == last
    with pytest.raises(NotFoundError):
        read_line(path, 1)
    (receipt,) = write(path, call())
    assert receipt.seq > last


def test_proofs_go_over_segments(path: Path) -> None:
    write(path, *(call() for _ in range(12)), segment_bytes=SMALL)
    compress(path)
    with Prover(path) as prover:
        proof = prover.inclusion(3)
    assert proof.root == verify(path).root
    check_inclusion(
        2,
        proof.tree_size,
        bytes.fromhex(proof.hash),
        list(map(bytes.fromhex, proof.inclusion)),
        bytes.fromhex(proof.root),
    )
