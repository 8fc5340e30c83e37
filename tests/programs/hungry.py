"""Takes memory: `{"mb": MiB, "in": "itself" | "child" | "grandchild" | "children", "hold": bool}`.

All pages are written to. With `hold` it keeps them until somebody ends it; else it answers at once.
"""

import json
import os
import signal
import sys


def take(mb: int) -> bytes:
    return b"\x01" * (mb << 20)


def hold() -> None:
    signal.pause()


def in_a_child(depth: int, mb: int, then_hold: bool) -> None:
    """The child says so when it has the memory, by closing the pipe that nobody else has."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        if depth > 1:
            in_a_child(depth - 1, mb, then_hold)
        else:
            taken = take(mb)
            os.write(writer, b"%d" % len(taken))
        os.close(writer)
        if then_hold:
            hold()
        os._exit(0)
    os.close(writer)
    os.read(reader, 16)
    os.close(reader)


payload = json.load(sys.stdin)["payload"]
kept = b""
if payload["in"] == "itself":
    kept = take(payload["mb"])
elif payload["in"] == "children":
    for _ in range(2):
        in_a_child(1, payload["mb"] // 2, payload["hold"])
else:
    in_a_child({"child": 1, "grandchild": 2}[payload["in"]], payload["mb"], payload["hold"])
if payload["hold"]:
    hold()
json.dump({"ok": True, "result": {"mb": len(kept) >> 20}}, sys.stdout)
