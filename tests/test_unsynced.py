"""What a sync that failed has dropped: written once more by whoever comes next, before anything behind it counts."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bus import unsynced
from bus.chain import Chain
from bus.checkpoints import Checkpoints
from bus.errors import OperatorError
from bus.model import now_ms
from bus.provenance import iter_lines, raw_lines
from bus.records import draft_record
from bus.segments import Segments, closed_firsts, compress, lock_path
from bus.unsynced import Stretch
from bus.verification import verify
from tests.ledgers import call, opened, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus.ledger import Receipt
    from bus.records import Draft

PAGE = 4096


class Disk:
    """The disk below the log's files, page by page: what a sync has brought there outlives a power loss.

    A sync that fails drops what was to be written: it can be read, and the next sync knows nothing of it.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.fails = False
        self._pages: dict[int, dict[int, bytes]] = defaultdict(dict)
        self._sizes: dict[int, int] = defaultdict(int)
        self._dirty: dict[int, set[int]] = defaultdict(set)
        self._write, self._pwrite = os.write, os.pwrite
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "fdatasync", self.sync)
        monkeypatch.setattr(os, "fsync", self.sync)

    def write(self, fd: int, data: bytes) -> int:
        done = self._write(fd, data)
        self._taint(fd, os.lseek(fd, 0, os.SEEK_CUR) - done, done)
        return done

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        done = self._pwrite(fd, data, offset)
        self._taint(fd, offset, done)
        return done

    def _taint(self, fd: int, start: int, length: int) -> None:
        self._dirty[os.fstat(fd).st_ino].update(range(start // PAGE, (start + length - 1) // PAGE + 1))

    def sync(self, fd: int) -> None:
        status = os.fstat(fd)
        pages, self._dirty[status.st_ino] = self._dirty[status.st_ino], set()
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with Path(f"/proc/self/fd/{fd}").open("rb") if pages else open(os.devnull, "rb") as file:  # noqa: PTH123
            for page in pages:
                self._pages[status.st_ino][page] = os.pread(file.fileno(), PAGE, page * PAGE)
        self._sizes[status.st_ino] = status.st_size

    def lose_power(self) -> None:
        for path in self._folder.glob("*.jsonl"):
            inode = path.stat().st_ino
            content = bytearray(self._sizes[inode])
            for page, data in self._pages[inode].items():
                content[page * PAGE : page * PAGE + len(data)] = data
            path.write_bytes(content[: self._sizes[inode]])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


@pytest.fixture
def disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(path.parent, monkeypatch)


def drafts(name: str, count: int = 1) -> list[Draft]:
    return [draft_record(call(f"{name}-{one}", timestamp_ms=now_ms(), error="x" * 900)) for one in range(count)]


def fails_to_sync(path: Path, disk: Disk) -> None:
    """A process answers for one line, fails to sync more, and is no more."""
    chain = Chain(path, "always", {})
    chain.append(drafts("answered"))
    disk.fails = True
    with pytest.raises(OSError, match="Input/output"):
        chain.append(drafts("refused", 20))
    disk.fails = False
    chain.close()


def answered_by_another(path: Path, segment_bytes: int = 0, count: int = 1) -> list[Receipt]:
    chain = Chain(path, "always", {}, segment_bytes=segment_bytes)
    receipts = [receipt for _ in range(count) for receipt in chain.append(drafts("another"))]
    chain.close()
    return receipts


def assert_stand(path: Path, receipts: list[Receipt]) -> None:
    """After the power loss, and the next start."""
    write(path, call("after", timestamp_ms=now_ms()))
    assert verify(path).ok
    hashes = {line["seq"]: line["hash"] for line in iter_lines(path)}
    assert [hashes.get(receipt.seq) for receipt in receipts] == [receipt.hash for receipt in receipts]


def test_a_line_that_is_answered_for_by_another_process_outlives_what_the_first_could_not_sync(
    path: Path, disk: Disk
) -> None:
    fails_to_sync(path, disk)
    receipts = answered_by_another(path)
    assert receipts[0].seq == 22
    disk.lose_power()
    assert_stand(path, receipts)


def test_one_that_had_the_log_open_before_writes_the_stretch_again_too(path: Path, disk: Disk) -> None:
    other = Chain(path, "always", {})
    other.append(drafts("before"))
    fails_to_sync(path, disk)
    assert not other.try_lock()  # the loop leaves it to the thread
    receipts = other.append(drafts("another"))
    other.close()
    disk.lose_power()
    assert_stand(path, receipts)


def test_a_stretch_in_a_file_that_was_closed_meanwhile_is_written_again(path: Path, disk: Disk) -> None:
    fails_to_sync(path, disk)
    lock = lock_path(path).read_bytes()
    lock_path(path).write_bytes(b"")  # as if it were told only once the file is closed
    receipts = answered_by_another(path, segment_bytes=PAGE)
    assert closed_firsts(path) == [1]
    lock_path(path).write_bytes(lock)
    receipts += answered_by_another(path)
    disk.lose_power()
    assert_stand(path, receipts)


def test_what_was_compressed_meanwhile_is_not_missed(path: Path, disk: Disk) -> None:
    fails_to_sync(path, disk)
    lock = lock_path(path).read_bytes()
    lock_path(path).write_bytes(b"")
    receipts = answered_by_another(path, segment_bytes=PAGE)
    assert compress(path) == 1
    lock_path(path).write_bytes(lock)
    receipts += answered_by_another(path)
    assert_stand(path, receipts)


@pytest.mark.parametrize("who", ["a writer", "a signer"])
def test_who_signs_makes_sure_of_what_another_could_not_sync(path: Path, disk: Disk, who: str) -> None:
    if who == "a writer":
        fails_to_sync(path, disk)
    else:
        left_unsynced(path)
        disk.fails = True
        with pytest.raises(OperatorError, match="cannot be synced, so nothing is signed"), Segments(path, to_sign=True):
            pass
        disk.fails = False
    with Segments(path, to_sign=True):
        signed = list(raw_lines(path))
    disk.lose_power()
    assert list(raw_lines(path)) == signed


def test_who_signs_refuses_where_it_cannot_make_sure(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_to_sync(path, disk)

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(OperatorError, match="Permission denied"), Segments(path, to_sign=True):
            pass
    with opened(path) as ledger:
        assert ledger.healthy


def left_unsynced(path: Path) -> None:
    """A process is killed when it has written, and not yet synced."""
    chain = Chain(path, "always", {})
    with chain.locked():
        chain.write(drafts("killed", 20))
    chain.close()


@pytest.mark.parametrize("step", ["a group that is taken back", "a rehearsal", "a rotation"])
def test_any_sync_that_fails_tells_of_what_one_that_was_killed_had_written(path: Path, disk: Disk, step: str) -> None:
    left_unsynced(path)
    chain = Chain(path, "always", {}, segment_bytes=PAGE if step == "a rotation" else 0)
    with chain.locked():
        disk.fails = True
        fails = chain.rehearse if step == "a rehearsal" else partial(chain.extend, drafts("refused"))
        with pytest.raises(OSError, match="Input/output"):
            fails()
    chain.close()
    disk.fails = False
    receipts = answered_by_another(path)
    assert receipts[0].seq == 21
    disk.lose_power()
    assert_stand(path, receipts)


def test_only_what_no_sync_has_ended_for_is_written_again(path: Path, disk: Disk) -> None:
    fails_to_sync(path, disk)
    first = path.read_bytes().index(b"\n") + 1
    with lock_path(path).open("rb") as lock:
        stretches, _ = unsynced.told(lock.fileno())
    status = path.stat()
    assert stretches == [Stretch((status.st_dev, status.st_ino), first)]


def test_what_cannot_be_told_is_remembered(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    chain = Chain(path, "always", {})
    disk.fails = True
    with monkeypatch.context() as patch:
        patch.setattr(unsynced, "tell", refuse)
        with pytest.raises(OSError, match="Input/output"):
            chain.append(drafts("refused", 20))
    disk.fails = False
    receipts = chain.append(drafts("again"))
    chain.close()
    disk.lose_power()
    assert_stand(path, receipts)


def test_a_process_to_which_nothing_new_was_told_writes_nothing_again(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_to_sync(path, disk)
    answered_by_another(path)
    rewritten: list[object] = []
    monkeypatch.setattr(unsynced, "_rewrite", lambda *given: rewritten.append(given))
    chain = Chain(path, "always", {}, Checkpoints(path))
    chain.append(drafts("a"))
    assert chain.try_lock()
    chain.unlock()
    chain.close()
    assert rewritten == []


# --- What is told in the locks' file ---


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_APPEND | os.O_CREAT)
    yield fd
    os.close(fd)


def test_what_is_told_while_another_settles_is_not_settled(lock: int) -> None:
    first, second = Stretch((1, 2), 300), Stretch((1, 2), 200)
    unsynced.tell(lock, first)
    known, length = unsynced.told(lock)
    assert known == [first]
    unsynced.tell(lock, second)
    unsynced.settle(lock, length)
    assert unsynced.told(lock)[0] == [second]
    unsynced.settle(lock, unsynced.told(lock)[1])
    assert unsynced.told(lock)[0] == []
    unsynced.tell(lock, first)
    assert unsynced.told(lock)[0] == [first]


def test_what_is_told_already_is_not_told_again(lock: int) -> None:
    for start in (300, 300, 400, 200):
        unsynced.tell(lock, Stretch((1, 2), start))
    assert unsynced.told(lock)[0] == [Stretch((1, 2), 300), Stretch((1, 2), 200)]


def test_a_statement_that_was_cut_off_or_is_something_else_is_passed_over(lock: int) -> None:
    os.write(lock, b"\nfailed 1 2 3 4\nfailed x\nsettled\n\x00\nfailed 1 2 ")
    unsynced.tell(lock, Stretch((1, 2), 300))
    assert unsynced.told(lock)[0] == [Stretch((1, 2), 300)]
