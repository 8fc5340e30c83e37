"""What holds a helper: two processes, of which the one that the bus started stays outside and only waits.

Its child, inside, does the work. Where the kernel allows it that is process 1 of a pid namespace of its own, to which
whatever loses its parent comes as a child, and with which all of it dies. Elsewhere both are child subreapers
(prctl(2)): orphans come to the inner one, and to the outer one what the inner one leaves when it is killed.

All this is the bus's own code under the bus's own interpreter, up to and with the message "contained". Only then, in
mode fork, the process inside becomes the overlay's interpreter, whose word nobody takes: it may be any program, and may
renounce what it was given. In a namespace it is held by what it cannot reach: the process outside ends it when the bus
goes, and the bus when the process outside does. Elsewhere it could kill that one, and the bus looks for what is left.
"""

from __future__ import annotations

import _socket
import ctypes
import marshal
import os
import select
import sys
import warnings  # noqa: F401  # `os.execvpe` looks for it, when nothing of this interpreter can be read any more

import _signal as signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from runners import launcher, sandbox, scratch
    from runners.channel import MESSAGE_BYTES, open_channel, tell
    from runners.descendants import Family, send_signal
    from runners.execution import STREAMS
    from runners.sandbox import check
else:
    import launcher
    import sandbox
    import scratch
    from channel import MESSAGE_BYTES, open_channel, tell
    from descendants import Family, send_signal
    from execution import STREAMS
    from sandbox import check

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x08000000, 0x10000000, 0x20000000
NEW = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
MS_REC, MS_SLAVE = 0x4000, 0x80000
"""Of <linux/sched.h> and <linux/mount.h>."""

WATCHED = (signal.SIGTERM, signal.SIGCHLD)
"""What the process outside waits for."""

IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
"""From its start on."""

_libc = ctypes.CDLL(None, use_errno=True)


def contain() -> None:
    """Go on as the process inside: in mode fork as the overlay's interpreter, else as this one."""
    channel = open_channel()
    _, config = marshal.loads(channel.recv(MESSAGE_BYTES, _socket.MSG_PEEK))  # noqa: S302  # from the bus
    _as_started_fresh()
    in_namespace, plan = config["namespace"], config["plan"]
    if in_namespace:
        _unshare(channel)
    places = [] if plan is None else _make_places(channel, plan["scratch"], in_namespace)
    on_disk = [] if plan is None or (in_namespace and plan["scratch"]["mounts"]) else places[:1]
    _go_inside(channel, config["bus"], in_namespace, on_disk)
    if in_namespace:
        mb = 0 if plan is None else plan["scratch"]["mb"]
        _furnish(channel, [(place, _size_mb(place, mb)) for place in places if place not in on_disk])
    pidfd = os.pidfd_open(os.getpid())
    # Nothing of the overlay is loaded yet, and all children inherit what is taken here.
    taken, failed = ([], {}) if plan is None else sandbox.take(plan, places, in_namespace)
    if failed and plan["strict"]:
        _give_up(channel, "unheld", failed)
    tell(channel, "contained", {"namespace": in_namespace, "taken": taken, "failed": failed}, pidfd)
    os.close(pidfd)
    if config["interpreter"] is None:
        channel.detach()
    else:
        _become(config["interpreter"], config["environment"], channel)


def _as_started_fresh() -> None:
    """Signals as a new interpreter has them, whatever the bus was started with; children inherit them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    for number in IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _unshare(channel: Any) -> None:
    """Have the next child be process 1 of a new pid namespace, with mounts and shared memory apart from all others'.

    Who lacks the capability, as root too may, gets a user namespace with it.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        try:
            check(_libc.unshare(NEW))
        except PermissionError:
            check(_libc.unshare(NEW | CLONE_NEWUSER))
            _map_ids(uid, gid)
    except OSError as error:
        _give_up(channel, "no_namespace", (error.errno, error.strerror))


def _map_ids(uid: int, gid: int) -> None:
    """The same ids inside as outside (user_namespaces(7))."""
    for name, text in (("setgroups", "deny"), ("uid_map", "%d %d 1" % (uid, uid)), ("gid_map", "%d %d 1" % (gid, gid))):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)


def _make_places(channel: Any, place: Any, private: bool) -> list[str]:
    """The folders that are the helper's own: that of scratch, then shared memory where it is private.

    A root may be open to all users (/var/tmp), so that a folder that is there already is not taken for the helper's.
    """
    folder = scratch.folder_of(place["root"], sys.argv[2], private and place["mounts"])
    try:
        os.makedirs(place["root"], scratch.OWNER, exist_ok=True)
        if folder != place["root"]:
            os.mkdir(folder, scratch.OWNER)
    except OSError as error:
        _give_up(channel, "not_started", (error.errno, "%s: %s" % (folder, error.strerror)))
    return [folder, scratch.SHARED_MEMORY] if private and os.path.isdir(scratch.SHARED_MEMORY) else [folder]


def _size_mb(place: str, mb: int) -> int:
    """Of scratch twice what a call may have: one that takes too much is ended, and leaves the others as much."""
    return mb if place == scratch.SHARED_MEMORY else 2 * mb


def _go_inside(channel: Any, bus: int, in_namespace: bool, leftover: list[str]) -> None:
    """Returns in the process inside only.

    Signals are blocked until then, as a program may try some at its parent. The parent's death is asked for by both,
    and may have come before: a bus that is gone is no parent any more, and of the process outside the pipe has ended.
    `leftover` are folders to remove at the end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    launcher.prctl(launcher.PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != bus:
        os._exit(1)
    if not in_namespace:
        launcher.prctl(launcher.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    alive, lives = os.pipe2(os.O_CLOEXEC)
    try:
        inside = os.fork()
    except OSError as error:
        _give_up(channel, "not_started", (error.errno, error.strerror))
    if inside:
        _watch_over(inside, in_namespace, [channel.fileno(), alive], leftover)
    os.close(lives)
    launcher.prctl(launcher.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if _has_ended(alive):
        os._exit(1)
    os.close(alive)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if not in_namespace:
        launcher.prctl(launcher.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _watch_over(inside: int, in_namespace: bool, held: list[int], leftover: list[str]) -> NoReturn:
    """Wait until the process inside has ended, or for TERM from the bus or by its death; then end all that is left.

    This one is under no rights of an overlay, so it removes what the others may not.
    """
    for fd in held + list(range(STREAMS)):
        os.close(fd)
    while signal.sigwait(WATCHED) == signal.SIGCHLD:
        if os.waitid(os.P_PID, inside, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
    send_signal(inside, signal.SIGKILL)  # not yet reaped, it has its number
    _, status = os.waitpid(inside, 0)
    if not in_namespace:
        Family().end()
    for folder in leftover:
        _remove(folder)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _remove(folder: str) -> None:
    try:
        scratch.remove_tree(folder)
    except OSError:  # the bus will try again
        pass


def _has_ended(pipe: int) -> bool:
    """Whether nobody can write to it any more."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(0))


def _furnish(channel: Any, places: list[tuple[str, int]]) -> None:
    """The namespace's own /proc, so that what is in it sees itself, and memory for the places, each of so many MiB."""
    try:
        check(_libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
        check(_libc.mount(b"proc", b"/proc", b"proc", 0, None))
        for place, mb in places:
            sandbox.mount_in_memory(place, mb)
    except OSError as error:
        _give_up(channel, "no_namespace", (error.errno, error.strerror))
    _end_shared_memory_with_its_users()


def _end_shared_memory_with_its_users() -> None:
    """Segments of System V would last as long as the namespace (proc_sys_kernel(5)). Not every kernel lets everyone."""
    try:
        with open("/proc/sys/kernel/shm_rmid_forced", "w") as file:
            file.write("1")
    except OSError:
        pass


def _become(interpreter: tuple[str, ...], environment: dict[str, str], channel: Any) -> NoReturn:
    """Go on as the overlay's interpreter, with this file's neighbour; it is found as any command is (`subprocess`)."""
    for number in IGNORED_BY_PYTHON:  # which it hands on so
        signal.signal(number, signal.SIG_DFL)
    os.set_inheritable(channel.fileno(), True)
    try:
        env = launcher.given_environment(environment)
        os.execvpe(interpreter[0], [*interpreter, *sys.argv, "inside"], env)  # noqa: S606
    except OSError as error:
        _give_up(channel, "not_started", (error.errno, error.strerror))
    except ValueError as error:  # a NUL in a string
        _give_up(channel, "not_started", (None, str(error)))


def _give_up(channel: Any, verb: str, about: Any) -> NoReturn:
    """A socket that is closed with something unread is reset, and what was said by it may be lost: "begin" is read."""
    channel.recv(MESSAGE_BYTES)
    tell(channel, verb, about)
    os._exit(1)
