"""What a bus's ledger has of the calls that a pack names, and which of its lines have an answer that would fit.

The service may have committed, and its answer been lost (too large, too late, killed): then the bus's line says that
the call failed, or only that it started. What the caller then does is to ask again, and a later line of the same call
that went well, or of one for the same batch, shows that it was committed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aos_context.bus_ledger import lines, link_fault, record_of
from aos_context.errors import (
    ConflictError,
    ForbiddenError,
    GateError,
    NotFoundError,
    PhaseError,
    RequestError,
)

if TYPE_CHECKING:
    from pathlib import Path

BATCH_MEMBERS = {"milestone": "memory_batch_id", "commit": "batch_id"}
"""The capabilities that commit, and which member of their payload names the batch."""
REFUSALS = frozenset(
    one.code for one in (ConflictError, ForbiddenError, GateError, NotFoundError, PhaseError, RequestError)
)
"""What the service answers only where nothing was committed."""
_PLACE = {"overlay": "aos_context", "phase": "SEAL"}
_REQUEST_ID = re.compile(rb'"request_id":"((?:[^"\\]|\\.)*)"')
_RESULT_HASH = re.compile(rb'"result_hash":"([0-9a-f]{64})"')
_OWN = b'"overlay":"aos_context"'
UNKNOWN = "the ledger has no line on the call that it names"


@dataclass(slots=True)
class Lost:
    """A call that ran and whose answer was lost."""

    capability: str
    payload_hash: str | None
    batch_id: str | None
    """None where the ledger does not have the payload."""
    is_repeated: bool = False
    """Whether the same call went well later."""


@dataclass(slots=True)
class Call:
    """What the ledger has of a request."""

    seq: int | None = None
    reason: str | None = UNKNOWN
    count: int = 0
    """Of lines that say what came of a call; there is one."""
    lost: Lost | None = None
    capability: str | None = None
    payload: dict[str, Any] | None = None
    """None where the line does not hold it."""
    fault: str | None = None
    """What is wrong with the line's links."""
    answered: str | None = None
    """The `result_hash` of a call that went well."""

    def take(self, record: dict[str, Any], fault: str | None) -> None:
        """Take in a line of this request; `fault` is what is wrong with its links."""
        is_end = record.get("type") not in ("started", "interrupted")
        if self.count and not is_end:
            return
        self.count += is_end
        seq = record.get("seq")
        self.seq = seq if isinstance(seq, int) else None
        payload = record.get("payload")
        self.payload = payload if isinstance(payload, dict) else None
        self.capability = str(record.get("capability"))
        self.fault, self.answered = fault, _answered(record) if is_end and fault is None else None
        started, self.lost = self.lost, None
        self.reason = fault or _place_fault(record) or (_end_fault(record) if is_end else _lost_reason(record))
        if self.count > 1:
            self.reason = f"the ledger has {self.count} lines on the call that it names"
        elif self.reason == _lost_reason(record):
            self.lost = _lost(record, started)


@dataclass(slots=True)
class Found:
    calls: dict[str, Call]
    answers: frozenset[str]
    lines: int = 0
    committed: set[str] = field(default_factory=set)
    """Batches that a call has committed, or found so, since the first answer that was lost."""
    witnesses: dict[str, int] = field(default_factory=dict)
    """The lines that have one of the wanted answers, by its hash."""

    def witness(self, hashes: frozenset[str]) -> int | None:
        """The number of the first line that has one of them."""
        return min((self.witnesses[hash_] for hash_ in hashes if hash_ in self.witnesses), default=None)

    def lost(self) -> list[Lost]:
        return [call.lost for call in self.calls.values() if call.lost is not None]


def find(ledger_path: Path, wanted: set[str], answers: frozenset[str]) -> Found:
    """The calls with the `wanted` ids, and the lines that have the hash of one of the `answers`."""
    found = Found({request_id: Call() for request_id in sorted(wanted)}, answers)
    before: bytes | None = None
    line: bytes | None = None
    for after in lines(ledger_path):
        found.lines += 1
        if line is not None:
            _look(found, before, line, after)
        before, line = line, after
    if line is not None:
        _look(found, before, line, None)
    return found


def _look(found: Found, before: bytes | None, line: bytes, after: bytes | None) -> None:
    """Take in a line that says what came of a call that is wanted, or perhaps of one whose answer was lost or is."""
    is_named = any(_text(match[1]) in found.calls for match in _REQUEST_ID.finditer(line))
    is_own = _OWN in line
    lost = found.lost() if is_own else []
    is_answer = is_own and any(match[1].decode() in found.answers for match in _RESULT_HASH.finditer(line))
    if not is_named and not lost and not is_answer:
        return
    record = record_of(line)
    fault = link_fault(record, before, line, after)
    if (call := found.calls.get(str(record.get("request_id")))) is not None:  # a stored payload may hold any id
        call.take(record, fault)
    if fault is None and (hash_ := _answered(record)) in found.answers:
        found.witnesses.setdefault(str(hash_), int(record["seq"]))
    if lost and fault is None and _place_fault(record) is None and _end_fault(record) is None:
        _repeat(found, lost, record)


def _repeat(found: Found, lost: list[Lost], record: dict[str, Any]) -> None:
    """Take in a call that went well, after those whose answers were lost."""
    if (batch_id := _batch_id(record)) is not None:
        found.committed.add(batch_id)
    for one in lost:
        same = one.payload_hash is not None and one.payload_hash == record.get("payload_hash")
        one.is_repeated |= same and one.capability == record.get("capability")


def _lost(record: dict[str, Any], started: Lost | None) -> Lost:
    """Of the line that says so; an `interrupted` line has less than the `started` one before it."""
    hash_ = record.get("payload_hash")
    known = hash_ if isinstance(hash_, str) else started.payload_hash if started else None
    return Lost(str(record.get("capability")), known, _batch_id(record))


def _batch_id(record: dict[str, Any]) -> str | None:
    """What the payload names, if the ledger has it."""
    payload = record.get("payload")
    batch_id = payload.get(BATCH_MEMBERS[record["capability"]]) if isinstance(payload, dict) else None
    return batch_id if isinstance(batch_id, str) else None


def _answered(record: dict[str, Any]) -> str | None:
    """The hash of what the overlay has answered, where the call went well."""
    went_well = record.get("type") == "invoke" and record.get("ok") is True
    hash_ = record.get("result_hash") if went_well and record.get("overlay") == _PLACE["overlay"] else None
    return hash_ if isinstance(hash_, str) else None


def _place_fault(record: dict[str, Any]) -> str | None:
    """Why a call of this overlay, capability and phase commits nothing; None where it may."""
    for member, expected in _PLACE.items():
        if record.get(member) != expected:
            return f"the call's {member} is {json.dumps(record.get(member))}, not {json.dumps(expected)}"
    capability = record.get("capability")
    if not isinstance(capability, str) or capability not in BATCH_MEMBERS:
        return f"the call's capability is {json.dumps(capability)}, not {' or '.join(BATCH_MEMBERS)}"
    return None


def _end_fault(record: dict[str, Any]) -> str | None:
    """What is wrong with what came of a call; None where it went well."""
    if record.get("type") != "invoke":
        return f'the call\'s type is {json.dumps(record.get("type"))}, not "invoke"'
    ok = record.get("ok")
    if ok is True:
        return None
    if ok is False and record.get("code") not in REFUSALS:
        return _lost_reason(record)
    return f"the call's ok is {json.dumps(ok)}, not true, and its code {json.dumps(record.get('code'))}"


def _lost_reason(record: dict[str, Any]) -> str:
    how = {"started": "it only started", "interrupted": "it was interrupted"}.get(str(record.get("type")))
    how = how or f"its code is {json.dumps(record.get('code'))}"
    return f"the call's answer was lost ({how}), and no later call is known that shows its commit"


def _text(escaped: bytes) -> str | None:
    """Of the inside of a JSON string."""
    try:
        text = json.loads(b'"%b"' % escaped)
    except ValueError:
        return None
    return text if isinstance(text, str) else None
