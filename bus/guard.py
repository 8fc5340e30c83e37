"""Who asks, and from where: what every request passes before anything else looks at it.

A browser on this machine can be made to send requests by any page it shows. So a request has to be addressed to a name
of this server (else a foreign name was made to point here: DNS rebinding), and one that a page has sent has to come
from this server's own pages or from an origin that the operator has listed. Only then it is asked whose token it has,
and what that token may do. What is refused up to there is counted, not written down: it came from nobody. So is what
comes too soon again and again: nobody fills the disk by being refused.

A verdict on the place is kept for the next request with the same headers; the token is looked at each time, because it
may have been revoked meanwhile.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from bus.errors import BusError, CallerError, DeniedError, RequestError
from bus.schemas import show

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

    from starlette.types import Message, Scope, Send

    from bus.callers import Caller, Callers
    from bus.settings import Settings
    from bus.tokens import Scope as Right

    Fields = Mapping[bytes, bytes]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What a client on this machine calls the server."""

READING = frozenset({"GET", "HEAD"})
BODILESS = READING | {"OPTIONS"}
"""Methods whose requests change nothing, so that they need no body of a type that a page's form cannot send."""

PLACES_KEPT = 256
"""Verdicts on places that are kept: of as many ports, names and origins."""

PREFLIGHT_S = 600
"""Seconds that a browser may keep what it was told that a listed origin may send."""

_ONCE = frozenset({b"host", b"origin", b"sec-fetch-site", b"authorization"})
"""Headers that a request has once at most: of two, another program could see the other."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(?::[0-9]+)?")
"""The value of `Host`, in lower case: a name or an IP address, and perhaps a port (RFC 9110 section 7.2)."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~:+/=-]{1,64}")
_EXPOSED = b"retry-after, www-authenticate, x-request-id"


class Place(NamedTuple):
    """Where a request comes from, once that is allowed. `origin` is a listed one, which may read the answer."""

    origin: bytes | None = None

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer says to the browser of a listed origin (CORS)."""
        if self.origin is None:
            return []
        return [
            (b"access-control-allow-origin", self.origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        ]

    def allows_preflight(self, scope: Scope, fields: Fields) -> bool:
        """Whether this is a browser's question, for a listed origin, if a page may send what it wants to send."""
        return (
            self.origin is not None and scope.get("method") == "OPTIONS" and b"access-control-request-method" in fields
        )


PREFLIGHT_HEADERS = [
    (b"access-control-allow-methods", b"GET, POST"),
    (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
    (b"access-control-max-age", b"%d" % PREFLIGHT_S),
]


class Guard:
    """Judges requests by their ASGI scopes, of HTTP and of web sockets.

    `refused` counts by code who got nowhere, and calls that came too soon and leave no line.
    """

    def __init__(self, settings: Settings, callers: Callers, refused: Counter[str]) -> None:
        host = settings.host.lower()
        self._names = LOOPBACK_NAMES | {_bracketed(host), *(name.lower() for name in settings.listed("hosts"))}
        self._is_everywhere = host in {"", "0.0.0.0", "::"}  # noqa: S104  # compared, not listened on
        self._origins = frozenset(origin.lower().rstrip("/") for origin in settings.listed("origins"))
        self._callers = callers
        self._refused = refused
        self._places: dict[tuple[bytes | None, bytes | None, bytes | None], Place] = {}

    def place(self, scope: Scope, fields: Fields) -> Place:
        """Where the request comes from. Raises `BusError` where it may not: ERR_ORIGIN, ERR_BAD_HTTP."""
        key = (fields.get(b"host"), fields.get(b"origin"), fields.get(b"sec-fetch-site"))
        if len(fields) == len(scope["headers"]) and (known := self._places.get(key)):
            return known
        try:
            _require_once(scope)
            self._require_own_name(scope, key[0])
            place = self._require_own_page(*key)
        except BusError as refusal:
            self._refused[refusal.code] += 1
            raise
        if len(self._places) >= PLACES_KEPT:
            self._places.clear()
        self._places[key] = place
        return place

    def identify(self, scope: Scope, fields: Fields) -> Caller:
        """Who asks. Raises `BusError`: ERR_UNAUTHORIZED, and ERR_SETTING where the tokens cannot be read."""
        try:
            caller = self._callers.identify(fields.get(b"authorization"))
            if caller.name is None and scope.get("client") and _is_remote(scope["client"][0]):
                raise CallerError("ERR_UNAUTHORIZED", "without a token only this machine is served, and there is none")
        except BusError as refusal:
            self._refused[refusal.code] += 1
            raise
        return caller

    def allow(self, caller: Caller, right: Right | None) -> None:
        """Hold a caller to the rate and the scopes of its token. Raises `CallerError` (429, 403).

        The rate comes first: what is refused after it leaves a line, so it has to be paid for, too.
        """
        self._callers.spend(caller)
        if right is not None:
            caller.require(right)

    def is_only_counted(self, refusal: BusError, caller: Caller) -> bool:
        """Whether a call's refusal leaves no line, which counts it: all but the first that come too soon in a row."""
        if refusal.code != "ERR_RATE_LIMITED" or self._callers.is_first_refusal(caller):
            return False
        self._refused[refusal.code] += 1
        return True

    def _require_own_name(self, scope: Scope, host: bytes | None) -> None:
        found = _HOST.fullmatch((host or b"").decode("latin-1").lower())
        if found is None:
            raise DeniedError("ERR_ORIGIN", f"the header Host is {_shown(host)}, which names no server")
        if found[1] in self._names or (self._is_everywhere and found[1] == _local_name(scope)):
            return
        raise DeniedError("ERR_ORIGIN", f"the header Host is {_shown(host)}, which is none of this server's names")

    def _require_own_page(self, host: bytes | None, origin: bytes | None, site: bytes | None) -> Place:
        """A request without these two headers was sent by no page, or by one of this server."""
        spelled = (origin or b"").decode("latin-1").lower()
        if spelled in self._origins:
            return Place(origin)
        if origin is not None and spelled.partition("://")[2] != (host or b"").decode("latin-1").lower():
            raise DeniedError("ERR_ORIGIN", f"the request was sent by a page of {_shown(origin)}")
        if site is not None and site.lower() == b"cross-site":
            raise DeniedError("ERR_ORIGIN", "the request was sent by a page of another site")
        return Place()


def right_for(scope: Scope) -> Right | None:
    """The scope that a token needs for this path and method; None where any token does.

    What the bus does not know by its exact form, a plugin's routes say, is for administrators. Calls are held to theirs
    where they are made, so that a refusal leaves its line.
    """
    segments, method = _segments(scope), scope.get("method")
    match segments:
        case ("",) | ("overlays",) | ("overlays", _) | ("openapi.json",) if method in READING:
            return None
        case ("provenance",) | ("provenance", _) | ("provenance", _, "proof") if method in READING:
            return "read-ledger"
        case ("provenance", _, "replay") if method == "POST":
            return "replay"
        case ("invoke", _) | ("invoke", _, _) if method == "POST":
            return None
        case _:
            return "admin"


def needs_nobody(scope: Scope) -> bool:
    """Whether whoever reaches the server may ask this: it lives, it can work."""
    return scope.get("method") in READING and _segments(scope) in {("health",), ("ready",)}


def require_json(fields: Fields) -> None:
    """Raise `RequestError` (ERR_CONTENT_TYPE) for a body that is not plain JSON, as a page's form would send it."""
    if fields.get(b"content-type") == b"application/json" and b"content-encoding" not in fields:
        return
    media_type = fields.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise RequestError("ERR_CONTENT_TYPE", f"content type {show(media_type or 'none')}, allowed: application/json")
    encoding = fields.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding != "identity":
        raise RequestError("ERR_CONTENT_TYPE", f"content encoding {show(encoding)}, allowed: identity")


def own_request_id(fields: Fields) -> bytes | None:
    """The client's own `X-Request-Id`, for its answer's header alone; None where it has none that can be repeated."""
    found = fields.get(b"x-request-id")
    return found if found is not None and _REQUEST_ID.fullmatch(found) else None


def adding(send: Send, headers: list[tuple[bytes, bytes]]) -> Send:
    """`send`, with these headers in the answer, unless it has one of the name."""

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", ())}
            more = [header for header in headers if header[0] not in present]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return send_with


def _segments(scope: Scope) -> tuple[str, ...]:
    """Of the path below what the application is mounted at: `overlays`, `psyfi` of `/overlays/psyfi`.

    Empty where it is not below that, or has an empty segment other than that of `/` alone.
    """
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    above, *segments = path.split("/")
    is_plain = not above and (all(segments) or segments == [""])
    return tuple(segments) if is_plain else ()


def _require_once(scope: Scope) -> None:
    seen: set[bytes] = set()
    for name, _ in scope["headers"]:
        if name in seen and name in _ONCE:
            raise RequestError("ERR_BAD_HTTP", f"the request has the header {name.decode()} twice")
        seen.add(name)


def _bracketed(host: str) -> str:
    """An address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def _local_name(scope: Scope) -> str:
    """The address of this machine that the request came to."""
    server = scope.get("server")
    return _bracketed(server[0].partition("%")[0].lower()) if server else ""


@lru_cache(1024)
def _is_remote(peer: str) -> bool:
    """Whether a peer is another machine. What is no IP address is a socket in the file system, or a test."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return not (mapped or address).is_loopback


def _shown(value: bytes | None) -> str:
    return "missing" if value is None else show(value.decode("latin-1"))
