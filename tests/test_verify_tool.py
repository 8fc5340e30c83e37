"""TOOLS/verify.py, the independent witness: run as an auditor runs it, without the bus and without any package."""

from __future__ import annotations

import ast
import contextlib
import gzip
import importlib.util
import json
import os
import pty
import subprocess
import sys
import zlib
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from bus import checkpoints
from bus.canonical import canonical
from bus.dispatch import Bus
from bus.ledger import Ledger
from bus.ledger_key import LedgerKey
from bus.merkle import Frontier
from bus.notary import Notary
from bus.notes import Checkpoint, Signer, Verifier, new_key
from bus.proofs import Prover
from bus.records import GENESIS, draft_record
from bus.segments import compress, rotate
from bus.verification import verify
from tests.ledgers import ENVIRONMENT, HASH, append, call, write
from tests.support import REPO, a_call, add_overlay, settings_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import ModuleType

TOOL = REPO / "TOOLS" / "verify.py"
NAME = "example.com/ledger"
SIGNER = Signer.read(new_key(NAME))
OTHER = Signer.read(new_key(NAME))


@dataclass(frozen=True)
class Ran:
    status: int
    said: str
    complained: str

    @property
    def found(self) -> Any:
        return json.loads(self.said)


def run(*arguments: object, packages: bool = False, given: str | None = None) -> Ran:
    """Without site-packages, but where there are signatures to check."""
    command = [sys.executable, "-I", *([] if packages else ["-S"]), str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd="/")
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The same in this process, for tests that ask it often."""
    spec = importlib.util.spec_from_file_location("verify_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


# --- Logs, made by hand ---


def log_of(count: int, every: int = 4, signer: Signer | None = None, **members: Any) -> list[bytes]:
    """Lines of calls, each `every`th a checkpoint."""
    tree, prev, lines = Frontier(), GENESIS, []
    for seq in range(1, count + 1):
        record = checkpoint_of(tree, signer) if seq % every == 0 else call(f"r{seq}", **members)
        line, digest = draft_record(record).line(seq, prev)
        lines.append(line)
        tree.append(digest)
        prev = digest.hex()
    return lines


def checkpoint_of(tree: Frontier, signer: Signer | None) -> dict[str, Any]:
    return {
        "type": "checkpoint",
        "timestamp_ms": 1,
        "size": tree.size,
        "root": tree.root().hex(),
        "nodes": [node.hex() for node in tree.nodes],
        "note": signer and signer.checkpoint(tree.size, tree.root()),
    }


def put(logs: Path, lines: Sequence[bytes], name: str = "provenance.jsonl") -> Path:
    path = logs / name
    text = b"".join(lines)
    path.write_bytes(text if path.suffix != ".gz" else packed(lines))
    return path


def packed(lines: Sequence[bytes]) -> bytes:
    """As the bus packs a closed segment: several gzip members, each of whole lines."""
    return b"".join(gzip.compress(b"".join(lines[start : start + 2])) for start in range(0, len(lines), 2))


def put_segments(logs: Path, lines: Sequence[bytes]) -> None:
    put(logs, lines[:5], "provenance-000000000001.jsonl.gz")
    put(logs, lines[5:9], "provenance-000000000006.jsonl")
    put(logs, lines[9:])


def sealed(line: bytes, **changes: Any) -> bytes:
    """A line with other members and the hash of them."""
    return held(canonical({name: member for name, member in (json.loads(line) | changes).items() if name != "hash"}))


def held(text: bytes) -> bytes:
    """A line of this JSON, with the hash of it at the front."""
    return b'{"hash":"%b",%b\n' % (sha256(text).hexdigest().encode(), text[1:])


def hash_of(result: Any) -> str:
    """What answer and line have of a result."""
    return sha256(canonical(result)).hexdigest()


def root_at(lines: Sequence[bytes], size: int) -> bytes:
    tree = Frontier()
    for line in lines[:size]:
        tree.append(bytes.fromhex(json.loads(line)["hash"]))
    return tree.root()


def note_at(lines: Sequence[bytes], size: int, signer: Signer = SIGNER) -> str:
    return signer.checkpoint(size, root_at(lines, size))


# --- The tool itself ---


def test_it_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse(TOOL.read_text())
    nodes = list(ast.walk(tree))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in named} - sys.stdlib_module_names == {"cryptography"}
    assert not any("cryptography" in ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom))


@pytest.mark.parametrize("arguments", [[], ["log"], ["log", "--help"], ["growth", "a", "b"], ["receipt", "a"]])
def test_it_says_how_it_is_used(arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.status == (0 if "--help" in arguments else 2)
    assert "usage: verify.py" in ran.said + ran.complained


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5", "\u0661"])
def test_what_is_no_line_number_is_refused(logs: Path, number: str) -> None:
    ran = run("log", logs, f"--from={number}")
    assert ran.status == 2
    assert "is not the number of a line" in ran.complained


# --- A log ---


def test_a_log_that_the_bus_wrote_is_right(logs: Path) -> None:
    receipts = write(logs / "provenance.jsonl", *(call(f"r{number}", payload={"hash": HASH}) for number in range(5)))
    ran = run("log", logs, "--json")
    assert ran.status == 0
    lines = (logs / "provenance.jsonl").read_bytes().splitlines(keepends=True)
    assert ran.found == {
        "ok": True,
        "first": 1,
        "last": 5,
        "head_hash": receipts[-1].hash,
        "tree_size": 5,
        "root": root_at(lines, 5).hex(),
        "checkpoints": 0,
        "signed": 0,
        "signed_size": None,
        "first_bad": None,
        "file": None,
        "fault": None,
        "reason": None,
    }


def test_checkpoints_that_the_bus_wrote_and_signed_are_right(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 3)
    path = logs / "provenance.jsonl"
    ledger = Ledger(path, fsync="batch", environment=ENVIRONMENT, notary=Notary(SIGNER, logs.parent / ".aal"))
    ledger.open()
    receipts = [append(ledger, call(f"r{number}")) for number in range(10)]
    ledger.close()
    ran = run("log", logs, "--key", SIGNER.vkey, "--json", packages=True)
    assert ran.status == 0
    assert (ran.found["checkpoints"], ran.found["signed"], ran.found["signed_size"]) == (3, 3, 11)
    for number, receipt in enumerate(receipts):
        answer = logs / f"answer-{number}.json"
        answer.write_text(json.dumps({"ok": True, "provenance": receipt._asdict()}))
        assert run("receipt", answer, "--log", logs, "--key", SIGNER.vkey, packages=True).status == 0


def test_an_empty_log_is_right_and_a_missing_one_cannot_be_checked(logs: Path) -> None:
    assert run("log", logs).status == 2
    assert run("log", logs / "provenance.jsonl").status == 2
    put(logs, [])
    ran = run("log", logs)
    assert (ran.status, ran.said.splitlines()[0]) == (0, "no line, and 0 checkpoints among them")


def test_a_file_alone_is_checked_as_its_folder_is(logs: Path) -> None:
    path = put(logs, log_of(9))
    ran = run("log", path)
    assert ran.status == 0
    assert "lines 1 to 9 are right, and 2 checkpoints" in ran.said
    assert ran.said == run("log", logs).said


def _changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[4].replace(b'"ok":true', b'"ok":null'), *lines[5:]]


def _without_line_5(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], *lines[5:]]


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[5], lines[4], *lines[6:]]


def _twice(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[3], *lines[4:]]


def _torn(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[4][:-1]]


def _cut_in_half(lines: list[bytes]) -> list[bytes]:
    return [*lines[:4], lines[4][:60]]


def _replaced(line: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [*lines[:4], line, *lines[5:]]


def _sealed(index: int, **changes: Any) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [*lines[:index], sealed(lines[index], **changes), *lines[index + 1 :]]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_changed, "hash"),
        (_replaced(b'{"seq":5}\n'), "hash"),
        (_replaced(b'{"hash":"","seq":5}\n'), "hash"),
        (_without_line_5, "seq"),
        (_swapped, "seq"),
        (_twice, "seq"),
        (_sealed(4, seq=5.5), "seq"),
        (_sealed(4, seq="5"), "seq"),
        (_sealed(4, seq=None), "seq"),
        (_torn, "torn"),
        (_cut_in_half, "torn"),
        (_replaced(b"\n"), "json"),
        (_replaced(b"\x00" * 80 + b"\n"), "json"),
        (_replaced(b"[]\n"), "json"),
        (_replaced(b"5\n"), "json"),
        (_replaced(b"\xff\n"), "json"),
        (_replaced(b"[" * 100_000 + b"\n"), "json"),
        (_replaced(held(b'{"seq":5,"a":NaN}')), "json"),
        (_replaced(held(b'{"seq":5} {}')), "json"),
        (_replaced(held(b'{"seq":5} ')), "json"),
        (_replaced(b" " + held(b'{"seq":5}')), "json"),
        (_sealed(4, prev=HASH), "chain"),
        (_sealed(4, prev=None), "chain"),
    ],
)
def test_the_first_line_that_is_wrong_is_told_and_what_is_wrong_with_it(
    logs: Path, damage: Callable[[list[bytes]], list[bytes]], fault: str
) -> None:
    lines = log_of(9)
    path = put(logs, damage(lines))
    ran = run("log", logs, "--json")
    found = ran.found
    assert (ran.status, found["ok"], found["first_bad"], found["fault"]) == (1, False, 5, fault)
    assert (found["last"], found["file"]) == (4, str(path))
    assert (found["head_hash"], found["root"]) == (json.loads(lines[3])["hash"], root_at(lines, 4).hex())
    said = run("log", logs).said
    assert f"line 5 ({path}) is wrong: {fault}: " in said
    assert "lines 1 to 4 are right" in said


def test_a_line_taken_from_another_log_breaks_the_chain(logs: Path) -> None:
    lines, other = log_of(9), log_of(9, version="other")
    put(logs, [*lines[:4], *other[4:]])
    assert run("log", logs, "--json").found["fault"] == "chain"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":1,"b":2}',
        b'{"b":2,"c":{"x":[{"a":1,"a":1}]}}',
        b'{"a" :1,"a":2,"b":"\\":"}',
        b'{"a":1,"\\u0061":2}',
        b'{"a"\t:1,"a":2,"b":"\\":"}',
        b'{"a":"x:y","a":"x","b":"c"}',
    ],
)
def test_a_key_that_stands_twice_is_found_however_it_is_written(logs: Path, text: bytes) -> None:
    lines = log_of(4, every=9)
    more = b'{"prev":"%b","seq":5,"type":"x",%b' % (json.loads(lines[3])["hash"].encode(), text[1:])
    put(logs, [*lines, held(more)])
    found = run("log", logs, "--json").found
    assert (found["first_bad"], found["fault"]) == (5, "json")
    assert "twice" in found["reason"]


@pytest.mark.parametrize("text", ['":"', '"a":1', " : ", "a\tb", "\\", '{"a" :', "\u2028", "é", "\U0001f600"])
def test_text_that_looks_like_json_is_text(logs: Path, text: str) -> None:
    put(logs, log_of(6, payload={text: [text, {"hash": HASH, "seq": 1, "prev": HASH}]}, error=text))
    assert run("log", logs).status == 0


def test_a_bit_flipped_at_any_byte_of_a_small_log_is_found(logs: Path, tool: ModuleType) -> None:
    path = put(logs, log_of(5, every=3, signer=SIGNER))
    whole = path.read_bytes()
    for index in range(len(whole)):
        changed = bytearray(whole)
        changed[index] ^= 1 << index % 8
        path.write_bytes(changed)
        found = tool.Log(path, tool.Evidence()).check()
        assert found.first_bad == whole.count(b"\n", 0, index) + 1, (index, found)


def test_a_log_cut_off_at_any_byte_is_torn_or_ends_with_a_line(logs: Path, tool: ModuleType) -> None:
    lines = log_of(5, every=3)
    whole = b"".join(lines)
    note = logs / "note"
    note.write_text(note_at(lines, 5))
    against = tool.read_note(note.read_text(), [])
    for end in range(len(whole)):
        path = put(logs, [whole[:end]])
        found = tool.Log(path, tool.Evidence()).check()
        assert found.fault == (None if end == 0 or whole[end - 1 : end] == b"\n" else "torn")
        evidence = tool.Evidence()
        evidence.root(against.size, against.root)
        assert tool.Log(path, evidence).check().fault in {"torn", "tree"}


# --- Checkpoints in a log ---


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"root": HASH}, "tree"),
        ({"root": None}, "tree"),
        ({"size": 8}, "tree"),
        ({"size": True}, "tree"),
        ({"size": "7"}, "tree"),
        ({"nodes": [HASH, HASH, HASH]}, "tree"),
        ({"nodes": []}, "tree"),
        ({"nodes": None}, "tree"),
        ({"nodes": ["x", "y", "z"]}, "tree"),
        ({"note": 5}, "signature"),
        ({"note": "text"}, "signature"),
        ({"note": SIGNER.checkpoint(7, b"x" * 32)}, "signature"),
        ({"note": SIGNER.checkpoint(6, b"x" * 32)}, "signature"),
    ],
)
def test_a_checkpoint_that_is_not_of_the_lines_before_it_is_wrong(
    logs: Path, changes: dict[str, Any], fault: str
) -> None:
    put(logs, _sealed(7, **changes)(log_of(9)))
    found = run("log", logs, "--json").found
    assert (found["first_bad"], found["fault"], found["checkpoints"]) == (8, fault, 1)


def test_nodes_that_make_the_root_and_are_of_another_tree_are_wrong(logs: Path) -> None:
    """Their hashes swapped and the root made of them: it still is not what the lines make."""
    lines = log_of(8)
    record = json.loads(lines[7])
    tree = Frontier(7, [bytes.fromhex(node) for node in reversed(record["nodes"])])
    put(logs, _sealed(7, nodes=[node.hex() for node in tree.nodes], root=tree.root().hex())(lines))
    found = run("log", logs, "--json").found
    assert (found["first_bad"], found["fault"]) == (8, "tree")


def test_a_history_written_anew_fits_itself_and_not_what_was_kept(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10, signer=SIGNER)
    kept = tmp_path / "kept"
    kept.write_text(note_at(lines, 7))
    put(logs, lines)
    assert run("log", logs, "--against", kept).status == 0
    put(logs, log_of(10, version="another"))
    assert run("log", logs).status == 0
    ran = run("log", logs, "--against", kept, "--json")
    assert (ran.status, ran.found["fault"], ran.found["first_bad"]) == (1, "tree", None)
    assert "the root of the first 7 lines is" in ran.found["reason"]
    ran = run("log", logs, "--key", SIGNER.vkey, "--json", packages=True)
    assert (ran.status, ran.found["fault"]) == (1, "signature")


def test_a_log_that_was_cut_off_is_shorter_than_what_was_kept(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10)
    kept = tmp_path / "kept"
    kept.write_text(note_at(lines, 9))
    put(logs, lines[:8])
    ran = run("log", logs, "--against", kept)
    assert ran.status == 1
    assert "the log ends with line 8, and once it had 9 lines" in ran.said


def test_signatures_are_checked_with_the_key_that_is_given(logs: Path, tmp_path: Path) -> None:
    put(logs, log_of(10, signer=SIGNER))
    key = tmp_path / "key"
    key.write_text(SIGNER.vkey + "\n")
    for vkey in (SIGNER.vkey, key):
        found = run("log", logs, "--key", vkey, "--json", packages=True).found
        assert (found["ok"], found["checkpoints"], found["signed"], found["signed_size"]) == (True, 2, 2, 7)
    assert "the first 7 lines are signed for" in run("log", logs, "--key", key, packages=True).said
    found = run("log", logs, "--key", OTHER.vkey, "--json", packages=True).found
    assert (found["fault"], found["first_bad"]) == ("signature", None)
    both = run("log", logs, "--key", OTHER.vkey, "--key", SIGNER.vkey, "--json", packages=True).found
    assert (both["ok"], both["signed"]) == (True, 2)


def test_a_signature_that_the_key_did_not_make_is_wrong(logs: Path) -> None:
    lines = log_of(10, signer=SIGNER)
    note = note_at(lines, 7)
    place = note.rindex(" ") + 12
    forged = note[:place] + ("A" if note[place] != "A" else "B") + note[place + 1 :]
    put(logs, _sealed(7, note=forged)(lines))
    assert run("log", logs, "--to", 8).status == 0  # nobody was asked
    found = run("log", logs, "--key", SIGNER.vkey, "--json", packages=True).found
    assert (found["first_bad"], found["fault"], found["signed"]) == (8, "signature", 1)


def test_a_line_of_a_note_whose_name_has_a_line_separator_is_no_signature(logs: Path) -> None:
    lines = log_of(8)
    note = note_at(lines, 7).replace("\N{EM DASH} example", "\N{EM DASH} ex\u2028ample")
    put(logs, _sealed(7, note=note)(lines))
    found = run("log", logs, "--json").found
    assert (found["first_bad"], found["fault"]) == (8, "signature")


def test_the_bus_and_the_tool_agree_on_every_note(logs: Path, tool: ModuleType) -> None:
    """Of a known key or another, right or wrong, of this log or another; with one key, both, or none."""
    lines = log_of(8, type="other")
    text, wrong = Checkpoint(NAME, 7, root_at(lines, 7)).text(), Checkpoint(NAME, 7, b"x" * 32).text()
    ours, others = (signer.sign(text) for signer in (SIGNER, OTHER))
    foreign = SIGNER.sign(Checkpoint("example.com/other", 7, root_at(lines, 7)).text())
    forged = f"{text}\n{SIGNER.sign(wrong).rpartition(chr(10) * 2)[2]}"
    both = ours + others.rpartition("\n\n")[2]
    notes: list[Any] = [None, 5, "text", ours, others, both, foreign, forged, SIGNER.sign(wrong), forged + both[-9:]]
    verdicts = set()
    for note in notes:
        path = put(logs, _sealed(7, note=note)(lines))
        for signers in ([], [SIGNER], [OTHER], [SIGNER, OTHER]):
            told = tool.Log(path, tool.Evidence([tool.read_key(signer.vkey) for signer in signers])).check()
            report = verify(path, verifiers=[Verifier.read(signer.vkey) for signer in signers])
            verdict = (told.first_bad, told.fault, told.signed, told.signed_size)
            assert (report.first_bad, report.fault, report.signed, report.signed_size) == verdict, (note, report)
            assert report.checkpoints == told.checkpoints
            verdicts.add(verdict)
    assert verdicts == {(None, None, 0, None), (None, None, 1, 7), (8, "signature", 0, None)}


def test_a_checkpoint_of_another_log_is_not_one_of_this(logs: Path) -> None:
    lines = log_of(8)
    note = SIGNER.sign(Checkpoint("example.com/other", 7, root_at(lines, 7)).text())
    put(logs, _sealed(7, note=note)(lines))
    found = run("log", logs, "--key", SIGNER.vkey, "--json", packages=True).found
    assert (found["first_bad"], found["fault"]) == (8, "signature")


def test_a_key_needs_a_package_and_says_which(logs: Path) -> None:
    put(logs, log_of(10, signer=SIGNER))
    ran = run("log", logs, "--key", SIGNER.vkey)
    assert ran.status == 2
    assert "pip install cryptography" in ran.complained


@pytest.mark.parametrize(
    "key",
    ["x", SIGNER.vkey[:-1], SIGNER.vkey.replace("example", "Example"), SIGNER.vkey.replace("+A", "+B", 1)],
    ids=["no key", "short", "of another name", "of another kind"],
)
def test_what_is_no_key_cannot_be_used(logs: Path, key: str) -> None:
    put(logs, log_of(3))
    ran = run("log", logs, "--key", key, "--json")
    assert (ran.status, ran.found["fault"]) == (2, "unusable")


# --- Parts of a log ---


def test_a_part_is_checked_as_far_as_it_tells(logs: Path) -> None:
    lines = log_of(12)
    put(logs, lines)
    found = run("log", logs, "--from", 6, "--to", 11, "--json").found
    assert (found["ok"], found["first"], found["last"], found["checkpoints"]) == (True, 6, 11, 1)
    assert (found["tree_size"], found["root"]) == (11, root_at(lines, 11).hex())
    found = run("log", logs, "--from", 9, "--to", 11, "--json").found
    assert (found["ok"], found["tree_size"], found["root"]) == (True, None, None)


def test_what_lies_outside_of_the_part_is_not_looked_at(logs: Path) -> None:
    put(logs, [b"garbage\n", *log_of(12)[1:10], b"garbage\n"])
    assert run("log", logs, "--from", 2, "--to", 10).status == 0
    assert run("log", logs, "--from", 2, "--json").found["first_bad"] == 11
    assert run("log", logs, "--to", 10, "--json").found["first_bad"] == 1


def test_a_part_that_is_not_there_is_told(logs: Path) -> None:
    put(logs, log_of(5))
    ran = run("log", logs, "--to", 6)
    assert ran.status == 1
    assert "the log ends with line 5, and there was to be a line 6" in ran.said
    assert run("log", logs, "--from", 6).status == 2


def test_a_part_is_held_against_a_checkpoint_where_it_tells_that_tree(logs: Path, tmp_path: Path) -> None:
    lines = log_of(12)
    put(logs, lines)
    kept = tmp_path / "kept"
    kept.write_text(note_at(lines, 11))
    assert run("log", logs, "--from", 6, "--against", kept).status == 0
    assert run("log", logs, "--from", 9, "--to", 11, "--against", kept).status == 2
    assert run("log", logs, "--to", 10, "--against", kept).status == 2
    kept.write_text(SIGNER.checkpoint(11, b"x" * 32))
    assert run("log", logs, "--from", 6, "--against", kept, "--json").found["fault"] == "tree"


# --- Segments ---


def test_segments_are_one_log(logs: Path) -> None:
    lines = log_of(12)
    put_segments(logs, lines)
    found = run("log", logs, "--json").found
    assert (found["ok"], found["last"], found["checkpoints"]) == (True, 12, 3)
    assert found["root"] == root_at(lines, 12).hex()


def test_segments_that_the_bus_closed_and_compressed_are_one_log(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LINES", 5)
    path = logs / "provenance.jsonl"
    ledger = Ledger(
        path, fsync="batch", environment=ENVIRONMENT, notary=Notary(SIGNER, logs.parent / ".aal"), segment_bytes=3000
    )
    ledger.open()
    receipts = [append(ledger, call(f"r{number}")) for number in range(30)]
    ledger.close()
    plain = run("log", logs, "--key", SIGNER.vkey, "--json", packages=True).found
    assert compress(path) >= 3
    assert len(list(logs.glob("*.jsonl.gz"))) >= 3
    found = run("log", logs, "--key", SIGNER.vkey, "--json", packages=True).found
    assert found == plain
    assert (found["ok"], found["last"]) == (True, receipts[-1].tree_size)
    assert found["signed"] >= 5
    middle = receipts[len(receipts) // 2]
    part = run("log", logs, "--from", middle.seq, "--key", SIGNER.vkey, "--json", packages=True).found
    assert (part["ok"], part["first"], part["root"]) == (True, middle.seq, found["root"])


def test_a_bit_flipped_in_any_segment_is_found(logs: Path, tool: ModuleType) -> None:
    put_segments(logs, log_of(12))
    for path in sorted(logs.iterdir()):
        whole = path.read_bytes()
        for index in range(len(whole)):
            changed = bytearray(whole)
            changed[index] ^= 1 << index % 8
            path.write_bytes(changed)
            found = tool.Log(logs, tool.Evidence()).check()
            is_same = path.suffix == ".gz" and unpacks_to(gzip.decompress(whole), bytes(changed))
            assert (found.fault is None) == is_same, (path, index, found)
        path.write_bytes(whole)


def unpacks_to(text: bytes, packed_: bytes) -> bool:
    """A time in the head of a gzip member, or a bit that nobody reads, makes no difference."""
    try:
        return gzip.decompress(packed_) == text
    except (OSError, EOFError, zlib.error):
        return False


@pytest.mark.parametrize(
    ("damage", "first_bad", "fault"),
    [
        (lambda logs, _: (logs / "provenance-000000000006.jsonl").unlink(), 6, "seq"),
        (lambda logs, _: (logs / "provenance-000000000001.jsonl.gz").unlink(), 1, "seq"),
        (lambda logs, lines: put(logs, lines[5:8], "provenance-000000000006.jsonl"), 9, "seq"),
        (lambda logs, lines: put(logs, lines[:4], "provenance-000000000001.jsonl.gz"), 5, "seq"),
        (lambda logs, lines: put(logs, [*lines[5:8], lines[8][:-1]], "provenance-000000000006.jsonl"), 9, "torn"),
        (lambda logs, lines: put(logs, [*lines[9:11], lines[11][:-1]]), 12, "torn"),
        (lambda logs, lines: cut(put(logs, lines[:5], "provenance-000000000001.jsonl.gz")), 5, "gzip"),
        (lambda logs, _: (logs / "provenance-000000000001.jsonl.gz").write_bytes(b"no gzip"), 1, "gzip"),
    ],
)
def test_what_is_wrong_with_segments_is_told(
    logs: Path, damage: Callable[[Path, list[bytes]], Any], first_bad: int, fault: str
) -> None:
    lines = log_of(12)
    put_segments(logs, lines)
    damage(logs, lines)
    ran = run("log", logs, "--json")
    assert (ran.status, ran.found["first_bad"], ran.found["fault"]) == (1, first_bad, fault)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_of_a_segment_that_is_just_being_packed_the_plain_one_is_read(logs: Path) -> None:
    lines = log_of(12)
    put_segments(logs, lines)
    (logs / "provenance-000000000006.jsonl.gz").write_bytes(packed(lines[5:7]))
    assert run("log", logs, "--json").found["last"] == 12


def closed_at(logs: Path, lines: Sequence[bytes], seq: int) -> None:
    """As the bus rotates after line `seq`, and goes on with the lines that come then."""
    path = logs / "provenance.jsonl"
    with path.open("rb") as file:
        rotate(path, file.fileno(), seq)
    put(logs, lines[seq:])


@pytest.mark.parametrize("start", [1, 7, 11])
def test_segments_that_are_closed_and_compressed_after_they_were_listed_are_read(
    logs: Path, tool: ModuleType, start: int
) -> None:
    lines = log_of(15)
    put_segments(logs, lines[:12])
    log = tool.Log(logs, tool.Evidence(), start)
    closed_at(logs, lines, 12)
    assert compress(logs / "provenance.jsonl") == 2
    found = log.check()
    assert (found.fault, found.first, found.last) == (None, start, 12)
    assert tool.Log(logs, tool.Evidence()).check().last == 15


def test_a_segment_that_is_closed_while_the_others_are_listed_is_read_once(
    logs: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = log_of(15)
    put_segments(logs, lines[:12])
    list_closed = tool.list_closed
    turns: list[Path] = []

    def and_rotate(place: Path) -> Any:
        turns.append(place)
        if len(turns) == 1:
            closed_at(logs, lines, 12)
        return list_closed(place)

    monkeypatch.setattr(tool, "list_closed", and_rotate)
    found = tool.Log(logs, tool.Evidence()).check()
    assert (found.fault, found.last) == (None, 15)


def test_a_segment_that_is_compressed_while_the_others_are_listed_is_not_missed(
    logs: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing may come too early for the new name, and too late for the old one."""
    put_segments(logs, log_of(12))
    list_closed = tool.list_closed
    listings = iter([lambda found: found[:1]])
    monkeypatch.setattr(tool, "list_closed", lambda place: next(listings, lambda found: found)(list_closed(place)))
    assert tool.Log(logs, tool.Evidence()).check().last == 12


def test_segments_before_the_part_are_not_opened(logs: Path) -> None:
    put_segments(logs, log_of(12))
    (logs / "provenance-000000000001.jsonl.gz").write_bytes(b"garbage")
    found = run("log", logs, "--from", 8, "--json").found
    assert (found["ok"], found["first"], found["last"]) == (True, 8, 12)
    found = run("log", logs, "--from", 11, "--json").found
    assert (found["ok"], found["first"], found["last"]) == (True, 11, 12)


def test_one_closed_segment_is_checked_from_the_line_in_its_name(logs: Path) -> None:
    put_segments(logs, log_of(12))
    found = run("log", logs / "provenance-000000000006.jsonl", "--json").found
    assert (found["ok"], found["first"], found["last"], found["checkpoints"]) == (True, 6, 9, 1)
    found = run("log", logs / "provenance-000000000001.jsonl.gz", "--json").found
    assert (found["ok"], found["first"], found["last"], found["tree_size"]) == (True, 1, 5, 5)


# --- Proofs ---


def as_file(folder: Path, name: str, members: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(json.dumps(members))
    return path


def test_proofs_that_the_bus_makes_are_right(logs: Path, tmp_path: Path, tool: ModuleType) -> None:
    prover = Prover(put(logs, log_of(13)))
    for size in range(1, 14):
        for seq in range(1, size + 1):
            proof = as_file(tmp_path, "proof", prover.inclusion(seq, size).body())
            assert tool.main(["proof", str(proof), "--log", str(logs)]) == 0
        for old in range(size + 1):
            proof = as_file(tmp_path, "proof", prover.consistency(old, size).body())
            assert tool.main(["proof", str(proof), "--log", str(logs)]) == 0


def test_a_proof_alone_is_right_in_itself_and_says_so(logs: Path, tmp_path: Path) -> None:
    body = Prover(put(logs, log_of(10))).inclusion(6).body()
    ran = run("proof", as_file(tmp_path, "proof", body), "--json")
    assert (ran.status, ran.found["ok"], ran.found["vouched_by"]) == (0, True, [])
    assert "for the root nothing vouches" in run("proof", "-", given=json.dumps(body)).said
    ran = run("proof", tmp_path / "proof", "--log", logs, "--json")
    assert (ran.status, ran.found["vouched_by"]) == (0, ["log"])


def test_a_signed_proof_needs_no_log(logs: Path, tmp_path: Path) -> None:
    prover = Prover(put(logs, log_of(10)), Notary(SIGNER, tmp_path / ".aal"))
    for body in (prover.inclusion(6).body(), prover.consistency(4).body()):
        proof = as_file(tmp_path, "proof", body)
        ran = run("proof", proof, "--key", SIGNER.vkey, "--json", packages=True)
        assert (ran.status, ran.found["vouched_by"]) == (0, ["key"])
        assert run("proof", proof, "--key", OTHER.vkey, "--json", packages=True).found["fault"] == "signature"
        unsigned = as_file(tmp_path, "unsigned", body | {"checkpoint": None})
        assert run("proof", unsigned, "--key", SIGNER.vkey, "--json", packages=True).found["fault"] == "signature"


def _bit_flipped(text: str) -> str:
    return f"{int(text[:2], 16) ^ 1:02x}{text[2:]}"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seq": 5}, "tree"),
        ({"seq": 7}, "tree"),
        ({"seq": 11}, "seq"),
        ({"seq": 0}, "json"),
        ({"seq": "6"}, "json"),
        ({"seq": True}, "json"),
        ({"tree_size": 2**70}, "json"),
        ({"tree_size": 6}, "tree"),
        ({"tree_size": 17}, "tree"),
        ({"hash": HASH}, "tree"),
        ({"hash": HASH[:-1]}, "json"),
        ({"hash": HASH.upper()}, "json"),
        ({"root": HASH}, "tree"),
        ({"inclusion": []}, "tree"),
        ({"inclusion": [HASH] * 4}, "tree"),
        ({"inclusion": [HASH] * 2000}, "tree"),
        ({"inclusion": "x"}, "json"),
        ({"inclusion": [5]}, "json"),
        ({"checkpoint": "text"}, "signature"),
        ({"checkpoint": 5}, "signature"),
        ({"checkpoint": SIGNER.checkpoint(10, b"x" * 32)}, "tree"),
    ],
)
def test_a_wrong_proof_is_told_by_what_is_wrong(
    logs: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    body = Prover(put(logs, log_of(10))).inclusion(6).body()
    ran = run("proof", as_file(tmp_path, "proof", body | changes), "--json")
    assert (ran.status, ran.found["fault"]) == (1, fault)


def test_any_hash_of_a_proof_counts(logs: Path, tmp_path: Path, tool: ModuleType) -> None:
    prover = Prover(put(logs, log_of(11)))
    for body, name in (
        *((prover.inclusion(seq).body(), "inclusion") for seq in range(1, 12)),
        *((prover.consistency(old).body(), "consistency") for old in range(1, 11)),
    ):
        for place, node in enumerate(body[name]):
            changed = [*body[name][:place], _bit_flipped(node), *body[name][place + 1 :]]
            assert tool.main(["proof", str(as_file(tmp_path, "proof", body | {name: changed}))]) == 1
        for changed in (body[name][1:], body[name][:-1], [*body[name], HASH]):
            if changed != body[name]:
                assert tool.main(["proof", str(as_file(tmp_path, "proof", body | {name: changed}))]) == 1
        for root in {"root", "old_root", "new_root"} & body.keys():
            wrong = body | {root: _bit_flipped(body[root])}
            assert tool.main(["proof", str(as_file(tmp_path, "proof", wrong))]) == 1


def test_a_proof_from_another_log_is_not_one_of_this(logs: Path, tmp_path: Path) -> None:
    other = Prover(put(logs, log_of(10, version="other")))
    bodies = other.inclusion(6).body(), other.consistency(4).body()
    put(logs, log_of(10))
    for body, fault in zip(bodies, ("hash", "tree"), strict=True):
        proof = as_file(tmp_path, "proof", body)
        assert run("proof", proof).status == 0
        assert run("proof", proof, "--log", logs, "--json").found["fault"] == fault


@pytest.mark.parametrize("text", ["", "[]", "{", '{"seq":1,"seq":2}', "\ud800"])
def test_a_file_that_is_no_proof_cannot_be_checked(tmp_path: Path, text: str) -> None:
    path = tmp_path / "proof"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert run("proof", path).status in {1, 2}
    assert run("proof", tmp_path / "missing", "--json").status == 2


# --- Receipts ---


def receipt_of(lines: list[bytes], seq: int, size: int, signer: Signer | None = None) -> dict[str, Any]:
    note = signer and signer.checkpoint(size, root_at(lines, size))
    return {
        "seq": seq,
        "hash": json.loads(lines[seq - 1])["hash"],
        "tree_size": size,
        "run_id": "x",
        "checkpoint": note,
    }


def test_a_receipt_is_checked_in_the_log_or_by_a_proof(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10, result_hash=hash_of({}))
    prover = Prover(put(logs, lines))
    receipt = receipt_of(lines, 6, 7)
    proof = as_file(tmp_path, "proof", prover.inclusion(6).body())
    for members in (receipt, {"ok": True, "result": {}, "provenance": receipt}):
        answer = as_file(tmp_path, "answer", members)
        for how in (["--log", logs], ["--proof", proof], ["--log", logs, "--proof", proof]):
            ran = run("receipt", answer, *how)
            assert ran.status == 0, ran
            assert "the receipt is right: line 6 has the hash" in ran.said


def test_a_signed_receipt_is_vouched_for_by_the_key(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10)
    put(logs, lines)
    signed = as_file(tmp_path, "signed", receipt_of(lines, 6, 7, SIGNER))
    plain = as_file(tmp_path, "plain", receipt_of(lines, 6, 7))
    same_size = as_file(tmp_path, "same", Prover(logs / "provenance.jsonl").inclusion(6, 7).body())
    later = as_file(tmp_path, "later", Prover(logs / "provenance.jsonl").inclusion(6).body())
    later_signed = as_file(
        tmp_path,
        "later-signed",
        Prover(logs / "provenance.jsonl", Notary(SIGNER, tmp_path / ".aal")).inclusion(6).body(),
    )
    key = ["--key", SIGNER.vkey]
    for answer, how, status in (
        (signed, ["--log", logs], 0),
        (signed, ["--proof", same_size], 0),
        (signed, ["--proof", later], 1),  # nobody has signed that tree
        (signed, ["--proof", later_signed], 0),
        (plain, ["--proof", later_signed], 0),
        (plain, ["--log", logs], 1),
        (plain, ["--proof", later], 1),
    ):
        assert run("receipt", answer, *how, *key, packages=True).status == status, (answer, how)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hash": HASH}, "hash"),
        ({"seq": 5}, "hash"),
        ({"seq": 8}, "json"),  # of a tree with 7 lines
        ({"tree_size": 11}, "seq"),
        ({"tree_size": None}, "json"),
        ({"checkpoint": SIGNER.checkpoint(7, b"x" * 32)}, "tree"),
        ({"checkpoint": SIGNER.checkpoint(8, b"x" * 32)}, "tree"),
    ],
)
def test_a_wrong_receipt_is_told_by_what_is_wrong(
    logs: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    lines = log_of(10)
    put(logs, lines)
    ran = run("receipt", as_file(tmp_path, "answer", receipt_of(lines, 6, 7) | changes), "--log", logs, "--json")
    assert (ran.status, ran.found["fault"]) == (1, fault)


def test_an_answer_says_of_the_call_what_its_line_says(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10, result_hash=HASH)
    put(logs, lines)
    whole = {"ok": True, "code": "OK", "request_id": "r6", "result_hash": HASH, "detail": "x"}
    answer = whole | {"provenance": receipt_of(lines, 6, 7)}
    assert run("receipt", as_file(tmp_path, "answer", answer), "--log", logs).status == 0
    for changes in (
        {"ok": False},
        {"code": "ERR_X"},
        {"request_id": "r5"},
        {"result_hash": HASH[::-1]},
        {"cost_cents": 1},
        {"duration_ms": 5},
    ):
        ran = run("receipt", as_file(tmp_path, "answer", answer | changes), "--log", logs, "--json")
        assert (ran.status, ran.found["fault"]) == (1, "answer")


async def test_every_answer_of_a_bus_is_a_receipt_for_its_line(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    add_overlay(settings.overlays)
    add_overlay(settings.overlays, "failing", "false")
    vkey = LedgerKey(settings.state).create(NAME).vkey
    async with Bus(settings) as bus:
        answers = [await bus.invoke(a_call(name)) for name in ("echo", "failing", "missing")]
    assert [answer.body["ok"] for answer in answers] == [True, False, False]
    for answer in answers:
        receipt = tmp_path / "answer"
        receipt.write_bytes(orjson.dumps(answer.body))
        ran = run("receipt", receipt, "--log", settings.logs, "--key", vkey, packages=True)
        assert ran.status == 0, ran
        receipt.write_bytes(orjson.dumps({"outcome": answer.body, "record": {}}))  # of `aal invoke --json --record`
        assert run("receipt", receipt, "--log", settings.logs, "--key", vkey, packages=True) == ran
        receipt.write_bytes(orjson.dumps(answer.body | {"result": {"forged": True}}))
        ran = run("receipt", receipt, "--log", settings.logs, "--key", vkey, "--json", packages=True)
        assert (ran.status, ran.found["fault"]) == (1, "answer")


RESULTS: list[Any] = [
    None,
    0,
    -0.0,
    1.5,
    1e21,
    1e17,
    5e-324,
    "é\u2028\x7f\n",
    [],
    {"b": [{"\U0001f600": 1, "\ufffd": 2}]},
]


@pytest.mark.parametrize("result", RESULTS)
def test_a_result_is_held_against_the_hash_that_answer_and_line_have_of_it(
    logs: Path, tmp_path: Path, result: Any
) -> None:
    lines = log_of(10, result_hash=hash_of(result))
    proof = as_file(tmp_path, "proof", Prover(put(logs, lines)).inclusion(6).body())
    whole = {"ok": True, "result": result, "result_hash": hash_of(result), "provenance": receipt_of(lines, 6, 7)}
    unnamed = {name: member for name, member in whole.items() if name != "result_hash"}
    for how in (["--log", logs], ["--proof", proof]):
        assert run("receipt", as_file(tmp_path, "answer", whole), *how).status == 0
        ran = run("receipt", as_file(tmp_path, "answer", whole | {"result": {"forged": True}}), *how, "--json")
        assert (ran.status, ran.found["fault"]) == (1, "answer")
    ran = run("receipt", as_file(tmp_path, "answer", unnamed | {"result": {"forged": True}}), "--log", logs, "--json")
    assert (ran.status, ran.found["fault"]) == (1, "answer")


def test_a_call_that_gave_nothing_has_no_result_and_no_hash_of_one(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10, ok=False, code="ERR_X")
    put(logs, lines)
    whole = {"ok": False, "result": None, "result_hash": None, "provenance": receipt_of(lines, 6, 7)}
    for result, status in ((None, 0), ({}, 1), (0, 1)):
        assert run("receipt", as_file(tmp_path, "answer", whole | {"result": result}), "--log", logs).status == status


def test_a_receipt_that_is_right_says_what_was_checked(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10, result_hash=hash_of(5))
    proof = as_file(tmp_path, "proof", Prover(put(logs, lines)).inclusion(6).body())
    receipt = receipt_of(lines, 6, 7)
    unheld = "what the answer says of the call was not held against that line: give --log"
    for members, how, said in (
        (receipt, ["--log", logs], "no answer came with it, so what the call gave was not looked at"),
        ({"provenance": receipt, "ok": True}, ["--log", logs], "what the answer says (ok); no result came with it"),
        ({"provenance": receipt, "ok": True, "result": 5}, ["--log", logs], "also of its result (ok, result_hash)"),
        ({"provenance": receipt, "ok": True, "result": 5}, ["--proof", proof], unheld),
    ):
        assert said in run("receipt", as_file(tmp_path, "answer", members), *how).said


@pytest.mark.parametrize("text", ["1e400", '"\\ud800"', "[" * 700 + "]" * 700, "NaN", '{"a":1,"a":1}'])
def test_a_result_that_has_no_canonical_form_is_no_answers(logs: Path, tmp_path: Path, text: str) -> None:
    lines = log_of(10)
    put(logs, lines)
    answer = tmp_path / "answer"
    answer.write_text(f'{{"ok":true,"provenance":{json.dumps(receipt_of(lines, 6, 7))},"result":{text}}}')
    ran = run("receipt", answer, "--log", logs, "--json")
    assert (ran.status, ran.found["fault"]) == (1, "json")


def test_a_receipt_shows_that_its_line_was_changed_or_taken_away(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10)
    answer = as_file(tmp_path, "answer", receipt_of(lines, 6, 7))
    put(logs, log_of(10, version="another"))
    ran = run("receipt", answer, "--log", logs)
    assert (ran.status, "line 6 has the hash" in ran.said) == (1, True)
    put(logs, lines[:5])
    ran = run("receipt", answer, "--log", logs)
    assert (ran.status, "the log ends with line 5" in ran.said) == (1, True)
    put(logs, [*lines[:2], b"{}\n", *lines[3:]])
    ran = run("receipt", answer, "--log", logs)
    assert (ran.status, "line 3 of the log: " in ran.said) == (1, True)


def test_a_receipt_and_a_proof_of_another_line_do_not_fit(logs: Path, tmp_path: Path) -> None:
    lines = log_of(10)
    prover = Prover(put(logs, lines))
    answer = as_file(tmp_path, "answer", receipt_of(lines, 6, 7))
    ran = run("receipt", answer, "--proof", as_file(tmp_path, "proof", prover.inclusion(5).body()), "--json")
    assert (ran.status, ran.found["fault"]) == (1, "hash")
    other = receipt_of(lines, 6, 7) | {"checkpoint": SIGNER.checkpoint(7, b"x" * 32)}
    answer = as_file(tmp_path, "answer", other)
    ran = run("receipt", answer, "--proof", as_file(tmp_path, "proof", prover.inclusion(6, 7).body()), "--json")
    assert (ran.status, ran.found["fault"]) == (1, "tree")


# --- Growth ---


def checkpoints_at(folder: Path, lines: list[bytes], *sizes: int, signer: Signer = SIGNER) -> list[Path]:
    paths = [folder / f"{size:012}" for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        path.write_text(note_at(lines, size, signer))
    return paths


@pytest.mark.parametrize(("old", "new"), [(0, 0), (0, 9), (1, 2), (4, 12), (5, 12), (11, 12), (12, 12)])
def test_growth_is_shown_by_a_proof_and_by_the_log(logs: Path, tmp_path: Path, old: int, new: int) -> None:
    lines = log_of(12)
    put_segments(logs, lines)
    both = checkpoints_at(tmp_path, lines, old, new)
    proof = as_file(tmp_path, "proof", Prover(put(tmp_path, lines)).consistency(old, new).body())
    key = ["--key", SIGNER.vkey]
    assert run("growth", *both, "--proof", proof).status == 0
    assert run("growth", *both, "--log", logs).status == 0
    ran = run("growth", *both, "--proof", proof, "--log", logs, *key, "--json", packages=True)
    assert (ran.status, ran.found["vouched_by"]) == (0, ["key", "log"])
    assert f"the tree of {new} lines" in ran.found["said"]


def test_another_history_is_no_growth(logs: Path, tmp_path: Path) -> None:
    lines, other = log_of(12), log_of(12, version="other")
    put(logs, lines)
    (old,) = checkpoints_at(tmp_path, other, 5)
    (new,) = checkpoints_at(tmp_path, lines, 12)
    prover = Prover(logs / "provenance.jsonl")
    own = as_file(tmp_path, "own", prover.consistency(5).body())
    forged = as_file(tmp_path, "forged", prover.consistency(5).body() | {"old_root": root_at(other, 5).hex()})
    for how in (["--proof", own], ["--proof", forged], ["--log", logs]):
        ran = run("growth", old, new, *how, "--json")
        assert (ran.status, ran.found["fault"]) == (1, "tree")


def test_a_log_does_not_shrink_and_is_not_another(logs: Path, tmp_path: Path) -> None:
    lines = log_of(12)
    put(logs, lines)
    old, new = checkpoints_at(tmp_path, lines, 5, 12)
    assert run("growth", new, old, "--log", logs, "--json").found["fault"] == "tree"
    elsewhere = Signer.read(new_key("example.com/other"))
    (other,) = checkpoints_at(tmp_path, lines, 12, signer=elsewhere)
    assert run("growth", old, other, "--log", logs, "--json").found["fault"] == "signature"


def test_both_checkpoints_are_to_be_signed_with_the_key(logs: Path, tmp_path: Path) -> None:
    lines = log_of(12)
    put(logs, lines)
    (old,) = checkpoints_at(tmp_path, lines, 5, signer=OTHER)
    (new,) = checkpoints_at(tmp_path, lines, 12)
    for both in ((old, new), (new, old), (old, old)):
        ran = run("growth", *both, "--log", logs, "--key", SIGNER.vkey, "--json", packages=True)
        assert (ran.status, ran.found["fault"]) == (1, "signature")


def test_a_file_that_is_no_checkpoint_is_told(logs: Path, tmp_path: Path) -> None:
    lines = log_of(12)
    put(logs, lines)
    (new,) = checkpoints_at(tmp_path, lines, 12)
    junk = tmp_path / "junk"
    for text in ("", "junk", note_at(lines, 5).replace("\n5\n", "\n05\n"), note_at(lines, 5)[:-1]):
        junk.write_text(text)
        assert run("growth", junk, new, "--log", logs, "--json").found["fault"] == "signature"
    assert run("growth", tmp_path / "missing", new, "--log", logs).status == 2


# --- Canonical JSON ---

SAFE = 2**53 - 1
CANONICAL = st.recursive(
    st.none() | st.booleans() | st.integers(-SAFE, SAFE) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(CANONICAL)
@example([5e-324, 1.7976931348623157e308, 1e21, 1e-7, 1e-6, 123456789012345680000.0, -0.0, 1e23, 9007199254740993.0])
def test_the_tool_and_the_bus_have_one_canonical_form_of_a_value(tool: ModuleType, value: Any) -> None:
    assert tool.canonical(value) == canonical(value)
    assert tool.canonical(json.loads(json.dumps(value))) == canonical(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_written_as_ecmascript_does(tool: ModuleType, number: float) -> None:
    assert tool.number_text(number).encode() == rfc8785.dumps(number)


# --- Whatever else it is given ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(HASH),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
NOTE = SIGNER.checkpoint(10, bytes(32))


@given(st.sampled_from(["seq", "hash", "tree_size", "root", "inclusion", "checkpoint"]), JSON)
def test_no_member_of_a_proof_is_more_than_wrong(tool: ModuleType, name: str, member: Any) -> None:
    body = {"seq": 1, "hash": HASH, "tree_size": 1, "root": HASH, "inclusion": [], "checkpoint": None, name: member}
    with pytest.raises(tool.Wrong):
        tool._check_inclusion(body, [])


@given(st.text(alphabet="\n—+ =09Aé\ud800\x00", max_size=40), st.integers(0, len(NOTE)), st.integers(0, len(NOTE)))
def test_no_text_is_more_than_no_note(tool: ModuleType, text: str, start: int, end: int) -> None:
    changed = NOTE[:start] + text + NOTE[end:]
    found = None
    with contextlib.suppress(tool.Wrong):
        found = tool.read_note(changed, [tool.read_key(SIGNER.vkey)])
    assert found is None or not found.signed_by or changed.startswith(NOTE[: NOTE.index("—")])


@given(JSON, st.sampled_from(["seq", "prev", "type", "size", "root", "nodes", "note", "x"]))
def test_no_member_of_a_line_is_more_than_wrong(
    tmp_path_factory: pytest.TempPathFactory, tool: ModuleType, member: Any, name: str
) -> None:
    lines = log_of(8)
    text = json.dumps({key: value for key, value in json.loads(lines[7]).items() if key != "hash"} | {name: member})
    path = put(tmp_path_factory.getbasetemp(), [*lines[:7], held(text.encode())], "any.jsonl")
    found = tool.Log(path, tool.Evidence()).check()
    assert found.first_bad in {None, 8}
    assert json.dumps(tool.asdict(found))


# --- People ---


def test_a_terminal_sees_a_progress_bar_and_a_file_does_not(logs: Path) -> None:
    put(logs, log_of(9))
    assert run("log", logs).complained == ""
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-I", "-S", str(TOOL), "log", str(logs)]
        subprocess.run(command, stderr=theirs, stdout=subprocess.DEVNULL, check=True)
        shown = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "100%  9 lines" in shown
