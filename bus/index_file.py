"""The file of the ledger's index, a SQLite database that whoever can write beside the log can change.

So SQLite is told to trust nothing in it. Its schema is ours to the letter, with no view, trigger or expression of
others; no value in it is longer than what we write, and no statement takes more than `MOST_STEPS` of SQLite's steps. A
journal beside it, which SQLite would play back, is one that a killed writer left: then nothing in the file is believed.
Who reads holds a lock that no writer has meanwhile, and so needs neither journal nor SQLite's own locks.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
MOST_STEPS = 1 << 26
"""Of one statement, in one or two seconds; the longest of ours takes some 30 for each line of 64 blocks."""

_STEPS_AT_ONCE = 1 << 16
_MOST_BYTES = 1 << 20
_WAIT_S = 5.0
_JOURNAL = "-journal"
_TABLES = """
CREATE TABLE state (seq INTEGER NOT NULL, hash BLOB NOT NULL, first INTEGER NOT NULL, place INTEGER NOT NULL,
                    after INTEGER NOT NULL);
CREATE TABLE places (seq INTEGER PRIMARY KEY, place INTEGER NOT NULL);
CREATE TABLE kinds (id INTEGER PRIMARY KEY, type, overlay, phase, ok, code, caller,
                    UNIQUE (type, overlay, phase, ok, code, caller));
CREATE TABLE runs (kind INTEGER, block INTEGER, oldest INTEGER, newest INTEGER, lines BLOB, PRIMARY KEY (kind, block))
    WITHOUT ROWID;
CREATE TABLE tiles (level INTEGER, n INTEGER, hashes BLOB, PRIMARY KEY (level, n)) WITHOUT ROWID;
INSERT INTO state VALUES (0, x'', 1, 0, 0);
"""
# `place` is a byte of the segment that begins with line `first`, unpacked: the last line's, and `after` its end.


class _Steps:
    """Counts what a statement takes; true, which ends it, once that is too much."""

    def __init__(self) -> None:
        self.left = 0

    def __call__(self) -> bool:
        self.left -= _STEPS_AT_ONCE
        return self.left <= 0


class Base(sqlite3.Connection):
    """A connection whose statements are bounded. Raises `sqlite3.Error` where one takes too much."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401  # those of the class above
        super().__init__(*arguments, **options)
        self._steps = _Steps()
        self.set_progress_handler(self._steps, _STEPS_AT_ONCE)
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
        self.execute("PRAGMA trusted_schema = OFF")
        self.execute("PRAGMA cell_size_check = ON")

    def execute(self, *arguments: Any) -> sqlite3.Cursor:  # noqa: ANN401
        self._steps.left = MOST_STEPS
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:  # noqa: ANN401
        self._steps.left = MOST_STEPS
        return super().executemany(*arguments)


def opened(file: Path, *, to_write: bool = False) -> Base:
    """The database, which is there. Raises `sqlite3.Error`; OSError for a link, which SQLite would follow."""
    if file.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(file))
    mode = "mode=rw" if to_write else "mode=ro&immutable=1"
    return sqlite3.connect(
        f"{file.absolute().as_uri()}?{mode}",
        uri=True,
        timeout=_WAIT_S,
        isolation_level=None,
        check_same_thread=False,
        factory=Base,
    )


def was_left(file: Path) -> bool:
    """Whether a writer was killed before it had written all of a batch."""
    return os.path.lexists(_journal(file))  # SQLite would follow a link


def unlink(file: Path) -> None:
    """Remove it with all that belongs to it."""
    for one in (file, _journal(file)):
        one.unlink(missing_ok=True)


def _journal(file: Path) -> Path:
    return file.with_name(file.name + _JOURNAL)


def make_tables(base: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";")[:-1]:
        base.execute(statement)
    base.execute(f"PRAGMA user_version = {SCHEMA}")


def is_ours(base: sqlite3.Connection) -> bool:
    """Whether its tables are those that we make, and nothing else is in it."""
    version = base.execute("PRAGMA user_version").fetchone()[0]
    return bool(version == SCHEMA and _schema_of(base) == _our_schema())


def _schema_of(base: sqlite3.Connection) -> list[tuple[Any, ...]]:
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name LIMIT 100"
    return base.execute(query).fetchall()


@cache
def _our_schema() -> list[tuple[Any, ...]]:
    base = sqlite3.connect(":memory:", isolation_level=None)
    try:
        make_tables(base)
        return _schema_of(base)
    finally:
        base.close()


def is_malformed(error: sqlite3.Error) -> bool:
    """Whether it is the database that is wrong, and not the disk or the right to write."""
    return getattr(error, "sqlite_errorcode", None) in {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_TOOBIG,
    }
