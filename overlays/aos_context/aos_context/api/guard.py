"""Keeps foreign web pages out, and says to browsers what the page may do; on the bus lets nobody past the bus.

A page of another site can make a browser send requests to this machine: by its own name, once that is resolved to the
loopback address (DNS rebinding), or across origins. The first shows in `Host`, the second in `Origin`; both are
refused. A service that the bus has started has no page: it serves what the bus asks for, whose calls have a phase and a
line of its ledger, and nothing else. It knows the bus by the token that only its environment has.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from aos_context.api.answers import json_response
from aos_context.errors import ForbiddenError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from aos_context.settings import Settings

BUS_PATHS, BUS_ROOT = frozenset({"/health"}), "/aal/"
"""What a service on the bus serves."""
THROUGH_BUS = "Call it through the bus, at POST /invoke/aos_context/CAPABILITY."
OWN_NAMES = frozenset({"localhost"})
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def is_of_bus(path: str) -> bool:
    """Whether a service on the bus serves it."""
    return path in BUS_PATHS or path.startswith(BUS_ROOT)


class Guard:
    """An ASGI application before another; the service's settings say by which names it is reached, and by whom."""

    def __init__(self, app: ASGIApp, settings: Callable[[], Settings]) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refused(Headers(scope=scope), scope["path"])
        app = self._app if refused is None else json_response(refused.body(), refused.status)
        await app(scope, receive, send_guarded)

    def _refused(self, headers: Headers, path: str) -> ForbiddenError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(host):
            hint = "AOS_CONTEXT_HOSTS has the further names by which the service is reached, with commas between."
            return ForbiddenError(f"this service is not {host[:100]!r}", hint=hint)
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return ForbiddenError(f"a page of {origin[:100]!r} may not call this service")
        if self._settings().on_bus and not is_of_bus(path):
            return ForbiddenError(f"{path[:100]} is not served where the bus has started the service", hint=THROUGH_BUS)
        if path.startswith(BUS_ROOT) and not self._is_bus(headers.get("authorization", "")):
            return ForbiddenError("this is not the bus that has started the service", hint=THROUGH_BUS)
        return None

    def _is_bus(self, authorization: str) -> bool:
        """Anybody may be, where there is no token: no bus has started the service, or an older one."""
        token = self._settings().bus_token
        return token is None or hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode())

    def _is_own(self, host: str) -> bool:
        """An address is: no name was resolved to get here."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in OWN_NAMES or name in self._settings().hosts or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
