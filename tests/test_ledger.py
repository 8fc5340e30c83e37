"""Writing the ledger: many callers, power loss, full disks, files that are moved away or are not the ledger's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bus import chain, provenance, schemas
from bus import ledger as ledger_module
from bus.filesync import FileSync
from bus.ledger import TURNS_ALONE, Fsync, Ledger, LedgerError, Receipt
from bus.provenance import iter_lines, read_line
from bus.records import environment_hash
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, append, appended, call, opened, write
from tests.support import PATIENCE_S, eventually

if TYPE_CHECKING:
    from bus.model import Record

ROOT = Path(__file__).resolve().parent.parent

EARLIER = b"".join(
    b'{"request_id": "%d", "timestamp_ms": 1, "overlay": "abraxas", "version": "1", "phase": "OPEN", '
    b'"payload_hash": "00", "ok": true, "duration_ms": 3, "error": null}\n' % number
    for number in range(3)
)
"""A log of the AAL-Core before this one."""

WRITER = """
import asyncio, json, os, pathlib, sys
from bus.ledger import Ledger
async def main(path, fsync, environment, name, callers, calls):
    ledger = Ledger(pathlib.Path(path), fsync=fsync, environment=environment)
    ledger.open()
    async def caller(number):
        for call in range(calls):
            request_id = f"{name}-{number}-{call}"
            receipt = await ledger.submit({"type": "invoke", "timestamp_ms": 1, "request_id": request_id,
                                           "ok": True, "code": "OK", "error": "x" * 200})
            os.write(1, f"{receipt.seq} {receipt.hash} {request_id}\\n".encode())
    await asyncio.gather(*map(caller, range(callers)))
    ledger.close()
asyncio.run(main(*json.loads(sys.argv[1])))
"""

LIMITED = """
import asyncio, json, pathlib, resource, sys
from bus.ledger import Ledger, LedgerError
from bus.verification import verify
path = pathlib.Path(sys.argv[1])
ledger = Ledger(path, fsync="batch", environment=json.loads(sys.argv[2]))
ledger.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
written = 0
call = {"type": "invoke", "timestamp_ms": 1, "request_id": "r", "ok": True, "code": "OK", "error": "x" * 3000}
async def append():
    return await ledger.submit(call)
try:
    while True:
        asyncio.run(append())
        written += 1
except LedgerError as error:
    failed = error
assert failed.code == "ERR_LEDGER" and not ledger.healthy and "File too large" in ledger.reason, ledger.reason
assert not ledger.probe() and not list(path.parent.glob('*.torn-*'))
assert verify(path).lines == ledger.size == written, (verify(path), ledger.size, written)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert ledger.probe() and ledger.healthy
assert asyncio.run(append()).seq == written + 1
ledger.close()
print(written, verify(path).lines)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


def _none(*_: object) -> Any:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["kernel", "refused", "thread"])
def syncer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who syncs a group that the loop wrote: the kernel, or a thread, since there is no such kernel or it refuses."""
    if request.param == "thread":
        monkeypatch.setattr(ledger_module, "FileSync", _none)
    elif request.param == "refused":
        monkeypatch.setattr(FileSync, "begin", _none)
    return str(request.param)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def ledger_size(path: Path) -> int:
    return path.stat().st_size


def leave_in_an_ending_loop(ledger: Ledger, record: Record) -> None:
    """Have a record written in a loop that does not run on."""
    loop = asyncio.new_event_loop()

    def leave() -> None:
        ledger.submit(record)
        loop.stop()

    loop.call_soon(leave)
    loop.run_forever()
    loop.close()


def append_until_it_fails(ledger: Ledger) -> int:
    """Fill the file system; gives the number of lines that went in."""
    written = 0
    with contextlib.suppress(LedgerError):
        while written < 1000:
            append(ledger, call(error="x" * 3000))
            written += 1
    return written


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


async def test_a_record_that_is_not_json_fails_alone(path: Path) -> None:
    with opened(path) as ledger:
        results = await asyncio.gather(
            appended(ledger, call("a")),
            appended(ledger, call(error="\ud800")),
            appended(ledger, call("b")),
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
        append(ledger, call(environment_hash=environment_hash(other)))
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
            receipt = await appended(ledger, call(f"{number}-{turn}"))
            answered.append(receipt.seq)
            assert receipt.tree_size >= receipt.seq

    with opened(path, "batch") as ledger:
        await asyncio.gather(*(caller(ledger, number) for number in range(64)))
        assert ledger.size == 1281
    assert answered == sorted(answered)
    report = verify(path)
    assert (report.ok, report.lines, report.checkpoints) == (True, 1281, 1)
    assert len({record["request_id"] for record in iter_lines(path) if record["type"] == "invoke"}) == 1280


def test_loops_in_several_threads_and_callers_without_one_share_a_ledger(path: Path) -> None:
    async def several(ledger: Ledger) -> None:
        await asyncio.gather(*(appended(ledger, call()) for _ in range(50)))

    with opened(path) as ledger:
        threads = [threading.Thread(target=lambda: asyncio.run(several(ledger))) for _ in range(3)]
        threads.append(threading.Thread(target=lambda: [append(ledger, call()) for _ in range(50)]))
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


async def test_a_lock_that_cannot_be_let_go_of_is_closed_and_stops_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch, syncer: str
) -> None:
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd, operation)

    with opened(path, "batch") as ledger, opened(path, "batch") as other:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", flock)
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(2):
                    await appended(ledger, call())
                    await appended(other, call())
        assert (await appended(ledger, call())).seq == 5
    assert verify(path).lines == 5


async def test_a_group_that_is_neither_synced_nor_taken_back_for_want_of_the_lock_is_refused_and_stops_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch, syncer: str
) -> None:
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            fail()
        real(fd, operation)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    end = FileSync.end

    def end_and_fail(sync: FileSync) -> None:
        end(sync)
        fail()

    with opened(path, "batch") as ledger:
        await appended(ledger, call("before"))
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", flock)
            patch.setattr(os, "fdatasync", fail)
            patch.setattr(FileSync, "end", end_and_fail)
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(LedgerError, match="Input/output"):
                    await appended(ledger, call("refused"))
        assert (await appended(ledger, call("after"))).seq == 3
    assert verify(path).ok


def test_a_log_that_cannot_be_opened_anew_is_tried_again_and_its_descriptor_is_closed_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(path) as ledger:
        append(ledger, call())
        path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(chain, "finish_rotation", fail)
            for _ in range(2):
                with pytest.raises(LedgerError, match="Input/output"):
                    append(ledger, call())
        append(ledger, call())
    assert [line["type"] for line in iter_lines(path)] == ["recovered", "invoke"]


def test_two_ledgers_on_one_file_take_turns(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        assert [append(one, call()).seq, append(other, call()).seq, append(one, call()).seq] == [1, 2, 3]
    assert verify(path).lines == 3


async def test_a_cancelled_caller_does_not_lose_its_line(path: Path) -> None:
    with opened(path) as ledger:
        task = asyncio.create_task(appended(ledger, call("gone")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await appended(ledger, call("next"))
    assert [record["request_id"] for record in iter_lines(path)] == ["gone", "next"]


async def test_close_writes_and_answers_what_still_waits(path: Path) -> None:
    with opened(path) as ledger:
        waiting = [asyncio.ensure_future(appended(ledger, call())) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.to_thread(ledger.close)
        assert sorted(receipt.seq for receipt in await asyncio.gather(*waiting)) == list(range(1, 101))
        with pytest.raises(LedgerError, match="not open"):
            await appended(ledger, call())
        assert not ledger.healthy
    assert verify(path).lines == 100


def test_a_loop_that_ended_before_its_answer_does_not_disturb_the_writer(path: Path) -> None:
    async def leave(ledger: Ledger) -> None:
        task = asyncio.ensure_future(appended(ledger, call("left")))
        await asyncio.sleep(0)
        task.cancel()

    with opened(path) as ledger:
        asyncio.run(leave(ledger))
        append(ledger, call("stayed"))
    assert [record["request_id"] for record in iter_lines(path)] == ["left", "stayed"]


def test_what_a_loop_left_that_ended_before_it_came_to_write_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.01)
    with opened(path) as ledger:
        leave_in_an_ending_loop(ledger, call("left"))
        eventually(lambda: provenance.tail(path, 1) != [], "the line is written")
        assert append(ledger, call("next")).seq == 2
    with opened(path) as ledger:
        monkeypatch.setattr(ledger, "_flush", lambda: None)
        leave_in_an_ending_loop(ledger, call("last"))
    assert [record["request_id"] for record in iter_lines(path)] == ["left", "next", "last"]


async def test_the_loop_writes_a_small_group_and_leaves_the_sync_and_a_large_group_to_others(
    path: Path, monkeypatch: pytest.MonkeyPatch, syncer: str
) -> None:
    threads: list[tuple[str, str]] = []

    def noting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def note(*arguments: Any) -> Any:
            threads.append((name, threading.current_thread().name))
            return real(*arguments)

        monkeypatch.setattr(owner, name, note)

    here = threading.current_thread().name
    with opened(path, "batch") as ledger:
        await appended(ledger, call())
        noting(os, "write")
        noting(os, "fdatasync")
        noting(FileSync, "end")
        await asyncio.gather(*(appended(ledger, call()) for _ in range(3)))
        small, threads[:] = threads.copy(), []
        await appended(ledger, call(error="x" * 500_000))
        large = threads.copy()
        monkeypatch.undo()
    assert small == [("write", here), ("end", here) if syncer == "kernel" else ("fdatasync", "ledger")]
    assert large == [("write", "ledger"), ("fdatasync", "ledger")]


async def test_a_group_that_the_kernel_syncs_is_concluded_though_its_loop_has_ended(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.01)
    begun = threading.Event()
    real = FileSync.begin

    def begin(self: FileSync, fd: int, eventfd: int) -> None:
        real(self, fd, eventfd)
        begun.set()

    def leave(ledger: Ledger, name: str) -> None:
        """End a loop while the kernel syncs what it wrote."""
        begun.clear()
        loop = asyncio.new_event_loop()
        loop.call_soon(ledger.submit, call(name))
        while not begun.is_set():
            loop.call_soon(loop.stop)
            loop.run_forever()
        loop.close()

    monkeypatch.setattr(FileSync, "begin", begin)
    descriptors = open_files()
    with opened(path, "batch") as ledger:
        await appended(ledger, call("first"))
        await asyncio.to_thread(leave, ledger, "left")
        assert (await appended(ledger, call("next"))).seq == 3
        await asyncio.to_thread(leave, ledger, "last")
    assert [record["request_id"] for record in iter_lines(path)] == ["first", "left", "next", "last"]
    assert open_files() == descriptors


async def test_a_kernel_that_refuses_for_good_is_asked_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: FileSync, fd: int, eventfd: int) -> None:
        asked.append(fd)
        raise OSError(errno.EINVAL if len(asked) > 1 else errno.EAGAIN, "no")

    monkeypatch.setattr(FileSync, "begin", refuse)
    with opened(path, "batch") as ledger:
        for _ in range(5):
            await appended(ledger, call())
        assert len(asked) == 2  # the first refusal was for want of something
    assert verify(path).lines == 5


def test_a_probe_opens_no_ledger_that_was_closed(path: Path) -> None:
    descriptors = open_files()
    with opened(path) as ledger:
        append(ledger, call())
    assert not ledger.probe()
    assert open_files() == descriptors


async def test_calls_of_one_turn_of_the_loop_and_the_next_share_a_group(path: Path, syncer: str) -> None:
    with opened(path, "batch") as ledger:
        await appended(ledger, call())
        waiting = [ledger.submit(call()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting += [ledger.submit(call()) for _ in range(3)]
        assert {receipt.tree_size for receipt in await asyncio.gather(*waiting)} == {7}


async def test_a_group_waits_for_more_only_while_there_may_be_some(path: Path) -> None:
    under_way = [call()]
    with opened(path, more=lambda: bool(under_way)) as ledger:
        await asyncio.gather(*(ledger.submit(call()) for _ in range(3)))  # so the next one is worth waiting for
        written = ledger.submit(call())
        for _ in range(TURNS_ALONE + 1):
            await asyncio.sleep(0)
        assert not written.done()
        under_way.clear()
        await asyncio.sleep(0)
        assert written.done()


async def test_a_ledger_that_is_closed_in_its_loop_has_synced_what_was_written(path: Path) -> None:
    with opened(path, "batch") as ledger:
        await appended(ledger, call())
        waiting = ledger.submit(call("last"))
        for _ in range(TURNS_ALONE + 1):
            await asyncio.sleep(0)  # in the end it is written, and being synced
    assert (await waiting).seq == verify(path).lines == 2


async def test_a_lock_that_another_holds_is_waited_for_while_the_loop_goes_on(path: Path) -> None:
    with opened(path) as ledger:
        await appended(ledger, call("a"))
        with path.with_suffix(".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = [ledger.submit(call(name)) for name in "bc"]
            for _ in range(10):
                await asyncio.sleep(0)
            assert not any(future.done() for future in waiting)
        assert [(await future).seq for future in waiting] == [2, 3]


def test_another_process_cannot_wait_for_the_writer_of_this_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as ledger:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(LedgerError, match="another process"):
            append(ledger, call())


# --- Power loss, full disks, missing files ---


def test_a_ledger_says_when_it_opens_that_it_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, call())

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with opened(path) as ledger:
        assert not ledger.healthy
        assert "No space left" in (ledger.reason or "")
    assert verify(path).lines == 1


@pytest.mark.parametrize(("fsync", "least", "most"), [("always", 20, 20), ("batch", 1, 20), ("never", 0, 0)])
async def test_each_fsync_mode_syncs_before_the_answer_as_often_as_it_says(
    path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Fsync, least: int, most: int
) -> None:
    sizes: list[int] = []
    real, begin = os.fdatasync, FileSync.begin

    def counted(fd: int) -> None:
        sizes.append(ledger_size(path))
        real(fd)

    def begun(sync: FileSync, fd: int, eventfd: int) -> None:
        sizes.append(ledger_size(path))
        begin(sync, fd, eventfd)

    monkeypatch.setattr(os, "fdatasync", counted)
    monkeypatch.setattr(FileSync, "begin", begun)
    with opened(path, fsync) as ledger:
        sizes.clear()
        receipts = await asyncio.gather(*(appended(ledger, call()) for _ in range(20)))
        assert least <= len(sizes) <= most
        assert len(receipts) == verify(path).lines == 20
        if fsync != "never":
            assert sizes[-1] == ledger_size(path)


def test_what_could_not_be_synced_is_written_once_more_and_a_later_success_makes_the_ledger_well(
    path: Path, monkeypatch: pytest.MonkeyPatch, syncer: str
) -> None:
    end = FileSync.end

    def fail(syncs: int | FileSync) -> None:
        if isinstance(syncs, FileSync):
            end(syncs)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(path, "batch") as ledger:
        append(ledger, call("good"))
        with monkeypatch.context() as patch:
            owner, name = (FileSync, "end") if syncer == "kernel" else (os, "fdatasync")
            patch.setattr(owner, name, fail)
            with pytest.raises(LedgerError, match="Input/output error") as caught:
                append(ledger, call("unanswered"))
            assert caught.value.retry_after_s == 1
            assert not ledger.healthy
        end_of_good = path.read_bytes().index(b"\n") + 1
        dropped = path.read_bytes()[end_of_good:]
        again: list[tuple[bytes, int]] = []
        write = os.pwrite

        def noted(fd: int, data: memoryview, offset: int) -> int:
            again.append((bytes(data), offset))
            return write(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", noted)
        assert append(ledger, call("again")).seq == 3
        assert again == [(dropped, end_of_good)]
        assert ledger.healthy
    assert verify(path).ok
    assert [record["request_id"] for record in iter_lines(path)] == ["good", "unanswered", "again"]


def test_what_heals_is_written_down_once_though_its_sync_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, call("good"))
    with path.open("ab") as file:
        file.write(b'{"torn')
    ledger = Ledger(path, fsync="always", environment=ENVIRONMENT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _fail)
        ledger.open()
        with pytest.raises(LedgerError):
            append(ledger, call("unanswered"))
    append(ledger, call("again"))
    ledger.close()
    assert verify(path).ok
    assert [record["type"] for record in iter_lines(path)].count("recovered") == 1


def _fail(_: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_could_not_be_synced_stays_where_another_has_gone_on_from_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, syncer: str
) -> None:
    end = FileSync.end

    with opened(path, "batch") as ledger, opened(path, "never") as other:
        append(ledger, call("good"))

        def fail(syncs: int | FileSync) -> None:
            if isinstance(syncs, FileSync):
                end(syncs)
            threading.Thread(target=append, args=(other, call("other"))).start()
            while other.size < 3:
                threading.Event().wait(0.001)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            owner, name = (FileSync, "end") if syncer == "kernel" else (os, "fdatasync")
            patch.setattr(owner, name, fail)
            with pytest.raises(LedgerError, match="Input/output error"):
                append(ledger, call("unanswered"))
        assert append(ledger, call("again")).seq == 4
        assert ledger.healthy
    assert verify(path).ok
    assert [record["request_id"] for record in iter_lines(path)] == ["good", "unanswered", "other", "again"]


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
        append(ledger, call("good"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            patch.setattr(os, "ftruncate", fail)
            with pytest.raises(LedgerError):
                append(ledger, call("lost"))
        assert verify(path).fault == "torn"
        append(ledger, call("again"))
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
            assert append(ledger, call()).seq == written + 1
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
    begun = b'{"caller":"'.ljust(4096 - path.stat().st_size, b"x")
    with path.open("ab") as file:
        file.write(begun + bytes(4096) + b'"}\n' + bytes(3000))
    write(path, call("b"))
    assert [record["type"] for record in iter_lines(path)] == ["invoke", "recovered", "invoke"]
    assert verify(path).ok


def test_bytes_kept_from_an_earlier_tear_are_not_written_over(path: Path) -> None:
    for torn in (b'{"first', b'{"second'):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(torn)
        write(path)
    assert path.with_name("provenance.jsonl.torn-1").read_bytes() == b'{"first'
    assert path.with_name("provenance.jsonl.torn-1-2").read_bytes() == b'{"second'


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
        two = [append(ledger, call()) for _ in range(2)]
        path.unlink()
        assert append(ledger, call("first")).seq == 2
    assert_says_what_is_gone(path, 1, two[-1])
    assert read_line(path, 2)["request_id"] == "first"
    assert "removed or replaced" in caplog.text
    assert f"had line 2 of the hash {two[-1].hash}, and has it no more" in caplog.text


def assert_says_what_is_gone(path: Path, seq: int, last: Receipt) -> None:
    assert verify(path).ok
    (said,) = [line for line in iter_lines(path) if line["type"] == "recovered"]
    assert (said["seq"], said["lost_seq"], said["lost_hash"]) == (seq, last.seq, last.hash)
    assert (said["cut_bytes"], said["kept_as"]) == (None, None)
    assert schemas.faults(schemas.shipped("record"), said) == []


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_log_that_is_made_shorter_at_a_line_is_noticed_and_said(
    path: Path, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    with opened(path) as ledger:
        last = [append(ledger, call()) for _ in range(4)][-1]
        os.truncate(path, sum(map(len, path.read_bytes().splitlines(keepends=True)[:left])))
        assert append(ledger, call()).seq == left + 2
        assert append(ledger, call()).seq == left + 3
    assert_says_what_is_gone(path, left + 1, last)
    assert f"had line 4 of the hash {last.hash}" in caplog.text


def test_a_log_that_is_made_shorter_within_a_line_is_said_with_what_was_left_of_that(path: Path) -> None:
    with opened(path) as ledger:
        last = [append(ledger, call()) for _ in range(3)][-1]
        os.truncate(path, ledger_size(path) - 9)
        append(ledger, call())
    assert verify(path).ok
    said = [line for line in iter_lines(path) if line["type"] == "recovered"]
    assert [line.get("lost_hash") for line in said] == [last.hash, None]
    assert said[1]["cut_bytes"] == path.with_name(said[1]["kept_as"]).stat().st_size


@pytest.mark.parametrize("count", [2, 3, 9])
def test_another_history_that_is_written_over_the_log_is_noticed_and_said(path: Path, count: int) -> None:
    other = path.with_name("other.jsonl")
    write(other, *(call("other") for _ in range(count)))
    with opened(path) as ledger:
        last = [append(ledger, call()) for _ in range(3)][-1]
        path.write_bytes(other.read_bytes())
        if count == 3:  # of the same length: it shows with the next line of another
            write(path, call("another"))
            count += 1
        assert append(ledger, call()).seq == count + 2
    assert_says_what_is_gone(path, count + 1, last)


def test_what_is_gone_is_said_once_by_those_who_knew_the_same(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        append(one, call())
        last = append(other, call())
        one.probe()
        os.truncate(path, 0)
        append(other, call())
        append(one, call())
    assert_says_what_is_gone(path, 1, last)


def test_what_a_reader_of_the_end_cannot_find_in_damaged_segments_is_said_to_be_gone(path: Path) -> None:
    with opened(path) as ledger:
        last = append(ledger, call())
        write(path, *(call() for _ in range(8)), segment_bytes=1000)
        for closed in path.parent.glob("provenance-*.jsonl"):
            closed.unlink()
        append(ledger, call())
    (said,) = [line for line in provenance.tail(path, 9) if line["type"] == "recovered"]
    assert said["lost_seq"] == last.seq


def test_who_goes_on_from_lines_and_segments_of_another_misses_nothing(path: Path) -> None:
    with opened(path) as ledger:
        append(ledger, call())
        write(path, *(call() for _ in range(20)), segment_bytes=2000)
        append(ledger, call())
    assert verify(path).ok
    assert [line for line in iter_lines(path) if line["type"] == "recovered"] == []


def test_a_log_moved_away_goes_on_in_a_new_file_with_its_environment(path: Path) -> None:
    named = call(environment_hash=environment_hash(ENVIRONMENT))
    with opened(path) as ledger:
        append(ledger, named)
        path.rename(path.with_name("old.jsonl"))
        append(ledger, named)
    assert [line["type"] for line in iter_lines(path.with_name("old.jsonl"))] == ["invoke", "environment"]
    assert [line["type"] for line in iter_lines(path)] == ["recovered", "invoke", "environment"]


def test_a_log_that_another_took_the_place_of_is_continued(path: Path) -> None:
    other = path.with_name("other.jsonl")
    receipts = write(other, call("a"), call("b"), call("c"))
    with opened(path) as ledger:
        last = append(ledger, call())
        other.rename(path)
        assert append(ledger, call()).seq == 5
    assert read_line(path, 4)["prev"] == receipts[-1].hash
    assert_says_what_is_gone(path, 4, last)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was synced by fsync(2), in order."""
    names: list[str] = []
    real = os.fsync

    def noted(fd: int) -> None:
        real(fd)
        names.append(str(Path(f"/proc/self/fd/{fd}").readlink()))

    monkeypatch.setattr(os, "fsync", noted)
    return names


@pytest.mark.parametrize("fsync", ["always", "batch"])
def test_the_names_of_the_log_and_of_the_folders_that_were_made_for_it_last(
    tmp_path: Path, synced: list[str], fsync: Fsync
) -> None:
    with opened(tmp_path / "a" / "b" / "logs" / "provenance.jsonl", fsync) as ledger:
        append(ledger, call())
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b"), str(tmp_path / "a" / "b" / "logs")} <= set(
        synced
    )


def test_the_name_of_a_folder_lasts_that_a_process_made_and_was_killed(path: Path, synced: list[str]) -> None:
    path.parent.mkdir()
    with opened(path, "batch") as ledger:
        append(ledger, call())
    assert synced[:2] == [str(path.parent), str(path.parent.parent)]


def test_no_name_is_synced_where_nothing_is_to_last(path: Path, synced: list[str]) -> None:
    write(path, call())
    assert synced == []


@pytest.mark.usefixtures("bound_by_modes")
def test_a_folder_whose_own_folder_may_not_be_read_holds_a_log(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    tmp_path.chmod(0o311)
    try:
        with opened(path, "batch") as ledger:
            assert append(ledger, call()).seq == 1
    finally:
        tmp_path.chmod(0o755)


def test_a_removed_folder_is_made_again(path: Path) -> None:
    with opened(path) as ledger:
        append(ledger, call())
        shutil.rmtree(path.parent)
        assert append(ledger, call()).seq == 2
        with opened(path) as other:
            assert append(other, call()).seq == 3


@pytest.mark.usefixtures("bound_by_modes")
def test_a_folder_that_may_not_be_written_makes_the_ledger_unwell_and_says_so(path: Path) -> None:
    path.parent.mkdir(mode=0o555)
    with opened(path) as ledger:
        assert not ledger.healthy
        assert "Permission denied" in (ledger.reason or "")
        assert not ledger.probe()
        with pytest.raises(LedgerError, match="Permission denied"):
            append(ledger, call())
        path.parent.chmod(0o755)
        assert append(ledger, call()).seq == 1


def test_a_folder_that_cannot_be_makes_the_ledger_unwell_until_it_can(path: Path) -> None:
    path.parent.write_text("in the way")
    with opened(path) as ledger:
        assert not ledger.healthy
        assert not ledger.probe()
        with pytest.raises(LedgerError, match="cannot be written"):
            append(ledger, call())
        path.parent.unlink()
        assert ledger.probe()
        assert ledger.healthy
        assert append(ledger, call()).seq == 1


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
        append(ledger, call())
        before = path.read_bytes()
        assert ledger.probe()
        assert path.read_bytes() == before
        assert {file.name for file in path.parent.iterdir()} == {"provenance.jsonl", "provenance.lock"}


# --- What is not this chain ---


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b'{"hash":"of another kind"}\n', b"text", b'{"a":1} or so'])
def test_a_file_that_is_not_a_ledger_is_not_written_to(path: Path, line: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(line)
    with opened(path) as ledger:
        assert not ledger.healthy
        with pytest.raises(LedgerError):
            append(ledger, call())
    assert path.read_bytes() == line
    assert list(path.parent.glob("*.before-*")) == []


def test_another_programs_log_is_kept_beside_a_new_chain_that_names_it(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(EARLIER)
    with opened(path) as ledger:
        assert ledger.healthy
        assert append(ledger, call("first")).seq == 2
    recovered, first = iter_lines(path)
    assert (recovered["type"], recovered["kept_as"], recovered["cut_bytes"]) == (
        "recovered", "provenance.jsonl.before-1", len(EARLIER),
    )  # fmt: skip
    assert schemas.faults(schemas.shipped("record"), recovered) == []
    assert first["request_id"] == "first"
    assert verify(path).lines == 2
    assert path.with_name("provenance.jsonl.before-1").read_bytes() == EARLIER
    assert "another program's log" in caplog.text


def test_what_was_kept_before_is_not_written_over(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("provenance.jsonl.before-1").write_bytes(b"first")
    path.with_name("provenance.jsonl.before-2").symlink_to("nowhere")
    path.write_bytes(EARLIER)
    write(path)
    assert path.with_name("provenance.jsonl.before-1").read_bytes() == b"first"
    assert path.with_name("provenance.jsonl.before-3").read_bytes() == EARLIER


def test_another_programs_log_that_cannot_be_moved_makes_the_ledger_unwell_until_it_can(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path.parent.mkdir()
    path.write_bytes(EARLIER)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with opened(path) as ledger:
            assert not ledger.healthy
    assert path.read_bytes() == EARLIER
    assert [record["type"] for record in (write(path, call()), iter_lines(path))[1]] == ["recovered", "invoke"]


def test_processes_that_meet_at_another_programs_log_move_it_once(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(EARLIER)
    writers = [start(path, name, callers=4, calls=10) for name in ("a", "b", "c")]
    outputs = [writer.communicate(timeout=60) for writer in writers]
    assert [file.name for file in path.parent.glob("*.before-*")] == ["provenance.jsonl.before-1"]
    assert path.with_name("provenance.jsonl.before-1").read_bytes() == EARLIER
    assert verify(path).lines == 121
    assert_all_there(path, [line for output, _ in outputs for line in output.splitlines()])


def test_a_ledger_whose_last_line_is_broken_says_so_and_what_to_do(path: Path) -> None:
    write(path, call())
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b"{}\n")
    with opened(path) as ledger:
        assert not ledger.healthy
        assert (ledger.reason or "").startswith(f"the last line of the ledger {path} is broken: ")
        assert "aal provenance verify" in (ledger.hint or "")
        with pytest.raises(LedgerError) as caught:
            append(ledger, call())
        assert (caught.value.detail, caught.value.hint) == (ledger.reason, ledger.hint)
        path.write_bytes(whole)
        assert ledger.probe()
        assert ledger.hint is None


def test_the_reason_names_the_ledger_once_and_reads_alone(path: Path) -> None:
    path.parent.write_text("in the way")
    with opened(path) as ledger:
        assert (ledger.reason or "").startswith(f"the ledger {path} cannot be written: ")
        assert (ledger.reason or "").count("cannot be written") == 1
        assert ledger.hint is None


def test_an_error_that_nobody_thought_of_answers_the_callers_and_is_logged(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unthought of")

    with opened(path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with caplog.at_level(logging.ERROR), pytest.raises(LedgerError, match="unthought of"):
                append(ledger, call())
        assert "Traceback" in caplog.text
        assert append(ledger, call()).seq == 1


def test_a_line_that_another_process_knows_of_is_not_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two lines of the same length would be one line for who had seen the first."""
    with opened(path, "always") as ledger, opened(path, "never") as other:
        append(ledger, call("good"))
        with monkeypatch.context() as patch:

            def fail(_: int) -> None:
                other.probe()
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(LedgerError):
                append(ledger, call("first"))
        append(ledger, call("other"))
        append(other, call("after"))
    assert verify(path).ok
    assert [record["request_id"] for record in iter_lines(path)] == ["good", "first", "other", "after"]
