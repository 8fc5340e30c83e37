"""The catalogue of codes: whole, true to the sources, and of use to people."""

from __future__ import annotations

import ast
import json
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

import orjson
import pytest

from bus.errors import CATALOGUE, BusError, Fault, entry, say
from runners.base import Code
from tests.support import REPO

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = sorted(file for folder in ("bus", "runners", "TOOLS") for file in (REPO / folder).rglob("*.py"))
CODE = re.compile(r"ERR_[A-Z0-9_]+")
CATEGORIES = {"TRANSIENT", "PERMANENT", "RESOURCE", "PERMISSION", "VALIDATION"}
NOT_IN_HTTP = {499}
"""Status 499 is nginx's for a client that went away; nobody is left to see it."""


def codes_in_sources() -> Iterator[tuple[str, str]]:
    """Every text of the sources that is an error code, and the file that it stands in."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                yield node.value, file.name


def test_every_code_in_the_sources_is_in_the_catalogue() -> None:
    unknown = {(code, file) for code, file in codes_in_sources() if code not in CATALOGUE}
    assert unknown == set()


def test_every_code_of_the_catalogue_is_used() -> None:
    assert set(CATALOGUE) - {code for code, _ in codes_in_sources()} == set()


def test_every_code_stands_in_the_catalogue_once() -> None:
    keys = json.loads((REPO / "schemas/error_catalog.json").read_text(), object_pairs_hook=lambda pairs: pairs)
    names = [name for name, _ in keys]
    assert len(names) == len(set(names)) > 30


def test_what_a_runner_may_answer_is_in_the_catalogue() -> None:
    assert {code.value for code in Code} - {"OK"} <= set(CATALOGUE)


@pytest.mark.parametrize("code", CATALOGUE)
def test_an_entry_of_the_catalogue_is_whole(code: str) -> None:
    found = CATALOGUE[code]
    assert CODE.fullmatch(code)
    assert found.category in CATEGORIES
    assert found.http_status in NOT_IN_HTTP or found.http_status in set(HTTPStatus)
    assert found.message.endswith(".")
    assert found.message[0].isupper()
    assert len(found.message) <= 80
    assert all(action == action.strip() != "" for action in found.actions)
    assert found.actions or found.http_status in NOT_IN_HTTP


@pytest.mark.parametrize("code", CATALOGUE)
def test_only_what_passes_may_be_tried_again(code: str) -> None:
    found = CATALOGUE[code]
    assert found.retryable or found.category != "TRANSIENT"
    assert not found.retryable or found.category in {"TRANSIENT", "RESOURCE"}


def test_a_code_of_an_overlays_own_has_the_entry_of_a_failed_overlay() -> None:
    assert entry("ERR_OF_ITS_OWN") is CATALOGUE["ERR_OVERLAY_FAILED"]
    assert entry("ERR_BUSY") is CATALOGUE["ERR_BUSY"]


def test_a_code_outside_the_catalogue_cannot_be_raised() -> None:
    with pytest.raises(KeyError):
        BusError("ERR_NO_SUCH_CODE", "x")


def test_a_refusal_tells_programs_everything() -> None:
    fault = Fault("$.phases[0]", '"OPNE"', "OPEN")
    body = BusError("ERR_BAD_REQUEST", "the detail", faults=[fault], hint="the hint").body()
    assert orjson.loads(orjson.dumps(body)) == {
        "ok": False,
        "error": "the detail",
        "code": "ERR_BAD_REQUEST",
        "category": "VALIDATION",
        "message": CATALOGUE["ERR_BAD_REQUEST"].message,
        "detail": "the detail",
        "hint": "the hint",
        "retryable": False,
        "faults": [{"path": "$.phases[0]", "found": '"OPNE"', "allowed": "OPEN"}],
    }


def test_without_a_hint_the_first_suggested_action_stands_in() -> None:
    assert BusError("ERR_BUSY", "x").hint == CATALOGUE["ERR_BUSY"].actions[0]


def test_faults_are_said_in_one_line() -> None:
    faults = [Fault("$.a", "1", "text"), Fault("$.b", "nothing", "a value")]
    assert say(faults) == "$.a: found 1, allowed: text; $.b: found nothing, allowed: a value"
