"""Server-sent events: what a reader is told, what a slow one loses, and when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from bus import events
from bus.events import TYPES, WAITING, Events, EventStream
from bus.model import Phase
from bus.tokens import SCOPES, Tokens
from tests.support import PATIENCE_S, misfits, until
from tests.test_serve import asked, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


def number(of: int) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"n": of}


def publish(hub: Events, *numbers: int) -> None:
    for one in numbers:
        hub.publish("stress", one, number(one))


async def taken(reader: events.Reader, count: int) -> list[bytes]:
    return [await reader.next() or b"" for _ in range(count)]


async def test_an_event_has_its_id_its_type_and_its_data_in_one_line() -> None:
    hub = Events()
    with hub.reader() as reader:
        hub.publish("stress", 7, lambda: {"text": "two\nlines"})
        assert await reader.next() == b'id: 7\nevent: stress\ndata: {"text":"two\\nlines"}\n\n'


async def test_a_new_reader_is_told_the_newest_event_at_once() -> None:
    hub = Events()
    publish(hub, 1, 2)
    with hub.reader() as reader:
        publish(hub, 3)
        assert await taken(reader, 2) == [events.spelled("stress", n, {"n": n}) for n in (2, 3)]


async def test_an_event_is_made_once_for_all_readers_and_not_at_all_without_any() -> None:
    hub, made = Events(), []
    hub.publish("stress", 1, lambda: made.append(1) or {})  # type: ignore[func-returns-value]
    assert made == []
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(hub.reader())
        made.clear()
        hub.publish("stress", 2, lambda: made.append(2) or {})  # type: ignore[func-returns-value]
        assert (made, hub.readers) == ([2], 5)
    assert hub.readers == 0


async def test_a_slow_reader_loses_the_oldest_and_another_nothing() -> None:
    hub, got = Events(), []
    with hub.reader() as slow, hub.reader() as quick:
        for one in range(3 * WAITING):
            publish(hub, one)
            got += await taken(quick, 1)
        assert got == [events.spelled("stress", n, {"n": n}) for n in range(3 * WAITING)]
        assert await taken(slow, WAITING) == got[-WAITING:]


async def test_a_reader_is_told_of_its_types_alone() -> None:
    hub = Events()
    hub.publish("other", 1, number(1))
    with hub.reader(["stress"]) as reader:
        hub.publish("other", 2, number(2))
        publish(hub, 1)
        assert await reader.next() == events.spelled("stress", 1, {"n": 1})


async def test_without_an_event_a_comment_keeps_the_connection_alive() -> None:
    hub = Events()
    with hub.reader() as reader:
        assert await reader.next(keep_alive_s=0.0) == b":\n\n"
        publish(hub, 1)
        assert await reader.next(keep_alive_s=0.0) == events.spelled("stress", 1, {"n": 1})


async def test_the_end_is_not_kept_waiting_by_what_was_not_read() -> None:
    hub = Events()
    with hub.reader() as reader:
        publish(hub, 1, 2)
        hub.close()
        assert await reader.next() is None
    with hub.reader() as late:
        assert await late.next() is None


class Client:
    """Of an ASGI application: what it was sent, and when it takes more and goes."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.takes = asyncio.Event()
        self.takes.set()
        self.goes = asyncio.Event()

    async def send(self, message: Any) -> None:
        await self.takes.wait()
        self.sent.append(message)

    async def receive(self) -> dict[str, Any]:
        await self.goes.wait()
        return {"type": "http.disconnect"}

    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


@contextlib.asynccontextmanager
async def streaming(hub: Events, client: Client, may_go_on: Callable[[], bool] = lambda: True) -> Any:
    stream = EventStream(hub, TYPES, may_go_on)
    scope = {"type": "http", "method": "GET"}
    task = asyncio.ensure_future(stream(scope, client.receive, client.send))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_stream_ends_with_the_events() -> None:
    hub, client = Events(), Client()
    async with streaming(hub, client) as task:
        publish(hub, 1)
        await until(lambda: b"id: 1" in client.body())
        hub.close()
        await task
    assert client.sent[-1] == {"type": "http.response.body", "body": b""}
    assert hub.readers == 0


async def test_a_stream_ends_when_its_client_goes_though_it_takes_nothing_any_more() -> None:
    hub, client = Events(), Client()
    async with streaming(hub, client) as task:
        await until(lambda: hub.readers == 1)
        client.takes.clear()
        publish(hub, *range(100))
        client.goes.set()
        await task
    assert hub.readers == 0


async def test_a_stream_ends_with_the_right_to_it() -> None:
    hub, client, rights = Events(), Client(), [True, False]
    async with streaming(hub, client, lambda: rights.pop(0)) as task:
        publish(hub, 1)
        await until(lambda: b"id: 1" in client.body())
        publish(hub, 2)
        await task
    assert b"id: 2" not in client.body()


async def test_a_fault_in_sending_is_not_swallowed() -> None:
    hub, client = Events(), Client()

    def failing() -> bool:
        raise ZeroDivisionError

    async with streaming(hub, client, failing) as task:
        publish(hub, 1)
        with pytest.raises(ZeroDivisionError):
            await task


# With a server


@contextlib.contextmanager
def listening(
    address: str, path: str = "/events", *, token: str | None = None
) -> Iterator[tuple[http.client.HTTPResponse, Iterator[dict[str, str]]]]:
    """The answer, and its events: fields by name."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        response = connection.getresponse()
        yield response, fields_of(response)


def fields_of(response: http.client.HTTPResponse) -> Iterator[dict[str, str]]:
    fields: dict[str, str] = {}
    for line in response:
        name, colon, value = line.decode().rstrip("\n").partition(": ")
        if colon:
            fields[name] = value
        elif fields:
            yield fields
            fields = {}


def test_a_server_tells_its_stress_at_each_sample_to_many_readers_alike(tmp_path: Path) -> None:
    with (
        serving(tmp_path, stress_period_s="0.02") as (server, address),
        listening(address) as (response, first),
        listening(address, "/events?types=stress") as (_, second),
    ):
        assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        assert response.headers["Cache-Control"] == "no-store"
        assert int(next(first)["retry"]) > 0
        told = [next(first) for _ in range(5)]
        assert [event["event"] for event in told] == ["stress"] * 5
        ids = [int(event["id"]) for event in told]
        assert ids == list(range(ids[0], ids[0] + 5))
        told_second = [next(second) for _ in range(6)][2:]  # without `retry`, and what was told at once
        same = {event["id"]: event for event in told}
        shared = [event for event in told_second if event["id"] in same]
        assert shared
        assert all(same[event["id"]] == event for event in shared)
        for event in told:
            data = json.loads(event["data"])
            assert misfits("stress", data) == []
            assert data["scheduler"]["running"] == 0
            assert str(data["sampled"]) == event["id"]
        server.send_signal(signal.SIGTERM)
        assert all(event["event"] == "stress" for event in first)  # and then it is over, as it should be
        _, log = server.communicate(timeout=PATIENCE_S)
    assert (server.returncode, "Traceback" in log, "Error" in log) == (0, False, False)


def test_readers_that_do_not_read_keep_no_server_from_ending(tmp_path: Path) -> None:
    with serving(tmp_path, stress_period_s="0.01") as (server, address), contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(listening(address))
        with listening(address) as (_, told):
            assert [next(told) for _ in range(20)]
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=PATIENCE_S)
    assert (server.returncode, "Traceback" in log) == (0, False)


def test_only_administrators_listen_and_no_longer_than_they_are(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / ".aal")
    with serving(tmp_path, stress_period_s="0.02") as (_, address):
        text = {
            name: tokens.create(name, overlays=("*",), phases=tuple(Phase), scopes=scopes)[1]
            for name, scopes in (("caller", ("invoke",)), ("boss", SCOPES))
        }
        assert asked(address, "GET", "/events")[0] == 401
        assert asked(address, "GET", "/events", token=text["caller"])[0] == 403
        with listening(address, token=text["boss"]) as (_, told):
            assert [next(told) for _ in range(3)]
            tokens.revoke("boss")
            rest = list(told)  # which has an end
            assert all(event["event"] == "stress" for event in rest)
        assert asked(address, "GET", "/events", token=text["boss"])[0] == 401


def test_types_that_there_are_not_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, address):
        for query in ("types=weather", "types=stress,", "kinds=stress"):
            status, body = asked(address, "GET", f"/events?{query}")
            assert (status, body["code"]) == (400, "ERR_BAD_QUERY")
        connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
        connection.request("HEAD", "/events")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
        connection.close()
