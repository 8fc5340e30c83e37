"""Documents and a run as the programs write them, for the tests of what is made of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aos_context.artifacts import Document, encode, sha256, to_json, validate
from aos_context.episode import EpisodeStore

if TYPE_CHECKING:
    from pathlib import Path

TIME = "2026-01-18T00:00:00Z"


def item(id_: str = "c1", content: str = "x", **members: Any) -> Document:
    return {"id": id_, "content": content, "timestamp": TIME, "priority": 2, **members}


def working_set(seq: int = 0, **members: Any) -> Document:
    return validate(
        "working_set",
        {
            "_schema_version": "2.1",
            "_update_seq": seq,
            "run_id": "run_1",
            "task_id": "task_1",
            "thread_id": "thread_1",
            "status": "IDLE" if seq == 0 else "BUSY",
            "current_stage": "INTAKE",
            "next_action": f"step {seq + 1}",
            "objective": "Reach the end.",
            "acceptance_criteria": ["It is reached."],
            "constraints": [],
            "pinned_context": [],
            "sliding_context": [item(f"c{one}", f"learned {one}") for one in range(seq)],
            "created_at": TIME,
            "updated_at": TIME,
            **members,
        },
    )


def memory_item(id_: str = "mem_1", committed_by: str | None = None, **members: Any) -> Document:
    return validate(
        "memory_item",
        {
            "_schema_version": "2.1",
            "id": id_,
            "type": "fact",
            "scope": "global",
            "task_id": None,
            "run_id": None,
            "content": "Prefers Python.",
            "status": "active",
            "confidence": 0.9,
            "rationale": "Said so.",
            "source_refs": [],
            "writer": "agent_1",
            "batch_id": "batch_1",
            "committed_by": committed_by,
            "created_at": TIME,
            "updated_at": TIME,
            "supersedes": None,
            "superseded_by": None,
            **members,
        },
    )


class MadeRun:
    """A run's folder, written line by line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = folder / "ledger" / "run.v2.1.jsonl"
        self.state = folder / "state" / "working_set.v2.1.json"
        self.episodes = EpisodeStore(folder / "episodes")
        for path in (self.ledger, self.state):
            path.parent.mkdir(parents=True)
        self.events: list[Document] = []
        self.memory: dict[str, Document] = {}
        self.since = 0
        self.working_set = self.before = working_set()
        self.add("RUN_BOOTED", {"working_set": self.working_set})
        self._write_state()

    def add(self, type_: str, data: Document) -> Document:
        event = {
            "_schema_version": "2.1",
            "seq": len(self.events) + 1,
            "event_id": f"evt_{len(self.events) + 1}",
            "event_type": type_,
            "run_id": self.working_set["run_id"],
            "timestamp": TIME,
            "actor": None,
            "data": data,
        }
        with self.ledger.open("ab") as out:
            out.write(encode("ledger_event", event) + b"\n")
        self.events.append(event)
        return event

    def update(self) -> None:
        seq = self.working_set["_update_seq"] + 1
        self.working_set = working_set(seq, run_id=self.working_set["run_id"])
        patch = {"_schema_version": "2.1", "expected_seq": seq - 1, "set": {"next_action": f"step {seq + 1}"}}
        self.add("WS_UPDATE_APPLIED", {
            "update_seq": seq, "patch": patch, "evicted": [], "updated_at": TIME, "sha256": self._write_state(),
        })  # fmt: skip

    def commit(self, *items: Document) -> None:
        """Of their batches, one event each."""
        for item_ in items:
            self.memory[item_["id"]] = item_
            listed = [{"id": item_["id"], "sha256": sha256(to_json(item_))}]
            data = {"batch_id": item_["batch_id"], "items": listed, "committed_by": item_["committed_by"]}
            self.add("MEMORY_COMMITTED", data)

    def milestone(self, items: tuple[Document, ...] = ()) -> Document:
        events = self.events[self.since :]
        lines = [encode("ledger_event", event) + b"\n" for event in events]
        made = self.episodes.create(
            run_id=self.working_set["run_id"],
            task_id="task_1",
            reason="checkpoint",
            next_entry_point=None,
            ws_before=self.before,
            ws_after=self.working_set,
            ledger_lines=lines,
            first_seq=self.since + 1,
            memory_batch_id="batch_1" if items else None,
            memory_items=items,
        )
        self.since, self.before = len(self.events), self.working_set
        hash_ = self.episodes.sha256(made["number"])
        data = {"episode_id": made["episode_id"], "number": made["number"], "sha256": hash_}
        data |= {"last_seq": made["ledger"]["last_seq"], "request_id": made["request_id"]}
        self.add("EPISODE_CREATED", data)
        return made

    def _write_state(self) -> str:
        data = encode("working_set", self.working_set)
        self.state.write_bytes(data)
        return sha256(data)
