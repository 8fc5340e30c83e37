"""The helper: a small resident process that starts the programs of one overlay for the bus, and reaps and kills them.

    python3 launcher.py FD CONFIG

It runs under the overlay's own interpreter, so: standard library only, any CPython from 3.8 on, and nothing of the bus.
FD is its end of a SOCK_SEQPACKET pair. CONFIG is a JSON object: `mark` (what its processes are known by), `namespace`
(whether to try for a pid namespace), `arguments` (mode fork: the script and what follows it; null in mode spawn),
`preload` and `skip` (modules to load before the calls, and not to load).

Each message is a JSON object with one member.

    to the helper     {"run": [call, argv, env]} with stdin, stdout and stderr as SCM_RIGHTS
                      {"kill": [call, signal]}   to the group of the call; {"measure": call}
    from the helper   {"ready": {"namespace": bool, "loaded": [module], "left": {module: why}}} with a pidfd of itself;
                      or {"no_namespace": why}, {"unfit": why}, {"unclean": {module: why}}, and it ends
                      {"failed": [call, errno, words]}   it did not start
                      {"ended": [[call, wait status, cpu ms, peak KiB, lost], ...]}
                      {"memory": [call, resident KiB or null]}

Nothing outlives its call. Where the kernel allows it the helper is process 1 of a pid namespace of its own, to which
whatever loses its parent comes as a child, and with which all of it dies; the process that the bus started then only
waits for it. Elsewhere it is a child subreaper (prctl(2)). A call has ended once its process was reaped and every
orphan is gone that no running call can account for; only then is its exit told. When the bus goes, the socket closes,
or the parent-death signal comes, and everything ends.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import json
import os
import select
import signal
import sys
from types import SimpleNamespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_REC, MS_SLAVE = 0x4000, 0x80000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of <linux/sched.h>, <linux/mount.h> and <linux/prctl.h>."""

MESSAGE_BYTES = 128 * 1024
"""The longest message to the helper. A command with its environment is hardly a hundredth of it."""

TOLD_AT_ONCE = 200
"""Ends in one message, so that it is far below 64 KiB."""

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

SWEEPS = 100
"""How often orphans are looked for and killed one by one, before all that is in the namespace is killed at once."""

MARK = "OVERLAY_CALL"
"""The environment variable that tells whose a process is that has left its group and lost its parent."""

LOST = "a program of the same overlay left processes behind that could only be ended together with this call"

_libc = ctypes.CDLL(None, use_errno=True)


def enter_namespace(channel: Any) -> bool:
    """Go on as process 1 of a new pid namespace with a /proc of its own; False where the kernel has none to give.

    The process that was started stays outside, waits for the one that goes on, and is killed with the bus.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(CLONE_NEWPID | CLONE_NEWNS | (CLONE_NEWUSER if uid else 0)) != 0:
        _libc.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
        return False
    try:
        if uid:
            _map_ids(uid, gid)
        inside = os.fork()
        if inside:
            _wait_for(inside, channel)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _check(_libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None))
        _check(_libc.mount(b"proc", b"/proc", b"proc", 0, None))
    except OSError as error:
        tell(channel, {"no_namespace": str(error)})
        os._exit(1)
    return True


def _map_ids(uid: int, gid: int) -> None:
    """The same ids inside as outside (user_namespaces(7))."""
    for name, text in (("setgroups", "deny"), ("uid_map", "%d %d 1" % (uid, uid)), ("gid_map", "%d %d 1" % (gid, gid))):
        with open("/proc/self/" + name, "w") as file:
            file.write(text)


def _wait_for(inside: int, channel: Any) -> None:
    """Hold nothing, and end when process 1 of the namespace has ended. Never returns."""
    channel.close()
    os.closerange(0, 3)
    _, status = os.waitpid(inside, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def tell(channel: Any, message: dict[str, Any], fd: int | None = None) -> None:
    rights = [] if fd is None else [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
    try:
        channel.sendmsg([json.dumps(message, separators=(",", ":")).encode()], rights)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):
            raise
        # The bus is gone; the next look at the socket says so.


class Call:
    """One program that runs: the number that the bus knows it by, and its process."""

    __slots__ = ("number", "pid")

    def __init__(self, number: int, pid: int) -> None:
        self.number = number
        self.pid = pid


class Launcher:
    """Starts, reaps and kills. `program` is the script that is run by fork, None where programs are spawned."""

    def __init__(self, channel: Any, program: Any, mark: str, in_namespace: bool) -> None:
        self._channel = channel
        self._program = program
        self._mark = mark
        self._in_namespace = in_namespace
        self._buffer = bytearray(MESSAGE_BYTES)
        self._calls = {}  # type: dict[int, Call]
        self._pids = {}  # type: dict[int, int]
        self._ended = []  # type: list[list[Any]]
        self._sweeps = 0
        self._environment = given_environment()
        self._family = Family(in_namespace)
        self._wakeup, self._alarm = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
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
        ((verb, given),) = json.loads(self._buffer[:size]).items()
        if verb == "run":
            return self._run(fds, *given)
        if verb == "kill":
            self._kill(*given)
        elif verb == "measure":
            tell(self._channel, {"memory": [given, self._resident_kib(given)]})
        return None

    def _run(self, fds: list[int], number: int, argv: list[str], env: dict[str, str]) -> Any:
        """Start a program. Returns None, but in a forked child what it is to run."""
        env[MARK] = "%s-%d" % (self._mark, number)
        try:
            pid = self._spawn(fds, argv, env) if self._program is None else os.fork()
        except (OSError, ValueError) as error:
            words = [getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)]
            tell(self._channel, {"failed": [number] + words})
            pid = None
        if pid == 0:
            self._become_child(fds)
            return SimpleNamespace(argv=argv, env=env)
        for fd in fds:
            os.close(fd)
        if pid is not None:
            self._calls[pid] = Call(number, pid)
            self._pids[number] = pid
            self._family.born(pid)
        return None

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
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._family.helper:  # it ended before the signal was asked for
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for to, fd in enumerate(fds):
            os.dup2(fd, to)
        os.closerange(3, max(fds + [self._alarm, self._wakeup, self._channel.fileno(), self._family.highest_fd]) + 1)
        self._channel.detach()

    def _kill(self, number: int, signal_number: int) -> None:
        pid = self._pids.get(number)
        if pid is not None:
            _signal_group(pid, signal_number)

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
                tell(self._channel, {"ended": self._ended[:TOLD_AT_ONCE]})
                del self._ended[:TOLD_AT_ONCE]
            self._sweeps = 0

    def _bury(self, pid: int) -> None:
        """Reap one. Its group is killed before, while nobody else can have its number."""
        call = self._calls.pop(pid, None)
        if call is not None:
            _signal_group(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        if call is not None:
            del self._pids[call.number]
            cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1000, 3)
            lost = LOST if self._sweeps > SWEEPS else None
            self._ended.append([call.number, status, cpu_ms, usage.ru_maxrss, lost])

    def _orphans_left(self) -> bool:
        """Kill what no running call can account for. True where there was something: its end is waited for."""
        if self._calls:
            orphans = [pid for pid in self._family.strangers(self._calls) if not self._is_of_a_call(pid)]
        elif self._family.has_children():
            orphans = self._family.strangers(self._calls)
        else:
            return False
        if not orphans:
            return False
        self._sweeps += 1
        if self._sweeps > SWEEPS and self._in_namespace:
            os.kill(-1, signal.SIGKILL)
        for pid in orphans:
            _signal(pid, signal.SIGKILL)
        return True

    def _is_of_a_call(self, pid: int) -> bool:
        """Whether it belongs to a call that runs. In mode fork each call keeps its orphans itself, as a subreaper."""
        if self._program is not None:
            return False
        try:
            if os.getsid(pid) in self._calls:
                return True
            with open("/proc/%d/environ" % pid, "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:  # it is gone
            return False
        return any(("%s=%s-%d" % (MARK, self._mark, number)).encode() in variables for number in self._pids)

    def _end_all(self) -> None:
        """The bus is gone. In a namespace all ends with this process; else it kills until nobody is left."""
        while not self._in_namespace and self._family.has_children():
            for pid in list(self._calls):
                _signal_group(pid, signal.SIGKILL)
            for pid in self._family.strangers({}):
                _signal(pid, signal.SIGKILL)
            try:
                self._calls.pop(os.wait()[0], None)
            except ChildProcessError:
                break
        os._exit(0)


class Family:
    """The processes that come from the helper. `helper` is its process id, as its children see it."""

    def __init__(self, in_namespace: bool) -> None:
        self.helper = os.getpid()
        self._load = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC) if in_namespace else None
        self.highest_fd = self._load or 0
        self._last_known = self._last_number()

    def born(self, pid: int) -> None:
        """A child was started. Numbers are given in order: one that is left out is somebody else's."""
        if self._last_known is not None and pid == self._last_known + 1:
            self._last_known = pid

    @staticmethod
    def has_children() -> bool:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def strangers(self, known: Any) -> list[int]:
        """The children that are not in `known`: orphans that came to this process."""
        last = self._last_number()
        if last is not None and last == self._last_known:
            return []  # nobody but this process has started any
        others = [pid for pid in _processes() if pid not in known and pid != self.helper]
        if not others:
            self._last_known = last
        return [pid for pid in others if _parent(pid) == self.helper]

    def _last_number(self) -> int | None:
        """The process id that was given last in this namespace: the last field of /proc/loadavg (proc(5))."""
        return None if self._load is None else int(os.pread(self._load, 128, 0).split()[-1])


def given_environment() -> dict[str, str]:
    """The environment as the bus gave it; Python may have added LC_CTYPE to its own (PEP 538)."""
    with open("/proc/self/environ", "rb") as file:
        pairs = [line.partition(b"=") for line in file.read().split(b"\0") if line]
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int | None:
    """The fourth field of /proc/PID/stat, after a name in brackets that may hold anything (proc(5))."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left; or only a set-user-ID program


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
    del sys.modules["zygote"]  # the name belongs to the overlay
    try:
        program = zygote.prepare(config["arguments"], config["preload"], config["skip"])
    except zygote.UnfitError as error:
        tell(channel, {"unfit": str(error)})
        os._exit(1)
    if program.unclean:
        tell(channel, {"unclean": program.unclean})
        os._exit(1)
    return program


def as_started_fresh() -> None:
    """Signals as a new interpreter has them, whatever the bus was started with; children inherit them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.path and sys.path[0] == os.path.realpath(_HERE):  # absent with -I and -P
        del sys.path[0]


def main() -> Any:
    """Returns only in a forked child: the program and the call that it is to run."""
    fd, config = int(sys.argv[1]), json.loads(sys.argv[2])
    os.set_inheritable(fd, False)
    channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
    as_started_fresh()
    in_namespace = config["namespace"] and enter_namespace(channel)
    if not in_namespace:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The place to take the rights and limits of the phase: nothing of the overlay is loaded, and all children inherit.
    program = None if config["arguments"] is None else load_program(channel, config)
    launcher = Launcher(channel, program, config["mark"], in_namespace)
    pidfd = os.pidfd_open(os.getpid()) if hasattr(os, "pidfd_open") else None
    tell(
        channel,
        {
            "ready": {
                "namespace": in_namespace,
                "loaded": program.loaded if program else [],
                "left": program.left if program else {},
            }
        },
        pidfd,
    )
    if pidfd is not None:
        os.close(pidfd)
    return program, launcher.serve()


if __name__ == "__main__":
    _program, _call = main()
    _program.run(_call.argv, _call.env)
