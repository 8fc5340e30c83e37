"""Calls that may change something: the line before they start, and the line for those that were cut off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bus import provenance, replay, segments, starts, verification
from bus.dispatch import Bus
from bus.errors import ReplayError
from bus.ledger import LedgerError
from bus.starts import Starts
from runners.base import Outcome
from tests.ledgers import call, opened
from tests.support import (
    REPO,
    InProcessRunner,
    a_call,
    add_overlay,
    lines,
    misfits,
    running_bus,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bus.ledger import Ledger
    from bus.model import Record
    from bus.settings import Settings
    from runners.base import Job

WRITER = """
import asyncio, json, pathlib, sys
from bus.ledger import Ledger
from bus.starts import Starts
from tests.ledgers import ENVIRONMENT, call
async def main(path):
    ledger = Ledger(pathlib.Path(path), fsync="never", environment=ENVIRONMENT)
    ledger.open()
    starts = Starts(ledger)
    for name in ("ended", "open"):
        await starts.begin({"request_id": name, "overlay": "o", "phase": "SEAL"})
    await ledger.submit(call("ended"))
    starts.end("ended")
    print("there", flush=True)
    sys.stdin.read()
asyncio.run(main(sys.argv[1]))
"""
"""A process with a call that has ended and one that has not."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


@contextlib.contextmanager
def a_writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], cwd=REPO, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


def started(request_id: str) -> Record:
    return {"request_id": request_id, "overlay": "o", "phase": "SEAL"}


def types(path: Path) -> list[tuple[str, str]]:
    return [(line["type"], line["request_id"]) for line in provenance.iter_lines(path) if "request_id" in line]


def left(path: Path) -> list[str]:
    return [file.name for file in (path.parent / starts.FOLDER).iterdir()]


def leave_open(ledger: Ledger, request_id: str) -> str:
    """As a process does that ends without a word: its lock is free, its file stays."""

    async def begin() -> None:
        of_another = Starts(ledger)
        await of_another.begin(started(request_id))
        of_another.close()

    asyncio.run(begin())
    (name,) = left(ledger.path)
    return name


def close_left(ledger: Ledger) -> None:
    async def close() -> None:
        await Starts(ledger).close_left()

    asyncio.run(close())


# --- Of the bus ---


@pytest.mark.parametrize("phase", ["ASCEND", "SEAL"])
async def test_a_call_that_may_change_something_says_so_before_anything_of_its_overlay_runs(
    settings: Settings, phase: str
) -> None:
    seen: list[Record] = []

    def look(_: Job) -> Outcome:
        seen.extend(lines(settings))
        return Outcome(result=1)

    add_overlay(settings.overlays, capabilities=["analysis", "exec"], phases=["ASCEND", "SEAL"])
    async with running_bus(settings, InProcessRunner(look)) as bus:
        answer = await bus.invoke(a_call(phase=phase, session="s"), None)
    assert answer.ok, answer.body
    assert [line["type"] for line in seen] == ["started", "environment"]
    assert misfits("record", seen[0]) == []
    assert answer.record is not None
    same = seen[0].keys() & answer.record.keys() - {"type", "timestamp_ms", "seq", "prev", "hash"}
    assert {name: seen[0][name] for name in same} == {name: answer.record[name] for name in same}
    assert {"request_id", "run_id", "overlay", "payload_hash", "code_hash", "session"} <= same
    assert [line["type"] for line in lines(settings)] == ["started", "environment", "invoke"]


@pytest.mark.parametrize("phase", ["OPEN", "ALIGN", "CLEAR"])
async def test_other_calls_have_one_line(settings: Settings, phase: str) -> None:
    add_overlay(settings.overlays)
    async with running_bus(settings, InProcessRunner()) as bus:
        await bus.invoke(a_call(phase=phase))
    assert [line["type"] for line in lines(settings)] == ["invoke", "environment"]
    assert not (settings.logs / starts.FOLDER).exists()


async def test_a_call_whose_start_cannot_be_written_does_not_start(settings: Settings) -> None:
    add_overlay(settings.overlays)
    runner = InProcessRunner()
    async with running_bus(settings, runner) as bus:
        (settings.logs / starts.FOLDER).write_text("in the way")
        answer = await bus.invoke(a_call(phase="SEAL"))
        assert (answer.http_status, answer.body["code"]) == (503, "ERR_LEDGER")
        assert str(settings.logs / starts.FOLDER) in answer.body["detail"]
        (settings.logs / starts.FOLDER).unlink()
        assert runner.jobs == []
        assert (await bus.invoke(a_call(phase="SEAL"))).ok
    assert [line["type"] for line in lines(settings)] == ["denied", "environment", "started", "invoke"]


async def test_a_replay_says_that_it_starts_too(settings: Settings) -> None:
    add_overlay(settings.overlays)
    async with running_bus(settings, InProcessRunner()) as bus:
        await bus.invoke(a_call(phase="SEAL"))
        (call,) = [line["seq"] for line in lines(settings) if line["type"] == "invoke"]
        await replay.replay(bus, call, live=True)
    assert [(line["type"], line["replay_of"]) for line in lines(settings)[-2:]] == [("started", call), ("replay", call)]


async def test_a_line_of_a_start_or_of_a_cut_is_not_replayed_and_says_why(settings: Settings) -> None:
    add_overlay(settings.overlays)
    async with running_bus(settings, InProcessRunner()) as bus:
        answer = await bus.invoke(a_call(phase="SEAL"))
        with pytest.raises(ReplayError, match="says that a call started") as refusal:
            await replay.replay(bus, 1)
        assert answer.body["request_id"] in (refusal.value.hint or "")
        line = {"type": "interrupted", "timestamp_ms": 1, "started": 1, "request_id": "r"}
        cut = await bus.ledger.submit(line)
        with pytest.raises(ReplayError, match="cut off"):
            await replay.replay(bus, cut.seq)


async def test_a_call_that_is_cancelled_ends_by_its_own_line(settings: Settings) -> None:
    forever = asyncio.Event()

    async def wait(_: Job) -> Outcome:
        await forever.wait()
        raise AssertionError

    add_overlay(settings.overlays)
    runner = InProcessRunner(wait)
    async with running_bus(settings, runner) as bus:
        task = asyncio.create_task(bus.invoke(a_call(phase="SEAL")))
        await until(lambda: runner.jobs != [])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert left(settings.ledger) == []
    async with running_bus(settings):
        pass
    assert [line["type"] for line in lines(settings)] == ["started", "environment", "invoke"]


async def test_a_call_that_runs_again_after_an_eviction_starts_once(settings: Settings) -> None:
    outcomes = [Outcome("ERR_EVICTED"), Outcome(result=1)]
    add_overlay(settings.overlays, policy={"deterministic": True})
    async with running_bus(replace(settings, eviction_retries=1), InProcessRunner(lambda _: outcomes.pop(0))) as bus:
        assert (await bus.invoke(a_call(phase="SEAL"))).ok
    assert outcomes == []
    assert [line["type"] for line in lines(settings)] == ["started", "environment", "invoke"]


async def test_a_bus_that_starts_twice_at_once_starts_once(settings: Settings) -> None:
    add_overlay(settings.overlays)
    with a_writer(settings.ledger):
        pass
    bus = Bus(settings)
    await asyncio.gather(bus.start(watch=False), bus.start(watch=False))
    await bus.close()
    assert [line["type"] for line in lines(settings)].count("interrupted") == 1


# --- What others left ---


def test_the_call_of_a_process_that_was_killed_is_closed_once_and_one_that_ended_is_not(settings: Settings) -> None:
    with a_writer(settings.ledger) as process:
        process.send_signal(signal.SIGKILL)
    for _ in range(2):
        with opened(settings.ledger) as ledger:
            close_left(ledger)
    before = [("started", "ended"), ("started", "open"), ("invoke", "ended")]
    assert types(settings.ledger) == [*before, ("interrupted", "open")]
    (line,) = provenance.tail(settings.ledger, 1)
    assert (line["started"], line["phase"], line["overlay"]) == (2, "SEAL", "o")
    assert left(settings.ledger) == []
    assert verification.verify(settings.ledger).ok


def test_the_call_of_a_process_that_lives_is_left_alone(path: Path) -> None:
    with a_writer(path):
        with opened(path) as ledger:
            close_left(ledger)
        assert types(path)[-1] == ("invoke", "ended")
    with opened(path) as ledger:
        close_left(ledger)
    assert types(path)[-1] == ("interrupted", "open")


async def test_an_interrupted_line_has_its_form(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    add_overlay(settings.overlays)
    dying = Bus(settings, plugins=[InProcessRunner(lambda _: Outcome(result=1))])
    await dying.start(watch=False)
    monkeypatch.setattr(dying.starts, "end", lambda _: None)  # its call's line is lost below
    await dying.invoke(a_call(phase="SEAL"))
    await dying.close()
    whole = settings.ledger.read_bytes().splitlines(keepends=True)
    settings.ledger.write_bytes(b"".join(whole[:2]))
    async with running_bus(settings):
        pass
    (line,) = provenance.tail(settings.ledger, 1)
    assert (line["type"], line["started"]) == ("interrupted", 1)
    assert misfits("record", line) == []


def test_what_cannot_be_closed_now_is_closed_by_a_later_start(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(path) as ledger:
        leave_open(ledger, "open")
    with opened(path) as ledger:
        path.write_bytes(path.read_bytes() + b"{}\n")
        close_left(ledger)
        assert "not marked in the ledger" in caplog.text
        assert len(left(path)) == 1
        path.write_bytes(path.read_bytes()[:-3])
        close_left(ledger)
    assert types(path) == [("started", "open"), ("interrupted", "open")]
    assert left(path) == []


def test_a_start_that_died_between_line_and_file_does_not_close_a_call_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: object) -> None:
        raise OSError("no more")

    with opened(path) as ledger:
        leave_open(ledger, "open")
        with monkeypatch.context() as patch:
            patch.setattr("bus.starts._Marker.remove", die)
            close_left(ledger)
        assert len(left(path)) == 1
        close_left(ledger)
    assert types(path) == [("started", "open"), ("interrupted", "open")]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines that are searched from now on."""
    read: list[bytes] = []
    real = provenance.raw_lines

    def noting(path: Path, start: int) -> Iterator[bytes]:
        for line in real(path, start):
            read.append(line)
            yield line

    monkeypatch.setattr(provenance, "raw_lines", noting)
    return read


def test_only_the_lines_since_the_first_call_that_may_be_open_are_searched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def calls(ledger: Ledger) -> None:
        of_another = Starts(ledger)
        for number in range(20):
            await of_another.begin(started(str(number)))
            of_another.end(str(number))
        await of_another.begin(started("open"))
        of_another.close()

    with opened(path) as ledger:
        asyncio.run(calls(ledger))
        read = noted(monkeypatch)
        close_left(ledger)
    assert types(path)[-1] == ("interrupted", "open")
    assert len(read) == 1


def test_of_calls_that_overlap_all_the_time_only_the_lines_since_the_oldest_open_one_are_searched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def calls(ledger: Ledger) -> None:
        of_another = Starts(ledger)
        await of_another.begin(started("0"))
        for number in range(1, 21):
            await of_another.begin(started(str(number)))
            await _submit(ledger, str(number - 1))
            of_another.end(str(number - 1))
        of_another.close()

    with opened(path) as ledger:
        asyncio.run(calls(ledger))
        read = noted(monkeypatch)
        close_left(ledger)
    assert [request_id for kind, request_id in types(path) if kind == "interrupted"] == ["20"]
    assert len(read) <= 3


async def test_the_oldest_open_call_is_found_however_many_younger_ones_ended(path: Path) -> None:
    with opened(path) as ledger:
        of_another = Starts(ledger)
        for request_id in ("done", "oldest", "young"):
            await of_another.begin(started(request_id))
        for request_id in ("young", "done"):
            await _submit(ledger, request_id)
            of_another.end(request_id)
        of_another.close()
        await Starts(ledger).close_left()
    assert types(path)[-1] == ("interrupted", "oldest")


@pytest.mark.parametrize("kind", ["folder", "link to nothing that can be opened", "pipe"])
def test_what_cannot_be_read_among_the_files_keeps_no_other_call_open(
    path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with opened(path) as ledger:
        leave_open(ledger, "open")
        in_the_way = path.parent / starts.FOLDER / "0000"
        if kind == "folder":
            in_the_way.mkdir()
        elif kind == "pipe":
            os.mkfifo(in_the_way)
        else:
            in_the_way.symlink_to(in_the_way)
        close_left(ledger)
    assert types(path)[-1] == ("interrupted", "open")
    assert left(path) == ["0000"]
    assert str(in_the_way) in caplog.text


def test_a_file_whose_calls_cannot_be_closed_keeps_no_other_call_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = starts._still_open

    def failing(path: Path, writer: str, lines_before: int) -> list[Record]:
        if writer == "0000":
            raise ValueError("what nobody can read")
        return real(path, writer, lines_before)

    with opened(path) as ledger:
        leave_open(ledger, "open")
        (path.parent / starts.FOLDER / "0000").write_text(f"{0:020}\n")
        monkeypatch.setattr(starts, "_still_open", failing)
        close_left(ledger)
    assert types(path)[-1] == ("interrupted", "open")
    assert left(path) == ["0000"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_is_found_however_much_of_the_ledger_lies_behind_it_and_a_long_search_is_told(
    path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(starts, "TOLD_LINES", 7)
    caplog.set_level(logging.INFO)
    large = "x" * (1 << 20)
    with opened(path, segment_bytes=1 << 25) as ledger:
        asyncio.run(_submit(ledger, "before"))
        leave_open(ledger, "open")
        for number in range(260):
            asyncio.run(_submit(ledger, str(number), error=large))
        assert len(segments.closed_firsts(path)) > 6
        assert segments.total_bytes(path) > 1 << 28
        if packed:
            segments.compress(path)
        tracemalloc.start()
        try:
            close_left(ledger)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        size = ledger.size
    assert types(path)[-1] == ("interrupted", "open")
    assert most < 1 << 26
    assert f"{size - 2} lines of {path} are searched" in caplog.text


def test_a_short_search_is_not_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with opened(path) as ledger:
        leave_open(ledger, "open")
        close_left(ledger)
    assert types(path)[-1] == ("interrupted", "open")
    assert "searched" not in caplog.text


def test_a_segment_that_cannot_be_read_is_told_and_the_calls_in_it_are_closed_by_a_later_start(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path, segment_bytes=1) as ledger:
        leave_open(ledger, "open")
        asyncio.run(_submit(ledger, "behind"))
        segments.compress(path)
        packed = segments.packed_path(path, 1)
        whole = packed.read_bytes()
        packed.write_bytes(whole[:-20])
        close_left(ledger)
        assert "not marked in the ledger" in caplog.text
        packed.write_bytes(whole)
        close_left(ledger)
    assert types(path) == [("started", "open"), ("invoke", "behind"), ("interrupted", "open")]
    assert left(path) == []


async def _submit(ledger: Ledger, request_id: str, **members: str) -> None:
    await ledger.submit(call(request_id, **members))


async def test_a_log_that_is_begun_anew_meanwhile_is_searched_from_its_start(path: Path) -> None:
    with opened(path) as ledger:
        for number in range(3):
            await _submit(ledger, str(number))
        of_another = Starts(ledger)
        await asyncio.to_thread(path.unlink)
        await of_another.begin(started("open"))
        of_another.close()
        await Starts(ledger).close_left()
    assert types(path) == [("started", "open"), ("interrupted", "open")]


def test_a_log_shorter_than_a_process_noted_is_another_and_is_searched_from_its_start(path: Path) -> None:
    with opened(path) as ledger:
        name = leave_open(ledger, "open")
        (path.parent / starts.FOLDER / name).write_text(f"{99:020}\n")
        close_left(ledger)
    assert types(path) == [("started", "open"), ("interrupted", "open")]


async def test_a_removed_folder_is_made_again_under_the_same_name(path: Path) -> None:
    with opened(path) as ledger:
        process = Starts(ledger)
        await process.begin(started("a"))
        (name,) = left(path)
        (path.parent / starts.FOLDER / name).unlink()
        (path.parent / starts.FOLDER).rmdir()
        await process.begin(started("b"))
        assert left(path) == [name]
        await Starts(ledger).close_left()
        process.close()
        await Starts(ledger).close_left()
    assert types(path)[2:] == [("interrupted", "a"), ("interrupted", "b")]


async def test_a_file_that_was_never_finished_is_removed_and_nothing_is_written(path: Path) -> None:
    with opened(path) as ledger:
        folder = path.parent / starts.FOLDER
        folder.mkdir()
        (folder / ".0123").write_bytes(b"")
        (folder / "4567").write_bytes(b"12")
        await Starts(ledger).close_left()
        assert left(path) == []
        assert types(path) == []
        ledger.close()
        with pytest.raises(LedgerError, match="not open"):
            await Starts(ledger).begin(started("late"))
