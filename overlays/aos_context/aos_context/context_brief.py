"""The context brief: what goes of a run into a model's prompt, as markdown, within a budget of tokens.

The order on the page is fixed. Who gives way to whom is another order: first what the run is for and what it is at,
then pinned context, the last milestone, the best memories in a share of their own, sliding context by what would be
evicted last, and the other memories. While all fits, all is there. When it does not, no one text takes more than half
of what is left: a longer one is cut, so one huge text does not push out all the others.

All text of agents and users stands in block quotes (CommonMark 0.31, section 5.1), each of its lines behind a marker,
so whatever is in it, heading, fence or HTML, ends with its quote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from aos_context.eviction import rank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aos_context.artifacts import Document
    from aos_context.memory_store import Hit

TITLE = "# Context brief"
CUT = "… [cut]"

_WHOLE_TOKENS = 128
"""A text of so many is not cut while there is room for it."""
_LEAST_TOKENS = 32
"""What is cut to less says nothing."""
_MEMORY_SHARE = 4
"""A quarter of the budget is for memories before sliding context takes the rest."""
_NOTE_SHARE = 8
"""The line on what is left out has its room kept where it takes no more than an eighth of the budget."""


class Section(NamedTuple):
    """A heading, and what left-out texts under it are called."""

    heading: str
    noun: str


OBJECTIVE = Section("## Objective", "objective")
CRITERIA = Section("## Acceptance criteria", "criteria")
CONSTRAINTS = Section("## Constraints", "constraints")
STATE = Section("## State", "state")
MILESTONE = Section("## Last milestone", "milestone")
PINNED = Section("## Pinned context", "pinned")
SLIDING = Section("## Sliding context", "sliding")
MEMORY = Section("## Memory", "memories")
SECTIONS = (OBJECTIVE, CRITERIA, CONSTRAINTS, STATE, MILESTONE, PINNED, SLIDING, MEMORY)


@dataclass(slots=True)
class _Text:
    """One text of a section. `label` is ours, `body` is anybody's."""

    section: Section
    label: str
    body: str | None
    shown: str | None = None
    """As it stands on the page; None where it is left out."""
    is_cut: bool = False

    def block(self, body: str | None) -> str:
        if body is None:
            return self.label
        quoted = quote(body)
        if not self.label:
            return quoted
        return f"{self.label}\n{indent(quoted)}" if self.label != "-" else f"- {indent(quoted).lstrip()}"


@dataclass(slots=True)
class _Page:
    """What is on the page so far. Costs are added up, and what the whole costs is counted once more at the end."""

    left: int
    """Tokens."""
    count: Callable[[str], int]
    headed: set[Section] = field(default_factory=set)

    def offer(self, text: _Text, most: int | None = None) -> bool:
        """Put it there, whole or cut, if there is room: `most` tokens of what is left. Says whether."""
        room = self.left if most is None else min(self.left, most)
        heading = 0 if text.section in self.headed else self.count(f"\n\n{text.section.heading}\n\n")
        room -= heading
        if room <= 0:
            return False
        whole = text.block(text.body)
        cost = self.count(f"{whole}\n")
        allowed = max(room // 2, min(room, _WHOLE_TOKENS))
        if cost <= allowed:
            text.shown = whole
        elif text.body is not None and allowed >= _LEAST_TOKENS:
            text.shown, cost = self._cut(text, text.body, cost, allowed)
            text.is_cut = text.shown is not None
        if text.shown is None:
            return False
        self.left -= cost + heading
        self.headed.add(text.section)
        return True

    def _cut(self, text: _Text, body: str, cost: int, allowed: int) -> tuple[str | None, int]:
        """The longest beginning that is found in a few steps, and what it costs."""
        length = len(body) * allowed // cost
        while length > 0:
            shown = text.block(body[:length].rstrip() + CUT)
            cost = self.count(f"{shown}\n")
            if cost <= allowed:
                return shown, cost
            length = min(length * 7 // 8, length - len(CUT))
        return None, 0


def render(
    working_set: Document,
    hits: Sequence[Hit],
    *,
    budget_tokens: int,
    count: Callable[[str], int],
    last_episode: Document | None = None,
) -> str:
    """The brief, of which `count` says that it has `budget_tokens` at most. The same input is always the same text.

    It is empty where not even its title has room. `count` need not be additive: what is counted at the end is the
    text itself. `hits` are the best first.
    """
    texts = _texts(working_set, hits, last_episode)
    for text in texts:
        text.shown = text.block(text.body)
    page = _laid_out(texts)
    if count(page) <= budget_tokens:
        return page
    note_room = _note_room(texts, budget_tokens, count)
    chosen = _choose(working_set, texts, _Page(budget_tokens - note_room, count))
    step = 1
    while count(page := _laid_out(texts)) > budget_tokens:
        if not chosen:
            return ""
        for text in chosen[-step:]:
            text.shown, text.is_cut = None, False
        del chosen[-step:]
        step *= 2  # of a counter that is not additive nothing is known, so few tries must do
    noted = f"{page}\n\n{_note(texts)}"
    return noted if count(noted) <= budget_tokens else page


def quote(text: str) -> str:
    """As a block quote, each line behind `> `, wherever a program may see the end of a line."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""])


def indent(text: str) -> str:
    """Into the list item before it."""
    return "\n".join(f"  {line}" for line in text.split("\n"))


# --- What there is to show ---


def _texts(working_set: Document, hits: Sequence[Hit], episode: Document | None) -> list[_Text]:
    """In the order of the page."""
    state = f"- Status: {working_set['status']}, stage: {working_set['current_stage']}"
    texts = [_Text(OBJECTIVE, "", working_set["objective"])]
    texts += [_Text(CRITERIA, "-", one) for one in working_set["acceptance_criteria"]]
    texts += [_Text(CONSTRAINTS, "-", one) for one in working_set["constraints"]]
    texts.append(_Text(STATE, state, None))
    if working_set["next_action"]:
        texts.append(_Text(STATE, "- Next action:", working_set["next_action"]))
    if episode is not None:
        texts.append(_Text(MILESTONE, f"- Episode {episode['number']}, its reason:", episode["reason"]))
        if episode["next_entry_point"]:
            texts.append(_Text(MILESTONE, "- Go on from:", episode["next_entry_point"]))
    for section, member in ((PINNED, "pinned_context"), (SLIDING, "sliding_context")):
        texts += [_Text(section, f"- {one['id']}:", one["content"]) for one in working_set[member]]
    for hit in hits:
        item = hit.item
        label = f"- {item['id']}, {item['type']}, {item['scope']}, confidence {item['confidence']:.2f}:"
        texts.append(_Text(MEMORY, label, item["content"]))
    return texts


def _by_need(working_set: Document, texts: list[_Text]) -> tuple[list[_Text], list[_Text], list[_Text]]:
    """What is wanted first, memories, and sliding context by what would be evicted last."""
    first = [text for text in texts if text.section in (OBJECTIVE, STATE)]
    for section in (CRITERIA, CONSTRAINTS, PINNED, MILESTONE):
        first += [text for text in texts if text.section is section]
    memories = [text for text in texts if text.section is MEMORY]
    sliding = [text for text in texts if text.section is SLIDING]
    by_worth = sorted(
        zip(working_set["sliding_context"], sliding, strict=True), key=lambda pair: rank(pair[0]), reverse=True
    )
    return first, memories, [text for _, text in by_worth]


# --- What is shown, and how ---


def _choose(working_set: Document, texts: list[_Text], page: _Page) -> list[_Text]:
    """Put on the page what there is room for. Gives what is there, the most wanted first."""
    for text in texts:
        text.shown = None
    first, memories, sliding = _by_need(working_set, texts)
    share = page.left // _MEMORY_SHARE
    page.left -= page.count(TITLE)
    chosen = [text for text in first if page.offer(text)]
    for text in memories:
        before = page.left
        if page.offer(text, share):
            chosen.append(text)
            share -= before - page.left
    rest = sliding + [text for text in memories if text.shown is None]
    return chosen + [text for text in rest if page.offer(text)]


def _laid_out(texts: list[_Text]) -> str:
    shown: dict[Section, list[str]] = {section: [] for section in SECTIONS}
    for text in texts:
        if text.shown is not None:
            shown[text.section].append(text.shown)
    return "\n\n".join(
        [TITLE, *(f"{section.heading}\n\n" + "\n".join(some) for section, some in shown.items() if some)]
    )


def _note(texts: list[_Text]) -> str:
    """What is left out and what is cut, in one line."""
    said = []
    for section in SECTIONS:
        there = [text for text in texts if text.section is section]
        missing = sum(text.shown is None for text in there)
        if missing:
            said.append(f"{missing} of {len(there)} {section.noun}")
    cut = sum(text.is_cut for text in texts)
    parts = [f"Left out: {', '.join(said)}."] if said else []
    return " ".join([*parts, f"Cut: {cut}."] if cut else parts)


def _note_room(texts: list[_Text], budget: int, count: Callable[[str], int]) -> int:
    """What is kept for that line, as long as it could get; nothing of a small budget."""
    nouns = ", ".join(f"{len(texts)} of {len(texts)} {section.noun}" for section in SECTIONS)
    room = count(f"\n\nLeft out: {nouns}. Cut: {len(texts)}.")
    return room if room <= budget // _NOTE_SHARE else 0
