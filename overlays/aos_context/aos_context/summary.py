"""What an episode says of itself, made by rule from its parts: no model, no clock, the same parts the same words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from aos_context.artifacts import Document

MOST_NAMED = 20
"""So many of a kind are named, the rest is a number."""

TEXT_CHARS = 240


def summarise(
    *,
    reason: str,
    next_entry_point: str | None,
    ws_before: Document,
    ws_after: Document,
    event_counts: Mapping[str, int],
    memory_items: Sequence[Document],
) -> str:
    """Lines of plain text, 60,000 characters at most: what was aimed at, what changed, what happened, what is kept.

    `event_counts` has how many events of each type there were.
    """
    lines = [f"Reason: {shortened(reason)}", f"Objective: {shortened(ws_after['objective'])}"]
    if ws_before["objective"] != ws_after["objective"]:
        lines.append(f"Objective before: {shortened(ws_before['objective'])}")
    lines.append(
        f"Status: {_step(ws_before, ws_after, 'status')}; stage: {_step(ws_before, ws_after, 'current_stage')}; "
        f"updates: {_step(ws_before, ws_after, '_update_seq')}"
    )
    for label, member in (("Acceptance criteria", "acceptance_criteria"), ("Constraints", "constraints")):
        lines += _text_changes(label, ws_before[member], ws_after[member])
    for label, member in (("Pinned context", "pinned_context"), ("Sliding context", "sliding_context")):
        lines += _context(label, ws_before[member], ws_after[member])
    lines.append(_events(event_counts))
    lines += _memory(memory_items)
    following = next_entry_point or ws_after["next_action"]
    if following:
        lines.append(f"Next: {shortened(following)}")
    return "\n".join(lines)


def shortened(text: str, most: int = TEXT_CHARS) -> str:
    """On one line, and of `most` characters at most; what is cut ends with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _step(before: Document, after: Document, member: str) -> str:
    return f"{after[member]}" if before[member] == after[member] else f"{before[member]} -> {after[member]}"


def _text_changes(label: str, before: list[str], after: list[str]) -> list[str]:
    """Nothing where nothing changed."""
    added, removed = _beyond(after, before), _beyond(before, after)
    if not added and not removed:
        return []
    named = [f"  + {shortened(text)}" for text in added[:MOST_NAMED]]
    named += [f"  - {shortened(text)}" for text in removed[:MOST_NAMED]]
    return [f"{label}: {len(added)} added, {len(removed)} removed, {len(after)} in all", *named]


def _beyond(texts: list[str], others: list[str]) -> list[str]:
    """Those that are in `texts` more often than in `others`, in their order."""
    left = Counter(others)
    found = []
    for text in texts:
        if left[text]:
            left[text] -= 1
        else:
            found.append(text)
    return found


def _context(label: str, before: list[Document], after: list[Document]) -> list[str]:
    """Nothing where nothing changed."""
    old, new = {item["id"]: item for item in before}, {item["id"]: item for item in after}
    changes = {
        "added": [id_ for id_ in new if id_ not in old],
        "changed": [id_ for id_ in new if id_ in old and new[id_] != old[id_]],
        "removed": [id_ for id_ in old if id_ not in new],
    }
    said = "; ".join(f"{len(ids)} {how} ({_named(ids)})" for how, ids in changes.items() if ids)
    return [f"{label}: {said}; {len(after)} in all"] if said else []


def _events(counts: Mapping[str, int]) -> str:
    said = _named(f"{type_} {count}" for type_, count in sorted(counts.items()))
    return f"Events: {sum(counts.values())}" + (f" ({said})" if said else "")


def _memory(items: Sequence[Document]) -> list[str]:
    named = [f"  {one['type']}, {one['scope']}, {one['status']}: {shortened(one['content'])}" for one in items]
    rest = len(items) - MOST_NAMED
    return [
        f"Memory committed: {len(items)}",
        *named[:MOST_NAMED],
        *([f"  and {rest} more"] if rest > 0 else []),
    ]


def _named(names: Iterable[str]) -> str:
    every = sorted(names)
    rest = len(every) - MOST_NAMED
    return ", ".join(every[:MOST_NAMED]) + (f", and {rest} more" if rest > 0 else "")
