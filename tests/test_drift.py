"""What differs between two results, and what made it so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.drift import CHANGES_MOST, Change, Difference, cause

if TYPE_CHECKING:
    from bus.drift import Control


def changes(was: Any, now: Any) -> list[tuple[str, str | None, str | None]]:
    return [tuple(change) for change in Difference.of(was, now).changes]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("was", "now", "found"),
    [
        ({"a": 1}, {"a": 2}, [("/a", "1", "2")]),
        ({"a": 1}, {"b": 1}, [("/a", "1", None), ("/b", None, "1")]),
        ([1, 2], [1, 3, 4], [("/1", "2", "3"), ("/2", None, "4")]),
        ([1, 2], [], [("/0", "1", None), ("/1", "2", None)]),
        (1, "1", [("", "1", '"1"')]),
        (None, {}, [("", "null", "{}")]),
        ({"a": {}}, {"a": []}, [("/a", "{}", "[]")]),
        ({"a": None}, {}, [("/a", "null", None)]),
        ({"a/b~c": {"": 1}}, {"a/b~c": {"": 2}}, [("/a~1b~0c/", "1", "2")]),
        ({"z": 1, "a": [{"x": True}]}, {"z": 2, "a": [{"x": 1}]}, [("/z", "1", "2"), ("/a/0/x", "true", "1")]),
        (False, 0, [("", "false", "0")]),
    ],
)
def test_each_place_that_differs_is_named_by_its_pointer(was: Any, now: Any, found: list[Any]) -> None:
    assert changes(was, now) == found


@pytest.mark.parametrize(("was", "now"), [(1, 1.0), (0, -0.0), ({"a": [1, {}]}, {"a": [1.0, {}]}), ("ü", "ü")])
def test_what_has_the_same_canonical_form_does_not_differ(was: Any, now: Any) -> None:
    assert Difference.of(was, now) == Difference()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=9))
def test_nothing_differs_from_itself(value: Any) -> None:
    assert Difference.of(value, json.loads(json.dumps(value))) == Difference()


def test_a_long_difference_is_cut_and_says_so_and_so_is_a_long_value() -> None:
    exactly = Difference.of([0] * CHANGES_MOST, [1] * CHANGES_MOST)
    assert (len(exactly.changes), exactly.is_cut) == (CHANGES_MOST, False)
    longer = Difference.of([0] * 1000, [1] * 1000)
    assert (len(longer.changes), longer.is_cut) == (CHANGES_MOST, True)
    (change,) = Difference.of("a" * 10_000, list(range(10_000))).changes
    assert all(text is not None and len(text) < 200 for text in (change.was, change.now))


def test_documents_may_be_nested_deeper_than_python_calls() -> None:
    was: Any = 1
    now: Any = 2
    for _ in range(5000):
        was, now = [was], [now]
    assert Difference.of(was, now).changes == (Change("/0" * 5000, "1", "2"),)


def test_a_change_is_told_in_words() -> None:
    assert str(Change("/a", "1", None)) == "/a: 1 -> nothing"
    assert str(Change("", None, "{}")) == "all of it: nothing -> {}"


@pytest.mark.parametrize(
    ("differs", "repeats", "control", "names", "why"),
    [
        # What differs is all that is known.
        (["result", "code"], None, None, ["code"], "nothing else differs"),
        (["result", "manifest"], None, None, ["manifest"], "nothing else differs"),
        (["result", "environment"], True, None, ["environment"], "nothing else differs"),
        (["result", "degradation"], None, None, ["degradation"], "nothing else differs"),
        (["result", "environment", "manifest", "code"], None, None, ["code", "manifest", "environment"], "is open"),
        (["result"], None, None, ["none"], "nothing but the result differs"),
        (["result"], True, None, ["none"], "two runs agree"),
        # Two runs that differ are nobody's change.
        (["result"], False, None, ["none"], "two runs in a row"),
        (["result", "code", "manifest", "environment"], False, None, ["none"], "two runs in a row"),
        (["result", "code"], False, "recorded", ["none"], "two runs in a row"),
        # The recorded version was run, too.
        (["result", "code"], True, "recorded", ["code"], "the recorded result"),
        (["result", "code", "manifest", "environment"], True, "recorded", ["code", "manifest"], "the recorded result"),
        (["result", "environment"], True, "recorded", ["none"], "the recorded result"),
        (["result", "code", "environment"], True, "new", ["environment"], "the new result, too"),
        (["result", "code"], True, "new", ["none"], "the new result, too"),
        (["result", "code", "degradation"], True, "new", ["degradation"], "the new result, too"),
        (["result", "code", "environment"], True, "another", ["code", "environment"], "a third result"),
        (["result", "code", "manifest"], True, "another", ["none"], "a third result"),
    ],
)
@pytest.mark.parametrize("is_declared", [True, False])
def test_the_cause_is_what_differs_narrowed_by_what_was_tried(
    *, differs: list[str], repeats: bool | None, control: Control | None, names: list[str], why: str, is_declared: bool
) -> None:
    found = cause(differs, is_declared=is_declared, repeats=repeats, control=control)
    assert (list(found.names), why in found.why) == (names, True)
    assert ("although it says so" in found.why) == (is_declared and names == ["none"])
    assert found.body() == {"names": names, "why": found.why}
