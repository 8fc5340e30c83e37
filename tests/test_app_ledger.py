"""What an auditor reads of the ledger over HTTP: proofs, growth, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from bus import app_ledger, index, merkle, provenance
from bus.app import create_app
from bus.dispatch import Bus
from bus.ledger_key import LedgerKey
from bus.model import Phase
from bus.notes import Verifier
from bus.proofs import Prover
from bus.records import parse_or_none
from bus.tokens import Tokens
from tests.support import add_overlay, settings_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bus.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = settings_in(tmp_path)
    for name in ("echo", "other"):
        add_overlay(settings.overlays, name)
    return settings


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """Of a bus whose ledger has some lines."""
    with TestClient(create_app(bus=Bus(settings)), base_url="http://127.0.0.1") as client:
        for number in range(3):
            client.post("/invoke/echo", json={"phase": "OPEN", "data": {"n": number}})
        yield client


def nodes(texts: list[str]) -> list[bytes]:
    return [bytes.fromhex(text) for text in texts]


def test_a_line_is_proved_to_be_in_the_tree(client: TestClient) -> None:
    proof = client.get("/provenance/2/proof").json()
    line = client.get("/provenance/2").json()
    assert (proof["seq"], proof["hash"], proof["checkpoint"]) == (2, line["hash"], None)
    leaf, root = bytes.fromhex(proof["hash"]), bytes.fromhex(proof["root"])
    merkle.check_inclusion(1, proof["tree_size"], leaf, nodes(proof["inclusion"]), root)
    assert client.get("/provenance/2/proof?size=2").json()["tree_size"] == 2


def test_the_growth_from_a_receipt_to_now_is_proved(client: TestClient) -> None:
    receipt = client.post("/invoke/echo", json={"phase": "OPEN", "data": {}}).json()["provenance"]
    client.post("/invoke/echo", json={"phase": "OPEN", "data": {}})
    proof = client.get(f"/provenance/consistency?old={receipt['tree_size']}").json()
    assert proof["old_size"] == receipt["tree_size"] < proof["new_size"]
    old, new = bytes.fromhex(proof["old_root"]), bytes.fromhex(proof["new_root"])
    merkle.check_consistency(proof["old_size"], proof["new_size"], old, new, nodes(proof["consistency"]))


def test_a_checkpoint_is_signed_where_there_is_a_key(settings: Settings) -> None:
    vkey = LedgerKey(settings.state).create("example.org/aal").vkey
    with TestClient(create_app(bus=Bus(settings)), base_url="http://127.0.0.1") as client:
        client.post("/invoke/echo", json={"phase": "OPEN", "data": {}})
        told = client.get("/provenance/checkpoint").json()
        proof = client.get("/provenance/1/proof").json()
    note = Verifier.read(vkey).open(told["checkpoint"])
    assert (note.size, note.root.hex()) == (told["tree_size"], told["root"])
    assert Verifier.read(vkey).open(proof["checkpoint"]).root.hex() == proof["root"]


def test_what_a_bus_signs_it_signs_with_one_key_whatever_becomes_of_the_file(settings: Settings) -> None:
    vkey = LedgerKey(settings.state).create("example.org/aal").vkey
    with TestClient(create_app(bus=Bus(settings)), base_url="http://127.0.0.1") as client:
        (settings.state / "ledger_key.json").unlink()
        LedgerKey(settings.state).create("example.org/another")
        receipt = client.post("/invoke/echo", json={"phase": "OPEN", "data": {}}).json()["provenance"]
        told = client.get("/provenance/checkpoint").json()
    for note in (receipt["checkpoint"], told["checkpoint"]):
        assert Verifier.read(vkey).open(note)


def test_a_bus_that_began_without_a_key_signs_nothing(settings: Settings) -> None:
    with TestClient(create_app(bus=Bus(settings)), base_url="http://127.0.0.1") as client:
        LedgerKey(settings.state).create("example.org/aal")
        client.post("/invoke/echo", json={"phase": "OPEN", "data": {}})
        assert client.get("/provenance/checkpoint").json()["checkpoint"] is None


def test_a_request_takes_few_lines_into_the_index_and_lets_go_of_it(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "WORTH_BYTES", 0)
    monkeypatch.setattr(provenance, "CAUGHT_UP_LINES", 2)
    closed: list[Prover] = []
    close = Prover.close

    def noted(prover: Prover) -> None:
        closed.append(prover)
        close(prover)

    monkeypatch.setattr(Prover, "close", noted)
    for number, path in enumerate(("checkpoint", "consistency", "1/proof", "1/proof?size=99"), 1):
        client.get(f"/provenance/{path}")
        with index.Index(settings.ledger).reading() as view:
            assert view is not None
            assert view.size <= 2 * number
        assert len(closed) == number


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/provenance/99/proof", 404, "ERR_NOT_FOUND"),
        ("/provenance/x/proof", 404, "ERR_NOT_FOUND"),
        ("/provenance/2/proof?size=1", 404, "ERR_NOT_FOUND"),
        ("/provenance/2/proof?size=99", 404, "ERR_NOT_FOUND"),
        ("/provenance/2/proof?size=x", 400, "ERR_BAD_QUERY"),
        ("/provenance/2/proof?of=2", 400, "ERR_BAD_QUERY"),
        ("/provenance/consistency?old=9&new=2", 404, "ERR_NOT_FOUND"),
        ("/provenance/consistency?old=-1", 400, "ERR_BAD_QUERY"),
        ("/provenance/checkpoint?size=1", 400, "ERR_BAD_QUERY"),
    ],
)
def test_what_cannot_be_proved_is_refused_with_why(client: TestClient, path: str, status: int, code: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()["code"]) == (status, code)


def test_a_token_needs_the_scope_and_sees_the_lines_of_its_overlays_only(settings: Settings) -> None:
    kept = Tokens(settings.state)
    _, caller = kept.create("caller", overlays=("*",), phases=(Phase.OPEN,), scopes=("invoke",))
    _, reader = kept.create("reader", overlays=("other",), phases=(Phase.OPEN,), scopes=("read-ledger",))
    with TestClient(create_app(bus=Bus(settings)), base_url="http://127.0.0.1") as client:
        as_caller, as_reader = ({"Authorization": f"Bearer {token}"} for token in (caller, reader))
        for name in ("echo", "other"):
            client.post(f"/invoke/{name}", json={"phase": "OPEN", "data": {}}, headers=as_caller)
        found = {
            line.get("overlay"): line["seq"] for line in client.get("/provenance", headers=as_reader).json()["events"]
        }
        assert client.get(f"/provenance/{found['other']}/proof", headers=as_reader).status_code == 200
        assert client.get("/provenance/1/proof", headers=as_reader).status_code == 404
        assert client.get("/provenance/checkpoint", headers=as_reader).status_code == 200
        for path in ("/provenance/1/proof", "/provenance/checkpoint", "/provenance/consistency"):
            assert client.get(path, headers=as_caller).status_code == 403


def test_a_token_of_a_seldom_used_overlay_has_the_lines_of_others_not_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Tokens(settings.state)
    _, caller = kept.create("caller", overlays=("*",), phases=(Phase.OPEN,), scopes=("invoke",))
    _, reader = kept.create("reader", overlays=("oth*",), phases=(Phase.OPEN,), scopes=("read-ledger",))
    monkeypatch.setattr(index, "WORTH_BYTES", 0)
    read: list[bytes] = []
    real = parse_or_none

    def noting(line: bytes) -> dict[str, Any] | None:
        read.append(line)
        return real(line)

    with TestClient(create_app(bus=Bus(settings)), base_url="http://127.0.0.1") as client:
        as_caller, as_reader = ({"Authorization": f"Bearer {token}"} for token in (caller, reader))
        for name in ("other", *["echo"] * 20):
            client.post(f"/invoke/{name}", json={"phase": "OPEN", "data": {}}, headers=as_caller)
        monkeypatch.setattr(provenance, "parse_or_none", noting)
        events = client.get("/provenance", headers=as_reader).json()["events"]
    assert [line["overlay"] for line in events if line["type"] == "invoke"] == ["other"]
    assert {line.get("overlay") for line in events} == {"other", None}
    assert len(read) < 10


def test_a_request_reads_no_more_of_a_ledger_without_an_index_than_its_bound(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/provenance").json()["count"] > 1
    monkeypatch.setattr(app_ledger, "_MOST_BYTES", 1)
    assert client.get("/provenance").json()["count"] == 1
