"""How another process asks a server that runs for what only it can do.

A token is sent nowhere but to where the server of the folder is (`serving`), or to where the operator says.
"""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

from bus import serving
from bus.errors import CATALOGUE, BusError, OperatorError
from runners.base import JsonError, parse_json

if TYPE_CHECKING:
    from pathlib import Path

ANSWER_S = 30.0
"""Seconds for which an answer is waited for."""

_ANSWER_BYTES = 2**20


def address_of(state: Path) -> str:
    """The base URL of the server of a folder. Raises `OperatorError` (ERR_NO_SERVER) where none runs."""
    found = serving.find(state)
    if found is None:
        raise OperatorError("ERR_NO_SERVER", f"no server runs in {state.parent}")
    return found.address


def purge(base_url: str, overlay: str, token: str | None = None) -> dict[str, Any]:
    """Have the server tell an overlay to let go of its caches; its answer, `{"name", "told"}`.

    Raises `BusError`: the server's own refusal, or ERR_NO_SERVER where there is no answer of one.
    """
    return _post(f"{base_url.rstrip('/')}/overlays/{quote(overlay, safe='')}/purge", token)


def _post(url: str, token: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        request = Request(url, b"{}", headers)  # noqa: S310  # whoever may say the address may as well use curl
        with build_opener(ProxyHandler({})).open(request, timeout=ANSWER_S) as response:
            return _object(url, response.read(_ANSWER_BYTES))
    except HTTPError as refusal:
        with refusal:
            raise _refusal(url, refusal.read(_ANSWER_BYTES), refusal.code) from None
    except (URLError, http.client.HTTPException, OSError, ValueError) as error:
        why = error.reason if isinstance(error, URLError) else error
        raise OperatorError("ERR_NO_SERVER", f"no server answers at {url}: {why}") from None


def _object(url: str, body: bytes) -> dict[str, Any]:
    try:
        answer = parse_json(body)
    except JsonError as error:
        raise OperatorError("ERR_NO_SERVER", f"what answers at {url} is no server of this kind: {error}") from None
    if not isinstance(answer, dict):
        raise OperatorError("ERR_NO_SERVER", f"what answers at {url} is no server of this kind")
    return answer


def _refusal(url: str, body: bytes, status: int) -> BusError:
    said = _object(url, body)
    code, detail, hint = said.get("code"), said.get("detail"), said.get("hint")
    if code not in CATALOGUE or not isinstance(detail, str):
        return OperatorError("ERR_NO_SERVER", f"{url} answered HTTP {status}: {json.dumps(said)[:200]}")
    return OperatorError(code, detail, hint=hint if isinstance(hint, str) else None)
