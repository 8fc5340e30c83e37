"""Logs of overlays: bounded, rotated, read from their end, followed; and no trouble for whoever writes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import threading
from typing import TYPE_CHECKING

import pytest

from runners import logs as overlay_logs
from runners.logs import LINE_BYTES, LogReader, OverlayLogs, Voice, path_of, rotated
from tests import programs
from tests.support import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAMP = b"2026-01-31T12:00:00.250Z "
NOON = 1_769_860_800.25


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[OverlayLogs]:
    logs = OverlayLogs(tmp_path / "logs", max_bytes=1000, clock=lambda: NOON)
    yield logs
    logs.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return path_of(tmp_path / "logs", "echo")


@pytest.fixture
def reader(path: Path) -> Iterator[LogReader]:
    with LogReader(path) as reader:
        yield reader


def said(lines: list[bytes]) -> list[bytes]:
    """Lines without their time."""
    assert all(line.startswith(STAMP) for line in lines)
    return [line.removeprefix(STAMP) for line in lines]


# Writing


def test_each_line_has_its_time(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"one\ntwo\r\n\nfour\n")
    assert path.read_bytes() == STAMP + b"one\n" + STAMP + b"two\n" + STAMP + b"\n" + STAMP + b"four\n"


def test_a_moment_before_the_next_second_is_not_rounded_to_it(tmp_path: Path) -> None:
    logs = OverlayLogs(tmp_path, clock=lambda: 0.9999)
    logs.append("echo", b"x\n")
    logs.close()
    assert path_of(tmp_path, "echo").read_bytes() == b"1970-01-01T00:00:00.999Z x\n"


def test_each_overlay_has_its_file(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"one\n")
    logs.append("other", b"two\n")
    assert {file.name for file in path.parent.iterdir()} == {"echo.log", "other.log"}


def test_nothing_is_made_before_something_is_said(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"")
    logs.end("echo")
    assert not path.parent.exists()


def test_a_line_that_comes_in_pieces_is_one_line(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"one\ntw")
    assert path.read_bytes() == STAMP + b"one\n"
    logs.append("echo", b"o\n")
    assert path.read_bytes() == STAMP + b"one\n" + STAMP + b"two\n"


def test_two_sources_do_not_end_each_others_lines(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"on", source=1)
    logs.append("echo", b"two\n", source=2)
    logs.append("echo", b"e\n", source=1)
    assert path.read_bytes() == STAMP + b"two\n" + STAMP + b"one\n"


def test_what_a_source_has_begun_is_written_at_its_end(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"half", source=1)
    logs.append("echo", b"other", source=2)
    logs.end("echo", source=1)
    logs.end("echo", source=1)
    assert path.read_bytes() == STAMP + b"half\n"


def test_closing_writes_what_was_begun(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"half")
    logs.close()
    assert path.read_bytes() == STAMP + b"half\n"


def test_a_line_without_end_is_not_held_back_for_ever(tmp_path: Path) -> None:
    logs = OverlayLogs(tmp_path, clock=lambda: NOON)
    logs.append("echo", b"x" * (LINE_BYTES + 1))
    logs.append("echo", b"y\n")
    logs.close()
    assert path_of(tmp_path, "echo").read_bytes() == STAMP + b"x" * (LINE_BYTES + 1) + b"\n" + STAMP + b"y\n"


def test_a_file_that_is_full_is_rotated(logs: OverlayLogs, path: Path) -> None:
    line = b"x" * (500 - len(STAMP) - 1) + b"\n"
    for _ in range(2):
        logs.append("echo", line)
    assert (path.stat().st_size, rotated(path).exists()) == (1000, False)
    logs.append("echo", b"new\n")
    assert path.read_bytes() == STAMP + b"new\n"
    assert rotated(path).stat().st_size == 1000


def test_a_file_that_another_process_has_just_rotated_is_not_rotated_again(
    logs: OverlayLogs, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second time would be at the cost of the file that the other has put away."""
    lock = fcntl.flock

    def be_late(fd: int, how: int) -> None:
        path.replace(rotated(path))
        path.write_bytes(b"of the other\n")
        lock(fd, how)

    logs.append("echo", b"x" * 900 + b"\n")
    monkeypatch.setattr(fcntl, "flock", be_late)
    logs.append("echo", b"y" * 100 + b"\n")
    assert path.read_bytes() == b"of the other\n" + STAMP + b"y" * 100 + b"\n"
    assert rotated(path).read_bytes() == STAMP + b"x" * 900 + b"\n"


def test_never_more_than_two_files_full_are_kept(logs: OverlayLogs, path: Path) -> None:
    for number in range(500):
        logs.append("echo", b"line %d\n" % number * (number % 7 + 1))
        assert sum(file.stat().st_size for file in path.parent.iterdir()) <= 2000
    assert {file.name for file in path.parent.iterdir()} == {"echo.log", "echo.log.1"}


def test_of_more_than_a_file_at_once_the_end_is_kept(logs: OverlayLogs, path: Path, reader: LogReader) -> None:
    logs.append("echo", b"".join(b"%d\n" % number for number in range(10_000)))
    lines = said(reader.last(10_000))
    assert path.stat().st_size <= 1000
    assert lines == [b"%d" % number for number in range(10_000 - len(lines), 10_000)]


def test_a_line_longer_than_a_file_keeps_its_time_and_its_start(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"short\n" + b"abc" * 1000 + b"\n")
    text = path.read_bytes()
    assert (len(text), text.startswith(STAMP + b"abcabc"), text.endswith(b"\n")) == (1000, True, True)


def test_a_log_of_a_run_before_is_continued(logs: OverlayLogs, path: Path, tmp_path: Path) -> None:
    logs.append("echo", b"one\n")
    logs.close()
    again = OverlayLogs(tmp_path / "logs", max_bytes=2 * len(STAMP) + 8, clock=lambda: NOON)
    again.append("echo", b"two\n")
    assert path.read_bytes() == STAMP + b"one\n" + STAMP + b"two\n"
    again.append("echo", b"three\n")
    again.close()
    assert path.read_bytes() == STAMP + b"three\n"


@pytest.mark.parametrize("how", ["unlink", "move"])
def test_a_file_that_was_taken_away_is_begun_anew(logs: OverlayLogs, path: Path, how: str) -> None:
    logs.append("echo", b"one\n")
    if how == "unlink":
        path.unlink()
    else:
        path.rename(path.with_name("elsewhere"))
    logs.append("echo", b"two\n")
    assert path.read_bytes() == STAMP + b"two\n"


def test_a_file_that_was_emptied_is_filled_again(logs: OverlayLogs, path: Path) -> None:
    for _ in range(3):
        logs.append("echo", b"x" * 700 + b"\n")
        os.truncate(path, 0)
    logs.append("echo", b"two\n")
    assert path.read_bytes() == STAMP + b"two\n"
    assert not rotated(path).exists()


def test_what_cannot_be_written_is_dropped_with_one_warning(
    logs: OverlayLogs, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("a file where the folder should be")
    for _ in range(3):
        logs.append("echo", b"lost\n")
    assert len(caplog.records) == 1
    assert re.fullmatch(r".*/echo\.log cannot be written, lines are dropped: .+", caplog.text.strip().partition(" ")[2])
    path.parent.unlink()
    logs.append("echo", b"kept\n")
    assert path.read_bytes() == STAMP + b"kept\n"


def test_a_full_disk_leaves_no_half_line(
    logs: OverlayLogs, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logs.append("echo", b"one\n")
    real = os.write
    room = [7]

    def write(fd: int, data: memoryview) -> int:
        if not room:
            raise OSError(28, "No space left on device")
        return real(fd, data[: room.pop()])

    monkeypatch.setattr(os, "write", write)
    logs.append("echo", b"lost\n")
    monkeypatch.undo()
    logs.append("echo", b"three\n")
    assert path.read_bytes() == STAMP + b"one\n" + STAMP + b"three\n"
    assert "No space left on device" in caplog.text


def test_what_the_bus_says_of_a_process_stands_between_its_lines(logs: OverlayLogs, path: Path) -> None:
    voice = Voice(logs, "echo", "worker 3")
    voice.say(b"hel")
    voice.note("is let go")
    voice.say(b"lo\nbye")
    voice.end()
    assert path.read_bytes() == STAMP + b"aal: worker 3 is let go\n" + STAMP + b"hello\n" + STAMP + b"bye\n"


def test_a_process_without_a_log_may_speak(tmp_path: Path) -> None:
    voice = Voice(None, "echo", "the service")
    voice.say(b"hello\n")
    voice.note("ended")
    voice.end()
    assert list(tmp_path.iterdir()) == []


# In an event loop


def written(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


class SlowDisk:
    """Lets writes wait at a gate; `sizes` are those of the texts that were written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.sizes: list[int] = []
        self._write = overlay_logs._write_whole
        monkeypatch.setattr(overlay_logs, "_write_whole", self)

    def __call__(self, fd: int, text: bytes, size: int) -> None:
        self.reached.set()
        self.gate.wait()
        self.sizes.append(len(text))
        self._write(fd, text, size)


async def test_in_a_loop_lines_are_gathered_and_written_soon(
    logs: OverlayLogs, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    disk.gate.set()
    for number in range(10):
        logs.append("echo", b"%d\n" % number)
    assert written(path) == b""
    await until(lambda: len(disk.sizes) == 1)
    await until(lambda: written(path).count(b"\n") == 10)
    logs.append("echo", b"later\n")
    await until(lambda: written(path).endswith(b"later\n"))
    assert len(disk.sizes) == 2


async def a_disk_that_is_stuck(logs: OverlayLogs, monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """With a first line on its way."""
    disk = SlowDisk(monkeypatch)
    logs.append("echo", b"first\n")
    await until(disk.reached.is_set)
    return disk


async def test_a_slow_disk_holds_nobody_up_and_keeps_the_order(
    logs: OverlayLogs, path: Path, reader: LogReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await a_disk_that_is_stuck(logs, monkeypatch)
    for number in range(5):
        logs.append("echo", b"%d\n" % number)
        await asyncio.sleep(0)
    assert written(path) == b""
    disk.gate.set()
    await until(lambda: written(path).count(b"\n") == 6)
    assert said(reader.last(10)) == [b"first", b"0", b"1", b"2", b"3", b"4"]


async def test_what_waits_for_a_slow_disk_is_bounded_and_its_end_is_kept(
    logs: OverlayLogs, path: Path, reader: LogReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await a_disk_that_is_stuck(logs, monkeypatch)
    for number in range(10_000):
        logs.append("echo", b"%d\n" % number)
    disk.gate.set()
    await until(lambda: len(disk.sizes) == 2)
    logs.flush()
    assert disk.sizes[1] <= 1000
    lines = said(reader.last(1))
    assert lines == [b"9999"]


async def test_closing_waits_for_the_disk_and_writes_the_rest(logs: OverlayLogs, path: Path) -> None:
    logs.append("echo", b"one\n")
    await until(path.exists)
    logs.append("echo", b"two\nthree")
    logs.append("other", b"four\n")
    logs.close()
    assert written(path) == STAMP + b"one\n" + STAMP + b"two\n" + STAMP + b"three\n"
    assert written(path.with_name("other.log")) == STAMP + b"four\n"


async def test_a_disk_that_fails_is_dropped_with_one_warning_in_a_loop_too(
    logs: OverlayLogs, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("a file where the folder should be")
    for _ in range(3):
        logs.append("echo", b"lost\n")
        logs.flush()
    assert len(caplog.records) == 1
    path.parent.unlink()
    logs.append("echo", b"kept\n")
    await until(path.exists)
    logs.close()
    assert written(path) == STAMP + b"kept\n"


def test_no_file_is_kept_open(logs: OverlayLogs) -> None:
    before = programs.held()
    for overlay in ("echo", "other"):
        logs.append(overlay, b"one\n")
    assert programs.held() == before


# Reading


def test_the_last_lines_are_read_across_the_rotation(logs: OverlayLogs, path: Path, reader: LogReader) -> None:
    for number in range(40):
        logs.append("echo", b"%d\n" % number)
    assert rotated(path).exists()
    assert said(reader.last(35)) == [b"%d" % number for number in range(5, 40)]


@pytest.mark.parametrize(("count", "lines"), [(0, []), (1, [b"3"]), (2, [b"2", b"3"]), (9, [b"1", b"2", b"3"])])
def test_as_many_lines_as_are_wanted_and_there(
    logs: OverlayLogs, reader: LogReader, count: int, lines: list[bytes]
) -> None:
    logs.append("echo", b"1\n2\n3\n")
    assert said(reader.last(count)) == lines


def test_of_what_is_not_there_nothing_is_read(reader: LogReader) -> None:
    assert reader.last(10) == reader.more() == []


def test_what_comes_later_comes_once(logs: OverlayLogs, reader: LogReader) -> None:
    logs.append("echo", b"1\n")
    assert said(reader.last(10)) == [b"1"]
    assert reader.more() == []
    logs.append("echo", b"2\n3\n")
    assert said(reader.more()) == [b"2", b"3"]
    assert reader.more() == []


def test_a_log_that_begins_later_is_followed(logs: OverlayLogs, reader: LogReader) -> None:
    assert reader.last(10) == []
    logs.append("echo", b"1\n")
    assert said(reader.more()) == [b"1"]


@pytest.mark.parametrize("turn", [1, 7, 38])
def test_rotations_lose_and_double_nothing_for_who_follows(logs: OverlayLogs, reader: LogReader, turn: int) -> None:
    """38 lines fill a file: even the one between two looks is still there after them."""
    seen = said(reader.last(10))
    for number in range(380):
        logs.append("echo", b"%d\n" % (1000 + number))
        if number % turn == turn - 1:
            seen += said(reader.more())
    assert seen + said(reader.more()) == [b"%d" % (1000 + number) for number in range(380)]


def test_after_many_rotations_at_once_what_is_left_is_read(logs: OverlayLogs, path: Path, reader: LogReader) -> None:
    logs.append("echo", b"first\n")
    reader.last(10)
    for number in range(1000):
        logs.append("echo", b"%d\n" % number)
    numbers = [int(line) for line in said(reader.more())]
    assert numbers == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (0, 999)
    assert len(numbers) > (path.read_bytes() + rotated(path).read_bytes()).count(b"\n")


def test_an_old_file_is_not_read_for_new_where_the_log_was_removed(
    logs: OverlayLogs, path: Path, reader: LogReader
) -> None:
    for number in range(40):
        logs.append("echo", b"%d\n" % number)
    os.utime(rotated(path), (0, 0))
    reader.last(1)
    path.unlink()
    logs.append("echo", b"new\n")
    assert said(reader.more()) == [b"new"]


def test_a_rotated_file_alone_is_read_once(logs: OverlayLogs, path: Path, reader: LogReader) -> None:
    logs.append("echo", b"old\n")
    path.rename(rotated(path))
    assert said(reader.last(10)) == [b"old"]
    logs.append("echo", b"new\n")
    assert said(reader.more()) == [b"new"]


def test_a_log_that_was_emptied_is_read_from_its_start(logs: OverlayLogs, path: Path, reader: LogReader) -> None:
    logs.append("echo", b"a long line\n")
    reader.last(10)
    os.truncate(path, 0)
    logs.append("echo", b"new\n")
    assert said(reader.more()) == [b"new"]


def test_a_line_of_which_half_is_there_comes_when_it_is_whole(path: Path, reader: LogReader) -> None:
    path.parent.mkdir()
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert reader.last(10) == [b"one"]
        assert reader.more() == []
        file.write(b"o\n")
        assert reader.more() == [b"two"]
