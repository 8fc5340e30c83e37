"""How an attempt is made, and what is told of it: `{"done": ...}`, `{"errno": "EACCES"}` or `{"nothing": why}`."""

from __future__ import annotations

import errno
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Facts = Mapping[str, Any]
    """What an attempt is told of the machine: paths, ports, process ids."""

    Attempt = Callable[[Facts], Any]


class NothingGainedError(Exception):
    """The attempt was not refused, and yet brought nothing. Its text says what was found instead."""


def tell(attempt: Attempt) -> None:
    """Make the attempt once, as a program of one call."""
    print(json.dumps(outcome(attempt, json.load(sys.stdin)["payload"])))


def serve(attempt: Attempt) -> None:
    """Make it once for each line, as a worker."""
    for line in sys.stdin:
        request = json.loads(line)
        result = outcome(attempt, request["payload"])
        print(json.dumps({"ok": True, "request_id": request["request_id"], "result": result}), flush=True)


def outcome(attempt: Attempt, facts: Facts) -> dict[str, Any]:
    try:
        return {"done": attempt(facts)}
    except NothingGainedError as error:
        return {"nothing": str(error)}
    except OSError as error:
        return {"errno": errno.errorcode.get(error.errno or 0, str(error.errno)), "said": str(error)}
