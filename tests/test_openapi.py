"""`GET /openapi.json`: true to the routes, the schemas and the overlays, and silent on how overlays are run."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from starlette.routing import Route
from starlette.testclient import TestClient

from bus import openapi
from bus.app import Api, create_app
from bus.dispatch import Bus
from bus.errors import CATALOGUE
from bus.guard import Guard
from tests.support import FixedStress, InProcessRunner, add_native, add_overlay, write_overlay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus.settings import Settings

ROOT = "urn:openapi"
OPEN = {"phase": "OPEN", "data": {}}
INPUT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://overlays.example/point",
    "type": "object",
    "required": ["at"],
    "properties": {
        "at": {"$ref": "#/$defs/point"},
        "again": {"$ref": "https://overlays.example/point#/$defs/point"},
        "self": {"$ref": "#"},
        "$ref": {"const": {"$ref": "#/$defs/point"}},
    },
    "$defs": {
        "point": {"type": "array", "prefixItems": [{"$ref": "#/$defs/number"}], "minItems": 1},
        "number": {"type": "number"},
    },
}
OUTPUT = {"type": "object", "required": ["payload"]}


@pytest.fixture
def bus(settings: Settings) -> Bus:
    return Bus(settings, plugins=[InProcessRunner(), FixedStress(0.25)])


@pytest.fixture
def client(settings: Settings, bus: Bus) -> Iterator[TestClient]:
    add_overlay(settings.overlays, "echo", phases=["OPEN", "CLEAR"])
    capabilities = {
        "draw": {"runner": "proc", "input_schema": INPUT, "output_schema": OUTPUT, "description": "Draws."},
        "a.b-c": {"runner": "proc"},
    }
    secret = {"env": ["PRIVATE_NAME"], "entrypoints": {"proc": {"command": ["sh", "run.sh", "--key=hidden"]}}}
    add_native(settings.overlays, "two", capabilities, **secret)
    add_overlay(settings.overlays, "off", status="active")
    (settings.state).mkdir(exist_ok=True)
    (settings.state / "overlays.json").write_text('{"disabled": ["off"]}')
    write_overlay(settings.overlays, "broken", {"name": "broken"})
    with TestClient(create_app(bus=bus)) as client:
        yield client


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """Of a schema within the document, whose references lead into the document."""
    registry: Registry[Any] = Registry().with_resource(ROOT, DRAFT202012.create_resource(document))
    absolute = json.loads(json.dumps(schema).replace('"#/', f'"{ROOT}#/'))
    return Draft202012Validator(absolute, registry=registry)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, member in value.items():
            if key == "$ref" and isinstance(member, str):
                yield member
            elif key != "const":
                yield from references(member)
    elif isinstance(value, list):
        for member in value:
            yield from references(member)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_reference_leads_somewhere_within_the_document(document: dict[str, Any]) -> None:
    found = list(references(document))
    assert len(found) > 10
    for reference in found:
        place: Any = document
        assert reference.startswith("#/")
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def test_every_schema_is_one_and_every_component_has_a_name_that_openapi_takes(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        Draft202012Validator.check_schema(schema)
        assert {"$id", "$schema"} & schema.keys() == set()


def test_every_operation_has_a_name_of_its_own_and_all_its_parameters(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    for path, _, operation in operations(document):
        in_path = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        assert operation["summary"]
        assert operation["responses"]


def test_what_is_said_of_the_routes_is_said_of_all_and_of_no_others(bus: Bus, document: dict[str, Any]) -> None:
    routes = Api(bus, Guard(bus.settings, bus.callers, bus.refused_before_auth)).routes()
    own = {route.path for route in routes if isinstance(route, Route)}
    assert own == set(openapi.OPERATIONS)
    assert own <= set(document["paths"])
    assert document["paths"]["/metrics"]["get"]["tags"] == ["plugins"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/", "/"),
        ("/health", "/health"),
        ("/ready", "/ready"),
        ("/overlays", "/overlays"),
        ("/overlays/{name}", "/overlays/two"),
        ("/overlays/{name}", "/overlays/broken"),
        ("/provenance", "/provenance?limit=5"),
        ("/provenance/{seq}", "/provenance/1"),
        ("/stress", "/stress"),
        ("/openapi.json", "/openapi.json"),
        ("/overlays/{name}", "/overlays/nobody"),
        ("/provenance", "/provenance?limit=0"),
        ("/provenance/{seq}", "/provenance/99"),
    ],
)
def test_what_is_answered_has_the_form_that_is_promised(
    client: TestClient, document: dict[str, Any], path: str, asked: str
) -> None:
    client.post("/invoke/echo", json=OPEN)
    answer = client.get(asked)
    responses = document["paths"][path]["get"]["responses"]
    promised = responses.get(str(answer.status_code), responses["default"])["content"]["application/json"]["schema"]
    validator(document, promised).validate(answer.json())


@pytest.mark.parametrize(
    ("path", "asked", "body", "status"),
    [
        ("/invoke/echo", "echo", OPEN, 200),
        ("/invoke/{name}", "nobody", OPEN, 404),
        ("/invoke/two/draw", "two/draw", {"phase": "OPEN", "data": {"at": [1]}}, 200),
        ("/invoke/two/draw", "two/draw", OPEN, 422),
        ("/invoke/{name}/{capability}", "two/a.b-c", OPEN, 200),
        ("/invoke/{name}", "echo", {}, 400),
    ],
)
def test_what_is_said_of_calls_holds_of_them(
    client: TestClient, path: str, asked: str, body: dict[str, Any], status: int
) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    request = operation["requestBody"]["content"]["application/json"]["schema"]
    assert validator(document, request).is_valid(body) == (status in {200, 404})
    answer = client.post(f"/invoke/{asked}", json=body)
    assert answer.status_code == status
    promised = operation["responses"][str(status)]["content"]["application/json"]["schema"]
    validator(document, promised).validate(answer.json())


def test_a_refusal_before_it_is_a_call_has_a_form_that_is_promised_too(
    client: TestClient, document: dict[str, Any]
) -> None:
    answer = client.post("/invoke/echo", json=OPEN, headers={"Host": "evil.example"})
    promised = document["paths"]["/invoke/echo"]["post"]["responses"]["403"]["content"]["application/json"]["schema"]
    validator(document, promised).validate(answer.json())
    codes = " ".join(one["description"] for one in document["paths"]["/invoke/echo"]["post"]["responses"].values())
    assert {code for code in CATALOGUE if code not in codes} == {"ERR_CANCELLED", "ERR_OVERLAY_FAILED"}


def test_each_capability_that_can_be_called_has_its_path_its_phases_and_its_schemas(document: dict[str, Any]) -> None:
    called = {path for path in document["paths"] if path.startswith("/invoke/") and "{" not in path}
    assert called == {"/invoke/echo", "/invoke/two/draw", "/invoke/two/a.b-c"}
    schemas = document["components"]["schemas"]
    assert schemas["echo.run.request"]["properties"]["phase"]["enum"] == ["OPEN", "CLEAR"]
    assert schemas["two.draw.request"]["required"] == ["phase", "data"]
    assert document["paths"]["/invoke/two/draw"]["post"]["summary"] == "Draws."
    request = validator(document, {"$ref": "#/components/schemas/two.draw.request"})
    assert request.is_valid({"phase": "OPEN", "data": {"at": [1], "again": [2.5], "self": {"at": [3]}}})
    for data in ({"at": ["1"]}, {"at": [1], "again": []}, {"at": [1], "self": {}}, {}):
        assert not request.is_valid({"phase": "OPEN", "data": data})
    assert request.is_valid({"phase": "OPEN", "data": {"at": [1], "$ref": {"$ref": "#/$defs/point"}}})
    assert not request.is_valid({"phase": "OPEN", "data": {"at": [1]}, "capability": "draw"})


def test_a_result_is_held_to_its_schema_only_where_the_call_succeeded(document: dict[str, Any]) -> None:
    answers = document["paths"]["/invoke/two/draw"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    (_, held) = answers["allOf"]
    check = validator(document, held)
    assert check.is_valid({"ok": True, "result": {"payload": 1}})
    assert not check.is_valid({"ok": True, "result": {}})
    assert check.is_valid({"ok": False, "result": None})


def test_the_document_has_nothing_of_how_an_overlay_is_run(client: TestClient) -> None:
    text = client.get("/openapi.json").text
    for private in ("PRIVATE_NAME", "hidden", "run.sh", str(client.base_url)):
        assert private not in text


def test_a_token_is_asked_for_where_there_are_tokens_but_not_for_health(bus: Bus) -> None:
    routes = [Route("/health", lambda _: None), Route("/own/{rest:path}", lambda _: None, methods=["PUT", "GET"])]
    needing, open_ = (openapi.document(routes, [], needs_token=needs) for needs in (True, False))
    assert needing["security"] == [{"token": []}]
    assert {} in open_["security"]
    assert needing["paths"]["/health"]["get"]["security"] == []
    assert set(needing["paths"]["/own/{rest}"]) == {"get", "put"}
