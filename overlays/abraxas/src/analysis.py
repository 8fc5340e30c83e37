"""The analysis of a text: counts, words, sentences, readability, key terms, scripts.

No figure has more than 4 decimals, and nothing depends on time, chance or the order of a set.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import chain, groupby

from key_terms import key_terms
from segments import is_unspaced, script_of, segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from segments import Segments

LONG_WORD_LETTERS = 6
"""A word of more letters is long, in LIX and RIX."""

SHOWN_LETTERS = 64
"""The longest word is shown up to here; a text without spaces could else come back whole."""

SECTIONS = {
    "READABILITY": "readability",
    "KEY_TERMS": "key_terms",
    "SCRIPTS": "scripts",
    "HIGH_COST_METRICS": "key_terms",
}
"""Names of `disabled_features` and the section of the result that each leaves out."""


class Limits:
    """What to save: analyse at most `max_words` words (None: all), leave out the sections of `disabled_features`."""

    def __init__(self, max_words: int | None, disabled_features: list[str]) -> None:
        self.max_words = max_words
        self.left_out = sorted({SECTIONS[name] for name in disabled_features if name in SECTIONS})


def analyse(text: str, limits: Limits) -> dict[str, Any]:
    """The result object. With a limit of words, everything in it is about the text before the first word beyond it."""
    flat = text.replace("\r\n", "\n")
    segments = segment(flat, set(flat), limits.max_words)
    cut = len(flat) - segments.end
    body = flat[: segments.end] if cut else text
    characters = Counter(body)
    words = list(chain.from_iterable(chain.from_iterable(segments.sentences)))
    result: dict[str, Any] = {
        "counts": _counts(body, segments, len(words)),
        "words": _words(words),
        "sentences": _sentences(segments),
        "readability": _readability(words, len(segments.sentences)),
        "key_terms": [] if "key_terms" in limits.left_out else key_terms(segments.sentences),
        "scripts": _scripts(characters),
        "unicode": _unicode(body, characters, segments.emoji),
        "truncated": cut > 0,
        "left_out": limits.left_out,
    }
    if cut:
        result["limit"] = {"max_context_tokens": limits.max_words, "characters_left_out": cut}
    return {name: value for name, value in result.items() if name not in limits.left_out}


def _counts(text: str, segments: Segments, words: int) -> dict[str, int]:
    lines = text.splitlines()
    return {
        "characters": len(text),
        "bytes": len(text.encode()),
        "lines": len(lines),
        "paragraphs": sum(filled for filled, _ in groupby(lines, key=lambda line: bool(line.strip()))),
        "sentences": len(segments.sentences),
        "words": words,
    }


def _words(words: list[str]) -> dict[str, Any]:
    """Words are compared without case, composed and decomposed letters alike; lengths are in letters and digits."""
    forms = Counter(words)
    types: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for form, count in forms.items():
        types[unicodedata.normalize("NFC", form).casefold()] += count
        lengths[_letters(form)] += count
    longest = max(forms, key=_letters, default="")
    return {
        "distinct": len(types),
        "once": sum(count == 1 for count in types.values()),
        "type_token_ratio": _ratio(len(types), len(words)),
        "mean_letters": _ratio(sum(n * count for n, count in lengths.items()), len(words)),
        "median_letters": _median(list(lengths.elements())),
        "longest": longest[:SHOWN_LETTERS],
        "longest_letters": _letters(longest),
        "segmentation": _segmentation(forms),
    }


def _segmentation(forms: Mapping[str, int]) -> str:
    """`spaces`, `characters` (every word is one character, for scripts without spaces), `mixed` or `none`."""
    kinds = {"characters" if is_unspaced(form) else "spaces" for form in forms}
    return "mixed" if len(kinds) > 1 else next(iter(kinds), "none")


def _sentences(segments: Segments) -> dict[str, Any]:
    lengths = [sum(map(len, sentence)) for sentence in segments.sentences]
    return {
        "mean_words": _ratio(sum(lengths), len(lengths)),
        "median_words": _median(lengths),
        "longest_words": max(lengths, default=0),
    }


def _readability(words: list[str], sentences: int) -> dict[str, Any] | None:
    """LIX and RIX, which need no syllables and so no language; None without words, or where most are characters.

    LIX = words / sentences + 100 x long words / words (Bjornsson 1968, Lasbarhet): about 20 very easy, 60 very hard.
    RIX = long words / sentences (Anderson 1983, Lix and Rix, Journal of Reading 26(6): 490-496).
    """
    forms = Counter(words)
    if 2 * sum(count for form, count in forms.items() if is_unspaced(form)) >= len(words):
        return None
    long_words = sum(count for form, count in forms.items() if _letters(form) > LONG_WORD_LETTERS)
    return {
        "long_words": long_words,
        "lix": round(len(words) / sentences + 100 * long_words / len(words), 4),
        "rix": _ratio(long_words, sentences),
    }


def _scripts(characters: Mapping[str, int]) -> list[dict[str, Any]]:
    """Letters by script, the most frequent first."""
    letters: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            letters[script_of(character)] += count
    total = letters.total()
    ordered = sorted(letters.items(), key=lambda item: (-item[1], item[0]))
    return [{"script": script, "letters": count, "share": _ratio(count, total)} for script, count in ordered]


def _unicode(text: str, characters: Mapping[str, int], emoji: int) -> dict[str, Any]:
    """Counts of characters by the first letter of their general category, and what surprises programs."""
    categories: Counter[str] = Counter()
    for character, count in characters.items():
        categories[unicodedata.category(character)] += count

    def total(*prefixes: str) -> int:
        return sum(count for category, count in categories.items() if category.startswith(prefixes))

    return {
        "letters": total("L"),
        "marks": total("M"),
        "digits": total("N"),
        "punctuation": total("P"),
        "symbols": total("S"),
        "white_space": sum(count for character, count in characters.items() if character.isspace()),
        "invisible": total("Cf"),
        "unassigned": total("Cn", "Co"),
        "emoji": emoji,
        "ascii": text.isascii(),
        "nfc": unicodedata.is_normalized("NFC", text),
    }


def _letters(word: str) -> int:
    return len(word) if word.isalnum() else sum(map(str.isalnum, word))


def _median(values: list[int]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return (ordered[middle] + ordered[~middle]) / 2 if ordered else 0.0


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
