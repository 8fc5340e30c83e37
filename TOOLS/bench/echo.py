"""The echo program in Python: one JSON object in, its `payload` out (the whole object where it has none)."""

import json
import sys

document = json.load(sys.stdin)
reply = {"ok": True, "result": document.get("payload", document)}
sys.stdout.write(json.dumps(reply, separators=(",", ":")))
