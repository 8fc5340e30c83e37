"""What is nobody's fault but the service's or the disk's: it is answered in the same form, and logged."""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, NoReturn

import pytest
from aos_context import operations
from aos_context.api.main import create_app
from aos_context.api.service import Service as OpenService
from aos_context.errors import ContextError
from aos_context.ledger import FileLedger
from aos_context.settings import Settings
from starlette.testclient import TestClient

from tests.context.served import a_patch, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENVELOPE = {"phase": "OPEN", "request_id": "r1", "payload": {"objective": "x"}}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(Settings(root=tmp_path / "runs"))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as given:
        yield given


def test_a_full_disk_is_500_names_what_failed_and_changes_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = client.post("/runs/boot", json={"objective": "x"}).json()["run_id"]

    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(FileLedger, "append", full)
        reply = client.post(f"/runs/{run_id}/step/update", json={"patch": a_patch()})
        sealed = client.post("/aal/boot", json=ENVELOPE)
    assert (reply.status_code, reply.json()["code"]) == (500, "BROKEN")
    assert "No space left on device" in reply.json()["error"]
    assert (sealed.status_code, sealed.json()["ok"], sealed.json()["code"]) == (200, False, "BROKEN")
    assert "No space left on device" in caplog.text
    assert client.get(f"/runs/{run_id}/ws").json()["_update_seq"] == 0
    assert client.post(f"/runs/{run_id}/step/update", json={"patch": a_patch()}).status_code == 200


def test_a_fault_of_the_service_itself_is_500_and_says_nothing_of_its_inside(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise ZeroDivisionError("a secret")

    monkeypatch.setitem(operations._OPERATIONS, "boot", fail)
    for reply in (client.post("/runs/boot", json={"objective": "x"}), client.post("/aal/boot", json=ENVELOPE)):
        assert (reply.status_code, reply.json()["ok"]) == (500, False)
        assert "secret" not in reply.text


def test_a_client_that_goes_away_in_the_middle_of_its_body_harms_nobody(tmp_path: Path) -> None:
    head = (
        b"POST /runs/boot HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    with serving(tmp_path / "runs") as service:
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head)
        assert service.get("/runs").json() == {"runs": [], "next": None}


def test_an_application_without_its_lifespan_says_what_is_missing() -> None:
    with pytest.raises(ContextError, match="lifespan"):
        OpenService().runs  # noqa: B018
