#!/usr/bin/env python3
"""A worker: answers each line with a line, and does what the payload says under `do`.

    echo    the payload, as a protocol reply          fail    a reply with ok: false
    pid     its process id, by `result` alone         text    the payload's `text` as it is, and nothing more
    hang    never answers, and dies of TERM
    grow    takes `mb` of memory, and keeps it        swell   the same, and never answers
    breed   a child takes them, and neither answers   flood   `size` bytes without an end
    exit    ends with `status` and no reply           last    answers at some `size`, and ends
    twice   answers two times                         mute    closes its stdout, and stays
    wait    answers once the FIFO `gate` is opened    leave   answers, and ends once that is
    deaf    closes its stdin, answers, and stays      purges  how often it was told to let go of what it keeps
    rude    the payload, and from now on answers a purge, too

Where the payload has `log` it writes that to stderr first; where it has `started`, the path of a FIFO, a line there.
"""

from __future__ import annotations

import json
import os
import signal
import sys

TYPE_CHECKING = False  # typing and pathlib are slow to import, and many tests start this program
if TYPE_CHECKING:
    from typing import Any

kept: list[bytes] = []
purges: list[str] = []
"""What it said to each."""

rude = [""]


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def answer(call: dict[str, Any], **members: Any) -> str:
    return json.dumps({"request_id": call["request_id"], **members}, ensure_ascii=False) + "\n"


def grow(how: str, mb: int) -> None:
    if how == "breed" and os.fork():
        signal.pause()
    kept.append(b"x" * (mb * 2**20))
    if how != "grow":
        signal.pause()


def work(call: dict[str, Any]) -> None:
    payload = call["payload"]
    echo = answer(call, ok=True, result=payload)
    match payload.get("do", "echo"):
        case "fail":
            write(answer(call, ok=False, error="it did not work", code="ERR_OF_ITS_OWN"))
        case "pid":
            write(answer(call, result=os.getpid()))
        case "text":
            write(payload["text"])
        case "hang":
            signal.pause()
        case "grow" | "swell" | "breed" as how:
            grow(how, payload["mb"])
            write(echo)
        case "flood":
            write("x" * payload["size"])
        case "exit":
            os._exit(payload["status"])
        case "last":
            write(answer(call, result=os.getpid(), pad="x" * payload.get("size", 0)))
            os._exit(0)
        case "twice":
            write(echo + echo)
        case "purges":
            write(answer(call, result=len(purges)))
        case how:
            work_oddly(how, payload, echo)


def work_oddly(how: str, payload: dict[str, Any], echo: str) -> None:
    """What is odd about it is not its reply."""
    if how in ("deaf", "mute"):
        os.close(0 if how == "deaf" else 1)
    if how == "mute":
        signal.pause()
    if how == "rude":
        rude[0] = '{"ok": true}\n'
    if how != "leave" and "gate" in payload:
        gate(payload)
    write(echo)
    if how == "leave":
        gate(payload)
        os._exit(0)
    if how == "deaf":
        signal.pause()


def gate(payload: dict[str, Any]) -> None:
    """Wait until somebody opens the FIFO to write."""
    os.close(os.open(payload["gate"], os.O_RDONLY))


def purge() -> None:
    kept.clear()
    purges.append(rude[0])
    write(rude[0])


def main() -> None:
    for line in sys.stdin:
        call = json.loads(line)
        if call.get("event") == "purge":
            purge()
            continue
        payload = call["payload"]
        sys.stderr.write(payload.get("log", ""))
        sys.stderr.flush()
        if "started" in payload:
            with open(payload["started"], "w") as file:  # noqa: PTH123
                file.write("started\n")
        work(call)


if __name__ == "__main__":
    main()
