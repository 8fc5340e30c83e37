"""Traces from a ledger: what calls took, taken for what they would have asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bus import provenance, runes
from bus.errors import BusError
from simulation.calls import Call, in_order

if TYPE_CHECKING:
    from pathlib import Path

    from bus.model import Record

LEAST_S, LEAST_MB = 0.001, 0.1
"""What a call is taken to have had at least, of time and of memory, where less was measured."""

DEFAULT_TIMEOUT_S = 30.0
"""The timeout of lines without one."""


class Recorded(NamedTuple):
    """The calls that were measured, and how many lines of calls were left out because nothing was."""

    calls: list[Call]
    left_out: int


def read(ledger: Path) -> Recorded:
    """The calls of a ledger.

    A line is a call where its peak was measured: it came at `timestamp_ms`, took its duration less its time in the
    queue, and declared what its memory block says. How it grew is not recorded; it is taken to be a ramp. The block has
    no priority and no VOL: those are of the named profile or of the rune that the caller gave, else 5 and MED. Raises
    `TraceError`, `OSError`, and `BrokenLineError` for a line that is none.
    """
    ledger.stat()  # a ledger that is not there yet reads as an empty one
    lines = [record for record in provenance.iter_lines(ledger) if record["type"] in {"invoke", "denied"}]
    measured = [record for record in lines if ((record.get("memory") or {}).get("peak_mb")) is not None]
    first_ms = min((record["timestamp_ms"] for record in measured), default=0)
    calls = in_order((_call(record, first_ms) for record in measured), str(ledger))
    return Recorded(calls, len(lines) - len(measured))


def _call(record: Record, first_ms: int) -> Call:
    memory = record["memory"]
    ran_s = (record["duration_ms"] - (record["queue_ms"] or 0)) / 1000
    timeout_ms = record["timeout_ms"]
    return Call(
        at_s=(record["timestamp_ms"] - first_ms) / 1000,
        overlay=record["overlay"],
        capability=record["capability"] or "",
        rune=_rune(record),
        hold_s=max(LEAST_S, ran_s),
        peak_mb=max(LEAST_MB, memory["peak_mb"]),
        timeout_s=DEFAULT_TIMEOUT_S if timeout_ms is None else timeout_ms / 1000,
        repeatable=bool(record["deterministic"]) or record["phase"] == "CLEAR",
    )


def _rune(record: Record) -> str:
    """The text of a profile with the SOFT and HARD of the line."""
    memory = record["memory"]
    for text in (record["profile"], memory["profile"]):
        if text is None:
            continue
        try:
            runes.resolve(text)
        except BusError:
            continue
        return str(text)
    return f"MEM[SOFT={memory['soft_mb']},HARD={memory['hard_mb']},VOL=MED]"
