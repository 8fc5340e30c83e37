"""The helper: a small resident process that starts the programs of one overlay for the bus, and reaps and kills them.

    python3 launch.py FD

It runs under the overlay's own interpreter, so: standard library only, any CPython from 3.8 on, and nothing of the bus;
and as little as possible of the library, since each fork pays for what is loaded.

FD is its end of a SOCK_SEQPACKET pair. Each message is a pair of a verb and what it is about. To the helper they are
written by `marshal`, in a version that all these interpreters read: it is part of them, and a reader of JSON is not.
From the helper, which may have loaded an overlay's libraries, they are JSON: marshal is not for what nobody can trust.

    to the helper     "begin"    {"mark", "namespace", "arguments", "preload", "skip"}, once: what its processes are
                                 known by, whether to try for a pid namespace, of mode fork the script and what
                                 follows it (None in mode spawn), modules to load before the calls and not to load
                      "run"      (call, argv, env), with stdin, stdout and stderr as SCM_RIGHTS
                      "kill"     (call, signal), to the group of the call
                      "measure"  call
    from the helper   "ready"    {"namespace": bool, "floor_kib": of a peak, "loaded": [module], "left": {module: why}},
                                 with a pidfd of itself; or it ends with "no_namespace" why, "unfit" why or "unclean"
                                 {module: why}
                      "failed"   (call, errno, words): it did not start
                      "ended"    [(call, wait status, cpu ms, peak KiB, lost), ...]
                      "memory"   (call, resident KiB or None)

Nothing outlives its call. The helper is two processes: the one that the bus started stays outside and only waits for
its child, which does the work. Where the kernel allows it that child is process 1 of a pid namespace of its own, to
which whatever loses its parent comes as a child, and with which all of it dies. Elsewhere both are child subreapers
(prctl(2)): orphans come to the inner one, and to the outer one what the inner one leaves when it is killed.

A call has ended once its process was reaped and every orphan is gone that no running call can account for; only then is
its exit told. When the bus goes, the socket closes, or the parent-death signal comes, and everything ends.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import marshal
import os
import select
import sys

import _signal as signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_HERE = os.path.dirname(os.path.abspath(__file__))

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_REC, MS_SLAVE = 0x4000, 0x80000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of <linux/sched.h>, <linux/mount.h> and <linux/prctl.h>."""

MARSHAL = 2
"""The version of the format. Every CPython reads it."""

MESSAGE_BYTES = 128 * 1024
"""The longest message to the helper. A command with its environment is hardly a hundredth of it."""

TOLD_AT_ONCE, TOLD_OF_EACH = 200, 120
"""Ends or modules in one message, and characters of why one was not loaded, so that it is far below 64 KiB."""

STREAMS = 3
"""stdin, stdout and stderr: the descriptors that a program gets."""

RESET_SIGNALS = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGCHLD,
)
"""What the bus or this process may ignore or handle, and a program finds as the system has it."""

NR_PIDFD_OPEN = 434
"""Of <asm-generic/unistd.h>: pidfd_open(2), which Python itself has from 3.9 on, and not in every build."""

WATCHED = (signal.SIGTERM, signal.SIGCHLD)
"""What the process outside waits for."""

SWEEPS_ALONE, SWEEPS = 10, 100
"""How often orphans are looked for and killed, alone and then with their groups, before the whole namespace is."""

SCANS = 10
"""How often /proc is read at most, where it changed meanwhile."""

MARK = "OVERLAY_CALL"
"""The environment variable that tells whose a process is that has left its group and lost its parent."""

LOST = "a program of the same overlay left processes behind that could only be ended together with this call"

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = ctypes.CDLL(None).prctl
"""Called in each fork, without the errno that nobody asks for: that alone would touch fifty pages."""


def enter_namespace(channel: Any) -> bool:
    """Go on as process 1 of a new pid namespace with a /proc of its own; False where the kernel has none to give.

    The process that was started stays outside, waits for the one that goes on, and is killed with the bus.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(CLONE_NEWPID | CLONE_NEWNS | (CLONE_NEWUSER if uid else 0)) != 0:
        _prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
        return False
    try:
        if uid:
            _map_ids(uid, gid)
        inside = os.fork()
        if inside:
            _wait_for(inside, channel)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _check(_libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
        _check(_libc.mount(b"proc", b"/proc", b"proc", 0, None))
    except OSError as error:
        tell(channel, "no_namespace", str(error))
        os._exit(1)
    return True


def _map_ids(uid: int, gid: int) -> None:
    """The same ids inside as outside (user_namespaces(7))."""
    for name, text in (("setgroups", "deny"), ("uid_map", "%d %d 1" % (uid, uid)), ("gid_map", "%d %d 1" % (gid, gid))):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)


def _wait_for(inside: int, channel: Any) -> NoReturn:
    """Hold nothing, and end when process 1 of the namespace has ended."""
    channel.close()
    os.closerange(0, 3)
    _, status = os.waitpid(inside, 0)
    _exit_like(status)


def _exit_like(status: int) -> NoReturn:
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def go_inside(channel: Any) -> None:
    """Without a namespace: go on as a child and subreaper, watched over by the process that was started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a program may try some at its parent
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    inside = os.fork()
    if inside:
        _watch_over(inside, channel)
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # while it cannot be told by the bus
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _watch_over(inside: int, channel: Any) -> NoReturn:
    """Wait until the child has ended, or for TERM, which the bus sends or its death; then end all that is left."""
    channel.close()
    os.closerange(0, 3)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    while signal.sigwait(WATCHED) == signal.SIGCHLD:
        if os.waitid(os.P_PID, inside, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
    _signal(inside, signal.SIGKILL)
    _, status = os.waitpid(inside, 0)
    Family().end()
    _exit_like(status)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


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
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return '"%s"' % "".join("\\u%04x" % ord(sign) if sign < " " or sign in '"\\' else sign for sign in value)
    if isinstance(value, dict):
        return "{%s}" % ",".join("%s:%s" % (text_of(name), text_of(member)) for name, member in value.items())
    if isinstance(value, (list, tuple)):
        return "[%s]" % ",".join(map(text_of, value))
    return repr(value)


class Launcher:
    """Starts, reaps and kills. `program` is the script that is run by fork, None where programs are spawned."""

    def __init__(self, channel: Any, program: Any, mark: str, in_namespace: bool) -> None:
        self._channel = channel
        self._program = program
        self._mark = mark
        self._in_namespace = in_namespace
        self._pid = os.getpid()
        self._buffer = bytearray(MESSAGE_BYTES)
        self._calls = {}  # type: dict[int, int]  # the call of a process
        self._pids = {}  # type: dict[int, int]  # the process of a call
        self._ended = []  # type: list[tuple[Any, ...]]
        self._sweeps = 0
        self._environment = given_environment()
        self._family = Family()
        self._wakeup, self._alarm = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that the kernel keeps it from a process 1
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._poll.register(self._wakeup, select.POLLIN)

    def serve(self) -> Any:
        """Work until the bus is gone. Returns only in a forked child, with what that is to run."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._wakeup:
                    os.read(fd, 4096)
                else:
                    child = self._receive()
                    if child is not None:
                        return child
            self._reap()

    def _receive(self) -> Any:
        try:
            size, ancillary, _, _ = self._channel.recvmsg_into(
                [self._buffer], _socket.CMSG_SPACE(12), _socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            size, ancillary = 0, []
        if not size:
            self._end_all()
        rights = b"".join(data for _, _, data in ancillary)
        fds = [int.from_bytes(rights[at : at + 4], sys.byteorder) for at in range(0, len(rights), 4)]
        verb, given = marshal.loads(self._buffer[:size])  # noqa: S302  # only the bus has the other end
        if verb == "run":
            return self._run(fds, *given)
        if verb == "kill":
            self._kill(*given)
        elif verb == "measure":
            tell(self._channel, "memory", (given, self._resident_kib(given)))
        return None

    def _run(self, fds: list[int], number: int, argv: list[str], env: dict[str, str]) -> Any:
        """Start a program. Returns None, but in a forked child what it is to run."""
        env[MARK] = "%s-%d" % (self._mark, number)
        pid = failed = None
        try:
            pid = self._start(fds, argv, env)
        except (OSError, ValueError) as error:
            failed = (number, getattr(error, "errno", None), getattr(error, "strerror", None) or str(error))
        if pid == 0:
            self._become_child(fds)
            return list(argv), env
        for fd in fds:
            os.close(fd)
        if pid is None:
            tell(self._channel, "failed", failed)
        else:
            self._calls[pid] = number
            self._pids[number] = pid
        return None

    def _start(self, fds: list[int], argv: list[str], env: dict[str, str]) -> int:
        """The process id; in a forked child 0. Raises OSError, or ValueError for a NUL in a string."""
        if len(fds) < STREAMS:  # the kernel passes as many as this process may have open (unix(7), MSG_CTRUNC)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._spawn(fds, argv, env) if self._program is None else os.fork()

    def _spawn(self, fds: list[int], argv: list[str], env: dict[str, str]) -> int:
        return os.posix_spawnp(
            argv[0],
            argv,
            dict(self._environment, **env),
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(fds)],
            setsid=True,
            setsigmask=(),
            setsigdef=RESET_SIGNALS,
        )

    def _become_child(self, fds: list[int]) -> None:
        """As a new process is: a session of its own, these three descriptors and no other, signals as they come."""
        os.setsid()
        _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._pid:  # it ended before the signal was asked for
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for to, fd in enumerate(fds):
            os.dup2(fd, to)
        os.closerange(3, max(fds + [self._alarm, self._wakeup, self._channel.fileno(), self._family.highest_fd]) + 1)
        self._channel.detach()

    def _kill(self, number: int, signal_number: int) -> None:
        """The group; of a fork that has not yet made its own, the process."""
        pid = self._pids.get(number)
        if pid is not None and not _signal_group(pid, signal_number):
            _signal(pid, signal_number)

    def _resident_kib(self, number: int) -> int | None:
        try:
            with open("/proc/%d/statm" % self._pids[number]) as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        except (KeyError, OSError, IndexError):
            return None

    def _reap(self) -> None:
        """Take every ended process off the kernel's table, then tell the bus of the calls of which nothing is left."""
        while True:
            try:
                seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                seen = None
            if seen is None:
                break
            self._bury(seen.si_pid)
        if self._ended and not self._orphans_left():
            while self._ended:
                tell(self._channel, "ended", self._ended[:TOLD_AT_ONCE])
                del self._ended[:TOLD_AT_ONCE]
            self._sweeps = 0

    def _bury(self, pid: int) -> None:
        """Reap one. Its group is killed before, while nobody else can have its number."""
        number = self._calls.pop(pid, None)
        if number is not None:
            _signal_group(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        if number is not None:
            del self._pids[number]
            cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1000, 3)
            lost = LOST if self._sweeps > SWEEPS else None
            self._ended.append((number, status, cpu_ms, usage.ru_maxrss, lost))

    def _orphans_left(self) -> bool:
        """Kill what no running call can account for. True where there was something: its end is waited for."""
        orphans = [pid for pid in self._family.children() if pid not in self._calls and not self._is_of_a_call(pid)]
        if not orphans:
            return False
        self._sweeps += 1
        if self._sweeps > SWEEPS and self._in_namespace:
            os.kill(-1, signal.SIGKILL)
        for pid in orphans:
            if self._sweeps > SWEEPS_ALONE:
                _signal_group_of(pid, signal.SIGKILL)
            _signal(pid, signal.SIGKILL)
        return True

    def _is_of_a_call(self, pid: int) -> bool:
        """Whether it belongs to a call that runs. In mode fork each call keeps its orphans itself, as a subreaper."""
        if self._program is not None:
            return False
        try:
            session = os.getsid(pid)
        except OSError:  # it is gone
            return False
        return session in self._calls or self._is_marked(pid) or self._is_marked(session)

    def _is_marked(self, pid: int) -> bool:
        """Whether its environment names a call that runs."""
        try:
            with open("/proc/%d/environ" % pid, "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:  # it is gone, or of another user
            return False
        return any(("%s=%s-%d" % (MARK, self._mark, number)).encode() in variables for number in self._pids)

    def _end_all(self) -> NoReturn:
        """The bus is gone. In a namespace all ends with this process."""
        if not self._in_namespace:
            self._family.end()
        os._exit(0)


class Family:
    """The children of this process: those that it started, and the orphans that came to it.

    A child stays one until this process reaps it, so the kernel's list of them (proc(5)) misses none, however quickly
    they fork and end.
    """

    def __init__(self) -> None:
        try:
            self._list = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # the kernel was built without CONFIG_PROC_CHILDREN
            self._list = -1
        self.highest_fd = self._list

    def children(self) -> list[int]:
        """Their process ids, of those that ended and were not reaped, too."""
        if self._list < 0:
            return _children_by_scan()
        text = part = os.pread(self._list, 4096, 0)
        while part:
            part = os.pread(self._list, 4096, len(text))
            text += part
        return [int(pid) for pid in text.split()]

    def end(self) -> None:
        """Kill until nobody is left."""
        while True:
            for pid in self.children():
                _signal_group_of(pid, signal.SIGKILL)
                _signal(pid, signal.SIGKILL)
            try:
                os.wait()
            except ChildProcessError:
                return


def given_environment() -> dict[str, str]:
    """The environment as the bus gave it; Python may have added LC_CTYPE to its own (PEP 538)."""
    with open("/proc/self/environ", "rb") as file:
        pairs = [line.partition(b"=") for line in file.read().split(b"\0") if line]
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def floor_kib(forks: bool) -> int:
    """What the kernel says at least of a child's peak (`ru_maxrss`), in KiB, however small the child is.

    What is spawned shared this process's memory until its exec, and counts this one's peak; what is forked has its
    private pages from the beginning.
    """
    field = b"RssAnon:" if forks else b"VmHWM:"
    with open("/proc/self/status", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def _children_by_scan() -> list[int]:
    """What ended while /proc was read may have left a child that was not there yet: then it is read again."""
    me = os.getpid()
    for _ in range(SCANS):
        parents = {int(name): _parent(name) for name in os.listdir("/proc") if name.isdigit()}
        if None not in parents.values():
            break
    return [pid for pid, parent in parents.items() if parent == me]


def _parent(pid: str) -> int | None:
    """The fourth field of /proc/PID/stat, after a name in brackets that may hold anything; None where it has ended."""
    try:
        with open("/proc/%s/stat" % pid, "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:  # hidepid: another user's
        return 0


def _signal_group(group: int, number: int) -> bool:
    """Whether there is such a group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # only a set-user-ID program is left
    return True


def _signal_group_of(pid: int, number: int) -> None:
    """To all in the group of a child at once: none gets away by forking. The helper's own group is spared."""
    try:
        group = os.getpgid(pid)
    except ProcessLookupError:
        return
    if group != os.getpgrp():
        _signal_group(group, number)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def load_program(channel: Any, config: Any) -> Any:
    """The script of mode fork, with its imports loaded. Ends this process where it cannot be run so."""
    sys.path.insert(0, _HERE)
    import zygote  # type: ignore[import-not-found]

    sys.path.remove(_HERE)
    try:
        program = zygote.prepare(list(config["arguments"]), list(config["preload"]), config["skip"])
    except zygote.UnfitError as error:
        tell(channel, "unfit", str(error))
        os._exit(1)
    if program.unclean:
        tell(channel, "unclean", program.unclean)
        os._exit(1)
    return program


def as_started_fresh() -> None:
    """Signals as a new interpreter has them, whatever the bus was started with; children inherit them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def open_pidfd() -> int | None:
    """Of this process; None where the kernel knows none, before Linux 5.3."""
    fd = _libc.syscall(NR_PIDFD_OPEN, os.getpid(), 0)
    if fd < 0:
        return None
    return int(fd)


def main() -> Any:
    """Returns only in a forked child: what runs the program, and the call that it is to run."""
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
    _, config = marshal.loads(channel.recv(MESSAGE_BYTES))  # noqa: S302
    as_started_fresh()
    in_namespace = config["namespace"] and enter_namespace(channel)
    if not in_namespace:
        go_inside(channel)
    # The place to take the rights and limits of the phase: nothing of the overlay is loaded, and all children inherit.
    program = None if config["arguments"] is None else load_program(channel, config)  # type: Any
    launcher = Launcher(channel, program, config["mark"], in_namespace)
    if not in_namespace:
        _prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)  # from now on the bus closes the socket, and all is ended in order
    pidfd = open_pidfd()
    loaded, left = ([], {}) if program is None else (program.loaded, program.left)
    left = {name: why[:TOLD_OF_EACH] for name, why in list(left.items())[:TOLD_AT_ONCE]}
    state = {
        "namespace": in_namespace,
        "floor_kib": floor_kib(program is not None),
        "loaded": loaded[:TOLD_AT_ONCE],
        "left": left,
    }
    tell(channel, "ready", state, pidfd)
    if pidfd is not None:
        os.close(pidfd)
    argv, env = launcher.serve()
    return program.run, argv, env
