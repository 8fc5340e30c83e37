"""Classic BPF over `struct seccomp_data`, run step by step, to see what a filter decides without a kernel."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, NamedTuple

from runners.syscalls import MACHINES

if TYPE_CHECKING:
    from collections.abc import Iterable

HIGHEST = 2**64 - 1
RETURN, LOAD, AND, GO = 0x06, 0x20, 0x54, 0x05
EQUAL, AT_LEAST, ANY_BIT = 0x15, 0x35, 0x45
"""Codes of <linux/bpf_common.h>."""


class Instruction(NamedTuple):
    code: int
    yes: int
    no: int
    value: int


class Run(NamedTuple):
    verdict: int
    steps: int
    loaded: frozenset[int]


def checked(program: bytes) -> list[Instruction]:
    """Its instructions, if the kernel would take it (seccomp_check_filter, bpf_check_classic).

    Jumps lead forwards to an instruction, the last one returns, loads are of whole words of the structure.
    """
    found = [Instruction(*fields) for fields in struct.iter_unpack("<HBBI", program)]
    assert found[-1].code == RETURN
    assert len(found) <= 4096
    for at, (code, yes, no, value) in enumerate(found):
        assert at + 1 + max(yes, no, value if code == GO else 0) <= len(found) - (code != RETURN)
        assert code != LOAD or (value % 4 == 0 and value < 64)
    return found


def run(program: list[Instruction], data: bytes) -> Run:
    """Classic BPF as the kernel runs it (net/core/filter.c), of the instructions that occur; KeyError for others."""
    at, word = 0, 0
    loaded: set[int] = set()
    for step in itertools.count(1):
        code, yes, no, value = program[at]
        at += 1
        if code == RETURN:
            return Run(value, step, frozenset(loaded))
        if code == LOAD:
            loaded.add(value)
            word = int.from_bytes(data[value : value + 4], "little")
        elif code == AND:
            word &= value
        elif code == GO:
            at += value
        else:
            at += yes if {EQUAL: word == value, AT_LEAST: word >= value, ANY_BIT: bool(word & value)}[code] else no
    raise AssertionError("endless")


def call_data(machine: str, number: int, arguments: Iterable[int] = (), *, audit: int | None = None) -> bytes:
    """A `struct seccomp_data`."""
    six = [argument & HIGHEST for argument in arguments]
    six += [0] * (6 - len(six))
    return struct.pack("<IIQ6Q", number, MACHINES[machine].audit if audit is None else audit, 0xFFFF_FFFF_FFFF, *six)
