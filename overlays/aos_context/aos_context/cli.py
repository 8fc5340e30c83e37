"""`python -m aos_context.cli`: play a demo, serve, look at runs, pack and load them, check a pack against a ledger.

This file and what it imports need the standard library only, so that it can say what is missing; `commands` does the
work.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from aos_context.config import DEFAULT_CONFIG

NEEDED = ("jsonschema_rs", "starlette", "uvicorn")
PIP = "pip install -r requirements.txt"
DEFAULT_PORT = 8000
LARGEST_PORT = 2**16 - 1


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for what failed or is not as it should be, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    missing = [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"aos_context needs {', '.join(missing)}, which {sys.executable} does not have: {PIP}\n")
        return 1
    from aos_context import commands  # noqa: PLC0415  # it needs them

    return commands.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m aos_context.cli", description="Context management for agents.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _with_root(commands.add_parser("demo", help="play the whole flow, and say what happens"))
    _add_serve(commands.add_parser("serve", help="serve the HTTP API and the web page"))

    verify = commands.add_parser("verify", help="check a resume pack against the ledger of the bus")
    verify.add_argument("pack", type=Path, metavar="PACK", help="a zip or a folder")
    verify.add_argument("--ledger", type=Path, required=True, metavar="FILE", help="provenance.jsonl, or its folder")
    verify.add_argument("--manifest-sha256", metavar="HEX", help="of the pack's manifest, as snapshot answered it")
    verify.add_argument(
        "--root", type=Path, metavar="FOLDER", help="of the runs, where the pack was made; else its place"
    )
    verify.add_argument("--allow-unrecorded", action="store_true", help="memory may be committed without a bus")
    verify.add_argument("--strict", action="store_true", help="what is open stands against the pack, too")
    _with_json(verify)

    _with_json(_with_root(commands.add_parser("runs", help="list the runs")))

    brief = _with_root(commands.add_parser("brief", help="print the brief of a run"))
    brief.add_argument("run", metavar="RUN")
    brief.add_argument("--budget", type=int, metavar="TOKENS", help=f"default: {DEFAULT_CONFIG.brief_max_tokens}")
    brief.add_argument("--query", metavar="WORDS", help="what to look for in memory; the objective where left out")

    check = _with_root(commands.add_parser("check", help="look whether all of a run is what was written"))
    check.add_argument("run", metavar="RUN")

    snapshot = _with_root(commands.add_parser("snapshot", help="make a resume pack of a run"))
    snapshot.add_argument("run", metavar="RUN")
    snapshot.add_argument("--folder", action="store_true", help="a folder, and not a zip")

    load = _with_root(commands.add_parser("load", help="go on from a resume pack, from wherever it lies"))
    load.add_argument("pack", type=Path, metavar="PACK", help="a zip or a folder")
    load.add_argument("--run-id", metavar="RUN", help="its own where that is free, else a new one, where left out")
    return parser


def _add_serve(serve: argparse.ArgumentParser) -> None:
    _with_root(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=DEFAULT_PORT, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--testing", action="store_true", help="honour allow_outside_milestone (AOS_CONTEXT_TESTING)")


def _port(text: str) -> int:
    """Raises `argparse.ArgumentTypeError`."""
    if not (text.isascii() and text.isdecimal() and int(text[:10]) <= LARGEST_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; allowed: 0 to {LARGEST_PORT}")
    return int(text)


def _with_root(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    words = "the folder of runs (default: AOS_CONTEXT_ROOT, else OVERLAY_STATE, else ./runs)"
    parser.add_argument("--root", type=Path, metavar="FOLDER", help=words)
    return parser


def _with_json(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--json", action="store_true", help="one JSON document, for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
