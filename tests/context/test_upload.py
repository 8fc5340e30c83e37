"""A resume pack that is uploaded: it is loaded as one that lies in the folder of runs, and nothing else stays of it."""

from __future__ import annotations

import io
import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from aos_context.api.main import create_app
from aos_context.config import Config
from aos_context.settings import Settings
from starlette.testclient import TestClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UPLOAD = "/runs/resume/upload"
ZIP = {"Content-Type": "application/zip"}
LIMIT_BYTES = 100_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def client(root: Path) -> Iterator[TestClient]:
    app = create_app(Settings(root, config=Config(pack_max_bytes=LIMIT_BYTES)))
    with TestClient(app, base_url="http://localhost") as given:
        yield given


@pytest.fixture
def pack(client: TestClient) -> bytes:
    """Of the run `packed`."""
    client.post("/runs/boot", json={"objective": "Be carried.", "run_id": "packed"})
    made = client.post("/runs/packed/resume/snapshot", json={}).json()
    return client.get(f"/runs/packed/resume/pack_{made['pack_id']}.zip").content


def refused(reply: Any, status: int, code: str, root: Path) -> dict[str, Any]:
    """The body of an error, which leaves the folder of runs as it was."""
    body: dict[str, Any] = reply.json()
    assert (reply.status_code, body["code"]) == (status, code), body
    names = {path.name for path in root.iterdir() if not path.name.startswith("memory.")}
    assert names <= {"packed"}
    return body


def test_a_pack_that_is_uploaded_is_loaded_and_its_file_is_gone(client: TestClient, root: Path, pack: bytes) -> None:
    loaded = client.post(UPLOAD, content=pack, headers=ZIP, params={"new_run_id": "carried", "actor": "web"}).json()
    assert (loaded["run_id"], loaded["from_run_id"]) == ("carried", "packed")
    assert loaded["working_set"]["objective"] == "Be carried."
    last = client.get("/runs/carried/ledger").json()["events"][-1]
    assert (last["event_type"], last["actor"]) == ("RESUME_PACK_LOADED", "web")
    assert not list(root.glob(".*"))
    other = client.post(UPLOAD, content=pack, headers=ZIP).json()
    assert other["run_id"] not in ("packed", "carried")


def test_a_run_keeps_its_id_where_that_is_free(client: TestClient, root: Path, pack: bytes) -> None:
    with TestClient(create_app(Settings(root.with_name("elsewhere"))), base_url="http://localhost") as elsewhere:
        assert elsewhere.post(UPLOAD, content=pack, headers=ZIP).json()["run_id"] == "packed"


def test_the_id_of_a_run_that_is_there_is_409_and_no_id_is_422(client: TestClient, root: Path, pack: bytes) -> None:
    refused(client.post(UPLOAD, content=pack, headers=ZIP, params={"new_run_id": "packed"}), 409, "EXISTS", root)
    faults = refused(client.post(UPLOAD, content=pack, headers=ZIP, params={"new_run_id": "../x"}), 422, "SCHEMA", root)
    assert faults["faults"][0]["path"] == "$.new_run_id"
    for name in ("pack_path", "colour"):
        refused(client.post(UPLOAD, content=pack, headers=ZIP, params={name: "x"}), 422, "SCHEMA", root)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_pack_that_is_too_large_is_413_before_it_is_looked_at(client: TestClient, root: Path, declared: bool) -> None:
    body = b" " * (LIMIT_BYTES + 1)
    given = body if declared else iter([body[:LIMIT_BYTES], body[LIMIT_BYTES:]])
    assert (
        refused(client.post(UPLOAD, content=given, headers=ZIP), 413, "TOO_LARGE", root)["limit_bytes"] == LIMIT_BYTES
    )
    assert refused(client.post(UPLOAD, content=body[:-1], headers=ZIP), 422, "PACK", root)


@pytest.mark.parametrize("body", [b"", b"PK", b"no zip" * 100], ids=["empty", "cut", "text"])
def test_what_is_no_zip_is_422(client: TestClient, root: Path, body: bytes) -> None:
    assert "zip" in refused(client.post(UPLOAD, content=body, headers=ZIP), 422, "PACK", root)["error"]


def test_a_pack_that_was_changed_is_422_with_the_file_named(client: TestClient, root: Path, pack: bytes) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pack)) as before, zipfile.ZipFile(out, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name.startswith("state/"):
                content = json.dumps(json.loads(content) | {"objective": "Be changed."}).encode()
            after.writestr(name, content)
    body = refused(client.post(UPLOAD, content=out.getvalue(), headers=ZIP), 422, "PACK", root)
    assert body["file"] == "state/working_set.v2.1.json"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "text/plain"])
def test_what_does_not_say_that_it_is_a_zip_is_415(client: TestClient, root: Path, pack: bytes, kind: str) -> None:
    body = refused(client.post(UPLOAD, content=pack, headers={"Content-Type": kind}), 415, "MEDIA_TYPE", root)
    assert "application/zip" in body["hint"]


def test_a_page_of_another_site_uploads_nothing(client: TestClient, root: Path, pack: bytes) -> None:
    headers = ZIP | {"Origin": "https://evil.example"}
    refused(client.post(UPLOAD, content=pack, headers=headers), 403, "FORBIDDEN", root)
