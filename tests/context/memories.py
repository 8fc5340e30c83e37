"""What tests of memory share: changes to propose, and stores to run them against."""

from __future__ import annotations

import importlib
import os
import warnings
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aos_context.memory import InMemoryMemoryStore
from aos_context.memory_mem0 import Mem0MemoryStore
from aos_context.memory_sqlite import SQLiteMemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aos_context.artifacts import Document
    from aos_context.config import Config
    from aos_context.memory import RecordingMemoryStore

HERE = {"task_id": "t1", "run_id": "r1"}
DIMENSIONS = 256


def add(content: str, **members: Any) -> Document:
    return {
        "_schema_version": "2.1",
        "op": "add",
        "type": "fact",
        "scope": "global",
        "content": content,
        "confidence": 0.9,
        "rationale": "seen",
        "source_refs": [],
        **members,
    }


def update(target: str, **members: Any) -> Document:
    return {"_schema_version": "2.1", "op": "update", "target_id": target, **members}


def supersede(target: str, content: str, **members: Any) -> Document:
    change = add(content, op="supersede", target_id=target, **members)
    return {name: value for name, value in change.items() if name not in {"type", "scope"} or name in members}


def delete(target: str) -> Document:
    return {"_schema_version": "2.1", "op": "delete", "target_id": target, "rationale": "wrong"}


def remember(store: RecordingMemoryStore, *mcrs: Document, **scope: str) -> list[Document]:
    """Propose and commit."""
    return store.commit(store.propose(mcrs, scope).batch_id).items


def found(store: RecordingMemoryStore, query: str, **filters: Any) -> set[str]:
    return {hit.item["content"] for hit in store.search(query, filters)}


@contextmanager
def opened(kind: str, folder: Path, config: Config) -> Iterator[RecordingMemoryStore]:
    if kind == "mem0":
        with offline_mem0(folder) as mem0:
            yield Mem0MemoryStore(mem0, InMemoryMemoryStore(config))
        return
    store = InMemoryMemoryStore(config) if kind == "memory" else SQLiteMemoryStore(folder / "memory.sqlite", config)
    yield store
    store.close()


class HashingEmbedder:
    """Words, hashed to dimensions: texts that share words are alike, and it needs neither a model nor a network."""

    def embed(self, text: str, memory_action: str | None = None) -> list[float]:
        del memory_action
        vector = [0.0] * DIMENSIONS
        for word in text.lower().split():
            vector[zlib.crc32(word.encode()) % DIMENSIONS] += 1.0
        return vector


@contextmanager
def offline_mem0(folder: Path) -> Iterator[Any]:
    """A real `mem0.Memory` on a Qdrant in a folder. Raises `ImportError` where it is not installed."""
    # Read when `mem0` is imported: it would make a folder at home and send telemetry.
    os.environ.update(MEM0_TELEMETRY="False", MEM0_DIR=str(folder / "home"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mem0 = importlib.import_module("mem0")
    place = {"collection_name": "tests", "embedding_model_dims": DIMENSIONS, "path": str(folder / "vectors")}
    model = {"provider": "openai", "config": {"api_key": "none"}}
    memory = mem0.Memory.from_config(
        {
            "vector_store": {"provider": "qdrant", "config": place},
            "llm": model,
            "embedder": model,
            "history_db_path": str(folder / "history.sqlite"),
        }
    )
    memory.embedding_model = HashingEmbedder()
    try:
        yield memory
    finally:
        memory.vector_store.client.close()
        memory.close()
