"""How many tokens a text has, estimated or counted."""

from __future__ import annotations

import sys

import pytest
from aos_context.errors import ContextError
from aos_context.tokens import estimate, tiktoken_count
from hypothesis import given
from hypothesis import strategies as st

TEXTS = st.text(max_size=200)


@given(TEXTS)
def test_an_estimate_is_never_below_a_quarter_of_the_bytes_and_never_above_half_of_them_rounded_up(text: str) -> None:
    length = len(text.encode())
    assert length / 4 <= estimate(text) <= -(-length // 2)


@given(TEXTS, TEXTS)
def test_the_estimate_of_a_concatenation_is_at_most_the_sum(one: str, other: str) -> None:
    assert max(estimate(one), estimate(other)) <= estimate(one + other) <= estimate(one) + estimate(other)


def test_digits_and_punctuation_weigh_twice_what_letters_do() -> None:
    assert estimate("") == 0
    assert estimate("abcdefgh") == 2
    assert estimate("12:34-56") == 4
    assert estimate("äöüß") == 2


def test_half_a_surrogate_pair_has_an_estimate_though_it_has_no_utf8() -> None:
    assert estimate("\ud83d") == 1


def test_a_missing_tiktoken_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ContextError, match="not installed") as refused:
        tiktoken_count()
    assert "pip install tiktoken" in str(refused.value.hint)


@pytest.fixture
def bytes_and_the(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real encoding of tiktoken's, small enough to stand here: every byte, and the word `the`."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    special = {"<|end|>": 258}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr("tiktoken.get_encoding", {"tiny": encoding}.__getitem__)


@pytest.mark.usefixtures("bytes_and_the")
def test_tiktoken_counts_and_a_special_token_is_a_text_like_any_other() -> None:
    count = tiktoken_count("tiny")
    assert [count(text) for text in ("", "the", "the thee", "ab", "<|end|>")] == [0, 1, 4, 2, 7]


def test_an_encoding_that_tiktoken_does_not_know_is_named() -> None:
    pytest.importorskip("tiktoken")
    with pytest.raises(ContextError, match="no encoding 'no-such'"):
        tiktoken_count("no-such")


def test_a_vocabulary_that_cannot_be_had_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken")

    def unreachable(_name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    with pytest.raises(ContextError, match="vocabulary of o200k_base: no route") as refused:
        tiktoken_count()
    assert "TIKTOKEN_CACHE_DIR" in str(refused.value.hint)
