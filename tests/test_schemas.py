"""The shipped schemas, and what a misfit is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
from jsonschema import Draft202012Validator

from bus import manifests, schemas
from bus.schemas import compiled, faults, show
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMAS = sorted((REPO / "schemas").glob("*.schema.json"))
SHIPPED = sorted(folder for folder in (REPO / "overlays").iterdir() if folder.is_dir())


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda file: file.name)
def test_a_shipped_schema_is_valid_and_says_what_it_is_for(file: Path) -> None:
    schema = orjson.loads(file.read_bytes())
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"]
    assert schema["description"].endswith(".")


def test_every_shipped_schema_has_an_id_of_its_own() -> None:
    ids = [orjson.loads(file.read_bytes())["$id"] for file in SCHEMAS]
    assert len(ids) == len(set(ids)) >= 6


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda file: file.name)
def test_every_reference_in_a_shipped_schema_leads_somewhere(file: Path) -> None:
    schema = orjson.loads(file.read_bytes())
    for reference in references(schema):
        target = schema
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
        assert isinstance(target, dict)


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    for child in schema if isinstance(schema, list) else ():
        yield from references(child)


def test_the_bus_finds_the_schemas_that_it_uses() -> None:
    assert schemas.shipped("invocation") is schemas.shipped("invocation")
    with pytest.raises(FileNotFoundError, match="missing from this installation"):
        schemas.shipped("no_such_thing")


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_overlay_has_a_manifest_without_faults_and_warnings(folder: Path) -> None:
    manifest = manifests.read(folder)
    assert manifest.name == folder.name
    assert manifest.description
    assert manifest.warnings == ()


def test_three_overlays_are_shipped() -> None:
    assert [folder.name for folder in SHIPPED] == ["abraxas", "abraxas_exec", "aos_context", "psyfi"]


# A schema, a value, and what is said of it: path, found, allowed.
MISFITS = [
    ({"type": "object"}, [], ("$", "[]", "object")),
    ({"type": ["string", "null"]}, 1, ("$", "1", "string or null")),
    ({"required": ["it's"]}, {}, ("$.it's", "nothing", "a value; the key is required")),
    ({"required": ["a"], "properties": {"a": {"enum": ["x", 1]}}}, {}, ("$.a", "nothing", 'one of "x", 1')),
    ({"properties": {"phase": {}}, "additionalProperties": False}, {"phse": 1},
     ("$.phse", "an unknown key", "did you mean 'phase'?")),
    ({"properties": {"phase": {}}, "additionalProperties": False}, {"xyz": 1},
     ("$.xyz", "an unknown key", "phase")),
    ({"additionalProperties": False}, {"xyz": 1}, ("$.xyz", "an unknown key", "no keys here")),
    ({"enum": ["a", None]}, "b", ("$", '"b"', 'one of "a", null')),
    ({"items": {"minimum": 1}}, [1, 0], ("$[1]", "0", "1 or more")),
    ({"anyOf": [{"type": "string"}, {"properties": {"a": {"type": "integer"}}, "type": "object"}]}, {"a": "x"},
     ("$.a", '"x"', "integer")),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value", "said"), MISFITS)
def test_a_fault_says_where_it_is_what_was_found_and_what_is_allowed(
    schema: dict[str, Any], value: Any, said: tuple[str, str, str]
) -> None:
    assert [(fault.path, fault.found, fault.allowed) for fault in faults(compiled(schema), value)] == [said]


def test_two_missing_keys_are_two_faults_each_named_once() -> None:
    found = faults(compiled({"required": ["a", "b", "c"]}), {"b": 1})
    assert [fault.path for fault in found] == ["$.a", "$.c"]


def test_faults_stand_in_the_order_of_the_document_under_the_root_that_is_given() -> None:
    schema = compiled({"properties": {"a": {"type": "null"}, "b": {"items": {"type": "null"}}}})
    assert [fault.path for fault in faults(schema, {"b": [1, None, 2], "a": 1}, "$.data")] == [
        "$.data.a",
        "$.data.b[0]",
        "$.data.b[2]",
    ]


def test_a_document_that_is_wrong_a_thousand_times_gets_the_first_faults_and_says_that_there_are_more() -> None:
    found = schemas.faults(schemas.compiled({"items": {"type": "integer"}}), ["x"] * 1000)
    assert len(found) == schemas.FAULT_LIMIT + 1
    assert found[-1].found == "more faults"
    unknown = dict.fromkeys(map(str, range(1000)))
    assert len(schemas.faults(schemas.compiled({"additionalProperties": False}), unknown)) == schemas.FAULT_LIMIT + 1


def test_a_key_that_a_pattern_allows_is_no_fault() -> None:
    schema = {"properties": {"a": {}}, "patternProperties": {"^x": {}}, "additionalProperties": False}
    assert [fault.path for fault in schemas.faults(schemas.compiled(schema), {"a": 1, "x1": 1, "bad": 1})] == ["$.bad"]


def test_a_fault_in_a_large_value_stays_small() -> None:
    long = "k" * 1_000_000
    for value in ({long: 1}, {"a": [long] * 10}):
        found = schemas.faults(schemas.compiled({"additionalProperties": False, "minProperties": 3}), value)
        assert sum(len(str(fault)) for fault in found) < 2000


def test_a_schema_that_refers_to_itself_for_ever_is_a_fault() -> None:
    assert "for ever" in schemas.faults(schemas.compiled({"$ref": "#"}), 1)[0].allowed


def test_what_was_found_is_shown_cut_to_a_length_that_fits() -> None:
    assert show({"ü": [1, None]}) == '{"ü": [1, null]}'
    assert len(show("x" * 1000)) == 120
    assert show("x" * 1000).endswith("…")
