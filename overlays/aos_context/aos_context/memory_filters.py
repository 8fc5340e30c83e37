"""Which memories a search sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aos_context.artifacts import described
from aos_context.errors import SchemaError
from aos_context.memory_gate import check_members, holds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aos_context.artifacts import Document
    from aos_context.memory_gate import Draft

SCOPES = ("global", "task", "run")
STATUSES = ("active", "superseded", "deleted")
TYPES = ("fact", "preference", "decision", "constraint", "procedure", "observation")


@dataclass(frozen=True, slots=True)
class Filters:
    """Which memories a search sees: global ones, and those of the task and of the run that are named.

    `scope` narrows that to one scope, `status` "any" widens it to those that no longer hold.
    """

    scope: str | None = None
    status: str = "active"
    type: str | None = None
    task_id: str | None = None
    run_id: str | None = None
    min_confidence: float = 0.0
    writer: str | None = None

    @classmethod
    def parse(cls, filters: Mapping[str, Any] | None) -> Filters:
        """None is as good as left out. Raises `SchemaError`."""
        allowed = tuple(cls.__dataclass_fields__)
        check_members("filters", {} if filters is None else filters, allowed)
        given = {name: value for name, value in (filters or {}).items() if value is not None}
        choices = {"scope": SCOPES, "status": (*STATUSES, "any"), "type": TYPES}
        faults = [
            {"path": f"$.{name}", "message": f"{described(given[name])} is not one of {', '.join(values)}"}
            for name, values in choices.items()
            if name in given and given[name] not in values
        ]
        least = given.get("min_confidence", 0.0)
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
            faults.append({"path": "$.min_confidence", "message": f"{described(least)} is not a number from 0 to 1"})
        if faults:
            raise SchemaError("filters", faults)
        return cls(**given)

    def allow(self, item: Document) -> bool:
        return (
            holds(item, task_id=self.task_id, run_id=self.run_id)
            and self.scope in {None, item["scope"]}
            and self.status in {"any", item["status"]}
            and self.type in {None, item["type"]}
            and self.writer in {None, item["writer"]}
            and item["confidence"] >= self.min_confidence
        )


def beside(draft: Draft) -> Filters:
    """Active memories of the draft's type, scope and place."""
    return Filters(scope=draft.scope, type=draft.type, task_id=draft.task_id, run_id=draft.run_id)
