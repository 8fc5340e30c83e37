"""An HTTP service that does what its arguments say before it listens, and what its paths say from then on.

It stands on sockets and not on http.server, whose import takes longer than most tests.
"""

import os
import signal
import socket
import sys
import threading

TOKEN = os.urandom(8).hex()
health = ["200"]
"""What `be` said last."""

kept: list[bytes] = []
asked: list[str] = []
"""What it was when it was asked for."""


def gate(path: str) -> None:
    """Wait until somebody opens the FIFO to write."""
    os.close(os.open(path, os.O_RDONLY))


def once(path: str) -> None:
    """Fail at the first start."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    sys.exit("it went wrong the first time")


def flood(size: str) -> None:
    os.write(1, b"x\n" * (int(size) // 2))


def say(text: str) -> None:
    os.write(2, text.encode())


def deaf(_: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def be(what: str) -> None:
    """How `/health` answers: a status, `mute`, or `-N`: 503 N times, then 200."""
    health[0] = what


def grow(_: str = "") -> None:
    """Take 64 MiB of memory."""
    kept.append(b"x" * 2**26)


def never(_: str) -> None:
    """Do not listen at all."""
    signal.pause()


def listen(*, stays: bool) -> None:
    """With `stays`, a port that is taken is no reason to end."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", int(os.environ["OVERLAY_PORT"])))
    except OSError:
        if not stays:
            raise
        signal.pause()
    listener.listen(16)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def serve(connection: socket.socket) -> None:
    with connection:
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(4096)
            if not data:
                return
            head += data
        status, body = answer(head.split()[1].decode())
        text = (
            f"HTTP/1.1 {status} So\r\nContent-Length: {len(body)}\r\nLocation: /who\r\nConnection: close\r\n\r\n{body}"
        )
        connection.sendall(text.encode())


def answer(path: str) -> tuple[str, str]:
    """The status and the body for a path."""
    if path == "/health":
        return look(), ""
    if path == "/token":
        return "200", os.environ["OVERLAY_TOKEN"]
    if path == "/die":
        say("last words\n")
        os._exit(3)
    if path == "/wait":
        threading.Event().wait()
    if path == "/grow_soon":
        threading.Timer(0.05, grow).start()
    if path in {"/grow", "/breed"}:
        if path == "/grow" or os.fork() == 0:
            grow()
        threading.Event().wait()
    if path.startswith("/be/"):
        be(path.removeprefix("/be/"))
    return "200", f"{TOKEN} {len(asked)} {os.environ['PORT']}"


def look() -> str:
    now = health[0]
    asked.append(now)
    if now == "mute":
        say("asked in vain\n")
        threading.Event().wait()
    if now.startswith("-"):
        be("200" if now == "-1" else f"-{int(now[1:]) - 1}")
        return "503"
    return now


for word in sys.argv[1:]:
    name, _, value = word.partition("=")
    globals()[name](value)
listen(stays="stays" in os.environ.get("SERVICE", ""))
