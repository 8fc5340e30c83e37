#!/usr/bin/env python3
"""Run recorded lines of the ledger again: `python3 TOOLS/replay.py 1`. The same as `aal replay`, with its options.

Works from a checkout that was never installed. A Python without the dependencies hands over to the checkout's `.venv`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def main() -> None:
    """Hand the arguments to `aal replay`. Exits as that does: 0 MATCH, 1 DRIFT, 2 usage, 3 not replayable, 4 broken."""
    sys.path.insert(0, str(ROOT))
    try:
        import bus.local  # noqa: F401, PLC0415  # all that replaying needs; found only with ROOT on the path
        from bus.cli import main as aal  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        hand_over(missing)
    else:
        aal(["replay", *sys.argv[1:]])


def hand_over(missing: ModuleNotFoundError) -> None:
    """Start again in the checkout's own environment, or say what is missing."""
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(python, [str(python), *sys.argv])
    sys.exit(f"replay.py: {missing}. Install the bus first: python3 -m pip install {ROOT}")


if __name__ == "__main__":
    main()
