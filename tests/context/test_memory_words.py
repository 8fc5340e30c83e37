"""Words are the same for all stores, and what makes them says so."""

from __future__ import annotations

import re

import pytest
from aos_context.memory_words import WORD_MOST, similarity, words
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("User prefers Python 3.11!", ["user", "prefers", "python", "3", "11"]),
        ("user_id and USER_ID", ["user", "id", "and", "user", "id"]),
        ("Caf\u00e9, CAFE\u0301, Stra\u00dfe", ["cafe", "cafe", "strasse"]),
        ("Python\u5165\u9580\u66f8", ["python", "\u5165\u9580", "\u9580\u66f8"]),
        ("\u732b", ["\u732b"]),
        ("\u041c\u043e\u0441\u043a\u0432\u0430", ["\u043c\u043e\u0441\u043a\u0432\u0430"]),
        ("x" * 100, ["x" * WORD_MOST]),
        ("... \U0001f600 \x00 _ \ud800", []),
    ],
)
def test_case_and_diacritics_are_folded_and_scripts_without_spaces_are_pairs(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text())
def test_a_word_has_nothing_that_a_query_language_could_take_for_its_own(text: str) -> None:
    assert all(re.fullmatch(r"[^\W_]{1,64}", word) for word in words(text))


@given(st.text(), st.text())
def test_words_of_two_texts_are_those_of_each(one: str, other: str) -> None:
    assert words(f"{one} {other}") == words(one) + words(other)


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_similarity_is_one_of_the_same_words_none_of_others_and_the_same_both_ways(
    one: set[int], other: set[int]
) -> None:
    left, right = {str(number) for number in one}, {str(number) for number in other}
    share = similarity(left, right)
    assert share == similarity(right, left)
    assert (share == 1) == (left == right != set())
    assert (share == 0) == left.isdisjoint(right)
