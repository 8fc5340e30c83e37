"""A program that needs memory: `eater.py TOKEN WAY MB [PATH...]`. It says `ready` then, and runs until its stdin ends.

eat     by itself                  breed   a child does, and this one waits for it to end
store   in a file of the folder    read    of the files, as page cache
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 1 << 20
kept: list[object] = []


def eat(mb: int) -> None:
    kept.extend(b"x" * CHUNK for _ in range(mb))


def breed(mb: int) -> None:
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    else:
        eat(mb)
        os._exit(0)


def store(mb: int, folder: str) -> None:
    with open(f"{folder}/stored-{os.getpid()}", "wb") as file:  # noqa: PTH123
        os.unlink(file.name)  # noqa: PTH108  # its pages go with the process
        kept.append(os.dup(file.fileno()))
        file.writelines(b"x" * CHUNK for _ in range(mb))


def read(_mb: int, *paths: str) -> None:
    for path in paths:
        with open(path, "rb") as file:  # noqa: PTH123
            while file.read(CHUNK):
                pass


if __name__ == "__main__":
    ways: dict[str, Callable[..., None]] = {"eat": eat, "breed": breed, "store": store, "read": read}
    ways[sys.argv[2]](int(sys.argv[3]), *sys.argv[4:])
    os.write(1, b"ready\n")
    while os.read(0, 4096):
        pass
