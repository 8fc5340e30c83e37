"""The echo program as a worker: one JSON line in, one JSON line out that names its request, again and again."""

import json
import sys

for line in sys.stdin:
    envelope = json.loads(line)
    reply = {"request_id": envelope["request_id"], "ok": True, "result": envelope["payload"]}
    print(json.dumps(reply, separators=(",", ":")), flush=True)
