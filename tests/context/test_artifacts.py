"""The documents and their schemas: strict, and every fault has its path."""

from __future__ import annotations

import jsonschema
import jsonschema_rs
import pytest
from aos_context.artifacts import ARTIFACTS, Artifact, Document, decode, encode, schema, validate
from aos_context.errors import BrokenError, SchemaError

from tests.context.made import working_set

ITEM = {"id": "c1", "content": "x", "timestamp": "2026-01-18T00:00:00Z", "priority": 2}

EVENT = (
    '{"_schema_version":"2.1","seq":1,"event_id":"e","event_type":"NOTED","run_id":"r",'
    '"timestamp":"2026-01-18T00:00:00Z","actor":null,"data":{"a":%s}}'
)


def objects(part: object) -> list[Document]:
    """Every part of a schema that describes an object with members."""
    if isinstance(part, list):
        return [found for one in part for found in objects(one)]
    if not isinstance(part, dict):
        return []
    here = [part] if part.get("type") == "object" and "properties" in part else []
    return here + [found for one in part.values() for found in objects(one)]


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_every_schema_is_valid_and_allows_only_what_it_names(artifact: Artifact) -> None:
    document = schema(artifact)
    jsonschema.Draft202012Validator.check_schema(document)
    assert jsonschema_rs.meta.is_valid(document)
    assert document["$id"] == f"urn:aos-context:2.1:{artifact}"
    assert document["properties"]["_schema_version"] == {"const": "2.1"}
    assert "_schema_version" in document["required"]
    assert all(part["additionalProperties"] is False for part in objects(document))


def test_a_document_of_another_version_or_with_an_unknown_member_is_refused_with_every_path() -> None:
    patch = {
        "_schema_version": "2.0",
        "expected_seq": -1,
        "set": {"status": "ASLEEP", "colour": "red", "sliding_context": [{**ITEM, "priority": 10}]},
    }
    with pytest.raises(SchemaError) as refused:
        validate("ws_patch", patch)
    paths = {fault["path"] for fault in refused.value.faults}
    assert paths == {
        "$._schema_version",
        "$.expected_seq",
        "$.set.status",
        "$.set",
        "$.set.sliding_context[0].priority",
    }


SECRET = "sk-live-secret"


@pytest.mark.parametrize(
    ("artifact", "members", "said"),
    [
        ("ws_patch", {"set": {"current_stage": SECRET}}, "a string of 14 characters does not match"),
        ("ws_patch", {"set": {"status": SECRET}}, "a string of 14 characters is not one of"),
        ("ws_patch", {"set": {"next_action": SECRET * 1_000}}, "a string of 14000 characters is longer than 10000"),
        ("ws_patch", {"set": {"next_action": [SECRET]}}, 'an array of 1 items is not of type "string"'),
        ("ws_patch", {"set": {"objective": None}}, 'null is not of type "string"'),
        ("ws_patch", {"set": {"sliding_context": [ITEM | {"timestamp": SECRET}]}}, 'is not a "date-time"'),
        ("ws_patch", {"set": {"sliding_context": [ITEM | {"priority": 424_242}]}}, "a number is greater than"),
        ("ws_patch", {"remove": {"sliding_context": [SECRET + " "]}}, "a string of 15 characters does not match"),
        ("ws_patch", {"set": {SECRET * 1_000: 1, "status": "BUSY"}}, "has members that are not known: 'sk-live-"),
        ("ws_patch", {"_schema_version": SECRET, "set": {"status": "BUSY"}}, '"2.1" was expected'),
        ("ws_patch", {}, "$: has none of 'set', 'remove', 'add'"),
        ("mcr", {"op": "add", "target_id": SECRET}, "$.target_id: is not allowed here"),
        ("memory_item", {"task_id": SECRET + " "}, 'does not match "^[A-Za-z0-9]'),
        ("memory_item", {"task_id": SECRET + " "}, '15 characters is not of type "null"'),
        (
            "resume_pack_manifest",
            {"pointers": {SECRET + " ": 1}},
            "has a member whose name is not allowed: a string of",
        ),
    ],
)
def test_what_is_refused_is_told_by_rule_and_kind_and_not_by_value(
    artifact: Artifact, members: Document, said: str
) -> None:
    document = {"_schema_version": "2.1", **({"expected_seq": 0} if artifact == "ws_patch" else {}), **members}
    with pytest.raises(SchemaError) as refused:
        validate(artifact, document)
    told = [f"{fault['path']}: {fault['message']}" for fault in refused.value.faults]
    assert any(said in one for one in told), told
    assert all(SECRET not in one or "not known: '" in one for one in told)
    assert "424" not in str(told)
    assert max(map(len, told)) < 300


def test_many_members_that_are_not_known_are_named_in_short() -> None:
    document = {"_schema_version": "2.1", "expected_seq": 0, **{f"{number:0>99}": 1 for number in range(100)}}
    with pytest.raises(SchemaError, match="0', and 95 more"):
        validate("ws_patch", document)


def test_a_patch_that_changes_nothing_or_what_is_not_to_be_changed_is_refused() -> None:
    refused: list[Document] = [
        {},
        {"set": {}},
        {"set": {"_update_seq": 3}},
        {"set": {"run_id": "other"}},
        {"remove": {}},
    ]
    for members in refused:
        with pytest.raises(SchemaError):
            validate("ws_patch", {"_schema_version": "2.1", "expected_seq": 0, **members})


@pytest.mark.parametrize(
    ("member", "blank"), [("objective", " \t\n"), ("acceptance_criteria", ["x", "\u00a0"]), ("constraints", [" "])]
)
def test_what_is_nothing_but_blanks_is_no_text(member: str, blank: object) -> None:
    with pytest.raises(SchemaError, match=rf"\$\.{member}"):
        validate("working_set", working_set() | {member: blank})
    with pytest.raises(SchemaError, match=rf"\$\.set\.{member}"):
        validate("ws_patch", {"_schema_version": "2.1", "expected_seq": 0, "set": {member: blank}})


def test_the_same_document_is_always_the_same_bytes() -> None:
    one = encode("ws_patch", {"_schema_version": "2.1", "expected_seq": 0, "add": {"pinned_context": [ITEM]}})
    other = {"add": {"pinned_context": [dict(reversed(ITEM.items()))]}, "expected_seq": 0, "_schema_version": "2.1"}
    assert encode("ws_patch", other) == one
    assert decode("ws_patch", one, "here") == other


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"_schema_version":"2.1"}', b"[" * 100_000])
def test_what_is_not_what_was_written_is_broken_and_says_where(text: bytes) -> None:
    with pytest.raises(BrokenError, match="some/file"):
        decode("working_set", text, "some/file")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"', '{"\\udfff": 1}'])
def test_what_could_not_be_written_again_is_not_read(value: str) -> None:
    text = EVENT % value
    with pytest.raises(BrokenError):
        decode("ledger_event", text.encode(), "here")


def test_a_whole_surrogate_pair_is_read_as_the_character_that_it_is() -> None:
    assert decode("ledger_event", (EVENT % '"\\ud83d\\ude00"').encode(), "here")["data"] == {"a": "\U0001f600"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_what_json_cannot_hold_is_refused_as_a_schema_refuses(value: object) -> None:
    event = decode("ledger_event", (EVENT % "1").encode(), "here")
    with pytest.raises(SchemaError, match="cannot be written"):
        encode("ledger_event", {**event, "data": {"a": value}})
