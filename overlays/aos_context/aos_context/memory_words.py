"""The words of a text, as search and the gate of memory see them.

Case and diacritics are folded, `user_id` is two words, and text of scripts without spaces (Han, Hiragana, Katakana) is
taken as overlapping pairs of characters, so that a part of a sentence finds it. SQLite is given the words that this
module makes, and makes none of its own: all stores find the same.
"""

from __future__ import annotations

import re
import unicodedata

WORD_MOST = 64
"""Characters of a word that count: what is longer is no word of a language."""

_DIACRITICS = re.compile("[\u0300-\u036f]")
_WORDS = re.compile(r"[^\W_]+")
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+)")


def words(text: str) -> list[str]:
    """In their order, with repetitions. Each is made of letters and digits, lower case, `WORD_MOST` at most."""
    if text.isascii():
        return [word[:WORD_MOST] for word in _WORDS.findall(text.lower())]
    found: list[str] = []
    for word in _WORDS.findall(_folded(text)):
        for part in _UNSPACED.split(word):
            if _UNSPACED.match(part):
                found += [part[at : at + 2] for at in range(max(1, len(part) - 1))]
            elif part:
                found.append(part[:WORD_MOST])
    return found


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard: the share of common words in all words of both, 0 to 1."""
    return len(one & other) / len(one | other) if one or other else 0.0


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return unicodedata.normalize("NFC", _DIACRITICS.sub("", folded))
