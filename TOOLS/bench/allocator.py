"""Takes so much memory for so long, as a program does that reads a document and then waits for a model: really takes.

The payload is `{"mb": MiB, "hold_s": seconds}`. All pages are written to, piece by piece, and then held.
"""

import json
import sys
import time

PIECE_MB = 8

payload = json.load(sys.stdin)["payload"]
pieces = []
left_mb = payload["mb"]
while left_mb > 0:
    pieces.append(b"\x01" * (min(PIECE_MB, left_mb) << 20))
    left_mb -= PIECE_MB
time.sleep(payload["hold_s"])
json.dump({"ok": True, "result": {"mb": sum(map(len, pieces)) >> 20}}, sys.stdout)
