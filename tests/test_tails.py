"""What a power loss and a kill leave at the end of the ledger: healed where nobody was answered, found elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import chain, doctor, losses, schemas, tails
from bus.chain import Chain
from bus.checkpoints import Checkpoints
from bus.ledger import Ledger, LedgerError
from bus.model import now_ms
from bus.provenance import iter_lines, raw_lines
from bus.records import BrokenLineError, draft, draft_record, environment_hash
from bus.segments import closed_firsts, closed_path
from bus.verification import verify
from tests.faults import scenario
from tests.faults.children import Child
from tests.ledgers import ENVIRONMENT, append, call, opened, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bus.model import Record
    from tests.faults.children import Say

BLOCK = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


def recent(name: str, **members: Any) -> Record:
    return call(name, timestamp_ms=now_ms(), **members)


def write_groups(path: Path, *groups: list[str], at_ms: int | None = None, segment_bytes: int = 0) -> list[int]:
    """Each group in one write; gives the size of the open segment behind each."""
    sizes = []
    writer = Chain(path, "never", ENVIRONMENT, segment_bytes=segment_bytes)
    for group in groups:
        records = [call(name, timestamp_ms=at_ms or now_ms(), error="x" * 300) for name in group]
        writer.append([draft_record(record) for record in records])
        sizes.append(path.stat().st_size)
    writer.close()
    return sizes


def names(count: int, group: str) -> list[str]:
    return [f"{group}-{number}" for number in range(count)]


def lose(path: Path, synced: int, *blocks: int) -> bytes:
    """These blocks of the file never reached the disk, behind what was synced; gives the file as it was."""
    whole = path.read_bytes()
    with path.open("r+b") as file:
        for block in blocks:
            start, stop = max(synced, block * BLOCK), min((block + 1) * BLOCK, len(whole))
            file.seek(start)
            file.write(bytes(max(0, stop - start)))
    return whole


def assert_healed(path: Path, before: list[bytes], cut: bytes) -> None:
    """The lines `before` stand, and `cut` is kept in full in a file that a line names."""
    write(path, recent("after"))
    report = verify(path)
    assert report.ok, report
    assert list(raw_lines(path))[: len(before)] == before
    (said,) = [line for line in iter_lines(path) if line["type"] == "recovered"]
    assert said["seq"] - len(before) in {1, 2}  # a checkpoint begins a segment
    assert path.with_name(said["kept_as"]).read_bytes() == cut
    assert said["cut_bytes"] == len(cut)
    assert schemas.faults(schemas.shipped("record"), said) == []


def cut_of(path: Path, before: list[bytes]) -> bytes:
    return path.read_bytes()[sum(map(len, before)) :]


# --- Blocks that never reached the disk ---


@pytest.mark.parametrize("block", ["first", "middle", "last but one"])
def test_a_block_lost_anywhere_in_the_last_group_cuts_off_the_group_from_there(path: Path, block: str) -> None:
    synced, end = write_groups(path, names(5, "synced"), names(60, "lost"))
    first, last = synced // BLOCK, (end - 1) // BLOCK
    which = {"first": first, "middle": (first + last) // 2, "last but one": last - 1}[block]
    whole = lose(path, synced, which)
    sound = whole.rfind(b"\n", 0, max(synced, which * BLOCK)) + 1
    assert end - sound > BLOCK
    before = whole[:sound].splitlines(keepends=True)
    assert len(before) >= 5
    assert_healed(path, before, cut_of(path, before))


def test_blocks_lost_in_two_groups_that_were_not_synced_cut_off_both(path: Path) -> None:
    synced, one, two = write_groups(path, names(5, "synced"), names(40, "one"), names(40, "two"))
    whole = lose(path, synced, synced // BLOCK, (one + two) // 2 // BLOCK)
    before = whole[:synced].splitlines(keepends=True)
    assert_healed(path, before, cut_of(path, before))


def test_a_block_lost_in_the_group_that_began_a_segment_leaves_the_segments_before_it(path: Path) -> None:
    write_groups(path, names(5, "synced"), names(60, "lost"), segment_bytes=1000)
    assert closed_firsts(path) == [1]
    lose(path, 0, 0)
    before = closed_path(path, 1).read_bytes().splitlines(keepends=True)
    assert_healed(path, before, path.read_bytes())


def test_a_sector_that_was_not_written_of_a_block_that_was_is_a_lost_block(path: Path) -> None:
    synced, _ = write_groups(path, names(5, "synced"), names(60, "lost"))
    whole = path.read_bytes()
    at = (synced // 512 + 9) * 512
    path.write_bytes(whole[:at] + bytes(512) + whole[at + 512 :])
    before = whole[: whole.rfind(b"\n", 0, at) + 1].splitlines(keepends=True)
    assert_healed(path, before, cut_of(path, before))


def test_a_block_lost_in_the_first_group_of_a_server_that_had_long_been_idle_is_healed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines are of one time: also that of the environment, which is known from the start."""
    (synced,) = write_groups(path, names(5, "synced"))
    with monkeypatch.context() as patch:
        patch.setattr(chain, "now_ms", lambda: now_ms() - 2 * 3_600_000)
        idle = Chain(path, "never", ENVIRONMENT)
    hash_ = environment_hash(ENVIRONMENT)
    idle.append([draft_record(recent(name, error="x" * 900, environment_hash=hash_)) for name in names(10, "lost")])
    idle.close()
    whole = lose(path, synced, synced // BLOCK)
    assert b'"type":"environment"' in whole
    assert_healed(
        path, whole[:synced].splitlines(keepends=True), cut_of(path, whole[:synced].splitlines(keepends=True))
    )


def test_a_block_lost_in_a_group_that_says_what_was_cut_off_long_before_is_healed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, _ = write_groups(path, names(5, "synced"), names(40, "lost"))
    with path.open("ab") as file:
        file.write(b'{"torn')
    late = Chain(path, "never", ENVIRONMENT)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "now_ms", lambda: now_ms() - 2 * 3_600_000)
        with late.locked():  # it cannot be said yet, as where the disk is full
            pass
    late.append([draft_record(recent(name)) for name in names(3, "lost as well")])
    late.close()
    whole = lose(path, synced, synced // BLOCK + 1)
    assert b'"type":"recovered"' in whole
    before = whole[: whole.rfind(b"\n", 0, (synced // BLOCK + 1) * BLOCK) + 1].splitlines(keepends=True)
    assert_healed(path, before, cut_of(path, before))


def assert_left_broken(path: Path) -> None:
    broken = path.read_bytes()
    with opened(path) as ledger:
        assert not ledger.healthy
        with pytest.raises(LedgerError, match=r"^(the last line|line \d+) of the ledger .* is broken"):
            append(ledger, recent("after"))
    assert path.read_bytes() == broken
    assert not verify(path).ok
    assert list(path.parent.glob("*.torn*")) == []


def test_a_block_of_nuls_in_lines_that_are_older_than_any_sync_takes_is_left_and_reported(path: Path) -> None:
    long_ago = now_ms() - round(tails.UNSYNCED_S * 1000) - 1000
    write_groups(path, names(60, "old"), at_ms=long_ago)
    write_groups(path, names(3, "new"))
    lose(path, 0, 2)
    assert_left_broken(path)


def test_a_block_of_nuls_in_lines_that_a_kept_note_is_of_is_left_and_reported(path: Path) -> None:
    notary = scenario.notary(path)
    if notary is None:
        pytest.skip("signatures cannot be made here")
    checkpoints = Checkpoints(path, notary)
    writer = Chain(path, "batch", {}, checkpoints)
    with writer.locked():
        writer.extend([draft_record(recent(name, error="x" * 300)) for name in names(60, "a")], with_checkpoint=True)
    writer.close()
    kept = lose(path, 0, 2)
    changed = path.read_bytes()
    with opened(path) as ledger:  # it knows the tree by the checkpoint, and reads no further back
        append(ledger, recent("after"))
    assert path.read_bytes().startswith(changed)
    assert verify(path).first_bad == kept.count(b"\n", 0, 2 * BLOCK) + 1
    assert list(path.parent.glob("*.torn*")) == []
    path.write_bytes(changed)
    shutil.rmtree(path.parent / "checkpoints")
    before = kept[: kept.rfind(b"\n", 0, 2 * BLOCK) + 1].splitlines(keepends=True)
    assert_healed(path, before, cut_of(path, before))


def test_a_block_of_nuls_with_more_behind_it_than_is_ever_unsynced_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "UNSYNCED_BYTES", 3 * BLOCK)
    _, size = write_groups(path, names(5, "synced"), names(60, "more"))
    lose(path, 0, 1)
    assert size > 5 * BLOCK
    assert_left_broken(path)


def _one_nul(whole: bytearray) -> None:
    whole[2 * BLOCK + 7] = 0


def _run_from_within(whole: bytearray) -> None:
    whole[2 * BLOCK + 7 : 3 * BLOCK] = bytes(BLOCK - 7)


def _run_to_within(whole: bytearray) -> None:
    whole[2 * BLOCK : 3 * BLOCK - 7] = bytes(BLOCK - 7)


def _flipped_bit(whole: bytearray) -> None:
    whole[2 * BLOCK] ^= 1


def _flipped_bit_behind_a_lost_block(whole: bytearray) -> None:
    whole[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)
    whole[-20] ^= 1


@pytest.mark.parametrize(
    "change", [_one_nul, _run_from_within, _run_to_within, _flipped_bit, _flipped_bit_behind_a_lost_block]
)
def test_what_no_power_loss_leaves_is_not_cut_off(path: Path, change: Callable[[bytearray], None]) -> None:
    write_groups(path, names(5, "synced"), names(60, "changed"))
    whole = bytearray(path.read_bytes())
    change(whole)
    path.write_bytes(whole)
    assert_left_broken(path)


def _answered(path: Path, count: int = 5) -> bytes:
    with opened(path, "always") as ledger:
        for number in range(count):
            append(ledger, recent(str(number), error="it went@wrong\u5b80"))
    return path.read_bytes()


def test_no_bit_that_flips_in_lines_that_were_answered_for_is_healed(path: Path) -> None:
    """Of the last two lines each bit that makes a NUL or a newline, or was one of a newline; the others the faults."""
    whole = _answered(path)
    last_two = range(whole[:-1].rindex(b"\n", 0, whole[:-1].rindex(b"\n")) + 1, len(whole))
    flips = [(index, bit) for index in last_two for bit in range(8)]
    telling = [(i, bit) for i, bit in flips if whole[i] == 0x0A or whole[i] ^ 1 << bit in {0, 0x0A}]
    assert {whole[index] for index, _ in telling} >= {0x0A, 0x20, 0x40, 0x80}
    for index, bit in telling:
        changed = bytearray(whole)
        changed[index] ^= 1 << bit
        path.write_bytes(changed)
        assert verify(path).first_bad == whole.count(b"\n", 0, index) + 1
        assert_left_broken(path)


@pytest.mark.parametrize("torn", [0, 1, 40, -1])
def test_whatever_bit_flips_in_the_last_two_lines_or_a_torn_one_behind_them_no_whole_line_is_cut_off(
    path: Path, torn: int
) -> None:
    whole = _answered(path)
    tail, _ = draft_record(recent("torn", error="it was cut off")).line(6, "0" * 64)
    text = whole + tail[:torn]
    path.write_bytes(text)
    last_two = whole.rindex(b"\n", 0, whole.rindex(b"\n", 0, -1)) + 1
    with path.open("r+b", buffering=0) as file:
        for index in range(last_two, len(text)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([text[index] ^ 1 << bit]), index)
                with contextlib.suppress(BrokenLineError):
                    assert tails.sound_end(file.fileno(), len(text), 0, lambda _: False) >= len(whole), (index, bit)
            os.pwrite(file.fileno(), text[index : index + 1], index)


def test_many_lines_with_a_nul_each_are_left(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(_answered(path, 50).replace(b"@", b"\x00"))
    assert_left_broken(path)


@pytest.mark.parametrize("behind", [b"x", b" ", b"}", b'{"caller":', b"\x00"])
def test_a_whole_line_with_more_behind_it_and_no_newline_was_not_cut_off(path: Path, behind: bytes) -> None:
    path.write_bytes(_answered(path)[:-1] + behind)
    assert_left_broken(path)


@pytest.mark.parametrize("tail", [b"text", b"[1", b'{"caller":"\x07', b'{"caller"\t', b'{"a":' * 100_000])
def test_what_no_line_begins_with_is_not_cut_off(path: Path, tail: bytes) -> None:
    path.write_bytes(_answered(path) + tail)
    assert_left_broken(path)


@pytest.mark.parametrize("tail", [b"{", b'{"', '{"caller":"\u5b80'.encode()[:-1], b" " * 4096, bytes(4096)])
def test_what_a_write_that_was_cut_off_leaves_is_cut_off(path: Path, tail: bytes) -> None:
    whole = _answered(path)
    path.write_bytes(whole + tail)
    assert_healed(path, whole.splitlines(keepends=True), tail)


def test_a_sector_of_the_last_line_alone_cannot_be_told_from_one_that_was_lost(path: Path) -> None:
    whole = _answered(path)
    with opened(path, "always") as ledger:
        append(ledger, recent("last", error="x" * 2000))
    changed = bytearray(path.read_bytes())
    at = -(-len(whole) // 512) * 512 + 512
    changed[at : at + 512] = bytes(512)
    path.write_bytes(changed)
    assert_healed(path, whole.splitlines(keepends=True), bytes(changed[len(whole) :]))


@pytest.mark.parametrize("duration_ms", ["soon", [1], True])
def test_a_line_with_a_right_hash_and_an_odd_figure_behind_nuls_is_none_of_a_lost_group(
    path: Path, duration_ms: object
) -> None:
    (receipt,) = write(path, recent("a", error="x" * BLOCK))
    odd, _ = draft({"type": "odd", "timestamp_ms": 1, "duration_ms": duration_ms}).line(2, receipt.hash)
    path.write_bytes(bytes(512) + path.read_bytes()[512:] + odd)
    assert_left_broken(path)


@pytest.mark.parametrize("size", ["1", [1], None, 1e3])
def test_a_checkpoint_of_an_odd_size_is_none_that_a_note_is_kept_of(path: Path, size: object) -> None:
    assert not Checkpoints(path).is_kept({"type": "checkpoint", "size": size, "note": ""})


def test_nuls_at_the_very_end_are_cut_off_however_many(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "UNSYNCED_BYTES", BLOCK)
    (size,) = write_groups(path, names(5, "synced"))
    with path.open("ab") as file:
        file.write(bytes(6 * BLOCK - size % BLOCK) + b'"}\n' + bytes(5 * BLOCK))
    before = path.read_bytes()[:size].splitlines(keepends=True)
    assert_healed(path, before, cut_of(path, before))


def test_a_process_that_lives_cuts_off_nothing_that_it_has_seen(path: Path) -> None:
    with opened(path) as ours:
        append(ours, recent("ours", error="x" * 3 * BLOCK))
        with opened(path) as theirs:
            append(theirs, recent("theirs"))
        lose(path, 0, 1)
        append(ours, recent("again"))
    assert not verify(path).ok
    assert list(path.parent.glob("*.torn*")) == []


def test_the_doctor_says_what_the_next_start_may_heal_and_what_it_does_not(path: Path) -> None:
    synced, _ = write_groups(path, names(5, "synced"), names(60, "lost"))
    whole = lose(path, synced, 3)
    assert "next start cuts off" in (doctor.ledger(path).hint or "")
    path.write_bytes(whole.replace(b'"ok":true', b'"ok":false', 1))
    assert "next start" not in (doctor.ledger(path).hint or "next start")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_blocks_are_lost_of_what_was_not_synced_the_synced_lines_stand_and_the_chain_verifies(
    data: st.DataObject,
) -> None:
    synced = data.draw(st.integers(0, 30), label="synced lines")
    groups = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=4), label="lines of groups")
    segment_bytes = data.draw(st.sampled_from([0, 2000, 9000]), label="bytes of a segment")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "provenance.jsonl"
        write_groups(path, *([names(synced, "synced")] if synced else []), segment_bytes=segment_bytes)
        size, was = (path.stat().st_size, path.stat().st_ino) if synced else (0, 0)
        lines = list(raw_lines(path))
        write_groups(path, *(names(count, str(number)) for number, count in enumerate(groups)))
        start = size if not was or path.stat().st_ino == was else 0
        blocks = range(start // BLOCK, -(-path.stat().st_size // BLOCK))
        lose(path, start, *data.draw(st.sets(st.sampled_from(blocks)), label="lost blocks"))
        rest = path.stat().st_size - data.draw(st.integers(0, 2 * BLOCK), label="bytes that the size is short of")
        os.truncate(path, max(start, rest))
        write(path, recent("after"))
        report = verify(path)
        assert report.ok, report
        assert list(raw_lines(path))[: len(lines)] == lines


# --- Killed between the cut and the line that says so ---


def killed_at(path: Path, step: str, before: Callable[[int], object] = lambda _: None) -> None:
    """A process opens the ledger, and ends at once when it comes to a system call; `before` gets its first argument."""

    def work(_: Say) -> None:
        setattr(os, step, lambda fd, *_: (before(fd), os._exit(9)))
        Ledger(path, fsync="batch", environment=ENVIRONMENT).open()

    with Child(work) as child:
        child.go()
        child.lines()
        assert child.status == 9


def recovered(path: Path) -> list[tuple[str, int]]:
    return [(line["kept_as"], line["cut_bytes"]) for line in iter_lines(path) if line["type"] == "recovered"]


@pytest.fixture(params=["a first line", "a later line", "a new segment"])
def torn(request: pytest.FixtureRequest, path: Path) -> Iterator[Path]:
    if request.param == "a later line":
        write(path, call("before"))
    elif request.param == "a new segment":
        write(path, *(call() for _ in range(4)))
        path.rename(closed_path(path, 1))
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(b'{"torn":')
    yield path
    assert verify(path).ok


def end_of(path: Path) -> int:
    return path.stat().st_size


def test_what_a_process_cut_off_that_was_killed_before_it_said_so_is_said_once_by_the_next(torn: Path) -> None:
    size = end_of(torn)
    killed_at(torn, "write")  # the first write to the log, behind the cut
    assert end_of(torn) == size - 8
    for _ in range(3):
        write(torn, call("after"))
    ((name, cut),) = recovered(torn)
    assert (torn.with_name(name).read_bytes(), cut) == (b'{"torn":', 8)


def test_what_a_process_kept_that_was_killed_before_it_cut_is_kept_and_said_once(torn: Path) -> None:
    size = end_of(torn)
    killed_at(torn, "ftruncate")
    assert end_of(torn) == size
    for _ in range(3):
        write(torn, call("after"))
    ((name, _),) = recovered(torn)
    assert [file.name for file in torn.parent.glob("*.torn*")] == [name]
    assert torn.with_name(name).read_bytes() == b'{"torn":'


def test_a_tail_that_was_not_kept_in_full_is_never_said(torn: Path) -> None:
    killed_at(torn, "fsync", lambda fd: os.ftruncate(fd, 3))
    write(torn, call("after"))
    ((name, _),) = recovered(torn)
    assert [file.name for file in torn.parent.glob("*.torn*")] == [name]


def test_what_another_has_said_meanwhile_is_not_said_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, call("before"))
    with path.open("ab") as file:
        file.write(b'{"torn":')

    def fail(_: int, __: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            ours = stack.enter_context(opened(path))
        assert not ours.healthy
        write(path, call("another"))
        append(ours, call("ours"))
    assert recovered(path) == [(f"{path.name}.torn-2", 8)]
    assert verify(path).ok
