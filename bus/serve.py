"""`aal serve`: one server a working folder and a ledger. It holds their locks and a listening socket before all else.

They are taken first, so that a second server or a taken port is refused at once and leaves the ledger alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from bus import protocol, serving
from bus.app import create_app
from bus.callers import Callers
from bus.dispatch import Bus
from bus.errors import BusError, OperatorError, SettingError
from bus.server_lock import folder_lock, ledger_lock, looked_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from bus.settings import Settings

BACKLOG = 2048
CONNECTIONS_CLOSE_S = 5
"""Seconds that connections get to close once every call was answered: for requests that are still on their way in."""

CONNECTIONS_LEAST = 64
CONNECTIONS_SHARE = 2
"""One part in so many of the descriptors that the process may have is for connections; the rest is for calls."""

LAST_WORDS_S = 0.5
"""Seconds for the same where it is to end at once."""

FILES_WANTED = 16_384
COLLECT_AFTER = (10_000, 10, 50)
"""New objects before the youngest are collected, and how many such rounds before the older ones are (`gc`)."""

log = logging.getLogger(__name__)

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def serve(settings: Settings, ready: Callable[[str, Bus], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain. `ready` is called once with the address and the Bus.

    Raises `SettingError` for an address that is not loopback as long as there is no token, `OperatorError` for a folder
    or a port in use, and `BusError` (ERR_INTERNAL) where the application did not start.
    """
    _require_tokens(settings)
    with (
        folder_lock(settings.state) as of_folder,
        ledger_lock(settings.ledger) as of_ledger,
        looked_after(of_folder, of_ledger),
        _listen(settings.host, settings.port) as listener,
        serving.announced(settings.state, _address(_reached_by(settings.host), listener)),
    ):
        _log_to_stderr(settings.log_level)
        files = _allow_many_files()
        bus = Bus(settings)
        _redact_logs(bus.secrets.redact)
        server = _Server(_config(settings, bus, files), bus, lambda: ready(_address(None, listener), bus))
        with contextlib.suppress(SystemExit):  # uvicorn's word for a lifespan that failed; its log says why
            server.run(sockets=[listener])
        if not server.started:
            raise BusError("ERR_INTERNAL", "the server did not start")


def _require_tokens(settings: Settings) -> None:
    """Beyond loopback callers have to be known. A bus whose last token is revoked later refuses everybody there."""
    if not settings.is_loopback and not Callers(settings.state).has_tokens():
        raise SettingError(
            "ERR_SETTING",
            f"host: {settings.host!r} is not a loopback address, and there is no token that a caller could have",
            hint="Make one first, with aal token create --name NAME, or serve on 127.0.0.1.",
        )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `OperatorError` (ERR_ADDRESS)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _taken(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _taken(host, port, error) from None
    return listener


def _taken(host: str, port: int, error: OSError) -> OperatorError:
    return OperatorError("ERR_ADDRESS", f"cannot listen on {host}, port {port}: {error.strerror}")


def _reached_by(host: str) -> str:
    """The name by which this machine reaches the server, and which the server takes for its own."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # not listened on


def _address(host: str | None, listener: socket.socket) -> str:
    """With that name of the server's, or with the address that it listens on."""
    name, port = listener.getsockname()[:2]
    host = host or name
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level.upper(), format=_LOG_FORMAT)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


class _RedactedFormatter(logging.Formatter):
    """Takes secrets out of what another one says."""

    def __init__(self, formatter: logging.Formatter, redact: Callable[[str], str]) -> None:
        super().__init__()
        self._formatter = formatter
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(self._formatter.format(record))


def _redact_logs(redact: Callable[[str], str]) -> None:
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_RedactedFormatter(handler.formatter or logging.Formatter(), redact))


def _allow_many_files() -> int:
    """Every running call holds a handful of descriptors; the usual soft limit of 1,024 ends at about 200 calls.

    Gives how many there may be now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    allowed = max(soft, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def _config(settings: Settings, bus: Bus, files: int) -> uvicorn.Config:
    """`files` is how many descriptors the process may have."""
    return protocol.Config(
        create_app(bus=bus),
        client_timeout_s=settings.client_timeout_s,
        connections=max(files // CONNECTIONS_SHARE, CONNECTIONS_LEAST),
        refused=bus.refused_before_auth,
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=settings.log_level == "debug",
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=CONNECTIONS_CLOSE_S,
    )


def _calm_the_collector() -> None:
    """What is there after the start stays: the garbage collector need not walk it, nor look after each few calls."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


class _Server(uvicorn.Server):
    """Says when it listens, shuts down in an order of its own, and takes a signal as a wish: it ends with 0.

    uvicorn closes its connections before the application hears of the end. Here the bus is drained first: calls that
    come are refused with their line, `/ready` says why, what runs is answered; then the connections close. A second
    SIGINT or SIGTERM leaves out all waiting for what runs.
    """

    def __init__(self, config: uvicorn.Config, bus: Bus, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._bus = bus
        self._ready = ready
        self._hurry = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _calm_the_collector()
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        hurried = asyncio.ensure_future(self._hurry.wait())
        draining = asyncio.ensure_future(self._bus.drain())
        await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await self._bus.end_calls(at_once=True)
            draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
        closing = asyncio.ensure_future(super().shutdown(sockets))
        await asyncio.wait((closing, hurried), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((closing,), timeout=LAST_WORDS_S)
        for connection in list(self.server_state.connections):  # it has yet to send its request, or to read its answer
            connection.transport.abort()
        await closing
        hurried.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the shutdown. A second hangup, which a closing terminal sends, is none to hurry for.

        uvicorn's `force_exit` stays unset: in a hurry, too, the ledger has to be closed.
        """
        if self.should_exit and sig != signal.SIGHUP:
            self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which raises the signal once more at the end, so that the process would die of it.

        A hangup that is ignored (`nohup`) stays so.
        """
        self._loop = asyncio.get_running_loop()
        wishes = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            wishes.append(signal.SIGHUP)
        before = {wish: signal.signal(wish, self.handle_exit) for wish in wishes}
        try:
            yield
        finally:
            for wish, handler in before.items():
                signal.signal(wish, handler)
