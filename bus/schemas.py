"""The shipped JSON schemas, compiled once, and what does not fit them as faults for people."""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry

from bus import resources
from bus.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from jsonschema import ValidationError

FAULT_LIMIT = 20
_FOUND_LIMIT = 120
_encoder = json.JSONEncoder(ensure_ascii=False, default=repr)
_BOUNDS = {
    "minimum": "{} or more",
    "exclusiveMinimum": "more than {}",
    "maximum": "{} or less",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
}


@cache
def shipped(name: str) -> Draft202012Validator:
    """The validator of `schemas/<name>.schema.json`."""
    return Draft202012Validator(resources.load_json(f"schemas/{name}.schema.json"))


def compiled(schema: Mapping[str, Any] | bool) -> Draft202012Validator:
    """A validator for a schema that was checked when its manifest was read. It fetches nothing that a `$ref` names."""
    return Draft202012Validator(schema, registry=Registry())


def faults(validator: Draft202012Validator, value: object, root: str = "$") -> list[Fault]:
    """What the schema refuses in `value`, at most `FAULT_LIMIT` things; empty where it fits.

    A large document can be wrong a million times, and nobody reads on after the first few.
    """
    try:
        found = from_errors(itertools.islice(validator.iter_errors(value), FAULT_LIMIT + 1), root)
        return found if len(found) <= FAULT_LIMIT else [*found[:FAULT_LIMIT], Fault(root, "more faults", "none")]
    except RecursionError:
        return [Fault(root, show(value), "a schema that comes to an end; this one refers to itself for ever")]


def from_errors(errors: Iterable[ValidationError], root: str = "$") -> list[Fault]:
    """Faults from the library's errors; of an `anyOf` or `oneOf` only the branch that came closest."""
    closest = (best_match([error]) or error for error in errors)
    in_order = sorted(closest, key=lambda error: [str(part) for part in error.absolute_path])
    return [fault for error in in_order for fault in _faults_of(error, root)]


def show(value: object) -> str:
    """A value as JSON, cut to a length that fits a message."""
    if isinstance(value, str):
        value = value[:_FOUND_LIMIT]
    text = ""
    for piece in _encoder.iterencode(value):  # lazily: the value may be as large as a request may be
        text += piece[: _FOUND_LIMIT + 1]
        if len(text) > _FOUND_LIMIT:
            return text[: _FOUND_LIMIT - 1] + "…"
    return text


def unknown_key(path: str, key: str, known: Iterable[str]) -> Fault:
    """The fault of a key that nobody reads, with the nearest one that somebody does."""
    known = list(known)
    near = difflib.get_close_matches(key[:_FOUND_LIMIT], known, n=1)
    allowed = f"did you mean {near[0]!r}?" if near else ", ".join(known) or "no keys here"
    return Fault(f"{path}.{key[:_FOUND_LIMIT]}", "an unknown key", allowed)


def _required(schema: Any, key: str) -> str:  # noqa: ANN401
    """What a missing key may be: its choices where the schema lists them."""
    member = schema.get("properties", {}).get(key, {})
    choices = member.get("enum") if isinstance(member, dict) else None
    return "one of " + ", ".join(map(show, choices)) if choices else "a value; the key is required"


def _faults_of(error: ValidationError, root: str) -> Iterator[Fault]:
    path = root + error.json_path.removeprefix("$")
    wanted: Any = error.validator_value
    found = show(error.instance)
    match error.validator:
        case "required":  # one error for each missing key, which only its message names
            key = ast.literal_eval(error.message.removesuffix(" is a required property"))
            yield Fault(f"{path}.{key}", "nothing", _required(error.schema, key))
        case "additionalProperties" if wanted is False:
            schema: Any = error.schema
            known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
            instance: Any = error.instance
            unknown = (key for key in instance if key not in known and not any(re.search(p, key) for p in patterns))
            yield from (unknown_key(path, key, known) for key in itertools.islice(unknown, FAULT_LIMIT + 1))
        case "enum":
            yield Fault(path, found, "one of " + ", ".join(map(show, wanted)))
        case "type":
            yield Fault(path, found, wanted if isinstance(wanted, str) else " or ".join(wanted))
        case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum" | "minLength" | "maxLength":
            yield Fault(path, found, _BOUNDS[error.validator].format(wanted))
        case "pattern":
            yield Fault(path, found, f"text that matches {wanted}")
        case _:
            yield Fault(path, found, f"{error.validator} {show(wanted)}")
