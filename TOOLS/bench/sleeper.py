"""A program that is busy with nothing: it sleeps for the `sleep_s` of its payload, in seconds."""

import json
import sys
import time

sleep_s = json.load(sys.stdin)["payload"]["sleep_s"]
time.sleep(sleep_s)
print(json.dumps({"ok": True, "result": {"slept_s": sleep_s}}))
