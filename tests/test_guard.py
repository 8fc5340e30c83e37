"""Who is let in: by the name that the server is called, by the page that sends, by the token."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from bus import guard
from bus.callers import Callers
from bus.errors import BusError, CallerError
from bus.guard import PLACES_KEPT, Guard, Place
from bus.model import Phase
from bus.settings import Settings
from bus.tokens import SCOPES, Rate, Tokens

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import Message, Scope

    from bus.tokens import Scope as Right

HERE = ("127.0.0.1", 8000)


def a_scope(
    method: str = "GET",
    path: str = "/",
    *,
    client: tuple[str, int] | None = ("127.0.0.1", 50000),
    server: tuple[str, int] | None = HERE,
    **headers: str,
) -> Scope:
    """A request to the server's own name; a header's `_` is a `-`."""
    named = {"host": "localhost:8000"} | headers
    fields = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in named.items()]
    return {"type": "http", "method": method, "path": path, "client": client, "server": server, "headers": fields}


class Door:
    """A guard of a state folder, and what it counted."""

    def __init__(self, state: Path, **settings: Any) -> None:
        self.refused: Counter[str] = Counter()
        self.tokens = Tokens(state)
        self.guard = Guard(Settings(state=state, **settings), Callers(state), self.refused)

    def place(self, scope: Scope) -> Place:
        return self.guard.place(scope, dict(scope["headers"]))

    def refusal(self, scope: Scope) -> str:
        with pytest.raises(BusError) as refused:
            self.place(scope)
        return refused.value.code

    def token(self, name: str = "ci", scopes: tuple[Right, ...] = SCOPES, rate: Rate | None = None) -> str:
        return "Bearer " + self.tokens.create(name, overlays=("*",), phases=tuple(Phase), scopes=scopes, rate=rate)[1]


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


# --- The name that the server is called --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"]
)
def test_loopback_goes_by_its_names_with_any_port(door: Door, host: str) -> None:
    assert door.place(a_scope(host=host)) == Place()
    assert not door.refused


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "localhost@evil.example",
        "localhost:8000@evil.example",
        "localhost:8000:8000",
        "localhost:x",
        "localhost,evil.example",
        "localhost/",
        "127.0.0.2",
        "127.0.0.1.nip.io",
        "2130706433",
        "[::2]",
        "[::1",
        "::1",
        "192.0.2.1:8000",
        "löcalhost",
    ],
)
def test_any_other_name_is_refused_and_counted(door: Door, host: str) -> None:
    for _ in range(2):
        assert door.refusal(a_scope(host=host)) == "ERR_ORIGIN"
    assert door.refused == {"ERR_ORIGIN": 2}


def test_a_request_without_a_name_is_refused(door: Door) -> None:
    scope = a_scope()
    scope["headers"] = []
    assert door.refusal(scope) == "ERR_ORIGIN"


@pytest.mark.parametrize("name", ["host", "origin", "sec-fetch-site", "authorization"])
def test_what_a_request_may_say_once_it_says_once(door: Door, name: str) -> None:
    scope = a_scope(origin="http://localhost:8000", sec_fetch_site="same-origin", authorization="Bearer x")
    assert door.place(scope) == Place()
    scope["headers"].append(next(header for header in scope["headers"] if header[0] == name.encode()))
    assert door.refusal(scope) == "ERR_BAD_HTTP"
    assert door.refused == {"ERR_BAD_HTTP": 1}


def test_other_headers_may_come_twice(door: Door) -> None:
    scope = a_scope(cookie="a=1")
    scope["headers"].append((b"cookie", b"b=2"))
    assert door.place(scope) == Place()


def test_the_operator_names_further_hosts_and_the_address_that_it_listens_on(tmp_path: Path) -> None:
    door = Door(tmp_path, host="192.0.2.7", hosts="bus.example, Other.Example")
    for host in ("bus.example", "other.example:443", "192.0.2.7:8000", "localhost"):
        assert door.place(a_scope(host=host)) == Place()
    assert door.refusal(a_scope(host="192.0.2.8")) == "ERR_ORIGIN"


@pytest.mark.parametrize(
    ("listens", "server", "host"),
    [("0.0.0.0", "192.0.2.7", "192.0.2.7:8000"), ("::", "2001:db8::7", "[2001:DB8::7]:8000")],
)
def test_who_listens_everywhere_goes_by_the_address_that_was_called(
    tmp_path: Path, listens: str, server: str, host: str
) -> None:
    door = Door(tmp_path, host=listens)
    assert door.refusal(a_scope(host=host, server=("198.51.100.1", 8000))) == "ERR_ORIGIN"
    assert door.refusal(a_scope(host=host, server=None)) == "ERR_ORIGIN"
    assert door.place(a_scope(host=host, server=(server, 8000))) == Place()


# --- The page that sends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
def test_the_servers_own_pages_may_send(door: Door, site: str) -> None:
    scope = a_scope("POST", origin="http://localhost:8000", sec_fetch_site=site)
    assert door.place(scope) == Place()


def test_a_page_behind_a_proxy_with_tls_may_send(tmp_path: Path) -> None:
    scope = a_scope("POST", host="bus.example", origin="https://bus.example")
    assert Door(tmp_path, hosts="bus.example").place(scope) == Place()


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://localhost"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "localhost:8000"},
        {"origin": "http://localhost:8000.evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "Cross-Site"},
        {"origin": "http://localhost:8000", "sec_fetch_site": "cross-site"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_foreign_pages_may_not(door: Door, method: str, headers: dict[str, Any]) -> None:
    for _ in range(2):
        assert door.refusal(a_scope(method, **headers)) == "ERR_ORIGIN"
    assert door.refused == {"ERR_ORIGIN": 2}


def test_a_listed_origin_may_send_read_and_ask_first(tmp_path: Path) -> None:
    door = Door(tmp_path, origins="https://app.example, http://Localhost:3000/")
    for origin in ("https://app.example", "http://localhost:3000"):
        scope = a_scope("POST", origin=origin, sec_fetch_site="cross-site")
        place = door.place(scope)
        assert dict(place.headers)[b"access-control-allow-origin"] == origin.encode()
        assert not place.allows_preflight(scope, dict(scope["headers"]))
        question = a_scope("OPTIONS", origin=origin, access_control_request_method="POST")
        assert door.place(question).allows_preflight(question, dict(question["headers"]))
    assert door.refusal(a_scope("POST", origin="https://app.example.evil.example")) == "ERR_ORIGIN"


def test_without_listed_origins_no_browser_is_told_anything(door: Door) -> None:
    question = a_scope("OPTIONS", origin="http://localhost:8000", access_control_request_method="POST")
    place = door.place(question)
    assert place.headers == []
    assert not place.allows_preflight(question, dict(question["headers"]))


def test_verdicts_are_kept_for_so_many_places_only(door: Door) -> None:
    for port in range(3 * PLACES_KEPT):
        assert door.place(a_scope(host=f"localhost:{port}")) == Place()
        assert len(vars(door.guard)["_places"]) <= PLACES_KEPT
    assert door.refusal(a_scope(host="evil.example:1")) == "ERR_ORIGIN"


# --- The token ---------------------------------------------------------------------------------------------------


def identify(door: Door, scope: Scope) -> str | None:
    return door.guard.identify(scope, dict(scope["headers"])).name


@pytest.mark.parametrize("client", [("127.0.0.1", 1), ("127.9.9.9", 1), ("::1", 1), ("::ffff:127.0.0.1", 1), None])
def test_without_tokens_this_machine_is_served(door: Door, client: tuple[str, int] | None) -> None:
    assert identify(door, a_scope(client=client)) is None


@pytest.mark.parametrize("client", ["192.0.2.1", "10.0.0.1", "::ffff:192.0.2.1", "2001:db8::1", "fe80::1%eth0"])
def test_without_tokens_no_other_machine_is_served_however_the_server_was_started(door: Door, client: str) -> None:
    with pytest.raises(CallerError) as refused:
        identify(door, a_scope(client=(client, 1)))
    assert refused.value.entry.http_status == 401
    assert door.refused == {"ERR_UNAUTHORIZED": 1}


def test_a_token_is_asked_for_from_the_first_one_on_and_a_revoked_one_is_refused_at_once(door: Door) -> None:
    scope = a_scope()
    assert identify(door, scope) is None
    header = door.token("ci")
    with pytest.raises(CallerError):
        identify(door, scope)
    known = a_scope(authorization=header, client=("192.0.2.1", 1))
    assert identify(door, known) == "ci"
    door.token("other")
    door.tokens.revoke("ci")
    with pytest.raises(CallerError):
        identify(door, known)
    assert door.refused == {"ERR_UNAUTHORIZED": 2}


def test_a_file_of_tokens_that_makes_no_sense_lets_nobody_in(door: Door, tmp_path: Path) -> None:
    header = door.token()
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(BusError) as refused:
        identify(door, a_scope(authorization=header))
    assert door.refused == {refused.value.code: 1}


def test_a_token_is_held_to_its_scopes_and_its_rate(door: Door) -> None:
    scope = a_scope(authorization=door.token(scopes=("invoke",), rate=Rate(1, "h")))
    caller = door.guard.identify(scope, dict(scope["headers"]))
    with pytest.raises(CallerError, match="admin"):
        door.guard.allow(caller, "admin")  # which is paid for, too: a call's refusal leaves a line
    with pytest.raises(CallerError) as refused:
        door.guard.allow(caller, None)
    assert (refused.value.code, refused.value.entry.http_status) == ("ERR_RATE_LIMITED", 429)
    assert refused.value.retry_after_s
    assert not door.refused


def test_what_comes_too_soon_again_is_only_counted_and_other_refusals_never(door: Door) -> None:
    scope = a_scope(authorization=door.token(rate=Rate(1, "h")))
    caller = door.guard.identify(scope, dict(scope["headers"]))
    door.guard.allow(caller, "invoke")
    with pytest.raises(CallerError) as refused:
        door.guard.allow(caller, "invoke")
    assert [door.guard.is_only_counted(refused.value, caller) for _ in range(3)] == [False, True, True]
    assert not door.guard.is_only_counted(CallerError("ERR_FORBIDDEN", "not yours"), caller)
    assert door.refused == {"ERR_RATE_LIMITED": 2}


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/", None),
        ("GET", "/overlays", None),
        ("GET", "/overlays/psyfi", None),
        ("GET", "/openapi.json", None),
        ("HEAD", "/overlays/psyfi", None),
        ("POST", "/invoke/psyfi", None),
        ("POST", "/invoke/psyfi/ping", None),
        ("GET", "/provenance", "read-ledger"),
        ("HEAD", "/provenance/3", "read-ledger"),
        ("POST", "/provenance/3/replay", "replay"),
        ("GET", "/metrics", "admin"),
        ("GET", "/stress", "admin"),
        ("GET", "/events", "admin"),
        ("GET", "/of/a/plugin", "admin"),
        ("GET", "//overlays", "admin"),
        ("GET", "/overlaysx", "admin"),
        ("GET", "/overlays/", "admin"),
        ("POST", "/overlays", "admin"),
        ("DELETE", "/overlays/psyfi", "admin"),
        ("OPTIONS", "/overlays/psyfi", "admin"),
        ("GET", "/overlays/psyfi/logs", "admin"),
        ("POST", "/overlays/psyfi/disable", "admin"),
        ("POST", "/openapi.json", "admin"),
        ("GET", "/openapi.json/x", "admin"),
        ("GET", "/invoke/psyfi", "admin"),
        ("POST", "/invoke/psyfi/ping/x", "admin"),
        ("POST", "/provenance", "admin"),
        ("GET", "/provenance/3/x", "admin"),
        ("POST", "/health", "admin"),
        ("GET", "/health/of/a/plugin", "admin"),
        ("GET", "/ready/", "admin"),
    ],
)
def test_each_address_needs_its_scope_and_an_unknown_one_that_of_an_administrator(
    method: str, path: str, right: Right | None
) -> None:
    assert guard.right_for(a_scope(method, path)) == right
    assert not guard.needs_nobody(a_scope(method, path))


def test_whoever_reaches_the_server_may_ask_whether_it_lives() -> None:
    assert guard.needs_nobody(a_scope(path="/health"))
    assert guard.needs_nobody(a_scope(path="/ready"))
    assert guard.needs_nobody({**a_scope(path="/below/ready"), "root_path": "/below"})
    assert not guard.needs_nobody(a_scope(path="/healthy"))
    assert not guard.needs_nobody({**a_scope(path="/belowready"), "root_path": "/below"})


def test_a_web_socket_is_for_administrators_whatever_its_address() -> None:
    for path in ("/health", "/overlays", "/provenance", "/invoke/psyfi"):
        scope = {**a_scope(path=path), "type": "websocket"}
        del scope["method"]
        assert guard.right_for(scope) == "admin"
        assert not guard.needs_nobody(scope)


# --- What is said back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["abc", "018f-x_y.z~+/=:", "x" * 64])
def test_a_clients_own_request_id_is_repeated(value: str) -> None:
    assert guard.own_request_id({b"x-request-id": value.encode()}) == value.encode()


@pytest.mark.parametrize("value", ["", "x" * 65, "a b", "a\tb", "a\r\nX: y", "<script>", "ä", '"'])
def test_what_is_no_plain_word_is_not_repeated(value: str) -> None:
    assert guard.own_request_id({b"x-request-id": value.encode()}) is None
    assert guard.own_request_id({}) is None


async def test_headers_are_added_to_the_beginning_of_an_answer_unless_it_has_them() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    adding = guard.adding(send, [(b"x-a", b"1"), (b"x-b", b"2")])
    await adding({"type": "http.response.start", "status": 200, "headers": [(b"X-B", b"own")]})
    await adding({"type": "http.response.body", "body": b"x"})
    assert sent[0]["headers"] == [(b"X-B", b"own"), (b"x-a", b"1")]
    assert sent[1] == {"type": "http.response.body", "body": b"x"}


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"])
def test_a_json_body_passes(media_type: str) -> None:
    guard.require_json({b"content-type": media_type.encode(), b"content-encoding": b"identity"})
    with pytest.raises(BusError, match="gzip"):
        guard.require_json({b"content-type": media_type.encode(), b"content-encoding": b"gzip"})


@pytest.mark.parametrize("media_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_of_a_page_can_send_does_not_pass(media_type: str) -> None:
    with pytest.raises(BusError) as refused:
        guard.require_json({b"content-type": media_type.encode()})
    assert refused.value.entry.http_status == 415
