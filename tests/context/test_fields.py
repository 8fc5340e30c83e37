"""What the caller names is kept: each field is read back from where it stands, however it was sent."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.context.served import FACT, Service, a_patch, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESSES = {
    "boot": "/runs/boot",
    "load": "/runs/resume/load",
    "update": "/runs/{run_id}/step/update",
    "milestone": "/runs/{run_id}/milestone",
    "propose": "/runs/{run_id}/memory/propose",
    "commit": "/runs/{run_id}/memory/commit",
    "snapshot": "/runs/{run_id}/resume/snapshot",
}


class Send(Protocol):
    """Asks for a capability, and gives what it answers."""

    def __call__(self, capability: str, **payload: Any) -> dict[str, Any]: ...


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Alone, and for tests, so that it takes `commit`."""
    with serving(tmp_path_factory.mktemp("fields") / "runs", "--testing") as given:
        yield given


@pytest.fixture(scope="module")
def on_bus(service: Service) -> Iterator[Service]:
    """As a bus starts it, on the same runs."""
    with serving(service.root, variables={"OVERLAY_PORT": "1"}) as given:
        yield given


@pytest.fixture(params=["api", "bus"])
def send(service: Service, on_bus: Service, request: pytest.FixtureRequest) -> Send:
    """By the address for programs, and by the bus's envelope."""

    def by_api(capability: str, **payload: Any) -> dict[str, Any]:
        where = {name: payload.pop(name) for name in ("run_id",) if "{run_id}" in ADDRESSES[capability]}
        reply = service.post(ADDRESSES[capability].format(**where), payload)
        assert reply.status == 200, reply.content
        answer: dict[str, Any] = reply.json()
        return answer

    def by_bus(capability: str, **payload: Any) -> dict[str, Any]:
        phase = "SEAL" if capability in {"milestone", "commit"} else "OPEN"
        envelope = {"overlay": "aos_context", "phase": phase, "request_id": str(uuid.uuid4()), "payload": payload}
        answer: dict[str, Any] = on_bus.post(f"/aal/{capability}", envelope).json()
        assert answer["ok"], answer
        found: dict[str, Any] = answer["result"]
        return found

    return by_api if request.param == "api" else by_bus


@pytest.fixture
def run_id(send: Send) -> str:
    return str(send("boot", objective="Keep what callers name.")["run_id"])


def a_fact(request: pytest.FixtureRequest, **members: Any) -> dict[str, Any]:
    """One that no other test proposes."""
    return FACT | {"content": f"Known from {request.node.name}"} | members


def event(service: Service, run_id: str, type_: str) -> dict[str, Any]:
    """The last event of the type in the run's ledger."""
    events = service.get(f"/runs/{run_id}/ledger?limit=100").json()["events"]
    found: dict[str, Any] = [one for one in events if one["event_type"] == type_][-1]
    return found


def test_the_actor_of_every_change_stands_in_its_event(
    send: Send, service: Service, request: pytest.FixtureRequest
) -> None:
    run_id = send("boot", objective="Be changed.", actor="booter")["run_id"]
    send("update", run_id=run_id, patch=a_patch(), actor="updater")
    batch_id = send("propose", run_id=run_id, mcrs=[a_fact(request)], actor="proposer")["batch_id"]
    send("commit", run_id=run_id, batch_id=batch_id, allow_outside_milestone=True, actor="committer")
    send("milestone", run_id=run_id, reason="changed", actor="keeper")
    packed = send("snapshot", run_id=run_id, actor="packer")
    loaded = send("load", pack_path=packed["pack_path"], actor="loader")["run_id"]
    events = service.get(f"/runs/{loaded}/ledger").json()["events"]
    assert [(one["event_type"], one["actor"]) for one in events] == [
        ("RUN_BOOTED", "booter"),
        ("WS_UPDATE_APPLIED", "updater"),
        ("MEMORY_PROPOSED", "proposer"),
        ("MEMORY_COMMITTED", "committer"),
        ("EPISODE_CREATED", "keeper"),
        ("RESUME_PACK_LOADED", "loader"),
    ]
    assert event(service, run_id, "RESUME_PACK_CREATED")["actor"] == "packer"


def test_the_actor_of_a_milestone_stands_at_the_memory_that_it_commits_too(
    send: Send, service: Service, run_id: str, request: pytest.FixtureRequest
) -> None:
    batch_id = send("propose", run_id=run_id, mcrs=[a_fact(request)])["batch_id"]
    send("milestone", run_id=run_id, reason="known", memory_batch_id=batch_id, actor="keeper")
    assert event(service, run_id, "MEMORY_COMMITTED")["actor"] == "keeper"


def test_the_actor_of_what_is_refused_stands_in_its_event(send: Send, service: Service, run_id: str) -> None:
    with pytest.raises(AssertionError, match="STALE"):
        send("update", run_id=run_id, patch=a_patch(7), actor="late")
    assert event(service, run_id, "WS_UPDATE_REJECTED")["actor"] == "late"


def committed(send: Send, run_id: str, **payload: Any) -> dict[str, Any]:
    """The memory that comes of a proposal."""
    batch_id = send("propose", run_id=run_id, **payload)["batch_id"]
    reached = send("milestone", run_id=run_id, reason="known", memory_batch_id=batch_id)
    [item] = reached["memory"]["items"]
    found: dict[str, Any] = item
    return found


def test_the_writer_of_a_proposal_stands_in_the_memory(send: Send, run_id: str, request: pytest.FixtureRequest) -> None:
    assert committed(send, run_id, mcrs=[a_fact(request)], writer="scribe")["writer"] == "scribe"


def test_the_writer_in_a_change_comes_before_that_of_its_proposal(
    send: Send, run_id: str, request: pytest.FixtureRequest
) -> None:
    mcrs = [a_fact(request, writer="author")]
    assert committed(send, run_id, mcrs=mcrs, writer="scribe")["writer"] == "author"


def test_the_writer_in_scope_filters_stands_in_the_memory(
    send: Send, run_id: str, request: pytest.FixtureRequest
) -> None:
    where = {"writer": "filter", "run_id": run_id}
    assert committed(send, run_id, mcrs=[a_fact(request)], scope_filters=where)["writer"] == "filter"


def test_scope_filters_that_name_the_runs_own_place_are_that_of_the_memory(
    send: Send, service: Service, run_id: str, request: pytest.FixtureRequest
) -> None:
    task_id = service.get(f"/runs/{run_id}/ws").json()["task_id"]
    where = {"run_id": run_id, "task_id": task_id}
    for scope, place in (("run", (task_id, run_id)), ("task", (task_id, None)), ("global", (None, None))):
        item = committed(send, run_id, mcrs=[a_fact(request, scope=scope)], scope_filters=where)
        assert (item["scope"], item["task_id"], item["run_id"]) == (scope, *place)


def test_scope_filters_that_name_another_place_are_refused(
    send: Send, run_id: str, request: pytest.FixtureRequest
) -> None:
    for name in ("run_id", "task_id"):
        with pytest.raises(AssertionError, match=f"scope_filters.{name}"):
            send("propose", run_id=run_id, mcrs=[a_fact(request)], scope_filters={name: "another"})


def test_the_next_entry_point_of_a_milestone_stands_in_its_episode(send: Send, service: Service, run_id: str) -> None:
    number = send("milestone", run_id=run_id, reason="here", next_entry_point="Go on there.")["episode"]["number"]
    assert service.get(f"/runs/{run_id}/episodes/{number}").json()["next_entry_point"] == "Go on there."


def test_the_pointers_of_a_snapshot_stand_in_its_manifest(send: Send, service: Service, run_id: str) -> None:
    pointers = {"ledger_last_seq": 42, "where": "look"}
    packed = send("snapshot", run_id=run_id, pointers=pointers, zip_pack=False)
    assert packed["manifest"]["pointers"] == pointers
    [manifest] = (service.root / run_id / "resume").glob("pack_*/manifest.v2.1.json")
    assert json.loads(manifest.read_bytes())["pointers"] == pointers
