"""The echo program in Python: one JSON object in, its `payload` out (the whole object where it has none).

It comes on stdin, or in the variable REQUEST_BODY from servers that give a program no stdin. CGI wants a header before
the answer (RFC 3875, 6.2).
"""

import json
import os
import sys

body = os.environ.get("REQUEST_BODY")
document = json.loads(sys.stdin.read() if body is None else body)
reply = {"ok": True, "result": document.get("payload", document)}
header = "Content-Type: application/json\n\n" if "GATEWAY_INTERFACE" in os.environ else ""
sys.stdout.write(header + json.dumps(reply, separators=(",", ":")))
