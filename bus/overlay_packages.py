"""The packages that others wrote and an overlay brings along: what lies in its `.venv` and its `node_modules`.

The code hash leaves them out, and yet what keeps running from call to call has loaded them. They are told by the stamps
of a few places: a package manager that adds, replaces or takes away a package changes the folder that holds it, or the
lock file within. Who edits a file of an installed package by hand touches that folder, or the manifest.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from bus.codehash import Look, stamp_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def look(folder: str) -> Look:
    """The places that tell what an overlay in `folder` has installed; none where it has nothing."""
    began_ns = time.time_ns()
    return Look.of(tuple((path, stamp_of(path)) for path in _places(folder)), began_ns)


def _places(folder: str) -> Iterator[str]:
    """What is not there yet stands among them where it may come without a change of the overlay's own folder."""
    if os.path.lexists(f"{folder}/.venv"):  # a string all along: this runs for calls
        yield f"{folder}/.venv/pyvenv.cfg"
        pythons = _listed(f"{folder}/.venv/lib")
        yield from (f"{python}/site-packages" for python in pythons)
        if not pythons:
            yield f"{folder}/.venv/lib"
    if os.path.lexists(f"{folder}/node_modules"):
        yield f"{folder}/node_modules"
        yield f"{folder}/node_modules/.package-lock.json"


def _listed(folder: str) -> list[str]:
    """The interpreters that a `.venv/lib` holds packages for; empty where it cannot be listed."""
    try:
        with os.scandir(folder) as listing:
            return sorted(entry.path for entry in listing if entry.name.startswith(("python", "pypy")))
    except OSError:
        return []
