"""Signed notes (C2SP signed-note) and the checkpoints that stand in them (C2SP tlog-checkpoint), signed with Ed25519.

Keys are spelled as Go's note package spells them, so its tools read ours. `cryptography` does the signing; it is only
looked for where there is a key, as who has none can do without it. What the specifications refuse is refused, and so
is base64 that is not spelled in the one shortest way, lest one note have two spellings.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from bus.errors import OperatorError

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import ModuleType

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ROOT_BYTES = 32
MOST_SIGNATURES = 100
"""More of them in one note are refused, as Go's package does; the specification asks for at least 16."""

_ED25519 = b"\x01"
_KEY_BYTES = 32
_ID_BYTES = 4
_SIGNED = "\N{EM DASH} "
_PRIVATE = "PRIVATE+KEY+"
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f]")
_WHAT_A_NAME_IS = "text without spaces, control characters and +, as example.com/ledger"


class NoteError(ValueError):
    """It is not a key, a note or a checkpoint, or nobody who is trusted signed it; the text says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log says of its tree: how many leaves it has, and its root (32 bytes). `origin` is which log it is."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """The note's text."""
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key. `vkey` is how it is handed on: `<name>+<id, 8 hex digits>+<base64 of 0x01 and the key>`."""

    name: str
    vkey: str
    _id: bytes
    _key: Ed25519PublicKey = field(repr=False, compare=False)

    @classmethod
    def read(cls, vkey: str) -> Verifier:
        """Raises `NoteError` for what is no such text, and `OperatorError` without `cryptography`."""
        name, key_id, raw = _read_key(vkey, "a verifier key is <name>+<id>+<key>")
        if key_id != _key_id(name, raw).hex():
            raise NoteError(f"the verifier key of {name} has another id than its key makes")
        return cls(name, vkey, _key_id(name, raw), _ed25519().Ed25519PublicKey.from_public_bytes(raw))

    def text_of(self, note: str) -> str:
        """The text of a note that this key signed. Raises `NoteError` where it did not; others may have as well."""
        text, signatures = _parts(note)
        ours = [signature for name, key_id, signature in signatures if self.signs_as(name, key_id)]
        if not ours:
            raise NoteError(f"it has no signature of {self.label}")
        for signature in ours:
            self.check(text, signature)
        return text

    def open(self, note: str) -> Checkpoint:
        """The checkpoint of a note that this key signed for the log of its own name. Raises `NoteError`."""
        return open_signed(note, [self])

    @property
    def label(self) -> str:
        """Its name and id, as `name+1a2b3c4d`."""
        return f"{self.name}+{self._id.hex()}"

    def signs_as(self, name: str, key_id: bytes) -> bool:
        """Whether a signature's line that has this name and id (4 bytes) is said to be by this key."""
        return (name, key_id) == (self.name, self._id)

    def check(self, text: str, signature: bytes) -> None:
        """Raises `NoteError` unless this key made the signature (64 bytes) of the text."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  # an extra: there where the key is

        try:
            self._key.verify(signature, text.encode())
        except InvalidSignature:
            raise NoteError(f"the signature of {self.label} is wrong") from None


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key, and the verifier key that goes with it."""

    name: str
    vkey: str
    _id: bytes
    _key: Ed25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def read(cls, text: str) -> Signer:
        """Of `PRIVATE+KEY+<name>+<id>+<base64 of 0x01 and the seed>`.

        Raises `NoteError`, which repeats nothing of the key, and `OperatorError` without `cryptography`.
        """
        what = f"a private key is {_PRIVATE}<name>+<id>+<key>"
        if not text.startswith(_PRIVATE):
            raise NoteError(what)
        name, key_id, seed = _read_key(text.removeprefix(_PRIVATE), what)
        signer = cls._of(name, seed)
        if key_id != signer._id.hex():
            raise NoteError(f"the private key of {name} has another id than its key makes")
        return signer

    @classmethod
    def _of(cls, name: str, seed: bytes) -> Signer:
        key = _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
        public = key.public_key().public_bytes_raw()
        key_id = _key_id(name, public)
        return cls(name, _key_text(name, key_id, public), key_id, key)

    def sign(self, text: str) -> str:
        """The note. `text` ends with a newline and has no other control character; else `NoteError` is raised."""
        if not text.endswith("\n") or not _is_text(text):
            raise NoteError("a note's text ends with a newline and has no other control character")
        return f"{text}\n{_SIGNED}{self.name} {_base64(self._id + self._key.sign(text.encode()))}\n"

    def checkpoint(self, size: int, root: bytes) -> str:
        """The signed note of a tree of so many leaves with this root (32 bytes)."""
        return self.sign(Checkpoint(self.name, size, root).text())


def read_checkpoint(note: str) -> Checkpoint:
    """The checkpoint of a note, whoever signed it: nothing is verified. Raises `NoteError` where it is none."""
    return read_signed(note, ())[0]


def read_signed(note: str, verifiers: Collection[Verifier]) -> tuple[Checkpoint, bool]:
    """The checkpoint of a note, and whether any of these keys signed it.

    A signature of another key, by name and id, is not checked and says nothing. Raises `NoteError` where the note is no
    checkpoint, where one of these keys is said to have signed it and has not, and where it is of a log that none of the
    keys that signed it has the name of.
    """
    text, signatures = _parts(note)
    signed_by = set()
    for name, key_id, signature in signatures:
        for verifier in verifiers:
            if verifier.signs_as(name, key_id):
                verifier.check(text, signature)
                signed_by.add(name)
    checkpoint = _checkpoint_in(text)
    if signed_by and checkpoint.origin not in signed_by:
        raise NoteError(f"it is a checkpoint of {checkpoint.origin}, and the key is that of {min(signed_by)}")
    return checkpoint, bool(signed_by)


def open_signed(note: str, verifiers: Collection[Verifier]) -> Checkpoint:
    """As `read_signed`; `NoteError` is also raised where none of these keys signed it."""
    checkpoint, is_signed = read_signed(note, verifiers)
    if not is_signed:
        raise NoteError(f"it has no signature of {' or '.join(verifier.label for verifier in verifiers)}")
    return checkpoint


def new_key(name: str) -> str:
    """A new private key, as `Signer.read` takes it. Raises `NoteError` for what cannot be a key's name."""
    if not _is_name(name):
        raise NoteError(f"{name!r} is no name for a key, which is {_WHAT_A_NAME_IS}")
    key = _ed25519().Ed25519PrivateKey.generate()
    return _PRIVATE + _key_text(name, _key_id(name, key.public_key().public_bytes_raw()), key.private_bytes_raw())


def _ed25519() -> ModuleType:
    """Of `cryptography`, which is an extra. Raises `OperatorError` where that is not installed."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ImportError as error:
        raise OperatorError("ERR_NO_PACKAGE", f"signing checkpoints needs cryptography: {error}") from None
    return ed25519


def _key_text(name: str, key_id: bytes, raw: bytes) -> str:
    return f"{name}+{key_id.hex()}+{_base64(_ED25519 + raw)}"


def _read_key(text: str, what: str) -> tuple[str, str, bytes]:
    """Name, id and 32 bytes of a key. Raises `NoteError` with `what`, and never with the text, which may be secret."""
    name, _, rest = text.partition("+")
    key_id, _, spelled = rest.partition("+")
    raw = _unbase64(spelled)
    if not _is_name(name) or raw is None or raw[:1] != _ED25519 or len(raw) != 1 + _KEY_BYTES:
        raise NoteError(f"{what}, with the base64 of the byte 1 and {_KEY_BYTES} bytes; <name> is {_WHAT_A_NAME_IS}")
    return name, key_id, raw[1:]


def _key_id(name: str, public: bytes) -> bytes:
    return sha256(name.encode() + b"\n" + _ED25519 + public).digest()[:_ID_BYTES]


def _parts(note: str) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    """The text and the signatures: name, id, bytes. They are parted by the last empty line."""
    text, separator, rest = note.rpartition("\n\n")
    lines = rest.split("\n")
    if not separator or lines.pop() != "" or not lines or not _is_text(note):
        raise NoteError("a note is text, an empty line, and lines with signatures")
    if len(lines) > MOST_SIGNATURES:
        raise NoteError(f"it has {len(lines)} signatures, and {MOST_SIGNATURES} are allowed")
    return text + "\n", [_signature(line) for line in lines]


def _signature(line: str) -> tuple[str, bytes, bytes]:
    name, _, spelled = line.removeprefix(_SIGNED).partition(" ")
    raw = _unbase64(spelled)
    if not line.startswith(_SIGNED) or not _is_name(name) or raw is None or len(raw) <= _ID_BYTES:
        raise NoteError("a signature's line is an em dash, the key's name and base64, with one space between them")
    return name, raw[:_ID_BYTES], raw[_ID_BYTES:]


def _checkpoint_in(text: str) -> Checkpoint:
    """Of a note's text. Lines after the third are allowed and say nothing to us."""
    lines = text.removesuffix("\n").split("\n")
    if len(lines) < 3 or "" in lines:  # noqa: PLR2004
        raise NoteError("a checkpoint has the lines origin, size and root, and none that is empty")
    origin, size, spelled = lines[:3]
    if not _SIZE.fullmatch(size):
        raise NoteError(f"the size of its tree is {size!r}, which is no decimal number as one is written")
    root = _unbase64(spelled)
    if root is None or len(root) != ROOT_BYTES:
        raise NoteError(f"its root is not the base64 of {ROOT_BYTES} bytes")
    return Checkpoint(origin, int(size), root)


def _is_name(name: str) -> bool:
    return name != "" and "+" not in name and not any(map(str.isspace, name)) and _is_text(name)


def _is_text(text: str) -> bool:
    """Whether it can be spelled in UTF-8, and has no control character but newlines."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not _CONTROL.search(text)


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _unbase64(text: str) -> bytes | None:
    """None where it is not the base64 of bytes as it is written."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one
        return None
    return raw if _base64(raw) == text else None
