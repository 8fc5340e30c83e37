#!/usr/bin/env python3
"""Leaves a grandchild in a session of its own behind, which holds stdout and stderr and lives on."""

import json
import os
import signal

reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.write(writer, b"here")
    os.close(writer)
    while True:
        signal.pause()
os.read(reader, 20)
print(json.dumps({"ok": True, "result": "left"}), flush=True)
os._exit(0)
