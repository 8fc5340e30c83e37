"""Key terms of one text, in any language, from the text alone: no list of stop words, no model.

A word t that occurs TF times in S sentences, SF of which hold it, scores

    score(t) = TF x ln(1 + S / SF) x min(2, letters / mean letters) x casing x closing

- TF and S / SF: frequent, but not everywhere (TF-ISF; Larocca Neto, Santos, Kaestner, Freitas 2000, Document
  clustering and text summarization).
- letters: the words that a language uses everywhere are short (law of abbreviation; Zipf 1935, The psycho-biology of
  language). The mean is over the running text, and fewer than three letters are never a term, as in YAKE!
- casing = 1 + share of its occurrences in capitals or capitalised inside a sentence (after YAKE!; Campos, Mangaravite,
  Pasquali, Jorge, Nunes, Jatowt 2020, Information Sciences 509: 257-289).
- closing = share of its occurrences before a punctuation mark, over that share for all words, at most `MAX_CLOSING`:
  articles, prepositions, conjunctions and auxiliaries lead on to something and so hardly ever stand there. It is
  smoothed by `PRIOR` occurrences of an average word, so that a rare word is not judged by one place. This factor is
  our own.

Neighbours a b that meet c >= 2 times score 2 c min(f(a), f(b)) x c / sqrt(TF(a) TF(b)), with f = score / TF; the last
factor is the cosine association of the two. In scripts without spaces the terms are runs of two and three characters
that occur c >= 2 times, with the score c (n - 1) ln(1 + S / c).
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, groupby, pairwise
from math import log, sqrt
from operator import add
from unicodedata import normalize

from segments import is_unspaced

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    Sentences = list[list[list[str]]]

MAX_TERMS = 10
MIN_LETTERS = 3
MAX_LETTERS = 64
MIN_PAIRS = 2
PRIOR = 5
MAX_CLOSING = 1.5
MAX_LENGTH = 2.0


class Candidate:
    """A term with its score and count; `term` is shown as the text compares it, without case."""

    def __init__(self, term: str, score: float, count: int) -> None:
        self.term, self.score, self.count = term, score, count

    def says_no_more_than(self, other: Candidate) -> bool:
        """True where `other` holds this term and is met as often."""
        return self.term in other.term and self.count <= other.count


def key_terms(sentences: Sentences) -> list[dict[str, Any]]:
    """At most `MAX_TERMS` terms, the best first; `weight` is the score over that of the best."""
    keys = {word: normalize("NFC", word).casefold() for word in _words(sentences)}
    unspaced = {key for word, key in keys.items() if is_unspaced(word)}
    folded = [[[keys[word] for word in phrase] for phrase in sentence] for sentence in sentences]
    candidates = [*_spaced(sentences, folded, unspaced), *_unspaced(folded, unspaced)]
    candidates.sort(key=lambda candidate: (-candidate.score, candidate.term))
    chosen: list[Candidate] = []
    for candidate in candidates:
        if len(chosen) == MAX_TERMS:
            break
        if not any(candidate.says_no_more_than(better) for better in chosen):
            chosen.append(candidate)
    return [{"term": c.term, "count": c.count, "weight": round(c.score / chosen[0].score, 4)} for c in chosen]


def _words(sentences: Sentences) -> Iterator[str]:
    return chain.from_iterable(chain.from_iterable(sentences))


def _spaced(sentences: Sentences, folded: Sentences, unspaced: set[str]) -> Iterator[Candidate]:
    """Words and pairs of neighbours of the scripts with spaces."""
    counts = Counter(key for key in _words(folded) if key not in unspaced)
    if not counts:
        return
    rates = _rates(sentences, folded, {key: n for key, n in counts.items() if _is_term(key)})
    for key, rate in rates.items():
        yield Candidate(key, counts[key] * rate, counts[key])
    pairs = Counter(chain.from_iterable(map(pairwise, chain.from_iterable(folded))))
    for (left, right), count in pairs.items():
        if count >= MIN_PAIRS and left != right and left in rates and right in rates:
            association = count / sqrt(counts[left] * counts[right])
            yield Candidate(f"{left} {right}", 2 * count * min(rates[left], rates[right]) * association, count)


def _is_term(key: str) -> bool:
    return MIN_LETTERS <= len(key) <= MAX_LETTERS and any(map(str.isalpha, key))


def _rates(sentences: Sentences, folded: Sentences, counts: Mapping[str, int]) -> dict[str, float]:
    """The score of each word of `counts` for one occurrence."""
    phrases = list(chain.from_iterable(folded))
    closings = Counter(phrase[-1] for phrase in phrases)
    running = Counter(map(len, _words(folded)))
    closing_share = len(phrases) / running.total()
    mean_letters = sum(length * count for length, count in running.items()) / running.total()
    holding = Counter(chain.from_iterable(map(_distinct, folded)))
    capitals = _capitals(sentences)

    def rate(key: str, count: int) -> float:
        closing = (closings[key] / closing_share + PRIOR) / (count + PRIOR)
        casing = 1 + capitals[key] / count
        return (
            log(1 + len(folded) / holding[key])
            * min(MAX_LENGTH, len(key) / mean_letters)
            * casing
            * min(MAX_CLOSING, closing)
        )

    return {key: rate(key, count) for key, count in counts.items()}


def _distinct(sentence: list[list[str]]) -> set[str]:
    return set(chain.from_iterable(sentence))


def _capitals(sentences: Sentences) -> Counter[str]:
    """How often each word stands in capitals, or capitalised where no sentence begins."""
    forms = Counter(_words(sentences))
    initial = Counter(sentence[0][0] for sentence in sentences)
    capitals: Counter[str] = Counter()
    for form, count in forms.items():
        if form[0].isupper():
            shouted = len(form) > 1 and form.isupper()
            capitals[normalize("NFC", form).casefold()] += count if shouted else count - initial[form]
    return capitals


def _unspaced(folded: Sentences, unspaced: set[str]) -> Iterator[Candidate]:
    """Runs of two and three characters of the scripts without spaces."""
    pairs: Counter[str] = Counter()
    triples: Counter[str] = Counter()
    for run in _unspaced_runs(folded, unspaced):
        twos = list(map(add, run, run[1:]))
        pairs.update(twos)
        triples.update(map(add, twos, run[2:]))
    for gain, runs in enumerate((pairs, triples), start=1):
        for term, count in runs.items():
            if count >= MIN_PAIRS:
                yield Candidate(term, count * gain * log(1 + len(folded) / count), count)


def _unspaced_runs(folded: Sentences, unspaced: set[str]) -> Iterator[list[str]]:
    if unspaced:
        for phrase in chain.from_iterable(folded):
            yield from (list(run) for inside, run in groupby(phrase, unspaced.__contains__) if inside)
