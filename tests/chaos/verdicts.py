"""Whether what came of a round is what the bus promises. Each function yields what is wrong, in words for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from bus import provenance, verification
from bus.errors import OperatorError
from bus.records import CALL_TYPES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from tests.chaos.clients import Call

LOST = frozenset({"ERR_OVERLAY_CRASH", "ERR_OVERLAY_START"})
"""What a call may come to when its helper is killed."""

ENDED = LOST | {"ERR_SHUTTING_DOWN"}
"""What it may come to when the bus was told to end."""

_SAME = ("ok", "code", "request_id", "run_id", "overlay", "capability", "phase", "payload_hash", "result_hash")
"""What an answer and its line both say."""


def of_call(call: Call, strike: Collection[str]) -> Iterator[str]:
    """`strike`: what was killed in its round. A bus that is asked to end answers what it was asked before."""
    what = f"{call.order.overlay.name}, to {call.order.deed.name},"
    if call.end == "cut" and (not call.told or (call.sent and "bus" not in strike)):
        yield f"{what} got no answer: {call.error}"
    if call.end != "answered":
        return
    allowed = call.order.deed.codes | (ENDED if call.told else LOST if strike else frozenset())
    if call.code not in allowed:
        yield f"{what} came to {call.code}: {call.body.get('error')} ({call.body.get('detail')})"
    elif call.code == "OK" and call.body["result"] != call.order.nonce:
        yield f"{what} was answered with {call.body['result']!r}, the result of another call"


def of_line(call: Call, lines: Mapping[int, Any]) -> Iterator[str]:
    """Whether an answer is exactly what the ledger's line says. `lines`: by their numbers."""
    told = call.body.get("provenance")
    if told is None:
        yield f"an answer ({call.code}) names no line"
        return
    line = lines.get(told["seq"])
    if line is None:
        yield f"line {told['seq']}, named in an answer, is not in the ledger"
        return
    same = {name: (call.body[name], line[name]) for name in _SAME} | {"hash": (told["hash"], line["hash"])}
    for name, (said, written) in same.items():
        if said != written:
            yield f"line {told['seq']} has {name} {written!r}, its answer {said!r}"


def of_starts(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """After the next start, whether each call that started is closed by one line: its own, or an interrupted one."""
    lines = list(lines)
    ended = Counter(line["request_id"] for line in lines if line["type"] in CALL_TYPES)
    interrupted = Counter(line["started"] for line in lines if line["type"] == "interrupted")
    for line in lines:
        if line["type"] != "started":
            continue
        closed = ended[line["request_id"]] + interrupted[line["seq"]]
        if closed != 1:
            yield f"{closed} lines close the call that started in line {line['seq']}"


def of_ledger(path: Path, start: int, calls: Iterable[Call]) -> Iterator[str]:
    """Whether the whole ledger verifies, and holds from line `start` on what was answered."""
    report = verification.verify(path)
    if not report.ok:
        yield f"line {report.first_bad} of the ledger is bad: {report.reason}"
    try:
        lines = {line["seq"]: line for line in provenance.iter_lines(path, start)}
    except OperatorError as error:
        yield f"the ledger cannot be read: {error}"
        return
    yield from of_starts(lines.values())
    answered = [call for call in calls if call.end == "answered"]
    for call in answered:
        yield from of_line(call, lines)
    if len({call.body["request_id"] for call in answered}) != len(answered):
        yield "two answers have one request_id"
