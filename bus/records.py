"""What a line of the ledger is: a record as canonical JSON, and the hash that holds it.

The hash of a line is the SHA-256 of the line's bytes, without the newline and without the member `"hash":"<64 hex>",`
at its first occurrence. A reader needs no re-serialising, and the first occurrence is always the record's own: keys are
sorted, so only members whose names sort before `hash` stand before it; inside a string every quote is escaped, so
no text can look like the member; and `draft` refuses a record in which an object before it holds a key `hash`.

The hash is of bytes, which whoever can write the file can choose, and readers of JSON differ where a key stands twice:
so a line has one meaning or is refused, as `TOOLS/verify.py` has it. It is one object and nothing around it, with no
key twice however deep, no lone surrogate, no number beyond a double and no more than `MOST_LEVELS` levels.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from binascii import unhexlify
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import orjson

from bus import resources
from bus.canonical import canonical, canonical_own, sha256_hex
from bus.errors import OperatorError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from bus.model import Record

VERSION = 1
GENESIS = "0" * 64
"""`prev` of line 1."""

MOST_LEVELS = 512
"""How deep the values of a line are nested at most, itself included."""

_GIT_TIMEOUT_S = 2

FaultKind = Literal["torn", "json", "hash", "form", "seq", "chain", "tree", "signature", "gzip"]


class BrokenLineError(OperatorError):
    """A line is not what was written: `fault` is what kind of thing is wrong with it, `detail` says it in words.

    `seq` is its number where who reads does not know that anyway.
    """

    def __init__(self, fault: FaultKind, detail: str, seq: int | None = None) -> None:
        super().__init__("ERR_LEDGER_BROKEN", detail)
        self.fault = fault
        self.seq = seq


# A byte that no canonical JSON holds marks where the writer puts what it alone knows.
_HOLE = orjson.Fragment(b"\x00")
_HOLES: Mapping[str, Any] = {"v": VERSION, "seq": _HOLE, "prev": _HOLE, "hash": _HOLE}
_CALL: Mapping[str, Any] = dict.fromkeys((
    "type", "timestamp_ms", "request_id", "run_id", "caller", "overlay", "version", "manifest_hash", "code_hash",
    "capability", "phase", "runner", "payload_hash", "result_hash", "ok", "code", "error", "exit_code", "duration_ms",
    "queue_ms", "admission", "cpu_ms", "memory", "sandbox", "deterministic", "seed", "environment_hash", "prev_size",
    "cost_cents", "replay_of", "session", "profile", "timeout_ms",
))  # fmt: skip
_STORED = frozenset({"payload", "result"})
_OURS = frozenset({"hash", "prev"})
_members_of_call = itemgetter(*_CALL)
_HASH_MEMBER = b'"hash":'
_HASH_START = b'"hash":"'
_HASH = re.compile("[0-9a-f]{64}")
_HELD_HASH = re.compile(rb'"hash":"([0-9a-f]{64})",')
_EVERY: tuple[tuple[str, type], ...] = (("seq", int), ("type", str), ("timestamp_ms", int), ("hash", str))
CALL_TYPES = frozenset({"invoke", "denied", "replay"})
"""The lines that say what came of a call."""

_STARTS: Mapping[str, tuple[tuple[str, type], ...]] = {
    "started": (("request_id", str), ("writer", str)),
    "interrupted": (("request_id", str), ("started", int)),
}


class Draft(NamedTuple):
    """A record's canonical bytes in four pieces: hash, prev and seq go between them."""

    to_hash: bytes
    to_prev: bytes
    to_seq: bytes
    rest: bytes
    environment_hash: str | None = None

    @property
    def size(self) -> int:
        """Bytes, but for what goes between."""
        return len(self.to_hash) + len(self.to_prev) + len(self.to_seq) + len(self.rest)

    def line(self, seq: int, prev: str) -> tuple[bytes, bytes]:
        """The line with its newline, and the 32 bytes of its hash."""
        after = b'%b"%b"%b%d%b' % (self.to_prev, prev.encode(), self.to_seq, seq, self.rest)
        digest = hashlib.sha256(self.to_hash + after).digest()
        return b'%b"hash":"%b",%b\n' % (self.to_hash, digest.hex().encode(), after), digest


def draft(members: Mapping[str, Any]) -> Draft:
    """Raises `CanonicalError` (a `ValueError`) for what is not JSON."""
    return _draft(dict(members), canonical)


def draft_call(record: Record) -> Draft:
    """Of a call; what it leaves out is null. Raises as `draft`, and `ValueError` for an unknown member."""
    members = {**_CALL, **record}
    if len(members) > len(_CALL) and (unknown := record.keys() - _CALL.keys() - _STORED):
        raise ValueError(f"a record has no member {', '.join(sorted(unknown))}")
    is_own = members["replay_of"] is None  # a replay repeats what a line says that anybody may have written
    return _draft(members, canonical_own if is_own else canonical)


def draft_record(record: Record) -> Draft:
    """Of a record that a bus submits: a call, or what has all its members. Raises as `draft_call`."""
    return draft_call(record) if record["type"] in CALL_TYPES else draft(record)


def _draft(members: dict[str, Any], to_text: Callable[[dict[str, Any]], bytes]) -> Draft:
    """Adds the writer's own members to `members`."""
    members |= _HOLES
    text = to_text(members)
    try:
        to_hash, to_prev, to_seq, rest = text.split(b"\x00")
    except ValueError:
        raise ValueError("a fragment in the record is not canonical JSON: it holds a NUL byte") from None
    to_hash = to_hash.removesuffix(_HASH_MEMBER)
    if _HASH_MEMBER in to_hash:
        raise ValueError("an object before the member hash holds a key of that name")
    return Draft(to_hash, to_prev[1:], to_seq, rest, members.get("environment_hash"))


def environment_hash(environment: Mapping[str, Any]) -> str:
    """What records name an environment by."""
    return sha256_hex(canonical(dict(environment)))


def collect_environment(folder: Path) -> dict[str, Any]:
    """What all calls run in: interpreter, kernel, git commit of `folder`, version of the bus. Never fails."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "git_commit": _git_commit(folder),
        "bus_version": resources.version(),
    }


def _git_commit(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        ran = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.decode("ascii", "replace").strip() or None


def check(line: bytes, seq: int | None = None, prev: str | None = None) -> Record:
    """The record of a line, as far as asked for in its place. Raises `BrokenLineError`."""
    if not line.endswith(b"\n"):
        raise BrokenLineError("torn", "the last line has no end: its write was cut off")
    record = _object(line)
    _require_one_meaning(line, record)
    hash_ = _hash_of(line)
    if hash_ is None or record.get("hash") != hash_:
        raise BrokenLineError("hash", "its bytes do not have the hash that it holds")
    _require_form(record)
    if seq not in (None, record["seq"]):
        raise BrokenLineError("seq", f"it is line {seq} and says seq {record['seq']}")
    if prev is not None and record.get("prev") != prev:
        raise BrokenLineError("chain", f"prev is {record.get('prev')}, and the line before has the hash {prev}")
    return record


def is_hash(value: object) -> bool:
    """Whether it is a hash as lines have it: 64 lower-case hex digits."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def hash_in(text: bytes, start: int = 0, end: int | None = None) -> bytes:
    """The 32 bytes of the hash that the line `text[start:end]` holds, right or wrong.

    Raises `BrokenLineError` where it holds none.
    """
    at = text.find(_HASH_START, start, end)
    found = None if at < 0 else _HELD_HASH.match(text, at)
    if found is None:
        raise BrokenLineError("hash", "it holds no hash")
    return unhexlify(found[1])


def _hash_of(line: bytes) -> str | None:
    """The hash of a line that ends with a newline; None where it has no member `hash` as one is written."""
    start = line.find(_HASH_START)
    end = start + 74
    if start < 0 or line[end - 2 : end] != b'",':
        return None
    return sha256_hex(line[:start] + line[end:-1])


def parse(line: bytes) -> Record:
    """The record of a line, its hash not checked; a call's has every member of a call. Raises `BrokenLineError`."""
    record = _object(line)
    _require_form(record)
    return record


def parse_or_none(line: bytes) -> Record | None:
    """As `parse`; None where the line is broken."""
    try:
        return parse(line)
    except BrokenLineError:
        return None


def is_foreign(line: bytes) -> bool:
    """Whether a line is a whole JSON object of another program's log, as an earlier AAL-Core's.

    It has neither `hash` nor `prev`: a line of ours in which a bit has flipped has one of them still.
    """
    try:
        return line.endswith(b"\n") and not _OURS & _object(line).keys()
    except BrokenLineError:
        return False


def _object(line: bytes) -> Record:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        raise BrokenLineError("json", "it is not a JSON object")
    return record


def _require_one_meaning(line: bytes, record: Record) -> None:
    """Raises `BrokenLineError` where another reader of JSON may have the line for another record."""
    try:
        if orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) == line:  # of a key that stood twice it has one
            return
    except orjson.JSONEncodeError:  # nested deeper than it writes
        pass
    if not (line.startswith(b"{") and line.endswith(b"}\n")):
        raise BrokenLineError("json", "it is not one JSON object and nothing else")
    if _levels(record) > MOST_LEVELS:
        raise BrokenLineError("json", f"it is nested deeper than {MOST_LEVELS} levels")
    json.loads(line, object_pairs_hook=_no_key_twice)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(names) != len(set(names)):
        raise BrokenLineError("json", "an object in it has a key twice")


def _levels(value: Any) -> int:  # noqa: ANN401
    """How many objects and lists stand within each other at most."""
    levels, inside = 0, [value]
    while inside := [one for one in inside if isinstance(one, dict | list)]:
        levels += 1
        inside = [member for one in inside for member in (one.values() if isinstance(one, dict) else one)]
    return levels


def _require_form(record: Record) -> None:
    """The members that readers rely on. Raises `BrokenLineError`."""
    for name, kind in _EVERY:
        if type(record.get(name)) is not kind:
            raise BrokenLineError("form", f"its member {name} is missing or of the wrong type")
    type_ = record["type"]
    for name, kind in _STARTS.get(type_, ()):
        if type(record.get(name)) is not kind:
            raise BrokenLineError("form", f"its member {name} is missing or of the wrong type")
    if type_ in CALL_TYPES:
        try:
            _members_of_call(record)
        except KeyError:
            raise BrokenLineError("form", f"it lacks {', '.join(sorted(_CALL.keys() - record.keys()))}") from None
