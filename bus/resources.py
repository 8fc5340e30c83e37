"""Where the files that ship with the bus lie: beside `bus/` in a checkout, in `bus/share/` once installed."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path

import orjson

_PACKAGE = Path(__file__).resolve().parent


@cache
def path(name: str) -> Path:
    """The path of a shipped file or folder, as `schemas/manifest.schema.json`. Raises `FileNotFoundError`."""
    for root in (_PACKAGE / "share", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{name} is missing from this installation of aal-core")


@cache
def load_json(name: str) -> dict[str, object]:
    """A shipped JSON file, read once. Treat it as read-only."""
    loaded: dict[str, object] = orjson.loads(path(name).read_bytes())
    return loaded


@cache
def version() -> str:
    """The installed version; a checkout that was never installed says so."""
    try:
        return metadata.version("aal-core")
    except metadata.PackageNotFoundError:
        return "0+uninstalled"
