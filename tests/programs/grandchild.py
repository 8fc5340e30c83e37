#!/usr/bin/env python3
"""Leaves a grandchild in a session of its own behind, which holds stdout and stderr and lives on; says its pid."""

import json
import os
import signal

reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.write(writer, str(os.getpid()).encode())
    os.close(writer)
    while True:
        signal.pause()
pid = int(os.read(reader, 20))
print(json.dumps({"ok": True, "result": {"survivor": pid}}), flush=True)
os._exit(0)
