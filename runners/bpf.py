"""An assembler for the programs of seccomp(2): classic BPF over `struct seccomp_data`, made of a decision.

A decision is a tree of three kinds of nodes: load a word, branch by it, return. Nodes are values: who needs the same
decision in two places writes it twice, and it is laid down once. The code is made from its end backwards, as jumps lead
forwards only and a branch reaches no farther than 255 instructions: when a branch is laid down it is known how far its
two ways on are, and where one is too far, a step is laid between.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

NUMBER, ARCH, _ARGUMENTS = 0, 4, 16
"""Where `struct seccomp_data` has the call's number, its AUDIT_ARCH and its six arguments (<linux/seccomp.h>)."""

ALL = 0xFFFFFFFF
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS of <linux/bpf_common.h>."""

_FARTHEST = 255 - 1
"""How far a branch can jump, less the step that may come between for its other way."""

_LOAD, _AND, _GO, _RETURN = 0x20, 0x54, 0x05, 0x06
"""BPF_LD|W|ABS, BPF_ALU|AND|K, BPF_JMP|JA and BPF_RET|K of <linux/bpf_common.h>."""


class Compare(enum.IntEnum):
    """How a word is compared: BPF_JMP|JEQ|K, BPF_JMP|JGE|K and BPF_JMP|JSET|K. All of them without a sign."""

    EQUAL = 0x15
    AT_LEAST = 0x35
    ANY_BIT = 0x45


@dataclass(frozen=True, slots=True)
class Return:
    """The end: what the kernel does with the call, a SECCOMP_RET_* with its data."""

    value: int


@dataclass(frozen=True, slots=True)
class Load:
    """Take the word at `offset`, or the bits of it that `mask` has; `then` looks at it."""

    offset: int
    then: Node
    mask: int = ALL


@dataclass(frozen=True, slots=True)
class Branch:
    """Go on as `yes` or `no` says, by the word that was loaded last."""

    compare: Compare
    value: int
    yes: Node
    no: Node


Node = Return | Load | Branch


def low(argument: int) -> int:
    """The offset of the lower half of argument 0 to 5, on a little-endian machine.

    It is all that the kernel reads of an `int`: a filter that looked at the upper half too could be led astray by it.
    """
    return _ARGUMENTS + 8 * argument


def high(argument: int) -> int:
    """The offset of the upper half, which counts for a pointer."""
    return low(argument) + 4


def assemble(decision: Node) -> bytes:
    """The program as an array of `struct sock_filter` (<linux/filter.h>); raises ValueError where it is too long."""
    code = _Code()
    code.lay_next(decision)
    if len(code) > MAX_INSTRUCTIONS:
        raise ValueError(f"a filter of {len(code)} instructions; the kernel takes {MAX_INSTRUCTIONS}")
    return bytes(code)


class _Code:
    """Instructions from the last to the first. A place is counted from the end, so that it stays what it is."""

    def __init__(self) -> None:
        self._instructions: list[bytes] = []
        self._places: dict[Node, int] = {}

    def __len__(self) -> int:
        return len(self._instructions)

    def __bytes__(self) -> bytes:
        return b"".join(reversed(self._instructions))

    def lay_next(self, node: Node) -> None:
        """Have the code of `node` begin at the first instruction that there is so far."""
        if self._lay(node) != len(self) - 1:
            self._lay_step(node)

    def _lay(self, node: Node) -> int:
        """The place of a node, whose code is laid down unless it is there."""
        if node not in self._places:
            match node:
                case Return(value):
                    self._add(_RETURN, value)
                case Load(offset, then, mask):
                    self.lay_next(then)
                    if mask != ALL:
                        self._add(_AND, mask)
                    self._add(_LOAD, offset)
                case Branch():
                    self._lay_branch(node)
            self._places[node] = len(self) - 1
        return self._places[node]

    def _lay_branch(self, branch: Branch) -> None:
        ways = (branch.yes, branch.no)
        for way in ways:
            self._lay(way)
        for way in ways:
            if self._distance(way) > _FARTHEST:
                self._lay_step(way)
        self._add(branch.compare, branch.value, *map(self._distance, ways))

    def _lay_step(self, node: Node) -> None:
        """Bring a node that has its place within reach: a step to it, and of one that is as short, another."""
        if isinstance(node, Return):
            self._add(_RETURN, node.value)
        else:
            self._add(_GO, self._distance(node))
        self._places[node] = len(self) - 1

    def _distance(self, node: Node) -> int:
        """How many instructions the next one would have to pass over."""
        return len(self) - self._places[node] - 1

    def _add(self, code: int, value: int, yes: int = 0, no: int = 0) -> None:
        self._instructions.append(struct.pack("<HBBI", code, yes, no, value))
