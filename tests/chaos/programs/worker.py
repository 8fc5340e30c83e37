"""Many calls, one process: each line on stdin is an envelope, each gets a line."""

from __future__ import annotations

import json
import sys

import deeds  # type: ignore[import-not-found]  # a copy stands beside it

for line in sys.stdin:
    call = json.loads(line)
    reply = {"request_id": call["request_id"], "ok": True, "result": deeds.do(call["payload"])}
    print(json.dumps(reply), flush=True)
