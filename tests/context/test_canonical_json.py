"""The form in which a bus hashes an answer: the overlay's own function and the bus's agree on every value."""

from __future__ import annotations

import pytest
from aos_context.canonical import canonical, canonical_sha256
from hypothesis import given
from hypothesis import strategies as st

from bus import canonical as of_the_bus

LARGEST = of_the_bus.LARGEST_INTEGER
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.none() | st.booleans() | st.integers(-LARGEST, LARGEST) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(PLAIN | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20)


@given(VALUES)
def test_every_value_has_the_bytes_that_a_bus_hashes(value: object) -> None:
    assert canonical(value) == of_the_bus.canonical(value)
    assert canonical_sha256(value) == of_the_bus.sha256_hex(of_the_bus.canonical(value))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.9, "0.9"), (1e-6, "0.000001"), (1e-7, "1e-7"), (1.5e-9, "1.5e-9"),
        (1e20, "100000000000000000000"), (1e21, "1e+21"), (-1.25e30, "-1.25e+30"), (123.456, "123.456"),
        (333333333.33333329, "333333333.3333333"), (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
    ],
)  # fmt: skip
def test_a_number_is_written_as_the_rfcs_own_examples_have_it(number: float, text: str) -> None:
    assert canonical([number]).decode() == f"[{text}]"


def test_names_are_sorted_by_their_utf_16_units_and_text_is_escaped_no_more_than_it_must_be() -> None:
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    assert canonical(dict.fromkeys(names, 0)).decode() == (
        '{"\\r":0,"1":0,"\u0080":0,"\u00f6":0,"\u20ac":0,"\U0001f600":0,"\ufb33":0}'
    )
    assert canonical('\u20ac$\x0f\nA\'B"\\\\"/').decode() == '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'
    with pytest.raises(ValueError, match="surrogates"):
        canonical("\ud800")
