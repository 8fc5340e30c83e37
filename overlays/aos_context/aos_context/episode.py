"""Episodes: immutable checkpoints of a run, numbered without a gap, each holding the hash of the one before.

An episode is named by its content: `episode_id` ends with a hash of all the rest, and the file is the canonical JSON of
the document. So one file alone shows whether a byte of it was changed; the links show whether one before it was removed
or replaced; and the run's ledger, which has each one's hash, shows the same of the last.

What happened since the episode before is not in the document but in a file beside it, its slice: the ledger's own
lines, of which the document has the hash. So an episode is read for what it says without all that happened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from aos_context.artifacts import Document, decode, encode, now, sha256, to_json
from aos_context.config import SCHEMA_VERSION
from aos_context.episode_slice import CHAIN_START, check_slice, parts, temporary_slice
from aos_context.errors import BrokenError, NotFoundError
from aos_context.files import make_folder, replace, write_atomic
from aos_context.ledger import whole_lines
from aos_context.locks import locked
from aos_context.summary import summarise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from aos_context.episode_slice import Passing

EPISODE_MODE = 0o444
Documents = list[Document]

_NAME = re.compile(rf"episode_([0-9]{{6,16}})\.v{re.escape(SCHEMA_VERSION)}\.json")
_ID_HEX = 32


def file_name(number: int) -> str:
    """Of the episode `number`, from 1 on."""
    return f"episode_{number:06}.v{SCHEMA_VERSION}.json"


def slice_name(number: int) -> str:
    """Of the file with the lines of the ledger that the episode `number` stands for."""
    return f"episode_{number:06}.v{SCHEMA_VERSION}.jsonl"


def number_of(name: str) -> int | None:
    """The number of the episode of this file name; None where it is not one."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and name == file_name(int(match[1])) else None


def content_id(document: Document) -> str:
    """The `episode_id` of an episode with this content."""
    rest = {name: value for name, value in document.items() if name != "episode_id"}
    return f"ep_{document['number']:06}_{sha256(to_json(rest))[:_ID_HEX]}"


def read_episode(data: bytes, number: int, where: str) -> Document:
    """The episode that a file holds. Raises `BrokenError` that names `where` it lay, where any byte was changed."""
    document = decode("episode", data, where)
    if document["number"] != number:
        raise BrokenError(f"{where} holds the episode {document['number']}", file=where)
    if document["episode_id"] != content_id(document) or encode("episode", document) + b"\n" != data:
        raise BrokenError(f"{where} was changed: its content does not have the hash in its episode_id", file=where)
    return document


@dataclass(slots=True)
class Recorded:
    """What a run's ledger says of its episodes."""

    hashes: dict[int, str] = field(default_factory=dict)
    """SHA-256 of the files, by number."""
    ends: dict[int, int] = field(default_factory=dict)
    """The last line that each stands for, by number."""
    first: int = 1
    """The first that the run has: a pack carries only the last one, so a run that was loaded begins with that."""


def recorded(ledger: Path) -> Recorded:
    """From the lines of a ledger's file, none where it is not there. Raises `BrokenError`."""
    found = Recorded()
    for number, line in enumerate(whole_lines(ledger), 1):
        if b'"EPISODE_CREATED"' in line or b'"RESUME_PACK_LOADED"' in line:
            _record(found, decode("ledger_event", line, f"line {number} of {ledger.name}"))
    return found


def _record(found: Recorded, event: Document) -> None:
    if event["event_type"] == "EPISODE_CREATED":
        number = event["data"]["number"]
        found.hashes[number], found.ends[number] = event["data"]["sha256"], event["data"]["last_seq"]
    elif event["event_type"] == "RESUME_PACK_LOADED":
        found.first = max(found.hashes, default=1)


class EpisodeStore:
    """The episodes of one run, in its folder `episodes`. The run's ledger lies beside that folder."""

    def __init__(self, folder: Path, *, ledger: Path | None = None) -> None:
        """`ledger` is the ledger's file, if it is not where a run has it."""
        self.folder = folder
        self.ledger = ledger or folder.parent / "ledger" / f"run.v{SCHEMA_VERSION}.jsonl"

    def create(
        self,
        *,
        run_id: str,
        task_id: str,
        reason: str,
        next_entry_point: str | None,
        ws_before: Document,
        ws_after: Document,
        ledger_lines: Iterable[bytes],
        first_seq: int,
        memory_batch_id: str | None,
        memory_items: Sequence[Document],
        request_id: str | None = None,
    ) -> Document:
        """The next episode, on the disk once this returns, and its slice before it.

        `ledger_lines` are the ledger's lines since the last episode, newlines and all, the event `first_seq` first.
        Raises `SchemaError`; `BrokenError` where the one before was changed, or the lines are not in sequence.
        """
        given: Document = {
            "_schema_version": SCHEMA_VERSION,
            "run_id": run_id,
            "task_id": task_id,
            "reason": reason,
            "next_entry_point": next_entry_point,
            "request_id": request_id,
            "created_at": now(),
            "ws_before": ws_before,
            "ws_after": ws_after,
            "memory": {"batch_id": memory_batch_id, "items": list(memory_items)},
        }
        make_folder(self.folder)
        with locked(self.folder / ".lock"):
            number = max(self.numbers(), default=0) + 1
            place = self.slice_path(number)
            with temporary_slice(place, ledger_lines, first_seq) as (temporary, passing):
                document = self._completed(given, number, passing)
                data = encode("episode", document) + b"\n"
                replace(temporary, place)
            write_atomic(self.path(number), data, EPISODE_MODE)
        return document

    def _completed(self, given: Document, number: int, passing: Passing) -> Document:
        before, before_sha256 = self._load(number - 1) if number > 1 else (None, None)
        document = {
            **given,
            "number": number,
            "ledger": passing.document(before["ledger"]["chain_sha256"] if before else CHAIN_START),
            "summary": summarise(
                reason=given["reason"],
                next_entry_point=given["next_entry_point"],
                ws_before=given["ws_before"],
                ws_after=given["ws_after"],
                event_counts=passing.counts,
                memory_items=given["memory"]["items"],
            ),
            "prev_sha256": before_sha256,
        }
        return {**document, "episode_id": content_id(document)}

    def sweep(self) -> None:
        """Remove what killed writers left: nobody else writes, as the caller has the run's lock."""
        for left in self.folder.glob(".episode_*"):
            left.unlink(missing_ok=True)

    def path(self, number: int) -> Path:
        return self.folder / file_name(number)

    def slice_path(self, number: int) -> Path:
        """Of the lines of the ledger that the episode stands for."""
        return self.folder / slice_name(number)

    def sha256(self, number: int) -> str:
        """Of the file as it is. Raises `NotFoundError`."""
        return sha256(self._bytes(number))

    def numbers(self) -> list[int]:
        """Of the files that are there, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(number for path in self.folder.iterdir() if (number := number_of(path.name)) is not None)

    def load(self, number: int) -> Document:
        """With its slice checked, chunk by chunk.

        Raises `NotFoundError`; `BrokenError` where either was changed, or the one before is not the one it links to.
        """
        document = self._linked(number)
        check_slice(self.slice_path(number), document["ledger"])
        return document

    def _linked(self, number: int) -> Document:
        document, _ = self._load(number)
        prev = document["prev_sha256"]
        if self.path(number - 1).exists():
            if prev != self.sha256(number - 1):
                self._break(number - 1, f"is not the one that episode {number} followed")
        elif number == 1:
            if prev is not None:
                self._break(number, "is the first and follows another")
        elif number != recorded(self.ledger).first:
            self._break(number - 1, f"is not there, and episode {number} follows it")
        return document

    def last(self) -> Document | None:
        """None where there is none. Its slice is not looked at. Raises `BrokenError`."""
        numbers = self.numbers()
        return self._linked(numbers[-1]) if numbers else None

    def verify(self) -> int:
        """How many there are, each of them unchanged, from the first to the last that the ledger knows of.

        The lines of the ledger that they stand for are looked at, too. Raises `BrokenError` that names the first file
        that is not as it was.
        """
        known, numbers = recorded(self.ledger), self.numbers()
        ledgers: dict[int, Document] = {}
        prev: str | None = None
        last = max([*numbers, *known.hashes], default=0)
        for number in range(known.first, last + 1):
            if number not in numbers:
                self._break(number, "is not there")
            document, hash_ = self._load(number)
            check_slice(self.slice_path(number), document["ledger"])
            if (number > known.first or number == 1) and document["prev_sha256"] != prev:
                self._break(number, "does not follow the episode before it")
            if known.hashes.get(number, hash_) != hash_:
                self._break(number, "is not the one that the ledger has")
            prev, ledgers[number] = hash_, document["ledger"]
        self._verify_lines(known.ends, ledgers)
        return max(0, last + 1 - known.first)

    def _verify_lines(self, ends: dict[int, int], ledgers: dict[int, Document]) -> None:
        """`ends` of all episodes that the ledger knows of; `ledgers` of those that are there, by number."""
        ends = ends | {number: ledger["last_seq"] for number, ledger in ledgers.items()}
        numbers = sorted(ends)
        found = parts(whole_lines(self.ledger), [ends[number] for number in numbers])
        for number, part in zip(numbers, found, strict=True):
            if number in ledgers and not part.is_of(ledgers[number]):
                what = f"a line up to {ends[number]} is not what it was at episode {number}"
                raise BrokenError(f"{self.ledger.name}: {what}", file=self.ledger.name)

    def list(self, *, limit: int | None = None, after: int | None = None) -> Documents:
        """All that are there, the first first; with a limit the last ones, or those behind number `after`.

        Raises as `load`.
        """
        numbers = self.numbers()
        if after is not None:
            numbers = [number for number in numbers if number > after][:limit]
        elif limit is not None:
            numbers = numbers[max(0, len(numbers) - limit) :]
        return [self.load(number) for number in numbers]

    def _load(self, number: int) -> tuple[Document, str]:
        data = self._bytes(number)
        return read_episode(data, number, file_name(number)), sha256(data)

    def _bytes(self, number: int) -> bytes:
        try:
            return self.path(number).read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"there is no episode {number}", number=number) from None

    def _break(self, number: int, what: str) -> NoReturn:
        raise BrokenError(f"{file_name(number)} {what}", file=file_name(number))
