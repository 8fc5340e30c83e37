"""Requests, what overlays are sent, and replies: the form of each, and the plain look that stands in for the schema."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bus import envelopes, runes, schemas
from bus.canonical import CanonicalError, canonical
from bus.degradation import memory_block
from bus.envelopes import (
    check_input,
    check_result,
    make_invocation,
    open_reply,
    overlay_request,
    read_invocation,
    run_id,
    split_target,
)
from bus.errors import InputError, RequestError
from bus.model import Degradation, Invocation, Phase, Told
from runners.base import Outcome
from tests.support import a_call, a_capability, a_manifest, misfits

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
LOOK_ALIKES = st.sampled_from([*Phase, "open", "", "OPEN ", 1, 0, True, False, None, {}, [], {"a": 1}, "text", 0.5])


def documents_with(*keys: str) -> st.SearchStrategy[Any]:
    """Objects of mostly these keys, whose values are right now and then."""
    return st.dictionaries(st.sampled_from([*keys, "extra"]), LOOK_ALIKES | JSON, max_size=5) | JSON


@given(documents_with("phase", "data", "capability", "seed", "timeout_ms"))
@example({"phase": "OPEN", "data": {}})
@example({"phase": Phase.OPEN, "data": {}})
@example({"phase": "OPEN", "extra": {}})
def test_the_plain_look_accepts_no_request_that_the_schema_refuses(document: Any) -> None:
    if envelopes._is_usual_request(document):
        assert schemas.faults(schemas.shipped("invocation"), document) == []


@given(documents_with("ok", "result", "error", "code", "retryable", "cost_cents", "side_effects").map(
    lambda document: document if isinstance(document, dict) and "ok" in document else {"ok": document}
))  # fmt: skip
@example({"ok": True, "result": None})
@example({"ok": 1, "result": None})
def test_the_plain_look_accepts_no_reply_that_the_schema_refuses(document: Any) -> None:
    if envelopes._is_usual_reply(document):
        assert schemas.faults(schemas.shipped("overlay_reply"), document) == []


@given(documents_with("phase", "data", "capability", "profile", "seed", "session", "timeout_ms"))
def test_a_request_becomes_an_invocation_just_where_the_schema_takes_it(document: Any) -> None:
    fits = not schemas.faults(schemas.shipped("invocation"), document) and has_canonical_form(document)
    try:
        make_invocation(document, "echo")
    except RequestError:
        made = False
    else:
        made = True
    assert made is fits


def has_canonical_form(document: Any) -> bool:
    try:
        canonical(document)
    except CanonicalError:
        return False
    return True


def test_the_usual_forms_need_no_schema() -> None:
    assert envelopes._is_usual_request({"phase": "SEAL", "data": {"a": 1}})
    assert envelopes._is_usual_reply({"ok": True, "result": [1]})


def test_a_request_is_read_whole() -> None:
    body = {"phase": "ALIGN", "data": {"b": 1, "a": 2}, "profile": "BALANCED", "seed": 7, "session": "s"}
    call = read_invocation(json.dumps(body | {"timeout_ms": 50}).encode(), "echo", "run", caller="me")
    assert (call.overlay, call.capability, call.phase, call.caller) == ("echo", "run", Phase.ALIGN, "me")
    assert (call.profile, call.seed, call.session, call.timeout_ms) == ("BALANCED", 7, "s", 50)
    assert call.payload == {"a": 2, "b": 1}
    assert call.payload_json == b'{"a":2,"b":1}'


def test_data_may_be_left_out() -> None:
    assert make_invocation({"phase": "OPEN"}, "echo").payload_json == b"{}"


def test_request_ids_sort_by_the_time_of_their_making() -> None:
    ids = [a_call().request_id for _ in range(50)]
    times = [int(id_.replace("-", "")[:12], 16) for id_ in ids]
    assert len(set(ids)) == 50
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("address", "body", "chosen"), [("a", None, "a"), (None, "a", "a"), ("a", "a", "a"), (None, None, None)]
)
def test_the_capability_stands_in_the_address_or_in_the_body(
    address: str | None, body: str | None, chosen: str | None
) -> None:
    assert make_invocation({"phase": "OPEN", "capability": body}, "echo", address).capability == chosen


@pytest.mark.parametrize(
    ("target", "places", "chosen"),
    [
        ("psyfi", (None, None), ("psyfi", None)),
        ("psyfi.ping", (None, "ping"), ("psyfi", "ping")),
        ("psyfi", ("ping", "psyfi.ping"), ("psyfi", "ping")),
        ("psyfi.a.b", (), ("psyfi", "a.b")),
        ("..", (), ("..", None)),
        (".aal", (), (".aal", None)),
        ("psyfi.", (), ("psyfi.", None)),
    ],
)
def test_a_capability_is_named_behind_the_dot_or_beside_it(
    target: str, places: tuple[str | None, ...], chosen: tuple[str, str | None]
) -> None:
    assert split_target(target, *places) == chosen


def test_address_and_body_may_not_name_two_capabilities() -> None:
    with pytest.raises(RequestError, match="the call names several capabilities"):
        make_invocation({"phase": "OPEN", "capability": "b"}, "echo", "a")


DEEP = b'{"phase":"OPEN","data":{"a":' + b"[" * 100 + b"]" * 100 + b"}}"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b"", "ERR_BAD_JSON", "line 1 column 1"),
        (b"{'phase': 'OPEN'}", "ERR_BAD_JSON", "line 1 column 2"),
        (b'{"phase":"OPEN"} trailing', "ERR_BAD_JSON", "Extra data"),
        (b'{"phase":"OPEN","data":{"x":NaN}}', "ERR_BAD_JSON", "NaN is not a JSON value"),
        (b'{"phase":"OPEN","data":{"x":-Infinity}}', "ERR_BAD_JSON", "-Infinity is not a JSON value"),
        (b'{"phase":"OPEN","data":{"x":1e999}}', "ERR_BAD_JSON", "at /data/x"),
        (b'{"phase":"OPEN","phase":"SEAL"}', "ERR_BAD_JSON", "the key 'phase' stands twice"),
        (b'{"phase":"OPEN","data":{"a":{"b":1,"b":1}}}', "ERR_BAD_JSON", "the key 'b' stands twice"),
        (DEEP, "ERR_BAD_JSON", "nested deeper than 64 levels"),
        (b"[" * 1_000_000, "ERR_BAD_JSON", "nested deeper than 64 levels"),
        (b'{"phase":"OPEN","data":{"a":[0,9007199254740993]}}', "ERR_BAD_JSON", "at /data/a/1"),
        (b'{"phase":"OPEN","data":{"a/b":{"~":-9007199254740993}}}', "ERR_BAD_JSON", "at /data/a~1b/~0"),
        (b'{"phase":"OPEN","data":{"a":"\\ud800"}}', "ERR_BAD_JSON", "lone surrogate"),
        (b'{"phase":"OPEN","data":{"\\udfff":1}}', "ERR_BAD_JSON", "lone surrogate"),
        (b'{"phase":"OPEN","data":{"a":"\xff"}}', "ERR_BAD_JSON", "is not UTF-8"),
        (b"[]", "ERR_BAD_REQUEST", "$: found [], allowed: object"),
        (b"null", "ERR_BAD_REQUEST", "$: found null, allowed: object"),
        (b"{}", "ERR_BAD_REQUEST", "$.phase: found nothing"),
        (b'{"phase":null}', "ERR_BAD_REQUEST", "$.phase: found null, allowed: one of"),
        (b'{"phase":"open"}', "ERR_UNKNOWN_PHASE", 'phase "open" is not one of OPEN, ALIGN, ASCEND, CLEAR, SEAL'),
        (b'{"phase":"OPEN","data":[1]}', "ERR_BAD_REQUEST", "$.data: found [1], allowed: object"),
        (b'{"phase":"OPEN","data":"x"}', "ERR_BAD_REQUEST", '$.data: found "x", allowed: object'),
        (b'{"phase":"OPEN","dat":{}}', "ERR_BAD_REQUEST", "$.dat: found an unknown key, allowed: did you mean 'data'?"),
        (b'{"phase":"OPEN","timeout_ms":0}', "ERR_BAD_REQUEST", "$.timeout_ms"),
        (b'{"phase":"OPEN","timeout_ms":"9"}', "ERR_BAD_REQUEST", "$.timeout_ms"),
        (b'{"phase":"OPEN","seed":1.5}', "ERR_BAD_REQUEST", "$.seed"),
        (b'{"phase":"OPEN","seed":9007199254740993}', "ERR_BAD_JSON", "at /seed"),
        (b'{"phase":"OPEN","capability":""}', "ERR_BAD_REQUEST", "$.capability"),
    ],
)  # fmt: skip
def test_a_request_of_the_wrong_form_is_refused_with_what_is_wrong_where(body: bytes, code: str, said: str) -> None:
    with pytest.raises(RequestError) as refusal:
        read_invocation(body, "echo")
    assert refusal.value.code == code
    assert said in refusal.value.detail


@pytest.mark.parametrize("member", ["phase", "seed", "session", "capability", "profile", "unknown"])
def test_a_lone_surrogate_beside_the_data_is_refused_too(member: str) -> None:
    body = json.dumps({"phase": "OPEN", "data": {}} | {member: "\ud800"}).encode()
    with pytest.raises(RequestError, match=f"at /{member}: a lone surrogate"):
        read_invocation(body, "echo")


def test_every_fault_of_a_request_is_named_at_once() -> None:
    with pytest.raises(RequestError) as refusal:
        make_invocation({"data": 1, "seed": [], "phse": "OPEN"}, "echo")
    assert {fault.path for fault in refusal.value.faults} == {"$.phase", "$.data", "$.seed", "$.phse"}


def test_input_that_does_not_fit_names_every_fault_by_its_path_in_data() -> None:
    schema = {"type": "object", "required": ["text"], "properties": {"n": {"type": "integer"}}}
    with pytest.raises(InputError) as refusal:
        check_input(a_capability(), schemas.compiled(schema), {"n": "x"})
    assert refusal.value.code == "ERR_INPUT_SCHEMA"
    assert {fault.path for fault in refusal.value.faults} == {"$.data.text", "$.data.n"}


def test_the_run_id_is_the_same_for_the_same_call_with_a_seed_and_new_without_one() -> None:
    def of(**changes: Any) -> str:
        return run_id(a_manifest(), a_capability(), a_call(**{"data": {"a": 1}} | changes))

    assert of(seed=7) == of(seed=7)
    assert len({of(seed=7), of(seed="7"), of(seed=8), of(seed=7, data={"a": 2}), of(), of()}) == 6


def test_a_whole_number_is_the_same_however_it_is_written() -> None:
    call = read_invocation(b'{"phase":"OPEN","seed":7.0,"timeout_ms":5e1,"data":{"a":1.0}}', "echo")
    assert (repr(call.seed), repr(call.timeout_ms), call.payload_json) == ("7", "50", b'{"a":1}')


def test_the_run_id_tells_overlay_version_and_capability_apart() -> None:
    call = a_call(seed=1)
    ids = {
        run_id(a_manifest(), a_capability(), call),
        run_id(a_manifest(name="other"), a_capability(), call),
        run_id(a_manifest(version="9"), a_capability(), call),
        run_id(a_manifest(), a_capability(name="other"), call),
    }
    assert len(ids) == 4


BALANCED = memory_block(
    runes.resolve("BALANCED"), 1.0, all_steps=False, degradation=Degradation(0.7, True), total_mb=8000
)
TOLD = Told("the request id", "1" * 64, 123, 3, "2" * 64, BALANCED)


def sent(call: Invocation) -> bytes:
    manifest = a_manifest(resources={"memory_mb": 1.5, "prefers_gpu": True}, deterministic=True)
    return overlay_request(call, manifest, a_capability(), TOLD, deadline_ms=2_000_000_000_000)


@given(st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers(-9, 9) | st.text(), max_size=4))
def test_what_an_overlay_is_sent_fits_its_schema_and_is_canonical(payload: dict[str, Any]) -> None:
    text = sent(a_call(data=payload, seed="s"))
    assert misfits("overlay_request", text) == []
    assert canonical(orjson.loads(text)) == text
    assert orjson.loads(text)["payload"] == payload


def test_degradation_reaches_the_overlay() -> None:
    memory = orjson.loads(sent(a_call()))["memory"]
    assert memory["kv_shrink_factor"] == 0.75
    assert memory["max_context_tokens"] == 4096
    assert memory["disabled_features"] == ["HIGH_COST_METRICS"]
    assert (memory["max_fraction"], memory["disable_nonessential"]) == (0.7, True)


def test_an_overlay_is_shown_what_it_is_told_and_not_what_the_call_knows() -> None:
    shown = orjson.loads(sent(a_call()))
    assert (shown["request_id"], shown["run_id"], shown["timestamp_ms"]) == ("the request id", "1" * 64, 123)
    assert shown["provenance"] == {"prev_size": 3, "environment_hash": "2" * 64}
    assert shown["policy"] == {"deterministic": True}


# What an overlay wrote, and what is read from it: code, result, error.
REPLIES = [
    ({"ok": True, "result": {"a": 1}}, "OK", {"a": 1}, None),
    ({"ok": True}, "OK", None, None),
    ({"ok": True, "result": 1, "request_id": "r", "extra": 2}, "OK", 1, None),
    ({"ok": True, "result": 1, "error": "ignored", "code": "ERR_X"}, "OK", 1, None),
    ({"ok": False, "error": "no text"}, "ERR_OVERLAY_FAILED", None, "no text"),
    ({"ok": False, "error": {"message": "no text", "x": 1}}, "ERR_OVERLAY_FAILED", None, "no text"),
    ({"ok": False, "error": {"x": 1}}, "ERR_OVERLAY_FAILED", None, '{"x": 1}'),
    ({"ok": False}, "ERR_OVERLAY_FAILED", None, "the overlay answered ok: false and gave no reason"),
    ({"ok": False, "error": None, "code": None}, "ERR_OVERLAY_FAILED", None,
     "the overlay answered ok: false and gave no reason"),
    ({"ok": False, "error": "e", "code": "ERR_MINE"}, "ERR_MINE", None, "e"),
    ({"ok": False, "error": "e", "code": "OK"}, "ERR_OVERLAY_FAILED", None, "e"),
    ({"ok": False, "error": "e", "result": [1]}, "ERR_OVERLAY_FAILED", [1], "e"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "code", "result", "error"), REPLIES)
def test_an_object_with_ok_is_opened_as_a_reply(written: Any, code: str, result: Any, error: str | None) -> None:
    outcome = open_reply(Outcome(result=written))
    assert (outcome.code, outcome.result, outcome.error, outcome.replied) == (code, result, error, True)


def test_a_reply_may_tell_cost_side_effects_and_whether_to_try_again() -> None:
    reply = {"ok": False, "error": "e", "retryable": True, "cost_cents": 1.5, "side_effects": [{"file": "x"}]}
    outcome = open_reply(Outcome(result=reply))
    assert (outcome.retryable, outcome.cost_cents, outcome.side_effects) == (True, 1.5, ({"file": "x"},))
    assert outcome.status == "failure"


@pytest.mark.parametrize("value", [None, 0, "text", [1, 2], {}, {"result": 1}, {"OK": True}, [{"ok": True}]])
def test_any_other_json_is_the_result_itself(value: Any) -> None:
    outcome = open_reply(Outcome(result=value))
    assert (outcome.ok, outcome.result, outcome.replied) == (True, value, False)


@pytest.mark.parametrize(
    ("reply", "path"),
    [
        ({"ok": 1}, "$.ok"),
        ({"ok": None, "result": 1}, "$.ok"),
        ({"ok": "true", "result": 1}, "$.ok"),
        ({"ok": False, "error": 5}, "$.error"),
        ({"ok": False, "code": "lower"}, "$.code"),
        ({"ok": False, "retryable": "no"}, "$.retryable"),
        ({"ok": True, "cost_cents": -1}, "$.cost_cents"),
        ({"ok": True, "cost_cents": "1"}, "$.cost_cents"),
        ({"ok": True, "side_effects": {}}, "$.side_effects"),
    ],
)
def test_a_reply_of_the_wrong_form_is_a_protocol_error_that_says_where(reply: Any, path: str) -> None:
    outcome = open_reply(Outcome(result=reply))
    assert (outcome.code, outcome.result, outcome.replied) == ("ERR_OVERLAY_PROTOCOL", None, False)
    assert outcome.error is not None
    assert path in outcome.error


def test_the_reply_of_a_run_that_failed_is_not_opened() -> None:
    crashed = Outcome(code="ERR_OVERLAY_CRASH", result={"ok": True})
    assert open_reply(crashed) is crashed


@pytest.mark.parametrize(
    ("result", "pointer"),
    [({"a": [2**60]}, "/a/0"), ("\ud800", "the top"), ({"\udc00": 1}, "/"), (float("inf"), "the top")],
)
def test_a_result_without_a_canonical_form_is_a_protocol_error_with_its_pointer(result: Any, pointer: str) -> None:
    outcome, result_json = check_result(None, Outcome(result=result))
    assert (outcome.code, outcome.result, result_json) == ("ERR_OVERLAY_PROTOCOL", None, None)
    assert outcome.error is not None
    assert f"at {pointer}" in outcome.error


def test_a_result_is_held_to_the_output_schema_only_where_the_call_succeeded() -> None:
    validator = schemas.compiled({"type": "string"})
    refused, text = check_result(validator, Outcome(result=5))
    assert (refused.code, refused.result, text) == ("ERR_OUTPUT_SCHEMA", 5, b"5")
    assert refused.error == "$.result: found 5, allowed: string"
    failed = Outcome(code="ERR_OVERLAY_FAILED", result=5)
    assert check_result(validator, failed) == (failed, b"5")
    assert check_result(validator, Outcome(result="x"))[0].ok


def test_no_result_and_a_result_of_null_are_two_things() -> None:
    assert check_result(None, Outcome(code="ERR_TIMEOUT"))[1] is None
    assert check_result(None, Outcome(result=None))[1] == b"null"


@pytest.mark.parametrize("cost_cents", [float("inf"), float("nan"), 1e300, 2**60])
def test_a_cost_that_no_record_could_hold_is_a_protocol_error(cost_cents: float) -> None:
    outcome = open_reply(Outcome(result={"ok": True, "cost_cents": cost_cents}))
    assert outcome.code == "ERR_OVERLAY_PROTOCOL"
    assert "cost_cents" in str(outcome.error)


@pytest.mark.parametrize("member", [{"side_effects": [2**60]}, {"side_effects": ["\ud800"]}, {"error": "\ud800"}])
def test_a_reply_without_a_canonical_form_is_a_protocol_error_that_can_be_written_down(member: Any) -> None:
    outcome = open_reply(Outcome(result={"ok": False} | member))
    assert outcome.code == "ERR_OVERLAY_PROTOCOL"
    assert f"at /{next(iter(member))}".encode() in canonical(outcome.error)
