"""What the overlay `aos_context` costs, beside what agents would keep their state with instead.

    python TOOLS/bench/context.py [--patches 300] [--memories 100000] [--searches 200] [--rounds 3] [--json]

The same writes go to a run (its working set of 64 KB and its ledger, both synced) and to LangGraph's SQLite
checkpointer (`pip install langgraph-checkpoint-sqlite`; where it is missing, its rows are): each step changes one
context item of the same state. LangGraph keeps every step whole in a table, in WAL mode; it is measured as it comes,
which syncs each commit, and with nothing else changed. Then memories are searched, a brief is made, and a plain SQLite
FTS5 table of the same contents is asked the same questions. Times are medians over all rounds, in milliseconds;
ours is also given as a multiple of LangGraph's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "overlays" / "aos_context"))

from aos_context.artifacts import Document, now  # noqa: E402
from aos_context.context_brief import render  # noqa: E402
from aos_context.ledger import FileLedger  # noqa: E402
from aos_context.memory_filters import TYPES  # noqa: E402
from aos_context.memory_gate import Proposer, Staged, ordered_id, settle  # noqa: E402
from aos_context.memory_sqlite import SQLiteMemoryStore  # noqa: E402
from aos_context.memory_store import Batch  # noqa: E402
from aos_context.tokens import estimate  # noqa: E402
from aos_context.ws_manager import WorkingSetManager  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from aos_context.memory_shelf import Shelf

STATE_BYTES = 64 << 10
ITEMS = 100
BRIEF_TOKENS = 8_000
BATCH = 1_000
RATIO = "the patch as a multiple of the put"
VOCABULARY = 50_000
LETTERS = "etaoinshrdlu"
"""Words are drawn by Zipf's law, the k-th most frequent in proportion to 1/k: some are in nearly all memories and most
in few, as in text. Six in ten memories are global, the others those of 50 tasks and of 100 runs."""


def spread(times_ms: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times_ms)
    return {"p50_ms": statistics.median(ordered), "p99_ms": ordered[int(0.99 * (len(ordered) - 1))]}


def timed_ms(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1000


def items(prefix: str = "c") -> list[dict[str, Any]]:
    """Context of about `STATE_BYTES`."""
    content = "x" * (STATE_BYTES // ITEMS - 90)
    return [
        {"id": f"{prefix}{number}", "content": content, "timestamp": now(), "priority": number % 10}
        for number in range(ITEMS)
    ]


# The state


def by_run(folder: Path, patches: int) -> list[float]:
    """Milliseconds of each patch, through the same classes as the service."""
    ledger = FileLedger(folder / "ledger" / "run.v2.1.jsonl", run_id="run")
    manager = WorkingSetManager(folder / "state" / "working_set.v2.1.json", ledger=ledger)
    manager.create_initial(task_id="task", thread_id="thread", run_id="run", objective="Measure.")
    context = items()
    manager.apply_patch({"_schema_version": "2.1", "expected_seq": 0, "set": {"sliding_context": context}})
    times = []
    for number in range(patches):
        changed = {**context[number % ITEMS], "timestamp": now()}
        patch = {"_schema_version": "2.1", "expected_seq": number + 1, "add": {"sliding_context": [changed]}}
        times.append(timed_ms(lambda patch=patch: manager.apply_patch(patch)))  # type: ignore[misc]
    return times


def by_langgraph(folder: Path, patches: int) -> list[float] | None:
    """The same steps; None where it is not installed."""
    try:
        from langgraph.checkpoint.base import empty_checkpoint  # type: ignore[import-not-found]  # noqa: PLC0415
        from langgraph.checkpoint.sqlite import SqliteSaver  # type: ignore[import-not-found]  # noqa: PLC0415
    except ModuleNotFoundError:
        return None
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"configurable": {"thread_id": "run", "checkpoint_ns": ""}}
    context = items()
    times = []
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.sqlite")) as saver:
        saver.setup()
        for number in range(patches + 1):
            context[number % ITEMS] = {**context[number % ITEMS], "timestamp": now()}
            checkpoint = {
                **empty_checkpoint(),
                "channel_values": {"objective": "Measure.", "sliding_context": context},
                "channel_versions": {"sliding_context": number},
            }
            metadata = {"source": "loop", "step": number, "parents": {}}

            def put(checkpoint: Any = checkpoint, metadata: Any = metadata, number: int = number) -> None:  # noqa: ANN401
                config.update(saver.put(config, checkpoint, metadata, {"sliding_context": number}))

            times.append(timed_ms(put))
    return times[1:]


def states(patches: int, rounds: int) -> dict[str, Any]:
    """Each way's times, and ours as a multiple of theirs: the median, over the rounds, of the ratio within each."""
    ours: list[float] = []
    theirs: list[float] = []
    ratios = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            ways = [by_run, by_langgraph] if number % 2 else [by_langgraph, by_run]
            took = {way: way(Path(folder) / way.__name__, patches) for way in ways}
        ours += took[by_run] or []
        if (other := took[by_langgraph]) is not None:
            theirs += other
            mine, its = spread(took[by_run] or []), spread(other)
            ratios.append({name: mine[name] / its[name] for name in mine})
    found: dict[str, Any] = {"a patch of a run": spread(ours)}
    if theirs:
        found["LangGraph's SqliteSaver.put"] = spread(theirs)
        found[RATIO] = {name: statistics.median(one[name] for one in ratios) for name in ("p50_ms", "p99_ms")}
    return found


# Memory


class Text:
    """Draws words, and makes memories of 8 to 60 of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.words = sorted({"".join(self.random.choices(LETTERS, k=9)) for _ in range(VOCABULARY)})
        self.random.shuffle(self.words)
        self._weights = list(accumulate(1 / rank for rank in range(1, len(self.words) + 1)))

    def draw(self, count: int) -> list[str]:
        return self.random.choices(self.words, cum_weights=self._weights, k=count)

    def mcr(self, scope: str = "global") -> Document:
        return {
            "_schema_version": "2.1",
            "op": "add",
            "type": self.random.choice(TYPES),
            "scope": scope,
            "content": " ".join(self.draw(self.random.randint(8, 60))),
            "confidence": round(self.random.random(), 2),
            "rationale": "measured",
            "source_refs": [],
            "writer": f"agent{self.random.randint(1, 5)}",
        }


def fill(store: SQLiteMemoryStore, text: Text, count: int, say: Callable[[str], None]) -> list[str]:
    """As commits do, without the look for conflicts that a proposal takes; gives the contents."""
    contents = []
    for start in range(0, count, BATCH):
        number = start // BATCH
        proposer = Proposer(task_id=f"task{number % 50}", run_id=f"run{number}")
        kinds = text.random.choices(["global", "task", "run"], [6, 2, 2], k=min(BATCH, count - start))
        mcrs = [text.mcr(kind) for kind in kinds]
        contents += [mcr["content"] for mcr in mcrs]
        with store.transaction(writes=True) as shelf:
            batch = Batch(ordered_id("batch"), "proposed", proposer.run_id, proposer.task_id, mcrs, now())
            shelf.stage(batch, [Staged(mcr, ordered_id("none")) for mcr in mcrs])
            shelf.record(batch, settle(mcrs, proposer, shelf, batch_id=batch.batch_id, committed_by=None))
        say(f"{start + len(mcrs):,} of {count:,} memories")
    return contents


def queries(text: Text) -> dict[str, Callable[[], str]]:
    """What is asked for, by what it is called; each call gives another."""
    pick = text.random.choice
    return {
        "a rare word": lambda: pick(text.words[5_000:40_000]),
        "a middle word": lambda: pick(text.words[50:500]),
        "a common word": lambda: pick(text.words[:10]),
        "three common words": lambda: " ".join(text.random.sample(text.words[:20], 3)),
        "five words as drawn": lambda: " ".join(text.draw(5)),
        "thirty words as drawn": lambda: " ".join(text.draw(30)),
    }


class HeldStore(SQLiteMemoryStore):
    """Says for how many milliseconds each of its transactions had the write lock, without the sync at its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held_ms: list[float] = []

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Shelf]:
        with super().transaction(writes=writes) as shelf:
            began = time.perf_counter()
            yield shelf
            if writes:
                self.held_ms.append((time.perf_counter() - began) * 1000)


def memory(folder: Path, count: int, looks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Each query beside a plain FTS5 table of the same contents, which knows no scopes; then proposals and commits."""
    text = Text(seed=1)
    store = HeldStore(folder / "memory.v2.1.sqlite")
    plain = _plain(folder / "plain.sqlite", fill(store, text, count, say))
    here = {"task_id": "task7", "run_id": "run7"}
    found: dict[str, Any] = {}
    for name, query in queries(text).items():
        say(name)
        asked = [query() for _ in range(looks)]
        found[f"search: {name}"] = spread([timed_ms(partial(store.search, one, here, 10)) for one in asked])
        found[f"a plain FTS5 table: {name}"] = spread([timed_ms(partial(_ask, plain, one)) for one in asked])
    batches = [[text.mcr() for _ in range(10)] for _ in range(looks // 4)]
    staged: list[str] = []
    store.held_ms.clear()
    proposed = [timed_ms(lambda batch=batch: staged.append(store.propose(batch, {}).batch_id)) for batch in batches]  # type: ignore[misc]
    found["propose a batch of 10"] = spread(proposed)
    found["of that under the write lock"] = spread(store.held_ms)
    found["commit a batch of 10"] = spread([timed_ms(partial(store.commit, batch_id)) for batch_id in staged])
    store.close()
    plain.close()
    return found


def _plain(path: Path, contents: Sequence[str]) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    connection.execute("CREATE VIRTUAL TABLE memory USING fts5(content)")
    connection.executemany("INSERT INTO memory VALUES (?)", [(content,) for content in contents])
    connection.commit()
    return connection


def _ask(connection: sqlite3.Connection, query: str) -> list[Any]:
    """As one would: any of the words, the best first."""
    sql = "SELECT content FROM memory WHERE memory MATCH ? ORDER BY rank LIMIT 10"
    return connection.execute(sql, (" OR ".join(query.split()),)).fetchall()


# The brief


def briefs(folder: Path, looks: int) -> dict[str, float]:
    """Of a working set and memories that hold more than the budget."""
    manager = WorkingSetManager(folder / "state" / "working_set.v2.1.json")
    manager.create_initial(task_id="task", thread_id="thread", run_id="run", objective="Measure.")
    patch = {"_schema_version": "2.1", "expected_seq": 0, "set": {"sliding_context": items()}}
    working_set = manager.apply_patch(patch).working_set
    store = SQLiteMemoryStore(folder / "memory.v2.1.sqlite")
    text = Text(seed=2)
    store.commit(store.propose([text.mcr() for _ in range(50)], {}).batch_id)
    hits = store.search(" ".join(text.words[:10]), {}, 50)
    store.close()

    def brief() -> None:
        render(working_set, hits, budget_tokens=BRIEF_TOKENS, count=estimate)

    return spread([timed_ms(brief) for _ in range(looks)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patches", type=int, default=300)
    parser.add_argument("--memories", type=int, default=100_000)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    def say(what: str) -> None:
        print(f"\r{what}        ", end="", file=sys.stderr, flush=True)

    say("patches")
    found: dict[str, Any] = {"state": states(given.patches, given.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        found["memory"] = memory(Path(folder), given.memories, given.searches, say)
    with tempfile.TemporaryDirectory() as folder:
        found["brief"] = {f"a brief of {BRIEF_TOKENS:,} tokens": briefs(Path(folder), given.searches)}
    say("")
    print(json.dumps(found, indent=2) if given.json else table(found))


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}",
        "",
    ]
    lines += ["| ms | p50 | p99 |", "| --- | ---: | ---: |"]
    for part in found.values():
        for name, figures in part.items():
            lines.append(f"| {name} | {figures['p50_ms']:.3g} | {figures['p99_ms']:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
