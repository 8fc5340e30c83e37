"""A recorded line run again through the same `Bus.invoke`, and the verdict on what came of it.

MATCH means the same outcome: the same code and, where there is one, the same result hash. What else differs (manifest,
code, environment) is told beside either verdict, because it is the first thing to ask of a DRIFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bus import policy, provenance
from bus.envelopes import make_invocation
from bus.errors import ReplayError
from bus.model import ReplayOf, Told

if TYPE_CHECKING:
    from bus.course import Answer
    from bus.dispatch import Bus
    from bus.model import Invocation, Record

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
    """One line run again. `differs` names what is not as it was: result, manifest, code, environment, degradation."""

    seq: int
    recorded: Record
    answer: Answer
    verdict: Literal["MATCH", "DRIFT"]
    differs: tuple[str, ...]

    def body(self) -> dict[str, Any]:
        """The replay for a program."""
        return {
            "seq": self.seq,
            "verdict": self.verdict,
            "differs": list(self.differs),
            "recorded": {name: self.recorded[name] for name in ("code", "result_hash", *_COMPARED.values())},
            "outcome": self.answer.body,
        }


async def replay(bus: Bus, seq: int, *, live: bool = False) -> Replay:
    """Run line `seq` again.

    Raises `NotFoundError` where there is no such line, `BrokenLineError` where it was changed, `ReplayError` where
    its payload was not stored, nothing ran then, or running it again could change something and `live` was not said.
    """
    recorded = provenance.read_line(bus.settings.ledger, seq)
    call = invocation_of(recorded)
    resolved = bus.registry.resolve(call.overlay, call.capability)
    if not live and policy.replay_needs_consent(resolved.manifest, call.phase):
        raise ReplayError(
            "ERR_NEEDS_LIVE",
            f"line {seq}: phase {call.phase} may write or exec, and {call.overlay} is not declared deterministic",
        )
    answer = await bus.invoke(call)
    differs = _differences(recorded, answer)
    return Replay(seq, recorded, answer, "DRIFT" if "result" in differs else "MATCH", differs)


def invocation_of(recorded: Record) -> Invocation:
    """The invocation that a record tells of. Raises `ReplayError` where it does not tell enough."""
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


def _differences(recorded: Record, answer: Answer) -> tuple[str, ...]:
    again = answer.record
    if again is None:
        return ("result",)
    differs = [name for name, member in _COMPARED.items() if recorded[member] != again[member]]
    if _applied(recorded) != _applied(again):
        differs.append("degradation")
    if (recorded["code"], recorded["result_hash"]) != (again["code"], again["result_hash"]):
        differs.insert(0, "result")
    return tuple(differs)


def _applied(record: Record) -> list[str]:
    return record["memory"]["applied"] if record["memory"] else []
