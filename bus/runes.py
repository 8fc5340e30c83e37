"""The rune language: text that declares an overlay's memory, read into a `MemoryProfile`.

    MEM[SOFT=2048,HARD=4096,VOL=MED]; KV[CAP=0.2,POLICY=WINDOW,PURGE=ON_STRESS]; TIER=EXTENDED; PRIORITY=7;
    DEGRADE{STEP1:SHRINK_KV(0.75),STEP2:CONTEXT(4096)}

Clauses stand in any order, each at most once; only MEM is required. The grammar is `schemas/runes.lark`; what a grammar
cannot say (once only, every key, ranges) is checked here, and both kinds of error look the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Self, TypeVar, cast

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedInput, UnexpectedToken
from lark.lexer import PatternStr

from bus import resources
from bus.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_CHARS = 4096
"""Longest rune text. A caller may send one with a call, so reading it must stay cheap."""

MAX_MB = 10**9
MAX_TOKENS = 10**12

Tier = Literal["LOCAL", "EXTENDED", "COLD"]
Volatility = Literal["LOW", "MED", "HIGH"]
Policy = Literal["LRU", "WINDOW", "TASK_BOUND"]
Purge = Literal["ON_STRESS", "ON_EVENT", "ON_STRESS_OR_EVENT"]
Action = Literal["SHRINK_KV", "CONTEXT", "DISABLE", "BATCH", "OFFLOAD"]


@dataclass(frozen=True, slots=True)
class KvRule:
    """What an overlay's KV cache may hold: `cap` is a share of total memory, 0 to 1."""

    cap: float
    policy: Policy
    purge: Purge


@dataclass(frozen=True, slots=True)
class Step:
    """One step of degradation. `value` is a fraction, a number of tokens, a name or a tier, as `action` has it."""

    action: Action
    value: float | int | str

    def __str__(self) -> str:
        return f"{self.action}({self.value if isinstance(self.value, str) else _plain(self.value)})"


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What an overlay declares about its memory. `name` is set for the profiles that ship with the bus."""

    soft_mb: int
    hard_mb: int
    volatility: Volatility
    kv: KvRule | None = None
    tier: Tier = "LOCAL"
    priority: int = 5
    steps: tuple[Step, ...] = ()
    name: str | None = None


class RuneError(InputError):
    """Text that is no rune: where (line and column count from 1), what stands there, and what may stand there."""

    def __init__(self, line: int, column: int, found: str, expected: Iterable[str]) -> None:
        self.line = line
        self.column = column
        self.found = found
        self.expected = tuple(expected)
        allowed = " or ".join(self.expected)
        super().__init__("ERR_BAD_RUNE", f"rune, line {line}, column {column}: found {found}, expected {allowed}")

    @classmethod
    def at(cls, text: str, position: int, *expected: str) -> Self:
        """The error for what stands at `position` of `text`, its end included."""
        word = _WORD.match(text, position) if text[position:].strip() else None
        return cls(*_place(text, position), repr(word.group()) if word else "the end of the text", expected)


def _place(text: str, position: int) -> tuple[int, int]:
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


_T = TypeVar("_T")
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,32}|.", re.DOTALL)
_PROFILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def resolve(text: str) -> MemoryProfile:
    """The profile of this name, or the one that this rune text declares. Raises `RuneError`."""
    name = text.strip()
    if name in profiles():
        return profiles()[name]
    if _PROFILE_NAME.fullmatch(name):
        raise RuneError.at(text, text.index(name), *profiles(), "a rune that has MEM[SOFT=..,HARD=..,VOL=..]")
    return parse(text)


@cache
def profiles() -> Mapping[str, MemoryProfile]:
    """The profiles that ship with the bus, by name: `schemas/profiles/NAME.rune`, read once."""
    files = sorted(resources.path("schemas/profiles").glob("*.rune"))
    return MappingProxyType({file.stem: replace(parse(file.read_text("utf-8")), name=file.stem) for file in files})


@lru_cache(maxsize=256)
def parse(text: str) -> MemoryProfile:
    """The profile that a rune text declares. Raises `RuneError`, and nothing else, for any other text."""
    if len(text) > MAX_CHARS:
        raise RuneError(*_place(text, MAX_CHARS), f"{len(text)} characters", [f"at most {MAX_CHARS}"])
    try:
        tree = _parser().parse(text)
    except UnexpectedInput as error:
        raise _syntax_error(text, error) from None
    return _profile(text, cast("list[Tree[Token]]", tree.children))


def format(profile: MemoryProfile) -> str:  # noqa: A001
    """The rune text of a profile; `parse` gives the same profile back, but for its name."""
    clauses = [f"MEM[SOFT={profile.soft_mb},HARD={profile.hard_mb},VOL={profile.volatility}]"]
    if profile.kv:
        clauses.append(f"KV[CAP={_plain(profile.kv.cap)},POLICY={profile.kv.policy},PURGE={profile.kv.purge}]")
    clauses += [f"TIER={profile.tier}", f"PRIORITY={profile.priority}"]
    if profile.steps:
        clauses.append("DEGRADE{" + ",".join(f"STEP{n}:{step}" for n, step in enumerate(profile.steps, 1)) + "}")
    return ";".join(clauses)


def _plain(number: float) -> str:
    """A number as the language writes it: no exponent, no needless zeros."""
    text = f"{Decimal(repr(number)):f}"
    return text.removesuffix(".0")


@cache
def _parser() -> Lark:
    return Lark(resources.path("schemas/runes.lark").read_text("utf-8"), parser="lalr")


_SPELLED = {
    "NUMBER": "a number",
    "NAME": "a name",
    "STEP": "STEP1, STEP2 ...",
    "$END": "the end of the text",
}


@cache
def _spelling(terminal: str) -> str:
    """How an error calls a terminal of the grammar."""
    if terminal in _SPELLED:
        return _SPELLED[terminal]
    pattern = _parser().get_terminal(terminal).pattern
    return f"'{pattern.value}'" if isinstance(pattern, PatternStr) else terminal


def _syntax_error(text: str, error: UnexpectedInput) -> RuneError:
    terminals: set[str] = set()
    position = error.pos_in_stream
    if isinstance(error, UnexpectedToken):
        terminals = set(error.accepts or error.expected)
        if error.token.type == "$END":
            position = None
    elif isinstance(error, UnexpectedCharacters):
        terminals = set(error.allowed or ())
    expected = sorted(_spelling(terminal) for terminal in terminals - {"SPACE"})
    return RuneError.at(text, _end(text) if position is None else position, *expected)


def _end(text: str) -> int:
    return len(text.rstrip())


def _profile(text: str, clauses: list[Tree[Token]]) -> MemoryProfile:
    by_keyword = _once(text, ((_tokens(clause)[0], _tokens(clause)) for clause in clauses))
    memory = by_keyword.get("MEM")
    if memory is None:
        raise RuneError.at(text, _end(text), "a clause MEM[SOFT=..,HARD=..,VOL=..]")
    pairs = _pairs(text, memory, "SOFT", "HARD", "VOL")
    soft_mb = _whole(text, pairs["SOFT"], 1, MAX_MB)
    kv, tier, priority = by_keyword.get("KV"), by_keyword.get("TIER"), by_keyword.get("PRIORITY")
    return MemoryProfile(
        soft_mb,
        _whole(text, pairs["HARD"], soft_mb, MAX_MB),
        cast("Volatility", str(pairs["VOL"])),
        _kv_rule(text, kv) if kv else None,
        cast("Tier", str(tier[1])) if tier else "LOCAL",
        _whole(text, priority[1], 0, 9) if priority else 5,
        _steps(text, by_keyword.get("DEGRADE", [])),
    )


def _tokens(clause: Tree[Token]) -> list[Token]:
    """The keyword of a clause and what follows it, flat."""
    return cast("list[Token]", clause.children)


def _once(text: str, entries: Iterable[tuple[Token, _T]]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for keyword, value in entries:
        if keyword in found:
            raise RuneError.at(text, _start(keyword), f"{keyword} only once")
        found[str(keyword)] = value
    return found


def _start(token: Token) -> int:
    return token.start_pos or 0


def _pairs(text: str, clause: list[Token], *keys: str) -> dict[str, Token]:
    """The `KEY=value` pairs of `[keyword, key, value, ..., closing bracket]`, all of `keys` among them."""
    *inner, close = clause[1:]
    found = _once(text, zip(inner[::2], inner[1::2], strict=True))
    missing = [f"{key}=" for key in keys if key not in found]
    if missing:
        raise RuneError.at(text, _start(close), *missing)
    return found


def _kv_rule(text: str, clause: list[Token]) -> KvRule:
    pairs = _pairs(text, clause, "CAP", "POLICY", "PURGE")
    cap = float(pairs["CAP"])
    if cap > 1:
        raise RuneError.at(text, _start(pairs["CAP"]), "a number from 0 to 1")
    return KvRule(cap, cast("Policy", str(pairs["POLICY"])), cast("Purge", str(pairs["PURGE"])))


def _steps(text: str, clause: list[Token]) -> tuple[Step, ...]:
    """The steps of `[keyword, STEPn, action, value, ...]`."""
    steps: list[Step] = []
    last = 0
    for label, action, value in zip(clause[1::3], clause[2::3], clause[3::3], strict=True):
        number = int(label.removeprefix("STEP"))
        if number <= last:
            raise RuneError.at(text, _start(label), f"STEP{last + 1} or a later one")
        steps.append(Step(cast("Action", str(action)), _value(text, action, value)))
        last = number
    return tuple(steps)


def _value(text: str, action: Token, value: Token) -> float | int | str:
    if action == "CONTEXT":
        return _whole(text, value, 1, MAX_TOKENS)
    if action == "SHRINK_KV":
        return _fraction(text, value)
    return str(value)


def _fraction(text: str, token: Token) -> float:
    value = float(token)
    if not 0 < value <= 1:
        raise RuneError.at(text, _start(token), "a fraction above 0, up to 1")
    return value


def _whole(text: str, token: Token, low: int, high: int) -> int:
    value = int(token) if token.isdigit() else -1
    if not low <= value <= high:
        raise RuneError.at(text, _start(token), f"a whole number from {low} to {high}")
    return value
