"""What a request brings: one JSON object of bounded size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from starlette.concurrency import run_in_threadpool

from aos_context.artifacts import finite
from aos_context.errors import MediaTypeError, RequestError, TooLargeError

if TYPE_CHECKING:
    from starlette.requests import Request

    from aos_context.artifacts import Document

LARGE_BYTES = 64 * 1024
"""From here on a body is parsed in a thread, so that others do not wait for it."""

READ_ON = 64
"""Of a body that is too large so many times its limit are read and dropped: a client that is still sending when the
connection closes might never see the answer."""


async def read_object(request: Request, limit_bytes: int) -> Document:
    """The body as one JSON object. Raises `MediaTypeError`, `TooLargeError`, `RequestError`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise MediaTypeError(f"the Content-Type is {request.headers.get('content-type', '')[:100]!r}")
    text = await _read(request, limit_bytes)
    return await run_in_threadpool(parse_object, text) if len(text) > LARGE_BYTES else parse_object(text)


def parse_object(text: bytes) -> Document:
    """Raises `RequestError` for what is not JSON as RFC 8259 has it, or has no UTF-8."""
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_not_json, parse_float=finite)
        if b"\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair has no UTF-8
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestError("the body must be one JSON object")
    return document


async def _read(request: Request, limit_bytes: int) -> bytes:
    pieces, size = [], 0
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared[:20]) > limit_bytes
    if not (too_large and "expect" in request.headers):  # else the client waits for leave to send
        async for piece in request.stream():
            size += len(piece)
            if size > READ_ON * limit_bytes:
                break
            if size <= limit_bytes:
                pieces.append(piece)
    if too_large or size > limit_bytes:
        has = f"{declared} bytes" if too_large else f"more than {limit_bytes} bytes"
        raise TooLargeError(f"the body has {has}; allowed: {limit_bytes}", limit_bytes=limit_bytes)
    return b"".join(pieces)


def _object(members: list[tuple[str, Any]]) -> Document:
    """Of two members of one name readers take different ones, so that there is none to be trusted."""
    document = dict(members)
    if len(document) != len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice[:100]!r} more than once")
    return document


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")
