"""The files that `aal init` and `aal overlays new` write. Standard library only in what an overlay gets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bus.settings import Row

Kind = Literal["proc", "http"]

GITIGNORE = """\
.aal/
logs/
__pycache__/
"""

_PROGRAM = Template('''\
"""${name}: one call. The bus writes an envelope to stdin; one JSON reply goes to stdout, logs go to stderr."""

import json
import sys


def count(payload):
    """The result for one payload, or ValueError with words for the caller."""
    text = payload.get("text")
    if not isinstance(text, str):
        raise ValueError("the payload needs a text")
    return {"words": len(text.split()), "characters": len(text)}


def answer(envelope):
    try:
        return {"ok": True, "result": count(envelope["payload"])}
    except ValueError as error:
        return {"ok": False, "error": str(error), "code": "BAD_INPUT"}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
''')

_PROGRAM_TEST = Template('''\
"""Runs the overlay as the bus would: its manifest's command, in its folder, with an envelope on stdin."""

import json
import subprocess
import unittest
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
COMMAND = json.loads((FOLDER / "manifest.json").read_text())["entrypoints"]["proc"]["command"]


def call(payload):
    envelope = json.dumps({"phase": "OPEN", "payload": payload})
    ran = subprocess.run(
        [*COMMAND, "--stdin-json"], cwd=FOLDER, input=envelope, capture_output=True, text=True, check=True
    )
    return json.loads(ran.stdout)


class ${title}Test(unittest.TestCase):
    def test_counts_the_words_of_a_text(self):
        self.assertEqual(call({"text": "two words"}), {"ok": True, "result": {"words": 2, "characters": 9}})

    def test_says_what_is_missing(self):
        reply = call({})
        self.assertFalse(reply["ok"])
        self.assertIn("text", reply["error"])


if __name__ == "__main__":
    unittest.main()
''')

_SERVICE = Template('''\
"""${name}: a service. The bus POSTs an envelope; the answer's body is the reply. Start it: python3 service.py

It listens where the manifest's base_url says, or on the port in OVERLAY_PORT.
"""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

MANIFEST = Path(__file__).resolve().parent / "manifest.json"


def count(payload):
    """The result for one payload, or ValueError with words for the caller."""
    text = payload.get("text")
    if not isinstance(text, str):
        raise ValueError("the payload needs a text")
    return {"words": len(text.split()), "characters": len(text)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/count":
            self.reply(404, {"ok": False, "error": f"nothing at {self.path}", "code": "NO_SUCH_PATH"})
            return
        try:
            self.reply(200, {"ok": True, "result": count(json.loads(body)["payload"])})
        except (ValueError, KeyError) as error:
            self.reply(400, {"ok": False, "error": str(error), "code": "BAD_INPUT"})

    def reply(self, status, reply):
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Silent: the bus keeps the record of every call."""


def serve(host, port):
    """A server that listens already; port 0 takes a free one."""
    return ThreadingHTTPServer((host, port), Handler)


if __name__ == "__main__":
    address = urlsplit(json.loads(MANIFEST.read_text())["entrypoints"]["http"]["base_url"])
    server = serve(address.hostname, int(os.environ.get("OVERLAY_PORT", address.port)))
    print("${name} listens on http://{}:{}".format(*server.server_address), flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
''')

_SERVICE_TEST = Template('''\
"""Starts the service on a free port and calls it as the bus would."""

import http.client
import importlib.util
import json
import threading
import unittest
from pathlib import Path

SERVICE = Path(__file__).resolve().parent.parent / "service.py"
spec = importlib.util.spec_from_file_location("${module}_service", SERVICE)
service = importlib.util.module_from_spec(spec)
spec.loader.exec_module(service)


class ${title}Test(unittest.TestCase):
    def setUp(self):
        server = service.serve("127.0.0.1", 0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(server.shutdown)
        self.port = server.server_port

    def call(self, payload):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/count", json.dumps({"phase": "OPEN", "payload": payload}))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def test_counts_the_words_of_a_text(self):
        self.assertEqual(self.call({"text": "two words"}), {"ok": True, "result": {"words": 2, "characters": 9}})

    def test_says_what_is_missing(self):
        reply = self.call({})
        self.assertFalse(reply["ok"])
        self.assertIn("text", reply["error"])


if __name__ == "__main__":
    unittest.main()
''')


def overlay_files(name: str, kind: Kind, port: int) -> dict[str, str]:
    """The files of a new overlay by their path in its folder. `port` is that of a service."""
    names = {"name": name, "module": "_".join(_words(name)), "title": "".join(map(str.capitalize, _words(name)))}
    if not names["title"][0].isalpha():
        names["title"] = f"Overlay{names['title']}"
    programs = (
        {"src/run.py": _PROGRAM, path_of_test(name): _PROGRAM_TEST}
        if kind == "proc"
        else {"service.py": _SERVICE, path_of_test(name): _SERVICE_TEST}
    )
    manifest = json.dumps(_manifest(name, kind, port), indent=2) + "\n"
    return {"manifest.json": manifest} | {path: text.substitute(names) for path, text in programs.items()}


def path_of_test(name: str) -> str:
    """Where the test of a new overlay lies in its folder."""
    return f"tests/test_{'_'.join(_words(name))}.py"


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name)


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts to their paths in a folder. Raises `OSError`."""
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")


def _manifest(name: str, kind: Kind, port: int) -> Mapping[str, object]:
    capability: dict[str, object] = {
        "runner": kind,
        "description": "Counts the words and characters of a text.",
        "timeout_s": 10,
        "input_schema": {
            "type": "object",
            "required": ["text"],
            "properties": {"text": {"type": "string"}},
        },
    }
    entrypoint: dict[str, object] = {"command": ["python3", "src/run.py"]}
    if kind == "http":
        capability["path"] = "/count"
        entrypoint = {"base_url": f"http://127.0.0.1:{port}"}
    return {
        "name": name,
        "version": "0.1.0",
        "description": "Counts words; a start for an overlay of your own.",
        "phases": ["OPEN", "ALIGN", "CLEAR", "SEAL"],
        "permissions": ["analysis"],
        "entrypoints": {kind: entrypoint},
        "capabilities": {"count": capability},
        "policy": {"deterministic": True},
    }


def settings_file(rows: Iterable[Row]) -> str:
    """`aal.toml` with every setting commented out at its default."""
    head = (
        "# Settings of this folder. Every value here is the default; AAL_* variables and options win over this file.\n"
    )
    return head + "".join(f"\n# {_about(row)}\n# {row.name} = {_toml(row.default)}\n" for row in rows)


def _about(row: Row) -> str:
    return f"{row.help} ({row.allowed})" if row.allowed else row.help


def _toml(value: object) -> str:
    """A default as TOML: JSON's texts, numbers and booleans are TOML's too."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
