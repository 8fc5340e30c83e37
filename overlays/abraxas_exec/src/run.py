"""abraxas_exec: an overlay that holds the permission `exec`; one envelope on stdin, one reply on stdout.

ASCEND performs the payload's `op` (or `operation`); of these `word_count` starts another program, wc. CLEAR performs
what needs no program and says that it only read. Every other phase sums the payload up and performs nothing. Exit 0
when the envelope was read, whatever the reply; 2 when it was not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys

TYPE_CHECKING = False  # importing typing would take a tenth of the time of a short call
if TYPE_CHECKING:
    from typing import Any, NoReturn

PHASES = ("OPEN", "ALIGN", "ASCEND", "CLEAR", "SEAL")
WC = ("wc", "-l", "-w", "-c")
WC_TIMEOUT_S = 10


class Refusal(Exception):  # noqa: N818  an answer, not a defect of this program
    """What was sent cannot be used, or cannot be done. `code` and the message go into the reply."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    """Answer one envelope. Returns the exit status."""
    try:
        phase, payload = read_envelope(sys.stdin.buffer.read())
        write({"ok": True, "result": answer(phase, payload)})
    except Refusal as refusal:
        write({"ok": False, "error": str(refusal), "code": refusal.code, "retryable": False})
        return 2 if refusal.code == "BAD_ENVELOPE" else 0
    except UnicodeEncodeError:
        write({"ok": False, "error": "the payload holds a lone surrogate", "code": "BAD_INPUT", "retryable": False})
    return 0


def read_envelope(raw: bytes) -> tuple[str, dict[str, Any]]:
    """The phase and the payload. Raises `Refusal` with BAD_ENVELOPE."""
    try:
        envelope = json.loads(raw, parse_constant=not_json)
    except (ValueError, RecursionError) as error:
        raise Refusal("BAD_ENVELOPE", f"stdin is not JSON: {error}") from None
    if not isinstance(envelope, dict) or envelope.get("phase") not in PHASES:
        raise Refusal("BAD_ENVELOPE", f"stdin must hold one object whose phase is one of {', '.join(PHASES)}")
    payload = envelope.get("payload")
    if not isinstance(payload, dict):
        raise Refusal("BAD_ENVELOPE", "payload must be an object")
    return envelope["phase"], payload


def not_json(name: str) -> NoReturn:
    """Refuse the constants NaN and Infinity, which Python would read."""
    raise ValueError(f"{name} is not a JSON value")


def answer(phase: str, payload: dict[str, Any]) -> dict[str, Any]:
    """The result for one phase. Raises `Refusal`."""
    operation = operation_of(payload)
    if phase == "ASCEND":
        return ascend(operation, payload)
    if phase == "CLEAR":
        return clear(operation, payload)
    return {"status": "analysed", "operation": operation, "operations": sorted(OPS), **summary(payload)}


def operation_of(payload: dict[str, Any]) -> str | None:
    operation = payload.get("op", payload.get("operation"))
    if operation is not None and (not isinstance(operation, str) or operation not in OPS):
        raise Refusal("BAD_INPUT", f"op is {json.dumps(operation)}; known: {', '.join(sorted(OPS))}")
    return operation


def ascend(operation: str | None, payload: dict[str, Any]) -> dict[str, Any]:
    if operation is None:
        raise Refusal("BAD_INPUT", f"ASCEND performs an op; name one of {', '.join(sorted(OPS))}")
    return {"status": "ascended", "operation": operation, "output": OPS[operation](payload), "exec_performed": True}


def clear(operation: str | None, payload: dict[str, Any]) -> dict[str, Any]:
    """`output` is None where there is no op, or where it starts a program."""
    skipped = operation is None or operation in STARTS_A_PROGRAM
    output = None if skipped else OPS[str(operation)](payload)
    return {"status": "clear", "readonly": True, "operation": operation, "output": output, "exec_performed": False}


def summary(payload: dict[str, Any]) -> dict[str, Any]:
    text = payload.get("prompt", payload.get("text"))
    figures = {"characters": len(text), "words": len(text.split())} if isinstance(text, str) else None
    return {"keys": sorted(payload), "text": figures, "exec_performed": False}


def text_of(payload: dict[str, Any]) -> str:
    text = payload.get("text")
    if not isinstance(text, str):
        raise Refusal("BAD_INPUT", "the payload needs a text, a string")
    return text


def hash_op(payload: dict[str, Any]) -> dict[str, Any]:
    """SHA-256 of `text`, or of `data`: a string's UTF-8 bytes, any other value's compact JSON with sorted keys."""
    data = payload["data"] if "text" not in payload and "data" in payload else text_of(payload)
    content = data.encode() if isinstance(data, str) else encode(data)
    return {"algorithm": "sha256", "bytes": len(content), "digest": hashlib.sha256(content).hexdigest()}


def echo_op(payload: dict[str, Any]) -> dict[str, Any]:
    return {"payload": payload}


def compact_op(payload: dict[str, Any]) -> dict[str, Any]:
    """`text` with every run of white space as one space; blank lines, folded to one, still part the paragraphs."""
    groups = itertools.groupby(text_of(payload).splitlines(), key=lambda line: bool(line.strip()))
    return {"text": "\n\n".join(" ".join(" ".join(lines).split()) for filled, lines in groups if filled)}


def word_count_op(payload: dict[str, Any]) -> dict[str, Any]:
    """Lines, words and bytes of `text` as wc counts them in the C locale. Raises `Refusal` with PROGRAM_FAILED."""
    content, env = text_of(payload).encode(), {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(WC, input=content, env=env, capture_output=True, check=True, timeout=WC_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise Refusal("PROGRAM_FAILED", f"wc could not do it: {error}") from None
    lines, words, size = map(int, done.stdout.split())
    return {"program": list(WC), "lines": lines, "words": words, "bytes": size}


OPS = {"hash": hash_op, "echo": echo_op, "compact_text": compact_op, "word_count": word_count_op}
STARTS_A_PROGRAM = frozenset({"word_count"})


def encode(value: object) -> bytes:
    """Compact JSON with sorted keys. Raises `UnicodeEncodeError` for a lone surrogate."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def write(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(encode(reply) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
