"""Taking secret values out of what is written down: errors, logs, records.

A value is found as it is and as JSON, Python and addresses spell it, and so is what a cut has left of it: logs and the
output that an error quotes are cut before they come here. What an overlay encodes on purpose is not found:
this keeps a secret from slipping out, and no overlay from giving away what it was given.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, AnyStr, Generic, NamedTuple
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LEAST = 6
"""Characters of the shortest value that is looked for: shorter ones stand in too much that is no secret."""

LEAST_LINE = 32
"""Characters of the shortest line that is looked for by itself in a value of several, as a key in PEM: logs and
tracebacks tear such values apart. A shorter one may be a heading."""

LINES = 128
"""Lines that are looked for by themselves at most, of one value."""

KEPT = 1024
"""Spellings of values that are no longer current which are looked for at most: the oldest are given up first."""

_LEFT_OUT = r"\n\[\.\.\. \d+ bytes left out \.\.\.\]\n"
"""What stands where a log was cut (`runners.output.Log`)."""


class _Form(NamedTuple, Generic[AnyStr]):
    """What differs between text and UTF-8: the mark of a `cut`, what may stand `at_cut` beside what is left of a value
    (quotation marks, a character cut in two), and the `either` of patterns.
    """

    cut: re.Pattern[AnyStr]
    at_cut: AnyStr
    either: AnyStr


_TEXT = _Form(re.compile(_LEFT_OUT + "|\N{HORIZONTAL ELLIPSIS}"), "'\"\N{REPLACEMENT CHARACTER}", "|")
_RAW = _Form(re.compile(_LEFT_OUT.encode()), b"", b"|")


class _Span(NamedTuple, Generic[AnyStr]):
    """Where a value stands in a text, or what a cut has left of it."""

    start: int
    end: int
    mark: AnyStr


class _Marks(Generic[AnyStr]):
    """Spellings and what stands in their place. Made anew for each change, so that it can be used from any thread."""

    def __init__(self, form: _Form[AnyStr], marks: Mapping[AnyStr, AnyStr]) -> None:
        self._form: _Form[AnyStr] = form
        self.marks: Mapping[AnyStr, AnyStr] = marks
        self._by_head: dict[AnyStr, list[AnyStr]] = _grouped((spelling[:LEAST], spelling) for spelling in marks)
        self._by_tail: dict[AnyStr, list[AnyStr]] = _grouped((spelling[-LEAST:], spelling) for spelling in marks)

    def whole(self, text: AnyStr) -> AnyStr:
        """`text`, of which nothing was cut off, with the marks; the same object where there is nothing to replace."""
        begun = _found(text, self._by_head)
        return _with_marks(text, self._values(text, begun)) if begun else text

    def cut(self, text: AnyStr) -> AnyStr:
        """As `whole`, of what may have been cut. Most texts have no secret, and are searched for ends of one only."""
        begun = _found(text, self._by_head)
        ended = _found(text, self._by_tail)
        if not begun and not ended:
            return text
        spans = self._values(text, begun)
        spans.extend(self._remains(text, begun, ended))
        return _with_marks(text, spans)

    def _values(self, text: AnyStr, begun: list[AnyStr]) -> list[_Span[AnyStr]]:
        if not any(spelling in text for spelling in begun):  # many times faster than the pattern
            return []
        return [_Span(*found.span(), self.marks[found[0]]) for found in self._pattern.finditer(text)]

    @cached_property
    def _pattern(self) -> re.Pattern[AnyStr]:
        """The longest first: a value may be the beginning of another."""
        return re.compile(self._form.either.join(map(re.escape, sorted(self.marks, key=len, reverse=True))))

    def _remains(self, text: AnyStr, begun: list[AnyStr], ended: list[AnyStr]) -> Iterator[_Span[AnyStr]]:
        """The end of a value that begins a stretch between two cuts, the beginning of one that ends it."""
        for first, last in self._stretches(text):
            stretch, at_cut = text[first:last], self._form.at_cut
            start, end = last - len(stretch.lstrip(at_cut)), first + len(stretch.rstrip(at_cut))
            ends = [(_after_end(text, start, last, spelling), spelling) for spelling in ended]
            if ends and (longest := max(ends, key=itemgetter(0)))[0] > start:
                yield _Span(start, longest[0], self.marks[longest[1]])
            starts = [(_before_beginning(text, first, end, spelling), spelling) for spelling in begun]
            if starts and (longest := min(starts, key=itemgetter(0)))[0] < end:
                yield _Span(longest[0], end, self.marks[longest[1]])

    def _stretches(self, text: AnyStr) -> Iterator[tuple[int, int]]:
        """What lies between two cuts, and may be more than a scrap."""
        first = 0
        for last, after in [*(found.span() for found in self._form.cut.finditer(text)), (len(text), 0)]:
            if last - first >= LEAST:
                yield first, last
            first = after


class Redactor:
    """Replaces each value that it has learnt by `[secret NAME]`.

    A value that is changed or removed stays known: a process that was given it may still write it.
    """

    def __init__(self) -> None:
        self._look_for({})

    def learn(self, values: Iterable[tuple[str, str]]) -> None:
        """Look for these from now on: pairs of a secret's name and its value, all that are current."""
        fresh = {spelling: f"[secret {name}]" for name, value in values for spelling in _spellings(value)}
        old = [(spelling, mark) for spelling, mark in self._text.marks.items() if spelling not in fresh]
        self._look_for(dict(old[-KEPT:]) | fresh)

    def _look_for(self, marks: dict[str, str]) -> None:
        self._text = _Marks(_TEXT, marks)
        self._raw = _Marks(_RAW, {_raw(spelling): _raw(mark) for spelling, mark in marks.items()})

    def text(self, text: str) -> str:
        """`text`, which may have been cut, without secrets.

        Where it begins, ends or has a mark of what was left out, `LEAST` characters of a value are enough.
        """
        return self._text.cut(text)

    def raw(self, text: bytes) -> bytes:
        """As `text`, for UTF-8."""
        return self._raw.cut(text)

    def occurs_in(self, text: bytes) -> bool:
        """Whether UTF-8 text has a secret in it; of JSON the cheap question before `json`."""
        return any(spelling in text for spelling in self._raw.marks)

    def json(self, value: Any) -> Any:  # noqa: ANN401
        """A JSON value without secrets in its texts and keys, of which none was cut; numbers stay."""
        if isinstance(value, str):
            return self._text.whole(value)
        if isinstance(value, list | tuple):
            return [self.json(member) for member in value]
        if isinstance(value, dict):
            return {self.json(name): self.json(member) for name, member in value.items()}
        return value


def _spellings(value: str) -> Iterator[str]:
    """How a value may stand in a text. It begins and ends where the value does, without quotation marks."""
    if len(value) < LEAST:
        return
    yield value
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(value)[1:-1]
    yield quote(value, safe="", errors="surrogateescape")
    if len(lines := value.splitlines()) > 1:
        yield from islice((line for line in lines if len(line) >= LEAST_LINE), LINES)


def _grouped(pairs: Iterable[tuple[AnyStr, AnyStr]]) -> dict[AnyStr, list[AnyStr]]:
    """Spellings by what they begin or end with: those of one value are often alike."""
    groups: dict[AnyStr, list[AnyStr]] = {}
    for key, spelling in pairs:
        groups.setdefault(key, []).append(spelling)
    return groups


def _found(text: AnyStr, groups: Mapping[AnyStr, list[AnyStr]]) -> list[AnyStr]:
    """The spellings of which the key stands in `text`."""
    return [spelling for key, alike in groups.items() if key in text for spelling in alike]


def _after_end(text: AnyStr, start: int, end: int, spelling: AnyStr) -> int:
    """Where the longest end of `spelling` ends that stands at `start`; `start` where none does."""
    last, end = spelling[-LEAST:], min(end, start + len(spelling))
    while (found := text.rfind(last, start, end)) >= 0:
        end = found + len(last)
        if spelling.endswith(text[start:end]):
            return end
        end -= 1
    return start


def _before_beginning(text: AnyStr, start: int, end: int, spelling: AnyStr) -> int:
    """Where the longest beginning of `spelling` begins that stands before `end`; `end` where none does."""
    first, start = spelling[:LEAST], max(start, end - len(spelling))
    while (found := text.find(first, start, end)) >= 0:
        if spelling.startswith(text[found:end]):
            return found
        start = found + 1
    return end


def _with_marks(text: AnyStr, spans: Iterable[_Span[AnyStr]]) -> AnyStr:
    """One mark for spans that overlap: that of the first, of the longest that begins there."""
    pieces: list[AnyStr] = []
    done = 0
    for start, end, mark in sorted(spans, key=lambda span: (span.start, -span.end)):
        if start >= done:
            pieces.extend((text[done:start], mark))
        done = max(done, end)
    pieces.append(text[done:])
    return text[:0].join(pieces)


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
