"""What an overlay may have put in the place of its interpreter: `fake_python.py WAY [WORDS] ARGUMENTS...`.

As a helper (its last argument is `inside`) it does its worst. As a program it answers as any other would.

    silent            leaves processes behind, and never says a word
    silent program    leaves a program behind that was never given to it, and never says a word
    deaf to the bus   is ready, and takes no message
    defiant           the same as silent, and nothing that it can renounce or ignore ends it
    says WORDS        sends these messages, a line each, to the bus
    first_says WORDS  the same, but for the first line only once a program was given to it
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.programs.hostile import comet, daemon, deaf, linger
else:
    from hostile import comet, daemon, deaf, linger

PR_SET_PDEATHSIG = 1
READY = b'["ready",{"floor_kib":1,"loaded":[],"left":{},"failed":{}}]'
STARTED = "started"
"""A FIFO in the folder of the overlay, to which it writes once it has done its worst."""


def renounce() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    deaf()


def program() -> NoReturn:
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"])


def leave_behind(way: str) -> NoReturn:
    daemon(program if "program" in way else deaf)
    if "comet" in way:
        daemon(comet)
    if "defiant" in way:
        renounce()
    Path(STARTED).write_text("started")
    linger()


def say(way: str, words: str, fd: int) -> NoReturn:
    channel = socket.socket(fileno=fd)
    lines = words.encode().splitlines()
    channel.recv(1 << 17)
    if way == "first_says":
        channel.send(lines.pop(0))
        channel.recv(1 << 17)
    for line in lines:
        channel.send(line)
    linger()


def close_ears(fd: int) -> NoReturn:
    channel = socket.socket(fileno=fd)
    channel.recv(1 << 17)
    channel.shutdown(socket.SHUT_RD)
    channel.send(READY)
    linger()


def main(way: str, *arguments: str) -> None:
    if arguments[-1] != "inside":
        os.write(1, b'"spawned"')
    elif way == "deaf to the bus":
        close_ears(int(arguments[-3]))
    elif "says" in way:
        say(way, arguments[0], int(arguments[-3]))
    else:
        leave_behind(way)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main(*sys.argv[1:])
