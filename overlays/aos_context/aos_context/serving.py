"""The service as a process: it listens, says where, and ends in order."""

from __future__ import annotations

import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn

from aos_context.api.main import create_app

if TYPE_CHECKING:
    from aos_context.settings import Settings

BACKLOG = 128
DRAIN_S = 20
"""How long the requests in hand may take once the service shall end."""


def serve(settings: Settings, host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    signal.signal(signal.SIGTERM, _end)  # also once uvicorn has ended and raises its signal again
    signal.signal(signal.SIGINT, _end)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.create_server((host, port), family=found[0][0], backlog=BACKLOG)
    except OSError as error:
        sys.stderr.write(f"aos_context cannot listen on {_shown(host)}:{port}: {error.strerror or error}\n")
        return 1
    with listening:
        print(f"aos_context listens on http://{_shown(host)}:{listening.getsockname()[1]}", flush=True)
        config = uvicorn.Config(
            create_app(settings),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listening])
        return 0 if server.started else 1


def _shown(host: str) -> str:
    """As RFC 3986 writes it in an address."""
    return f"[{host}]" if ":" in host else host


def _end(*_: Any) -> NoReturn:  # a signal's handler
    sys.exit(0)
