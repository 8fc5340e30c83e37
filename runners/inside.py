"""The beginning of the process inside, in mode fork under the overlay's own interpreter: from "contained" to "ready".

Part of the helper (`launcher.py`), under the same rules.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runners.channel import MESSAGE_BYTES, TOLD_WORDS, in_short, open_channel, tell, that_fit
    from runners.launcher import PR_SET_PDEATHSIG, Launcher, prctl
    from runners.scratch import Scratch, folder_of
else:
    from channel import MESSAGE_BYTES, TOLD_WORDS, in_short, open_channel, tell, that_fit
    from launcher import PR_SET_PDEATHSIG, Launcher, prctl
    from scratch import Scratch, folder_of

UNPLANNED = "/tmp"  # noqa: S108  # nothing stays there
"""The folder that may be written to where no plan gives one."""

_HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    """Never returns: works until the bus is gone, and in a forked child runs the program."""
    channel, mark = open_channel(), sys.argv[2]
    _, config = marshal.loads(channel.recv(MESSAGE_BYTES))  # noqa: S302  # only the bus has the other end
    plan, forks = config["plan"], config["arguments"] is not None
    failed = take_late(channel, plan) if plan is not None and forks else {}
    folder = None if plan is None else place_of(plan["scratch"], mark)
    program = load_program(channel, config, folder or UNPLANNED) if forks else None  # type: Any
    scratch = None if folder is None else scratch_in(folder, plan["scratch"], forks)
    most = 0 if plan is None else plan["processes"]
    launcher = Launcher(
        channel,
        program,
        mark,
        environment=config["environment"],
        ahead=config["ahead"],
        places=config["places"],
        scratch=scratch,
        most=most,
    )
    if not launcher.in_namespace:
        prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)  # from now on the bus closes the socket, and all is ended in order
    loaded, left = ([], {}) if program is None else (program.loaded, program.left)
    floor = floor_kib(forks)
    ready = {"floor_kib": floor, "loaded": that_fit(loaded), "left": in_short(left), "failed": failed}
    tell(channel, "ready", ready)
    if program is not None:
        program.run(launcher.serve)
    launcher.serve()


def is_mounted(place: Any) -> bool:
    """Whether the scratch folders lie in memory of this helper's own."""
    return os.getpid() == 1 and place["mounts"]


def place_of(place: Any, mark: str) -> str:
    return folder_of(place["root"], mark, is_mounted(place))


def scratch_in(folder: str, place: Any, forks: bool) -> Any:
    """What a fork is told of it is bytes."""
    return Scratch(os.fsencode(folder) if forks else folder, os.getpid() == 1, place["mb"] << 10, is_mounted(place))


def take_late(channel: Any, plan: Any) -> dict[str, str]:
    """What the interpreter of mode fork could not be started with. Returns what failed of it, and why.

    Where the plan is strict, that ends this process.
    """
    if not plan["late"]:
        return {}
    try:
        _neighbour("sandbox").take_filter(plan["late"])
    except OSError as error:
        failed = {"seccomp": error.strerror or str(error)}
    else:
        return {}
    if plan["strict"]:
        tell(channel, "unheld", failed)
        os._exit(1)
    return failed


def load_program(channel: Any, config: Any, room: str) -> Any:
    """The script of mode fork, with its imports loaded. Ends this process where it cannot be run so.

    `room` is a folder that may be written to.
    """
    zygote = _neighbour("zygote")
    try:
        program = zygote.prepare(list(config["arguments"]), list(config["preload"]), config["skip"], room)
    except zygote.UnfitError as error:
        tell(channel, "unfit", str(error)[:TOLD_WORDS])
        os._exit(1)
    if program.unclean:
        tell(channel, "unclean", in_short(program.unclean))
        os._exit(1)
    return program


def _neighbour(name: str) -> Any:
    """A module that stands beside this one."""
    sys.path.insert(0, _HERE)
    try:
        return __import__(name)
    finally:
        sys.path.remove(_HERE)


def floor_kib(forks: bool) -> int:
    """What the kernel says at least of a child's peak (`ru_maxrss`), in KiB, however small the child is.

    What is spawned shared this process's memory until its exec, and counts this one's peak; what is forked has its
    private pages from the beginning.
    """
    field = b"RssAnon:" if forks else b"VmHWM:"
    with open("/proc/self/status", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
