"""The envelopes on the way in: the caller's request, what the overlay is sent, and what it replies.

A schema check costs a hundred times what a plain look at the usual form does. So a request or reply of the usual form
is accepted by a plain look, and everything else goes to the schema, which alone says what is wrong. The plain look
accepts nothing that the schema refuses; a test holds it to that.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import orjson

from bus import schemas
from bus.canonical import CanonicalError, canonical, canonical_own, canonical_to_read, sha256_hex
from bus.errors import CATALOGUE, InputError, RequestError, say
from bus.manifests import local_name
from bus.model import Invocation, Phase, new_request_id, now_ms
from runners.base import Code, JsonError, Outcome, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jsonschema import Draft202012Validator

    from bus.model import Capability, Manifest, Told

_PHASES = frozenset(Phase)


def read_invocation(
    body: bytes, target: str, capability: str | None = None, *, caller: str | None = None
) -> Invocation:
    """A request body as an invocation of `target`, an overlay's name or `overlay.capability`.

    Raises `RequestError`: ERR_BAD_JSON for what is not JSON or has no canonical form, ERR_UNKNOWN_PHASE, and
    ERR_BAD_REQUEST with the faults of the form.
    """
    try:
        request = parse_json(body)
    except JsonError as error:
        raise RequestError("ERR_BAD_JSON", str(error)) from None
    return make_invocation(request, target, capability, caller=caller)


def make_invocation(
    request: Any,  # noqa: ANN401
    target: str,
    capability: str | None = None,
    *,
    caller: str | None = None,
) -> Invocation:
    """As `read_invocation`, from a request already parsed."""
    if not _is_usual_request(request):
        _canonical(request, "")
        _refuse_request(request)
        request = {name: _whole(member) for name, member in request.items()}
    overlay, capability = split_target(target, capability, request.get("capability"))
    payload = request.get("data", {})
    return Invocation(
        request_id=new_request_id(),
        timestamp_ms=now_ms(),
        received=time.monotonic(),
        overlay=overlay,
        capability=capability,
        phase=Phase(request["phase"]),
        payload=payload,
        payload_json=canonical_payload(payload),
        profile=request.get("profile"),
        seed=request.get("seed"),
        session=request.get("session"),
        timeout_ms=request.get("timeout_ms"),
        caller=caller,
    )


def _whole(member: Any) -> Any:  # noqa: ANN401
    """A whole number as an int: to a schema 7.0 is an integer, and its canonical form is that of 7."""
    return int(member) if isinstance(member, float) and member.is_integer() else member


def split_target(target: str, *capabilities: str | None) -> tuple[str, str | None]:
    """The overlay, and the one capability that is named behind the dot or beside it (`ping` or `psyfi.ping`), if any.

    Raises `RequestError` where the places name different ones.
    """
    overlay, _, dotted = target.partition(".")
    if not (overlay and dotted):
        overlay, dotted = target, ""
    named = {local_name(overlay, name) for name in (dotted, *capabilities) if name}
    if len(named) > 1:
        raise RequestError("ERR_BAD_REQUEST", f"the call names several capabilities: {schemas.show(sorted(named))}")
    return overlay, named.pop() if named else None


def canonical_payload(payload: Mapping[str, Any]) -> bytes:
    """The RFC 8785 form of a payload. Raises `RequestError` with the JSON pointer of what has none."""
    return _canonical(payload, "/data")


def _canonical(value: Any, root: str) -> bytes:  # noqa: ANN401
    try:
        return canonical_to_read(value)
    except CanonicalError as error:
        raise RequestError("ERR_BAD_JSON", f"at {root + error.pointer or 'the top'}: {error.message}") from None


def _is_usual_request(request: Any) -> bool:  # noqa: ANN401
    """Just a phase and data, as nearly every request is."""
    return (
        type(request) is dict
        and len(request) == 2  # noqa: PLR2004
        and type(request.get("phase")) is str
        and request["phase"] in _PHASES
        and type(request.get("data")) is dict
    )


def _refuse_request(request: Any) -> None:  # noqa: ANN401
    """Raise for what the schema refuses; an unknown phase has a code of its own."""
    faults = schemas.faults(schemas.shipped("invocation"), request)
    if not faults:
        return
    if isinstance(request, dict) and isinstance(request.get("phase"), str) and request["phase"] not in _PHASES:
        detail = f"phase {schemas.show(request['phase'])} is not one of {', '.join(Phase)}"
        raise RequestError("ERR_UNKNOWN_PHASE", detail, faults=faults)
    raise RequestError("ERR_BAD_REQUEST", say(faults), faults=faults)


def check_input(capability: Capability, validator: Draft202012Validator, payload: Mapping[str, Any]) -> None:
    """Raise `InputError` with every fault where the payload does not fit the capability's input schema."""
    if faults := schemas.faults(validator, payload, "$.data"):
        detail = f"{capability.name}: " + say(faults)
        raise InputError("ERR_INPUT_SCHEMA", detail, faults=faults)


def run_id(manifest: Manifest, capability: Capability, call: Invocation) -> str:
    """SHA-256 of {overlay, version, capability, payload, salt}; the salt is the seed, or the request id without one."""
    salt = call.request_id if call.seed is None else call.seed
    identity = {
        "overlay": manifest.name,
        "version": manifest.version,
        "capability": capability.name,
        "payload": orjson.Fragment(call.payload_json),
        "salt": salt,
    }
    return sha256_hex(canonical_own(identity))


def overlay_request(
    call: Invocation, manifest: Manifest, capability: Capability, told: Told, *, deadline_ms: int
) -> bytes:
    """The canonical bytes that the overlay reads, of the form of `schemas/overlay_request.schema.json`."""
    to_text = canonical_own if call.replay_of is None else canonical  # else the memory block is that of some line
    return to_text(
        {
            "overlay": manifest.name,
            "version": manifest.version,
            "capability": capability.name,
            "phase": call.phase.value,
            "request_id": told.request_id,
            "run_id": told.run_id,
            "timestamp_ms": told.timestamp_ms,
            "deadline_ms": deadline_ms,
            "payload": orjson.Fragment(call.payload_json),
            "seed": call.seed,
            "policy": {"deterministic": manifest.deterministic},
            "memory": told.memory,
            "resources": orjson.Fragment(canonical(manifest.resources)) if manifest.resources else {},
            "provenance": {"prev_size": told.prev_size, "environment_hash": told.environment_hash},
        }
    )


def open_reply(outcome: Outcome) -> Outcome:
    """Open what the overlay sent: an object with `ok` is the protocol reply, any other JSON value the result itself."""
    reply = outcome.result
    if not outcome.ok or type(reply) is not dict or "ok" not in reply:
        return outcome
    if not _is_usual_reply(reply) and (fault := _fault_of_reply(reply)):
        return outcome._replace(code=Code.PROTOCOL, result=None, error=fault)
    return outcome._replace(
        replied=True,
        code=Code.OK if reply["ok"] else _own_code(reply.get("code")),
        result=reply.get("result"),
        error=None if reply["ok"] else _error_text(reply.get("error")),
        retryable=reply.get("retryable"),
        cost_cents=reply.get("cost_cents"),
        side_effects=tuple(reply.get("side_effects") or ()),
    )


def _is_usual_reply(reply: dict[str, Any]) -> bool:
    """Just a result, as nearly every reply has."""
    return reply["ok"] is True and len(reply) == 2 and "result" in reply  # noqa: PLR2004


def _fault_of_reply(reply: dict[str, Any]) -> str | None:
    """What is wrong with a reply apart from its result, which `check_result` judges."""
    try:
        canonical({name: member for name, member in reply.items() if name != "result"})
    except CanonicalError as error:
        return f"at {error.pointer or 'the top'} of the reply: {error.message}"
    return say(schemas.faults(schemas.shipped("overlay_reply"), reply)) or None


def _own_code(code: str | None) -> str:
    """The overlay's own code. The catalogue's codes are the bus's words, and no overlay can speak for it."""
    return Code.FAILED if code is None or code in CATALOGUE or code == Code.OK else code


def _error_text(error: str | dict[str, Any] | None) -> str:
    if isinstance(error, dict):
        return str(error.get("message") or schemas.show(error))
    return error or "the overlay answered ok: false and gave no reason"


def check_result(validator: Draft202012Validator | None, outcome: Outcome) -> tuple[Outcome, bytes | None]:
    """The outcome held to the canonical form and to the output schema, and the canonical bytes of its result.

    A result that has no canonical form (a whole number beyond 2^53, say) is a protocol error of the overlay.
    """
    if outcome.result is None and not outcome.ok:
        return outcome, None
    try:
        result_json = canonical(outcome.result)
    except CanonicalError as error:
        fault = f"at {error.pointer or 'the top'} of the result: {error.message}"
        return outcome._replace(code=Code.PROTOCOL, result=None, error=fault, replied=False), None
    if validator is not None and outcome.ok and (faults := schemas.faults(validator, outcome.result, "$.result")):
        refused = outcome._replace(code="ERR_OUTPUT_SCHEMA", error=say(faults), replied=False)
        return refused, result_json
    return outcome, result_json
