import json
import sys

envelope = json.load(sys.stdin)
json.dump({"ok": True, "result": envelope}, sys.stdout, sort_keys=True)
