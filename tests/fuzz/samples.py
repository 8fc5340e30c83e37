"""JSON values of every kind, sound documents, and the ways to damage them: as values, and then as bytes."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy

MOST_DAMAGES = 3
"""How often one document is damaged: beyond that little of it is read."""

HOSTILE: tuple[Any, ...] = (
    *("", "\0", "\ud800", "\ufeff", "../../etc/passwd", "~", "~root/x", "/", ".", "..", "a" * 5000, "%00", "\r\n\r\n"),
    *("${HOME}", "$(id)", "{port}", "http://[::1", "http://169.254.169.254/", "file:///etc/passwd", "(a+)+$", "*"),
    *(0, -1, 1, 65535, 65536, 2**31, 2**53 + 1, -(2**63), 10**400, 0.1, -0.0, 1e308, float("inf"), float("nan")),
    *(None, True, False, [], {}, [[]], {"": {}}, {"$ref": "#"}, {"$ref": "http://127.0.0.1:9/x"}),
    {"pattern": "(a+)+$"},
)  # fmt: skip
"""What readers stumble over: paths, URLs, references, numbers beyond a format, texts that no UTF-8 has."""

_NESTING = (b"[" * 70 + b"]" * 70, b'{"a":' * 70 + b"1" + b"}" * 70, b"[" * 100_000, b"9" * 5000)

scalars: SearchStrategy[Any] = st.one_of(
    st.sampled_from(HOSTILE).map(copy.deepcopy),  # who damages a document changes it in place
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=20),
)

values: SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
"""Whatever Python's `json` can write, and so also what RFC 8259 does not know."""


def texts_of(documents: Sequence[Any]) -> SearchStrategy[bytes]:
    """Documents as JSON text: sound, damaged as values, damaged as bytes; and bytes that are nothing."""
    return st.one_of(
        st.sampled_from(documents).map(to_bytes),
        damaged_documents(documents).map(to_bytes),
        damaged_documents(documents).map(to_bytes),
        damaged_bytes(damaged_documents(documents).map(to_bytes)),
        damaged_bytes(st.sampled_from(documents).map(to_bytes)),
        values.map(to_bytes),
        st.sampled_from(_NESTING),
        st.binary(max_size=64),
    )


def to_bytes(value: Any) -> bytes:
    """As JSON text. Lone surrogates stay as escapes, which JSON allows; NaN and infinity stay, which it does not."""
    return json.dumps(value).encode()


@st.composite
def damaged_documents(draw: DrawFn, documents: Sequence[Any]) -> Any:
    """One of the documents with one to `MOST_DAMAGES` values replaced, removed, doubled or moved."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, MOST_DAMAGES))):
        document = _damage(draw, document)
    return document


def _damage(draw: DrawFn, document: Any) -> Any:
    paths = list(_paths(document, ()))
    path = draw(st.sampled_from(paths))
    if not path:
        return draw(values)
    parent = _at(document, path[:-1])
    match draw(st.sampled_from(["replace", "replace", "remove", "add", "move"])):
        case "replace":
            parent[path[-1]] = draw(_like(parent[path[-1]]) | values)
        case "remove":
            del parent[path[-1]]
        case "add" if isinstance(parent, list):
            parent.append(draw(values))
        case "add":
            parent[draw(st.text(st.characters(), max_size=8))] = draw(values)
        case _:
            parent[path[-1]] = copy.deepcopy(_at(document, draw(st.sampled_from(paths))))
    return document


def _like(value: Any) -> SearchStrategy[Any]:
    """Values of the same kind, which the first look at a form does not refuse."""
    match value:
        case bool():
            return st.booleans()
        case int() | float():
            return st.integers(0, 10) | st.floats(0, 1) | st.integers()
        case str():
            return st.sampled_from([member for member in HOSTILE if isinstance(member, str)]) | st.text(max_size=20)
        case _:
            return values


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in members:
        yield from _paths(child, (*path, key))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        document = document[part]
    return document


@st.composite
def damaged_bytes(draw: DrawFn, sound: SearchStrategy[bytes]) -> bytes:
    """Text with bytes cut off, changed, inserted or repeated."""
    text = bytearray(draw(sound))
    for _ in range(draw(st.integers(1, MOST_DAMAGES))):
        at = draw(st.integers(0, len(text)))
        to = min(len(text), at + draw(st.integers(0, 16)))
        match draw(st.sampled_from(["cut", "replace", "insert", "repeat", "end"])):
            case "cut":
                del text[at:to]
            case "replace":
                text[at:to] = draw(st.binary(min_size=to - at, max_size=to - at))
            case "insert":
                text[at:at] = draw(st.binary(max_size=8) | st.sampled_from(_SPLICES))
            case "repeat":
                text[at:at] = text[at:to] * draw(st.integers(1, 50))
            case _:
                del text[at:]
    return bytes(text)


_SPLICES = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\\ud800",
    b'"',
    b"\\",
    b"{",
    b"]",
    b",",
    b":",
    b"1e999",
    b"\n",
)
