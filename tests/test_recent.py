"""The roots of a tree at its latest sizes: those that the definition gives, or none."""

from __future__ import annotations

from hashlib import sha256

from bus import recent
from bus.merkle import Frontier, root_of
from bus.recent import RecentRoots

LEAVES = [sha256(bytes([number])).digest() for number in range(100)]


def grown(sizes: list[int]) -> RecentRoots:
    """Of a tree that grew by so many leaves at a time."""
    roots, tree, start = RecentRoots(), Frontier(), 0
    for size in sizes:
        before, leaves = tree.copy(), LEAVES[start : start + size]
        for leaf in leaves:
            tree.append(leaf)
        roots.add(before, leaves)
        start += size
    return roots


def test_it_gives_the_root_of_each_size_since_it_was_first_told() -> None:
    roots = grown([3, 1, 5, 2])
    assert [roots.at(size) for size in range(12)] == [root_of(LEAVES[:size]) for size in range(12)]
    assert roots.at(12) is None


def test_leaves_behind_the_last_may_be_told_as_well() -> None:
    roots = grown([3, 4])
    assert [roots.at(size, LEAVES[7:10]) for size in range(7, 11)] == [*(root_of(LEAVES[:n]) for n in (7, 8, 9, 10))]
    assert roots.at(11, LEAVES[7:10]) is None
    assert roots.at(5, LEAVES[7:10]) == root_of(LEAVES[:5])


def test_what_is_too_long_ago_or_of_another_tree_is_not_told() -> None:
    roots = grown([2] * (recent.GROUPS + 1))
    assert [roots.at(size) is None for size in (0, 1, 2)] == [True, True, False]
    roots.clear()
    assert roots.at(2) is None
    assert RecentRoots().at(0) is None
