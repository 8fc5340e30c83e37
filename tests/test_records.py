"""What a line of the ledger is: its members, its hash, and the environment that it names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bus import records, resources, schemas
from bus.canonical import canonical
from bus.provenance import iter_lines, read_line
from bus.records import (
    GENESIS,
    BrokenLineError,
    check,
    collect_environment,
    environment_hash,
    is_foreign,
    parse,
    parse_or_none,
)
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, HASH, append, call, opened, write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


def test_a_record_is_one_canonical_line_of_the_schema_with_null_for_what_does_not_apply(path: Path) -> None:
    memory = {"profile": "MINIMAL", "soft_mb": 512, "hard_mb": 1024, "tier": "LOCAL", "stress": 0.125, "applied": []}
    sandbox = {"mode": "best-effort", "scope": "call", "enforced": ["write"], "missing": ["read: no Landlock"]}
    write(
        path,
        call(environment_hash=environment_hash(ENVIRONMENT), phase="OPEN", duration_ms=1.5),
        call(type="replay", replay_of=1, memory={**memory, "peak_mb": 9.5}, sandbox=sandbox, seed=7),
        call(type="denied", ok=False, code="ERR_PHASE_DENIED", error="no", payload={"a": 1}, result=None),
    )
    records = list(iter_lines(path))
    assert [record["type"] for record in records] == ["invoke", "environment", "replay", "denied"]
    for record, line in zip(records, path.read_bytes().splitlines(), strict=True):
        assert schemas.faults(schemas.shipped("record"), record) == []
        assert canonical(record) == line
    assert records[0]["caller"] is None
    assert "payload" not in records[0]


def test_the_schema_of_a_record_names_what_an_overlay_is_told_of_memory_and_the_peak() -> None:
    record: Any = resources.load_json("schemas/record.schema.json")
    request: Any = resources.load_json("schemas/overlay_request.schema.json")
    told = request["$defs"]["memory"]["properties"]
    written = record["$defs"]["memory"]["properties"]
    assert written.keys() - told.keys() == {"peak_mb", "peak_floor_mb"}
    assert {name: written[name] for name in told} == told


@pytest.mark.parametrize("member", ["nonsense", "hash", "seq"])
def test_the_schema_and_the_ledger_refuse_a_member_that_is_not_theirs(path: Path, member: str) -> None:
    with opened(path) as ledger, pytest.raises(ValueError, match=f"no member {member}"):
        append(ledger, {**call(), member: 1})
    (receipt,) = write(path, call())
    record = read_line(path, receipt.seq)
    assert schemas.faults(schemas.shipped("record"), {**record, "nonsense": 1}) != []


def test_the_hash_is_that_of_the_bytes_without_its_own_member_and_prev_is_the_hash_before(path: Path) -> None:
    write(path, call("a"), call("b"))
    prev = GENESIS
    for line in path.read_bytes().splitlines():
        cut = re.sub(rb'"hash":"[0-9a-f]{64}",', b"", line, count=1)
        record = json.loads(line)
        assert record["hash"] == hashlib.sha256(cut).hexdigest()
        assert record["prev"] == prev
        prev = record["hash"]


def test_text_and_payloads_that_look_like_the_hash_do_not_disturb_it(path: Path) -> None:
    fake = f'x","hash":"{HASH}","prev":"{HASH}",'
    write(path, call(caller=fake, code=fake, error=fake, payload={"hash": HASH, "a": {"hash": HASH}}, result=[fake]))
    assert verify(path).lines == 1
    assert read_line(path, 1)["payload"]["hash"] == HASH


def test_an_object_before_the_hash_may_not_hold_a_member_of_that_name(path: Path) -> None:
    with opened(path) as ledger, pytest.raises(ValueError, match="holds a key of that name"):
        append(ledger, call(caller={"deep": [{"hash": HASH}]}))


def test_a_payload_may_be_given_as_its_canonical_bytes(path: Path) -> None:
    payload = {"z": 1.5, "a": ["\u20ac"]}
    write(path, call(payload=orjson.Fragment(canonical(payload))))
    assert read_line(path, 1)["payload"] == payload
    assert canonical(read_line(path, 1)) == path.read_bytes()[:-1]


def test_a_fragment_that_could_break_the_line_is_refused(path: Path) -> None:
    with opened(path) as ledger, pytest.raises(ValueError, match="NUL"):
        append(ledger, call(payload=orjson.Fragment(b'"\x00"')))


# --- What is read ---


def line_of(path: Path, **changed: Any) -> bytes:
    """A line with other members, and the hash that they have."""
    write(path, call("a"))
    record = {**json.loads(path.read_bytes()), **changed}
    del record["hash"]
    record = {name: value for name, value in record.items() if value is not ...}
    record["hash"] = hashlib.sha256(canonical(record)).hexdigest()
    return canonical(record) + b"\n"


def test_a_line_is_a_record_where_it_has_what_readers_rely_on(path: Path) -> None:
    line = line_of(path)
    assert parse(line) == check(line) == parse_or_none(line) == read_line(path, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"seq": ...},
        {"seq": "1"},
        {"seq": True},
        {"seq": 1.5},
        {"type": ...},
        {"type": None},
        {"timestamp_ms": ...},
        {"timestamp_ms": "2024-01-01"},
        {"timestamp_ms": None},
        {"memory": ...},
        {"payload_hash": ..., "code": ...},
    ],
)
def test_a_line_without_them_is_broken_though_its_hash_is_right(path: Path, changed: dict[str, Any]) -> None:
    line = line_of(path, **changed)
    assert parse_or_none(line) is None
    for read in (parse, check):
        with pytest.raises(BrokenLineError) as caught:
            read(line)
        assert caught.value.fault == "form"
        assert all(name in caught.value.detail for name in changed)


@pytest.mark.parametrize("line", [b"{}\n", b'{"seq":1,"type":"invoke","timestamp_ms":1}\n'])
def test_a_line_without_a_hash_is_no_record(line: bytes) -> None:
    with pytest.raises(BrokenLineError) as caught:
        parse(line)
    assert caught.value.fault == "form"


@pytest.mark.parametrize(
    ("line", "foreign"),
    [
        (b"{}\n", True),
        (b'{"request_id": "old", "ok": true}\n', True),
        (b'{"request_id": "cut off"}', False),
        (b'{"hash": 1}\n', False),
        (b'{"lash":"one of ours in which a bit has flipped","prev":""}\n', False),
        (b"[]\n", False),
        (b"words\n", False),
        (b"", False),
    ],
)
def test_another_programs_line_is_a_whole_object_with_neither_hash_nor_prev(line: bytes, foreign: bool) -> None:
    assert is_foreign(line) is foreign


# --- The environment ---


def test_the_environment_names_the_commit_of_the_folder(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    if shutil.which("git") is None:
        pytest.skip("no git here")
    subprocess.run([*git, "init", "-q"], check=True)
    assert collect_environment(tmp_path)["git_commit"] is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert collect_environment(tmp_path)["git_commit"] == head


def test_the_environment_is_collected_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = collect_environment(tmp_path)
    assert environment["git_commit"] is None
    record_schema: Any = resources.load_json("schemas/record.schema.json")
    validator = schemas.compiled(record_schema["$defs"]["environment"]["properties"]["environment"])
    assert schemas.faults(validator, environment) == []


def test_a_git_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "git"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(records, "_GIT_TIMEOUT_S", 0.05)
    assert collect_environment(tmp_path)["git_commit"] is None


def test_the_hash_of_an_environment_does_not_depend_on_the_order_of_its_members() -> None:
    assert environment_hash(ENVIRONMENT) == environment_hash(dict(reversed(ENVIRONMENT.items())))
    assert environment_hash(ENVIRONMENT) != environment_hash({**ENVIRONMENT, "machine": "aarch64"})
