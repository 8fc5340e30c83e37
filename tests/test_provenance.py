"""Reading the ledger, while others write and after others changed it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bus import segments
from bus.errors import NotFoundError
from bus.provenance import first_line, iter_lines, read_line, tail
from bus.records import BrokenLineError, environment_hash
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, call, write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


# --- Reading ---


def test_a_line_is_found_by_its_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, *(call(str(number), error="x" * number) for number in range(1, 41)))
    for block in (1, 7, 1000, 1 << 20):
        monkeypatch.setattr(segments, "_LARGEST_BLOCK", block)
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


NO_RECORD = [
    b"nonsense\n",
    b"{}\n",
    b'{"seq":2,"type":"checkpoint"}\n',
    b'{"hash":"x","seq":2,"timestamp_ms":"today","type":"checkpoint"}\n',
    b'{"hash":"x","seq":"2","timestamp_ms":1,"type":"checkpoint"}\n',
    b'{"hash":"x","seq":2,"timestamp_ms":1,"type":"invoke"}\n',
]


@pytest.mark.parametrize("line", NO_RECORD)
def test_a_line_that_is_no_record_ends_the_reading_and_is_left_out_of_the_tail(path: Path, line: bytes) -> None:
    write(path, call("a"))
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(BrokenLineError):
        list(iter_lines(path))
    with pytest.raises(BrokenLineError):
        read_line(path, 2)
    assert [record["request_id"] for record in tail(path, 5)] == ["a"]
    assert [record["request_id"] for record in tail(path, 5, since_ms=1, types=("invoke",))] == ["a"]
    assert verify(path).first_bad == 2


def test_the_first_line_is_given_as_it_stands(path: Path) -> None:
    assert first_line(path) == b""
    write(path, call("a"), call("b"))
    assert first_line(path) == path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(b"torn")
    assert first_line(path) == b"torn"


@pytest.mark.parametrize("block", [1, 2, 100, 701, 1 << 16])
def test_the_tail_is_read_backwards_through_blocks_of_any_size(
    path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    write(path, *(call(str(number), error="x" * (number * 97 % 1500)) for number in range(30)))
    monkeypatch.setattr(segments, "_BLOCK", block)
    monkeypatch.setattr(segments, "_LARGEST_BLOCK", 2 * block)
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
