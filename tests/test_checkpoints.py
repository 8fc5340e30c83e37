"""Checkpoints: when the ledger says what it is, and that nobody reads further back than to the last."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from bus import checkpoints, merkle
from bus import ledger as ledger_module
from bus.checkpoints import Checkpoints, Note
from bus.dispatch import Bus
from bus.errors import OperatorError, SettingError
from bus.index import Index
from bus.ledger import Ledger
from bus.ledger_key import LedgerKey
from bus.notary import Notary
from bus.notes import Signer, Verifier, new_key
from bus.proofs import Prover
from bus.segments import lock_path, taken
from bus.signed import Signed
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, append, call, opened, write
from tests.support import a_call, add_overlay, eventually, misfits, settings_in

if TYPE_CHECKING:
    from bus.ledger import Receipt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def types(path: Path) -> list[str]:
    return [record["type"] for record in records(path)]


def served(path: Path, *members: dict[str, Any]) -> None:
    """As `write`, by a server."""
    ledger = Ledger(path, fsync="never", environment=ENVIRONMENT)
    ledger.open(serves=True)
    for record in members:
        append(ledger, record)
    ledger.close()


def test_after_so_many_lines_one_says_what_came_before_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 3)
    receipts = write(path, *(call() for _ in range(7)))
    assert types(path) == [*["invoke"] * 3, "checkpoint", *["invoke"] * 3, "checkpoint", "invoke"]
    leaves = [bytes.fromhex(record["hash"]) for record in records(path)]
    for record in records(path):
        if record["type"] == "checkpoint":
            assert record["size"] == record["seq"] - 1
            assert record["root"] == merkle.root_of(leaves[: record["size"]]).hex()
            assert record["note"] is None
    assert [receipt.seq for receipt in receipts] == [1, 2, 3, 5, 6, 7, 9]
    assert [receipt.tree_size for receipt in receipts] == [1, 2, 3, 5, 6, 7, 9]


def test_a_server_leaves_one_when_it_ends_and_not_two_in_a_row(path: Path) -> None:
    served(path, call())
    served(path)
    served(path, call())
    assert types(path) == ["invoke", "checkpoint", "invoke", "checkpoint"]


def test_a_command_that_makes_one_call_leaves_its_line_alone(path: Path) -> None:
    write(path, call())
    write(path, call())
    assert types(path) == ["invoke", "invoke"]


def test_a_server_writes_one_once_time_has_passed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "AFTER_S", 0.0)
    ledger = Ledger(path, fsync="never", environment=ENVIRONMENT)
    ledger.open(serves=True)
    try:
        append(ledger, call())
        append(ledger, call())
        assert types(path)[:3] == ["invoke", "checkpoint", "invoke"]
    finally:
        ledger.close()
    assert types(path) == ["invoke", "checkpoint"] * 2


def test_a_server_writes_one_for_the_lines_of_others_once_time_has_passed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.01)
    now_s = [0.0]
    looks: list[float] = []
    look = Ledger._checkpoint

    def noted(self: Ledger, *, at_end: bool = False) -> None:
        look(self, at_end=at_end)
        looks.append(now_s[0])

    monkeypatch.setattr(Ledger, "_checkpoint", noted)
    server = Ledger(path, fsync="never", environment=ENVIRONMENT, clock=lambda: now_s[0])
    server.open(serves=True)
    try:
        write(path, call("other"))
        now_s[0] = checkpoints.AFTER_S
        eventually(lambda: types(path) == ["invoke", "checkpoint"], "the server tells of the other's line")
        now_s[0] = 2 * checkpoints.AFTER_S
        eventually(lambda: len(looks) == 2, "it looks again")
        write(path, call("other"))
        now_s[0] = 3 * checkpoints.AFTER_S
        eventually(lambda: types(path) == ["invoke", "checkpoint"] * 2, "it tells of the other's next line")
    finally:
        server.close()
    assert looks == [checkpoints.AFTER_S, 2 * checkpoints.AFTER_S, 3 * checkpoints.AFTER_S]
    assert types(path) == ["invoke", "checkpoint"] * 2


def test_who_opens_the_ledger_reads_back_to_the_last_one_and_no_further(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 3)
    write(path, *(call() for _ in range(4)))
    root = verify(path).root
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b"x" * (len(line) - 1) + b"\n" for line in lines[:3]] + lines[3:]))
    with opened(path) as ledger:
        assert ledger.healthy
        assert append(ledger, call()).seq == 6
    path.write_bytes(b"".join(lines))
    with opened(path) as ledger:
        append(ledger, call())
    assert verify(path).ok
    assert verify(path, end=5).root == root


def test_processes_that_take_turns_keep_one_tree(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 5)
    with opened(path) as one, opened(path) as other:
        for _ in range(9):
            append(one, call("one"))
            append(other, call("other", payload={"type": "checkpoint"}))
    report = verify(path)
    assert (report.ok, report.lines, report.checkpoints) == (True, 21, 3)
    assert types(path).count("checkpoint") == 3


def test_a_checkpoint_that_lies_makes_the_ledger_unwell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 2)
    write(path, call(), call(), call())
    text = path.read_bytes()
    root = records(path)[2]["root"].encode()
    path.write_bytes(text.replace(root, root[::-1]))
    with opened(path) as ledger:
        assert not ledger.healthy
        assert "do not have the hash" in str(ledger.reason)


# --- Signed ---


@pytest.fixture
def signer() -> Signer:
    return Signer.read(new_key("example.org/aal"))


def notary_of(path: Path, signer: Signer) -> Notary:
    """As a process has it that starts on this folder."""
    return Notary(signer, path.parent.parent / ".aal")


def signed(path: Path, signer: Signer, *members: dict[str, Any]) -> list[Receipt]:
    ledger = Ledger(path, fsync="batch", environment=ENVIRONMENT, notary=notary_of(path, signer))
    ledger.open(serves=True)
    try:
        return [append(ledger, record) for record in members]
    finally:
        ledger.close()


def test_with_a_key_every_receipt_has_the_note_of_its_tree(path: Path, signer: Signer) -> None:
    receipts = signed(path, signer, call(), call())
    verifier = Verifier.read(signer.vkey)
    leaves = [bytes.fromhex(record["hash"]) for record in records(path)]
    for receipt in receipts:
        note = verifier.open(receipt.checkpoint or "")
        assert (note.origin, note.size) == ("example.org/aal", receipt.tree_size)
        assert note.root == merkle.root_of(leaves[: receipt.tree_size])


def test_the_notes_of_checkpoints_lie_beside_the_ledger_and_in_it(
    path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 2)
    monkeypatch.setattr(checkpoints, "KEPT", 2)
    signed(path, signer, *(call() for _ in range(7)))
    notes = {record["size"]: record["note"] for record in records(path) if record["type"] == "checkpoint"}
    assert list(notes) == [2, 5, 8, 10]
    folder = path.parent / "checkpoints"
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "000000000008": notes[8],
        "000000000010": notes[10],
    }
    verifier = Verifier.read(signer.vkey)
    report = verify(path, verifiers=[verifier])
    assert (report.ok, report.checkpoints, report.signed) == (True, 4, 4)
    assert verify(path, against=verifier.open((folder / "000000000008").read_text())).ok


def test_a_note_that_lies_beside_the_ledger_is_on_the_disk_as_is_its_name(
    path: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a sign that its line was synced: a power loss must not take it."""
    steps: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        sync(fd)
        steps.append(Path(f"/proc/self/fd/{fd}").readlink().name)

    def renamed(old: str, new: str, **folders: int) -> None:
        rename(old, new, **folders)
        steps.append(f"{old} is {new}")

    notary = notary_of(path, signer)
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    Checkpoints(path, notary).keep(Note(Signed(3, b"r" * 32), "the note"))
    folder = path.parent / "checkpoints"
    assert (folder / f"{3:012}").read_text() == "the note"
    temporary = f".{3:012}-{os.getpid()}"
    assert steps[-4:] == [path.parent.name, temporary, f"{temporary} is {3:012}", folder.name]


def test_notes_that_an_earlier_key_signed_are_no_fault_and_not_counted(path: Path, signer: Signer) -> None:
    signed(path, signer, call())
    later = Signer.read(new_key("example.org/aal"))
    signed(path, later, call(), call())
    earlier, now = Verifier.read(signer.vkey), Verifier.read(later.vkey)
    report = verify(path, verifiers=[now])
    assert (report.ok, report.checkpoints, report.signed, report.signed_size) == (True, 2, 1, 4)
    report = verify(path, verifiers=[earlier])
    assert (report.ok, report.signed, report.signed_size) == (True, 1, 1)
    assert verify(path, verifiers=[earlier, now]).signed == 2


def test_notes_that_cannot_be_kept_keep_nobody_from_calling(path: Path, signer: Signer) -> None:
    path.parent.mkdir()
    (path.parent / "checkpoints").write_text("in the way")
    [receipt] = signed(path, signer, call())
    assert receipt.seq == 1
    assert verify(path, verifiers=[Verifier.read(signer.vkey)]).signed == 1


async def test_an_answer_is_a_receipt_that_an_auditor_can_check(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    add_overlay(settings.overlays)
    vkey = LedgerKey(settings.state).create("example.org/aal").vkey
    async with Bus(settings) as bus:
        answer = await bus.invoke(a_call())
    receipt = answer.body["provenance"]
    note = Verifier.read(vkey).open(receipt["checkpoint"])
    with Prover(settings.ledger) as prover:
        proof = prover.inclusion(receipt["seq"], receipt["tree_size"])
    merkle.check_inclusion(
        receipt["seq"] - 1,
        note.size,
        bytes.fromhex(receipt["hash"]),
        [bytes.fromhex(node) for node in proof.inclusion],
        note.root,
    )
    assert misfits("outcome", answer.body) == []


def test_a_key_that_makes_no_sense_stops_the_start(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    LedgerKey(settings.state).create("x")
    file = settings.state / "ledger_key.json"
    file.write_text('{"key": "PRIVATE+KEY+nonsense"}')
    with pytest.raises(SettingError, match=r"ledger_key\.json"):
        Bus(settings)
    file.chmod(0o644)
    with pytest.raises(SettingError, match="mode 644"):
        Bus(settings)


@pytest.mark.parametrize("indexed", [False, True])
def test_no_writer_can_take_lines_back_while_they_are_synced_to_be_signed(
    path: Path, signer: Signer, indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, call())
    if indexed:
        Index(path).refresh()
    held_off: list[bool] = []

    def sync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), path.stat()):
            with lock_path(path).open("rb") as lock:
                held_off.append(not taken(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB))

    monkeypatch.setattr(os, "fdatasync", sync)
    with Prover(path) as prover:
        assert (prover.checkpoint().checkpoint, held_off) == (None, [])
    with Prover(path, notary_of(path, signer)) as prover:
        assert prover.checkpoint().checkpoint is not None
    assert held_off == [True]


@pytest.mark.parametrize("indexed", [False, True])
def test_nothing_is_signed_that_the_disk_may_yet_lose(
    path: Path, signer: Signer, indexed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, call())
    if indexed:
        Index(path).refresh()
    failed: list[int] = []

    def fail(fd: int) -> None:
        failed.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with Prover(path) as prover:
        assert prover.checkpoint().checkpoint is None
    with pytest.raises(OperatorError, match="nothing is signed"):
        Prover(path, notary_of(path, signer))
    assert len(failed) == 1  # a second sync may not tell of it again
