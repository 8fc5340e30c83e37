"""The whole flow on a folder of runs, step by step, with what each step answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aos_context.errors import GateError, StaleError
from aos_context.operations import perform

if TYPE_CHECKING:
    from collections.abc import Callable

    from aos_context.artifacts import Document
    from aos_context.runs import Runs

PATCH: Document = {
    "_schema_version": "2.1",
    "expected_seq": 0,
    "set": {
        "status": "BUSY",
        "current_stage": "PLAN",
        "next_action": "Write down what the parser accepts.",
        "pinned_context": [
            {"id": "rule", "content": "Dates are UTC.", "timestamp": "2026-01-18T00:00:00Z", "priority": 9}
        ],
        "sliding_context": [
            {"id": "note", "content": "The log has 3 formats.", "timestamp": "2026-01-18T00:01:00Z", "priority": 2}
        ],
    },
}
REMEMBERED: Document = {
    "_schema_version": "2.1",
    "op": "add",
    "type": "fact",
    "scope": "global",
    "content": "The logs have 3 formats, and all of them begin with a date in UTC.",
    "confidence": 0.9,
    "rationale": "Seen in every sample.",
    "source_refs": ["note"],
}


def play(runs: Runs, say: Callable[[str], None]) -> None:
    """Raises `ContextError`."""
    booted = perform(runs, "boot", {"objective": "Parse the logs.", "acceptance_criteria": ["Every line is read."]})
    run_id: str = booted["run_id"]
    say(f"boot       run {run_id}, _update_seq {booted['working_set']['_update_seq']}")

    updated = perform(runs, "update", {"run_id": run_id, "patch": PATCH})
    say(f"update     _update_seq {updated['update_seq']}, status {updated['working_set']['status']}")
    try:
        perform(runs, "update", {"run_id": run_id, "patch": PATCH})
    except StaleError as error:
        say(f"stale      refused: {error}")

    batch_id: str = perform(runs, "propose", {"run_id": run_id, "mcrs": [REMEMBERED]})["batch_id"]
    say(f"propose    {batch_id}: nothing is remembered yet")
    try:
        perform(runs, "commit", {"run_id": run_id, "batch_id": batch_id})
    except GateError as error:
        say(f"commit     refused: {error}")

    reached = perform(runs, "milestone", {"run_id": run_id, "reason": "planned", "memory_batch_id": batch_id})
    say(f"milestone  episode {reached['episode']['number']}, {len(reached['memory']['items'])} committed")

    hits = perform(runs, "search", {"run_id": run_id, "q": "log formats"})["hits"]
    say(f"search     {len(hits)} found: {hits[0]['item']['content']}")

    packed = perform(runs, "snapshot", {"run_id": run_id})
    say(f"snapshot   {packed['pack_path']}")
    loaded = perform(runs, "load", {"pack_path": packed["pack_path"]})
    say(f"load       run {loaded['run_id']} goes on from it, _update_seq {loaded['working_set']['_update_seq']}")

    say("brief\n")
    say(perform(runs, "brief", {"run_id": loaded["run_id"], "budget": 500})["brief"])
