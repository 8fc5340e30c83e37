"""What nobody waits for: closed segments are compressed, and the index takes in new lines.

A thread of its own does it, as slowly as the kernel likes to let it, from time to time: no call and no group of lines
is behind it. Several processes may have one; the files' own locks let one of them work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING

from bus.index import index_of
from bus.segments import compress

if TYPE_CHECKING:
    from pathlib import Path

PERIOD_S = 5.0
"""How long it waits between two looks."""

_NICENESS = 15
_LINES, _PAUSE_S = 4096, 0.05
"""How many lines the index takes in at once, in some 40 ms, and the pause behind, in which calls get on."""

_log = logging.getLogger(__name__)


class Upkeep:
    """Of the ledger at `path`, from `open` to `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Begin, with the first look after a period: a process of one call is over by then."""
        self._over.clear()
        self._thread = threading.Thread(target=self._run, name="ledger upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop what is under way, which the next one begins again. Blocks for some milliseconds."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def look(self) -> None:
        """Do what there is to do. Never fails: the next look tries again."""
        try:
            compress(self._path, self._over.is_set)
            self._index()
        except Exception as error:  # noqa: BLE001  # the ledger is whole without it
            _log.warning("the closed segments of %s are not compressed, or not indexed: %s", self._path, error)

    def _index(self) -> None:
        index = index_of(self._path)
        held = -1
        while index is not None and not self._over.is_set():
            before, held = held, index.refresh(most_lines=_LINES)
            if held <= before or held == 0 or self._over.wait(_PAUSE_S):
                return

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # Linux: of this thread alone
        while not self._over.wait(PERIOD_S):
            self.look()
