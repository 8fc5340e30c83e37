"""One log, one verdict: `aal provenance verify` and TOOLS/verify.py share no line and say the same of each line."""

from __future__ import annotations

import importlib.util
import json
import sys
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bus.canonical import canonical
from bus.merkle import Frontier
from bus.records import draft
from bus.segments import closed_path
from bus.verification import verify
from tests.ledgers import HASH, call, synthesize
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

LINES = 5


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_tool", REPO / "TOOLS" / "verify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of calls."""
    path = tmp_path_factory.mktemp("verdicts") / "provenance.jsonl"
    synthesize(path, (call(f"r{number}", payload=0, admission=0) for number in range(LINES)), LINES)
    return path


@pytest.fixture(scope="module")
def verdict_of(tool: ModuleType, path: Path) -> Callable[..., tuple[int | None, str | None]]:
    """Gives what both say of the ledger, its line 3 replaced; fails where they differ in more than `form`."""
    lines = path.read_bytes().splitlines(keepends=True)

    def verdict_of(line: bytes, start: int = 1) -> tuple[int | None, str | None]:
        path.write_bytes(b"".join([*lines[:2], line]))
        ours = verify(path, start=start)
        found = tool.Log(path, tool.Evidence(), start).check()
        theirs = (found.first_bad, found.fault)
        if ours.fault == "form":  # asked here before its place, and there not at all
            assert found.fault not in {"torn", "json", "hash"}, (line, ours, found)
        else:
            assert (ours.first_bad, ours.fault) == theirs, (line, ours, found)
        return ours.first_bad, ours.fault

    return verdict_of


def sealed(text: bytes, place: int = -1) -> bytes:
    """A line of this text, with its right hash before the member that comes behind `place`."""
    place = text.rfind(b'"manifest_hash"') if place < 0 else place
    return b'%b"hash":"%b",%b\n' % (text[:place], sha256(text).hexdigest().encode(), text[place:])


@pytest.fixture(scope="module")
def text(path: Path) -> bytes:
    """Line 3 without its hash."""
    record = json.loads(path.read_bytes().splitlines()[2])
    return canonical({name: member for name, member in record.items() if name != "hash"})


TWO_MEANINGS = [
    '{"a":1,"a":2}',
    '{"a":1,"\\u0061":1}',
    '[{"b":{"a":[{}],"a":[{}]}}]',
    '"\\ud800"',
    '{"\\udc00":1}',
    '"\\udc00\\ud800"',
    "1e309",
    "-1e+400",
    "1" + "0" * 309,
    "9" * 5000,
    "[" * 600 + "]" * 600,
    "[" * 2000 + "]" * 2000,
    '{"a":' * 600 + "0" + "}" * 600,
    "NaN",
    "Infinity",
    "01",
    '"\x01"',
]
ONE_MEANING = [
    '{"b":1,"a":2}',
    " [ 1 ,\t2 ] ",
    '"\\ud83d\\ude00"',
    '"\\u0041\\/"',
    "1e308",
    "1" + "0" * 308,
    "-0",
    "1.0",
    "1e-999",
    "123456789012345678901234567890",
    "[" * 500 + "]" * 500,
    '"a\u2028\x7f\U0001f600"',
    '{"a":{"a":{"hash":"x"}},"b":{"a":":"}}',
]


@pytest.mark.parametrize("member", ["payload", "admission"])
@pytest.mark.parametrize(
    ("raw", "fault"), [*((raw, "json") for raw in TWO_MEANINGS), *((raw, None) for raw in ONE_MEANING)]
)
def test_a_line_with_a_right_hash_has_one_meaning_or_is_wrong(
    verdict_of: Any, text: bytes, member: str, raw: str, fault: str | None
) -> None:
    place = text.index(b'"%b":0' % member.encode())
    odd = text[:place] + text[place:].replace(b":0", b":" + raw.encode(), 1)
    wanted = (None, None) if fault is None else (3, fault)
    if member == "admission" and '"hash"' in raw:
        wanted = (3, "hash")  # the first member of that name is not the line's own
    assert verdict_of(sealed(odd)) == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"code":', b'"code":"X","code":'),
        lambda text: b" " + text,
        lambda text: text + b" ",
        lambda text: text + b"\r",
        lambda text: text + b"{}",
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: b"[" + text + b"]",
    ],
)
def test_nothing_stands_twice_in_a_line_and_nothing_around_its_object(
    verdict_of: Any, text: bytes, change: Callable[[bytes], bytes]
) -> None:
    assert verdict_of(sealed(change(text))) == (3, "json")


@pytest.mark.parametrize("prev", ["null", "5", f'"{HASH.upper()}"', '"ab"'])
def test_a_part_begins_with_a_line_that_names_a_hash_before_it(
    path: Path, verdict_of: Any, text: bytes, prev: str
) -> None:
    start = text.index(b'"prev":"') + 7
    odd = text[:start] + prev.encode() + text[start + 66 :]
    assert verdict_of(sealed(odd), start=3) == (3, "chain")


@pytest.mark.parametrize(
    "odd",
    [
        lambda nodes: [node.upper() for node in nodes],
        lambda nodes: [f" {node}" for node in nodes],
        dict.fromkeys,
        lambda nodes: nodes * 2,
        lambda nodes: None,
    ],
)
def test_the_nodes_of_a_checkpoint_are_spelled_in_one_way(
    path: Path, verdict_of: Any, text: bytes, odd: Callable[[list[str]], Any]
) -> None:
    tree = Frontier(2, [b"\xab" * 32])
    members: dict[str, Any] = {
        "type": "checkpoint",
        "timestamp_ms": 1,
        "size": 2,
        "root": tree.root().hex(),
        "nodes": [node.hex() for node in tree.nodes],
        "note": None,
    }
    assert verdict_of(draft(members).line(3, HASH)[0], start=3) == (None, None)
    wrong = draft(members | {"nodes": odd(members["nodes"])})
    assert verdict_of(wrong.line(3, HASH)[0], start=3) == (3, "tree")


def test_a_closed_segment_has_the_number_of_its_first_line_in_its_name(tmp_path: Path, tool: ModuleType) -> None:
    path = tmp_path / "provenance.jsonl"
    for first, named in ((4, 5), (7, 6), (7, 9)):
        for old in tmp_path.iterdir():
            old.unlink()
        synthesize(path, (call(f"r{number}") for number in range(10)), 3)
        assert verify(path).ok
        closed_path(path, first).rename(closed_path(path, named))
        report, found = verify(path), tool.Log(tmp_path, tool.Evidence()).check()
        assert (report.first_bad, report.fault) == (found.first_bad, found.fault) == (first, "seq")


# --- Whatever else stands in a line ---

numbers = st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
pieces = st.sampled_from(
    ["a", "hash", "seq", "\\u0061", "\\ud83d", "\\ude00", "\\n", '\\"', ":", "é", "\u2028", "\U0001f600", "\\x", "\t"]
)
strings = st.lists(pieces, max_size=4).map(lambda some: f'"{"".join(some)}"')
spaces = st.sampled_from(["", "", "", " ", "\t", "\r", " \t"])
raw_json: st.SearchStrategy[str] = st.recursive(
    numbers | strings | st.sampled_from(["true", "null", "[]", "{}"]),
    lambda inner: (
        st.tuples(spaces, st.lists(inner, max_size=4)).map(lambda few: f"[{few[0]}{','.join(few[1])}{few[0]}]")
        | st.tuples(spaces, st.lists(st.tuples(strings, inner), max_size=4)).map(
            lambda few: "{{{}}}".format(f",{few[0]}".join(f"{key}{few[0]}:{member}" for key, member in few[1]))
        )
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(raw_json, st.sampled_from(["payload", "admission"]))
@example('{"a":{"hash":"x"}}', "admission")
def test_both_say_the_same_of_any_json(verdict_of: Any, text: bytes, raw: str, member: str) -> None:
    place = text.index(b'"%b":0' % member.encode())
    odd = text[:place] + text[place:].replace(b":0", b":" + raw.encode(), 1)
    assert verdict_of(sealed(odd))[1] in {None, "json", "hash"}


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=3) | raw_json.map(str.encode) | st.sampled_from([b'"', b"\\", b"}", b',"a":1', b"\n"]),
    st.integers(0, 10_000),
    st.integers(0, 40),
)
def test_both_say_the_same_of_any_line_that_holds_its_hash(
    verdict_of: Any, text: bytes, bytes_: bytes, place: int, cut: int
) -> None:
    start = place % len(text)
    odd = text[:start] + bytes_ + text[start + cut :]
    member = odd.rfind(b'"manifest_hash"')
    assume(member >= 0 and b"\n" not in odd)
    assert verdict_of(sealed(odd, member))[0] in {None, 3}
