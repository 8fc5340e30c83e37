"""Canonical JSON (RFC 8785) and hashes over it: the only place that turns a value into bytes that somebody hashes.

orjson with sorted keys writes RFC 8785 for nearly everything that passes through a bus, at a tenth of the cost of any
Python code; one walk over the value decides whether it does so for this one. What it would write otherwise (a key
outside the BMP, a number whose shortest text the two write differently) is put into a form that it writes right.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from enum import StrEnum
from typing import Any

import orjson
import rfc8785

LARGEST_INTEGER = 2**53 - 1
"""Beyond it, either way, an integer has no canonical form: readers of JSON would lose its digits."""

_SORTED = (
    orjson.OPT_SORT_KEYS
    | orjson.OPT_STRICT_INTEGER
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_DATACLASS
)
_PLAIN = frozenset({str, int, bool, type(None), orjson.Fragment})
_LEAST_PLAIN, _FIRST_NOT_PLAIN = 1e-4, 1e15
_FIRST_WITH_EXPONENT = 1e21
_LONG_NUMBER = re.compile(rb"[0-9]{16}")


class CanonicalError(ValueError):
    """A value that has no RFC 8785 form. `pointer` (RFC 6901) says where it stands; the whole value is `""`."""

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(f"{message} (at {pointer!r})" if pointer else message)
        self.pointer = pointer
        self.message = message


def canonical(value: Any) -> bytes:  # noqa: ANN401
    """The RFC 8785 bytes of a JSON value: dict, list, tuple, str, int, float, bool, None, nested to 254 levels.

    An `orjson.Fragment` goes in as it is, so that bytes which are canonical already are not made twice. A subclass of
    these types counts as its base. Raises `CanonicalError` for integers beyond 2^53 - 1, NaN and Infinity, lone
    surrogates, keys that are not strings, and every other type.
    """
    try:
        text = orjson.dumps(value, option=_SORTED)
    except orjson.JSONEncodeError:
        return _dump_normal(value)
    # Only now: the walk would not end on a value that holds itself, which orjson has just ruled out.
    return text if _is_plain(value) else _dump_normal(value)


def canonical_own(members: dict[str, Any]) -> bytes:
    """As `canonical`, of an object that the bus itself has put together: without the walk, which costs as much again.

    All in it is of JSON's types, every key ASCII, every float of `figure`; what others have said is text or a Fragment.
    """
    try:
        return orjson.dumps(members, option=_SORTED)
    except orjson.JSONEncodeError:
        return _dump_normal(members)


def canonical_to_read(value: Any) -> bytes:  # noqa: ANN401
    """As `canonical`, for what somebody reads again: refuses floats, too, that RFC 8785 writes as integers beyond 2^53.

    It writes 1e17 as 100000000000000000, which is refused where it is read.
    """
    text = canonical(value)
    if _LONG_NUMBER.search(text):
        _refuse_long_floats(value, "")
    return text


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def shown(text: str) -> str:
    """`text` as text that JSON can carry: of a file's name a byte that is no UTF-8 becomes `\\xff`.

    Any other lone surrogate becomes its escape, as `\\ud800`.
    """
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace")


def figure(x: float) -> int | float:
    """`x` with at most 3 decimals, and an int where it is whole: the form of every measured figure in a record.

    Raises `CanonicalError` where it is no finite number.
    """
    try:
        thousandths = math.floor(x * 1000 + 0.5)  # a third of what round(x, 3) takes
    except (OverflowError, ValueError):
        raise CanonicalError("", f"{x} is not a JSON number") from None
    if abs(thousandths) > LARGEST_INTEGER:  # a double has hardly any decimals left there
        return round(x)
    return thousandths / 1000 if thousandths % 1000 else thousandths // 1000


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    """Whether orjson's text of `value` is its RFC 8785 form.

    Sorting by code point and by UTF-16 unit agree within the BMP. The shortest digits that read back as the same
    double are the same in both, and both write them without exponent from 1e-4 to 1e15 (ECMA-262 section 6.1.6.1.20
    does from 1e-6 to 1e21, orjson up to 1e16); of a whole float orjson keeps the `.0`.
    """
    nodes: list[Any] = [(value,)]
    for node in nodes:  # grows while it is walked
        members = node
        if type(node) is dict:
            for key in node:
                if not key.isascii() and max(key) > "\uffff":
                    return False
            members = node.values()
        for member in members:
            kind = type(member)
            if kind in _PLAIN:
                continue
            if kind is dict or kind is list or kind is tuple:
                nodes.append(member)
            elif kind is float:
                if not _LEAST_PLAIN <= abs(member) < _FIRST_NOT_PLAIN or member.is_integer():
                    return False
            elif not isinstance(member, StrEnum):
                return False
    return True


def _dump_normal(value: Any) -> bytes:  # noqa: ANN401
    try:
        return orjson.dumps(_normal(value, ""))
    except (RecursionError, orjson.JSONEncodeError):
        raise CanonicalError("", "nested deeper than 254 levels") from None


def _normal(value: Any, pointer: str) -> Any:  # noqa: ANN401
    """`value` rebuilt so that orjson without any option writes its RFC 8785 form; says where it cannot be."""
    if value is None or isinstance(value, bool | orjson.Fragment):
        return value
    if isinstance(value, str):
        return _normal_text(value, pointer)
    if isinstance(value, int):
        return _normal_integer(value, pointer)
    if isinstance(value, float):
        return _normal_float(value, pointer)
    if isinstance(value, dict):
        return _normal_object(value, pointer)
    if isinstance(value, list | tuple):
        return [_normal(member, f"{pointer}/{index}") for index, member in enumerate(value)]
    raise CanonicalError(pointer, f"a value of type {type(value).__name__} is not JSON")


def _refuse_long_floats(value: Any, pointer: str) -> None:  # noqa: ANN401
    if isinstance(value, dict):
        for key, member in value.items():
            _refuse_long_floats(member, f"{pointer}/{_token(key)}")
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            _refuse_long_floats(member, f"{pointer}/{index}")
    elif isinstance(value, float) and LARGEST_INTEGER < abs(value) < _FIRST_WITH_EXPONENT:
        _normal_integer(int(value), pointer)


def _normal_text(value: str, pointer: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CanonicalError(pointer, f"a lone surrogate U+{ord(value[error.start]):04X} is not text") from None
    return str.__str__(value)


def _normal_integer(value: int, pointer: str) -> int:
    if not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        raise CanonicalError(
            pointer, f"the integer {_shortened(value)} is beyond 2^53 - 1, where JSON numbers lose digits"
        )
    return int(value)


def _shortened(value: int) -> str:
    return str(value) if abs(value) < 10**40 else f"of {value.bit_length()} bits"


def _normal_float(value: float, pointer: str) -> orjson.Fragment | int:
    if value.is_integer() and abs(value) <= LARGEST_INTEGER:
        return int(value)
    try:
        return orjson.Fragment(rfc8785.dumps(float(value)))
    except rfc8785.FloatDomainError:
        raise CanonicalError(pointer, f"{float(value)} is not a JSON number") from None


def _normal_object(value: dict[Any, Any], pointer: str) -> dict[str, Any]:
    members = {_normal_key(key, pointer): member for key, member in value.items()}
    return {
        name: _normal(members[name], f"{pointer}/{_token(name)}")
        for name in sorted(members, key=lambda name: name.encode("utf-16-be"))
    }


def _normal_key(key: object, pointer: str) -> str:
    if not isinstance(key, str):
        raise CanonicalError(pointer, f"the key {key!r} is not a string")
    return _normal_text(key, f"{pointer}/{_token(key)}")


def _token(key: str) -> str:
    """A key as it stands in a JSON pointer."""
    return shown(key).replace("~", "~0").replace("/", "~1")
