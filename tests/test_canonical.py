from __future__ import annotations

import enum
import hashlib
import json
import math
import struct
from typing import Any

import orjson
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.canonical import CanonicalError, canonical, canonical_own, canonical_to_read, figure, sha256_hex

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_key = st.one_of(_text, st.text(st.sampled_from('a\ue000\uffff\U00010000\U0010ffff"\\\n'), max_size=3))
_number = st.one_of(st.integers(-(2**53) + 1, 2**53 - 1), st.floats(allow_nan=False, allow_infinity=False))
_value = st.recursive(
    st.one_of(st.none(), st.booleans(), _number, _text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_key, inner, max_size=4)),
    max_leaves=12,
)


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Name(str):
    __slots__ = ()


@settings(max_examples=400, deadline=None)
@given(_value)
def test_every_value_has_the_form_that_the_reference_gives_it(value: Any) -> None:
    assert canonical(value) == rfc8785.dumps(value)


@settings(max_examples=1500, deadline=None)
@given(
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=False),
        st.floats(9e-5, 1.1e15),
        st.floats(-1.1e16, -9e-6),
        st.integers(-(2**70), 2**70).map(float),
        st.decimals(-1000, 1000, places=3).map(float),
    )
)
def test_every_double_is_written_as_ecmascript_writes_it(number: float) -> None:
    assert canonical([number]) == rfc8785.dumps([number])


def test_powers_of_ten_and_their_neighbours_are_written_as_ecmascript_writes_them() -> None:
    powers = [float(f"1e{exponent}") for exponent in range(-323, 308)]
    for power in powers:
        for number in (power, -power, math.nextafter(power, 0), math.nextafter(power, math.inf), power * 1.5):
            assert canonical(number) == rfc8785.dumps(number)


@pytest.mark.parametrize(
    ("bits", "text"),
    [  # RFC 8785 appendix B
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("ffefffffffffffff", "-1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555554", "333333333.33333325"),
        ("41b3de4355555555", "333333333.3333333"),
        ("41b3de4355555556", "333333333.3333334"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_the_numbers_of_the_rfc_are_written_as_it_writes_them(bits: str, text: str) -> None:
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical(number) == text.encode()


def test_the_example_of_the_rfc_has_the_bytes_that_it_gives() -> None:
    example = json.loads(
        r"""{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/", "literals": [null, true, false]}"""
    )
    assert canonical(example) == (
        rb'{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        b'"string":"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )


def test_keys_are_sorted_by_utf16_units_as_in_the_example_of_the_rfc() -> None:
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    assert list(orjson.loads(canonical(dict.fromkeys(keys)))) == [
        "\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "pointer"),
    [
        ({"a": [1, 2**53]}, "/a/1"),
        ({"a": -(2**53)}, "/a"),
        pytest.param(10**5000, "", id="an-integer-too-long-to-print"),
        ({"x/y": {"~": math.nan}}, "/x~1y/~0"),
        ([math.inf], "/0"),
        ([-math.inf], "/0"),
        ({"a": ["", "\udc00"]}, "/a/1"),
        ({"b": {"\ud800": 1}}, "/b/\\ud800"),
        ({"a": {1: 2}}, "/a"),
        ({"a": b"bytes"}, "/a"),
        ({"a": {"set"}}, "/a"),
        ([1.0, {"\U0001f600": object()}], "/1/\U0001f600"),
    ],
)
def test_what_has_no_canonical_form_is_refused_with_its_pointer(value: Any, pointer: str) -> None:
    with pytest.raises(CanonicalError) as caught:
        canonical(value)
    assert caught.value.pointer == pointer
    assert caught.value.message


def test_the_largest_integers_are_written() -> None:
    assert canonical([2**53 - 1, -(2**53) + 1]) == b"[9007199254740991,-9007199254740991]"


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CanonicalError, match="nested deeper"):
        canonical(endless)


def test_what_the_bus_lets_in_is_never_too_deep() -> None:
    nested: Any = 1.0
    for _ in range(64):
        nested = {"\U0001f600": [nested]}
    assert canonical(nested) == rfc8785.dumps(nested)


@pytest.mark.parametrize("neighbour", [1, 1.0])
def test_a_subclass_counts_as_its_base(neighbour: float) -> None:
    value = {"a": Colour.RED, "b": Level.HIGH, "c": Name("n"), "d": (1, 2), "e": neighbour, Name("f"): {Colour.RED: 0}}
    assert canonical(value) == b'{"a":"red","b":3,"c":"n","d":[1,2],"e":1,"f":{"red":0}}'


@pytest.mark.parametrize("neighbour", [0, 1.0, {"\U0001f600": 1}])
def test_bytes_that_are_canonical_already_go_in_as_they_are(neighbour: Any) -> None:
    inner = {"z": [1.5, "\u20ac"], "a": None}
    outer = {"payload": orjson.Fragment(canonical(inner)), "a": neighbour}
    assert canonical(outer) == canonical({"payload": inner, "a": neighbour})


def test_the_value_is_left_as_it_was() -> None:
    value = {"\U0001f600": [1.0, -0.0], "a": (1,)}
    canonical(value)
    assert list(value) == ["\U0001f600", "a"]
    assert repr(value["\U0001f600"]) == "[1.0, -0.0]"


@pytest.mark.parametrize(
    ("x", "text"),
    [(1.0, "1"), (12.34567, "12.346"), (0.0004, "0"), (-0.0001, "0"), (7, "7"), (0.9996, "1"), (-2.5, "-2.5")],
)
def test_a_figure_has_at_most_three_decimals_and_is_whole_where_it_can_be(x: float, text: str) -> None:
    assert repr(figure(x)) == text


@given(st.floats(-(2.0**53) + 1, 2.0**53 - 1))
def test_a_figure_needs_no_look_to_be_canonical(x: float) -> None:
    assert canonical_own({"x": figure(x)}) == canonical({"x": figure(x)})
    assert abs(figure(x) - x) <= 0.5


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_no_figure(x: float) -> None:
    with pytest.raises(CanonicalError):
        figure(x)


@pytest.mark.parametrize("bad", [2**53, "\ud800", {1: 2}, object()])
def test_own_objects_are_still_refused_what_is_not_json(bad: object) -> None:
    with pytest.raises(CanonicalError):
        canonical_own({"a": bad})


def test_the_hash_is_sha256_in_lower_case_hex() -> None:
    assert sha256_hex(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_what_is_read_again_has_no_float_that_would_be_read_as_an_integer_too_large() -> None:
    assert canonical_to_read({"a": [1e21, -(2**53) + 1.0, "1" * 20, 0.1]}) == canonical(
        {"a": [1e21, -(2**53) + 1, "1" * 20, 0.1]}
    )
    for beyond in (2.0**53, -1e17, 1.816325676831737e16, 9.9e20):
        with pytest.raises(CanonicalError, match=r"2\^53") as caught:
            canonical_to_read({"a": {"b/c": [0, beyond]}})
        assert caught.value.pointer == "/a/b~1c/1"
