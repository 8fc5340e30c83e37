"""What every endpoint reads and answers with: query strings, and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response

from bus.errors import RequestError
from bus.schemas import show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DIGITS_MOST = 16


class JsonResponse(Response):
    """JSON by orjson, with a line's end for people at a terminal."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


class Query:
    """Reads a query string; everything wrong in it is ERR_BAD_QUERY."""

    def __init__(self, params: Mapping[str, str]) -> None:
        self._params = params
        self._known: list[str] = []

    def text(self, name: str) -> str | None:
        self._known.append(name)
        return self._params.get(name)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:  # noqa: ANN401
        raw = self.text(name)
        if raw is None:
            return default
        if not (is_number(raw) and low <= int(raw) <= high):
            raise RequestError("ERR_BAD_QUERY", f"{name}={show(raw)}, allowed: a whole number, {low} to {high}")
        return int(raw)

    def boolean(self, name: str) -> bool | None:
        raw = self.text(name)
        if raw is None:
            return None
        if raw.lower() not in {"true", "false", "1", "0"}:
            raise RequestError("ERR_BAD_QUERY", f"{name}={show(raw)}, allowed: true or false")
        return raw.lower() in {"true", "1"}

    def one_of(self, name: str, allowed: Sequence[str]) -> str | None:
        raw = self.text(name)
        if raw is not None and raw not in allowed:
            raise RequestError("ERR_BAD_QUERY", f"{name}={show(raw)}, allowed: {', '.join(allowed)}")
        return raw

    def members(self, name: str, allowed: Sequence[str]) -> Sequence[str]:
        """Some of `allowed`, separated by commas; all of them by default."""
        raw = self.text(name)
        if raw is None:
            return allowed
        found = raw.split(",")
        if unknown := [member for member in found if member not in allowed]:
            raise RequestError("ERR_BAD_QUERY", f"{name} has {show(unknown)}, allowed: {', '.join(allowed)}")
        return found

    def refuse_unknown(self) -> None:
        if unknown := [name for name in self._params if name not in self._known]:
            raise RequestError("ERR_BAD_QUERY", f"unknown: {show(unknown)}; known: {', '.join(self._known)}")


def is_number(text: str) -> bool:
    """Whether `int` reads it, and quickly."""
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MOST
