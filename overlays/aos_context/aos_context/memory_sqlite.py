"""A memory in one SQLite file, for many processes and threads at once.

Nothing is overwritten: `change` has every version of every memory, `item` points to the one that holds. Searches go
through an FTS5 table of two columns, the words of a memory and its labels (status and place, type, writer), so that a
filter is part of the index's own work and costs little even where it leaves few of many.

BM25 over 100,000 memories takes 50 ms for a word that most have. So at most `Config.search_candidates` are scored: a
query's rare words choose them, common ones only weigh in, and where all are common the newest are taken, those with all
the words first. Below that many matches the result is exact.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from aos_context.artifacts import Document, days_ago, decode, encode, sha256
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.errors import BrokenError, BusyError, ContextError
from aos_context.files import FILE_MODE, make_folder, sync_folder
from aos_context.locks import locked
from aos_context.memory_filters import Filters, beside
from aos_context.memory_gate import CONFLICTS_MOST, draft_of
from aos_context.memory_gated import GatedMemoryStore, item_of
from aos_context.memory_shelf import Change
from aos_context.memory_store import Batch, Hit, Waiting
from aos_context.memory_words import similarity, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from aos_context.memory_gate import Draft, Staged
    from aos_context.memory_shelf import Shelf

APPLICATION_ID = 0x414F5343
"""`AOSC`, in the file's header."""
SCHEMA = 1
"""The file's `user_version`."""
BUSY_TIMEOUT_S = 10.0
"""How long a call waits for others' writes."""
IDLE_MOST = 4
"""Connections that are kept open for the next call."""
QUERY_WORDS_MOST = 32
"""Words of a query that count, the rarest of the first `QUERY_WORDS_READ`."""
QUERY_WORDS_READ = 1_000
COMPARED_MOST = 500
"""Memories whose words are compared with a proposal's, once for its rare words and once for its common ones."""
COUNTED_MOST = 50_000
"""Memories that the words of a query may be in, all words together, beyond which the commonest do not weigh in."""

_TABLES = """
CREATE TABLE batch (
    n INTEGER PRIMARY KEY, batch_id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, run_id TEXT, task_id TEXT,
    proposed_at TEXT NOT NULL, committed_at TEXT, committed_by TEXT
) STRICT;
CREATE INDEX batch_of_run ON batch (run_id);
CREATE TABLE proposal (
    batch INTEGER NOT NULL REFERENCES batch, position INTEGER NOT NULL, waits INTEGER NOT NULL,
    identity TEXT NOT NULL, target_id TEXT, mcr BLOB NOT NULL, PRIMARY KEY (batch, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX proposal_identity ON proposal (identity) WHERE waits;
CREATE INDEX proposal_target ON proposal (target_id) WHERE waits AND target_id IS NOT NULL;
CREATE TABLE change (
    n INTEGER PRIMARY KEY, batch INTEGER NOT NULL REFERENCES batch, item INTEGER NOT NULL, document BLOB NOT NULL
) STRICT;
CREATE INDEX change_of_batch ON change (batch);
CREATE TABLE item (
    n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, change INTEGER NOT NULL REFERENCES change,
    confidence REAL NOT NULL, active_key TEXT UNIQUE
) STRICT;
CREATE TABLE word (word TEXT PRIMARY KEY, memories INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE VIRTUAL TABLE text USING fts5 (words, labels, tokenize = 'ascii');
"""
_FOLLOWERS = """
CREATE TABLE IF NOT EXISTS follower (name TEXT PRIMARY KEY, change INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
"""Made where it is missing: the first files of this schema have none."""
_CURRENT = "SELECT document FROM item JOIN change ON change.n = item.change"


class SQLiteMemoryStore(GatedMemoryStore):
    """The durable one: a commit that has returned survives the machine's end.

    Raises `BrokenError` where the file is not one of these, was written by a newer program, or is damaged (another
    program's file is left as it is), and `BusyError` where others write for longer than `BUSY_TIMEOUT_S`.
    """

    def __init__(self, path: Path, config: Config = DEFAULT_CONFIG) -> None:
        super().__init__(config)
        self.path = path
        self._mutex = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._pid = os.getpid()
        self._closed = False
        make_folder(path.parent)
        with locked(path.with_name(f"{path.name}.lock")), _errors(path):
            if not path.exists() or path.stat().st_size == 0:
                _create(path)
            _require_ours(path)
            connection = self._checked(self._connect())
            connection.execute(_FOLLOWERS)
            self._release(connection)

    @contextmanager
    def transaction(self, *, writes: bool) -> Iterator[Shelf]:
        with _errors(self.path):
            connection = self._acquire()
            try:
                connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                yield _Shelf(connection, self.config)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            finally:
                self._release(connection)

    def following(self) -> AbstractContextManager[None]:
        return locked(self.path.with_name(f"{self.path.name}.following.lock"))

    def close(self) -> None:
        with self._mutex:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _acquire(self) -> sqlite3.Connection:
        with self._mutex:
            if self._closed:
                raise ContextError(f"{self.path} was closed")
            if self._pid != os.getpid():
                # SQLite's connections do not survive a fork; to close them here would end the parent's locks.
                _ABANDONED.extend(self._idle)
                self._idle, self._pid = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _release(self, connection: sqlite3.Connection) -> None:
        with self._mutex:
            if not self._closed and len(self._idle) < IDLE_MOST:
                self._idle.append(connection)
                return
        connection.close()

    def _checked(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        try:
            _check_identity(self.path, *found)
        except BrokenError:
            connection.close()
            raise
        return connection

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            # Without FULL, what was committed in WAL mode could be lost with the machine's power.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cache_size = -16384")
        except BaseException:
            connection.close()
            raise
        return connection


_ABANDONED: list[sqlite3.Connection] = []
_CHECKING = threading.Lock()


class _Shelf:
    """The shelf of a store in SQLite."""

    def __init__(self, connection: sqlite3.Connection, config: Config) -> None:
        self._connection = connection
        self._config = config

    def item(self, item_id: str) -> Document | None:
        row = self._one(f"{_CURRENT} WHERE item.id = ?", item_id)
        return None if row is None else item_of(row[0])

    def active(self, key: str) -> str | None:
        return self._text("SELECT id FROM item WHERE active_key = ?", key)

    def proposed(self, identity: str) -> str | None:
        return self._text(
            "SELECT batch_id FROM proposal JOIN batch ON batch.n = batch "
            "WHERE waits AND identity = ? AND proposed_at > ? ORDER BY batch",
            identity,
            days_ago(self._config.proposal_max_age_days),
        )

    def targeted(self, item_id: str) -> str | None:
        return self._text(
            "SELECT batch_id FROM proposal JOIN batch ON batch.n = batch "
            "WHERE waits AND target_id = ? AND proposed_at > ? ORDER BY batch",
            item_id,
            days_ago(self._config.proposal_max_age_days),
        )

    def alike(self, draft: Draft, least: float) -> Iterable[tuple[float, Document]]:
        """The most alike of those that share a rare word with the draft, or all the others."""
        own, shares = set(words(draft.content)), dict[int, float]()
        for expression in neighbours(self._memories_with(own), COMPARED_MOST):
            texts = self._beside(draft, f"words : ({expression})")
            shares |= {number: similarity(own, set(text.split())) for number, text in texts}
        best = sorted((number for number in shares if shares[number] >= least), key=lambda number: -shares[number])
        # One more than are named, for a proposal's own target is not.
        return [(shares[number], self._numbered(number)) for number in best[: CONFLICTS_MOST + 1]]

    def _beside(self, draft: Draft, match: str) -> Iterable[tuple[int, str]]:
        """Number and words of the active memories of the draft's type, scope and place that match, the newest first.

        `COMPARED_MOST` at most. A label's list is long, and for FTS5 to meet one costs more than the match itself. So
        it meets the rarer of the two, and the other is looked at here, unless that would leave out what matches.
        """
        place, kind = _clauses(beside(draft))
        rarer = kind if draft.scope == "global" else place
        rows = self._connection.execute(_SELECT_WORDS, (f"{match} AND {rarer}", COMPARED_MOST)).fetchall()
        if len(rows) == COMPARED_MOST:
            rows = self._connection.execute(
                _SELECT_WORDS, (f"{match} AND {place} AND {kind}", COMPARED_MOST)
            ).fetchall()
        first = f"a{_place(draft.scope, draft.task_id, draft.run_id)} {_label('y', draft.type)} "
        return [(number, text) for number, text, labels in rows if labels.startswith(first)]

    def stage(self, batch: Batch, staged: Sequence[Staged]) -> None:
        number = self._connection.execute(
            "INSERT INTO batch (batch_id, state, run_id, task_id, proposed_at) VALUES (?, ?, ?, ?, ?)",
            (batch.batch_id, batch.state, batch.run_id, batch.task_id, batch.proposed_at),
        ).lastrowid
        self._connection.executemany(
            "INSERT INTO proposal (batch, position, waits, identity, target_id, mcr) VALUES (?, ?, 1, ?, ?, ?)",
            [
                (number, position, one.identity, one.mcr.get("target_id"), encode("mcr", one.mcr))
                for position, one in enumerate(staged)
            ],
        )

    def record(self, batch: Batch, items: Sequence[Document]) -> None:
        number = self._number("SELECT n FROM batch WHERE batch_id = ?", batch.batch_id)
        self._connection.execute(
            "UPDATE batch SET state = ?, committed_at = ?, committed_by = ? WHERE n = ?",
            (batch.state, batch.committed_at, batch.committed_by, number),
        )
        self._connection.execute("UPDATE proposal SET waits = 0 WHERE batch = ?", (number,))
        known = [(item, self.item(item["id"])) for item in items]
        for item, before in known:
            if before is not None:  # What is about to change makes room before what takes its place.
                self._connection.execute("UPDATE item SET active_key = NULL WHERE id = ?", (item["id"],))
        for item, before in known:
            self._write(number, item, before)

    def batch(self, batch_id: str) -> Batch | None:
        row = self._one(f"{_BATCHES} WHERE batch_id = ?", batch_id)
        return None if row is None else self._batch(row)

    def batches(self, run_id: str) -> list[Batch]:
        return [
            self._batch(row) for row in self._connection.execute(f"{_BATCHES} WHERE run_id = ? ORDER BY n", (run_id,))
        ]

    def waiting(self, run_id: str, most: int) -> list[Waiting]:
        rows = self._connection.execute(_WAITING, (run_id, most)).fetchall()
        return [
            Waiting(batch_id, proposed_at, changes, decode("mcr", mcr, "a proposal"))
            for batch_id, proposed_at, changes, mcr in reversed(rows)
        ]

    def recorded(self, batch_id: str) -> list[Document]:
        found = "SELECT document FROM change JOIN batch ON batch.n = batch WHERE batch_id = ? ORDER BY change.n"
        return [item_of(row[0]) for row in self._connection.execute(found, (batch_id,))]

    def items(self, run_id: str | None, batch_id: str | None) -> list[Document]:
        if run_id is None and batch_id is None:
            return [item_of(row[0]) for row in self._connection.execute(f"{_CURRENT} ORDER BY item.n")]
        return [item_of(row[0]) for row in self._connection.execute(_LAST_CHANGES, (run_id, batch_id))]

    def last_change(self) -> int:
        return self._number("SELECT coalesce(max(n), 0) FROM change")

    def changed(self, after: int, limit: int) -> list[Change]:
        found = "SELECT change.n, item.id FROM change JOIN item ON item.n = change.item WHERE change.n > ? "
        return [Change(*row) for row in self._connection.execute(f"{found} ORDER BY change.n LIMIT ?", (after, limit))]

    def followed(self, follower: str) -> int:
        row = self._one("SELECT change FROM follower WHERE name = ?", follower)
        return 0 if row is None else int(row[0])

    def follow(self, follower: str, number: int) -> None:
        self._connection.execute("INSERT OR REPLACE INTO follower VALUES (?, ?)", (follower, number))

    def find(self, query: str, filters: Filters, top_k: int) -> list[Hit]:
        if query.strip():
            return self._matches(words(query), filters, top_k)
        found = (
            "SELECT document FROM text CROSS JOIN item ON item.n = text.rowid JOIN change ON change.n = item.change "
            "WHERE text MATCH ? AND item.confidence >= ? ORDER BY text.rowid DESC LIMIT ?"
        )
        rows = self._connection.execute(found, (_labelled(filters), filters.min_confidence, top_k))
        return [Hit(item_of(row[0]), 0.0) for row in rows]

    def _matches(self, asked: Iterable[str], filters: Filters, top_k: int) -> list[Hit]:
        candidates = self._config.search_candidates
        scored = _SCORED.format(confident=_CONFIDENT if filters.min_confidence > 0 else "")
        hits: list[Hit] = []
        for expression, weight in plan(self._memories_with(asked), candidates):
            match = f"words : ({expression}) AND {_labelled(filters)}"
            values = (match, filters.min_confidence, candidates, top_k)
            hits = [Hit(item_of(row[0]), -row[1] / weight) for row in self._connection.execute(scored, values)]
            if len(hits) >= top_k:
                break
        return hits

    def _memories_with(self, asked: Iterable[str]) -> dict[str, int]:
        """How many memories have each of these words, of those that any has."""
        held = {}
        for word in islice(dict.fromkeys(asked), QUERY_WORDS_READ):
            row = self._one("SELECT memories FROM word WHERE word = ?", word)
            if row is not None and row[0] > 0:
                held[word] = row[0]
        return held

    def _write(self, batch: int, item: Document, before: Document | None) -> None:
        document = encode("memory_item", item)
        key = draft_of(item).key if item["status"] == "active" else None
        change = "INSERT INTO change (batch, item, document) VALUES (?, ?, ?)"
        if before is None:
            number = self._number("SELECT coalesce(max(n), 0) + 1 FROM item")
        else:
            number = self._number("SELECT n FROM item WHERE id = ?", item["id"])
            # As they were written: another Python's Unicode may make other words of the same text.
            self._count(self._one("SELECT words FROM text WHERE rowid = ?", number), -1)
            self._connection.execute("DELETE FROM text WHERE rowid = ?", (number,))
        version = self._connection.execute(change, (batch, number, document)).lastrowid
        self._connection.execute(
            "INSERT INTO item (n, id, change, confidence, active_key) VALUES (?1, ?2, ?3, ?4, ?5) "
            "ON CONFLICT (n) DO UPDATE SET change = ?3, confidence = ?4, active_key = ?5",
            (number, item["id"], version, item["confidence"], key),
        )
        text = _columns(item)
        self._connection.execute("INSERT INTO text (rowid, words, labels) VALUES (?, ?, ?)", (number, *text))
        self._count(text, 1)

    def _count(self, text: tuple[str, ...] | None, by: Literal[1, -1]) -> None:
        """`text` begins with words, as `_columns` makes them."""
        self._connection.executemany(
            "INSERT INTO word VALUES (?1, ?2) ON CONFLICT (word) DO UPDATE SET memories = memories + ?2",
            [(word, by) for word in sorted(set(text[0].split() if text else ()))],
        )

    def _batch(self, row: tuple[Any, ...]) -> Batch:
        found = "SELECT mcr FROM proposal WHERE batch = ? ORDER BY position"
        mcrs = [decode("mcr", one[0], "a proposal") for one in self._connection.execute(found, (row[0],))]
        batch_id, state, run_id, task_id, proposed_at, committed_at, committed_by = row[1:]
        return Batch(batch_id, state, run_id, task_id, mcrs, proposed_at, committed_at, committed_by)

    def _one(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
        return row

    def _numbered(self, number: int) -> Document:
        row = self._one(f"{_CURRENT} WHERE item.n = ?", number)
        return item_of(row[0] if row else b"")

    def _number(self, statement: str, *values: object) -> int:
        """Of a row that is there."""
        return int(self._connection.execute(statement, values).fetchone()[0])

    def _text(self, statement: str, *values: str) -> str | None:
        row = self._one(statement, *values)
        return None if row is None else str(row[0])


_BATCHES = "SELECT n, batch_id, state, run_id, task_id, proposed_at, committed_at, committed_by FROM batch"
_WAITING = """
SELECT
    batch_id, proposed_at, (SELECT count(*) FROM proposal WHERE batch = n),
    (SELECT mcr FROM proposal WHERE batch = n ORDER BY position LIMIT 1)
FROM batch
WHERE run_id = ? AND state = 'proposed'
ORDER BY n DESC LIMIT ?
"""
_LAST_CHANGES = """
SELECT document
FROM change
WHERE n IN (
    SELECT max(change.n) FROM change JOIN batch ON batch.n = change.batch
    WHERE (?1 IS NULL OR batch.run_id = ?1) AND (?2 IS NULL OR batch.batch_id = ?2) GROUP BY change.item
)
ORDER BY item
"""
_SCORED = """
SELECT document, score
FROM (
    SELECT n, score
    FROM (
        SELECT text.rowid AS n, bm25(text, 1.0, 0.0) AS score
        FROM text {confident} WHERE text MATCH ?1 ORDER BY text.rowid DESC LIMIT ?3
    )
    ORDER BY score, n LIMIT ?4
) AS best
JOIN item ON item.n = best.n JOIN change ON change.n = item.change
ORDER BY score, best.n
"""
_SELECT_WORDS = "SELECT rowid, words, labels FROM text WHERE text MATCH ? ORDER BY rowid DESC LIMIT ?"
_CONFIDENT = "CROSS JOIN item ON item.n = text.rowid AND item.confidence >= ?2"


def plan(memories_with: Mapping[str, int], candidates: int) -> list[tuple[str, int]]:
    """FTS5 expressions to try in turn until one finds enough, each with how many times it counts every word.

    `memories_with` says how many memories have each word. The rarest words that are together in no more than
    `candidates` memories choose; the others, which are repeated so that all words count alike, weigh in.
    """
    choosing, weighing = _rarest(memories_with, candidates)
    if not choosing and not weighing:
        return []
    if not choosing:
        together = [(_joined(" AND ", weighing), 1)] if len(weighing) > 1 else []
        return [*together, (_joined(" OR ", weighing), 1)]
    chosen = _joined(" OR ", choosing)
    if not weighing:
        return [(chosen, 1)]
    return [(f"({chosen}) AND ({chosen} OR {_joined(' OR ', [*weighing, *weighing])})", 2)]


def neighbours(memories_with: Mapping[str, int], candidates: int) -> list[str]:
    """FTS5 expressions that together find texts with most of these words.

    What says the same with another value shares no rare word, and so has to have all the common ones.
    """
    choosing, others = _rarest(memories_with, candidates)
    together = _joined(" AND ", others)
    return [one for one in (_joined(" OR ", choosing), together) if one]


def _rarest(memories_with: Mapping[str, int], candidates: int) -> tuple[list[str], list[str]]:
    """Of the rarest words those that are together in no more than `candidates` memories, and the others."""
    choosing: list[str] = []
    others: list[str] = []
    total = 0
    for word in sorted(memories_with, key=lambda word: (memories_with[word], word))[:QUERY_WORDS_MOST]:
        total += memories_with[word]
        if total <= candidates:
            choosing.append(word)
        elif total <= COUNTED_MOST or not (choosing or others):
            others.append(word)
    return choosing, others


def _joined(operator: str, terms: Iterable[str]) -> str:
    """Quoted, so that a word that is an operator of FTS5 is a word; `words` leaves no quotation mark in any."""
    return operator.join(f'"{term}"' for term in terms)


def _labelled(filters: Filters) -> str:
    """What `Filters.allow` does but for the confidence, as an expression over labels."""
    return " AND ".join(_clauses(filters))


def _clauses(filters: Filters) -> list[str]:
    """Of status and place, and of type and writer where the filters have them."""
    places = {"global": "g", "task": _label("t", filters.task_id), "run": _label("r", filters.run_id)}
    statuses = [filters.status[0]] if filters.status != "any" else ["a", "s", "d"]
    kinds = [filters.scope] if filters.scope else list(places)
    clauses = [_joined(" OR ", [status + places[kind] for kind in kinds for status in statuses if places[kind]])]
    if filters.type is not None:
        clauses.append(_joined("", [_label("y", filters.type)]))
    if filters.writer is not None:
        clauses.append(_joined("", [_label("w", filters.writer)]))
    return [f"labels : ({clause or _joined('', ['none'])})" for clause in clauses]


def _columns(item: Document) -> tuple[str, str]:
    """The two columns of the index; as many labels as `memory_in_memory.LABELS` says."""
    place = _place(item["scope"], item["task_id"], item["run_id"])
    labels = (item["status"][0] + place, _label("y", item["type"]), _label("w", item["writer"]))
    return " ".join(words(item["content"])), " ".join(labels)


def _place(scope: str, task_id: str | None, run_id: str | None) -> str:
    return {"global": "g", "task": _label("t", task_id), "run": _label("r", run_id)}[scope]


def _label(kind: str, value: str | None) -> str:
    return "" if value is None else kind + sha256(value.encode())[:32]


def _create(path: Path) -> None:
    """Made beside its place and then named, so that there is never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.executescript(f"BEGIN; {_TABLES} COMMIT; PRAGMA journal_mode = WAL;")
        finally:
            connection.close()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


_OURS: set[tuple[int, int]] = set()
"""Device and inode of each file that this process has looked into."""


def _require_ours(path: Path) -> None:
    """Raises `BrokenError` for another program's file, or a newer one's, and does not open it with SQLite.

    That could change it. But a process that closes a file loses the locks that its SQLite connections have on it
    (https://sqlite.org/howtocorrupt.html, 2.2), so each file is looked into once, before the first of them.
    """
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    with _CHECKING:
        if identity not in _OURS:
            _check_header(path)
            _OURS.add(identity)


def _check_header(path: Path) -> None:
    """https://sqlite.org/fileformat2.html, 1.3."""
    with path.open("rb") as file:
        header = file.read(100)
    application_id, version = (int.from_bytes(header[start : start + 4], "big") for start in (68, 60))
    _check_identity(path, application_id if header.startswith(b"SQLite format 3\0") else None, version)


def _check_identity(path: Path, application_id: int | None, version: int) -> None:
    if application_id != APPLICATION_ID:
        raise BrokenError(f"{path} is no memory of this program", file=str(path))
    if version != SCHEMA:
        detail = f"{path} has schema {version}, and this program knows {SCHEMA}"
        raise BrokenError(detail, hint="Use the program that wrote it.", file=str(path))


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """What SQLite raises, as what callers know."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise BusyError(f"{path} is being written by others: {error}") from error
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise BrokenError(f"{path} is damaged: {error}", file=str(path)) from error
        raise ContextError(f"{path}: {error}") from error
