"""What the query of a GET brings: each member once, with the type that a schema has, numbers as JSON writes them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from aos_context.artifacts import described, faults, validator_of
from aos_context.errors import SchemaError

if TYPE_CHECKING:
    import jsonschema_rs
    from starlette.datastructures import QueryParams

    from aos_context.artifacts import Document

LISTED, MOST_LISTED = 100, 1_000
"""How many entries a listing gives where nothing is asked for, and how many it gives at most."""
LARGEST = 2**53 - 1

_INTEGER = re.compile("-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class Query(NamedTuple):
    """What an address that is no capability takes."""

    schema: Document
    validator: jsonschema_rs.Draft202012Validator

    @classmethod
    def of(cls, **properties: Document) -> Query:
        schema = {"type": "object", "additionalProperties": False, "properties": properties}
        return cls(schema, validator_of(schema))

    def read(self, query: QueryParams) -> Document:
        """Raises `SchemaError`."""
        document = read_query(query, self.schema)
        if not self.validator.is_valid(document):
            raise SchemaError("query", faults(self.validator, document))
        return document


NOTHING = Query.of()
RUNS = Query.of(
    limit={"type": "integer", "minimum": 1, "maximum": MOST_LISTED},
    after={"type": "string", "pattern": "^[0-9]{1,20},[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"},
)
MOST = Query.of(limit={"type": "integer", "minimum": 1, "maximum": MOST_LISTED})
LINES = Query.of(
    limit={"type": "integer", "minimum": 0, "maximum": MOST_LISTED},
    after={"type": "integer", "minimum": 0, "maximum": LARGEST},
)
"""Of the ledger, and of episodes."""


def read_query(query: QueryParams, schema: Document) -> Document:
    """Numbers where the schema has numbers; its validator looks at the rest. Raises `SchemaError`."""
    document: Document = {}
    for name, value in query.multi_items():
        if name in document:
            raise SchemaError("query", [{"path": f"$.{name}", "message": "stands there more than once"}])
        document[name] = _typed(name, value, schema["properties"].get(name, {}))
    return document


def _typed(name: str, text: str, schema: Document) -> Any:
    kind = schema.get("type")
    try:
        return _integer(text) if kind == "integer" else _number(text) if kind == "number" else text
    except ValueError:
        fault = {"path": f"$.{name}", "message": f"{described(text)} is not of type {kind!r}"}
        raise SchemaError("query", [fault]) from None


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _number(text: str) -> float:
    if not (_NUMBER.fullmatch(text) and math.isfinite(value := float(text))):
        raise ValueError(text)
    return value
