"""What was promised to users word for word: their commands and Python lines, as they have them, against this overlay.

The commands stand here as users have them: a change of the overlay that needs another wording breaks theirs.
"""

from __future__ import annotations

DEMO = """\
cd aos_context_v2_1
python -m aos_context.cli demo --root ./runs
"""

SERVE = """\
cd aos_context_v2_1
uvicorn aos_context.api.main:app --reload --port 8000
"""

BOOT = r"""curl -sS -X POST http://127.0.0.1:8000/runs/boot \
  -H 'Content-Type: application/json' \
  -d '{
    "objective": "Generate schemas and implement WS/RL/EP for my agent factory.",
    "acceptance_criteria": ["Schemas validate", "WS patch applies", "Ledger appends"],
    "constraints": ["No unknown WS fields", "Commit memory only at milestones"]
  }' | jq
"""

UPDATE = r"""curl -sS http://127.0.0.1:8000/runs/<run_id>/ws | jq

curl -sS -X POST http://127.0.0.1:8000/runs/<run_id>/step/update \
  -H 'Content-Type: application/json' \
  -d '{
    "patch": {
      "_schema_version": "2.1",
      "expected_seq": 0,
      "set": {
        "status": "BUSY",
        "current_stage": "PLAN",
        "next_action": "Write strict schemas for all artifacts.",
        "sliding_context": [
          {"id": "ctx1", "content": "Use pinned+sliding contexts.", "timestamp": "2026-01-18T00:00:00Z", "priority": 2}
        ]
      }
    }
  }' | jq
"""

MILESTONE = r"""curl -sS -X POST http://127.0.0.1:8000/runs/<run_id>/milestone \
  -H 'Content-Type: application/json' \
  -d '{"reason": "checkpoint", "next_entry_point": "Continue from PLAN stage."}' | jq
"""

PROPOSE = r"""curl -sS -X POST http://127.0.0.1:8000/runs/<run_id>/memory/propose \
  -H 'Content-Type: application/json' \
  -d '{
    "mcrs": [
      {
        "_schema_version": "2.1",
        "op": "add",
        "type": "fact",
        "scope": "global",
        "content": "User prefers Python over JavaScript",
        "confidence": 0.9,
        "rationale": "Observed in multiple conversations",
        "source_refs": []
      }
    ],
    "scope_filters": {}
  }' | jq
"""

COMMIT = r"""# Only works during milestone phase (or with allow_outside_milestone=true for tests)
curl -sS -X POST http://127.0.0.1:8000/runs/<run_id>/memory/commit \
  -H 'Content-Type: application/json' \
  -d '{
    "batch_id": "batch_...",
    "allow_outside_milestone": false
  }' | jq
"""

SEARCH = """\
curl -sS "http://127.0.0.1:8000/runs/<run_id>/memory/search?q=python&top_k=10&scope=global&status=active" | jq
"""

SNAPSHOT = r"""curl -sS -X POST http://127.0.0.1:8000/runs/<run_id>/resume/snapshot \
  -H 'Content-Type: application/json' \
  -d '{
    "zip_pack": true,
    "pointers": {"ledger_last_seq": 42}
  }' | jq
"""

LOAD = r"""curl -sS -X POST http://127.0.0.1:8000/runs/resume/load \
  -H 'Content-Type: application/json' \
  -d '{
    "pack_path": "./runs/<run_id>/resume/pack_<id>.zip",
    "new_run_id": null
  }' | jq
"""

WHOLE = r"""# 1. Boot a run
RUN_ID=$(curl -sS -X POST http://127.0.0.1:8000/runs/boot \
  -H 'Content-Type: application/json' \
  -d '{"objective": "Test end-to-end flow"}' | jq -r '.run_id')

# 2. Patch WS
curl -sS -X POST http://127.0.0.1:8000/runs/$RUN_ID/step/update \
  -H 'Content-Type: application/json' \
  -d '{
    "patch": {
      "_schema_version": "2.1",
      "expected_seq": 0,
      "set": {"status": "BUSY", "next_action": "Test memory"}
    }
  }' | jq

# 3. Propose memory
BATCH_ID=$(curl -sS -X POST http://127.0.0.1:8000/runs/$RUN_ID/memory/propose \
  -H 'Content-Type: application/json' \
  -d '{
    "mcrs": [{
      "_schema_version": "2.1",
      "op": "add",
      "type": "fact",
      "scope": "global",
      "content": "Test memory item",
      "confidence": 0.8,
      "rationale": "Testing",
      "source_refs": []
    }]
  }' | jq -r '.batch_id')

# 4. Create milestone (commits memory)
curl -sS -X POST http://127.0.0.1:8000/runs/$RUN_ID/milestone \
  -H 'Content-Type: application/json' \
  -d "{\"reason\": \"checkpoint\", \"memory_batch_id\": \"$BATCH_ID\"}" | jq

# 5. Snapshot resume pack
curl -sS -X POST http://127.0.0.1:8000/runs/$RUN_ID/resume/snapshot \
  -H 'Content-Type: application/json' \
  -d '{"zip_pack": true}' | jq
"""

PYTHON = """\
from aos_context.ws_manager import WorkingSetManager
from aos_context.ledger import FileLedger
from aos_context.memory import InMemoryMemoryStore
from aos_context.config import DEFAULT_CONFIG
from pathlib import Path

# Initialize components
ws_path = Path("./runs/my_run/state/working_set.v2.1.json")
wsm = WorkingSetManager(ws_path, config=DEFAULT_CONFIG)

# Create initial WS
ws = wsm.create_initial(
    task_id="task_123",
    thread_id="thread_456",
    run_id="run_789",
    objective="My objective",
    acceptance_criteria=["Criterion 1"],
    constraints=["Constraint 1"],
)

# Apply patch with optimistic locking
result = wsm.apply_patch({
    "_schema_version": "2.1",
    "expected_seq": 0,
    "set": {"status": "BUSY", "next_action": "Do something"}
})

# Use ledger
ledger = FileLedger(Path("./runs/my_run/ledger/run.v2.1.jsonl"))
ledger.append({
    "_schema_version": "2.1",
    "event_id": "...",
    "event_type": "WS_UPDATE_APPLIED",
    # ... other fields
})

# Use memory store
memory = InMemoryMemoryStore()
propose_result = memory.propose([{...}], scope_filters={})
commit_result = memory.commit(propose_result.batch_id)
"""
