"""The assembler: what a program decides is what its decision says, however far its parts lie from each other."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis import strategies as st

from runners import bpf
from runners.bpf import Branch, Compare, Load, Return
from tests.bpf_interpreter import call_data, checked, run

if TYPE_CHECKING:
    from runners.bpf import Node

WORDS = st.sampled_from([0, 1, 2, 7, 8, 0x80000000, 0xFFFFFFFF]) | st.integers(0, 0xFFFFFFFF)
LEAVES = st.builds(Return, st.integers(0, 7))
OFFSETS = st.sampled_from([*range(0, 64, 4)])


def inner(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    branches = st.builds(Branch, st.sampled_from(Compare), WORDS, nodes, nodes)
    return branches | st.builds(Load, OFFSETS, branches, st.just(bpf.ALL) | WORDS)


def decide(node: Node, data: bytes, word: int = 0) -> int:
    """What a decision says, without a program."""
    while not isinstance(node, Return):
        if isinstance(node, Load):
            word = int.from_bytes(data[node.offset : node.offset + 4], "little") & node.mask
            node = node.then
        else:
            equal, at_least, bits = word == node.value, word >= node.value, bool(word & node.value)
            holds = {Compare.EQUAL: equal, Compare.AT_LEAST: at_least, Compare.ANY_BIT: bits}[node.compare]
            node = node.yes if holds else node.no
    return node.value


@hypothesis.given(
    st.recursive(LEAVES, inner, max_leaves=60), st.lists(st.lists(WORDS, min_size=16, max_size=16), min_size=1)
)
def test_a_program_decides_as_its_decision_says(node: Node, calls: list[list[int]]) -> None:
    program = checked(bpf.assemble(node))
    for words in calls:
        data = struct.pack("<16I", *words)
        assert run(program, data).verdict == decide(node, data)


def chain(cases: int, step: int = 1) -> Node:
    """Case after case, each with an answer of its own and a way on: the farther, the more lies between."""
    node: Node = Load(bpf.ARCH, Branch(Compare.EQUAL, 9, Return(1), Return(2)))
    shared = node
    for case in range(cases):
        answer: Node = Load(bpf.low(0), Branch(Compare.EQUAL, case, Return(case), shared))
        node = Branch(Compare.EQUAL, case * step, answer, node)
    return Load(bpf.NUMBER, node)


@pytest.mark.parametrize("cases", [60, 85, 86, 127, 128, 300])
def test_ways_farther_than_a_branch_reaches_are_gone_in_steps(cases: int) -> None:
    node = chain(cases)
    program = checked(bpf.assemble(node))
    ends = [(at, run(program, call_data("x86_64", at, [at]))) for at in (0, 1, cases // 2, cases - 1, cases, cases + 9)]
    assert [ended.verdict for _, ended in ends] == [decide(node, call_data("x86_64", at, [at])) for at, _ in ends]
    others = [call_data("x86_64", at, [at + 1], audit=9) for at in range(cases)]
    assert {run(program, data).verdict for data in others} == {1}


def test_a_decision_is_laid_down_once() -> None:
    shared = Load(bpf.low(1), Branch(Compare.EQUAL, 3, Return(1), Return(2)))
    node = Load(bpf.NUMBER, Branch(Compare.EQUAL, 5, shared, Branch(Compare.EQUAL, 6, shared, Return(2))))
    assert len(checked(bpf.assemble(node))) == 7


def test_a_program_that_is_too_long_for_the_kernel_is_refused() -> None:
    assert len(checked(bpf.assemble(tree(9)))) < bpf.MAX_INSTRUCTIONS
    with pytest.raises(ValueError, match="4096"):
        bpf.assemble(tree(11))


def tree(depth: int, first: int = 0) -> Node:
    """A search among as many answers as 2 to the power of `depth`, each with a question of its own."""
    if depth == 0:
        return Load(bpf.low(0), Branch(Compare.EQUAL, first, Return(first), Return(first + 1)))
    half = 1 << (depth - 1)
    return Branch(Compare.AT_LEAST, first + half, tree(depth - 1, first + half), tree(depth - 1, first))
