"""One call, one process."""

from __future__ import annotations

import json
import sys

import deeds  # type: ignore[import-not-found]  # a copy stands beside it

print(json.dumps({"ok": True, "result": deeds.do(json.load(sys.stdin)["payload"])}))
