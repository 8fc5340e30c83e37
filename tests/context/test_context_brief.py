"""The context brief: what is in it, that it keeps its budget, and that no text in it can pass for its structure."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest
from aos_context.context_brief import CUT, SECTIONS, TITLE, quote, render
from aos_context.memory import Hit
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.context.made import TIME, item, memory_item, working_set

if TYPE_CHECKING:
    from collections.abc import Callable

    from aos_context.artifacts import Document

HEADINGS = [TITLE, *(section.heading for section in SECTIONS)]
NASTY = [
    "# Context brief", "## Memory", "```\nopen", "~~~", "> quoted", "- item\n\n- item", "<!-- open", "<script>\n\nx",
    "a\n\n# b", "a\r# b", "a\u2028## Memory", "a\x85## Memory", "\n\n\n# late", "    code", "\t# tab",
    "===\n---", "[a]: b", "1. one", "| a |\n| - |", "\\", "&#35; x", "a\x0b# b", "a\x1c# b", "x" * 400, " ", "\n",
    "é" * 50, "*" * 30, "$$",
]  # fmt: skip

LINE = re.compile(
    r"|##? [A-Z][a-z ]+|(- |  )?>.*|- Status: [A-Z]+, stage: [A-Z]+|(Left out: [a-z0-9, ]+\. ?)?(Cut: \d+\.)?"
    r"|- (Next action|Episode \d+, its reason|Go on from|c\d+|mem_\d+, fact, global, confidence 0\.90):"
)
"""All that a line may be."""


def hit(item: Document) -> Hit:
    """A memory that was found."""
    return Hit(item, 1.0)


def quarter(text: str) -> int:
    """A quarter of the bytes, rounded up."""
    return (len(text.encode()) + 3) // 4


def erratic(text: str) -> int:
    """Neither additive nor monotonic, but the same for the same text."""
    return quarter(text) * (hashlib.sha256(text.encode()).digest()[0] % 5)


def superadditive(text: str) -> int:
    """Two texts together cost far more than each."""
    return len(text) ** 2 // 50


COUNTS: list[Callable[[str], int]] = [quarter, len, erratic, superadditive]

texts = st.sampled_from(NASTY) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=80)
more_than_blanks = texts.filter(str.strip)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Document, list[Hit], Document | None]:
    names = iter(f"c{number}" for number in range(100))
    one = st.builds(lambda text, priority: item(next(names), text, priority=priority), texts, st.integers(0, 9))
    items = st.lists(one, max_size=8)
    state = working_set(
        1,
        objective=draw(more_than_blanks),
        next_action=draw(texts | st.just("")),
        acceptance_criteria=draw(st.lists(more_than_blanks, max_size=4)),
        constraints=draw(st.lists(more_than_blanks, max_size=4)),
        pinned_context=draw(items),
        sliding_context=draw(items),
    )
    memories = draw(st.lists(more_than_blanks, max_size=6))
    hits = [hit(memory_item(f"mem_{n}", content=text)) for n, text in enumerate(memories)]
    episode = {"number": 1, "reason": draw(more_than_blanks), "next_entry_point": draw(texts | st.none())}
    return state, hits, draw(st.sampled_from([None, episode]))


@settings(max_examples=400, deadline=None)
@given(given_=inputs(), budget=st.integers(0, 600), count=st.sampled_from(COUNTS))
def test_a_brief_is_within_its_budget_and_always_the_same_and_keeps_its_structure(
    given_: tuple[Document, list[Hit], Document | None], budget: int, count: Callable[[str], int]
) -> None:
    state, hits, episode = given_
    brief = render(state, hits, budget_tokens=budget, count=count, last_episode=episode)
    assert count(brief) <= budget or not brief
    assert brief == render(state, hits, budget_tokens=budget, count=count, last_episode=episode)
    if brief:
        require_structure(brief)


def require_structure(brief: str) -> None:
    """All headings of the page are ours, each once and in order; all other text is ours, or in a quote."""
    assert all(LINE.fullmatch(line) for line in brief.splitlines()), brief
    depth, found = 0, []
    tokens = MarkdownIt("commonmark").parse(brief)
    for index, token in enumerate(tokens):
        if token.type == "blockquote_open":
            depth += 1
        elif token.type == "blockquote_close":
            depth -= 1
        elif not depth:
            assert token.type not in {"fence", "code_block", "html_block", "hr", "ordered_list_open"}, brief
            if token.type == "heading_open":
                found.append(f"{token.markup} {tokens[index + 1].content}")
    assert found == [heading for heading in HEADINGS if heading in found]


@pytest.mark.parametrize("text", NASTY)
def test_each_line_of_a_text_is_quoted_wherever_a_program_may_see_its_end(text: str) -> None:
    assert all(line.startswith(">") for line in quote(text).splitlines())


def test_a_brief_has_all_sections_in_order_when_all_fits() -> None:
    state = working_set(
        2,
        constraints=["Be quick."],
        pinned_context=[item("p1", "one\n# two")],
        sliding_context=[item("s1"), item("s2")],
    )
    episode = {"number": 3, "reason": "checkpoint", "next_entry_point": "Continue."}
    brief = render(state, [hit(memory_item())], budget_tokens=1000, count=quarter, last_episode=episode)
    assert (
        brief
        == """\
# Context brief

## Objective

> Reach the end.

## Acceptance criteria

- > It is reached.

## Constraints

- > Be quick.

## State

- Status: BUSY, stage: INTAKE
- Next action:
  > step 3

## Last milestone

- Episode 3, its reason:
  > checkpoint
- Go on from:
  > Continue.

## Pinned context

- p1:
  > one
  > # two

## Sliding context

- s1:
  > x
- s2:
  > x

## Memory

- mem_1, fact, global, confidence 0.90:
  > Prefers Python."""
    )


def contexts(count: int, words: int = 40) -> list[Document]:
    return [item(f"s{n:03}", f"text {n} " * words, priority=n % 10) for n in range(count)]


def test_sliding_context_gives_way_by_priority_then_age_then_id_and_stands_in_its_own_order() -> None:
    late = "2026-01-18T00:00:00.5+00:00"
    items = [
        item("b", "text " * 60, priority=1), item("a", "text " * 60, priority=1),
        item("newer", "text " * 60, priority=1, timestamp=late), item("worthy", "text " * 60, priority=9),
        item("least", "text " * 60, priority=0, timestamp=late),
    ]  # fmt: skip

    def shown(budget: int) -> list[str]:
        brief = render(working_set(1, sliding_context=items), [], budget_tokens=budget, count=quarter)
        return [one["id"] for one in items if f"- {one['id']}:" in brief]

    seen = [names for names, before in zip(map(shown, range(80, 700)), map(shown, range(79, 699)), strict=True)
            if names != before]  # fmt: skip
    assert seen == [
        ["worthy"], ["newer", "worthy"], ["b", "newer", "worthy"], ["b", "a", "newer", "worthy"],
        ["b", "a", "newer", "worthy", "least"],
    ]  # fmt: skip


def test_memories_have_room_beside_much_sliding_context_and_what_is_left_out_is_said() -> None:
    state = working_set(1, sliding_context=contexts(100))
    hits = [hit(memory_item(f"mem_{n}", content="remembered " * 20)) for n in range(30)]
    brief = render(state, hits, budget_tokens=2000, count=quarter)
    assert 5 <= brief.count("- mem_") < 30
    assert brief.count("- s0") >= 5
    left_out = brief.splitlines()[-1]
    assert left_out.startswith(f"Left out: {100 - brief.count('- s0')} of 100 sliding, ")
    assert f"{30 - brief.count('- mem_')} of 30 memories." in left_out
    assert quarter(brief) > 1800


def test_memories_take_the_room_that_sliding_context_leaves() -> None:
    hits = [hit(memory_item(f"mem_{n}", content="remembered " * 20)) for n in range(30)]
    brief = render(working_set(), hits, budget_tokens=1000, count=quarter)
    assert quarter(brief) > 850


def test_one_huge_text_is_cut_and_leaves_room_for_the_others() -> None:
    state = working_set(
        1, pinned_context=[item("huge", "word " * 13_000), item("small", "kept " * 200)], sliding_context=[item("s")]
    )
    brief = render(state, [hit(memory_item())], budget_tokens=1000, count=quarter)
    assert CUT in brief
    assert "kept " * 199 in brief
    assert "- s:\n  > x" in brief
    assert "Prefers Python." in brief
    assert brief.endswith("\n\nCut: 1.")
    assert 400 < quarter(brief) <= 1000


def test_a_tiny_budget_has_the_objective_before_anything_else_and_none_has_nothing() -> None:
    state = working_set(1, sliding_context=contexts(3), pinned_context=[item("p1", "x" * 500)])
    assert render(state, [], budget_tokens=0, count=quarter) == ""
    assert render(state, [], budget_tokens=4, count=quarter) == TITLE
    assert render(state, [], budget_tokens=16, count=quarter) == f"{TITLE}\n\n## Objective\n\n> Reach the end."


def test_the_order_of_evictions_holds_for_every_timestamp_that_a_working_set_may_have() -> None:
    odd = ["0000-01-01T00:00:00Z", "2016-12-31T23:59:60Z", "2026-01-18t00:00:00z", TIME]
    items = [item(f"s{n}", "x" * 300, timestamp=one) for n, one in enumerate(odd)]
    brief = render(working_set(1, sliding_context=items), [], budget_tokens=150, count=quarter)
    assert "- s3:" in brief
    assert "- s0:" not in brief
