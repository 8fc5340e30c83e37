"""A process that commits to a memory until it is killed: `python -m tests.context.memory_writer FILE BATCHES`.

It writes `begin ID` before each commit and `done ID` once it is acknowledged.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.context.conftest import OVERLAY

sys.path.insert(0, str(OVERLAY))

from aos_context.memory_sqlite import SQLiteMemoryStore

from tests.context.memories import add

CHANGES = 5


def main(path: str, batches: str) -> None:
    store = SQLiteMemoryStore(Path(path))
    for number in range(int(batches)):
        mcrs = [add(f"process{os.getpid()} batch{number} change{change}") for change in range(CHANGES)]
        batch_id = store.propose(mcrs, {"run_id": f"run{os.getpid()}"}).batch_id
        print("begin", batch_id, flush=True)
        store.commit(batch_id)
        print("done", batch_id, flush=True)
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
