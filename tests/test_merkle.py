"""The tree and its proofs, against the definitions of RFC 9162 as they stand there, its example, and pymerkle."""

from __future__ import annotations

import functools
import itertools
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree  # type: ignore[import-untyped]
from pymerkle.proof import (  # type: ignore[import-untyped]
    ConsistencyProof,
    InclusionProof,
    verify_consistency,
    verify_inclusion,
)

from bus.merkle import (
    EMPTY_ROOT,
    Frontier,
    ProofError,
    Subtree,
    check_consistency,
    check_inclusion,
    consistency_proof,
    hash_over,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_of,
    subtrees,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LARGEST = 70
MOST = 5000
LEAVES = [sha256(b"%d" % number).digest() for number in range(MOST)]

# --- Section 2.1 of RFC 9162, word for word: D[start:end] is given by its bounds ---


@functools.cache
def mth(start: int, end: int) -> bytes:
    if end == start:
        return sha256().digest()
    if end - start == 1:
        return sha256(b"\x00" + LEAVES[start]).digest()
    k = largest_power_of_two_smaller_than(end - start)
    return sha256(b"\x01" + mth(start, start + k) + mth(start + k, end)).digest()


def path(m: int, start: int, end: int) -> list[bytes]:
    n = end - start
    if n == 1:
        return []
    k = largest_power_of_two_smaller_than(n)
    if m < k:
        return [*path(m, start, start + k), mth(start + k, end)]
    return [*path(m - k, start + k, end), mth(start, start + k)]


def proof(m: int, n: int) -> list[bytes]:
    return subproof(m, 0, n, is_known=True)


def subproof(m: int, start: int, end: int, *, is_known: bool) -> list[bytes]:
    n = end - start
    if m == n:
        return [] if is_known else [mth(start, end)]
    k = largest_power_of_two_smaller_than(n)
    if m <= k:
        return [*subproof(m, start, start + k, is_known=is_known), mth(start + k, end)]
    return [*subproof(m - k, start + k, end, is_known=False), mth(start, start + k)]


def largest_power_of_two_smaller_than(n: int) -> int:
    return max(k for k in (1 << exponent for exponent in range(n.bit_length())) if k < n)


def sides(m: int, n: int) -> list[bool]:
    """On which side each hash of PATH(m, D[n]) is put: proofs with the same sides lead to the same root."""
    if n == 1:
        return []
    k = largest_power_of_two_smaller_than(n)
    return [*sides(m, k), False] if m < k else [*sides(m - k, n - k), True]


def hash_of(part: Subtree) -> bytes:
    return mth(part.number << part.level, part.number + 1 << part.level)


def flips(nodes: Sequence[bytes]) -> list[list[bytes]]:
    """The nodes with one bit changed, once for every bit."""
    found = []
    for place, node in enumerate(nodes):
        for bit in range(len(node) * 8):
            changed = (int.from_bytes(node) ^ 1 << bit).to_bytes(len(node))
            found.append([*nodes[:place], changed, *nodes[place + 1 :]])
    return found


def refused(check: Callable[..., None], *arguments: object) -> bool:
    try:
        check(*arguments)
    except ProofError:
        return True
    return False


# --- The tree ---


@pytest.mark.parametrize("size", range(LARGEST + 1))
def test_the_root_is_that_of_the_definition_at_every_size(size: int) -> None:
    assert root_of(LEAVES[:size]) == mth(0, size)
    assert hash_over(range(size), hash_of) == mth(0, size)


def test_a_tree_without_leaves_has_the_hash_of_nothing() -> None:
    assert Frontier().root() == EMPTY_ROOT == sha256(b"").digest()


def test_a_leaf_cannot_be_taken_for_a_node() -> None:
    assert leaf_hash(b"a") == sha256(b"\x00a").digest()
    assert node_hash(b"a", b"b") == sha256(b"\x01ab").digest()


@pytest.mark.parametrize("size", range(LARGEST + 1))
def test_a_frontier_goes_on_from_its_size_and_hashes(size: int) -> None:
    tree = Frontier()
    for leaf in LEAVES[:size]:
        tree.append(leaf)
    resumed = Frontier(tree.size, tree.nodes)
    assert resumed.nodes == [
        mth(part.number << part.level, part.number + 1 << part.level) for part in subtrees(0, size)
    ]
    for leaf in LEAVES[size : size + 9]:
        resumed.append(leaf)
    assert (resumed.size, resumed.root()) == (size + 9, mth(0, size + 9))
    assert (tree.size, tree.root()) == (size, mth(0, size))


def test_a_copy_of_a_frontier_grows_apart() -> None:
    tree = Frontier(3, [mth(0, 2), mth(2, 3)])
    twin = tree.copy()
    twin.append(LEAVES[3])
    assert (tree.size, tree.root()) == (3, mth(0, 3))
    assert (twin.size, twin.root()) == (4, mth(0, 4))


@pytest.mark.parametrize(
    ("size", "nodes"),
    [(-1, []), (0, [EMPTY_ROOT]), (1, []), (3, [EMPTY_ROOT]), (4, [EMPTY_ROOT] * 2), (1, [b"short"]), (1, [b"x" * 33])],
)
def test_a_frontier_of_other_hashes_than_its_size_has_is_refused(size: int, nodes: list[bytes]) -> None:
    with pytest.raises(ValueError, match=f"a tree of {size} leaves"):
        Frontier(size, nodes)


@pytest.mark.parametrize("end", [1, 6, 7, 8, 64, 69])
def test_the_subtrees_of_leaves_are_perfect_and_stand_in_a_row(end: int) -> None:
    row = [range(part.number << part.level, part.number + 1 << part.level) for part in subtrees(0, end)]
    assert list(itertools.chain(*row)) == list(range(end))
    assert [len(leaves) for leaves in row] == sorted({len(leaves) for leaves in row}, reverse=True)


# --- Proofs, as the definitions have them ---


@pytest.mark.parametrize("size", range(1, LARGEST + 1))
def test_every_inclusion_proof_is_that_of_the_definition_and_shows_it(size: int) -> None:
    for index in range(size):
        found = inclusion_proof(index, size, hash_of)
        assert found == path(index, 0, size)
        check_inclusion(index, size, LEAVES[index], found, mth(0, size))


@pytest.mark.parametrize("new", range(LARGEST + 1))
def test_every_consistency_proof_is_that_of_the_definition_and_shows_it(new: int) -> None:
    for old in range(new + 1):
        found = consistency_proof(old, new, hash_of)
        assert found == (proof(old, new) if old else [])
        check_consistency(old, new, mth(0, old), mth(0, new), found)


def test_the_example_of_the_rfc() -> None:
    """Section 2.1.5, with its names of the nodes."""
    a, b, c, d, e, f, j = (leaf_hash(leaf) for leaf in LEAVES[:7])
    g, h, i = node_hash(a, b), node_hash(c, d), node_hash(e, f)
    k, l = node_hash(g, h), node_hash(i, j)  # noqa: E741  # as it is called there
    assert root_of(LEAVES[:7]) == node_hash(k, l)
    assert inclusion_proof(0, 7, hash_of) == [b, h, l]
    assert inclusion_proof(3, 7, hash_of) == [c, g, l]
    assert inclusion_proof(4, 7, hash_of) == [f, j, k]
    assert inclusion_proof(6, 7, hash_of) == [i, k]
    assert root_of(LEAVES[:3]) == node_hash(g, c)
    assert consistency_proof(3, 7, hash_of) == [c, d, g, l]
    assert root_of(LEAVES[:4]) == k
    assert consistency_proof(4, 7, hash_of) == [l]
    assert root_of(LEAVES[:6]) == node_hash(k, i)
    assert consistency_proof(6, 7, hash_of) == [i, j, k]


@settings(deadline=None)
@given(st.data())
def test_proofs_of_large_trees_are_those_of_the_definition(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, MOST))
    index, old = data.draw(st.integers(0, new - 1)), data.draw(st.integers(1, new))
    inclusion, consistency = inclusion_proof(index, new, hash_of), consistency_proof(old, new, hash_of)
    assert inclusion == path(index, 0, new)
    assert consistency == proof(old, new)
    check_inclusion(index, new, LEAVES[index], inclusion, mth(0, new))
    check_consistency(old, new, mth(0, old), mth(0, new), consistency)


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0), (4, 3)])
def test_there_is_no_proof_of_a_leaf_that_is_not_there(index: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"has no leaf {index}"):
        inclusion_proof(index, size, hash_of)
    with pytest.raises(ProofError):
        check_inclusion(index, size, LEAVES[0], [], mth(0, size))


@pytest.mark.parametrize(("old", "new"), [(-1, 3), (4, 3)])
def test_a_tree_does_not_grow_smaller(old: int, new: int) -> None:
    with pytest.raises(ValueError, match=f"does not begin with one of {old}"):
        consistency_proof(old, new, hash_of)
    with pytest.raises(ProofError):
        check_consistency(old, new, EMPTY_ROOT, mth(0, new), [])


# --- What is no proof ---


@pytest.mark.parametrize("size", range(1, 14))
def test_an_inclusion_proof_with_any_bit_changed_is_refused(size: int) -> None:
    root = mth(0, size)
    for index in range(size):
        for changed in flips(path(index, 0, size)):
            assert refused(check_inclusion, index, size, LEAVES[index], changed, root)


@pytest.mark.parametrize("new", range(1, 14))
def test_a_consistency_proof_with_any_bit_changed_is_refused(new: int) -> None:
    for old in range(1, new):
        for changed in flips(proof(old, new)):
            assert refused(check_consistency, old, new, mth(0, old), mth(0, new), changed)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 21])
def test_a_bit_changed_in_leaf_or_root_is_found(size: int) -> None:
    for index in range(size):
        leaf, root, right = LEAVES[index], mth(0, size), path(index, 0, size)
        assert all(refused(check_inclusion, index, size, wrong, right, root) for (wrong,) in flips([leaf]))
        assert all(refused(check_inclusion, index, size, leaf, right, wrong) for (wrong,) in flips([root]))
    for old in range(size + 1):
        before, after, right = mth(0, old), mth(0, size), proof(old, size) if old else []
        assert all(refused(check_consistency, old, size, wrong, after, right) for (wrong,) in flips([before]))
        if old:
            assert all(refused(check_consistency, old, size, before, wrong, right) for (wrong,) in flips([after]))


@pytest.mark.parametrize("size", range(1, 25))
def test_an_inclusion_proof_shows_no_other_place(size: int) -> None:
    """With another size it holds only where every hash stands on the same side: the root is that of one size."""
    for index in range(size):
        right = path(index, 0, size)
        for other, other_size in itertools.product(range(25), range(1, 26)):
            if other < other_size and sides(other, other_size) != sides(index, size):
                assert refused(check_inclusion, other, other_size, LEAVES[index], right, mth(0, size))
            if other_size != size:
                assert refused(check_inclusion, other, other_size, LEAVES[index], right, mth(0, other_size))


@pytest.mark.parametrize("new", range(2, 20))
def test_a_consistency_proof_shows_no_other_growth(new: int) -> None:
    for old in range(1, new):
        right = proof(old, new)
        for other_old, other_new in itertools.combinations(range(1, 21), 2):
            if (other_old, other_new) != (old, new):
                roots = mth(0, other_old), mth(0, other_new)
                assert refused(check_consistency, other_old, other_new, *roots, right)


@pytest.mark.parametrize("size", range(1, 20))
def test_a_proof_that_is_too_long_or_too_short_is_refused(size: int) -> None:
    for index in range(size):
        right = path(index, 0, size)
        wrong = [right[:-1], right[1:]] if right else []
        for nodes in [*wrong, [*right, EMPTY_ROOT], [EMPTY_ROOT, *right], [*right, *right, EMPTY_ROOT]]:
            assert refused(check_inclusion, index, size, LEAVES[index], nodes, mth(0, size))
    for old in range(size + 1):
        right = proof(old, size) if old else []
        wrong = [right[:-1], right[1:]] if right else []
        for nodes in [*wrong, [*right, EMPTY_ROOT], [EMPTY_ROOT, *right]]:
            assert refused(check_consistency, old, size, mth(0, old), mth(0, size), nodes)


def test_another_history_of_the_same_size_is_no_growth() -> None:
    other = root_of([LEAVES[9], *LEAVES[1:5]])
    assert refused(check_consistency, 5, 9, other, mth(0, 9), proof(5, 9))
    assert refused(check_consistency, 5, 5, other, mth(0, 5), [])
    assert refused(check_consistency, 0, 5, other, mth(0, 5), [])


# --- pymerkle, an implementation of others ---


@functools.cache
def their_tree(size: int) -> InmemoryTree:
    tree = InmemoryTree(algorithm="sha256")
    tree.append_entries(LEAVES[:size])
    return tree


def from_theirs(theirs: ConsistencyProof) -> list[bytes]:
    """The RFC's proof, of pymerkle's: that goes on to a single leaf, where the RFC has one hash over those leaves.

    Its hashes up to the first that is of the old tree make the one that the RFC has; and where that first is the
    whole old tree, the RFC leaves it out.
    """
    if theirs.prior_size == theirs.size:
        return []
    first = theirs.subset.index(1)
    right = functools.reduce(node_hash, theirs.path[:first])
    own = [] if sum(theirs.subset) == 1 else [theirs.path[first]]
    return [*own, right, *theirs.path[first + 1 :]]


@pytest.mark.parametrize("size", [*range(1, LARGEST + 1), 1000, MOST])
def test_pymerkle_makes_the_same_roots(size: int) -> None:
    assert their_tree(size).get_root() == root_of(LEAVES[:size])


@pytest.mark.parametrize("size", [*range(1, LARGEST + 1), 1000])
def test_pymerkle_accepts_the_inclusion_proofs_made_here_and_the_other_way_round(size: int) -> None:
    root = root_of(LEAVES[:size])
    for index in range(0, size, 1 + size // 100):
        theirs = their_tree(size).prove_inclusion(index + 1)
        check_inclusion(index, size, LEAVES[index], theirs.path[1:], root)
        made = [leaf_hash(LEAVES[index]), *inclusion_proof(index, size, hash_of)]
        ours = InclusionProof("sha256", security=True, size=size, index=index + 1, rule=theirs.rule, path=made)
        verify_inclusion(leaf_hash(LEAVES[index]), root, ours, index=index + 1, size=size)


@pytest.mark.parametrize("new", [*range(1, LARGEST + 1), 1000])
def test_pymerkles_consistency_proofs_are_those_made_here_and_accepted_here(new: int) -> None:
    for old in range(1, new + 1, 1 + new // 100):
        theirs = their_tree(new).prove_consistency(old)
        before, after = root_of(LEAVES[:old]), root_of(LEAVES[:new])
        verify_consistency(before, after, theirs, prior_size=old, later_size=new)
        check_consistency(old, new, before, after, from_theirs(theirs))
        assert from_theirs(theirs) == consistency_proof(old, new, hash_of)
