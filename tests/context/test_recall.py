"""What a brief recalls: what has to do with the run, and not what shares an "in the" with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aos_context.config import DEFAULT_CONFIG
from aos_context.memory_words import words
from aos_context.recall import FUNCTION_WORDS, recalled

from tests.context.memories import add, opened, remember

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.memory import RecordingMemoryStore

WANTED = DEFAULT_CONFIG.search_top_k
UNRELATED = [
    "The server listens on port 80 in the east region",
    "The log formats in the archive are three",
    "Invoices before 2019 are in the old currency, and the new ones are not",
    "The capital is in the north of the country",
]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordingMemoryStore]:
    with opened(request.param, tmp_path, DEFAULT_CONFIG) as given:
        yield given


def recall(store: RecordingMemoryStore, text: str) -> list[str]:
    return [hit.item["content"] for hit in recalled(lambda query: store.search(query, {}, WANTED), text, WANTED)]


def test_memories_that_share_function_words_only_are_not_recalled(store: RecordingMemoryStore) -> None:
    remember(store, *map(add, UNRELATED))
    assert recall(store, "Fix the login bug in the mobile app") == []
    remember(store, add("Login tokens end after an hour"))
    assert recall(store, "Fix the login bug in the mobile app") == ["Login tokens end after an hour"]


@pytest.mark.parametrize("count", range(1, 9))
def test_of_few_memories_all_that_match_are_recalled_though_a_word_is_in_most_of_them(
    store: RecordingMemoryStore, count: int
) -> None:
    contents = [f"Invoices of {2010 + number} are in box {number}" for number in range(count)]
    remember(store, *map(add, contents))
    assert sorted(recall(store, "Move the invoices")) == contents
    assert recall(store, "Paint the boat") == []


def test_where_there_is_a_choice_a_word_that_most_have_recalls_nothing_and_a_rarer_one_what_has_it(
    store: RecordingMemoryStore,
) -> None:
    remember(store, *(add(f"Der Server {number} läuft in der Nacht") for number in range(30)))
    assert recall(store, "Behebe den Fehler in der App") == []
    remember(store, add("Die App kennt den Fehler seit gestern"))
    assert recall(store, "Behebe den Fehler in der App") == ["Die App kennt den Fehler seit gestern"]
    assert len(recall(store, "server 7 in der nacht")) == 1


def test_words_of_just_less_than_half_of_the_memories_still_recall(store: RecordingMemoryStore) -> None:
    remember(store, *(add(f"boat {number}" if number < 12 else f"car {number}") for number in range(30)))
    assert len(recall(store, "boat")) == WANTED


def test_nothing_asked_recalls_the_newest_and_nothing_but_function_words_recalls_nothing(
    store: RecordingMemoryStore,
) -> None:
    remember(store, *map(add, UNRELATED))
    assert recall(store, " ") == UNRELATED[::-1]
    assert recall(store, "to be, or not to be?") == []


def test_scripts_without_spaces_and_names_with_signs_are_looked_for_as_they_are() -> None:
    asked: list[str] = []
    recalled(lambda query: asked.append(query) or [], "在the東京 user_id: is café-bar", WANTED)  # type: ignore[func-returns-value]
    assert words(asked[0]) == words("在the東京 user id café bar")


def test_function_words_are_words_as_memory_has_them() -> None:
    assert all(words(one) == [one] for one in FUNCTION_WORDS)
