"""A helper by the messages that `launcher.py` explains, with no more of the bus around it than a socket."""

from __future__ import annotations

import json
import marshal
import os
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from runners.helper import INTERPRETER, LAUNCH
from tests import programs
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MARSHAL = 2
MESSAGE_BYTES = 64 * 1024


class BareHelper:
    """One of mode spawn, or of mode fork with the `interpreter` and `arguments` of a script, contained as `plan` says.

    What it tells is read by whoever waits for it. Leaving the block ends it.
    """

    def __init__(
        self, plan: Mapping[str, Any] | None, *, namespace: bool, interpreter: Sequence[str] = (), arguments: Any = None
    ) -> None:
        self.mark = f"bare-{os.getpid()}-{id(self)}"
        self.calls = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(PATIENCE_S)
        begin: dict[str, Any] = {
            "bus": os.getpid(),
            "namespace": namespace,
            "environment": {},
            "plan": plan,
            "preload": (),
            "skip": [],
            "ahead": 1,
            "places": False,
        }
        begin |= {"interpreter": tuple(interpreter) or None, "arguments": arguments}
        self._send("begin", begin)
        with theirs:
            self.process = subprocess.Popen(
                [*INTERPRETER, str(LAUNCH), str(theirs.fileno()), self.mark],
                stdin=subprocess.DEVNULL,
                cwd=programs.FOLDER,
                env={**programs.ENV, "OVERLAY_CALL": f"{self.mark}-0"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """It ends, and with it all that it started."""
        self._socket.close()
        self.process.wait(PATIENCE_S)

    def _send(self, verb: str, given: Any, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self._socket, [marshal.dumps((verb, given), MARSHAL)], fds)

    def heard(self) -> Any:
        """Its next message, as [verb, given]; None once it has ended."""
        with suppress(ConnectionResetError):
            words, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, 1)
            for fd in fds:
                os.close(fd)
            return json.loads(words) if words else None
        return None

    def until_ready(self) -> dict[str, Any]:
        """Returns what "contained" tells."""
        verb, contained = self.heard()
        assert verb == "contained", contained
        verb, given = self.heard()
        assert verb == "ready", given
        return dict(contained)

    def start(self, argv: Sequence[str], stdout: int, data_bytes: int = 0) -> int:
        """The number of the call. Its stdin is empty, its stderr this process's."""
        self.calls += 1
        null = os.open(os.devnull, os.O_RDONLY)
        self._send("run", (self.calls, list(argv), {}, (data_bytes, 0, 3, 0)), (null, stdout, 2))
        os.close(null)
        return self.calls

    def run(self, argv: Sequence[str], data_bytes: int = 0) -> tuple[str, list[Any]]:
        """What it wrote to its stdout, and what is told of its end."""
        reader, writer = os.pipe()
        self.start(argv, writer, data_bytes)
        os.close(writer)
        with open(reader) as stdout:  # noqa: PTH123
            said = stdout.read()
        return said, self.ended()

    def ended(self) -> list[Any]:
        """What is told of the end of the only call: number, wait status, cpu ms, peak KiB, why."""
        verb, given = self.heard()
        while verb == "using":
            verb, given = self.heard()
        assert verb == "ended", given
        (end,) = given
        return list(end)
