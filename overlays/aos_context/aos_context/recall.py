"""Which memories a brief recalls: those that have to do with what is asked, and not all that share an "in the" with it.

A search finds what has any of the words, and is right to: who searches sees the best first. A brief shows all it gets
to a model, so it asks more of a memory, by two rules.

1. Function words of English (articles, pronouns, prepositions, auxiliaries) are not looked for. Where nothing else was
   asked, nothing is recalled; where nothing at all was asked, the newest are.
2. Where memory has as many matches as were wanted, so that there was a choice to make, those are dropped that score no
   more than words can give that are in half of the memories or more. BM25 gives each such word `IDF_LEAST * (K1 + 1)`
   at most. With fewer matches all are kept: in a memory that is small, or about one thing, the very word that matters
   may be in most of it, and there is room for them all. Of other languages this rule alone keeps function words off.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aos_context.memory_in_memory import IDF_LEAST, K1
from aos_context.memory_words import words

if TYPE_CHECKING:
    from collections.abc import Callable

    from aos_context.memory_store import Hit

_ENGLISH = """
    a about above after again against all am an and any are aren as at be because been before being below between both
    but by can cannot could couldn d did didn do does doesn doing don down during each few for from further had hadn has
    hasn have haven having he her here hers herself him himself his how i if in into is isn it its itself let ll m me
    more most must mustn my myself no nor not of off on once only or other ought our ours ourselves out over own re s
    same shall shan she should shouldn so some such t than that the their theirs them themselves then there these they
    this those through to too under until up upon us ve very was wasn we were weren what when where which while who whom
    why will with won would wouldn you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(_ENGLISH.split())
"""The stop words of Snowball's English stemmer, with the parts of its contractions, and a few more of their kinds."""

_WORD = re.compile(r"[^\W_]+")


def recalled(search: Callable[[str], list[Hit]], text: str, wanted: int) -> list[Hit]:
    """What of memory belongs to a text, the best first. `search` gives the `wanted` best matches of a query."""
    if not text.strip():
        return search("")
    query = _WORD.sub(lambda found: "" if found[0].lower() in FUNCTION_WORDS else found[0], text)
    asked = set(words(query))
    if not asked:
        return []
    hits = search(query)
    if len(hits) < wanted:
        return hits
    least = len(asked) * IDF_LEAST * (K1 + 1)
    return [hit for hit in hits if hit.score > least]
