"""The question whether a service is ready: a GET of its path, or a connection where it has none."""

from __future__ import annotations

import asyncio

import aiohttp

from runners.ports import HOST

ANSWER_BYTES = 64 * 1024
"""How much of an answer is read; a connection with more is dropped."""

SILENT = "did not answer in time"


class ProbeClient:
    """What asks. A connection for each question: what is asked is whether one can be had."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"User-Agent": "aal-core"},
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class Probe:
    """Asks the service on a port. `path` None: whether it listens."""

    def __init__(self, client: ProbeClient, port: int, path: str | None) -> None:
        self.path = path
        self._client = client
        self._port = port

    def __str__(self) -> str:
        place = f"{HOST}:{self._port} (OVERLAY_PORT)"
        return place if self.path is None else f"GET {self.path} on {place}"

    async def lack(self, timeout_s: float) -> str | None:
        """What the service lacks to be ready, in words that go on from `str`; None where it is ready."""
        try:
            async with asyncio.timeout(timeout_s):
                return await (self._listens() if self.path is None else self._answers(self.path))
        except TimeoutError:
            return SILENT
        except (aiohttp.ClientConnectorError, ConnectionRefusedError):
            return "refused the connection"
        except (aiohttp.ClientError, OSError) as error:
            return _lack_of(error)

    async def _listens(self) -> None:
        _, writer = await asyncio.open_connection(HOST, self._port)
        writer.close()

    async def _answers(self, path: str) -> str | None:
        url = f"http://{HOST}:{self._port}{path}"
        async with self._client.session.get(url, allow_redirects=False) as response:
            await response.content.read(ANSWER_BYTES)
            return None if response.status // 100 == 2 else f"answered HTTP {response.status}"  # noqa: PLR2004


def _lack_of(error: Exception) -> str:
    """The words of the other errors would hold the head of an answer."""
    match error:
        case aiohttp.ClientResponseError():
            return f"answered what is not HTTP: {error.message}"
        case OSError():
            return f"gave no answer: {error.strerror or error}"
        case aiohttp.ClientPayloadError():
            return "closed the connection in the middle of its answer"
        case _:
            return "closed the connection before it answered"
