"""Which of the sliding context goes: by priority, then by moment, then by id."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from aos_context.eviction import evict, rank, tokens_of
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from random import Random

    from aos_context.artifacts import Document

OFFSETS = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=OFFSETS)  # noqa: DTZ001


def item(name: str, priority: int = 0, timestamp: str = "2026-01-18T00:00:00Z", content: str = "x") -> Document:
    return {"id": name, "content": content, "timestamp": timestamp, "priority": priority}


@st.composite
def contexts(draw: st.DrawFn) -> list[Document]:
    names = draw(st.lists(st.text("abc0", min_size=1, max_size=4), unique=True, max_size=12))
    near = st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 1, 0, 0, 2), timezones=OFFSETS)  # noqa: DTZ001
    return [
        item(name, draw(st.integers(0, 2)), draw(near | MOMENTS).isoformat(), "x" * draw(st.integers(1, 9)))
        for name in names
    ]


def test_where_an_item_is_from_counts_as_what_it_says_does() -> None:
    items = [{**item("a"), "source_refs": ["xx", "xxx"]}, item("b")]
    assert tokens_of(items[0], len) == 6
    assert [one["id"] for one in evict(items, 6, len)[1]] == ["a"]
    assert evict(items, 7, len)[1] == []


@given(contexts(), st.integers(0, 60), st.randoms(use_true_random=False))
def test_the_budget_is_held_in_whatever_order_the_items_come(
    items: list[Document], budget: int, random: Random
) -> None:
    kept, gone = evict(items, budget, len)
    assert sum(len(one["content"]) for one in kept) <= budget
    assert kept == [one for one in items if one not in gone]
    assert len(kept) + len(gone) == len(items)

    shuffled = random.sample(items, len(items))
    other_kept, other_gone = evict(shuffled, budget, len)
    assert other_gone == gone
    assert other_kept == [one for one in shuffled if one in kept]


@given(contexts(), st.integers(0, 60))
def test_what_stays_outranks_what_goes_and_nothing_goes_that_need_not(items: list[Document], budget: int) -> None:
    kept, gone = evict(items, budget, len)

    def worth(one: Document) -> tuple[int, datetime, str]:
        return one["priority"], datetime.fromisoformat(one["timestamp"]), one["id"]

    assert gone == sorted(gone, key=worth)
    assert all(worth(last) < worth(first) for last in gone[-1:] for first in kept)
    assert sorted(items, key=rank) == sorted(items, key=worth)
    assert all(sum(len(one["content"]) for one in [last, *kept]) > budget for last in gone[-1:])


def test_priority_goes_before_age_and_age_before_name() -> None:
    late, early = "2026-01-18T12:00:00Z", "2026-01-18T12:30:00+01:00"
    items = [item("b", 1, late), item("a", 1, late), item("c", 1, early), item("d", 0, late), item("e", 2, early)]
    assert [one["id"] for one in evict(items, 0, len)[1]] == ["d", "c", "a", "b", "e"]
    assert [one["id"] for one in evict(items, 2, len)[0]] == ["b", "e"]
