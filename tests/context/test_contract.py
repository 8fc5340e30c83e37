"""The manifest is what the bus takes, what the service does, and what README says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from aos_context import contract, errors, operations, settings
from aos_context.api.routes import CAPABILITIES, Routes
from aos_context.api.service import Service

from bus import schemas
from tests.context.conftest import OVERLAY

MANIFEST = json.loads((OVERLAY / "manifest.json").read_bytes())
README = (OVERLAY / "README.md").read_text("utf-8")
READS, WRITES, SEALS = (
    {"ws", "search", "brief"},
    {"boot", "update", "propose", "snapshot", "load"},
    {"milestone", "commit"},
)


def test_the_manifest_is_one_of_the_native_shape_without_a_fault() -> None:
    assert schemas.faults(schemas.shipped("manifest"), MANIFEST) == []
    assert MANIFEST["entrypoints"]["http"]["command"][:4] == ["python3", "-m", "aos_context.cli", "serve"]


def test_each_capability_has_its_operation_and_each_operation_its_capability() -> None:
    assert set(contract.capabilities()) == set(operations._OPERATIONS) == READS | WRITES | SEALS
    assert {name for _, _, name in CAPABILITIES} == set(contract.capabilities())


@pytest.mark.parametrize("name", sorted(READS | WRITES | SEALS))
def test_a_capability_has_its_phases_its_strict_input_and_its_output(name: str) -> None:
    given = MANIFEST["capabilities"][name]
    expected = {"CLEAR", "OPEN", "ALIGN"} if name in READS else {"OPEN", "ALIGN"} if name in WRITES else {"SEAL"}
    assert set(given["phases"]) == expected
    assert given["input_schema"]["additionalProperties"] is False
    assert given["output_schema"]["required"]
    assert given["path"] == f"/aal/{name}"
    assert given.get("idempotent", False) is (name in READS | {"commit"})


def test_every_address_stands_in_the_readme() -> None:
    for route in Routes(Service()).all():
        path = route.path.replace("{run_id}", "ID").replace("{name}", "pack_PACK.zip").replace("/{number}", "")
        path = path.replace("{capability}", "CAPABILITY")
        assert f"`{'POST' if 'POST' in (route.methods or ()) else 'GET'} {path}`" in README or path == "/", path


class Recorded(dict[str, str]):
    """An environment that knows what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return default

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return False


def test_every_variable_of_the_environment_that_is_read_stands_in_the_readme_with_what_it_sets() -> None:
    environment = Recorded()
    assert settings.from_environment(environment) == settings.Settings()
    assert environment.asked == settings.VARIABLES.keys() | settings.BUS_VARIABLES
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+) \|$", README, re.MULTILINE)
    assert [row for row in rows if row[0].startswith("AOS_")] == list(settings.VARIABLES.items())


def test_every_error_is_distinct_and_stands_in_the_readme_and_on_the_tree() -> None:
    classes = errors.ContextError.__subclasses__()
    assert len({one.code for one in classes}) == len(classes)
    in_readme = set(re.findall(r"^\| (\d{3}) \| `([A-Z_]+)`", README, re.MULTILINE))
    assert in_readme == {(str(one.status), one.code) for one in classes}
    for one in classes:
        assert re.search(rf"{one.__name__} +{one.status} +{one.code} ", errors.__doc__ or ""), one
