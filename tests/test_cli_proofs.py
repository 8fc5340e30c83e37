"""`aal provenance verify`, `prove`, `checkpoint` and `key`, as an operator and an auditor use them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from bus import merkle
from bus.ledger import Ledger
from bus.ledger_key import LedgerKey
from bus.notary import Notary
from bus.notes import Signer, Verifier, new_key
from tests.cli_fixtures import aal, plain_environment
from tests.ledgers import ENVIRONMENT, append, call, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli_fixtures import Ran


def refused(aal: Callable[..., Ran], code: int, *arguments: str) -> Ran:
    ran = aal(*arguments)
    assert ran.code == code, ran
    return ran


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Of seven lines, in the working folder."""
    path = tmp_path / "logs" / "provenance.jsonl"
    write(path, *(call(str(number)) for number in range(7)))
    return path


def test_a_key_is_made_once_for_its_owner_alone_and_outside_the_logs(
    aal: Callable[..., Ran], tmp_path: Path, ledger: Path
) -> None:
    made = aal("provenance", "key", "new", "example.org/aal")
    vkey = made.out.strip()
    assert vkey.startswith("example.org/aal+")
    [kept] = tmp_path.rglob("ledger_key.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert ledger.parent not in kept.parents
    assert aal("provenance", "key", "show").out.strip() == vkey
    again = refused(aal, 1, "provenance", "key", "new", "example.org/aal")
    assert "ERR_EXISTS" in again.err
    assert aal("provenance", "key", "show", "--json").json == {"vkey": vkey}


def test_without_a_key_there_is_none_to_show(aal: Callable[..., Ran]) -> None:
    assert "aal provenance key new" in refused(aal, 1, "provenance", "key", "show").err


def test_a_name_that_notes_cannot_have_is_refused(aal: Callable[..., Ran]) -> None:
    assert "NAME" in refused(aal, 2, "provenance", "key", "new", "two words").err


@pytest.mark.parametrize("has_key", [False, True])
def test_a_line_is_proved_against_a_checkpoint(aal: Callable[..., Ran], ledger: Path, has_key: bool) -> None:
    vkey = aal("provenance", "key", "new", "x").out.strip() if has_key else None
    proof = aal("provenance", "prove", "3", "--json").json
    assert (proof["seq"], proof["tree_size"]) == (3, 7)
    root, path = bytes.fromhex(proof["root"]), [bytes.fromhex(node) for node in proof["inclusion"]]
    merkle.check_inclusion(2, 7, bytes.fromhex(proof["hash"]), path, root)
    if vkey is None:
        assert proof["checkpoint"] is None
    else:
        note = Verifier.read(vkey).open(proof["checkpoint"])
        assert (note.size, note.root) == (7, root)
    assert aal("provenance", "prove", "3", "--size", "4", "--json").json["tree_size"] == 4
    assert "no line 5" in refused(aal, 1, "provenance", "prove", "5", "--size", "4").err
    assert "has 7 lines, not 8" in refused(aal, 1, "provenance", "prove", "5", "--size", "8").err


def test_growth_is_proved(aal: Callable[..., Ran], ledger: Path) -> None:
    proof = aal("provenance", "prove-consistency", "3", "--json").json
    assert (proof["old_size"], proof["new_size"]) == (3, 7)
    old, new = bytes.fromhex(proof["old_root"]), bytes.fromhex(proof["new_root"])
    merkle.check_consistency(3, 7, old, new, [bytes.fromhex(node) for node in proof["consistency"]])
    assert aal("provenance", "prove-consistency", "3", "5", "--json").json["new_size"] == 5
    assert "do not begin with 6" in refused(aal, 1, "provenance", "prove-consistency", "6", "5").err


def test_a_checkpoint_that_was_kept_finds_what_the_chain_alone_would_not(
    aal: Callable[..., Ran], tmp_path: Path, ledger: Path
) -> None:
    vkey = aal("provenance", "key", "new", "x").out.strip()
    kept = tmp_path / "checkpoint.txt"
    kept.write_text(aal("provenance", "checkpoint").out)
    assert aal("provenance", "verify", "--against", str(kept), "--key", vkey).out.startswith("ok 7 lines")
    write(ledger, call("more"))
    assert aal("provenance", "verify", "--against", str(kept)).out.startswith("ok 8 lines")
    ledger.unlink()
    write(ledger, *(call("another history") for _ in range(9)))
    assert aal("provenance", "verify").out.startswith("ok 9 lines")
    wrong = refused(aal, 4, "provenance", "verify", "--against", str(kept))
    assert "line 7: the checkpoint of 7 lines has another root" in wrong.err


def test_a_checkpoint_of_somebody_else_is_no_checkpoint(aal: Callable[..., Ran], tmp_path: Path, ledger: Path) -> None:
    aal("provenance", "key", "new", "x")
    kept = tmp_path / "checkpoint.txt"
    kept.write_text(aal("provenance", "checkpoint").out)
    (tmp_path / ".aal" / "ledger_key.json").unlink()
    other = aal("provenance", "key", "new", "x").out.strip()
    assert "--against" in refused(aal, 2, "provenance", "verify", "--against", str(kept), "--key", other).err
    assert "--key" in refused(aal, 2, "provenance", "verify", "--key", "nonsense").err
    assert "--against" in refused(aal, 2, "provenance", "verify", "--against", "missing.txt").err


def signed_ledger(tmp_path: Path, *signers: Signer) -> Path:
    """Of a call and a checkpoint by each of these keys, one after the other; in the working folder."""
    path = tmp_path / "logs" / "provenance.jsonl"
    for signer in signers:
        ledger = Ledger(path, fsync="batch", environment=ENVIRONMENT, notary=Notary(signer, tmp_path / ".aal"))
        ledger.open(serves=True)
        append(ledger, call())
        ledger.close()
    return path


def test_after_a_change_of_key_the_earlier_notes_are_no_fault(aal: Callable[..., Ran], tmp_path: Path) -> None:
    earlier = Signer.read(new_key("x"))
    vkey = aal("provenance", "key", "new", "x").out.strip()
    own = LedgerKey(tmp_path / ".aal").signer()
    assert own is not None
    signed_ledger(tmp_path, earlier, own)
    told = aal("provenance", "verify")
    assert "2 checkpoints (1 signatures), signed up to line 3" in told.out
    assert aal("provenance", "verify", "--json").json["signed_size"] == 3
    both = aal("provenance", "verify", "--key", vkey, "--key", earlier.vkey, "--json").json
    assert (both["ok"], both["signed"], both["signed_size"]) == (True, 2, 3)
    old = aal("provenance", "verify", "--key", earlier.vkey, "--json").json
    assert (old["ok"], old["signed"], old["signed_size"]) == (True, 1, 1)


def test_a_key_that_is_named_must_have_signed_something(aal: Callable[..., Ran], tmp_path: Path, ledger: Path) -> None:
    signer = Signer.read(new_key("x"))
    told = refused(aal, 4, "provenance", "verify", "--key", signer.vkey)
    assert "no checkpoint in these lines is signed with the key" in told.err
    assert "line " not in told.err.splitlines()[0]
    found = json.loads(refused(aal, 4, "provenance", "verify", "--key", signer.vkey, "--json").out)
    assert (found["ok"], found["fault"], found["first_bad"], found["signed_size"]) == (False, "signature", None, None)
    assert (found["lines"], found["signed"]) == (7, 0)
    leaves = [bytes.fromhex(json.loads(line)["hash"]) for line in ledger.read_bytes().splitlines()]
    kept = tmp_path / "kept"
    kept.write_text(signer.checkpoint(5, merkle.root_of(leaves[:5])))
    held = aal("provenance", "verify", "--key", signer.vkey, "--against", str(kept))
    assert held.out.rstrip().endswith(", signed up to line 5")
    held = aal("provenance", "verify", "--key", signer.vkey, "--against", str(kept), "--json")
    assert (held.json["ok"], held.json["signed"], held.json["signed_size"]) == (True, 0, 5)
    unsigned = aal("provenance", "verify", "--against", str(kept), "--json").json
    assert (unsigned["ok"], unsigned["signed_size"]) == (True, None)


def test_a_key_of_our_own_need_not_have_signed_yet(aal: Callable[..., Ran], ledger: Path) -> None:
    aal("provenance", "key", "new", "x")
    assert aal("provenance", "verify", "--json").json["signed_size"] is None


def test_without_a_key_a_checkpoint_is_told_unsigned(aal: Callable[..., Ran], ledger: Path) -> None:
    told = aal("provenance", "checkpoint")
    assert told.out.startswith("7 lines, root ")
    assert "not signed" in told.err
    assert aal("provenance", "checkpoint", "--json").json["checkpoint"] is None


def test_part_of_the_ledger_is_verified(aal: Callable[..., Ran], ledger: Path) -> None:
    report = aal("provenance", "verify", "--from", "3", "--to", "5", "--json").json
    assert (report["ok"], report["lines"], report["last"]) == (True, 3, 5)
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"ok":true', b'"ok":null'), *lines[3:]]))
    report = json.loads(refused(aal, 4, "provenance", "verify", "--json").out)
    assert (report["first_bad"], report["fault"]) == (3, "hash")


COMMANDS = [("checkpoint",), ("prove", "1"), ("prove-consistency", "1")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_nothing_is_proved_or_signed_of_a_log_with_a_line_that_is_wrong(
    aal: Callable[..., Ran], ledger: Path, command: tuple[str, ...]
) -> None:
    aal("provenance", "key", "new", "x")
    ledger.write_bytes(ledger.read_bytes().replace(b'"ok":true', b'"ok":null', 1))
    ran = aal("provenance", *command)
    assert (ran.code, ran.out) == (4, "")
    assert ran.err.startswith("ERR_LEDGER_BROKEN: line 1: its bytes do not have the hash that it holds")
    assert "aal provenance verify names the first bad line" in ran.err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_commands_that_sign_refuse_another_log_until_there_is_a_new_key(
    aal: Callable[..., Ran], tmp_path: Path, command: tuple[str, ...]
) -> None:
    path = tmp_path / "logs" / "provenance.jsonl"
    write(path, call(), call())
    aal("provenance", "key", "new", "example.org/aal")
    assert aal("provenance", *command).code == 0
    shutil.rmtree(path.parent)
    write(path, call("other"), call("other"))
    ran = aal("provenance", *command)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("ERR_CONTRADICTED: the key example.org/aal has signed")
    assert "aal provenance key new" in ran.err
    (tmp_path / ".aal" / "ledger_key.json").rename(tmp_path / "old_key.json")
    aal("provenance", "key", "new", "example.org/aal")
    assert aal("provenance", *command).code == 0
