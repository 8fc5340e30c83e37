"""abraxas: one envelope on stdin, one reply on stdout.

The payload's `op` picks `hash`, `echo` or `compact_text`; without an `op` its `prompt` (or `text`) is analysed. The
same envelope gives the same bytes, so that a recorded call can be replayed. Exit 0 when the envelope was read, whatever
the reply; 2 when it was not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys

from analysis import Limits, analyse

TYPE_CHECKING = False  # importing typing would take a tenth of the time of a short call
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

PHASES = ("OPEN", "ALIGN", "ASCEND", "CLEAR", "SEAL")
ALGORITHMS = sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake"))


class Refusal(Exception):  # noqa: N818  an answer, not a defect of this program
    """What was sent cannot be used. `code` and the message go into the reply."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    """Answer one envelope. Returns the exit status."""
    try:
        envelope = read_envelope(sys.stdin.buffer.read())
    except Refusal as refusal:
        write(failure(refusal))
        return 2
    try:
        write({"ok": True, "result": perform(envelope)})
    except Refusal as refusal:
        write(failure(refusal))
    except UnicodeEncodeError as error:
        message = f"the payload holds a lone surrogate (character {error.start} of a text); send whole characters"
        write(failure(Refusal("BAD_INPUT", message)))
    return 0


def read_envelope(raw: bytes) -> dict[str, Any]:
    """The envelope as an object with a known `phase` and a `payload`. Raises `Refusal` with BAD_ENVELOPE."""
    try:
        envelope = json.loads(raw, parse_constant=not_json)
    except (ValueError, RecursionError) as error:
        raise bad_envelope(f"stdin is not JSON: {error}") from None
    if not isinstance(envelope, dict):
        raise bad_envelope("stdin must hold one JSON object, the envelope")
    if envelope.get("phase") not in PHASES:
        raise bad_envelope(f"phase must be one of {', '.join(PHASES)}")
    for key, default in (("payload", None), ("memory", {})):
        if not isinstance(envelope.setdefault(key, default), dict):
            raise bad_envelope(f"{key} must be an object")
    return envelope


def not_json(name: str) -> NoReturn:
    """Refuse the constants NaN and Infinity, which Python would read."""
    raise ValueError(f"{name} is not a JSON value")


def bad_envelope(message: str) -> Refusal:
    return Refusal("BAD_ENVELOPE", message)


def bad_input(message: str) -> Refusal:
    return Refusal("BAD_INPUT", message)


def perform(envelope: dict[str, Any]) -> dict[str, Any]:
    """The result of the payload's `op`, or the analysis. Raises `Refusal` with BAD_INPUT."""
    payload = envelope["payload"]
    op = payload.get("op")
    if op is None:
        return analysis(payload, envelope["memory"])
    if not isinstance(op, str) or op not in OPS:
        raise bad_input(f"op is {json.dumps(op)}; known: {', '.join(OPS)}, or no op for the analysis")
    return {"op": op, **OPS[op](payload)}


def analysis(payload: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """The analysis within the envelope's limits, with `intent` as the caller gave it."""
    key = "prompt" if "prompt" in payload else "text"
    result = analyse(text_of(payload, key), limits_of(memory))
    return {**result, "intent": payload["intent"]} if "intent" in payload else result


def text_of(payload: dict[str, Any], key: str) -> str:
    text = payload.get(key)
    if text is None:
        raise bad_input("the payload has no text; send {'prompt': '...'}, or {'op': '...', 'text': '...'}")
    if not isinstance(text, str):
        raise bad_input(f"{key} must be a string")
    return text


def limits_of(memory: dict[str, Any]) -> Limits:
    """What the bus asks to save: `max_context_tokens` (words here) and `disabled_features`."""
    words, features = memory.get("max_context_tokens"), memory.get("disabled_features", [])
    if words is not None and (type(words) is not int or words < 0):
        raise bad_input("memory.max_context_tokens must be a whole number, 0 or more")
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise bad_input("memory.disabled_features must be a list of names")
    return Limits(words, features)


def hash_op(payload: dict[str, Any]) -> dict[str, Any]:
    """Hex digest of `text`, or of `data`: a string's UTF-8 bytes, any other value's compact JSON with sorted keys."""
    algorithm = payload.get("algorithm", "sha256")
    if algorithm not in ALGORITHMS:
        raise bad_input(f"algorithm is {json.dumps(algorithm)}; known: {', '.join(ALGORITHMS)}")
    content = content_of(payload)
    try:
        digest = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    except ValueError:
        raise bad_input(f"this machine's Python has {algorithm} switched off") from None
    return {"algorithm": algorithm, "bytes": len(content), "digest": digest}


def content_of(payload: dict[str, Any]) -> bytes:
    if "text" in payload or "data" not in payload:
        return text_of(payload, "text").encode()
    data = payload["data"]
    return data.encode() if isinstance(data, str) else encode(data)


def echo_op(payload: dict[str, Any]) -> dict[str, Any]:
    return {"payload": payload}


def compact_op(payload: dict[str, Any]) -> dict[str, Any]:
    """`text` with every run of white space as one space; blank lines, folded to one, still part the paragraphs."""
    text = text_of(payload, "text")
    groups = itertools.groupby(text.splitlines(), key=lambda line: bool(line.strip()))
    compact = "\n\n".join(" ".join(" ".join(lines).split()) for filled, lines in groups if filled)
    return {"text": compact, "characters_before": len(text), "characters_after": len(compact)}


OPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "hash": hash_op,
    "echo": echo_op,
    "compact_text": compact_op,
}


def failure(refusal: Refusal) -> dict[str, Any]:
    return {"ok": False, "error": str(refusal), "code": refusal.code, "retryable": False}


def encode(value: object) -> bytes:
    """Compact JSON with sorted keys. Raises `UnicodeEncodeError` for a lone surrogate."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def write(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(encode(reply) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
