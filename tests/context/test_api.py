"""The HTTP API: every error in one form, bodies that are too large or no JSON, and two services on one folder."""

from __future__ import annotations

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from aos_context import errors
from aos_context.api import bus_route
from aos_context.api.main import create_app
from aos_context.api.queries import LISTED
from aos_context.memory import InMemoryMemoryStore
from aos_context.runs import Runs
from aos_context.settings import Settings
from starlette.testclient import TestClient

from tests.context.served import FACT, Service, a_patch, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JSON = {"Content-Type": "application/json"}
PHASES = ("OPEN", "ALIGN", "ASCEND", "CLEAR", "SEAL")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("api") / "runs") as given:
        yield given


@pytest.fixture(scope="module")
def run_id(service: Service) -> str:
    return service.boot()


def refused(reply: Any, status: int, code: str) -> dict[str, Any]:
    """The body of an error, which has the one form."""
    body: dict[str, Any] = reply.json()
    assert (reply.status, body["code"], body["ok"]) == (status, code, False), body
    assert body["error"]
    assert "hint" in body
    assert reply.headers["Content-Type"] == "application/json"
    return body


def test_the_page_is_at_the_root_and_may_load_nothing_from_elsewhere(service: Service) -> None:
    moved = service.get("/")
    assert (moved.status, moved.headers["Location"]) == (307, "/static/index.html")
    page = service.get("/static/index.html")
    assert page.status == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert b"http" not in page.content


def test_health_says_what_runs(service: Service) -> None:
    body = service.get("/health").json()
    assert (body["ok"], body["service"], body["testing"]) == (True, "aos_context", False)
    assert {"/runs/{run_id}/ws", "/aal/{capability}"} < set(body["paths"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/runs/nobody/ws"),
        ("POST", "/runs/nobody/step/update"),
        ("POST", "/runs/nobody/milestone"),
        ("POST", "/runs/nobody/memory/propose"),
        ("POST", "/runs/nobody/memory/commit"),
        ("GET", "/runs/nobody/memory/search"),
        ("GET", "/runs/nobody/brief"),
        ("POST", "/runs/nobody/resume/snapshot"),
        ("GET", "/runs/nobody/ledger"),
        ("GET", "/runs/nobody/episodes"),
        ("GET", "/runs/nobody/episodes/1"),
        ("GET", "/runs/nobody/resume/pack_1.zip"),
        ("GET", "/runs/nobody"),
        ("GET", "/nothing"),
        ("GET", "/static/nothing.js"),
    ],
)
def test_an_unknown_run_or_address_is_404(service: Service, method: str, path: str) -> None:
    bodies = {"update": {"patch": a_patch()}, "milestone": {"reason": "x"}, "propose": {"mcrs": [FACT]}}
    body = bodies.get(path.rpartition("/")[2], {"batch_id": "b"} if path.endswith("commit") else {})
    reply = service.post(path, body) if method == "POST" else service.get(path)
    refused(reply, 404, "NOT_FOUND")


@pytest.mark.parametrize("run_id", ["_x", "a%20b", ".hidden", "x" * 129, "%C3%A9"])
def test_what_is_no_id_of_a_run_is_404_at_every_address_whatever_comes_with_it(service: Service, run_id: str) -> None:
    routes = [one for one in service.get("/health").json()["paths"] if one.startswith("/runs/{run_id}/")]
    assert len(routes) >= 12
    for route in routes:
        path = route.format(run_id=run_id, number="1", name="pack_1.zip")
        answers = [service.get(f"{path}?colour=red"), service.post(path, {"colour": "red"})]
        found = [one for one in answers if one.status != 405]
        assert found
        for one in found:
            refused(one, 404, "NOT_FOUND")


@pytest.mark.parametrize(("method", "path"), [("GET", "/runs/boot"), ("DELETE", "/runs/x/ws"), ("POST", "/health")])
def test_a_wrong_method_is_405_and_says_which_is_right(service: Service, method: str, path: str) -> None:
    reply = service.ask(method, path, b"{}", JSON)
    refused(reply, 405, "METHOD")
    assert reply.headers["Allow"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff{}", b'{"objective": NaN}', b'{"objective": 1e999}', b'{"objective": "\\ud800"}',
     b"[" * 100_000, b'{"a": ' * 100_000, b"9" * 10_000, b'{"objective": "a", "objective": "b"}',
     b'{"objective": "a", "constraints": [{"\\ud800": 1, "\\ud800": 2}]}'],
    ids=["empty", "cut", "array", "not-utf8", "nan", "huge", "surrogate", "deep", "deeper", "long", "twice", "inner"],
)  # fmt: skip
def test_what_is_not_one_json_object_is_400(service: Service, body: bytes) -> None:
    refused(service.post("/runs/boot", body), 400, "BAD_REQUEST")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_does_not_say_that_it_is_json_is_415(service: Service, kind: str) -> None:
    refused(service.ask("POST", "/runs/boot", b"{}", {"Content-Type": kind}), 415, "MEDIA_TYPE")


def test_a_stale_patch_is_409_with_the_current_seq(service: Service) -> None:
    run_id = service.boot()
    address = f"/runs/{run_id}/step/update"
    assert service.post(address, {"patch": a_patch()}).status == 200
    body = refused(service.post(address, {"patch": a_patch()}), 409, "STALE")
    assert (body["expected_seq"], body["current_seq"]) == (0, 1)


def test_a_run_that_is_there_is_409(service: Service) -> None:
    service.boot(run_id="there")
    refused(service.post("/runs/boot", {"objective": "x", "run_id": "there"}), 409, "EXISTS")


@pytest.mark.parametrize(
    ("rest", "body", "path"),
    [
        ("step/update", {}, "$"),
        ("step/update", {"patch": a_patch(), "also": 1}, "$"),
        ("step/update", {"patch": a_patch(), "run_id": "x"}, "$.run_id"),
        ("step/update", {"patch": a_patch(status="ASLEEP")}, "$.patch.set.status"),
        ("step/update", {"patch": a_patch(sliding_context=[{"id": "c"}])}, "$.patch.set.sliding_context[0]"),
        ("milestone", {"reason": ""}, "$.reason"),
        ("memory/propose", {"mcrs": []}, "$.mcrs"),
        ("memory/propose", {"mcrs": [FACT, FACT | {"op": "forget"}]}, "$.mcrs[1].op"),
        ("memory/propose", {"mcrs": [FACT], "scope_filters": {"run_id": "x"}}, "$.scope_filters.run_id"),
        ("memory/commit", {"batch_id": "a b"}, "$.batch_id"),
        ("milestone", {"reason": " \n"}, "$.reason"),
        ("step/update", {"patch": a_patch(objective="\t ")}, "$.patch.set.objective"),
        ("resume/snapshot", {"zip_pack": "yes"}, "$.zip_pack"),
        ("resume/snapshot", {"pointers": {"at": {}}}, "$.pointers.at"),
        ("resume/snapshot", {"pointers": {"at": [1]}}, "$.pointers.at"),
        ("resume/snapshot", {"pointers": {"at": "x" * 2001}}, "$.pointers.at"),
        ("resume/snapshot", {"pointers": {"a b": 1}}, "$.pointers"),
        ("resume/snapshot", {"pointers": {f"p{number}": 1 for number in range(101)}}, "$.pointers"),
    ],
)
def test_what_no_schema_allows_is_422_with_its_json_path(
    service: Service, run_id: str, rest: str, body: dict[str, Any], path: str
) -> None:
    faults = refused(service.post(f"/runs/{run_id}/{rest}", body), 422, "SCHEMA")["faults"]
    assert path in [fault["path"] for fault in faults]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"objective": "   "}, "$.objective"),
        ({"objective": "x", "acceptance_criteria": ["y", " "]}, "$.acceptance_criteria[1]"),
        ({"objective": "x", "constraints": [" "]}, "$.constraints[0]"),
    ],
)
def test_a_run_of_nothing_but_blanks_is_not_booted(service: Service, body: dict[str, Any], path: str) -> None:
    faults = refused(service.post("/runs/boot", body), 422, "SCHEMA")["faults"]
    assert path in [fault["path"] for fault in faults]


@pytest.mark.parametrize(
    ("rest", "path"),
    [
        ("memory/search?top_k=many", "$.top_k"),
        ("memory/search?top_k=0", "$.top_k"),
        ("memory/search?scope=world", "$.scope"),
        ("memory/search?min_confidence=2", "$.min_confidence"),
        ("memory/search?min_confidence=nan", "$.min_confidence"),
        ("memory/search?colour=red", "$"),
        ("memory/search?run_id=other", "$.run_id"),
        ("brief?budget=-1", "$.budget"),
        ("ledger?limit=x", "$.limit"),
        ("ledger?limit=1001", "$.limit"),
        ("ledger?after=-1", "$.after"),
        ("ledger?after=1_0", "$.after"),
        ("ledger?limit=%2B5", "$.limit"),
        ("ledger?limit=05", "$.limit"),
        ("ledger?limit=%D9%A3", "$.limit"),
        ("ledger?limit=" + "9" * 5000, "$.limit"),
        ("ledger?limit=1&limit=2", "$.limit"),
        ("ledger?run_id=other", "$"),
        ("memory/search?top_k=%205", "$.top_k"),
        ("memory/search?min_confidence=.5", "$.min_confidence"),
        ("memory/search?min_confidence=1e-1_0", "$.min_confidence"),
        ("ws?colour=red", "$"),
        ("episodes?limit=-1", "$.limit"),
        ("episodes?colour=red", "$"),
        ("episodes/1?colour=red", "$"),
        ("resume/pack_1.zip?colour=red", "$"),
        ("../../runs?limit=0", "$.limit"),
        ("../../runs?after=x", "$.after"),
        ("../../health?colour=red", "$"),
    ],
)
def test_a_query_that_no_schema_allows_is_422_with_its_path(
    service: Service, run_id: str, rest: str, path: str
) -> None:
    address = rest.removeprefix("../..") if rest.startswith("../..") else f"/runs/{run_id}/{rest}"
    faults = refused(service.get(address), 422, "SCHEMA")["faults"]
    assert [fault["path"] for fault in faults] == [path]


LARGE = "sk-live-secret " * 200_000


@pytest.mark.parametrize(
    ("rest", "body"),
    [
        ("step/update", {"patch": a_patch(next_action=LARGE)}),
        ("step/update", {"patch": {"expected_seq": 0, "set": {"status": LARGE}}}),
        ("step/update", {"patch": LARGE}),
        ("memory/propose", {"mcrs": [FACT | {"content": LARGE[:3_000] * 22}] * 50}),
        ("memory/propose", {"mcrs": [{LARGE[:3_000]: 1, "op": LARGE[:100]}] * 1_000}),
        ("memory/propose", {"mcrs": [FACT], "scope_filters": {"run_id": LARGE}}),
        ("milestone", {"reason": LARGE}),
        ("resume/snapshot", {"pointers": {LARGE: {}}}),
        ("resume/snapshot", {"pointers": {"at": LARGE}}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_refusal_is_short_and_does_not_give_back_what_it_refuses(
    service: Service, run_id: str, rest: str, body: dict[str, Any]
) -> None:
    alone = service.post(f"/runs/{run_id}/{rest}", body)
    assert 0 < len(refused(alone, 422, "SCHEMA")["faults"]) <= 20
    name = rest.rpartition("/")[2]
    phase = "SEAL" if name == "milestone" else "OPEN"
    by_bus = service.post(f"/aal/{name}", envelope(body | {"run_id": run_id}, phase))
    assert by_bus.json()["code"] == "SCHEMA"
    assert len(alone.content) < 10_000
    assert len(by_bus.content) < 10_000
    assert LARGE[:150].encode() not in alone.content + by_bus.content


def test_a_refused_value_stands_in_no_ledger(service: Service, run_id: str) -> None:
    for name in ("current_stage", "status"):
        patch = {"_schema_version": "2.1", "expected_seq": 0, "set": {name: "sk-live-secret"}}
        refused(service.post(f"/runs/{run_id}/step/update", {"patch": patch}), 422, "SCHEMA")
    events = service.get(f"/runs/{run_id}/ledger?limit=2").json()["events"]
    assert [event["event_type"] for event in events] == ["WS_UPDATE_REJECTED"] * 2
    assert "$.set.current_stage: a string of 14 characters" in events[0]["data"]["detail"]
    assert "sk-live" not in str(events)


def test_more_pinned_context_than_is_allowed_is_422(service: Service, run_id: str) -> None:
    item = {"content": "x", "timestamp": "2026-01-18T00:00:00Z", "priority": 1}
    items = [item | {"id": f"p{number}"} for number in range(100)]
    reply = service.post(f"/runs/{run_id}/step/update", {"patch": a_patch(pinned_context=items)})
    refused(reply, 422, "LIMIT")


def test_a_commit_outside_a_milestone_is_403_whatever_the_caller_allows(service: Service, run_id: str) -> None:
    batch_id = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": [FACT]}).json()["batch_id"]
    for allow in (False, True):
        body = {"batch_id": batch_id, "allow_outside_milestone": allow}
        refused(service.post(f"/runs/{run_id}/memory/commit", body), 403, "OUTSIDE_MILESTONE")
    [*_, last] = service.get(f"/runs/{run_id}/ledger?limit=1").json()["events"]
    assert last["event_type"] == "MEMORY_COMMIT_REFUSED"


@pytest.mark.parametrize("start", ["argument", "variable"])
def test_a_service_for_tests_commits_where_the_caller_allows_it(tmp_path_factory: Any, start: str) -> None:
    root = tmp_path_factory.mktemp("tests")
    arguments, variables = (["--testing"], {}) if start == "argument" else ([], {"AOS_CONTEXT_TESTING": "1"})
    with serving(root, *arguments, variables=variables) as service:
        run_id = service.boot()
        batch_id = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": [FACT]}).json()["batch_id"]
        body = {"batch_id": batch_id, "allow_outside_milestone": True}
        committed = service.post(f"/runs/{run_id}/memory/commit", body)
        assert (committed.status, len(committed.json()["items"])) == (200, 1)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_of_100_mb_is_413_and_the_service_goes_on(service: Service, declared: bool) -> None:
    headers = JSON | ({"Content-Length": str(100 << 20)} if declared else {"Transfer-Encoding": "chunked"})
    pieces = (b" " * (1 << 20) for _ in range(100))
    body = pieces if declared else (b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    refused(service.ask("POST", "/runs/boot", body, headers), 413, "TOO_LARGE")
    assert service.get("/health").status == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "/proc/self/environ", "./runs/../.."])
def test_a_pack_outside_the_folder_of_runs_is_403(service: Service, path: str) -> None:
    assert refused(service.post("/runs/resume/load", {"pack_path": path}), 403, "FORBIDDEN")["hint"]


def test_a_file_that_is_no_pack_is_422_and_one_that_is_not_there_404(service: Service, run_id: str) -> None:
    body = {"pack_path": f"{run_id}/ledger/run.v2.1.jsonl", "new_run_id": "n"}
    refused(service.post("/runs/resume/load", body), 422, "PACK")
    refused(service.post("/runs/resume/load", {"pack_path": f"{run_id}/none.zip"}), 404, "NOT_FOUND")


def test_a_pack_is_downloaded_whole_and_nothing_else_is(service: Service, run_id: str) -> None:
    packed = service.post(f"/runs/{run_id}/resume/snapshot", {"zip_pack": True}).json()
    reply = service.get(f"/runs/{run_id}/resume/pack_{packed['pack_id']}.zip")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(reply.content)) as pack:
        assert "manifest.v2.1.json" in pack.namelist()
    for name in ("..%2Fledger%2Frun.v2.1.jsonl", "%2e%2e%2f%2e%2e%2fmemory.v2.1.sqlite", "pack_x.zip"):
        refused(service.get(f"/runs/{run_id}/resume/{name}"), 404, "NOT_FOUND")


def test_the_ledger_is_read_from_the_end_or_from_a_line_on(service: Service) -> None:
    run_id = service.boot()
    for number in range(3):
        service.post(f"/runs/{run_id}/step/update", {"patch": a_patch(number)})

    def seqs(query: str) -> list[int]:
        return [event["seq"] for event in service.get(f"/runs/{run_id}/ledger{query}").json()["events"]]

    assert seqs("") == [1, 2, 3, 4]
    assert seqs("?limit=2") == [3, 4]
    assert seqs("?limit=2&after=1") == [2, 3]
    assert seqs("?limit=0") == []
    assert seqs("?after=4") == []


def test_episodes_are_listed_and_read_one_by_one(service: Service) -> None:
    run_id = service.boot()
    reached = service.post(f"/runs/{run_id}/milestone", {"reason": "checkpoint"}).json()
    [listed] = service.get(f"/runs/{run_id}/episodes").json()["episodes"]
    assert listed["reason"] == "checkpoint"
    assert service.get(f"/runs/{run_id}/episodes/1").json() == reached["episode"]
    for number in ("2", "0", "-1", "x", "9" * 30, "²"):
        path = f"/runs/{run_id}/episodes/" + "".join(f"%{byte:02x}" for byte in number.encode())
        refused(service.get(path), 404, "NOT_FOUND")


def waiting(service: Service, run_id: str, query: str = "") -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = service.get(f"/runs/{run_id}/memory/waiting{query}").json()["batches"]
    return batches


def test_the_batches_that_wait_are_those_that_a_milestone_of_the_run_can_commit(service: Service) -> None:
    run_id, other = service.boot(), service.boot()
    fact = FACT | {"content": f"Boxes of {run_id} are blue"}
    first = service.post(f"/runs/{other}/memory/propose", {"mcrs": [fact]}).json()
    same = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": [fact], "writer": "ada"}).json()
    assert (same["staged"], len(same["duplicates"])) == (1, 1)
    for _ in range(210):  # refused patches do not hide it
        service.post(f"/runs/{run_id}/step/update", {"patch": a_patch(99)})
    [batch] = waiting(service, run_id)
    assert batch["batch_id"] == same["batch_id"]
    assert (batch["changes"], batch["first"]) == (
        1,
        {"op": "add", "target_id": None, "content": fact["content"], "writer": "ada"},
    )
    reached = service.post(f"/runs/{run_id}/milestone", {"reason": "x", "memory_batch_id": batch["batch_id"]}).json()
    assert len(reached["memory"]["items"]) == 1
    assert waiting(service, run_id) == []
    known = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": [fact]}).json()
    assert (known["staged"], waiting(service, run_id)) == (0, [])
    assert [one["batch_id"] for one in waiting(service, other)] == [first["batch_id"]]


def test_of_many_batches_that_wait_the_last_are_listed_the_oldest_first(service: Service) -> None:
    run_id = service.boot()

    def propose(number: int) -> str:
        mcrs = [FACT | {"content": f"{number} of {run_id}" + "x" * 1_000, "scope": "run"}] * (number + 1)
        batch_id: str = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": mcrs}).json()["batch_id"]
        return batch_id

    batches = [propose(number) for number in range(4)]
    assert [one["batch_id"] for one in waiting(service, run_id)] == batches
    found = waiting(service, run_id, "?limit=2")
    assert [one["batch_id"] for one in found] == batches[2:]
    assert all(len(one["first"]["content"]) == 80 for one in found)
    assert refused(service.get(f"/runs/{run_id}/memory/waiting?limit=0"), 422, "SCHEMA")["faults"]


def test_what_waits_is_not_carried_by_a_pack(service: Service) -> None:
    run_id = service.boot()
    fact = FACT | {"content": f"Lids of {run_id} are green"}
    batch_id = service.post(f"/runs/{run_id}/memory/propose", {"mcrs": [fact]}).json()["batch_id"]
    packed = service.post(f"/runs/{run_id}/resume/snapshot", {}).json()["pack_path"]
    loaded = service.post("/runs/resume/load", {"pack_path": packed}).json()["run_id"]
    assert waiting(service, loaded) == []
    refused(service.post(f"/runs/{loaded}/milestone", {"reason": "x", "memory_batch_id": batch_id}), 404, "NOT_FOUND")


def test_a_brief_is_text_for_who_asks_for_it(service: Service, run_id: str) -> None:
    document = service.get(f"/runs/{run_id}/brief?budget=500").json()
    text = service.ask("GET", f"/runs/{run_id}/brief?budget=500", headers={"Accept": "text/markdown"})
    assert text.headers["Content-Type"].startswith("text/markdown")
    assert text.content.decode() == document["brief"]
    assert document["tokens"] <= document["budget"] == 500


def test_runs_are_listed_with_what_they_are_about(service: Service) -> None:
    run_id = service.boot("Be found.")
    listed = service.get("/runs").json()["runs"]
    assert (listed[0]["run_id"], listed[0]["objective"]) == (run_id, "Be found.")


def test_runs_and_episodes_are_listed_in_pages(service: Service) -> None:
    booted = [service.boot() for _ in range(5)]
    found: list[str] = []
    page = service.get("/runs?limit=2").json()
    while page["next"] is not None:
        assert len(page["runs"]) == 2
        found += [one["run_id"] for one in page["runs"]]
        page = service.get(f"/runs?limit=2&after={page['next']}").json()
    found += [one["run_id"] for one in page["runs"]]
    assert found[:5] == booted[::-1]
    assert found == [one["run_id"] for one in service.get("/runs?limit=1000").json()["runs"]]
    for number in range(3):
        service.post(f"/runs/{booted[0]}/milestone", {"reason": f"reached {number}"})

    def numbers(query: str) -> list[int]:
        return [one["number"] for one in service.get(f"/runs/{booted[0]}/episodes{query}").json()["episodes"]]

    assert [numbers(query) for query in ("", "?limit=2", "?limit=2&after=0", "?after=3", "?limit=0")] == [
        [1, 2, 3], [2, 3], [1, 2], [], [],
    ]  # fmt: skip


def test_a_listing_gives_no_more_than_is_asked_for_and_100_where_nothing_is(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs", memory=InMemoryMemoryStore())
    for number in range(LISTED + 1):
        runs.boot("x", run_id=f"run_{number}")
    with serving(tmp_path / "runs") as service:
        assert len(service.get("/runs").json()["runs"]) == LISTED


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example", "[::1"])
def test_a_name_that_is_not_the_services_own_is_403(service: Service, host: str) -> None:
    refused(service.ask("GET", "/runs", headers={"Host": host}), 403, "FORBIDDEN")


def test_a_page_of_another_site_is_403_and_the_services_own_is_not(service: Service) -> None:
    body = json.dumps({"objective": "x"}).encode()
    for origin in ("https://evil.example", "null", f"http://localhost:{service.port}"):
        refused(service.ask("POST", "/runs/boot", body, JSON | {"Origin": origin}), 403, "FORBIDDEN")
    assert service.ask("POST", "/runs/boot", body, JSON | {"Origin": service.url}).status == 200


def test_a_name_that_the_operator_gives_is_served(tmp_path_factory: Any) -> None:
    with serving(
        tmp_path_factory.mktemp("named"), variables={"AOS_CONTEXT_HOSTS": "Context.example, other"}
    ) as service:
        assert service.ask("GET", "/runs", headers={"Host": "context.example:80"}).status == 200


def test_two_services_on_one_folder_lose_no_update(tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("shared")
    with serving(root) as one, serving(root) as other:
        run_id = one.boot()
        address = f"/runs/{run_id}/step/update"

        def write(number: int) -> int:
            service, expected, tries = (one, other)[number % 2], 0, 0
            while (reply := service.post(address, {"patch": a_patch(expected, next_action=str(number))})).status == 409:
                expected, tries = reply.json()["current_seq"], tries + 1
            assert reply.status == 200
            return int(reply.json()["update_seq"])

        with ThreadPoolExecutor(8) as writers:
            reached = list(writers.map(write, range(40)))
        assert sorted(reached) == list(range(1, 41))
        assert one.get(f"/runs/{run_id}/ws").content == other.get(f"/runs/{run_id}/ws").content
        events = other.get(f"/runs/{run_id}/ledger?limit=1000").json()["events"]
        assert [event["event_type"] for event in events].count("WS_UPDATE_APPLIED") == 40

        batch_id = one.post(f"/runs/{run_id}/memory/propose", {"mcrs": [FACT]}).json()["batch_id"]
        body = {"reason": "together", "memory_batch_id": batch_id}
        with ThreadPoolExecutor(4) as callers:
            replies = list(callers.map(lambda n: (one, other)[n % 2].post(f"/runs/{run_id}/milestone", body), range(4)))
        assert [reply.status for reply in replies] == [200] * 4
        assert len({reply.json()["episode"]["episode_id"] for reply in replies}) == 1
        assert len(other.get(f"/runs/{run_id}/memory/search?q=pounds").json()["hits"]) == 1


# The bus's route


def envelope(payload: Any, phase: str = "OPEN", **members: Any) -> dict[str, Any]:
    whole = {"overlay": "aos_context", "phase": phase, "request_id": "018f0000-0000-7000-8000-000000000000"}
    return whole | {"payload": payload} | members


@pytest.mark.parametrize("phase", PHASES)
def test_the_service_itself_refuses_a_phase_that_the_manifest_does_not_have(service: Service, phase: str) -> None:
    allowed = {
        "ws": {"CLEAR", "OPEN", "ALIGN"},
        "boot": {"OPEN", "ALIGN"},
        "milestone": {"SEAL"},
        "commit": {"SEAL"},
    }
    for capability, phases in allowed.items():
        reply = service.post(f"/aal/{capability}", envelope({}, phase))
        assert reply.status == 200
        assert reply.json()["code"] == ("SCHEMA" if phase in phases else "PHASE")


def test_a_sealed_call_opens_the_gate_of_memory_only_where_the_bus_has_started_the_service(
    service: Service, run_id: str, tmp_path_factory: Any
) -> None:
    def commit(of: Service, run_id: str) -> dict[str, Any]:
        proposing = envelope({"run_id": run_id, "mcrs": [FACT]})
        batch_id = of.post("/aal/propose", proposing).json()["result"]["batch_id"]
        sealed = envelope({"run_id": run_id, "batch_id": batch_id}, "SEAL")
        answer: dict[str, Any] = of.post("/aal/commit", sealed).json()
        return answer

    assert commit(service, run_id)["code"] == "OUTSIDE_MILESTONE"
    with serving(tmp_path_factory.mktemp("bus"), variables={"OVERLAY_PORT": "1"}) as started:
        booted = started.post("/aal/boot", envelope({"objective": "x"})).json()["result"]
        assert commit(started, booted["run_id"])["ok"] is True


def test_on_the_bus_nothing_is_served_past_it(tmp_path_factory: Any) -> None:
    with serving(tmp_path_factory.mktemp("bus"), variables={"OVERLAY_PORT": "1"}) as service:
        assert service.get("/health").json()["paths"] == ["/aal/{capability}", "/health"]
        assert service.post("/aal/boot", envelope({"objective": "x", "run_id": "r"})).json()["ok"] is True
        for path in ("/", "/runs", "/runs/r/ws", "/static/index.html", "/health/", "/aal", "/nothing"):
            assert refused(service.get(path), 403, "FORBIDDEN")["hint"]
        for path in ("/runs/boot", "/runs/r/milestone", "/runs/r/memory/commit", "/runs/resume/load"):
            refused(service.post(path, {"reason": "x", "objective": "x"}), 403, "FORBIDDEN")


def test_a_service_with_a_token_serves_the_bus_alone(tmp_path: Path) -> None:
    variables = {"OVERLAY_PORT": "1", "OVERLAY_TOKEN": "s3cret"}
    booting = envelope({"objective": "x", "run_id": "r"})
    with serving(tmp_path, variables=variables) as service:
        assert service.get("/health").status == 200  # the bus asks for it without
        for wrong in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}, {"Authorization": "é"}):
            body = refused(service.post("/aal/boot", booting, **wrong), 403, "FORBIDDEN")
            assert body["hint"]
            assert "s3cret" not in json.dumps(body)
        reply = service.post("/aal/boot", booting, Authorization="Bearer s3cret")
        assert reply.json()["ok"] is True


def test_a_reply_to_the_bus_has_the_form_of_its_protocol(service: Service, run_id: str) -> None:
    good = service.post("/aal/ws", envelope({"run_id": run_id}, "CLEAR")).json()
    assert (good["ok"], good["result"]["run_id"]) == (True, run_id)
    stale = service.post("/aal/update", envelope({"run_id": run_id, "patch": a_patch(9)})).json()
    assert (stale["ok"], stale["code"], stale["retryable"]) == (False, "STALE", False)
    assert stale["result"]["expected_seq"] == 9


@pytest.mark.parametrize("error", errors.ContextError.__subclasses__())
def test_of_errors_only_that_others_are_busy_or_away_is_worth_another_try_of_the_bus(
    error: type[errors.ContextError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = error.__new__(error)
    errors.ContextError.__init__(raised, "so it is")

    def fail(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(bus_route, "perform", fail)
    with TestClient(create_app(Settings(root=tmp_path)), base_url="http://localhost") as client:
        answer = client.post("/aal/ws", json=envelope({"run_id": "r"}, "CLEAR")).json()
    assert (answer["code"], answer["retryable"]) == (error.code, error in {errors.BusyError, errors.UnreachableError})


@pytest.mark.parametrize(
    "body",
    [{}, envelope([]), envelope({}) | {"phase": 1}, envelope({}) | {"request_id": ""}, envelope({}, capability="boot")],
    ids=["empty", "payload", "phase", "request-id", "another"],
)
def test_what_is_no_envelope_is_said(service: Service, body: Any) -> None:
    answer = service.post("/aal/ws", body).json()
    assert (answer["ok"], answer["code"]) == (False, "BAD_REQUEST")
    assert service.post("/aal/fly", envelope({})).json()["code"] == "NOT_FOUND"


def test_a_milestone_that_is_repeated_is_known_by_the_bus_and_alone(service: Service) -> None:
    run_id = service.boot()
    sealed = envelope({"run_id": run_id, "reason": "x"}, "SEAL")
    replies = [service.post("/aal/milestone", sealed).json()["result"] for _ in range(2)]
    replies += [service.post(f"/runs/{run_id}/milestone", {"reason": "x", "request_id": "k"}).json() for _ in range(2)]
    named = sealed | {"payload": {"run_id": run_id, "reason": "x", "request_id": "k"}}
    replies.append(service.post("/aal/milestone", named).json()["result"])
    replies += [service.post(f"/runs/{run_id}/milestone", {"reason": "x"}).json() for _ in range(2)]
    assert [reply["already"] for reply in replies] == [False, True, False, True, True, False, False]
    assert [reply["episode"]["number"] for reply in replies] == [1, 1, 2, 2, 2, 3, 4]


def test_a_brief_on_the_bus_is_no_longer_than_memory_allows(service: Service, run_id: str) -> None:
    asked = envelope({"run_id": run_id, "budget": 900}, "CLEAR", memory={"max_context_tokens": 60})
    result = service.post("/aal/brief", asked).json()["result"]
    assert result["tokens"] <= result["budget"] == 60
