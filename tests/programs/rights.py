"""Tries what the payload names, and answers with what came of each: `rights.py [worker | service]`.

The payload is `{"try": [[name, argument...], ...]}`. The result has for each in its turn what it gave, or the name of
the error. It runs for one call, or as a worker, or as a service on OVERLAY_PORT.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CLONE_NEWUSER = 0x10000000
libc = ctypes.CDLL(None, use_errno=True)


def read(path: str) -> str:
    return Path(path).read_text()


def write(path: str, text: str = "x") -> str:
    return str(Path(path).write_text(text))


def write_in(variable: str, name: str) -> str:
    """In the folder that a variable names; gives the folder's path and what was there before."""
    folder = Path(os.environ[variable])
    before = ",".join(sorted(path.name for path in folder.iterdir()))
    (folder / name).write_text("x")
    return f"{folder} [{before}]"


def link(path: str, to: str) -> str:
    Path(path).symlink_to(to)
    return "linked"


def tcp(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), 10):
        return "connected"


def udp(port: int) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        return str(sender.sendto(b"x", ("127.0.0.1", port)))


def unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(path)
        return "connected"


def listen(_: str = "") -> str:
    with socket.create_server(("127.0.0.1", 0)):
        return "listening"


def listen_unbound(_: str = "") -> str:
    with socket.socket() as listener:
        listener.listen()
        return "listening"


def execute(path: str) -> str:
    pid = os.posix_spawn(path, [path], {})
    return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def kill(pid: int) -> str:
    os.kill(pid, signal.SIGCONT)
    return "signalled"


def mode(path: str) -> str:
    Path(path).chmod(0o600)
    return "changed"


def unshare(_: str = "") -> str:
    if libc.unshare(CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    return "another namespace"


def limits(_: str = "") -> str:
    """Hard limits: open files, core, whether they can be raised."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))
    except ValueError:
        return f"core {resource.getrlimit(resource.RLIMIT_CORE)[1]}, not raised"
    return "raised"


def allocate(mb: int) -> str:
    try:
        return str(len(bytearray(mb << 20)) >> 20)
    except MemoryError:
        return "MemoryError"


def breed(count: int) -> str:
    for _ in range(count):
        if os.fork() == 0:
            signal.pause()
    signal.pause()
    return "bred"


def leave(name: str) -> str:
    """A tree that is hard to remove, then die."""
    os.chdir(os.environ["OVERLAY_SCRATCH"])
    for _ in range(50):
        Path(name).mkdir()
        os.chdir(name)
    write("file")
    os.kill(os.getpid(), signal.SIGKILL)
    return "killed"


def fill(files: int) -> str:
    """Files of 64 KiB."""
    for number in range(files):
        (Path(os.environ["OVERLAY_SCRATCH"]) / str(number)).write_bytes(os.urandom(64 * 1024))
    return "filled"


def outgrow(mb: int) -> str:
    """One file, as an error that nobody catches."""
    try:
        (Path(os.environ["OVERLAY_SCRATCH"]) / "large").write_bytes(bytes(mb << 20))
    except OSError as error:
        raise SystemExit(str(error)) from error
    finally:
        (Path(os.environ["OVERLAY_SCRATCH"]) / "large").unlink()
    return "written"


TRIES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        read,
        write,
        write_in,
        link,
        tcp,
        udp,
        unix,
        listen,
        listen_unbound,
        execute,
        kill,
        mode,
        unshare,
        limits,
    )
}
TRIES |= {function.__name__: function for function in (allocate, breed, leave, fill, outgrow)}


def outcome_of(name: str, arguments: list[Any]) -> str:
    try:
        return TRIES[name](*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def result_of(envelope: dict[str, Any]) -> list[str]:
    return [outcome_of(name, arguments) for name, *arguments in envelope["payload"]["try"]]


def work() -> None:
    for line in sys.stdin:
        envelope = json.loads(line)
        print(json.dumps({"request_id": envelope["request_id"], "result": result_of(envelope)}), flush=True)


def serve() -> None:
    """One request a connection, whose body is the envelope. Who only looks whether it listens sends none."""
    with socket.create_server(("127.0.0.1", int(os.environ["OVERLAY_PORT"]))) as server:
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as request:
                size = 0
                while (line := request.readline().strip()) != b"":
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.partition(b":")[2])
                if size:
                    body = json.dumps(result_of(json.loads(request.read(size)))).encode()
                    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
                    connection.sendall(head.encode() + body)


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        work()
    elif sys.argv[1:] == ["service"]:
        serve()
    else:
        print(json.dumps(result_of(json.load(sys.stdin))))
