"""The course of one call: what is known of it so far, and the record and the answer that are made from that."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import orjson

from bus.canonical import canonical, figure, sha256_hex
from bus.errors import CATALOGUE, BusError, entry
from bus.model import new_request_id, now_ms
from runners.base import Code, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bus.ledger import LedgerError, Receipt
    from bus.model import Invocation, Record, Told
    from bus.overlays import Resolved
    from bus.redaction import Redactor
    from bus.scheduler import Admission

_ERROR_LIMIT = 4096
_NAME_LIMIT = 129


class Answer(NamedTuple):
    """What a caller gets; `body` has the form of `schemas/outcome.schema.json`.

    `json` is its text. `record` is the ledger's line, None where it could not be written.
    """

    http_status: int
    body: dict[str, Any]
    json: bytes
    record: Record | None
    retry_after_s: int | None = None

    @property
    def ok(self) -> bool:
        return bool(self.body["ok"])


@dataclass(slots=True)
class Course:
    """Filled in by the steps of `Bus.invoke`, in their order; what a call never came to stays None."""

    request_id: str
    timestamp_ms: int
    received: float
    overlay: str
    capability: str | None
    call: Invocation | None = None
    caller: str | None = None
    payload_hash: str | None = None
    resolved: Resolved | None = None
    run_id: str | None = None
    timeout_ms: int | None = None
    queue_ms: float | None = None
    admission: Admission | None = None
    evictions: int = 0
    queued_before_ms: float = 0.0
    waited_before: tuple[str, ...] = ()
    """Of the times that it ran before and was ended to free memory."""
    retry_after_s: int | None = None
    told: Told | None = None
    result_json: bytes | None = None
    result_hash: str | None = None
    sandbox: Mapping[str, Any] | None = None
    refusal: BusError | None = None

    @classmethod
    def of_call(cls, call: Invocation) -> Self:
        return cls(
            call.request_id,
            call.timestamp_ms,
            call.received,
            _name(call.overlay),
            call.capability and _name(call.capability),
            call,
            call.caller,
            payload_hash=sha256_hex(call.payload_json),
        )

    @classmethod
    def of_request(cls, overlay: str, capability: str | None, caller: str | None) -> Self:
        """Of a request that could not be read, or was not."""
        name, part = _name(overlay), capability and _name(capability)
        return cls(new_request_id(), now_ms(), time.monotonic(), name, part, caller=caller)

    @property
    def deadline(self) -> float:
        """On the clock of `time.monotonic`; of a call without a timeout it has passed."""
        return self.received + (self.timeout_ms or 0) / 1000

    def keep_result(self, result_json: bytes | None) -> None:
        """The canonical bytes of what the overlay answered, None where it answered nothing that has them."""
        self.result_json = result_json
        self.result_hash = None if result_json is None else sha256_hex(result_json)

    def count_eviction(self) -> None:
        """It was ended to free memory, and may run again."""
        self.evictions += 1
        self.queued_before_ms = self.queue_ms or 0.0
        if self.admission is not None and self.admission.ticket is not None:
            self.waited_before += tuple(self.admission.ticket.waited_for)

    def refuse(self, refusal: BusError) -> Outcome:
        """The refusal as an outcome; the answer will carry its faults and its hint."""
        self.refusal = refusal
        if self.told is None and self.admission is not None and self.admission.ticket is not None:
            self.queue_ms = figure((time.monotonic() - self.admission.ticket.asked) * 1000)
        return Outcome(code=refusal.code, error=refusal.detail)

    def record(self, outcome: Outcome, environment_hash: str) -> Record:
        """The ledger's line, but for what the ledger itself gives it (seq, prev, hash)."""
        return {
            "type": self._type(),
            "timestamp_ms": self.timestamp_ms,
            **self.asked(environment_hash),
            "result_hash": self.result_hash,
            "ok": outcome.ok,
            "code": str(outcome.code),
            "error": _cut(_text(outcome.error)),
            "exit_code": _figure(outcome.exit_code),
            **self._measured(outcome),
            "cpu_ms": _figure(outcome.cpu_ms),
            "sandbox": self.sandbox,
            "prev_size": self.told.prev_size if self.told else None,
        }

    def asked(self, environment_hash: str) -> Record:
        """What is called, by whom, for what: known before anything runs."""
        call, manifest = self.call, self.resolved and self.resolved.manifest
        capability = self.resolved and self.resolved.capability
        return {
            "request_id": self.request_id,
            "run_id": self.run_id,
            "replay_of": call.replay_of.seq if call and call.replay_of else None,
            "caller": self.caller,
            "overlay": manifest.name if manifest else self.overlay,
            "version": manifest.version if manifest else None,
            "manifest_hash": manifest.manifest_hash if manifest else None,
            "code_hash": self.resolved.code_hash if self.resolved else None,
            "capability": capability.name if capability else self.capability,
            "phase": call.phase.value if call else None,
            "runner": capability.runner if capability else None,
            "session": call.session if call else None,
            "profile": call.profile if call else None,
            "seed": call.seed if call else None,
            "timeout_ms": self.timeout_ms,
            "deterministic": manifest.deterministic if manifest else None,
            "payload_hash": self.payload_hash,
            "environment_hash": environment_hash,
        }

    def stored(self, outcome: Outcome, redactor: Redactor) -> Record:
        """What a replay needs of a call beside its record: payload and result, without secrets."""
        if self.call is None:
            return {}
        result_json = self.result_json
        return {
            "payload": _stored(self.call.payload, self.call.payload_json, redactor),
            "result": None if result_json is None else _stored(outcome.result, result_json, redactor),
        }

    def answer(self, outcome: Outcome, record: Record, receipt: Receipt) -> Answer:
        provenance = {
            "seq": receipt.seq,
            "hash": receipt.hash,
            "tree_size": receipt.tree_size,
            "checkpoint": receipt.checkpoint,
            "run_id": self.run_id,
            "environment_hash": record["environment_hash"],
            "deterministic": record["deterministic"],
            "seed": record["seed"],
        }
        return self._answer(outcome, record, provenance)

    def unrecorded_answer(self, outcome: Outcome, error: LedgerError) -> Answer:
        """The answer to a call whose line could not be written: a refusal as it is, else 500 with what came of it."""
        if self.refusal:
            return self._answer(outcome, None, None)
        self.refusal = BusError(
            "ERR_LEDGER",
            f"the call ran and ended with {outcome.code}, and its ledger line could not be written: {error}",
            hint="The outcome is in this answer only. Free the disk or mend the permissions of the log folder.",
        )
        told = outcome._replace(code="ERR_LEDGER", error=self.refusal.detail, retryable=False, replied=False)
        return self._answer(told, None, None)._replace(http_status=500)

    def _answer(self, outcome: Outcome, record: Record | None, provenance: dict[str, Any] | None) -> Answer:
        known = CATALOGUE[Code.FAILED] if outcome.replied else entry(outcome.code)
        measured = record or self._measured(outcome)
        ok = outcome.ok
        body = {
            "ok": ok,
            "overlay": self.overlay,
            "capability": self.resolved.capability.name if self.resolved else self.capability,
            "phase": self.call.phase.value if self.call else None,
            "request_id": self.request_id,
            "run_id": self.run_id,
            "result": outcome.result,
            "error": None if ok else _text(outcome.error) or known.message,
            "code": str(outcome.code),
            "category": None if ok else known.category,
            "status": outcome.status,
            "message": None if ok else known.message,
            "detail": None if ok else _text(self._detail(outcome)),
            "hint": None if ok else outcome.hint or known.hint,
            "retryable": not ok and (known.retryable if outcome.retryable is None else outcome.retryable),
            "timestamp_ms": self.timestamp_ms,
            "duration_ms": measured["duration_ms"],
            "queue_ms": measured["queue_ms"],
            "admission": measured["admission"],
            "payload_hash": self.payload_hash,
            "result_hash": self.result_hash,
            "cost_cents": measured["cost_cents"],
            "side_effects": list(outcome.side_effects),
            "memory": measured["memory"],
            "sandbox": self.sandbox,
            "provenance": provenance,
        }
        if self.refusal:
            body["hint"] = self.refusal.hint
            if self.refusal.faults:
                body["faults"] = self.refusal.body()["faults"]
        http_status = 200 if ok or outcome.replied else known.http_status
        retry_after_s = self.refusal.retry_after_s if self.refusal else self.retry_after_s
        return Answer(http_status, body, orjson.dumps(body), record, retry_after_s)

    def _explained(self, admission: Admission) -> dict[str, Any]:
        """Why the call waited, behind how many, and what it reserved; nothing where it was refused at the door."""
        ticket, need = admission.ticket, admission.wish.need
        has_run = ticket is not None and ticket.started > 0
        return {
            "reserved_mb": figure(need.mb) if has_run else 0,
            "basis": need.basis,
            "waited_for": list(dict.fromkeys((*self.waited_before, *(ticket.waited_for if ticket else ())))),
            "ahead": 0 if ticket is None else ticket.ahead,
            "evictions": self.evictions,
        }

    def _type(self) -> str:
        if self.call and self.call.replay_of:
            return "replay"
        return "denied" if self.refusal and not self.told else "invoke"

    def _detail(self, outcome: Outcome) -> str | None:
        """Of a refusal its own; of an overlay's failure the end of its log, where the reason mostly stands."""
        return (not self.refusal and outcome.log.strip()) or outcome.error

    def _measured(self, outcome: Outcome) -> dict[str, Any]:
        """What record and answer say alike of time, cost and memory: as the overlay was told, and as it really was."""
        declared = self.resolved.capability.cost_cents if self.resolved and self.told else 0.0
        memory = None
        if self.told is not None:
            used = {"peak_mb": _figure(outcome.peak_mb), "peak_floor_mb": _figure(outcome.peak_floor_mb)}
            memory = {**self.told.memory, **used}
        return {
            "duration_ms": figure((time.monotonic() - self.received) * 1000),
            "queue_ms": self.queue_ms,
            "admission": None if self.admission is None else self._explained(self.admission),
            "cost_cents": figure(declared if outcome.cost_cents is None else outcome.cost_cents),
            "memory": memory,
        }


def _stored(value: Any, text: bytes, redactor: Redactor) -> Any:  # noqa: ANN401
    """A JSON value of which `text` is the canonical form, for a record."""
    return orjson.Fragment(canonical(redactor.json(value)) if redactor.occurs_in(text) else text)


def _figure(measured: float | None) -> float | None:
    return None if measured is None else figure(measured)


def _name(name: str) -> str:
    """What a caller called for, which may be no name at all, as a line can hold it."""
    return (_text(name) or "")[:_NAME_LIMIT]


def _text(text: str | None) -> str | None:
    """Text that can be written as UTF-8: what programs and services say may hold lone surrogates."""
    return text if not text or text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= _ERROR_LIMIT else text[: _ERROR_LIMIT - 1] + "…"
