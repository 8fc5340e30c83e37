"""The bus's end of the socket to a helper, whose messages `launcher.py` explains."""

from __future__ import annotations

import errno
import marshal
import math
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from runners.output import close_all

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

MESSAGE_BYTES = 128 * 1024
"""The longest message that `launcher.py` takes."""

MARSHAL = 2
"""The version of the format that `launcher.py` reads."""

REPLY_BYTES = 64 * 1024
"""The longest message from it."""

WORDS = 500
"""Characters that are kept of a reason that a helper gives."""


class Wire:
    """The bus's end of the socket to a helper. What the helper does not take yet waits, with its descriptors.

    `cut_off` is called where that cannot be sent any more, and closes this.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, receive: Callable[[], object], cut_off: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._cut_off = cut_off
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._socket, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        loop.add_reader(self._socket.fileno(), receive)

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Raises OSError where the helper has gone, or no descriptor can be kept for later."""
        if self._outbox:
            self._outbox.append((message, _copies(fds)))
            return
        try:
            self._socket.sendmsg([message], _rights(fds))
        except BlockingIOError:
            self._outbox.append((message, _copies(fds)))
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def receive(self, *, with_fd: bool) -> tuple[bytes, list[int]]:
        """One message; an empty one where the helper has gone. Raises BlockingIOError where there is none.

        Of a helper that has gone with a message unread the kernel says so first, once, and then gives what it had said.
        """
        try:
            return self._receive(with_fd)
        except ConnectionResetError:
            return self._receive(with_fd)

    def _receive(self, with_fd: bool) -> tuple[bytes, list[int]]:
        if not with_fd:
            return self._socket.recv(REPLY_BYTES), []
        message, fds, _, _ = socket.recv_fds(self._socket, REPLY_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        return message, fds

    def close(self) -> None:
        if self.is_open:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._drop_outbox()

    def _flush(self) -> None:
        while self._outbox:
            message, fds = self._outbox[0]
            try:
                self._socket.sendmsg([message], _rights(fds))
            except BlockingIOError:
                return
            except OSError:  # it is gone, or the kernel is short of something
                self._cut_off()
                return
            self._outbox.popleft()
            close_all(fds)
        self._loop.remove_writer(self._socket.fileno())

    def _drop_outbox(self) -> None:
        for _, fds in self._outbox:
            close_all(fds)
        self._outbox.clear()


def message(verb: str, given: Any) -> bytes:  # noqa: ANN401
    """Raises OSError where it is too long, ValueError for what is no text."""
    message = marshal.dumps((verb, given), MARSHAL)
    if len(message) > MESSAGE_BYTES:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return message


def _rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []


def _copies(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))  # noqa: PERF401  # so that those are known that were made
    except OSError:
        close_all(copies)
        raise
    return copies


# What a helper says, which may be anything.


def as_figure(value: Any) -> float:  # noqa: ANN401
    """A number of something. Raises TypeError or ValueError where it is none."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(value)
    return float(value)


def as_words(value: Any) -> str:  # noqa: ANN401
    """The beginning of a text. Raises TypeError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value[:WORDS]


def as_reasons(value: Any) -> dict[str, str]:  # noqa: ANN401
    """Why, by the names of what it is about. Raises TypeError where it is not that."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return {as_words(name): as_words(why) for name, why in value.items()}


def as_error(number: Any, why: Any) -> OSError:  # noqa: ANN401
    """Raises TypeError for what is no error."""
    if not isinstance(number, int | None):
        raise TypeError(f"{number!r} is no number of an error")
    return OSError(number or errno.EINVAL, as_words(why))
