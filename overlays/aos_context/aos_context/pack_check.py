"""Whether the memories of a resume pack were committed as they say: through the bus, in SEAL.

Each memory item has in `committed_by` the bus's request id of the call that committed it. The bus's ledger has a line
for that call, whose hash, links and members are looked at here. A line that holds the call's payload also says which
run and batch it was about. Nothing of the bus is needed for that, only its ledger's files.

The service may have committed, and its answer been lost (too large, too late, killed): then the bus's line says that
the call failed, or only that it started. What the caller then does is to ask again, and a later line of the same call
that went well, or of one for the same batch, shows that it was committed. Where there is none that can be known, the
item is open: neither shown nor against the pack.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aos_context.bus_ledger import lines, link_fault, record_of
from aos_context.config import DEFAULT_CONFIG, Config
from aos_context.errors import (
    ConflictError,
    ForbiddenError,
    GateError,
    NotFoundError,
    PhaseError,
    RequestError,
)
from aos_context.resume_pack import check

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BATCH_MEMBERS = {"milestone": "memory_batch_id", "commit": "batch_id"}
"""The capabilities that commit, and which member of their payload names the batch."""
REFUSALS = frozenset(
    one.code for one in (ConflictError, ForbiddenError, GateError, NotFoundError, PhaseError, RequestError)
)
"""What the service answers only where nothing was committed."""
_PLACE = {"overlay": "aos_context", "phase": "SEAL"}
_REQUEST_ID = re.compile(rb'"request_id":"((?:[^"\\]|\\.)*)"')
_OWN = b'"overlay":"aos_context"'
_UNRECORDED = "it was committed without a bus"
_UNKNOWN = "the ledger has no line on the call that it names"


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one memory item. `reason` says what is wrong, and is None where nothing is."""

    item_id: str
    batch_id: str
    committed_by: str | None
    seq: int | None
    """The number of the ledger's line."""
    reason: str | None
    is_recorded: bool
    """Whether it says which call committed it."""
    is_open: bool = False
    """Whether the call's answer was lost and no later call shows that it committed: it may have, or not."""

    @property
    def ok(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Report:
    """On all memory items of a pack, in its order."""

    pack_id: str
    run_id: str
    manifest_sha256: str
    lines: int
    """How many lines of the ledger were read."""
    verdicts: tuple[Verdict, ...]
    unchecked: tuple[str, ...] = ()
    """What there was nothing to check by, a sentence each."""

    def faults(self, *, allow_unrecorded: bool = False, strict: bool = False) -> list[Verdict]:
        """The verdicts that stand against the pack.

        With `allow_unrecorded` not those on commits without a bus; with `strict` those that are open, too.
        """
        return [
            one
            for one in self.verdicts
            if not one.ok and (one.is_recorded or not allow_unrecorded) and (strict or not one.is_open)
        ]

    def ok(self, *, allow_unrecorded: bool = False, strict: bool = False) -> bool:
        return not self.faults(allow_unrecorded=allow_unrecorded, strict=strict)


def check_against_ledger(
    pack_path: Path,
    ledger_path: Path,
    config: Config = DEFAULT_CONFIG,
    *,
    manifest_sha256: str | None = None,
    workspace: Path | None = None,
) -> Report:
    """Verify a pack, and find the call that committed each of its memories in the bus's ledger.

    `ledger_path` is the ledger's file or the folder that it lies in. It is read once, from the first line to the last,
    with three lines in memory. With `manifest_sha256` it must be the pack with that manifest. Raises as
    `resume_pack.check`; `NotFoundError` where there is no ledger, `BrokenError` where a segment cannot be unpacked.
    """
    with check(pack_path, config, manifest_sha256=manifest_sha256, workspace=workspace) as pack:
        named = (item["committed_by"] for item in pack.memory_items())
        found = _find(ledger_path, {request_id for request_id in named if request_id is not None})
        run_id = pack.manifest["run_id"]
        return Report(
            pack.manifest["pack_id"],
            run_id,
            pack.manifest_sha256,
            found.lines,
            tuple(_verdict(item, found, run_id) for item in pack.memory_items()),
            tuple(_unchecked(found, has_manifest_sha256=manifest_sha256 is not None)),
        )


@dataclass(slots=True)
class _Lost:
    """A call that ran and whose answer was lost."""

    capability: str
    payload_hash: str | None
    batch_id: str | None
    """None where the ledger does not have the payload."""
    is_repeated: bool = False
    """Whether the same call went well later."""


@dataclass(slots=True)
class _Call:
    """What the ledger has of a request."""

    seq: int | None = None
    reason: str | None = _UNKNOWN
    count: int = 0
    """Of lines that say what came of a call; there is one."""
    lost: _Lost | None = None
    capability: str | None = None
    payload: dict[str, Any] | None = None
    """None where the line does not hold it."""

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
        started, self.lost = self.lost, None
        self.reason = fault or _place_fault(record) or (_end_fault(record) if is_end else _lost_reason(record))
        if self.count > 1:
            self.reason = f"the ledger has {self.count} lines on the call that it names"
        elif self.reason == _lost_reason(record):
            self.lost = _lost(record, started)


@dataclass(slots=True)
class _Found:
    calls: dict[str, _Call] = field(default_factory=dict)
    lines: int = 0
    committed: set[str] = field(default_factory=set)
    """Batches that a call has committed, or found so, since the first answer that was lost."""

    def lost(self) -> list[_Lost]:
        return [call.lost for call in self.calls.values() if call.lost is not None]


def _unchecked(found: _Found, *, has_manifest_sha256: bool) -> Iterator[str]:
    bare = sum(1 for call in found.calls.values() if call.reason is None and call.payload is None)
    if bare:
        yield f"run and batch of {bare} calls: the ledger does not hold their payloads"
    if not has_manifest_sha256:
        yield "the manifest's own members, id, time and pointers among them: no SHA-256 of it was given"


def _verdict(item: dict[str, Any], found: _Found, run_id: str) -> Verdict:
    request_id, batch_id = item["committed_by"], item["batch_id"]
    if request_id is None:
        return Verdict(item["id"], batch_id, None, None, _UNRECORDED, is_recorded=False)
    call = found.calls[request_id]
    reason, is_open = call.reason, False
    if reason is None or call.lost is not None:
        reason = _payload_fault(call, item, run_id)
        if reason is None and call.lost is not None and not (call.lost.is_repeated or batch_id in found.committed):
            reason, is_open = call.reason, True
    return Verdict(item["id"], batch_id, request_id, call.seq, reason, is_recorded=True, is_open=is_open)


def _payload_fault(call: _Call, item: dict[str, Any], run_id: str) -> str | None:
    """What is wrong with what a call asked for, as far as its line holds that."""
    if call.payload is None:
        return None
    for member, expected in (("run_id", run_id), (BATCH_MEMBERS[call.capability or ""], item["batch_id"])):
        if call.payload.get(member) != expected:
            return f"the call's payload has the {member} {json.dumps(call.payload.get(member))}, not {expected}"
    return None


def _find(ledger_path: Path, wanted: set[str]) -> _Found:
    found = _Found({request_id: _Call() for request_id in sorted(wanted)})
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


def _look(found: _Found, before: bytes | None, line: bytes, after: bytes | None) -> None:
    """Take in a line, if it says what came of a call that is wanted, or perhaps of one whose answer was lost."""
    is_named = any(_text(match[1]) in found.calls for match in _REQUEST_ID.finditer(line))
    lost = found.lost() if _OWN in line else []
    if not is_named and not lost:
        return
    record = record_of(line)
    fault = link_fault(record, before, line, after)
    if (call := found.calls.get(str(record.get("request_id")))) is not None:  # a stored payload may hold any id
        call.take(record, fault)
    if lost and fault is None and _place_fault(record) is None and _end_fault(record) is None:
        _repeat(found, lost, record)


def _repeat(found: _Found, lost: list[_Lost], record: dict[str, Any]) -> None:
    """Take in a call that went well, after those whose answers were lost."""
    if (batch_id := _batch_id(record)) is not None:
        found.committed.add(batch_id)
    for one in lost:
        same = one.payload_hash is not None and one.payload_hash == record.get("payload_hash")
        one.is_repeated |= same and one.capability == record.get("capability")


def _lost(record: dict[str, Any], started: _Lost | None) -> _Lost:
    """Of the line that says so; an `interrupted` line has less than the `started` one before it."""
    hash_ = record.get("payload_hash")
    known = hash_ if isinstance(hash_, str) else started.payload_hash if started else None
    return _Lost(str(record.get("capability")), known, _batch_id(record))


def _batch_id(record: dict[str, Any]) -> str | None:
    """What the payload names, if the ledger has it."""
    payload = record.get("payload")
    batch_id = payload.get(BATCH_MEMBERS[record["capability"]]) if isinstance(payload, dict) else None
    return batch_id if isinstance(batch_id, str) else None


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
