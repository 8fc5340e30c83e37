"""A service that does what it is told to in a thread for each request."""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import deeds  # type: ignore[import-not-found]  # a copy stands beside it


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        envelope = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"ok": True, "result": deeds.do(envelope["payload"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent: `deeds.do` has said what was asked."""


ThreadingHTTPServer(("127.0.0.1", int(os.environ["OVERLAY_PORT"])), Handler).serve_forever()
