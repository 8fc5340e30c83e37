"""Where requests may go: not to the metadata of clouds, not beyond the list of targets, not where a redirect points."""

from __future__ import annotations

import asyncio
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from runners.http_client import (
    AddressError,
    Answer,
    ConnectError,
    DeadlineError,
    ForbiddenError,
    HttpClient,
    Request,
)
from tests.support import PATIENCE_S, http_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

METADATA = "169.254.169.254"


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()


async def fetch(client: HttpClient, url: str, *, token: str | None = None) -> Answer:
    request = Request("GET", url, {}, "the-id", None, token)
    return await client.fetch(request, deadline=time.monotonic() + PATIENCE_S, limit=1024)


class Ok(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "url",
    [
        f"http://{METADATA}/latest/meta-data/",
        f"https://{METADATA}:8443/",
        f"http://user:word@{METADATA}/",
        "http://169.254.0.1/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[fd00:ec2::254]/",
        "http://[fd20:ce::254]/",
        "http://100.100.100.200/",
        "http://168.63.129.16/",
        f"http://[::ffff:{METADATA}]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[2002:a9fe:a9fe::1]/",
        f"http://[64:ff9b::{METADATA}]/",
    ],
)
async def test_an_address_of_a_clouds_metadata_is_refused(client: HttpClient, url: str) -> None:
    with pytest.raises(ForbiddenError, match="nothing is sent to link-local addresses"):
        await fetch(client, url)


@pytest.mark.parametrize("url", ["http://2852039166/", "http://0xA9FEA9FE/", f"http://{METADATA}./"])
async def test_an_odd_spelling_of_a_metadata_address_does_not_pass(client: HttpClient, url: str) -> None:
    """The look-up of names takes such spellings for the address, or the client takes them for none."""
    with pytest.raises((AddressError, ConnectError)) as refused:
        await fetch(client, url)
    assert isinstance(refused.value, AddressError) or "could not be reached" in str(refused.value)


@pytest.mark.parametrize("addresses", [[METADATA], ["127.0.0.1", METADATA], ["fe80::2"], ["::ffff:169.254.0.9"]])
async def test_a_name_that_stands_for_a_forbidden_address_is_refused_once_it_is_resolved(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    def resolve(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        assert host == "innocent.example"
        return [_info(address, port) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for _ in range(2):
        with pytest.raises(ForbiddenError, match="metadata"):
            await fetch(client, "http://innocent.example/")


def _info(address: str, port: int) -> tuple[object, ...]:
    if ":" in address:
        return socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)
    return socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_other_addresses_are_called_by_number_and_by_name(client: HttpClient, host: str) -> None:
    with http_service(Ok) as url:
        answer = await fetch(client, url.replace("127.0.0.1", host))
    assert (answer.status, answer.body) == (200, b"{}")


@pytest.mark.parametrize(
    ("targets", "url", "reached"),
    [
        ({"127.0.0.1"}, "http://127.0.0.1:{port}/", True),
        ({"LOCALHOST:{port}"}, "http://localhost:{port}/", True),
        ({"localhost"}, "http://LocalHost:{port}/", True),
        ({"example.org", "127.0.0.1:{port}"}, "http://127.0.0.1:{port}/a?b=c", True),
        ({"127.0.0.1:1"}, "http://127.0.0.1:{port}/", False),
        ({"example.org"}, "http://127.0.0.1:{port}/", False),
        ({"example.org"}, "http://example.org@127.0.0.1:{port}/", False),
        ({"example.org"}, "http://127.0.0.1:{port}/example.org", False),
    ],
)
async def test_with_targets_only_they_are_called(targets: set[str], url: str, *, reached: bool) -> None:
    with http_service(Ok) as base:
        port = urlsplit(base).port
        client = HttpClient(frozenset(target.format(port=port) for target in targets))
        try:
            if reached:
                assert (await fetch(client, url.format(port=port))).status == 200
            else:
                with pytest.raises(ForbiddenError, match="none of the targets"):
                    await fetch(client, url.format(port=port))
        finally:
            await client.close()


@pytest.mark.parametrize(
    ("target", "url"), [("[::1]", "http://[::1]:1/"), ("[::1]:1", "http://[::1]:1/"), ("x:443", "https://x/")]
)
async def test_a_target_is_written_as_in_an_address(target: str, url: str) -> None:
    client = HttpClient(frozenset({target}))
    with pytest.raises(ConnectError):  # it may be called, and nobody is there
        await fetch(client, url)
    await client.close()


async def test_a_service_of_the_bus_itself_needs_to_be_no_target() -> None:
    client = HttpClient(frozenset({"example.org"}))
    with http_service(Ok) as url:
        assert (await fetch(client, url, token="a-token")).status == 200
        with pytest.raises(ForbiddenError):
            await fetch(client, url)
    await client.close()


async def test_a_redirect_is_told_and_never_followed_by_the_client(client: HttpClient) -> None:
    asked: list[str] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://{METADATA}/latest/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http_service(Redirecting) as url:
        answer = await fetch(client, f"{url}/here")
    assert (answer.status, answer.location, asked) == (302, f"http://{METADATA}/latest/", ["/here"])


async def test_each_request_has_its_own_deadline_whatever_the_others_have(client: HttpClient) -> None:
    """They share a timer, so each comes at a moment when it is set for another."""
    over: list[int] = []

    async def ask(url: str, left_ms: int) -> None:
        with pytest.raises(DeadlineError):
            await client.fetch(Request("GET", url, {}, "x", None), deadline=time.monotonic() + left_ms / 1000, limit=9)
        over.append(left_ms)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        await asyncio.gather(*(ask(url, left_ms) for left_ms in (600, 200, 800, 400)))
        await ask(url, 1)
    assert over == [200, 400, 600, 800, 1]
