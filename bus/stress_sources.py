"""The sources of stress that plug-ins bring: each is asked in a thread, so that a slow one delays no call.

A thread an ask, not one that stays: there is nothing to end, and a source that never answers keeps no process from
ending, as a thread of the loop's pool would.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Source = Callable[[], float | None]

log = logging.getLogger(__name__)

STALE_S = 5.0
"""How long a source may take for an answer, in seconds; until then its last one counts, and from then on none."""


class PluggedSource:
    """A source of a plug-in, its last answer, and the thread that waits for the next. Asked by one thread only.

    Whatever it raises is logged once, and it has nothing to say then. `clock` is monotonic, in seconds.
    """

    def __init__(self, name: str, read: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._read = read
        self._clock = clock
        self._asked = 0.0
        self._answer: float | None = None
        self._thread: threading.Thread | None = None
        self._complained: set[str] = set()

    @property
    def value(self) -> float | None:
        """0.0 to 1.0, or None where it has nothing to say, or has not said anything for too long."""
        if self._is_asked() and self._clock() - self._asked > STALE_S:
            self._complain("takes too long to answer")
            return None
        return self._answer

    def ask(self) -> None:
        """Have it asked, unless it has yet to answer."""
        if self._is_asked():
            return
        self._asked = self._clock()
        thread = threading.Thread(target=self._run, name=f"stress source {self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread to be had
            self._answer = None
            self._complain("could not be asked")
        else:
            self._thread = thread

    def wait(self, patience_s: float) -> None:
        """Wait for its answer, until so long after it was asked."""
        if self._thread is not None:
            self._thread.join(max(0.0, self._asked + patience_s - self._clock()))

    def _is_asked(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._answer = within_unit(self._read())
        except Exception:
            self._answer = None
            if self._is_first("failed"):
                log.exception(
                    "the stress source %r failed and does not count; further failures are not logged", self.name
                )

    def _complain(self, what: str) -> None:
        if self._is_first(what):
            log.warning("the stress source %r %s and does not count; this is not logged again", self.name, what)

    def _is_first(self, what: str) -> bool:
        is_first = what not in self._complained
        self._complained.add(what)
        return is_first


def within_unit(value: float | None) -> float | None:
    """A figure bent into 0.0 to 1.0. Raises `ValueError` for NaN, `TypeError` for what is no number."""
    if value is None:
        return None
    if math.isnan(value):
        raise ValueError("NaN is no stress")
    return min(1.0, max(0.0, float(value)))
