"""The notary: no log gets a note that contradicts one which its key has signed before."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import threading
import types
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from bus import chain, checkpoints, doctor, merkle, notary
from bus.app import create_app
from bus.dispatch import Bus
from bus.errors import BusError, OperatorError, SettingError
from bus.ledger import Ledger
from bus.ledger_key import LedgerKey
from bus.notary import Notary
from bus.notes import Signer, new_key, read_checkpoint
from bus.proofs import Prover
from bus.records import draft_call
from bus.signed import Signed, SignedTrees
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, append, call, iter_hashes, write
from tests.support import add_overlay, settings_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus.ledger import Fsync, Receipt

SIGNER = Signer.read(new_key("example.org/aal"))
PATIENCE_S = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "provenance.jsonl"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / ".aal"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[bytes]]:
    """Of a file, what stands in it whenever it is synced from now on."""

    def watch(file: Path) -> list[bytes]:
        texts: list[bytes] = []
        fdatasync = os.fdatasync

        def noted(fd: int) -> None:
            fdatasync(fd)
            if file.exists() and os.path.samestat(os.fstat(fd), file.stat()):
                texts.append(file.read_bytes())

        monkeypatch.setattr(os, "fdatasync", noted)
        return texts

    return watch


def memory(state: Path, signer: Signer = SIGNER) -> Path:
    """The file in which it stands what a key has signed."""
    return SignedTrees(state, signer.vkey).path


def begun(path: Path, state: Path, *, fsync: Fsync = "batch", **options: Any) -> Ledger:
    """A process's ledger, open, with the key."""
    ledger = Ledger(path, fsync=fsync, environment=ENVIRONMENT, notary=Notary(SIGNER, state), **options)
    ledger.open()
    return ledger


def signed(path: Path, state: Path, count: int = 1, **options: Any) -> list[Receipt]:
    """What a process is answered that writes so many lines."""
    ledger = begun(path, state, **options)
    try:
        return [append(ledger, call(f"r{number}")) for number in range(count)]
    finally:
        ledger.close()


def remembered(state: Path, signer: Signer = SIGNER) -> Signed | None:
    return next(iter(Notary(signer, state).known()), None)


def are_signed(receipts: list[Receipt]) -> list[bool]:
    return [receipt.checkpoint is not None for receipt in receipts]


def notes_in(path: Path) -> list[str | None]:
    """Of the checkpoints' lines."""
    records = map(json.loads, path.read_bytes().splitlines())
    return [record["note"] for record in records if record["type"] == "checkpoint"]


def root_of_first(path: Path, size: int) -> bytes:
    return merkle.root_of(list(iter_hashes(path))[:size])


# --- What is remembered ---


def test_what_a_process_signed_last_is_remembered_when_it_ends(path: Path, state: Path) -> None:
    last = signed(path, state, 3)[-1]
    assert remembered(state) == Signed(last.tree_size, root_of_first(path, last.tree_size))
    assert memory(state).stat().st_mode & 0o777 == 0o600


def test_each_note_is_remembered_before_it_is_handed_out(path: Path, state: Path) -> None:
    ledger = begun(path, state)
    try:
        for _ in range(3):
            note = read_checkpoint(append(ledger, call()).checkpoint or "")
            assert remembered(state) == Signed(note.size, note.root)
    finally:
        ledger.close()


def test_the_first_note_of_a_process_is_synced_and_each_checkpoint_and_the_last(
    path: Path, state: Path, synced: Callable[[Path], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 4)
    texts = synced(memory(state))
    receipts = signed(path, state, 7)
    sizes = [json.loads(text)["signed"][0]["size"] for text in texts if b'"size"' in text]
    assert [receipt.tree_size for receipt in receipts] == [1, 2, 3, 4, 6, 7, 8]
    assert sorted(set(sizes)) == [1, 6, 8], "the first, that of the group with a checkpoint, and the last"


def test_a_process_that_is_killed_has_had_all_notes_remembered(path: Path, state: Path) -> None:
    """What another one reads meanwhile is what it would read after a kill."""
    ledger = begun(path, state)
    try:
        receipts = [append(ledger, call()) for _ in range(6)]
        fork = path.with_name("fork")
        fork.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
        fork.replace(path)
        write(path, *(call("forged") for _ in range(9)))
        with pytest.raises(OperatorError, match=f"has signed {receipts[-1].tree_size} lines"):
            Prover(path, Notary(SIGNER, state))
        assert are_signed(signed(path, state)) == [False]
    finally:
        ledger.close()


def test_each_checkpoint_is_remembered(path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 3)
    kept: list[int] = []
    put = checkpoints.Checkpoints._put

    def noted(self: checkpoints.Checkpoints, size: int, note: str) -> None:
        now = remembered(state)
        kept.append(0 if now is None else now.size - size)
        put(self, size, note)

    monkeypatch.setattr(checkpoints.Checkpoints, "_put", noted)
    signed(path, state, 7)
    assert len(kept) == 2
    assert min(kept) >= 0, "its note lay in the folder before it was remembered"


def test_lines_are_on_the_disk_before_they_are_remembered(
    path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    ledger = begun(path, state, fsync="always")
    try:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", fail)
            with pytest.raises(BusError):
                append(ledger, call())
        assert remembered(state) is None
    finally:
        ledger.close()


def test_without_syncs_no_answer_has_a_note_and_what_a_checkpoint_signs_is_synced(
    path: Path, state: Path, synced: Callable[[Path], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 3)
    texts = synced(path)
    written = chain.write_all
    seen: list[tuple[int, int, Signed | None]] = []

    def noted(fd: int, data: bytes) -> None:
        for line in [line for line in data.splitlines() if b'"type":"checkpoint"' in line]:
            note = read_checkpoint(json.loads(line)["note"])
            seen.append((note.size, texts[-1].count(b"\n"), remembered(state)))
        written(fd, data)

    monkeypatch.setattr(chain, "write_all", noted)
    receipts = signed(path, state, 8, fsync="never")
    assert are_signed(receipts) == [False] * 8
    notes = [read_checkpoint(note or "") for note in notes_in(path)]
    assert seen == [(note.size, note.size, Signed(note.size, note.root)) for note in notes] != [], (
        "before it is written"
    )
    assert remembered(state) == Signed(notes[-1].size, notes[-1].root)


def test_two_processes_on_one_ledger_only_move_what_is_remembered_forward(path: Path, state: Path) -> None:
    one, other = begun(path, state), begun(path, state)
    try:
        receipts = [append(ledger, call()) for _ in range(5) for ledger in (one, other)]
    finally:
        other.close()
        last = remembered(state)
        one.close()
    assert are_signed(receipts) == [True] * 10
    assert last is not None
    assert last.size == receipts[-1].tree_size
    assert remembered(state) == last
    assert one.unsigned is None is other.unsigned


# --- A log that is not the one that was signed ---


def lost(path: Path) -> None:
    shutil.rmtree(path.parent)


def put_back(path: Path) -> None:
    """From a backup of its first three lines, and others came behind them."""
    backup = path.with_name("backup")
    backup.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    backup.replace(path)
    write(path, *(call("other") for _ in range(9)))


def cut_off(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def written_anew(path: Path) -> None:
    lost(path)
    write(path, *(call("other") for _ in range(9)))


CHANGES = [lost, put_back, cut_off, written_anew]


@pytest.mark.parametrize("change", CHANGES)
def test_another_log_is_written_and_not_signed(
    path: Path,
    state: Path,
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    signed(path, state, 6)
    before = remembered(state)
    assert before is not None
    change(path)
    monkeypatch.setattr(checkpoints, "LINES", 2)
    with caplog.at_level(logging.ERROR):
        ledger = begun(path, state)
        receipts = [append(ledger, call()) for _ in range(4)]
        assert (ledger.healthy, are_signed(receipts)) == (True, [False] * 4)
        ledger.close()
    assert verify(path).ok
    assert notes_in(path)
    assert set(notes_in(path)) == {None}
    [told] = [entry.getMessage() for entry in caplog.records]
    assert f"has signed {before.size} lines with the root {before.root.hex()}" in told
    assert "aal provenance key new" in told
    assert remembered(state) == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_process_holds_what_it_finds_against_all_that_it_has_signed_itself(
    path: Path, state: Path, change: Callable[[Path], None]
) -> None:
    ledger = begun(path, state)
    try:
        receipts = [append(ledger, call()) for _ in range(6)]
        change(path)
        assert append(ledger, call("after")).checkpoint is None
        assert ledger.unsigned is not None
        assert f"has signed {receipts[-1].tree_size} lines" in ledger.unsigned
    finally:
        ledger.close()
    assert are_signed(signed(path, state)) == [False], "what the first process knew is not forgotten with it"


def test_a_tree_that_did_not_grow_out_of_what_was_signed_is_not_signed(path: Path, state: Path) -> None:
    """The signed lines are all there, and a checkpoint behind them lies about them."""
    receipts = signed(path, state, 2)
    tree = merkle.Frontier()
    for number in range(receipts[-1].tree_size):
        tree.append(bytes([number]) * 32)
    lie = checkpoints.Checkpoints(path).draft(tree, None)
    line, _ = lie.line(receipts[-1].tree_size + 1, list(iter_hashes(path))[-1].hex())
    with path.open("ab") as file:
        file.write(line)
    assert are_signed(signed(path, state)) == [False]


def test_the_log_that_was_signed_is_signed_again_once_it_is_back(path: Path, state: Path) -> None:
    signed(path, state, 3)
    kept = path.with_name("kept")
    path.rename(kept)
    ledger = begun(path, state)
    try:
        assert append(ledger, call()).checkpoint is None
        kept.rename(path)
        assert append(ledger, call()).checkpoint is not None
    finally:
        ledger.close()


def test_a_log_that_goes_on_in_new_segments_is_signed(path: Path, state: Path) -> None:
    assert are_signed(signed(path, state, 20, segment_bytes=2000)) == [True] * 20
    assert len(list(path.parent.glob("provenance-*"))) >= 3
    assert are_signed(signed(path, state, 2, segment_bytes=2000)) == [True] * 2


def test_one_key_does_not_sign_two_logs_at_once(path: Path, state: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "others" / "provenance.jsonl"
    write(elsewhere, call(), call())
    one, other = begun(path, state), begun(elsewhere, state)
    try:
        receipts = [append(ledger, call(name)) for _ in range(2) for name, ledger in (("a", one), ("b", other))]
        assert are_signed(receipts) == [True, False, True, False]
    finally:
        other.close()
        one.close()


def test_a_new_key_begins_with_nothing_signed_and_the_old_one_keeps_its_own(path: Path, state: Path) -> None:
    signed(path, state, 3)
    before = remembered(state)
    lost(path)
    later = Signer.read(new_key("example.org/aal"))
    ledger = Ledger(path, fsync="batch", environment=ENVIRONMENT, notary=Notary(later, state))
    ledger.open()
    assert append(ledger, call()).checkpoint is not None
    ledger.close()
    assert remembered(state, later) is not None
    assert remembered(state) == before
    assert are_signed(signed(path, state)) == [False]


# --- A memory that cannot be used ---


def test_what_cannot_be_remembered_is_not_signed_and_calls_go_on(
    path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.mkdir()
    memory(state).mkdir()
    monkeypatch.setattr(checkpoints, "LINES", 2)
    ledger = begun(path, state, fsync="always")
    try:
        assert append(ledger, call()).checkpoint is None
        assert (ledger.healthy, memory(state).name in str(ledger.unsigned)) == (True, True)
        memory(state).rmdir()
        assert [append(ledger, call()).checkpoint is not None for _ in range(3)][-1], "a checkpoint tries again"
        assert ledger.unsigned is None
    finally:
        ledger.close()


def test_a_first_note_that_cannot_be_held_against_anothers_is_not_handed_out(
    path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behind(self: Notary, *_: object) -> bool:
        self.is_held = False
        return False

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    ledger = begun(path, state)
    try:
        with monkeypatch.context() as broken:
            broken.setattr(Notary, "vouch", behind)
            broken.setattr(Notary, "hold", fail)
            receipt = append(ledger, call())
        assert (receipt.seq, receipt.checkpoint) == (1, None)
        assert append(ledger, call()).checkpoint is not None
    finally:
        ledger.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0" * 512,
        "[]",
        '{"signed": []}',
        '{"key": "of another", "signed": []}',
        '{"key": "KEY", "signed": {}}',
        '{"key": "KEY", "signed": [1]}',
        '{"key": "KEY", "signed": [{"size": 0, "root": "%s"}]}' % ("00" * 32),
        '{"key": "KEY", "signed": [{"size": true, "root": "%s"}]}' % ("00" * 32),
        '{"key": "KEY", "signed": [{"size": 1, "root": "00"}]}',
    ],
)
def test_a_memory_that_makes_no_sense_is_not_taken_for_an_empty_one(path: Path, state: Path, text: str) -> None:
    state.mkdir()
    memory(state).write_text(text.replace("KEY", sha256(SIGNER.vkey.encode()).hexdigest()))
    memory(state).chmod(0o600)
    with pytest.raises(SettingError, match=memory(state).name):
        Notary(SIGNER, state).known()
    assert are_signed(signed(path, state)) == [False]


# --- Notes that are asked for ---


def test_a_note_that_is_asked_for_is_remembered_before_it_is_handed_out(path: Path, state: Path) -> None:
    write(path, call())
    with Prover(path, Notary(SIGNER, state)) as prover:
        prover.checkpoint()
    write(path, call())
    with Prover(path, Notary(SIGNER, state)) as prover:
        now = prover.checkpoint()
        assert remembered(state) == Signed(now.tree_size, bytes.fromhex(now.root))
        assert prover.inclusion(1, 1).checkpoint is not None
    assert remembered(state) == Signed(now.tree_size, bytes.fromhex(now.root))
    cut_off(path)
    with pytest.raises(OperatorError, match="this is another log") as caught:
        Prover(path, Notary(SIGNER, state))
    assert (caught.value.code, caught.value.hint) == ("ERR_CONTRADICTED", notary.HINT)


def test_what_another_process_signed_of_another_log_meanwhile_is_not_contradicted(
    path: Path, state: Path, tmp_path: Path
) -> None:
    write(path, call(), call())
    with Prover(path, Notary(SIGNER, state)) as prover:
        signed(tmp_path / "others" / "provenance.jsonl", state)
        with pytest.raises(OperatorError, match="this is another log"):
            prover.checkpoint()


def test_a_server_asked_for_notes_goes_on_signing(path: Path, state: Path) -> None:
    ours = Notary(SIGNER, state)
    ledger = Ledger(path, fsync="batch", environment=ENVIRONMENT, notary=ours)
    ledger.open()
    try:
        for _ in range(3):
            assert append(ledger, call()).checkpoint is not None
            with Prover(path, ours) as prover:
                assert prover.checkpoint().checkpoint is not None
    finally:
        ledger.close()
    assert ledger.unsigned is None


def test_a_server_on_another_log_is_ready_and_says_that_it_does_not_sign(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    add_overlay(settings.overlays, "echo")
    LedgerKey(settings.state).create("example.org/aal")

    def asked() -> tuple[Any, ...]:
        with TestClient(create_app(bus=Bus(settings)), base_url="http://127.0.0.1") as client:
            answer = client.post("/invoke/echo", json={"phase": "OPEN", "data": {}}).json()
            metrics = client.get("/metrics").text
            statuses = [
                client.get(f"/provenance/{what}").status_code for what in ("checkpoint", "1/proof", "consistency?old=1")
            ]
            told = client.get("/provenance/checkpoint").json()
            [value] = [line[-3:] for line in metrics.splitlines() if line.startswith("aal_ledger_refuses_to_sign ")]
            is_signed = answer["provenance"]["checkpoint"] is not None
            return answer["ok"], is_signed, client.get("/ready").status_code, value, statuses, told.get("code")

    assert asked() == (True, True, 200, "0.0", [200] * 3, None)
    lost(settings.ledger)
    assert asked() == (True, False, 200, "1.0", [409] * 3, "ERR_CONTRADICTED")


def test_the_doctor_finds_another_log_than_the_one_that_was_signed(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    assert list(doctor.signing(settings)) == []
    signer = LedgerKey(settings.state).create("example.org/aal")
    [finding] = doctor.signing(settings)
    assert (finding.mark, finding.found) == ("ok", "nothing signed yet")
    write(settings.ledger, call(), call())
    with Prover(settings.ledger, Notary(signer, settings.state)) as prover:
        prover.checkpoint()
    write(settings.ledger, call())
    [finding] = doctor.signing(settings)
    assert finding.mark == "ok"
    written_anew(settings.ledger)
    [finding] = doctor.signing(settings)
    assert (finding.mark, finding.hint) == ("fail", notary.HINT)
    assert "has signed" in finding.found
    memory(settings.state, signer).write_text("[]")
    [finding] = doctor.signing(settings)
    assert (finding.mark, memory(settings.state, signer).name in finding.found) == ("fail", True)


# --- Several processes that sign, and a log that somebody changes between them ---


class Names:
    """Two logs of which now the one and now the other has the name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._now, self._other = 0, path.with_name("other")

    def fork(self, size: int) -> None:
        """The other log has the first `size` lines of this one."""
        self._other.write_bytes(b"".join(self.path.read_bytes().splitlines(keepends=True)[:size]))

    def take(self, which: int) -> None:
        """Have log 0 or 1 bear the name."""
        if which != self._now:
            hidden = self.path.with_name("hidden")
            self.path.rename(hidden)
            self._other.rename(self.path)
            hidden.rename(self._other)
            self._now = which


def test_two_processes_of_which_each_sees_a_log_of_its_own_sign_only_one_of_them(path: Path, state: Path) -> None:
    """Who can write the folder gives the name to the one log whenever the one process looks, and so on."""
    names = Names(path)
    one = begun(path, state)
    append(one, call())
    names.fork(1)
    names.take(1)
    other = begun(path, state)
    try:
        receipts = []
        for number in range(6):
            names.take(number % 2)
            receipts.append(append((one, other)[number % 2], call(f"of {number}")))
    finally:
        names.take(1)
        other.close()
        names.take(0)
        one.close()
    assert are_signed(receipts) == [True, False] * 3
    assert other.unsigned is not None
    assert one.unsigned is None
    notes = [read_checkpoint(receipt.checkpoint) for receipt in receipts if receipt.checkpoint]
    assert [note.root for note in notes] == [root_of_first(path, note.size) for note in notes]


def test_a_proof_of_a_log_that_was_swapped_before_it_is_signed_is_refused(path: Path, state: Path) -> None:
    names = Names(path)
    ledger = begun(path, state)
    try:
        append(ledger, call())
        names.fork(1)
        names.take(1)
        write(path, call("forged"))
        with Prover(path, Notary(SIGNER, state)) as prover:
            names.take(0)
            last = [append(ledger, call()) for _ in range(3)][-1]
            names.take(1)
            with pytest.raises(OperatorError, match=f"has signed {last.tree_size} lines"):
                prover.checkpoint()
        names.take(0)
        assert append(ledger, call()).checkpoint is not None
    finally:
        ledger.close()
    assert ledger.unsigned is None


def test_a_proof_of_a_log_that_has_grown_meanwhile_is_signed(path: Path, state: Path) -> None:
    ledger = begun(path, state)
    try:
        append(ledger, call())
        with Prover(path, Notary(SIGNER, state)) as prover:
            last = [append(ledger, call()) for _ in range(3)][-1]
            note = read_checkpoint(prover.checkpoint().checkpoint or "")
        assert (note.size, note.root) == (1, root_of_first(path, 1))
        assert remembered(state) == Signed(last.tree_size, root_of_first(path, last.tree_size))
        assert append(ledger, call()).checkpoint is not None
    finally:
        ledger.close()


def test_a_line_that_is_damaged_on_the_disk_is_not_signed_by_a_command_beside_the_server(
    path: Path, state: Path
) -> None:
    ledger = begun(path, state)
    try:
        for _ in range(5):
            append(ledger, call())
        good = path.read_bytes()
        lines = good.splitlines(keepends=True)
        digest = next(iter(iter_hashes(path))).hex().encode()
        assert lines[0].count(digest) == 1
        lines[0] = lines[0].replace(digest, digest[::-1])
        with path.open("r+b") as file:
            file.write(b"".join(lines))
        with pytest.raises(OperatorError, match="line 1: its bytes do not have the hash"):
            Prover(path, Notary(SIGNER, state))
        with path.open("r+b") as file:
            file.write(good)
        assert append(ledger, call()).checkpoint is not None
    finally:
        ledger.close()
    assert ledger.unsigned is None
    assert are_signed(signed(path, state)) == [True]


def test_processes_that_take_turns_know_each_others_notes_without_reading_the_log_back(
    path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    hold = Notary.hold

    def noted(self: Notary, size: int, root_at: Callable[[int], bytes | None]) -> None:
        held.append(size)
        hold(self, size, root_at)

    one, other = begun(path, state), begun(path, state)
    try:
        for ledger in (one, other):
            append(ledger, call())
        monkeypatch.setattr(Notary, "hold", noted)
        receipts = [append(ledger, call()) for _ in range(10) for ledger in (one, other)]
        assert are_signed(receipts) == [True] * 20
        assert held == []
    finally:
        other.close()
        one.close()


def test_a_note_that_is_handed_out_after_one_of_lines_behind_it_is_in_the_same_history(path: Path, state: Path) -> None:
    """One process writes first, and the other is first to have synced."""
    chains = []
    for _ in range(2):
        ours = Notary(SIGNER, state)
        chains.append(chain.Chain(path, "batch", ENVIRONMENT, checkpoints.Checkpoints(path, ours)))
        chains[-1].append([draft_call(call())])
    one, other = chains
    with one.locked():
        group = one.write([draft_call(call("first"))])
    [later] = other.append([draft_call(call("behind"))])
    one.sync(group)
    one.commit(group)
    assert group.is_told
    [receipt] = one.vouch(group)
    assert remembered(state) == Signed(later.tree_size, root_of_first(path, later.tree_size))
    note = read_checkpoint(receipt.checkpoint or "")
    assert (note.size, note.root) == (3, root_of_first(path, 3))
    for each in chains:
        each.close()


async def test_who_waits_for_a_note_while_the_ledger_is_closed_is_answered(
    path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note has to be looked at by the thread, which has been told by then to end."""
    ledger = begun(path, state)
    assert (await ledger.submit(call())).checkpoint is not None
    told_to_end = threading.Event()
    closing = threading.Thread(target=ledger.close)
    put = ledger._steps.put

    def noted(step: Callable[[], None] | None) -> None:
        put(step)
        if step is None:
            told_to_end.set()

    def not_at_once(*_: object) -> bool:
        closing.start()
        return not told_to_end.wait(PATIENCE_S)

    monkeypatch.setattr(ledger, "_steps", types.SimpleNamespace(put=noted, get=ledger._steps.get))
    monkeypatch.setattr(Notary, "hand_out", not_at_once)
    async with asyncio.timeout(PATIENCE_S):
        assert (await ledger.submit(call())).checkpoint is not None
    await asyncio.to_thread(closing.join)


# --- What was signed of two histories stays ---


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_restart_on_another_log_that_is_not_signed_either_and_the_right_one_is(
    path: Path, state: Path, change: Callable[[Path], None]
) -> None:
    """Also where the change came under a process that lived."""
    ledger = begun(path, state)
    try:
        for _ in range(6):
            append(ledger, call())
        shutil.copytree(path.parent, state / "kept")
        change(path)
        assert append(ledger, call("elsewhere")).checkpoint is None
    finally:
        ledger.close()
    for _ in range(2):
        assert are_signed(signed(path, state, 3)) == [False] * 3
        with pytest.raises(OperatorError, match="this is another log"):
            Prover(path, Notary(SIGNER, state))
    shutil.rmtree(path.parent)
    shutil.copytree(state / "kept", path.parent)
    assert are_signed(signed(path, state, 2)) == [True] * 2


def test_a_memory_that_is_replaced_under_a_process_keeps_both_and_no_log_is_right(path: Path, state: Path) -> None:
    """As where the state folder of another log is put in place of this one's: two histories are signed for certain."""
    names = Names(path)
    ledger = begun(path, state)
    names.fork(0)
    last = [append(ledger, call()) for _ in range(3)][-1]
    ours = Signed(last.tree_size, root_of_first(path, last.tree_size))
    try:
        memory(state).rename(state / "ours")
        names.take(1)
        theirs = signed(path, state, 5)[-1]
        assert append(ledger, call()).checkpoint is None
    finally:
        ledger.close()
    both = [ours, Signed(theirs.tree_size, root_of_first(path, theirs.tree_size))]
    for which in (0, 1):
        names.take(which)
        assert are_signed(signed(path, state)) == [False]
        assert Notary(SIGNER, state).known() == both


@pytest.mark.parametrize("at_end", [True, False])
def test_a_memory_that_is_removed_under_a_process_is_made_again(path: Path, state: Path, at_end: bool) -> None:
    ledger = begun(path, state)
    try:
        last = [append(ledger, call()) for _ in range(3)][-1]
        memory(state).unlink()
        if not at_end:
            assert ledger._notary is not None
            ledger._notary.remember()
            last = append(ledger, call())
            assert last.checkpoint is not None
            assert remembered(state) == Signed(last.tree_size, root_of_first(path, last.tree_size))
    finally:
        ledger.close()
    assert remembered(state) == Signed(last.tree_size, root_of_first(path, last.tree_size))
    written_anew(path)
    assert are_signed(signed(path, state)) == [False]
