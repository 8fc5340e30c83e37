"""The form of a manifest: which shape it has, what `schemas/manifest.schema.json` refuses in it, and unknown keys.

A fault must not hide the next one. So what is wrong or unknown is named and cut out of the document, and the checks
that follow work on what is left, where every value that is present has the right type.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from bus import resources, schemas
from bus.canonical import LARGEST_INTEGER
from bus.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from jsonschema import ValidationError
    from referencing._core import Resolver
    from referencing.jsonschema import Schema, SchemaRegistry, SchemaResource

Shape = Literal["A", "B", "native"]
Path = tuple[str | int, ...]
_T = TypeVar("_T")

_DEFINITION: Mapping[Shape, str] = {"A": "shape_a", "B": "shape_b", "native": "native"}
MAX_FAULTS = 100
"""What is said of one manifest: a large one can be wrong a hundred thousand times, and nobody reads on."""

_SHOWN = 120
_UNFIT_TEXT = re.compile("[\0\ud800-\udfff]")
_PLAIN_KEY = re.compile("[a-zA-Z][a-zA-Z0-9_]*")
_TOO_DEEP = "a schema that can be checked"


@dataclass(frozen=True, slots=True)
class Form:
    """What a look at the form found. `given` is the document, `document` only what is well formed and known in it."""

    shape: Shape
    given: Mapping[str, Any]
    document: Mapping[str, Any]
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]


def examine(value: object) -> Form:
    """The form of a parsed manifest. Raises nothing, whatever JSON value it is given.

    One with more than `MAX_FAULTS` faults has an empty `document`: there is no use in looking further.
    """
    unfit = dict(_some(_unfit(value, ())))
    value = _without(value, unfit)
    shape = _shape(value)
    found = _validator(_DEFINITION[shape]).iter_errors(value)
    errors = list(_some(error for error in found if error.validator != "additionalProperties"))
    unknown = dict(_unknown_keys(_definition(_DEFINITION[shape]), value, ()))
    refused = {path: known for path, known in unknown.items() if len(path) > 1 and shape == "native"}
    faults = [*unfit.values(), *_unknown(refused)]
    said = {fault.path for fault in faults}
    faults += [fault for error in errors for fault in _faults_of(error) if fault.path not in said]
    culprits = [tuple(error.absolute_path) for error in errors if error.validator != "required"]
    document = None if len(faults) > MAX_FAULTS else _without(value, [*culprits, *unknown])
    tolerated = {path: known for path, known in unknown.items() if path not in refused}
    return Form(
        shape=shape,
        given=value if isinstance(value, dict) else {},
        document=document if isinstance(document, dict) else {},
        faults=tuple(faults),
        warnings=at_most([_warning(fault) for fault in _unknown(tolerated)], "there are more warnings"),
    )


def at_most(items: Sequence[_T], last: _T) -> tuple[_T, ...]:
    """The first `MAX_FAULTS` of them, and `last` where there are more."""
    return tuple(items) if len(items) <= MAX_FAULTS else (*items[:MAX_FAULTS], last)


def json_path(*parts: str | int) -> str:
    """The JSON path of a value, as `$.phases[0]` or `$.capabilities['psyfi.ping']`."""
    return "$" + "".join(map(_step, parts))


def schema_faults(schema: Mapping[str, Any], at: str) -> list[Fault]:
    """Why an overlay's own schema is no usable Draft 2020-12: its form, its regular expressions, its references.

    References must lead to a schema within it; nothing is ever fetched.
    """
    try:
        if faults := schemas.from_errors(_some(_meta_validator().iter_errors(schema)), at):
            return faults
        resource: SchemaResource = DRAFT202012.create_resource(schema)
        registry: SchemaRegistry = Registry()
        return list(_some(_broken_references(resource, registry.resolver_with_root(resource), at)))
    except RecursionError:
        return [Fault(at, "a schema that nests too deep", _TOO_DEEP)]
    except OverflowError:  # of the re module, for a{99999999999}
        return [Fault(at, "a regular expression with a huge count", _TOO_DEEP)]


def _some(items: Iterable[_T]) -> Iterator[_T]:
    """As many as can be shown, and one more, which tells that there are more."""
    return itertools.islice(items, MAX_FAULTS + 1)


def _step(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    if _PLAIN_KEY.fullmatch(part):
        return f".{part}"
    return "['" + part.replace("\\", "\\\\").replace("'", "\\'") + "']"


def _shape(value: object) -> Shape:
    if _validator("is_shape_a").is_valid(value):
        return "A"
    if not isinstance(value, dict):
        return "B"
    # The library is a hundred times slower at this than a loop, and there may be thousands of capabilities.
    capabilities = value.get("capabilities")
    if isinstance(capabilities, dict) and any(map(_has_native_key, capabilities.values())):
        return "native"
    others = {key: child for key, child in value.items() if key != "capabilities"}
    return "native" if _validator("is_native").is_valid(others) else "B"


def _has_native_key(capability: object) -> bool:
    return isinstance(capability, dict) and not _native_keys().isdisjoint(capability)


@cache
def _native_keys() -> frozenset[str]:
    """The keys of a capability that only the native shape has."""
    return frozenset(key for branch in _definition("has_native_key")["anyOf"] for key in branch["required"])


@cache
def _validator(definition: str) -> Draft202012Validator:
    schema = resources.load_json("schemas/manifest.schema.json")
    return Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]})


@cache
def _meta_validator() -> Draft202012Validator:
    return Draft202012Validator(Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER)


def _definition(name: str) -> Mapping[str, Any]:
    return _follow({"$ref": f"#/$defs/{name}"})


def _follow(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a `$ref` into the manifest schema names, or the schema itself."""
    if "$ref" not in schema:
        return schema
    target: Any = resources.load_json("schemas/manifest.schema.json")
    for part in schema["$ref"].removeprefix("#/").split("/"):
        target = target[part]
    return _follow(target)


def _unfit(value: object, path: Path) -> Iterator[tuple[Path, Fault]]:
    """Every text and number that no envelope, path or argument could carry."""
    if isinstance(value, dict):
        for key, child in value.items():
            if _UNFIT_TEXT.search(key):
                yield (
                    (*path, key),
                    Fault(json_path(*path), f"the key {key!a}", "text without NUL or lone surrogates"),
                )
            else:
                yield from _unfit(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _unfit(child, (*path, index))
    elif isinstance(value, str) and _UNFIT_TEXT.search(value):
        yield path, Fault(json_path(*path), ascii(value)[:120], "text without NUL or lone surrogates")
    elif isinstance(value, int | float) and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        allowed = f"a number from -{LARGEST_INTEGER} to {LARGEST_INTEGER}"
        yield path, Fault(json_path(*path), f"{value}"[:120], allowed)


def _without(value: object, paths: Iterable[Path]) -> object:
    """`value` without what stands at these paths: a copy. The longest and last go first, so that indices hold."""
    in_order = sorted(set(paths), reverse=True)
    kept = copy.deepcopy(value) if in_order else value
    for path in in_order:
        if not path:
            return None
        parent: Any = kept
        for part in path[:-1]:
            parent = parent[part]
        del parent[path[-1]]
    return kept


def _faults_of(error: ValidationError) -> list[Fault]:
    """Faults with the schema's `$comment` as a note; a key that makes no sense beside the others has only the note."""
    note = error.schema.get("$comment", "") if isinstance(error.schema, dict) else ""
    if error.validator == "not":
        return [Fault(error.json_path, schemas.show(error.instance), note)]
    faults = schemas.from_errors([error])
    return [dataclasses.replace(fault, allowed=f"{fault.allowed} ({note})") for fault in faults] if note else faults


def _unknown_keys(
    schema: Mapping[str, Any], value: object, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The path of every key that the schema does not know, with the keys that it knows there."""
    if not isinstance(value, dict):
        return
    known: Mapping[str, Any] | None = schema.get("properties")
    others = schema.get("additionalProperties")
    for key, child in value.items():
        below = (known or {}).get(key, others if isinstance(others, dict) else None)
        if below is not None:
            yield from _unknown_keys(_follow(below), child, (*path, key))
        elif known is not None:
            yield (*path, key), known


def _unknown(keys: Mapping[tuple[str, ...], Mapping[str, Any]]) -> list[Fault]:
    """The faults that unknown keys are where they are faults."""
    return [
        dataclasses.replace(schemas.unknown_key("$", path[-1], known), path=json_path(*path))
        for path, known in _some(keys.items())
    ]


def _warning(fault: Fault) -> str:
    return f"{fault.path[:_SHOWN]} is not read ({fault.found}; {fault.allowed})"


def _broken_references(resource: SchemaResource, resolver: Resolver[Schema], at: str) -> Iterator[Fault]:
    contents = resource.contents
    if isinstance(contents, dict):
        for key in ("$ref", "$dynamicRef"):
            if key in contents and not _resolves(contents[key], resolver):
                yield Fault(f"{at} {key}", schemas.show(contents[key]), "a reference to a schema within this one")
    for below in resource.subresources():
        yield from _broken_references(below, resolver.in_subresource(below), at)


def _resolves(reference: str, resolver: Resolver[Schema]) -> bool:
    try:
        target: object = resolver.lookup(reference).contents
    except (Unresolvable, ValueError):  # ValueError: what is no URI, or a list index that is no number
        return False
    return isinstance(target, dict | bool) and _meta_validator().is_valid(target)
