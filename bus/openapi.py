"""`GET /openapi.json`: what can be asked of the bus, and what it answers, as OpenAPI 3.1.

Made from what is there: the routes of the application, the shipped schemas, the error catalogue, and for each
capability a path of its own with the schemas that its manifest gives for input and output. Of a manifest nothing else
is told: no command, no address, no environment.

Each schema becomes a component; so its references to itself (`#/$defs/x`) are moved to where it stands then.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from bus import resources
from bus.errors import CATALOGUE
from bus.model import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.routing import Route

    from bus.model import Capability, Manifest

Json = dict[str, Any]

SHIPPED = {"Invocation": "invocation", "Outcome": "outcome", "Record": "record", "Replay": "replay", "Stress": "stress"}
"""The components that are shipped schemas."""

_COMPONENTS = "#/components/schemas/"
_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]")
_NO_ANSWER = 499
"""The status of a call whose client has gone."""

_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose members are names of the author's, each with a schema (JSON Schema 2020-12)."""

_LITERALS = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are data, in which `$ref` means nothing."""


class _Operation(NamedTuple):
    """What is said of a route of the bus itself. `answer` is the schema of its 200, None where that is not known."""

    summary: str
    tag: str
    answer: Json | None
    parameters: tuple[Json, ...] = ()
    open: bool = False
    """Whether it needs no token, wherever there are tokens."""
    unwell: bool = False
    """Whether its answer comes with 503, too."""
    media_type: str = "application/json"
    body: Json | None = None
    """The schema of the body of its request, None where it needs none."""


def _object(required: Iterable[str] = (), **properties: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": properties}


def _ref(name: str) -> Json:
    return {"$ref": _COMPONENTS + name}


def _query(name: str, text: str, **schema: Any) -> Json:  # noqa: ANN401
    return {"name": name, "in": "query", "description": text, "schema": schema}


_TEXT: Json = {"type": "string"}
_TRUTH: Json = {"type": "boolean"}
_LIST: Json = {"type": "array", "items": _TEXT}
_COUNT: Json = {"type": "integer", "minimum": 0}
_NOTE: Json = {"type": ["string", "null"], "description": "The signed note of the tree; null without a key."}
_STATUS = _object(["status"], status=_TEXT)
_LEDGER_QUERY = (
    _query("limit", "How many records, of the last.", type="integer", minimum=1, maximum=10_000, default=100),
    _query("overlay", "Only those of this overlay.", type="string"),
    _query("ok", "Only those of calls that succeeded, or that did not.", type="boolean"),
    _query("phase", "Only those of calls in this phase.", type="string", enum=[str(phase) for phase in Phase]),
    _query("code", "Only those of calls that ended with this code: OK, or one of an error.", type="string"),
    _query("caller", "Only those of calls with the token of this name.", type="string"),
    _query("since", "Only those from this time on, in ms since the epoch.", type="integer", minimum=0, maximum=2**53),
    _query("until", "Only those up to this time, in ms since the epoch.", type="integer", minimum=0, maximum=2**53),
)

OPERATIONS = {
    "/": _Operation(
        "What this is, and where to go.",
        "machine",
        _object(["service", "version", "status", "paths"], service=_TEXT, version=_TEXT, status=_TEXT, paths=_LIST),
    ),
    "/health": _Operation("The process answers.", "machine", _STATUS, open=True, unwell=True),
    "/ready": _Operation(
        "A call could be made now.",
        "machine",
        _object(["ready"], ready=_TRUTH, reason=_TEXT),
        open=True,
        unwell=True,
    ),
    "/overlays": _Operation(
        "Every overlay that the caller may call, the broken and the disabled too.",
        "overlays",
        _object(["overlays"], overlays={"type": "array", "items": _ref("Overlay")}),
    ),
    "/overlays/{name}": _Operation("One overlay with its capabilities.", "overlays", _ref("Overlay")),
    "/overlays/{name}/purge": _Operation(
        "Tell an overlay's workers and service to let go of their caches.",
        "overlays",
        _object(["name", "told"], name=_TEXT, told={"type": "object", "additionalProperties": {"type": "integer"}}),
    ),
    "/invoke/{name}": _Operation("Call an overlay.", "calls", _ref("Outcome")),
    "/invoke/{name}/{capability}": _Operation("Call a capability of an overlay.", "calls", _ref("Outcome")),
    "/provenance": _Operation(
        "The last records of the caller's overlays and of none, oldest first; without an index of 256 MiB at most.",
        "ledger",
        _object(["events", "count"], events={"type": "array", "items": _ref("Record")}, count={"type": "integer"}),
        _LEDGER_QUERY,
    ),
    "/provenance/{seq}": _Operation("One record.", "ledger", _ref("Record")),
    "/provenance/{seq}/proof": _Operation(
        "That a line is in the ledger's Merkle tree (RFC 9162).",
        "ledger",
        _object(
            ["seq", "hash", "tree_size", "root", "inclusion", "checkpoint"],
            **dict.fromkeys(("seq", "tree_size"), _COUNT),
            **dict.fromkeys(("hash", "root"), _TEXT),
            inclusion=_LIST,
            checkpoint=_NOTE,
        ),
        (_query("size", "In the tree of so many first lines; of all by default.", type="integer", minimum=1),),
    ),
    "/provenance/consistency": _Operation(
        "That the ledger's Merkle tree has only grown (RFC 9162).",
        "ledger",
        _object(
            ["old_size", "old_root", "new_size", "new_root", "consistency", "checkpoint"],
            **dict.fromkeys(("old_size", "new_size"), _COUNT),
            **dict.fromkeys(("old_root", "new_root"), _TEXT),
            consistency=_LIST,
            checkpoint=_NOTE,
        ),
        (
            _query("old", "Lines of the smaller tree.", type="integer", minimum=0, default=0),
            _query("new", "Lines of the larger; all by default.", type="integer", minimum=1),
        ),
    ),
    "/provenance/checkpoint": _Operation(
        "How many lines the ledger has, and the root of their Merkle tree.",
        "ledger",
        _object(["tree_size", "root", "checkpoint"], tree_size=_COUNT, root=_TEXT, checkpoint=_NOTE),
    ),
    "/provenance/{seq}/replay": _Operation(
        "Run a line again, as a call of the caller's, and say whether the same came of it.",
        "ledger",
        _ref("Replay"),
        body=_object(live=_TRUTH | {"description": "Also where that could change something.", "default": False})
        | {"additionalProperties": False},
    ),
    "/stress": _Operation("How short memory is, and what waits for it.", "machine", _ref("Stress")),
    "/events": _Operation(
        "What happens, as it does (server-sent events). The data of the event stress is as that of /stress.",
        "machine",
        _TEXT,
        (_query("types", "The types of events, separated by commas; all by default.", type="string"),),
        media_type="text/event-stream",
    ),
    "/openapi.json": _Operation("This document.", "machine", {"type": "object"}),
}
"""By path, whatever the method. What is not here is a plugin's."""


def document(routes: Iterable[Route], manifests: Iterable[Manifest], *, needs_token: bool) -> Json:
    """The document. `manifests` are those of the overlays that can be called; `needs_token` is whether callers do."""
    schemas = {name: _component(name, _shipped(file)) for name, file in SHIPPED.items()}
    schemas |= {"Error": _error(), "Overlay": _overlay()}
    paths: defaultdict[str, Json] = defaultdict(dict)
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths[path][method.lower()] = _operation(route, path, method)
    for manifest in manifests:
        for capability in manifest.capabilities.values():
            paths[_path_of(manifest, capability)]["post"] = _call(manifest, capability, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "AAL-Core", "version": resources.version(), "license": {"name": "Apache-2.0"}},
        "security": [{"token": []}] if needs_token else [{}, {"token": []}],
        "paths": dict(paths),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, path: str, method: str) -> Json:
    known = OPERATIONS.get(path)
    if known is None:
        said = (route.endpoint.__doc__ or "").strip().partition("\n")[0] or f"{route.name}, of a plugin."
        known = _Operation(said, "plugins", None)
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in _PARAMETER.findall(route.path)
    ]
    found: Json = {
        "operationId": _name_of(method.lower(), *path.split("/")),
        "summary": known.summary,
        "tags": [known.tag],
        "parameters": [*in_path, *known.parameters],
        "responses": _responses(known),
    }
    if known.open:
        found["security"] = []
    if known.body is not None:
        found["requestBody"] = _body(known.body)
    if known.tag == "calls":
        found |= {"requestBody": _body(_ref("Invocation")), "responses": _call_responses(_ref("Outcome"))}
    return found


def _responses(known: _Operation) -> Json:
    good: Json = {"description": known.summary}
    if known.answer is not None:
        good["content"] = {known.media_type: {"schema": known.answer}}
    unwell = {"503": {"description": "No.", "content": _json(known.answer)}} if known.unwell and known.answer else {}
    return {"200": good, **unwell, "default": {"description": "Refused.", "content": _json(_ref("Error"))}}


def _call(manifest: Manifest, capability: Capability, schemas: Json) -> Json:
    """The operation of one capability; its schemas become components."""
    said = capability.description or manifest.description or f"Call {manifest.name}.{capability.name}."
    request = _name_of(manifest.name, capability.name, "request")
    schemas[request] = _request(manifest, capability, schemas)
    return {
        "operationId": _name_of("invoke", manifest.name, capability.name),
        "summary": said,
        "tags": [manifest.name],
        "requestBody": _body(_ref(request)),
        "responses": _call_responses(_answer(manifest, capability, schemas)),
    }


def _request(manifest: Manifest, capability: Capability, schemas: Json) -> Json:
    """The invocation of one capability: which is known, its phases, its input."""
    base: Json = schemas["Invocation"]
    members = {name: schema for name, schema in base["properties"].items() if name != "capability"}
    members["phase"] = members["phase"] | {"enum": [phase.value for phase in capability.phases]}
    if capability.input_schema is None:
        return base | {"properties": members}
    name = _name_of(manifest.name, capability.name, "input")
    schemas[name] = _component(name, capability.input_schema)
    return base | {"required": [*base["required"], "data"], "properties": members | {"data": _ref(name)}}


def _answer(manifest: Manifest, capability: Capability, schemas: Json) -> Json:
    """The outcome of one capability: its result is held to the output schema where the call succeeded."""
    if capability.output_schema is None:
        return _ref("Outcome")
    name = _name_of(manifest.name, capability.name, "output")
    schemas[name] = _component(name, capability.output_schema)
    succeeded = {"properties": {"ok": {"const": True}}}
    return {"allOf": [_ref("Outcome"), {"if": succeeded, "then": {"properties": {"result": _ref(name)}}}]}


def _call_responses(answer: Json) -> Json:
    """By status: what was refused before it was a call has the form of an error, everything else that of an outcome."""
    codes: defaultdict[int, list[str]] = defaultdict(list)
    for code, entry in CATALOGUE.items():
        codes[entry.http_status].append(code)
    refused = _json({"anyOf": [_ref("Outcome"), _ref("Error")]})
    found = {
        str(status): {"description": ", ".join(codes[status]), "content": refused}
        for status in sorted(codes)
        if status not in {200, _NO_ANSWER}
    }
    return {"200": {"description": "The overlay has answered.", "content": _json(answer)}, **found}


def _error() -> Json:
    """Of `BusError.body`."""
    nullable = {"type": ["string", "null"]}
    fault = _object(["path", "found", "allowed"], path=_TEXT, found=_TEXT, allowed=_TEXT)
    known = {
        "ok": {"const": False},
        "error": _TEXT,
        "code": {"enum": sorted(CATALOGUE)},
        "category": {"enum": sorted({entry.category for entry in CATALOGUE.values()})},
        "message": _TEXT,
        "detail": _TEXT,
        "hint": nullable,
        "retryable": _TRUTH,
        "faults": {"type": "array", "items": fault},
    }
    return _object(known, **known)


def _overlay() -> Json:
    """Of `Entry.summary`, and of what is measured; what else there is differs from overlay to overlay."""
    nullable = {"type": ["string", "null"]}
    known = {"name": _TEXT, "version": nullable, "status": _TEXT, "description": _TEXT, "phases": _LIST}
    known["findings"] = _LIST | {"description": "Capabilities whose SOFT is far from what is measured, and what to do."}
    capability = _object(measured=_measured())
    details = {"description": "The capabilities by name; of one overlay only.", "additionalProperties": capability}
    return _object(
        known,
        **known,
        capabilities=_LIST,
        permissions=_LIST,
        enabled=_TRUTH,
        error=nullable,
        details={"type": "object"} | details,
    )


def _measured() -> Json:
    """Of `Needs.report`."""
    count: Json = {"type": "integer", "minimum": 0}
    mb: Json = {"type": ["number", "null"]}
    step = {
        "step": _TEXT,
        "calls": count | {"description": "Of how many calls it was in force."},
        "median_with_mb": mb,
        "median_without_mb": mb,
        "payloads": count | {"description": "How many payloads came with it as the last step, and without it."},
        "saved_mb": mb | {"description": "The median of what these then needed less."},
    }
    known = {
        "measured_calls": count,
        "median_mb": mb,
        "p95_mb": mb,
        "peak_mb": mb,
        "reserved_mb": {"type": "number", "description": "What the next call reserves."},
        "basis": {"enum": ["none", "declared", "measured"]},
        "finding": {"enum": ["above soft", "below a tenth of soft", None]},
        "degradation": {"type": "array", "items": _object(step, **step)},
    }
    said = "What the last calls of the capability needed of memory, in MiB; medians are of at most 100 of them."
    return _object(known, **known) | {"type": ["object", "null"], "description": said}


def _shipped(name: str) -> Json:
    return resources.load_json(f"schemas/{name}.schema.json")


def _component(name: str, schema: Mapping[str, Any]) -> Json:
    """A schema as it stands under a name of `components`, which its references to itself then lead to."""
    rest = {key: member for key, member in schema.items() if key not in {"$schema", "$id"}}
    moved: Json = _moved(rest, _COMPONENTS + name, str(schema.get("$id", "")).removesuffix("#"))
    return moved


def _moved(value: Any, root: str, own: str) -> Any:  # noqa: ANN401  # a schema or a part of one
    """`root` is where the schema will stand, `own` the address that it gives itself, if any."""
    if isinstance(value, list):
        return [_moved(member, root, own) for member in value]
    if not isinstance(value, Mapping) or "$id" in value:  # a schema within that is a document of its own
        return value
    moved: Json = {}
    for key, member in value.items():
        if key == "$ref" and isinstance(member, str):
            moved[key] = _moved_reference(member, root, own)
        elif key in _SCHEMAS_BY_NAME and isinstance(member, Mapping):
            moved[key] = {name: _moved(schema, root, own) for name, schema in member.items()}
        else:
            moved[key] = member if key in _LITERALS else _moved(member, root, own)
    return moved


def _moved_reference(reference: str, root: str, own: str) -> str:
    local = reference.removeprefix(own)
    if local in {"", "#"}:
        return root
    return root + local[1:] if local.startswith("#/") else reference


def _path_of(manifest: Manifest, capability: Capability) -> str:
    """The shortest: an overlay with one capability needs no name for it."""
    return f"/invoke/{manifest.name}" + (f"/{capability.name}" if len(manifest.capabilities) > 1 else "")


def _name_of(*parts: str) -> str:
    return ".".join(_NO_NAME.sub("", part) for part in parts if part)


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _body(schema: Json) -> Json:
    return {"required": True, "content": _json(schema)}
