"""The helper's end of the socket to the bus, and what is said there (`launcher.py` lists the messages).

Part of the helper (`launcher.py`), under the same rules.
"""

from __future__ import annotations

import _socket
import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MARSHAL = 2
"""The version of the format. Every CPython reads it."""

MESSAGE_BYTES = 128 * 1024
"""The longest message to the helper. A command with its environment is hardly a hundredth of it."""

TOLD_BYTES, TOLD_WORDS = 24 * 1024, 120
"""Bytes of a list of modules, and characters of a reason: a message is far below 64 KiB."""


def open_channel() -> Any:
    """Our end of the socket to the bus, for no program to inherit."""
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)


def tell(channel: Any, verb: str, about: Any, fd: int | None = None) -> None:
    rights = [] if fd is None else [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
    try:
        channel.sendmsg([text_of((verb, about)).encode("utf-8", "replace")], rights)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            raise
        # The bus is gone; the next look at the socket says so.


def text_of(value: Any) -> str:
    """The JSON text of numbers, strings, lists and objects (RFC 8259)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"%s"' % "".join("\\u%04x" % ord(sign) if sign < " " or sign in '"\\' else sign for sign in value)
    if isinstance(value, dict):
        return "{%s}" % ",".join("%s:%s" % (text_of(name), text_of(member)) for name, member in value.items())
    if isinstance(value, (list, tuple)):
        return "[%s]" % ",".join(map(text_of, value))
    return repr(value)


def descriptors(ancillary: list[Any]) -> list[int]:
    """Those of an SCM_RIGHTS message."""
    found = []  # type: list[int]
    for _, _, rights in ancillary:
        found += memoryview(rights).cast("i")
    return found


def in_short(reasons: dict[str, str]) -> dict[str, str]:
    return dict(that_fit([(name, why[:TOLD_WORDS]) for name, why in reasons.items()]))


def that_fit(items: list[Any]) -> list[Any]:
    """The first of them, as far as their JSON text is no longer than TOLD_BYTES."""
    left = TOLD_BYTES
    for number, item in enumerate(items):
        left -= len(text_of(item).encode("utf-8", "replace")) + 1
        if left < 0:
            return items[:number]
    return items
