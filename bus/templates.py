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

Kind = Literal["proc", "worker", "http", "service"]
"""A program that runs for each call, one that runs for many, a service that runs by itself, one that the bus starts."""

GITIGNORE = """\
.aal/
logs/
__pycache__/
"""

_COUNT = '''\
def count(payload):
    """The result for one payload, or ValueError with words for the caller."""
    text = payload.get("text")
    if not isinstance(text, str):
        raise ValueError("the payload needs a text")
    return {"words": len(text.split()), "characters": len(text)}
'''
"""The work of every new overlay, in its one function that knows nothing of how it is called."""

_PROGRAM = Template('''\
"""${name}: one call. The bus writes an envelope to stdin; one JSON reply goes to stdout, logs go to stderr."""

import json
import sys


${count}

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

_WORKER = Template('''\
"""${name}: many calls, one process. Each line on stdin is an envelope; each gets one JSON line on stdout, which names
the envelope's request_id. Logs go to stderr. It ends when stdin does.
"""

import json
import sys


${count}

def answer(envelope):
    request_id = envelope["request_id"]
    try:
        return {"request_id": request_id, "ok": True, "result": count(envelope["payload"])}
    except ValueError as error:
        return {"request_id": request_id, "ok": False, "error": str(error), "code": "BAD_INPUT"}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
''')

_WORKER_TEST = Template('''\
"""Runs the overlay as the bus would: its manifest's command, in its folder, with one envelope after the other."""

import json
import subprocess
import unittest
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
COMMAND = json.loads((FOLDER / "manifest.json").read_text())["entrypoints"]["proc"]["command"]


class ${title}Test(unittest.TestCase):
    def setUp(self):
        self.worker = subprocess.Popen(
            [*COMMAND, "--stdin-json"], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.addCleanup(self.worker.communicate)

    def call(self, request_id, payload):
        envelope = {"request_id": request_id, "phase": "OPEN", "payload": payload}
        print(json.dumps(envelope), file=self.worker.stdin, flush=True)
        return json.loads(self.worker.stdout.readline())

    def test_one_process_answers_call_after_call(self):
        for request_id in ("first", "second"):
            reply = self.call(request_id, {"text": "two words"})
            self.assertEqual(reply, {"request_id": request_id, "ok": True, "result": {"words": 2, "characters": 9}})

    def test_says_what_is_missing_and_goes_on(self):
        reply = self.call("first", {})
        self.assertFalse(reply["ok"])
        self.assertIn("text", reply["error"])
        self.assertTrue(self.call("second", {"text": ""})["ok"])


if __name__ == "__main__":
    unittest.main()
''')

_SERVICE = Template('''\
"""${name}: a service. The bus POSTs an envelope; the answer's body is the reply.

It listens on the port in OVERLAY_PORT, which the bus sets where the manifest names a command and so has it started.
Else start it by hand, python3 service.py: it listens where the manifest's base_url says.
"""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

MANIFEST = Path(__file__).resolve().parent / "manifest.json"


${count}

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
    http = json.loads(MANIFEST.read_text())["entrypoints"]["http"]
    address = urlsplit(http.get("base_url", "http://127.0.0.1:0"))
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


_PROGRAMS: Mapping[Kind, tuple[str, Template, Template]] = {
    "proc": ("src/run.py", _PROGRAM, _PROGRAM_TEST),
    "worker": ("src/run.py", _WORKER, _WORKER_TEST),
    "http": ("service.py", _SERVICE, _SERVICE_TEST),
    "service": ("service.py", _SERVICE, _SERVICE_TEST),
}
"""The path of a new overlay's program, its text and that of its test."""


def overlay_files(name: str, kind: Kind, port: int) -> dict[str, str]:
    """The files of a new overlay by their path in its folder. `port` is that of a service that runs by itself."""
    names = {"name": name, "module": "_".join(_words(name)), "title": "".join(map(str.capitalize, _words(name)))}
    if not names["title"][0].isalpha():
        names["title"] = f"Overlay{names['title']}"
    path, program, test = _PROGRAMS[kind]
    return {
        "manifest.json": json.dumps(_manifest(name, kind, port), indent=2) + "\n",
        path: program.substitute(names, count=_COUNT),
        path_of_test(name): test.substitute(names),
    }


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
    runner, entrypoint = _entrypoint(kind, port)
    capability: dict[str, object] = {
        "runner": runner,
        "description": "Counts the words and characters of a text.",
        "timeout_s": 10,
        "input_schema": {
            "type": "object",
            "required": ["text"],
            "properties": {"text": {"type": "string"}},
        },
    }
    if runner == "http":
        capability["path"] = "/count"
    return {
        "name": name,
        "version": "0.1.0",
        "description": "Counts words; a start for an overlay of your own.",
        "phases": ["OPEN", "ALIGN", "CLEAR", "SEAL"],
        "permissions": ["analysis"],
        "entrypoints": {runner: entrypoint},
        "capabilities": {"count": capability},
        "policy": {"deterministic": True},
    }


def _entrypoint(kind: Kind, port: int) -> tuple[str, Mapping[str, object]]:
    """A capability's runner, and the entrypoint that it takes."""
    command = ["python3", _PROGRAMS[kind][0]]
    match kind:
        case "proc":
            return "proc", {"command": command}
        case "worker":
            return "proc", {"command": command, "mode": "worker"}
        case "http":
            return "http", {"base_url": f"http://127.0.0.1:{port}"}
        case "service":
            return "http", {"command": command}


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
