"""`parse_json` reads as Python's own decoder does, whichever way it takes; and it refuses what says one thing twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runners.base import LARGE_BYTES, MAX_DEPTH, JsonError, parse_json

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

WHOLE = st.integers() | st.sampled_from((2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**19, 10**18))
SCALARS = st.none() | st.booleans() | WHOLE | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
KEYS = st.sampled_from(("a", "b", "", 'a"', "\u0061\\")) | st.text(max_size=4)
SPACES = st.sampled_from(("", " ", "\n\t"))


def _containers(inner: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.lists(st.tuples(KEYS, inner), max_size=4).map(tuple)


VALUES = st.recursive(SCALARS, _containers, max_leaves=12)
"""An object is a tuple of pairs: its keys may stand twice."""


@st.composite
def texts(draw: DrawFn) -> bytes:
    """JSON text in any of the ways in which a value can be written."""
    is_ascii, space = draw(st.booleans()), draw(SPACES)

    def written(value: Any) -> str:
        if isinstance(value, tuple):
            pairs = (f"{json.dumps(key, ensure_ascii=is_ascii)}:{space}{written(member)}" for key, member in value)
            return "{" + f",{space}".join(pairs) + "}"
        if isinstance(value, list):
            return "[" + f",{space}".join(map(written, value)) + "]"
        return json.dumps(value, ensure_ascii=is_ascii)

    return written(draw(VALUES)).encode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def _refused(constant: str) -> Any:
    raise ValueError(constant)


@given(texts())
@example(b'{"a":1,"a":1}')
@example(b'{"a": "x", "\\u0061": "x"}')
@example(b'{"a": 1, "b": "\\u0022\\u0022", "b": ""}')
@example(b"[100000000000000000000]")
@example(b"-18446744073709551616")
@example(b"-0")
def test_every_way_to_write_a_value_is_read_as_pythons_decoder_reads_it(text: bytes) -> None:
    try:
        expected = json.loads(text, object_pairs_hook=_once)
    except ValueError:
        with pytest.raises(JsonError, match="stands twice in one object"):
            parse_json(text)
    else:
        found = parse_json(text)
        assert repr(found) == repr(expected)  # 1 is not 1.0, and -0.0 not 0


@given(st.binary(max_size=24) | st.text('{}[]",:0123456789eE+-.naiftrulse \\', max_size=24).map(str.encode))
@example(b"NaN")
@example(b"-Infinity")
@example(b"1e400")
@example(b"\xef\xbb\xbf{}")
def test_what_is_no_json_is_refused_and_nothing_else(text: bytes) -> None:
    try:
        expected = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_refused)
    except ValueError:
        with pytest.raises(JsonError):
            parse_json(text)
    else:
        assert repr(parse_json(text)) == repr(expected)


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("more", [b"", b" " * LARGE_BYTES])
def test_text_may_nest_so_deep_and_no_deeper(space: str, more: bytes) -> None:
    deep, deeper = ((f'{{"a":{space}' * depth + "1" + "}" * depth).encode() for depth in (MAX_DEPTH, MAX_DEPTH + 1))
    assert parse_json(deep + more)
    for text in (deeper, b"[" * 300 + b"]" * 300, b"[" * 5000 + b"]" * 5000):
        with pytest.raises(JsonError, match=f"nested deeper than {MAX_DEPTH} levels"):
            parse_json(text + more)
