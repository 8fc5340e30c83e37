"""What callers may ask for: the capabilities of `manifest.json`, which is the one place where they are declared.

The bus reads that file, and so does the service: its HTTP API and its command line take what the bus would take.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aos_context.artifacts import NAME_SHOWN, Document, faults, validator_of
from aos_context.errors import NotFoundError, PhaseError, SchemaError

if TYPE_CHECKING:
    import jsonschema_rs

MANIFEST = Path(__file__).parent.parent / "manifest.json"


@dataclass(frozen=True, slots=True)
class Capability:
    name: str
    phases: tuple[str, ...]
    input_schema: Document
    validator: jsonschema_rs.Draft202012Validator

    def check_input(self, payload: Any) -> Document:
        """Raises `SchemaError` with the JSON paths in the payload."""
        if not self.validator.is_valid(payload):
            raise SchemaError(f"{self.name} request", faults(self.validator, payload))
        valid: Document = payload
        return valid

    def check_phase(self, phase: str) -> None:
        """Raises `PhaseError`."""
        if phase not in self.phases:
            raise PhaseError(
                f"{self.name} is not for {phase[:NAME_SHOWN]}; allowed: {', '.join(self.phases)}",
                phase=phase[:NAME_SHOWN],
            )


@cache
def capabilities() -> dict[str, Capability]:
    """By name."""
    return {name: _capability(name, given) for name, given in _manifest()["capabilities"].items()}


def capability(name: str) -> Capability:
    """Raises `NotFoundError`."""
    found = capabilities().get(name)
    if found is None:
        raise NotFoundError(f"there is no capability {name[:NAME_SHOWN]!r}; known: {', '.join(capabilities())}")
    return found


def version() -> str:
    return str(_manifest()["version"])


@cache
def _manifest() -> Document:
    manifest: Document = json.loads(MANIFEST.read_text("utf-8"))
    return manifest


def _capability(name: str, given: Document) -> Capability:
    schema = given["input_schema"]
    return Capability(name, tuple(given["phases"]), schema, validator_of(schema))
