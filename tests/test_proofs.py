"""Proofs are made of a log that is whole, as far as it is read for them: lines that are missing or wrong give none."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest

from bus import index, proofs
from bus.canonical import canonical
from bus.index import Index
from bus.merkle import root_of
from bus.notary import Notary
from bus.notes import Signer, new_key
from bus.proofs import Prover
from bus.provenance import raw_lines
from bus.records import BrokenLineError, draft, parse
from bus.segments import Plain, closed_firsts, closed_path
from tests.ledgers import append, call, iter_hashes, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIGNER = Signer.read(new_key("example.com/ledger"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of some segments, each of which begins with a checkpoint; in the open one is another checkpoint."""
    path = tmp_path / "logs" / "provenance.jsonl"
    with opened(path, segment_bytes=4000) as ledger:
        for number in range(20):
            append(ledger, call(str(number)))
    assert len(closed_firsts(path)) > 2
    return path


def refused(path: Path, notary: Notary | None = None) -> tuple[str, str]:
    """What is wrong, and where. Nothing is proved of it."""
    with pytest.raises(BrokenLineError) as caught:
        Prover(path, notary)
    return caught.value.fault, caught.value.detail.partition(":")[0]


@pytest.mark.parametrize("number", [0, 1, -1])
def test_no_proof_is_made_of_a_log_that_lacks_a_segment(path: Path, number: int) -> None:
    first = closed_firsts(path)[number]
    closed_path(path, first).unlink()
    assert refused(path) == ("seq", f"line {first}")


def replaced(path: Path, seq: int, change: Callable[[bytes], bytes]) -> None:
    """One line of the log as somebody else may leave it."""
    for file in (path, *(closed_path(path, first) for first in closed_firsts(path))):
        lines = file.read_bytes().splitlines(keepends=True)
        first = parse(lines[0])["seq"]
        if first <= seq < first + len(lines):
            lines[seq - first] = change(lines[seq - first])
            file.write_bytes(b"".join(lines))


def _with_another_hash(line: bytes) -> bytes:
    place = line.index(b'"hash":"') + 8
    return line[:place] + (b"0" if line[place : place + 1] != b"0" else b"1") + line[place + 1 :]


def _sealed(line: bytes, **changes: Any) -> bytes:
    """With other members, and the hash of them."""
    record = {
        name: member for name, member in (parse(line) | changes).items() if name not in {"hash", "seq", "prev", "v"}
    }
    seq: int = changes.get("seq") or parse(line)["seq"]
    return draft(record).line(seq, parse(line)["prev"])[0]


@pytest.mark.parametrize(
    ("change", "fault", "off"),
    [
        (_with_another_hash, "hash", 0),
        (lambda line: line.replace(b'"v":1', b'"v":2'), "hash", 0),
        (lambda line: b"", "seq", 0),
        (lambda line: line * 2, "seq", 1),
        (lambda line: b"[]\n", "json", 0),
        (lambda line: _sealed(line, seq=99), "seq", 0),
        (lambda line: _sealed(line, caller="mallory"), "chain", 1),
    ],
)
@pytest.mark.parametrize("held", [0, 4])
def test_no_proof_is_made_of_lines_of_which_one_is_wrong(
    path: Path, change: Callable[[bytes], bytes], fault: str, off: int, *, held: int
) -> None:
    if held:
        Index(path).refresh(most_lines=held)
    replaced(path, 7, change)
    assert refused(path) == (fault, f"line {7 + off}")


def test_no_proof_is_made_where_a_checkpoint_tells_another_tree(path: Path) -> None:
    lines = list(raw_lines(path))
    seq = next(seq for seq, line in enumerate(lines, 1) if parse(line)["type"] == "checkpoint")
    nodes = ["ab" * 32 for _ in parse(lines[seq - 1])["nodes"]]
    replaced(path, seq, lambda line: _sealed(line, nodes=nodes))
    assert refused(path) == ("tree", f"line {seq}")


def test_a_new_key_signs_no_tree_of_a_log_with_a_line_that_is_wrong(path: Path, tmp_path: Path) -> None:
    replaced(path, 4, _with_another_hash)
    assert refused(path, Notary(SIGNER, tmp_path / ".aal")) == ("hash", "line 4")
    assert Notary(SIGNER, tmp_path / ".aal").known() == []


def test_a_line_that_is_wrong_gets_no_proof_from_an_index_that_knew_it_right(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "WORTH_BYTES", 0)
    Index(path).refresh()
    replaced(path, 4, lambda line: line.replace(b'"ok":true', b'"ok":null'))
    with Prover(path) as prover:
        assert prover.inclusion(5).root == root_of(iter_hashes(path)).hex()
        with pytest.raises(BrokenLineError, match="line 4: "):
            prover.inclusion(4)


def test_a_line_whose_write_is_under_way_is_none_yet(path: Path) -> None:
    count = len(list(raw_lines(path)))
    with path.open("ab") as file:
        file.write(b'{"admission":')
    with Prover(path) as prover:
        assert (prover.size, prover.checkpoint().root) == (count, root_of(list(iter_hashes(path))).hex())


def test_an_end_that_is_replaced_while_it_is_read_is_no_fault(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cut off by who writes next, and the block that held its beginning was read before."""
    chunks = Plain.chunks
    whole = path.read_bytes()
    fits = [canonical({"torn": 1}) + whole]

    def changing(content: Plain, skip: int = 0) -> Iterator[bytes]:
        if content.size == len(whole) and fits and os.fstat(content.fd).st_ino == path.stat().st_ino:
            yield fits.pop()
        else:
            yield from chunks(content, skip)

    monkeypatch.setattr(Plain, "chunks", changing)
    with contextlib.closing(Prover(path)) as prover:
        assert prover.checkpoint().root == root_of(list(iter_hashes(path))).hex()
    assert not fits


def test_every_line_is_proved_of_a_log_that_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "index_of", lambda _: None)
    hashes = list(iter_hashes(path))
    with Prover(path) as prover:
        for seq, leaf in enumerate(hashes, 1):
            assert prover.inclusion(seq).hash == leaf.hex()
            assert prover.consistency(seq).old_root == root_of(hashes[:seq]).hex()
