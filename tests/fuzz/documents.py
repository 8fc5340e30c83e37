"""Sound documents of each kind, which the samples damage. Together they have every key that a reader knows."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "pattern": "^a+$"}}, "required": ["text"]}
_SHAPE_A = {
    "name": "echo",
    "version": "1.0.0",
    "status": "active",
    "description": "Echoes.",
    "phases": ["OPEN", "CLEAR"],
    "capabilities": ["analysis", "exec"],
    "entrypoint": "python3 src/run.py --flag 'a b'",
    "timeout_ms": 1000,
    "op_policy": {"hash": ["analysis"], "run": ["exec"]},
    "policy": {"deterministic": True, "cacheable": False, "requires_auth": False},
}
_SHAPE_B = {
    "name": "echo",
    "version": "0.1.0",
    "description": "Simulates.",
    "entrypoints": {"http": {"base_url": "http://127.0.0.1:8787/base"}, "proc": {"command": ["python3", "run.py"]}},
    "capabilities": {
        "echo.ping": {"runner": "http", "path": "/ping", "method": "GET", "timeout_s": 5, "default_profile": "MINIMAL"},
        "run": {
            "runner": "proc",
            "path": "mod",
            "timeout_s": 2.5,
            "default_profile": "BALANCED",
            "degradation": {"max_fraction": 0.7, "disable_nonessential": True},
        },
    },
    "resources": {"prefers_gpu": True, "memory_mb": 512, "notes": "none"},
    "policy": {"deterministic": True},
}
_NATIVE = {
    "name": "echo",
    "version": "2.0.0",
    "phases": ["OPEN", "ALIGN", "ASCEND", "CLEAR", "SEAL"],
    "permissions": ["analysis", "exec"],
    "entrypoints": {
        "proc": {
            "command": ["python3", "run.py"],
            "mode": "worker",
            "stdin": "pipe",
            "preload": ["json"],
            "workers": {"count": 2, "max_calls": 100, "max_mb": 256, "start_timeout_s": 3},
        },
        "http": {"command": ["./serve", "{port}"], "ready_path": "/ready", "idle_s": 60, "max_mb": 512},
    },
    "capabilities": {
        "run": {
            "runner": "proc",
            "description": "Runs.",
            "phases": ["OPEN", "CLEAR"],
            "input_schema": _SCHEMA,
            "output_schema": {"$defs": {"a": {"type": "integer"}}, "$ref": "#/$defs/a"},
            "memory": "MEM[SOFT=16,HARD=64,VOL=LOW];PRIORITY=7",
            "concurrency": 4,
            "cost_cents": 0.5,
            "idempotent": True,
            "rights": {"read": ["/usr/share/dict", "data"], "write": ["out"], "network": [80, 443]},
        },
        "serve": {"runner": "http", "path": "/run", "memory": "BALANCED", "rights": {"network": False}},
    },
    "env": ["LANG"],
    "secrets": ["API_KEY"],
    "policy": {"requires_auth": True},
}
MANIFESTS: tuple[Mapping[str, Any], ...] = (_SHAPE_A, _SHAPE_B, _NATIVE)

REQUESTS: tuple[Mapping[str, Any], ...] = (
    {"phase": "OPEN", "data": {"prompt": "hello", "n": [1, 2.5, -0.0, 2**53 - 1], "deep": {"a": {"b": [None, True]}}}},
    {"phase": "CLEAR", "data": {"op": "hash"}},
    {
        "phase": "SEAL",
        "data": {},
        "capability": "run",
        "profile": "MEM[SOFT=1,HARD=2,VOL=LOW]",
        "seed": 7,
        "session": "s",
        "timeout_ms": 100,
    },
)

REPLIES: tuple[Any, ...] = (
    {"ok": True, "result": {"text": "hello", "n": 1}},
    {"ok": False, "error": "no such model", "code": "ERR_NO_MODEL", "retryable": False},
    {"ok": False, "error": {"message": "later", "kind": 1}, "retryable": True},
    {"ok": True, "result": 3, "cost_cents": 0.25, "side_effects": ["wrote a file", {"path": "x"}]},
    {"answer": 42},
    [1, 2, 3],
    "text",
)

REPLYING: Mapping[str, Any] = {
    "any": {"runner": "proc"},
    "held": {"runner": "proc", "output_schema": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}
"""The capabilities of the overlay whose replies are read: without an output schema and with one."""

RUNE_CLAUSES = (
    "MEM[SOFT=2048,HARD=4096,VOL=MED]",
    "MEM[ HARD=1 , SOFT=1, VOL=LOW ]",
    "KV[CAP=0.2,POLICY=WINDOW,PURGE=ON_STRESS]",
    "TIER=EXTENDED",
    "PRIORITY=7",
    "DEGRADE{STEP1:SHRINK_KV(0.75),STEP2:CONTEXT(4096),STEP3:DISABLE(images),STEP4:BATCH(small),STEP5:OFFLOAD(COLD)}",
)
RUNES = (";".join(RUNE_CLAUSES[:1]), ";".join((*RUNE_CLAUSES[:1], *RUNE_CLAUSES[2:])), "BALANCED", " MINIMAL ")
RUNE_TOKENS = (
    *("MEM", "[", "SOFT", "=", "1", "0", ".5", "99999999999", "1e9", ",", "HARD", "VOL", "LOW", "]", ";", "KV", "CAP"),
    *("POLICY", "LRU", "PURGE", "TIER", "LOCAL", "PRIORITY", "11", "DEGRADE", "{", "STEP1", "STEP0", ":", "CONTEXT"),
    *("(", ")", "}", "BATCH", "name", "\N{ARABIC-INDIC DIGIT ONE}", "\x0b", "\ufeff", "\0", " " * 50, "9" * 300),
)

TOML_VALUES = ("8000", "0", "-1", '"batch"', '"~nobody/x"', "true", "1.5", "inf", "nan", "[1]", "{a=1}", "1979-05-27")
TOML_SECRETS = '[secrets]\nAPI_KEY = {env = "VAR", overlays = ["psyfi", "echo"]}\n'
ENVIRONMENT_VALUES = ("8000", "0", "-1", "1e3", "inf", "nan", "yes", "batch", "~", "~no/x", "\0", "x" * 300, "", " 1 ")

TOKEN = "aal_" + "A" * 43
"""The one that the first of `TOKENS` holds the hash of."""

_TOKEN = {
    "name": "ci",
    "sha256": hashlib.sha256(TOKEN.encode()).hexdigest(),
    "overlays": ["echo", "psy*"],
    "phases": ["OPEN", "CLEAR"],
    "scopes": ["invoke", "read-ledger"],
    "rate": "10/s",
    "created": "2026-01-01T00:00:00Z",
    "expires": None,
}
TOKENS: tuple[Mapping[str, Any], ...] = (
    {"tokens": [_TOKEN]},
    {
        "tokens": [
            {**_TOKEN, "expires": "2026-02-01T00:00:00Z"},
            {**_TOKEN, "name": "b", "sha256": "0" * 64, "rate": None},
        ]
    },
    {"tokens": []},
)
AUTHORIZATIONS = (
    f"Bearer {TOKEN}".encode(),
    f"bearer {TOKEN}".encode(),
    b"Bearer",
    b"Basic eDp5",
    b"Bearer aal_\xff",
    b"",
)

SECRETS: tuple[Mapping[str, Any], ...] = (
    {"secrets": {"API_KEY": {"value": "hidden words", "overlays": ["echo"]}, "B": {"env": "VAR", "overlays": []}}},
    {"secrets": {}},
)
SECRET_VALUE = "hidden words"
