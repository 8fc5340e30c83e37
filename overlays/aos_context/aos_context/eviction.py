"""What of the sliding context stays, where it is more than its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aos_context.instants import instant

if TYPE_CHECKING:
    from aos_context.artifacts import Document
    from aos_context.tokens import Count


def evict(items: list[Document], budget_tokens: int, count: Count) -> tuple[list[Document], list[Document]]:
    """The items that stay, as they stood, and those that go, in the order in which they do.

    The lowest priority goes first, then the oldest, then by id, until what is left is within the budget. So whatever
    stays outranks whatever went, and which these are does not depend on the order of `items`. Their ids are unique.
    """
    tokens = {item["id"]: tokens_of(item, count) for item in items}
    excess = sum(tokens.values()) - budget_tokens
    if excess <= 0:
        return items, []
    gone = []
    for item in sorted(items, key=rank):
        if excess <= 0:
            break
        gone.append(item)
        excess -= tokens[item["id"]]
    ids = {item["id"] for item in gone}
    return [item for item in items if item["id"] not in ids], gone


def tokens_of(item: Document, count: Count) -> int:
    """Of an item of context: what it says, and where it is from."""
    return sum(count(text) for text in texts_of(item))


def texts_of(item: Document) -> list[str]:
    """What is counted of an item of context."""
    return [item["content"], *item.get("source_refs", ())]


def rank(item: Document) -> tuple[int, tuple[int, str], str]:
    """A sort key of items of context: what is worth the least is the first."""
    return item["priority"], instant(item["timestamp"]), item["id"]
