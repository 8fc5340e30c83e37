#!/usr/bin/env python3
"""Checks a ledger of AAL-Core without AAL-Core: a log, a proof, a receipt, the growth between two checkpoints.

One file for Python 3.11 or newer that shares no line with the bus, so that one mistake is not made twice. It needs
the standard library alone, and the package `cryptography` where a signature is to be checked (`--key`).

    verify.py log LOGS [--from N] [--to M] [--against CHECKPOINT] [--key VKEY]
    verify.py proof FILE [--log LOGS] [--key VKEY]
    verify.py receipt ANSWER (--log LOGS | --proof FILE) [--key VKEY]
    verify.py growth OLD_CHECKPOINT NEW_CHECKPOINT (--log LOGS | --proof FILE) [--key VKEY]

LOGS is the folder of a ledger, with all its segments (.gz too), or one segment. FILE and ANSWER are JSON, `-` is stdin.
VKEY is a verifier key, or a file that holds one. `--json` tells programs what was found. Exit status: 0 all is right,
1 something is wrong, 2 what was asked for cannot be checked.

What is checked of a line, in this order; the first line that is wrong ends the check, and this is what it is called:

    torn        it ends with a newline. Only a last line can be otherwise: its write was cut off, or is under way
    gzip        (of a compressed segment) it can be unpacked
    json        it is one JSON object in UTF-8 and nothing else, and all readers of JSON have it for the same: no object
                in it, however deep, has a key twice, no text half of a surrogate pair, no number is beyond a double,
                and at most 512 values stand within each other
    hash        it holds the SHA-256 of its own bytes, without the newline and the member "hash":"...", where that
                first stands
    seq         it has the number of its place, and so does the first line of a segment that has a number in its name
    chain       `prev` is the hash that the line before holds; in line 1, 64 zeros
    tree        (of a checkpoint) its size, root and nodes are those of the Merkle tree (RFC 9162, over the 32 bytes
                of the lines' hashes) that is built here of the lines before it
    signature   its note is a signed note (C2SP) that says the same, and what a given key is said to have signed it
                has signed

That a line is RFC 8785, the JSON that the bus writes, is not asked, nor which other members it has (`aal provenance
verify` asks for some: `form`): the hash is of the bytes as they stand, and these have one meaning. Everything is
checked of every line; nothing is sampled. With `--from` the lines before are not looked at: the first line's `prev` is
taken as it stands, and so are the nodes of the first checkpoint.

Of a receipt that came with a whole answer, the result is to have the hash that the answer names (`answer` if not): the
SHA-256 of its RFC 8785 form, which is made here. With `--log` the line is to say what the answer says, too: its ids,
capability, phase, times, code, cost, and the hashes of payload and result. Of the rest (`error`, `detail`, `memory`,
`side_effects` and the like) nothing is checked. A proof is of a line's hash and not of what the line says, so without
`--log` the answer is held against nothing but itself. What was checked is told.

A chain and a tree that are right say that the log fits itself. Whoever can write it can make another that fits as
well, so hold it against what it cannot change: a checkpoint that was kept elsewhere (`--against`), or a key (`--key`).
"""

from __future__ import annotations

import argparse
import base64
import binascii
import gzip
import io
import itertools
import json
import os
import re
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

OPEN_SEGMENT = "provenance.jsonl"
CLOSED_SEGMENT = re.compile(r"provenance-([0-9]{12})\.jsonl(\.gz)?")
BEFORE_LINE_1 = "0" * 64
HASH_MEMBER = b'"hash":"'
HASH_MEMBER_BYTES = 74
EMPTY_TREE = sha256(b"").digest()
MOST_LEAVES = 2**63
MOST_LEVELS = 512
LARGEST = sys.float_info.max
TICK_LINES = 5000
TICK_S = 0.2
BAR = 30
BLOCK = 1 << 20
MOST_SHOWN = 80

NOTE = re.compile(
    "(?P<text>(?P<origin>[^\n]+)\n(?P<size>0|[1-9][0-9]{0,18})\n(?P<root>[A-Za-z0-9+/]{43}=)\n(?:[^\n]+\n)*)"
    "\n(?P<signatures>(?:\N{EM DASH} [^ \n]+ [^ \n]+\n){1,100})"
)
SURROGATE = re.compile("[\ud800-\udfff]")
DIGITS = bytes.maketrans(b"123456789", b"000000000")
SAMPLE, LONG_SAMPLED = 16, b"0" * (309 // 16)
"""What every 16th byte shows of an integer of 309 digits, by `DIGITS`; one with fewer is not beyond a double."""
VKEY = re.compile(r"(?P<name>[^+\s]+)\+(?P<id>[0-9a-f]{8})\+(?P<key>[A-Za-z0-9+/]{44})")
ED25519 = b"\x01"


class Wrong(Exception):  # noqa: N818  # it is a finding
    """Something is not as it should be: `fault` is one of the words above.

    `is_line` is whether it is wrong of the line that is being read, and not of lines that by themselves are right.
    """

    def __init__(self, fault: str, reason: str, *, is_line: bool = True) -> None:
        super().__init__(reason)
        self.fault = fault
        self.reason = reason
        self.is_line = is_line


class Unusable(Exception):  # noqa: N818
    """What was asked for cannot be checked."""


def shown(value: object) -> str:
    """What somebody else wrote, for a terminal."""
    text = ascii(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


# --- Lines ---


class Lines:
    """Reads lines as records."""

    def __init__(self) -> None:
        self._objects: list[dict[str, Any]] = []
        # Every object that is read goes into the list instead of into its parent, the outermost last.
        self._decode = json.JSONDecoder(
            object_hook=self._objects.append, parse_float=_double, parse_constant=_no_constant
        ).raw_decode

    def record(self, line: bytes) -> tuple[dict[str, Any], bytes]:
        """A line's members, those that are objects left out, and the 32 bytes of its hash. Raises `Wrong`."""
        if line[-1:] != b"\n":
            raise Wrong("torn", "it has no end: its write was cut off, or is under way just now")
        self._objects.clear()
        try:
            text = line.decode()
            end = self._decode(text)[1]
        except (ValueError, RecursionError) as error:
            raise Wrong("json", f"it is not JSON: {error}") from None
        if end != len(text) - 1 or text[0] != "{":
            raise Wrong("json", "it is not one JSON object and nothing else")
        if self._may_repeat_keys(line) or self._may_be_odd(line):
            _require_one_meaning(line)
        return self._objects[-1], _checked_hash(line, self._objects[-1])

    def _may_repeat_keys(self, line: bytes) -> bool:
        """Whether a look at every key is needed.

        A key that was written twice has two colons and was read as one. So no key was where there are no more colons
        than keys; or, as strings hold colons too, no more quotes with a colon right after them, and no key is written
        with a space there.
        """
        keys = sum(map(len, self._objects))
        if line.count(b":") == keys:
            return False
        return line.count(b'":') != keys or b"\t" in line or b"\r" in line or (b" " in line and b" :" in line)

    def _may_be_odd(self, line: bytes) -> bool:
        """Whether a look is needed at half surrogate pairs (escapes), at how deep it is nested, at integers."""
        return (
            (b"\\" in line and b"\\u" in line)
            or len(self._objects) + line.count(b"[") > MOST_LEVELS
            or LONG_SAMPLED in line[::SAMPLE].translate(DIGITS)
        )


def _require_one_meaning(line: bytes) -> None:
    """Raise `Wrong` where another reader of JSON may have it for something else, or for nothing."""
    try:
        value = json.loads(line, object_pairs_hook=_members, parse_int=_integer)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Wrong("json", "a text in it has half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise Wrong("json", f"it is not JSON: {error}") from None
    levels, inside = 0, [value]
    while inside := [one for one in inside if isinstance(one, dict | list)]:
        levels += 1
        inside = [member for one in inside for member in (one.values() if isinstance(one, dict) else one)]
    if levels > MOST_LEVELS:
        raise Wrong("json", f"more than {MOST_LEVELS} values in it stand within each other")


def _double(text: str) -> float:
    number = float(text)
    if -LARGEST <= number <= LARGEST:
        return number
    raise ValueError(f"the number {shown(text)} is beyond a double")


def _integer(text: str) -> int:
    _double(text)
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise Wrong("json", f"an object in it has the key {shown(twice)} twice")


def _checked_hash(line: bytes, record: dict[str, Any]) -> bytes:
    start = line.find(HASH_MEMBER)
    end = start + HASH_MEMBER_BYTES
    digest = sha256(line[:start] + line[end:-1]).digest()
    # The quote in its place shows that the member is spelled without escapes, and so was cut out as a whole.
    if start < 0 or line[end - 2 : end] != b'",' or record.get("hash") != digest.hex():
        raise Wrong("hash", "its bytes do not have the hash that it holds")
    return digest


# --- The tree ---


def hash_of_leaf(leaf: bytes) -> bytes:
    return sha256(b"\x00" + leaf).digest()


def hash_of_pair(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


class Tree:
    """A binary counter of perfect subtrees: place k holds the hash of one with 2^k leaves, or None."""

    def __init__(self, size: int = 0, largest_first: Iterable[bytes] = ()) -> None:
        """`largest_first` are as many hashes as `size` has bits."""
        self.size = size
        hashes = list(largest_first)
        self._places = [hashes.pop() if size >> place & 1 else None for place in range(size.bit_length())]

    def add(self, leaf: bytes) -> None:
        carry = sha256(b"\x00" + leaf).digest()
        places = self._places
        for place, held in enumerate(places):
            if held is None:
                places[place] = carry
                break
            carry = sha256(b"\x01" + held + carry).digest()
            places[place] = None
        else:
            places.append(carry)
        self.size += 1

    def largest_first(self) -> list[bytes]:
        return [held for held in reversed(self._places) if held is not None]

    def root(self) -> bytes:
        root = None
        for held in self._places:
            if held is not None:
                root = held if root is None else hash_of_pair(held, root)
        return root or EMPTY_TREE


def root_by_inclusion(index: int, size: int, leaf_hash: bytes, path: list[bytes]) -> bytes:
    """The root that an inclusion path leads to: PATH of RFC 9162, 2.1.3.1, read backwards."""
    if size == 1:
        if path:
            raise Wrong("tree", "the proof is too long")
        return leaf_hash
    if not path:
        raise Wrong("tree", "the proof is too short")
    *rest, sibling = path
    left = largest_power_below(size)
    if index < left:
        return hash_of_pair(root_by_inclusion(index, left, leaf_hash, rest), sibling)
    return hash_of_pair(sibling, root_by_inclusion(index - left, size - left, leaf_hash, rest))


def roots_by_growth(old: int, new: int, path: list[bytes], known: bytes | None) -> tuple[bytes, bytes]:
    """The roots of the old and the new tree that a path leads to: SUBPROOF of RFC 9162, 2.1.4.1, read backwards.

    `known` is the old root while the old tree may be a subtree of the new one as a whole; then it is in no path.
    """
    if old == new:
        if len(path) != (known is None):
            raise Wrong("tree", f"the proof is too {'long' if path else 'short'}")
        whole = path[0] if known is None else known
        return whole, whole
    if not path:
        raise Wrong("tree", "the proof is too short")
    *rest, sibling = path
    left = largest_power_below(new)
    if old <= left:
        before, after = roots_by_growth(old, left, rest, known)
        return before, hash_of_pair(after, sibling)
    before, after = roots_by_growth(old - left, new - left, rest, None)
    return hash_of_pair(sibling, before), hash_of_pair(sibling, after)


def check_growth(old: Checkpoint, new: Checkpoint, path: list[bytes]) -> None:
    """Raise `Wrong` unless the path shows that the one tree grew out of the other."""
    if old.size > new.size:
        raise Wrong("tree", f"the newer tree has {new.size} leaves, and the older {old.size}")
    if old.size == 0:
        if path or old.root != EMPTY_TREE:
            raise Wrong("tree", "a tree without leaves has one root and needs no proof")
        return
    before, after = roots_by_growth(old.size, new.size, path, old.root)
    if (before, after) != (old.root, new.root):
        raise Wrong("tree", "the proof leads to other roots: the newer log does not begin with the older")


def largest_power_below(size: int) -> int:
    return 1 << (size - 1).bit_length() - 1


# --- Notes ---


@dataclass(frozen=True)
class Checkpoint:
    """What a note says, and by which of the given keys it is signed."""

    origin: str
    size: int
    root: bytes
    signed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Key:
    """A verifier key."""

    name: str
    id: bytes
    public: bytes

    @property
    def label(self) -> str:
        return f"{self.name}+{self.id.hex()}"

    def has_signed(self, text: bytes, signature: bytes) -> bool:
        try:
            from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  # for signatures alone
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
        except ImportError:
            raise Unusable("--key needs the package cryptography: python3 -m pip install cryptography") from None
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text)
        except InvalidSignature:
            return False
        return True


def read_key(given: str) -> Key:
    """Of a verifier key, or of a file that holds one."""
    found = VKEY.fullmatch(given)
    if found is None:
        found = VKEY.fullmatch(read_text(given).strip())
    raw = base64.b64decode(found["key"]) if found else b""
    if found is None or raw[:1] != ED25519 or len(raw) != 33:  # noqa: PLR2004
        raise Unusable(f"{given} is not a verifier key of Ed25519: <name>+<id>+<key>")
    key = Key(found["name"], bytes.fromhex(found["id"]), raw[1:])
    if sha256(key.name.encode() + b"\n" + raw).digest()[:4] != key.id:
        raise Unusable(f"the id of the verifier key {given} is not that of its key")
    return key


def read_note(note: str, keys: list[Key]) -> Checkpoint:
    """A signed checkpoint. Raises `Wrong` for what is none, and where a key is said to have signed it and has not."""
    found = NOTE.fullmatch(note)
    if found is None or any(sign < " " and sign != "\n" for sign in note) or SURROGATE.search(note):
        raise Wrong("signature", "its note is not a checkpoint: origin, size, root, an empty line, signatures")
    signed_by = []
    for line in found["signatures"].removesuffix("\n").split("\n"):
        _, name, spelled = line.split(" ")
        raw = plain_base64(spelled)
        if len(raw) <= 4 or "+" in name or any(map(str.isspace, name)):  # noqa: PLR2004
            raise Wrong("signature", "a line of its note is not a signature")
        for key in keys:
            if (key.name, key.id) == (name, raw[:4]):
                if not key.has_signed(found["text"].encode(), raw[4:]):
                    raise Wrong("signature", f"the signature of {key.label} is wrong")
                signed_by.append(key.label)
    origin = found["origin"]
    if signed_by and not any(label.startswith(f"{origin}+") for label in signed_by):
        raise Wrong("signature", f"it is a checkpoint of {shown(origin)}, signed by {signed_by[0]}")
    return Checkpoint(origin, int(found["size"]), plain_base64(found["root"]), tuple(signed_by))


def plain_base64(spelled: str) -> bytes:
    try:
        raw = base64.b64decode(spelled, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw or base64.b64encode(raw).decode() != spelled:
        raise Wrong("signature", "its note holds something that is not base64 as it is written")
    return raw


# --- Segments ---


class Segment(NamedTuple):
    """A file of the log; `first` is the seq of its first line as its name has it.

    `held` is the open segment itself, which may be closed meanwhile and have another name.
    """

    path: Path
    first: int | None
    held: BinaryIO | None = None

    def open(self) -> tuple[Path, BinaryIO]:
        """From its beginning; gives the path, too, as one that is packed meanwhile has another."""
        if self.held is not None:
            self.held.seek(0)
            return self.path, open(self.held.fileno(), "rb", buffering=BLOCK, closefd=False)
        try:
            return self.path, self.path.open("rb", buffering=BLOCK)
        except FileNotFoundError:
            other = self._other_form()
            return other, other.open("rb", buffering=BLOCK)

    def size(self) -> int:
        with self.open()[1] as file:
            return os.fstat(file.fileno()).st_size

    def _other_form(self) -> Path:
        return self.path.with_suffix("") if self.path.suffix == ".gz" else self.path.with_name(self.path.name + ".gz")


def segments(place: Path) -> list[Segment]:
    """In the order of their lines. Of one that is there both plain and compressed, the plain one.

    The open one is opened before the others are listed, and is to have its name still after that: else it may have been
    closed in between, and would be among them too, or be missing.
    """
    if not place.is_dir():
        found = CLOSED_SEGMENT.fullmatch(place.name)
        return [Segment(place, int(found[1]) if found else None)]
    last = place / OPEN_SEGMENT
    while True:
        held = opened_or_none(last)
        closed = closed_segments(place)
        if file_at(last) == (held and identity(os.fstat(held.fileno()))):
            break
        if held is not None:
            held.close()
    files = [Segment(closed[first], first) for first in sorted(closed)]
    if held is not None:
        files.append(Segment(last, None, held))
    if not files:
        raise Unusable(f"there is no ledger in {place}")
    return files


def closed_segments(place: Path) -> dict[int, Path]:
    """By the numbers of their first lines.

    A listing may miss a segment that is packed meanwhile in both forms, so that counts what two in a row show.
    """
    found = list_closed(place)
    while (again := list_closed(place)) != found:
        found = again
    return dict(reversed(found))  # .jsonl comes before .jsonl.gz, and so is what stays


def list_closed(place: Path) -> list[tuple[int, Path]]:
    matches = ((CLOSED_SEGMENT.fullmatch(path.name), path) for path in sorted(place.iterdir()))
    return [(int(match[1]), path) for match, path in matches if match]


def opened_or_none(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return None


def file_at(path: Path) -> tuple[int, int] | None:
    try:
        return identity(path.stat())
    except FileNotFoundError:
        return None


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def first_seq(segment: Segment) -> int | None:
    """As its name says, or else its first line; None where that says nothing."""
    if segment.first is not None:
        return segment.first
    with segment.open()[1] as file:
        try:
            seq = json.loads(file.readline())["seq"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
    return seq if type(seq) is int else None


class Unpacked(io.RawIOBase):
    """A .gz file, whose reader gets everything that comes before the place where it is broken."""

    def __init__(self, packed: BinaryIO) -> None:
        super().__init__()
        self._members = gzip.GzipFile(fileobj=packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        data = self._members.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def unpacked(path: Path, raw: BinaryIO) -> IO[bytes]:
    return io.BufferedReader(Unpacked(raw), BLOCK) if path.suffix == ".gz" else raw


class Progress:
    """A bar on stderr, where that is a terminal."""

    def __init__(self, total: int) -> None:
        self._total = max(total, 1)
        self._before = 0
        self._shown = sys.stderr.isatty()
        self._at = 0.0

    def tell(self, position: int, lines: int) -> None:
        """Of the file that is being read, and of all lines so far."""
        if self._shown and time.monotonic() >= self._at:
            self._at = time.monotonic() + TICK_S
            part = min((self._before + position) / self._total, 1.0)
            sys.stderr.write(f"\r[{'#' * int(part * BAR):{BAR}}] {part:4.0%}  {lines:,} lines")
            sys.stderr.flush()

    def past(self, size: int) -> None:
        """A file of this size is read."""
        self._before += size

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")


# --- RFC 8785 ---


def canonical(value: object) -> bytes:
    """The RFC 8785 form of what JSON was read as. Raises `Wrong` where it has none."""
    try:
        return _canonical(value).encode()
    except RecursionError:
        raise Wrong("json", "it is nested too deep") from None
    except OverflowError:
        raise Wrong("json", "a number in it is beyond a double") from None
    except UnicodeEncodeError:
        raise Wrong("json", "a text in it has half of a surrogate pair") from None


def _canonical(value: object) -> str:
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{_canonical(name)}:{_canonical(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number_text(float(value))  # all numbers are doubles there
    return json.dumps(value, ensure_ascii=False)


def number_text(number: float) -> str:
    """As ECMAScript writes it (ECMA-262, Number::toString): the digits are those of Python, and the layout is its own.

    Raises `OverflowError` for infinity and what is no number.
    """
    if not -LARGEST <= number <= LARGEST:
        raise OverflowError(number)
    mantissa, _, exponent = repr(abs(number)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(digits) - len(fraction) + int(exponent or 0)
    """How many digits stand before the point; the value is 0.DIGITS times ten to the power of it."""
    digits = digits.rstrip("0")
    sign = "-" if number < 0 else ""
    if not digits:
        return "0"
    if len(digits) <= point <= 21:  # noqa: PLR2004  # of that text, as below
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:  # noqa: PLR2004
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:  # noqa: PLR2004
        return f"{sign}0.{'0' * -point}{digits}"
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e{point - 1:+d}"


# --- A log ---


@dataclass
class Found:
    """What a check of a log found. `first` to `last` are the good lines, `root` is of the tree up to the last.

    `signed_size` is the size of the largest tree that a given key has signed; for what came later nobody vouches.
    """

    first: int
    last: int
    head_hash: str | None = None
    tree_size: int | None = None
    root: str | None = None
    checkpoints: int = 0
    signed: int = 0
    signed_size: int | None = None
    first_bad: int | None = None
    file: str | None = None
    fault: str | None = None
    reason: str | None = None


@dataclass
class Evidence:
    """What a log is held against: the roots of its first so many lines, the hashes of single lines, and keys.

    Every line in `hashes` is to have the `members`, too. With `a_signature` it is wrong where no checkpoint in it is
    signed with one of the keys.
    """

    keys: list[Key] = field(default_factory=list)
    roots: dict[int, set[bytes]] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    members: dict[str, Any] = field(default_factory=dict)
    a_signature: bool = False

    def root(self, size: int, root: bytes) -> None:
        self.roots.setdefault(size, set()).add(root)


class Log:
    """One pass over a log, from line `start` to line `end` or its last, with the files that are there when it is made.

    What is closed or compressed meanwhile is read all the same.
    """

    def __init__(self, place: Path, evidence: Evidence, start: int | None = None, end: int | None = None) -> None:
        self._segments = segments(place)
        begins = None if place.is_dir() else self._segments[0].first
        self._start = start or begins or 1
        self._end = end
        self._evidence = evidence
        self._prev = BEFORE_LINE_1 if self._start == 1 else None
        self._seq = self._start - 1
        self._tree = Tree() if self._start == 1 else None
        self._lines = Lines()
        self._file: str | None = None
        self._found = Found(self._start, self._seq)

    def check(self) -> Found:
        """Raises `Unusable` where the evidence lies outside of what is read."""
        found = self._found
        try:
            self._hold_against(0, {})
            self._read()
            self._require_all_was_held_against()
        except Wrong as wrong:
            found.fault, found.reason = wrong.fault, wrong.reason
            if wrong.is_line:
                found.first_bad, found.file = self._seq + 1, self._file
        finally:
            self._close()
        found.last, found.head_hash = self._seq, self._prev
        if self._tree is not None:
            found.tree_size, found.root = self._tree.size, self._tree.root().hex()
        return found

    def _read(self) -> None:
        files, skipped = self._files()
        progress = Progress(sum(segment.size() for segment in files))
        try:
            for segment in files:
                if self._seq == self._end:
                    break
                self._file = str(segment.path)
                self._read_segment(segment, skipped, progress)
                progress.past(segment.size())
                skipped = 0
        finally:
            progress.clear()

    def _close(self) -> None:
        if (held := self._segments[-1].held) is not None:
            held.close()

    def _files(self) -> tuple[list[Segment], int]:
        """The segments from that on which holds the first line, and how many lines come before it there."""
        if self._start == 1:
            return self._segments, 0
        firsts = [first_seq(segment) for segment in self._segments]
        firsts[0] = firsts[0] or 1
        for index, first in reversed([*enumerate(firsts)]):
            if first is not None and first <= self._start:
                return self._segments[index:], self._start - first
        raise Unusable(f"line {self._start} stands in none of these files")

    def _read_segment(self, segment: Segment, skipped: int, progress: Progress) -> None:
        if segment.first is not None and segment.first + skipped != self._seq + 1:
            raise Wrong("seq", f"{segment.path.name} begins with line {segment.first}: lines before it are missing")
        path, raw = segment.open()
        self._file = str(path)
        with raw:
            try:
                lines = itertools.islice(unpacked(path, raw), skipped, None)
                while self._take(itertools.islice(lines, self._most())):
                    progress.tell(raw.tell(), self._seq - self._start + 1)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise Wrong("gzip", f"it cannot be unpacked: {error}") from None

    def _most(self) -> int:
        return TICK_LINES if self._end is None else min(TICK_LINES, self._end - self._seq)

    def _take(self, lines: Iterator[bytes]) -> bool:
        """Check lines that come next, one after the other; False where there are none."""
        read, wanted = self._lines.record, {*self._evidence.roots, *self._evidence.hashes}
        seq, tree, before = self._seq, self._tree, self._seq
        for line in lines:
            record, digest = read(line)
            if record.get("seq") != seq + 1 or type(record["seq"]) is not int:
                raise Wrong("seq", f"it is line {seq + 1} and says seq {shown(record.get('seq'))}")
            prev = record.get("prev")
            if prev is None or (prev != self._prev and (self._prev is not None or not is_hash(prev))):
                raise Wrong("chain", f"prev is {shown(prev)}, and the line before has the hash {self._prev}")
            if record.get("type") == "checkpoint":
                tree = self._tree = self._check_checkpoint(record)
            if tree is not None:
                tree.add(digest)
            self._seq = seq = seq + 1
            self._prev = record["hash"]
            if seq in wanted:
                self._hold_against(seq, record)
        return seq > before

    def _check_checkpoint(self, record: dict[str, Any]) -> Tree:
        """Gives the tree of the lines before it."""
        size, root, nodes, note = (record.get(name) for name in ("size", "root", "nodes", "note"))
        if type(size) is not int or size != self._seq:
            raise Wrong("tree", f"it is a checkpoint of size {shown(size)}, and {self._seq} lines come before it")
        if not isinstance(nodes, list) or len(nodes) != size.bit_count() or not all(map(is_hash, nodes)):
            raise Wrong("tree", f"its nodes are not the subtrees of a tree of size {size}")
        tree = self._tree or Tree(size, map(bytes.fromhex, nodes))
        if root != tree.root().hex():
            raise Wrong("tree", f"it says the root {shown(root)}, and what it is of makes {tree.root().hex()}")
        if [node.hex() for node in tree.largest_first()] != nodes:
            raise Wrong("tree", "its nodes are not those that the lines before it make")
        if note is not None:
            self._check_note(note, tree)
        self._found.checkpoints += 1
        return tree

    def _check_note(self, note: object, tree: Tree) -> None:
        if not isinstance(note, str):
            raise Wrong("signature", "its note is not text")
        checkpoint = read_note(note, self._evidence.keys)
        if (checkpoint.size, checkpoint.root) != (tree.size, tree.root()):
            raise Wrong("signature", "its note says another size or root than it does itself")
        if checkpoint.signed_by:
            self._found.signed += 1
            self._found.signed_size = tree.size

    def _hold_against(self, seq: int, record: dict[str, Any]) -> None:
        """Compare the evidence of the first `seq` lines with what is there, where that is known."""
        hash_ = self._evidence.hashes.pop(seq, None)
        if hash_ not in (None, self._prev):
            raise Wrong("hash", f"line {seq} has the hash {self._prev}, and not {hash_}", is_line=False)
        for name, member in self._evidence.members.items() if hash_ is not None else ():
            if record.get(name) != member:
                reason = f"the answer's {name} is {shown(member)}, and that of line {seq} is {shown(record.get(name))}"
                raise Wrong("answer", reason, is_line=False)
        if self._tree is not None and (roots := self._evidence.roots.pop(seq, None)):
            root = self._tree.root()
            if roots != {root}:
                said = ", ".join(sorted(other.hex() for other in roots - {root}))
                reason = f"the root of the first {seq} lines is {root.hex()}, and not {said}"
                raise Wrong("tree", reason, is_line=False)

    def _require_all_was_held_against(self) -> None:
        last = self._seq
        if last < self._start and self._start > 1:
            raise Unusable(f"there is no line {self._start}")
        if self._end is not None and last < self._end:
            raise Wrong("seq", f"the log ends with line {last}, and there was to be a line {self._end}", is_line=False)
        for seq in sorted({*self._evidence.roots, *self._evidence.hashes}):
            if seq <= last or self._end is not None:
                raise Unusable(f"lines {self._start} to {last} do not tell what the first {seq} lines are")
            reason = f"the log ends with line {last}, and once it had {seq} lines"
            raise Wrong("tree", reason, is_line=False)
        if self._evidence.a_signature and not self._found.signed:
            raise Wrong("signature", "no checkpoint in it is signed with the key", is_line=False)


def is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


# --- Files that are given ---


def read_text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise Unusable(f"{name} cannot be read: {error}") from None


def read_members(name: str) -> dict[str, Any]:
    """Of a file with one JSON object."""
    try:
        members = json.loads(read_text(name), object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{name} is not JSON: {error}") from None
    if not isinstance(members, dict):
        raise Unusable(f"{name} is not a JSON object")
    return members


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _no_key_twice(pairs)
    return dict(pairs)


def count_of(members: dict[str, Any], name: str, least: int = 0) -> int:
    count = members.get(name)
    if type(count) is not int or not least <= count < MOST_LEAVES:
        raise Wrong("json", f"its member {name} is not a number from {least} on")
    return count


def hash_of(members: dict[str, Any], name: str) -> bytes:
    if not is_hash(members.get(name)):
        raise Wrong("json", f"its member {name} is not a hash, of 64 hex digits")
    return bytes.fromhex(members[name])


def path_of(members: dict[str, Any], name: str) -> list[bytes]:
    path = members.get(name)
    if not isinstance(path, list) or not all(map(is_hash, path)):
        raise Wrong("json", f"its member {name} is not a list of hashes, of 64 hex digits each")
    return [bytes.fromhex(node) for node in path]


def checkpoint_of(members: dict[str, Any], size: int, root: bytes | None, keys: list[Key]) -> Checkpoint | None:
    """The checkpoint that came along, which is to be of a tree of this size and with this root, where that is known."""
    note = members.get("checkpoint")
    if note is None:
        return None
    if not isinstance(note, str):
        raise Wrong("signature", "its checkpoint is not text")
    checkpoint = read_note(note, keys)
    if checkpoint.size != size or root not in (None, checkpoint.root):
        raise Wrong("tree", f"its checkpoint is not of the tree with {size} leaves that it is about")
    return checkpoint


def require_signed(checkpoints: Iterable[Checkpoint | None], keys: list[Key]) -> None:
    """Raise `Wrong` where there are keys and none of them has signed one of these."""
    if keys and not any(checkpoint and checkpoint.signed_by for checkpoint in checkpoints):
        raise Wrong("signature", "no checkpoint in it is signed with the key")


def hold_against_log(place: str, evidence: Evidence, end: int = 0) -> None:
    """Raise `Wrong` where a log has something else, has no line `end`, or is wrong itself up to what was asked."""
    found = Log(Path(place), evidence, end=max(end, *evidence.roots, *evidence.hashes)).check()
    if found.fault is not None:
        where = f"line {found.first_bad} of the log: " if found.first_bad else "the log: "
        raise Wrong(found.fault, f"{where}{found.reason}")


# --- Commands: each gives what it found for programs, and what it says to people ---

Answer = tuple[dict[str, Any], str]
SAID_BY_BOTH = (
    "request_id", "run_id", "capability", "phase", "timestamp_ms", "duration_ms", "queue_ms", "ok", "code",
    "cost_cents", "payload_hash", "result_hash",
)  # fmt: skip
"""What an answer and its line both say of a call."""


def check_log(given: argparse.Namespace, keys: list[Key]) -> Answer:
    evidence = Evidence(keys)
    against = [read_note(read_text(name), keys) for name in given.against]
    for checkpoint in against:
        require_signed([checkpoint], keys)
        evidence.root(checkpoint.size, checkpoint.root)
    evidence.a_signature = bool(keys) and not against
    found = Log(Path(given.logs), evidence, given.start, given.end).check()
    if keys and found.fault is None:
        sizes = [checkpoint.size for checkpoint in against]
        found.signed_size = max([found.signed_size or 0, *sizes])
    return {"ok": found.fault is None, **asdict(found)}, _said_of_log(found)


def _said_of_log(found: Found) -> str:
    good = f"lines {found.first} to {found.last} are right" if found.last >= found.first else "no line"
    if found.fault is not None:
        where = f"line {found.first_bad} ({found.file}) is wrong" if found.first_bad else "wrong"
        return f"{where}: {found.fault}: {found.reason}\nbefore it: {good}"
    said = [f"{good}, and {found.checkpoints} checkpoints among them", f"head {found.head_hash}"]
    if found.root is not None:
        said.append(f"root {found.root} of {found.tree_size} lines")
    if found.signed_size is not None:
        said.append(f"the first {found.signed_size} lines are signed for")
    return "\n".join(said)


def check_proof(given: argparse.Namespace, keys: list[Key]) -> Answer:
    members = read_members(given.file)
    check = _check_consistency if "consistency" in members else _check_inclusion
    said, checkpoint = check(members, keys)
    require_signed([checkpoint], keys)
    if given.log is not None:
        evidence = Evidence()
        if "consistency" in members:
            evidence.root(members["old_size"], bytes.fromhex(members["old_root"]))
            evidence.root(members["new_size"], bytes.fromhex(members["new_root"]))
        else:
            evidence.hashes[members["seq"]] = members["hash"]
            evidence.root(members["tree_size"], bytes.fromhex(members["root"]))
        hold_against_log(given.log, evidence)
    return _answer(said, given, keys)


def _check_inclusion(members: dict[str, Any], keys: list[Key]) -> tuple[str, Checkpoint | None]:
    seq, size = count_of(members, "seq", 1), count_of(members, "tree_size", 1)
    leaf, root = hash_of(members, "hash"), hash_of(members, "root")
    if seq > size:
        raise Wrong("seq", f"a tree of {size} lines has no line {seq}")
    if root_by_inclusion(seq - 1, size, hash_of_leaf(leaf), path_of(members, "inclusion")) != root:
        raise Wrong("tree", f"the proof leads to another root: line {seq} with this hash is not in that tree")
    said = f"line {seq} with the hash {leaf.hex()} is in the tree of {size} lines with the root {root.hex()}"
    return said, checkpoint_of(members, size, root, keys)


def _check_consistency(members: dict[str, Any], keys: list[Key]) -> tuple[str, Checkpoint | None]:
    old = Checkpoint("", count_of(members, "old_size"), hash_of(members, "old_root"))
    new = Checkpoint("", count_of(members, "new_size"), hash_of(members, "new_root"))
    check_growth(old, new, path_of(members, "consistency"))
    return _said_of_growth(old, new), checkpoint_of(members, new.size, new.root, keys)


def _said_of_growth(old: Checkpoint, new: Checkpoint) -> str:
    return (
        f"the tree of {new.size} lines with the root {new.root.hex()} "
        f"begins with that of {old.size} lines with the root {old.root.hex()}"
    )


def check_receipt(given: argparse.Namespace, keys: list[Key]) -> Answer:
    members = read_members(given.answer)
    if isinstance(members.get("outcome"), dict):  # `aal invoke --json --record` has the record beside it
        members = members["outcome"]
    receipt = members["provenance"] if isinstance(members.get("provenance"), dict) else members
    seq, leaf = count_of(receipt, "seq", 1), hash_of(receipt, "hash")
    size = count_of(receipt, "tree_size", seq)
    own = checkpoint_of(receipt, size, None, keys)
    vouching = [own]
    if given.proof is not None:
        proof = read_members(given.proof)
        _, other = _check_inclusion(proof, keys)
        if (proof["seq"], proof["hash"]) != (seq, leaf.hex()):
            raise Wrong("hash", f"the proof is of line {proof['seq']} with another hash than the receipt's")
        if proof["tree_size"] == size and own is not None and own.root.hex() != proof["root"]:
            raise Wrong("tree", f"proof and receipt name two roots of the tree of {size} lines")
        vouching = [other, own if proof["tree_size"] == size else None]
    require_signed(vouching, keys)
    said = {} if receipt is members else _said_of_call(members)
    if given.log is not None:
        evidence = Evidence(hashes={seq: leaf.hex()}, members=said)
        if own is not None:
            evidence.root(size, own.root)
        hold_against_log(given.log, evidence, size)
    verdict = f"the receipt is right: line {seq} has the hash {leaf.hex()}"
    return _answer(f"{verdict}\n{_checked_of_call(said, is_in_log=given.log is not None)}", given, keys)


def _said_of_call(answer: dict[str, Any]) -> dict[str, Any]:
    """What the answer says that its line is to say, too. Raises `Wrong` where its result has another hash."""
    said = {name: answer[name] for name in SAID_BY_BOTH if name in answer}
    if "result" in answer:
        result_hash = None
        if answer["result"] is not None or said.get("result_hash") is not None or answer.get("ok") is True:
            result_hash = sha256(canonical(answer["result"])).hexdigest()
        if said.setdefault("result_hash", result_hash) != result_hash:
            reason = f"its result has the hash {result_hash}, and it says {shown(said['result_hash'])}"
            raise Wrong("answer", reason)
    return said


def _checked_of_call(said: dict[str, Any], *, is_in_log: bool) -> str:
    """What of the answer was checked, and what was not."""
    if not said:
        return "no answer came with it, so what the call gave was not looked at"
    if not is_in_log:
        return "what the answer says of the call was not held against that line: give --log"
    if "result_hash" not in said:
        return f"that line says what the answer says ({', '.join(said)}); no result came with it"
    return f"that line says what the answer says, also of its result ({', '.join(said)})"


def check_checkpoints(given: argparse.Namespace, keys: list[Key]) -> Answer:
    old, new = (read_note(read_text(name), keys) for name in (given.old, given.new))
    require_signed([old], keys)
    require_signed([new], keys)
    if old.origin != new.origin:
        raise Wrong("signature", f"they are checkpoints of two logs, {shown(old.origin)} and {shown(new.origin)}")
    if old.size > new.size:
        raise Wrong("tree", f"the newer checkpoint is of {new.size} lines, and the older of {old.size}")
    if given.proof is not None:
        members = read_members(given.proof)
        _check_consistency(members, keys)
        named = [(members[f"{age}_size"], members[f"{age}_root"]) for age in ("old", "new")]
        if named != [(old.size, old.root.hex()), (new.size, new.root.hex())]:
            raise Wrong("tree", "the proof is of other trees than the checkpoints")
    if given.log is not None:
        evidence = Evidence()
        evidence.root(old.size, old.root)
        evidence.root(new.size, new.root)
        hold_against_log(given.log, evidence)
    return _answer(_said_of_growth(old, new), given, keys)


def _answer(said: str, given: argparse.Namespace, keys: list[Key]) -> Answer:
    """`vouched_by` says what vouches for the root; without it, the file is right in itself and nothing more."""
    vouched_by = [name for name, is_there in (("key", keys), ("log", given.log)) if is_there]
    if not vouched_by:
        said += "\nthis is right in itself; for the root nothing vouches: give --key or --log"
    return {"ok": True, "fault": None, "reason": None, "said": said, "vouched_by": vouched_by}, said


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser("verify.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--key", metavar="VKEY", action="append", default=[], help="a verifier key that is trusted")
    shared.add_argument("--json", action="store_true", help="say what was found as JSON")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    log = commands.add_parser("log", parents=[shared], help="check every line of a log")
    log.add_argument("logs", metavar="LOGS")
    log.add_argument("--from", dest="start", metavar="N", type=_line, help="begin with line N")
    log.add_argument("--to", dest="end", metavar="M", type=_line, help="end with line M, which is to be there")
    log.add_argument("--against", metavar="CHECKPOINT", action="append", default=[], help="a checkpoint that was kept")
    log.set_defaults(check=check_log)

    proof = commands.add_parser("proof", parents=[shared], help="check that a line is in, or that the log only grew")
    proof.add_argument("file", metavar="FILE")
    proof.add_argument("--log", metavar="LOGS")
    proof.set_defaults(check=check_proof)

    receipt = commands.add_parser("receipt", parents=[shared], help="check what came with an answer")
    receipt.add_argument("answer", metavar="ANSWER")
    receipt.set_defaults(check=check_receipt)

    growth = commands.add_parser("growth", parents=[shared], help="check that one checkpoint grew out of another")
    growth.add_argument("old", metavar="OLD_CHECKPOINT")
    growth.add_argument("new", metavar="NEW_CHECKPOINT")
    growth.set_defaults(check=check_checkpoints)
    for command in (receipt, growth):
        command.add_argument("--log", metavar="LOGS")
        command.add_argument("--proof", metavar="FILE")
        command.set_defaults(needs_either=True)
    return whole


def _line(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < MOST_LEAVES):
        raise argparse.ArgumentTypeError(f"{text} is not the number of a line")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    whole = parser()
    given = whole.parse_args(arguments)
    if getattr(given, "needs_either", False) and not (given.log or given.proof):
        whole.error("give --log or --proof, or both")
    try:
        found, said = given.check(given, [read_key(key) for key in given.key])
        status = 0 if found["ok"] else 1
    except Wrong as wrong:
        found, said, status = {"ok": False, "fault": wrong.fault, "reason": wrong.reason}, "", 1
        said = f"wrong: {wrong.fault}: {wrong.reason}"
    except (Unusable, OSError) as error:
        found, said, status = {"ok": False, "fault": "unusable", "reason": str(error)}, f"verify.py: {error}", 2
    if given.json:
        print(json.dumps(found))
    else:
        print(said, file=sys.stderr if status == 2 else sys.stdout)  # noqa: PLR2004
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
