#!/usr/bin/env python3
"""A friendly program: reads the envelope and does what its payload says under `do`.

    echo    the whole payload, as a protocol reply        bare    the payload itself, without a protocol around it
    fail    a reply with ok: false                        text    the payload's `text` as it is, which may be no JSON
    flood   `size` bytes that are no JSON                 hang    never answers

Where the payload has `started`, the path of a FIFO, it writes a line there first.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path


def announce(payload: dict[str, object]) -> None:
    """Tell whoever reads the FIFO that the work has begun."""
    if "started" in payload:
        Path(str(payload["started"])).write_text("started\n", "utf-8")


def answer(payload: dict[str, object]) -> str | None:
    """The text to write for a payload; None for `hang`."""
    match payload.get("do", "echo"):
        case "hang":
            return None
        case "text":
            return str(payload["text"])
        case "flood":
            return "x" * int(str(payload["size"]))
        case "bare":
            return json.dumps(payload, ensure_ascii=False)
        case "fail":
            return json.dumps({"ok": False, "error": "it did not work", "code": "ERR_OF_ITS_OWN"})
        case _:
            return json.dumps({"ok": True, "result": payload}, ensure_ascii=False)


def main() -> None:
    payload = json.loads(sys.stdin.buffer.read())["payload"]
    announce(payload)
    text = answer(payload)
    while text is None:
        signal.pause()
    sys.stdout.buffer.write(text.encode("utf-8"))


if __name__ == "__main__":
    main()
