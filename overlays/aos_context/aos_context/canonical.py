"""Canonical JSON (RFC 8785), the form in which a bus hashes what a service answered.

What this program writes for itself is `artifacts.to_json`, which differs: that keeps a number as it was given.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from aos_context.artifacts import sha256

_PLAIN_DIGITS_MOST = 21
_PLAIN_ZEROS_MOST = 6
"""ECMA-262, Number::toString: beyond these a number has an exponent."""


def canonical_sha256(value: Any) -> str:
    """SHA-256, hexadecimal, of the canonical form. Raises as `canonical`."""
    return sha256(canonical(value))


def canonical(value: Any) -> bytes:
    """Of dicts, lists, tuples, text, numbers, booleans and None. Raises `ValueError` for text that is no Unicode."""
    return _text(value).encode("utf-8")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))  # RFC 8785, 3.2.3
        return "{" + ",".join(f"{_text(name)}:{_text(value[name])}" for name in names) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """As ECMA-262 writes it (Number::toString), from the shortest digits that read back as the same double."""
    if not value:
        return "0"
    sign, figures, exponent = Decimal(repr(value)).normalize().as_tuple()
    digits, minus = "".join(map(str, figures)), "-" if sign else ""
    point = len(digits) + int(exponent)  # digits before it
    if len(digits) <= point <= _PLAIN_DIGITS_MOST:
        return minus + digits.ljust(point, "0")
    if 0 < point <= _PLAIN_DIGITS_MOST:
        return f"{minus}{digits[:point]}.{digits[point:]}"
    if -_PLAIN_ZEROS_MOST < point <= 0:
        return f"{minus}0.{digits.rjust(len(digits) - point, '0')}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{minus}{digits[0]}{fraction}e{point - 1:+d}"
