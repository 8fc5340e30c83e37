"""Which commands run a Python script, and where their options end (`python3 --help`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_INTERPRETER = re.compile(r"python(3(\.\d+)?t?)?")
_FLAGS = frozenset("bBdEIOPqsSu")
"""Options without a value that change nothing of what is run: -c, -i, -v, -x and the like do."""

_WITH_VALUE = frozenset("WX")
_OF_THE_START = frozenset({"importtime", "perf", "perf_jit", "presite", "showrefcount", "tracemalloc"})
"""-X options that tell of the interpreter's start or of its memory: of a fork they would tell something else."""

_LONG_WITH_VALUE = "--check-hash-based-pycs"


@dataclass(frozen=True, slots=True)
class PythonCommand:
    """The interpreter with its options, and what stands after them: `("run.py", ...)` or `("-m", "module", ...)`."""

    interpreter: tuple[str, ...]
    arguments: tuple[str, ...]


def split(argv: Sequence[str]) -> PythonCommand | None:
    """Take a command apart. None where it runs no Python script, or one in a way that only a new interpreter has."""
    if not argv or not _INTERPRETER.fullmatch(PurePosixPath(argv[0]).name):
        return None
    rest = list(argv[1:])
    options = [argv[0]]
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == _LONG_WITH_VALUE:
            if not rest:
                return None
            options += [word, rest.pop(0)]
            continue
        flags, letter, value = _cluster(word)
        if letter == "m":
            return _module(options, flags, value, rest)
        if letter and (letter not in _WITH_VALUE or not (value or rest)):
            return None
        options.append(word)
        if letter and not value:
            value = rest.pop(0)
            options.append(value)
        if letter == "X" and value.partition("=")[0] in _OF_THE_START:
            return None
    return PythonCommand(tuple(options), tuple(rest)) if rest else None


def _module(options: list[str], flags: str, value: str, rest: list[str]) -> PythonCommand | None:
    """`-m` ends the options, with its name in the same word or the next; `-um name` is `-u -m name`."""
    words = [value, *rest] if value else rest
    if not words or not words[0]:
        return None
    return PythonCommand((*options, *([f"-{flags}"] if flags else [])), ("-m", *words))


def _cluster(word: str) -> tuple[str, str, str]:
    """A word of short options: the flags, then the first letter that is none, then what follows in the word.

    A word that is no such thing (`-`, `--help`) has the letter `-`.
    """
    for at, letter in enumerate(word[1:], 1):
        if letter not in _FLAGS:
            return word[1:at], letter, word[at + 1 :]
    return (word[1:], "", "") if len(word) > 1 else ("", "-", "")
