"""Text into sentences, phrases and words, for any script, without a dictionary or a word list.

Each character becomes one letter of a small alphabet of classes, so that short regular expressions over the classes say
what a word and a boundary are. The rules follow UAX #29 (Unicode Text Segmentation) where it can be had from character
properties alone, with three decisions of our own: a hyphen between letters joins them, a single line break does not end
a sentence (a blank line does), and scripts written without spaces are taken character by character.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

UNSPACED_SCRIPTS = frozenset(
    ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR")
)

# The classes. l: lower-case letter, L: other letter, C: letter of an unspaced script, D: digit, M: mark, J: format
# character, A: joins letters, ",": joins digits, ".": ends a sentence unless a lower-case letter follows, T: ends one
# before a space, K: ends one anywhere, Q: closes a quotation or bracket, E: emoji, R: half a flag, S: space, N: line
# break, O: any other.
_CLASS_OF_CATEGORY = {
    "Ll": "l", "Lu": "L", "Lt": "L", "Lm": "L", "Lo": "L", "Nd": "D", "Nl": "D", "No": "D", "Mn": "M", "Mc": "M",
    "Me": "M", "Cf": "J", "Pc": "A", "Pe": "Q", "Pf": "Q", "Pi": "Q", "Zs": "S", "Zl": "N", "Zp": "N",
}  # fmt: skip
_CLASS_OF_CHARACTER = {
    **dict.fromkeys("'\u2019\u00b7-\u2010\u2011", "A"),
    **dict.fromkeys(",\u066c", ","),
    **dict.fromkeys(".\u2026\u2024", "."),
    **dict.fromkeys("!?\u203c\u2047\u2048\u2049\u061f\u06d4\u1362\u0589\u055e", "T"),
    **dict.fromkeys("\u3002\uff01\uff1f\uff61\uff0e\u0964\u0965\u17d4\u17d5", "K"),
    **dict.fromkeys('"', "Q"),
    **dict.fromkeys("\t\x1f", "S"),
    **dict.fromkeys("\n\r\x0b\x0c\x1c\x1d\x1e\x85", "N"),
}
_CLASS_OF_RANGE = (
    (0x1F1E6, 0x1F1FF, "R"),  # regional indicators
    (0x1F3FB, 0x1F3FF, "M"),  # skin tones
    (0x1F000, 0x1FAFF, "E"),
    (0x2600, 0x27BF, "E"),
)

_WORD = re.compile(r"[lLD](?:[lLDM]|[AJ.](?=[lLD])|,(?=D))*|CM*")
_EMOJI = re.compile(r"EM*(?:JEM*)*|RR?")
_BLANK_LINE = re.compile(r"NS*N")
_BEFORE_SPACE = re.compile(r"(?<![.TQA])[.TQA]++(?=[SN])")  # possessive: else quadratic in a row of full stops
_SPACE = re.compile(r"[SNJ]*")

ADJACENT, PHRASE, SENTENCE = range(3)
"""What parts two words: at most white space, a punctuation mark, the end of a sentence."""


class Segments:
    """`sentences` hold phrases, phrases hold words, as they stand in the text; none of them is empty.

    A word of an unspaced script is one character with its marks. `end` is the index at which the segmented part of the
    text ends; it is the text's length unless a limit of words cut it.
    """

    def __init__(self, sentences: list[list[list[str]]], emoji: int, end: int) -> None:
        self.sentences, self.emoji, self.end = sentences, emoji, end


def script_of(character: str) -> str:
    """The script, as the first word of the Unicode name of the character's compatibility form (`LATIN`, `CJK`).

    Python knows no Script property (UAX #24); names stand for it well for letters, the only characters to ask for.
    """
    base = unicodedata.normalize("NFKC", character)[0]
    return unicodedata.name(base, "UNKNOWN").replace("-", " ").split(" ", 1)[0]


def class_of(character: str) -> str:
    """The class letter of one character."""
    for first, last, name in _CLASS_OF_RANGE:
        if first <= ord(character) <= last:
            return name
    known = _CLASS_OF_CHARACTER.get(character) or _CLASS_OF_CATEGORY.get(unicodedata.category(character), "O")
    is_letter = known in "LD" and not character.isascii()
    return "C" if is_letter and script_of(character) in UNSPACED_SCRIPTS else known


def is_unspaced(word: str) -> bool:
    """True for a word of a script written without spaces."""
    return class_of(word[0]) == "C"


def segment(text: str, characters: Iterable[str], max_words: int | None = None) -> Segments:
    """Segment `text`, whose line breaks must be single characters; `characters` are those that it is made of.

    Takes time linear in the text. With `max_words`, what stands before the first word beyond it.
    """
    classes = text.translate({ord(character): class_of(character) for character in characters})
    spans = [match.span() for match in islice(_WORD.finditer(classes), None if max_words is None else max_words + 1)]
    end = len(text)
    if max_words is not None and len(spans) > max_words:
        end = spans.pop()[0]
    emoji = sum(1 for _ in _EMOJI.finditer(classes, 0, end))
    return Segments(list(_sentences(text, classes, spans)), emoji, end)


def _sentences(text: str, classes: str, spans: list[tuple[int, int]]) -> Iterator[list[list[str]]]:
    known: dict[str, int] = {}
    sentence: list[list[str]] = []
    last = 0
    for start, end in spans:
        gap = classes[last : start + 1]
        kind = known.get(gap)
        if kind is None:
            kind = known[gap] = _boundary(gap[:-1], gap[-1])
        if kind == SENTENCE and sentence:
            yield sentence
            sentence = []
        if kind == ADJACENT and sentence:
            sentence[-1].append(text[start:end])
        else:
            sentence.append([text[start:end]])
        last = end
    if sentence:
        yield sentence


def _boundary(gap: str, following: str) -> int:
    """What the classes between two words part; `following` is the class that the second word starts with."""
    if "K" in gap or _BLANK_LINE.search(gap):
        return SENTENCE
    if _has_stop(gap) and ("T" in gap or following != "l"):
        return SENTENCE
    return ADJACENT if _SPACE.fullmatch(gap) else PHRASE


def _has_stop(gap: str) -> bool:
    return any("." in run or "T" in run for run in _BEFORE_SPACE.findall(gap))
