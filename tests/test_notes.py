"""Signed notes and checkpoints, against the vectors of Go's note package and the words of the specifications."""

from __future__ import annotations

import base64
import builtins
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bus.errors import OperatorError
from bus.ledger_key import LedgerKey
from bus.notes import MOST_SIGNATURES, Checkpoint, NoteError, Signer, Verifier, new_key, read_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

# Of golang.org/x/mod/sumdb/note and sumdb/tlog: its tests and its documentation.
PETER_KEY = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
ENOCH = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
PETER_SIGNED = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
ENOCH_SIGNED = (
    "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33WWd1RvMc+QQ=\n"
)
SUM_GOLANG_ORG = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"

# The example of C2SP tlog-checkpoint, whose key is not given.
EXAMPLE = (
    "example.com/behind-the-sofa\n"
    "20852163\n"
    "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    "\n"
    "— example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
)

ROOT = bytes(range(32))
SIGNATURE = "— example.com/ledger " + base64.b64encode(bytes(68)).decode() + "\n"


def note(origin: str = "o", size: str = "1", root: str = base64.b64encode(ROOT).decode(), rest: str = "") -> str:
    """A checkpoint with a signature that nobody made."""
    return f"{origin}\n{size}\n{root}\n{rest}\n{SIGNATURE}"


# --- Keys ---


def test_the_known_private_key_makes_the_known_note_and_verifier_key() -> None:
    signer = Signer.read(PETER_KEY)
    assert signer.sign(TEXT) == TEXT + "\n" + PETER_SIGNED
    assert (signer.name, signer.vkey) == ("PeterNeumann", PETER)


@pytest.mark.parametrize("vkey", [PETER, ENOCH, SUM_GOLANG_ORG])
def test_known_verifier_keys_are_read(vkey: str) -> None:
    verifier = Verifier.read(vkey)
    assert verifier.vkey == vkey
    assert verifier.name == vkey.partition("+")[0]


@pytest.mark.parametrize(("read", "key"), [(Verifier.read, PETER), (Signer.read, PETER_KEY)], ids=["public", "private"])
def test_no_part_of_a_key_and_no_changed_key_is_one(read: Any, key: str) -> None:
    parts = {key[start:end] for start in range(len(key)) for end in range(start, len(key) + 1)} - {key}
    changed = {key[:index] + chr(ord(key[index]) + 1) + key[index + 1 :] for index in range(len(key))}
    for text in sorted(parts | changed):
        with pytest.raises(NoteError) as told:
            read(text)
        assert "AYEKFALVFGyNhPJ" not in str(told.value)


@pytest.mark.parametrize(
    "vkey",
    [
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",  # too long, with the id of that
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",  # no known kind, with the id of that
        PETER + "\n",
        PETER.replace("c74f20a3", "C74F20A3"),
    ],
)
def test_a_verifier_key_of_another_form_is_refused(vkey: str) -> None:
    with pytest.raises(NoteError):
        Verifier.read(vkey)


def test_a_new_key_signs_what_its_verifier_key_opens() -> None:
    text = new_key("example.com/ledger")
    signer = Signer.read(text)
    assert Verifier.read(signer.vkey).open(signer.checkpoint(7, ROOT)) == Checkpoint("example.com/ledger", 7, ROOT)
    assert new_key("example.com/ledger") != text


def test_a_new_key_is_spelled_as_the_specification_says() -> None:
    private, public = new_key("a"), Signer.read(new_key("b")).vkey
    seed = base64.b64decode(private.split("+", 4)[4])
    assert private.startswith("PRIVATE+KEY+a+")
    assert (seed[0], len(seed)) == (1, 33)
    name, key_id, spelled = public.split("+", 2)
    raw = base64.b64decode(spelled)
    assert (name, raw[0], len(raw)) == ("b", 1, 33)
    assert key_id == sha256(b"b\n" + raw).hexdigest()[:8]


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u00a0b", "a\u3000", "\ta", "a\x01", "\ud800"])
def test_what_is_no_name_for_a_key_is_refused(name: str) -> None:
    with pytest.raises(NoteError, match="is no name for a key"):
        new_key(name)


def test_a_key_tells_nobody_its_secret() -> None:
    signer = Signer.read(PETER_KEY)
    assert "AYEKFALV" not in repr(signer)
    assert "Ed25519PrivateKey" not in repr(signer)


def test_a_key_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / ".aal"
    made = LedgerKey(state).create("example.com/ledger")
    read = LedgerKey(state).signer()
    assert read is not None
    assert read.vkey == made.vkey
    assert (state / "ledger_key.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("use", [lambda: new_key("a"), lambda: Signer.read(PETER_KEY), lambda: Verifier.read(PETER)])
def test_without_cryptography_a_key_says_what_to_install(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import_ = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("cryptography"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OperatorError) as told:
        use()
    assert told.value.code == "ERR_NO_PACKAGE"
    assert "aal-core[keys]" in (told.value.hint or "")


# --- Notes ---


@pytest.mark.parametrize("signatures", [PETER_SIGNED, PETER_SIGNED + ENOCH_SIGNED, ENOCH_SIGNED + PETER_SIGNED])
def test_a_note_is_opened_by_one_of_its_keys_whoever_else_signed(signatures: str) -> None:
    assert Verifier.read(PETER).text_of(f"{TEXT}\n{signatures}") == TEXT


def test_a_signature_is_over_the_text_up_to_its_last_newline() -> None:
    text, _, line = Signer.read(PETER_KEY).checkpoint(1, ROOT).rpartition("\n\n")
    raw = base64.b64decode(line.split(" ")[2])
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(PETER.split("+", 2)[2])[1:])
    public.verify(raw[4:], (text + "\n").encode())
    assert raw[:4].hex() == "c74f20a3"


def test_a_note_that_nobody_trusted_signed_is_refused() -> None:
    with pytest.raises(NoteError, match=r"no signature of PeterNeumann\+c74f20a3"):
        Verifier.read(PETER).text_of(f"{TEXT}\n{ENOCH_SIGNED}")


def test_a_name_alone_and_an_id_alone_are_nobodys_signature() -> None:
    renamed = PETER_SIGNED.replace("PeterNeumann", "CarmenSandiego")
    other_id = PETER_SIGNED.replace("x08g", "xxxx")
    for signed in (renamed, other_id):
        with pytest.raises(NoteError, match="no signature"):
            Verifier.read(PETER).text_of(f"{TEXT}\n{signed}")
        assert Verifier.read(PETER).text_of(f"{TEXT}\n{signed}{PETER_SIGNED}") == TEXT


def test_one_wrong_signature_of_the_key_spoils_the_note() -> None:
    wrong = PETER_SIGNED[:60] + "ABCD" + PETER_SIGNED[60:]
    for signed in (wrong, PETER_SIGNED + wrong, wrong + PETER_SIGNED):
        with pytest.raises(NoteError, match="is wrong"):
            Verifier.read(PETER).text_of(f"{TEXT}\n{signed}")


def test_a_changed_text_is_not_what_was_signed() -> None:
    with pytest.raises(NoteError, match="is wrong"):
        Verifier.read(PETER).text_of(f"{TEXT.replace('answer', 'Answer')}\n{PETER_SIGNED}")


def test_a_bit_changed_anywhere_in_a_signed_checkpoint_is_found() -> None:
    signed = Signer.read(PETER_KEY).checkpoint(4711, ROOT)
    verifier = Verifier.read(PETER)
    for index, character in enumerate(signed):
        for bit in range(7):
            changed = signed[:index] + chr(ord(character) ^ 1 << bit) + signed[index + 1 :]
            with pytest.raises(NoteError):
                verifier.open(changed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT,
        TEXT + "\n",
        TEXT + "\n" + PETER_SIGNED[:-1],
        TEXT + PETER_SIGNED,
        "\x01" + TEXT + "\n" + PETER_SIGNED,
        "\udcff" + TEXT + "\n" + PETER_SIGNED,
        TEXT + "\r\n" + PETER_SIGNED,
        TEXT + "\n" + PETER_SIGNED.replace("PeterNeumann", "Peter Neumann"),
        TEXT + "\n" + PETER_SIGNED.replace("PeterNeumann", "Peter+Neumann"),
        TEXT + "\n" + PETER_SIGNED.replace("— ", "- "),
        TEXT + "\n" + PETER_SIGNED.replace("— ", "—"),
        TEXT + "\n" + PETER_SIGNED + "An unexpected line.\n",
        TEXT + "\n" + PETER_SIGNED + "— EnochRoot \n",
        TEXT + "\n" + PETER_SIGNED + "— EnochRoot rwz+eA==\n",  # an id and no signature
        TEXT + "\n" + PETER_SIGNED + "— EnochRoot rwz+eBx=\n",  # base64 spelled in another way
        TEXT + "\n" + PETER_SIGNED * (MOST_SIGNATURES + 1),
    ],
)
def test_what_is_no_note_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        Verifier.read(PETER).text_of(text)


def test_as_many_signatures_as_are_allowed_are_read() -> None:
    assert Verifier.read(PETER).text_of(TEXT + "\n" + ENOCH_SIGNED * (MOST_SIGNATURES - 1) + PETER_SIGNED) == TEXT


def test_the_text_of_a_note_may_hold_empty_lines() -> None:
    signer = Signer.read(PETER_KEY)
    assert Verifier.read(PETER).text_of(signer.sign("a\n\nb\n")) == "a\n\nb\n"


@pytest.mark.parametrize("text", ["", "a", "a\r\n", "\x00\n", "\ud800\n"])
def test_what_no_note_can_hold_is_not_signed(text: str) -> None:
    with pytest.raises(NoteError):
        Signer.read(PETER_KEY).sign(text)


# --- Checkpoints ---


def test_the_example_of_the_specification_is_read() -> None:
    found = read_checkpoint(EXAMPLE)
    assert (found.origin, found.size) == ("example.com/behind-the-sofa", 20852163)
    assert found.root.hex() == "0ac5186a91863e8e1d90c808014aa89bf5da8e3ee1d9f07630f0378f68f1ab62"
    assert found.text() + "\n" == EXAMPLE[: EXAMPLE.index("—")]


def test_a_checkpoint_is_three_lines_and_a_signature() -> None:
    lines = Signer.read(PETER_KEY).checkpoint(42, ROOT).split("\n")
    assert lines[:4] == ["PeterNeumann", "42", base64.b64encode(ROOT).decode(), ""]
    assert lines[4].startswith("— PeterNeumann x08go")
    assert lines[5:] == [""]


@pytest.mark.parametrize("size", [0, 1, 9, 10, 2**53 - 1, 10**18])
def test_every_size_is_written_and_read_alike(size: int) -> None:
    signed = Signer.read(PETER_KEY).checkpoint(size, ROOT)
    assert Verifier.read(PETER).open(signed) == read_checkpoint(signed) == Checkpoint("PeterNeumann", size, ROOT)


def test_lines_that_follow_the_root_are_allowed() -> None:
    assert read_checkpoint(note(rest="more\n— and more\n")) == Checkpoint("o", 1, ROOT)


@pytest.mark.parametrize(
    "wrong",
    [
        note(origin=""),
        *(
            note(size=size)
            for size in ("", "01", "00", "-1", "+1", "1 ", " 1", "1.0", "1e3", "0x1", "\u0661", "9" * 20)
        ),
        note(root=""),
        note(root=base64.b64encode(ROOT[:31]).decode()),
        note(root=base64.b64encode(ROOT + b"x").decode()),
        note(root=base64.urlsafe_b64encode(b"\xff" * 32).decode()),
        note(root=base64.b64encode(ROOT).decode().rstrip("=")),
        note(root=base64.b64encode(ROOT).decode().replace("8=", "9=")),  # the same bytes, spelled in another way
        note(root=ROOT.hex()),
        note(rest="\n"),
        note(rest="more\n\nmore\n"),
        f"o\n1\n\n{SIGNATURE}",
        note().replace("\n", "\r\n"),
    ],
)
def test_what_is_no_checkpoint_is_refused(wrong: str) -> None:
    with pytest.raises(NoteError):
        read_checkpoint(wrong)


def test_a_checkpoint_of_another_log_is_not_opened_with_this_key() -> None:
    signed = Signer.read(PETER_KEY).sign(Checkpoint("example.com/other", 1, ROOT).text())
    assert read_checkpoint(signed).origin == "example.com/other"
    with pytest.raises(NoteError, match=r"of example\.com/other, and the key is that of PeterNeumann"):
        Verifier.read(PETER).open(signed)


def test_a_private_key_under_the_name_of_another_opens_nothing_of_it() -> None:
    seed = Ed25519PrivateKey.generate().private_bytes_raw()
    stolen = "PRIVATE+KEY+PeterNeumann+c74f20a3+" + base64.b64encode(b"\x01" + seed).decode()
    with pytest.raises(NoteError, match="another id than its key makes"):
        Signer.read(stolen)
