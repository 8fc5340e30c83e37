"""A recorded line run again through the same `Bus.invoke`, and the verdict on what came of it.

MATCH means the same outcome: the same code and, where there is one, the same result hash. DRIFT is another one; it has
its cause, and a difference between the results. FAILED says that the call never got as far as its overlay. What else
differs (manifest, code, environment) is told beside each verdict.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bus import policy, provenance
from bus.canonical import sha256_hex
from bus.codehash import TooLargeError, code_hash_under
from bus.drift import Difference, cause
from bus.envelopes import make_invocation
from bus.errors import BusError, ReplayError
from bus.model import ReplayOf, Told
from bus.records import BrokenLineError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    from bus.callers import Caller
    from bus.course import Answer
    from bus.dispatch import Bus
    from bus.drift import Cause, Control
    from bus.model import Invocation, Record

Verdict = Literal["MATCH", "DRIFT", "FAILED", "SKIPPED"]

_COMPARED = {
    "manifest": "manifest_hash",
    "code": "code_hash",
    "environment": "environment_hash",
}
_CUT_OFF = ("ERR_CANCELLED", "ERR_SHUTTING_DOWN", "ERR_EVICTED")
_MEASURED = ("peak_mb", "peak_floor_mb")
"""What a record's memory block has beside what the overlay was told."""

_KEPT = ("phase", "seed", "timeout_ms")


@dataclass(frozen=True, slots=True)
class Replay:
    """One line run again.

    `differs` names what is not as it was: result, manifest, code, environment, degradation. Of a DRIFT `difference` is
    that of the results, without secrets, where the line has its own, and `cause` what made it.
    """

    seq: int
    recorded: Record
    answer: Answer
    verdict: Literal["MATCH", "DRIFT", "FAILED"]
    differs: tuple[str, ...]
    difference: Difference | None = None
    cause: Cause | None = None

    @property
    def why(self) -> str:
        """The verdict's reason in a few words; empty for a MATCH of which nothing else differs."""
        if self.verdict == "FAILED" or (self.verdict == "DRIFT" and not self.answer.ok):
            return f"{self.answer.body['code']}: {self.answer.body['error']}"
        if self.verdict == "MATCH" or self.cause is None:
            return ", ".join(self.differs)
        return f"{self.cause} ({self.cause.why})"

    def judged(self, *, repeats: bool | None, control: Control | None) -> Replay:
        """With the cause as two experiments show it; see `drift.cause`."""
        declared = self.recorded["deterministic"] is True
        found = cause(self.differs, is_declared=declared, repeats=repeats, control=control)
        return replace(self, cause=found)

    def gives_as(self, other: Replay) -> bool:
        """Whether both ended with the same code and result."""
        return _came_of(self.answer.record) == _came_of(other.answer.record)

    def body(self) -> dict[str, Any]:
        """The replay for a program, as `schemas/replay.schema.json` has it."""
        difference = self.difference
        return {
            "seq": self.seq,
            "verdict": self.verdict,
            "differs": list(self.differs),
            "cause": self.cause and self.cause.body(),
            "diff": None if difference is None else [change.body() for change in difference.changes],
            "diff_is_cut": difference is not None and difference.is_cut,
            "recorded": {name: self.recorded[name] for name in ("code", "result_hash", *_COMPARED.values())},
            "outcome": self.answer.body,
        }


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one record of several. `why` is the reason of its verdict, empty for a plain MATCH."""

    record: Record
    verdict: Verdict
    why: str
    replay: Replay | None = None

    def body(self) -> dict[str, Any]:
        """The trial for a program: its replay, or the reason why there is none."""
        said = self.replay.body() if self.replay else {"seq": self.record["seq"], "reason": self.why}
        return said | {"verdict": self.verdict}


async def replay(bus: Bus, seq: int, *, live: bool = False, caller: Caller | None = None) -> Replay:
    """Run line `seq` again, for a known `caller` or for the operator.

    Raises `NotFoundError` where there is no such line, `BrokenLineError` where it was changed, `ReplayError` where
    its payload was not stored, nothing ran then, or running it again could change something and `live` was not said.
    """
    recorded = await asyncio.to_thread(provenance.read_line, bus.settings.ledger, seq)
    return await run_again(bus, recorded, live=live, caller=caller)


async def run_again(bus: Bus, recorded: Record, *, live: bool = False, caller: Caller | None = None) -> Replay:
    """Run a call again that a record of some ledger tells of.

    Raises as `replay`, and `CallerError` for a call that `caller` could not make.
    """
    call = invocation_of(recorded)
    if caller is not None:
        caller.require_call(call.overlay, call.phase)
        call = call._replace(caller=caller.name)
    if sha256_hex(call.payload_json) != recorded["payload_hash"]:  # only here, where the line is known to be whole
        detail = f"line {recorded['seq']} had a secret in its payload, which is not stored"
        raise ReplayError("ERR_NOT_REPLAYABLE", detail)
    resolved = bus.registry.resolve(call.overlay, call.capability)
    if not live and policy.replay_needs_consent(call.phase, deterministic=resolved.manifest.deterministic):
        raise ReplayError(
            "ERR_NEEDS_LIVE",
            f"line {recorded['seq']}: phase {call.phase} may write or exec, "
            f"and {call.overlay} is not declared deterministic",
        )
    answer = await bus.invoke(call, caller)
    differs = _differences(recorded, answer)
    if "code" in differs and "manifest" in differs:
        was_so = asyncio.to_thread(_is_code_as_recorded, resolved.manifest.folder, recorded)
        differs = tuple(one for one in differs if one != "code") if await was_so else differs
    if not _was_run(answer):
        return Replay(recorded["seq"], recorded, answer, "FAILED", differs)
    if "result" not in differs:
        return Replay(recorded["seq"], recorded, answer, "MATCH", differs)
    difference = await asyncio.to_thread(_difference, bus, recorded, answer)
    drifted = Replay(recorded["seq"], recorded, answer, "DRIFT", differs, difference)
    return drifted.judged(repeats=None, control=None)


async def try_all(
    records: Iterable[Record],
    attempt: Callable[[Record], Awaitable[Replay]],
    *,
    jobs: int,
    done: Callable[[Trial], object],
) -> None:
    """Try each record, `jobs` of them at once; `done` is told of each trial as it ends.

    Raises what makes all verdicts worthless: `BrokenLineError`.
    """
    waiting = iter(records)

    async def work() -> None:
        for record in waiting:
            done(await tried(record, attempt))

    workers = [asyncio.create_task(work()) for _ in range(jobs)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def tried(record: Record, attempt: Callable[[Record], Awaitable[Replay]]) -> Trial:
    """One record run again. Raises `BrokenLineError` that names the line, and no other `BusError`."""
    try:
        again = await attempt(record)
    except BrokenLineError as error:
        raise BrokenLineError(error.fault, f"line {record['seq']}: {error.detail}") from None
    except ReplayError as error:
        return Trial(record, "SKIPPED", error.detail)
    except BusError as error:
        return Trial(record, "FAILED", f"{error.code}: {error.detail}")
    return Trial(record, again.verdict, again.why, again)


def invocation_of(recorded: Record) -> Invocation:
    """The invocation that a record tells of. Raises `ReplayError` where it does not tell enough."""
    seq = recorded["seq"]
    _require_replayable(recorded)
    request = {"data": recorded["payload"], "profile": recorded["profile"]}
    request |= {name: recorded[name] for name in _KEPT}
    call = make_invocation(request, recorded["overlay"], recorded["capability"])
    told = Told(
        request_id=recorded["request_id"],
        run_id=recorded["run_id"],
        timestamp_ms=recorded["timestamp_ms"],
        prev_size=recorded["prev_size"],
        environment_hash=recorded["environment_hash"],
        memory={name: value for name, value in recorded["memory"].items() if name not in _MEASURED},
    )
    return call._replace(replay_of=ReplayOf(seq, told))


def _require_replayable(recorded: Record) -> None:
    seq = recorded["seq"]
    if recorded["type"] == "replay":
        original = recorded["replay_of"]
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} is itself a replay", hint=f"Replay line {original}.")
    if recorded["type"] == "started":
        hint = f"Replay the later line of type invoke with the request_id {recorded['request_id']}."
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} says that a call started, not what came of it", hint=hint)
    if recorded["type"] == "interrupted":
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} is of a call that was cut off; nobody knows its outcome")
    if recorded["type"] != "invoke":
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} is of type {recorded['type']}; no overlay ran")
    if "payload" not in recorded:
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} was written without its payload")
    if recorded["code"] in _CUT_OFF:
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} ended with {recorded['code']}; its overlay never finished")
    if recorded["memory"] is None:
        raise ReplayError("ERR_NOT_REPLAYABLE", f"line {seq} ended with {recorded['code']} before its overlay started")


def _was_run(answer: Answer) -> bool:
    """Whether the call got as far as its overlay, and its line could be written."""
    return answer.record is not None and answer.record["memory"] is not None


def _differences(recorded: Record, answer: Answer) -> tuple[str, ...]:
    again = answer.record
    if again is None:
        return ("result",)
    differs = [name for name, member in _COMPARED.items() if recorded[member] != again[member]]
    if "environment" not in differs and None not in (held := (_held(recorded), _held(again))) and held[0] != held[1]:
        differs.append("environment")
    if again["memory"] is not None and _applied(recorded) != _applied(again):
        differs.append("degradation")
    if _came_of(recorded) != _came_of(again):
        differs.insert(0, "result")
    return tuple(differs)


def _came_of(record: Record | None) -> tuple[str, str | None] | None:
    return None if record is None else (record["code"], record["result_hash"])


def _applied(record: Record) -> list[str]:
    return record["memory"]["applied"] if record["memory"] else []


def _held(record: Record) -> tuple[object, ...] | None:
    """What the kernel held the call to; None where nothing was started."""
    held = record["sandbox"]
    return held and (held["scope"], sorted(held["enforced"]))


def _is_code_as_recorded(folder: Path, recorded: Record) -> bool:
    """Whether of all that the code hash covers only the manifest has changed. Reads the folder."""
    try:
        return bool(code_hash_under(folder, recorded["manifest_hash"]) == recorded["code_hash"])
    except (OSError, TooLargeError):
        return False


def _difference(bus: Bus, recorded: Record, answer: Answer) -> Difference | None:
    """Between the results, where the line has its own. That was stored without secrets, so the new one has none."""
    if "result" not in recorded:
        return None
    return Difference.of(recorded["result"], bus.secrets.redactor.json(answer.body["result"]))
