"""The rune language: text that declares an overlay's memory, read into a `MemoryProfile`.

    MEM[SOFT=2048,HARD=4096,VOL=MED]; KV[CAP=0.2,POLICY=WINDOW,PURGE=ON_STRESS]; TIER=EXTENDED; PRIORITY=7;
    DEGRADE{STEP1:SHRINK_KV(0.75),STEP2:CONTEXT(4096)}

Clauses stand in any order, each at most once; only MEM is required. The grammar is `schemas/runes.lark`; what a grammar
cannot say (once only, every key, ranges) is checked here, and both kinds of error look the same.

The canonical form, which `format` writes in one line and `layout` in several, has its clauses in the order above, MEM,
TIER and PRIORITY always; steps are numbered from 1, and numbers have no needless zeros.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Self, TypeVar, cast

from lark import Lark, Token, Tree, UnexpectedInput, UnexpectedToken
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
    """Text that is no rune: where (line and column count from 1), what stands there, and what may stand there.

    Lines end with a line feed; a column is one character, a tab or a carriage return too. `near` are names that may
    have been meant, and `source` is what the text is, as people call it. `is_lasting`: the same text gives it again.
    """

    def __init__(
        self,
        line: int,
        column: int,
        found: str,
        expected: Iterable[str],
        *,
        near: Iterable[str] = (),
        source: str = "rune",
        is_lasting: bool = True,
        hint: str | None = None,
    ) -> None:
        self.line = line
        self.column = column
        self.found = found
        self.expected = tuple(expected)
        self.near = tuple(near)
        self.source = source
        self.is_lasting = is_lasting
        allowed = " or ".join(self.expected)
        suggestion = f"; did you mean {' or '.join(self.near)}?" if self.near else ""
        detail = f"{source}, line {line}, column {column}: found {found}, expected {allowed}{suggestion}"
        super().__init__("ERR_BAD_RUNE", detail, hint=hint)

    @classmethod
    def at(cls, text: str, position: int, *expected: str) -> Self:
        """The error for what stands at `position` of `text`, its end included."""
        word = _WORD.match(text, position) if text[position:].strip() else None
        return cls(*place_of(text, position), repr(word.group()) if word else "the end of the text", expected)

    def within(self, source: str, hint: str | None = None) -> RuneError:
        """The same error, of the text that people call `source`."""
        place = (self.line, self.column, self.found, self.expected)
        return RuneError(*place, near=self.near, source=source, is_lasting=self.is_lasting, hint=hint)


def place_of(text: str, position: int) -> tuple[int, int]:
    """Line and column of a position."""
    return text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)


_T = TypeVar("_T")
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,32}|.", re.DOTALL)
_LAST_WORD = re.compile(r"[A-Za-z0-9_.-]+\Z")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What a profile may be called; use it with `fullmatch`."""

_NAMES_SAID = 8


def name_in(text: str) -> str | None:
    """The name of a profile that a text is, white space around it aside; None where it can only be a rune."""
    name = text.strip()
    return name if NAME.fullmatch(name) else None


def resolve(text: str) -> MemoryProfile:
    """The shipped profile of this name, or the one that this rune text declares. Raises `RuneError`."""
    name = name_in(text)
    if name is None:
        return parse(text)
    if name not in profiles():
        raise unknown_name(text, profiles())
    return profiles()[name]


def unknown_name(text: str, known: Iterable[str]) -> RuneError:
    """The error for a text that is a name, but none of those in `known`; of many it says those that come near."""
    name, names = text.strip(), sorted(known)
    close = difflib.get_close_matches(name.upper(), {one.upper() for one in names}, n=3)
    near = [one for capitals in close for one in names if one.upper() == capitals]
    if len(names) > _NAMES_SAID:
        names = list(dict.fromkeys([*near, *names]))[:_NAMES_SAID]
    expected = [*names, "a rune that has MEM[SOFT=..,HARD=..,VOL=..]"]
    return RuneError(*place_of(text, text.index(name)), repr(name), expected, near=near)


@cache
def profiles() -> Mapping[str, MemoryProfile]:
    """The profiles that ship with the bus, by name: `schemas/profiles/NAME.rune`, read once."""
    files = sorted(resources.path("schemas/profiles").glob("*.rune"))
    return MappingProxyType({file.stem: replace(parse(file.read_text("utf-8")), name=file.stem) for file in files})


@lru_cache(maxsize=256)
def parse(text: str) -> MemoryProfile:
    """The profile that a rune text declares. Raises `RuneError`, and nothing else, for any other text."""
    if len(text) > MAX_CHARS:
        raise RuneError(*place_of(text, MAX_CHARS), f"{len(text)} characters", [f"at most {MAX_CHARS}"])
    try:
        tree = _parser().parse(text)
    except UnexpectedInput as error:
        raise _syntax_error(text, error) from None
    return _profile(text, cast("list[Tree[Token]]", tree.children))


def format(profile: MemoryProfile) -> str:  # noqa: A001
    """The canonical rune text of a profile, in one line; `parse` gives the same profile back, but for its name."""
    degrade = ["DEGRADE{" + ",".join(_steps_of(profile)) + "}"] if profile.steps else []
    return ";".join([*_plain_clauses(profile), *degrade])


def layout(profile: MemoryProfile) -> str:
    """As `format`, for a file: one clause a line, one step a line and indented by two spaces."""
    degrade = ["DEGRADE{\n  " + ",\n  ".join(_steps_of(profile)) + "\n}"] if profile.steps else []
    return ";\n".join([*_plain_clauses(profile), *degrade]) + "\n"


def tidy(text: str) -> str:
    """The `layout` of a rune text. Raises `RuneError`, also where that would be too long to be read again."""
    laid_out = layout(parse(text))
    if len(laid_out) > MAX_CHARS:
        raise RuneError(1, 1, f"what is {len(laid_out)} characters once laid out", [f"at most {MAX_CHARS}"])
    return laid_out


def _plain_clauses(profile: MemoryProfile) -> list[str]:
    """All clauses of a profile but DEGRADE."""
    clauses = [f"MEM[SOFT={profile.soft_mb},HARD={profile.hard_mb},VOL={profile.volatility}]"]
    if profile.kv:
        clauses.append(f"KV[CAP={_plain(profile.kv.cap)},POLICY={profile.kv.policy},PURGE={profile.kv.purge}]")
    return [*clauses, f"TIER={profile.tier}", f"PRIORITY={profile.priority}"]


def _steps_of(profile: MemoryProfile) -> list[str]:
    return [f"STEP{number}:{step}" for number, step in enumerate(profile.steps, 1)]


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
    """What stands at the place of `error`, and what the grammar would take there."""
    is_end = isinstance(error, UnexpectedToken) and error.token.type == "$END"
    position = _end(text) if is_end or error.pos_in_stream is None else _word_start(text, error.pos_in_stream)
    return RuneError.at(text, position, *sorted(map(_spelling, _accepted_after(text[:position]))))


def _word_start(text: str, position: int) -> int:
    """Where the word begins that `position` is in: of LOCALLY the lexer takes LOCAL, and stumbles at LY."""
    before = _LAST_WORD.search(text, 0, position)
    return before.start() if before and _LAST_WORD.match(text[position : position + 1]) else position


def _accepted_after(start: str) -> set[str]:
    """The terminals that may follow the start of a rune."""
    parser = _parser().parse_interactive(start)
    parser.exhaust_lexer()
    return cast("set[str]", parser.accepts())  # type: ignore[no-untyped-call]  # lark's own has no annotations


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
    if Decimal(pairs["CAP"]) > 1:  # a float of it may be 1
        raise RuneError.at(text, _start(pairs["CAP"]), "a number from 0 to 1")
    return KvRule(float(pairs["CAP"]), cast("Policy", str(pairs["POLICY"])), cast("Purge", str(pairs["PURGE"])))


def _steps(text: str, clause: list[Token]) -> tuple[Step, ...]:
    """The steps of `[keyword, STEPn, action, value, ...]`."""
    steps: list[Step] = []
    last = 0
    for label, action, value in zip(clause[1::3], clause[2::3], clause[3::3], strict=True):
        number = _read_whole(label.removeprefix("STEP"))
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
    if not (float(token) > 0 and Decimal(token) <= 1):  # a float of what is hardly above either may be 0 or 1
        raise RuneError.at(text, _start(token), "a fraction above 0, up to 1")
    return float(token)


def _whole(text: str, token: Token, low: int, high: int) -> int:
    value = _read_whole(token)
    if not low <= value <= high:
        raise RuneError.at(text, _start(token), f"a whole number from {low} to {high}")
    return value


def _read_whole(digits: str) -> int:
    """The number of some digits; -1, which is allowed nowhere, for another text or one too long to be read."""
    try:
        return int(digits) if digits.isdigit() else -1
    except ValueError:  # Python reads no more digits than sys.get_int_max_str_digits()
        return -1
