"""What starts the programs of one overlay for the bus, and reaps and kills them.

    launch.py FD MARK [inside]

It runs in the process inside a containment (`containment.py`), which has taken everything that holds it, and in mode
fork under the overlay's own interpreter. So: standard library only, any CPython from 3.8 on, and nothing of the bus;
and as little as possible of the library, since each fork pays for what is loaded.

FD is its end of a SOCK_SEQPACKET pair, MARK what its programs are known by. Each message is a pair of a verb and what
it is about. To the helper they are written by `marshal`, in a version that all these interpreters read: it is part of
them, and a reader of JSON is not. From the helper, which may have loaded an overlay's libraries, they are JSON: marshal
is not for what nobody can trust.

    to the helper     "begin"    {"bus", "namespace", "environment", "plan", "interpreter", "arguments", "preload",
                                 "skip", "ahead", "places"}, once: the process id of the bus; whether to try for a pid
                                 namespace; what the programs find in their environment and this process may not; what
                                 to take on (`sandbox.py`) or None; of mode fork the interpreter with its options, the
                                 script and what follows it (both None in mode spawn), modules to load before the calls
                                 and not to load, calls after which to fork ahead of the next, whether that waits for a
                                 place
                      "run"      (call, argv, env, (bytes of data that it may have (RLIMIT_DATA), KiB that it may have
                                 in memory with all that it starts), 0 for any number, and how many descriptors come
                                 with this as SCM_RIGHTS: stdin, stdout, stderr, and `cgroup.procs` of the cgroup that
                                 it is to enter, if it has one; the place that this cgroup is, 0 if none))
                      "place"    place, with `cgroup.procs` of a cgroup: there the next process is forked ahead, since
                                 to enter one can take longer than a call
                      "kill"     (call, signal), to the group of the call
                      "measure"  call
    from containment  "contained" {"namespace": bool, "taken": [mechanism], "failed": {mechanism: why}}, with a pidfd of
                      the process inside; or it ends with
                      "no_namespace" (errno, words), or
                      "unheld" {mechanism: why}, where the plan is strict; or before or after "contained" with
                      "not_started" (errno, words): the process inside, or the overlay's interpreter
    from the helper   "ready"    {"floor_kib": of a peak, "loaded": [module], "left": {module: why}, "failed":
                                 {mechanism: why} of what is taken late}; or it ends with
                                 "unfit" why, "unclean" {module: why} or "unheld" {mechanism: why}
                      "failed"   (call, errno, words): it did not start
                      "ended"    [(call, wait status, cpu ms, peak KiB, why), ...]: None, `LOST`, or that it
                                 had "too many processes", "too much memory" or "too much in scratch"
                      "memory"   (call, KiB or None)
                      "using"    [(call, KiB), ...]: what calls that run for a while have of memory, if that changed

Nothing outlives its call. It has ended once its process was reaped and every orphan is gone that no running call can
account for; only then is its exit told. When the bus goes, the socket closes, and everything ends.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import marshal
import os
import select
import sys
from resource import RLIMIT_DATA, getrlimit

import _signal as signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from runners.channel import MARSHAL, MESSAGE_BYTES, descriptors, tell
    from runners.descendants import Family, resident_kib, send_signal, share_kib, signal_group, signal_group_of, tasks
    from runners.execution import STREAMS, enter_or_end, fork_and_execute, limit_data, spawn
    from runners.scratch import NAMES, Scratch
    from runners.watching import Seen, Watch
else:
    from channel import MARSHAL, MESSAGE_BYTES, descriptors, tell
    from descendants import Family, resident_kib, send_signal, share_kib, signal_group, signal_group_of, tasks
    from execution import STREAMS, enter_or_end, fork_and_execute, limit_data, spawn
    from scratch import NAMES, Scratch
    from watching import Watch

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of <linux/prctl.h>."""

RIGHTS_SPACE = _socket.CMSG_SPACE(4 * (STREAMS + 1))
"""Room for the descriptors of a program and of its cgroup."""

TOLD_AT_ONCE = 200
"""Ends in one message, which is far below 64 KiB."""

SWEEPS_ALONE, SWEEPS = 10, 100
"""How often orphans are looked for and killed, alone and then with their groups, before the whole namespace is."""

MARK = "OVERLAY_CALL"
"""The environment variable that tells whose a process is that has left its group and lost its parent."""

NOBODY = 0
"""Instead of the number of a call, which begin with 1: what no running call can account for."""

NOWHERE = (0, -1)
"""Instead of a place and its descriptor: a process is forked ahead where this one is."""

LOST = "a program of the same overlay left processes behind that could only be ended together with this call"
TOO_MANY = "too many processes: it had %d, with their threads, where %d are allowed"
TOO_MUCH = "too much memory: %d KiB, with all that it had started"
"""Why a call was ended from here."""

prctl = ctypes.CDLL(None).prctl
"""Called in each fork, without the errno that nobody asks for: that alone would touch fifty pages."""


class Launcher:
    """Starts, reaps and kills. `program` is the script that is run by fork, None where programs are spawned.

    After `ahead` calls a process is forked before its call comes, whenever none runs: a lone call then waits for no
    fork. It is the first to get a call, so that it never waits beside a program. Where calls have cgroups (`places`) it
    goes into that of the next call.

    Spawned programs find `environment` beside that of this process. Each call has a folder of `scratch`, where that is
    given, and is ended where it has more than `most` processes and threads, 0 being any number, or more memory than its
    own limit. Processes that hide whose they are may be as many, all together: else they are ended. What a call adds to
    the environment is bytes for a fork.
    """

    def __init__(
        self,
        channel: Any,
        program: Any,
        mark: str,
        *,
        environment: dict[str, str],
        ahead: int = sys.maxsize,
        places: bool = False,
        scratch: Scratch | None = None,
        most: int = 0,
    ) -> None:
        self._channel = channel
        self._program = program
        self._mark = mark
        given = str if program is None else os.fsencode  # type: Any
        self._mark_name, self._mark_of = given(MARK), given(mark + "-%d")
        self._scratch_names = tuple(map(given, NAMES))
        self._scratch = scratch
        self._most = most
        self._watch = Watch()
        self._excessive = {}  # type: dict[int, str]  # calls that are ended for what they had, and what that was
        self._pid = os.getpid()
        self.in_namespace = self._pid == 1
        self._buffer = bytearray(MESSAGE_BYTES)
        self._calls = {}  # type: dict[int, int]  # the call of a process
        self._pids = {}  # type: dict[int, int]  # the process of a call
        self._ended = []  # type: list[tuple[Any, ...]]
        self._calls_alone = ahead  # that still come before a process is forked ahead
        self._spare = None  # type: tuple[int, Any, int] | None  # such a process, where it waits for its call, its place
        self._place = None if places else NOWHERE  # type: tuple[int, int] | None  # for the next of them
        self._sweeps = 0
        self._orphans_crowd = False
        self._killed = set()  # type: set[int]  # orphans that have yet to end
        self._environment = given_environment(environment)
        self._family = Family()
        if program is not None:
            program.keep(self)
            program.rehearse(self._rehearse)
        self._wakeup, self._alarm = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _wake)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that the kernel keeps it from a process 1
        self._highest_fd = max(self._alarm, self._wakeup, channel.fileno(), self._family.highest_fd)
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._poll.register(self._wakeup, select.POLLIN)

    def serve(self) -> Any:
        """Work until the bus is gone. Returns only in a forked child, with what that is to run."""
        while True:
            child = self._fork_ahead()
            if child is not None:
                return child
            if self._wait():
                verb, given, fds = self._receive()
                if verb == "run":
                    child = self._run(fds, *given)
                    if child is not None:
                        return child
                elif verb == "kill":
                    self._kill(*given)
                elif verb == "place":
                    self._take_place(given, fds)
                elif verb == "measure":
                    tell(self._channel, "memory", (given, self._memory_kib(given)))
            self._reap()
            self._look()

    def _wait(self) -> bool:
        """Whether the bus has said something; else a process has ended, or it is time to look at them."""
        heard = False
        for fd, _ in self._poll.poll(self._watch.left_ms()):
            if fd == self._wakeup:
                os.read(fd, 4096)
            else:
                heard = True
        return heard

    def _receive(self) -> tuple[str, Any, list[int]]:
        """A message, and what came with it. All else that it took is freed before a fork: else both would copy it."""
        try:
            size, ancillary, _, _ = self._channel.recvmsg_into([self._buffer], RIGHTS_SPACE, _socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            size, ancillary = 0, []
        if not size:
            self._end_all()
        verb, given = marshal.loads(self._buffer[:size])  # noqa: S302  # only the bus has the other end
        return verb, given, descriptors(ancillary)

    def _run(self, fds: list[int], number: int, argv: list[str], env: dict[Any, Any], limits: tuple[int, ...]) -> Any:
        """Start a program. Returns None, but in a forked child what it is to run."""
        if env and self._program is not None:
            env = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
        env[self._mark_name] = self._mark_of % number
        data_bytes, most_kib, count, place = limits
        pid = failed = None
        try:
            if self._scratch is not None:
                env.update(dict.fromkeys(self._scratch_names, self._scratch.make(number)))
            _check_number(fds, count)
            pid = self._start(fds, argv, env, data_bytes, place)
        except (OSError, ValueError) as error:
            failed = (number, getattr(error, "errno", None), getattr(error, "strerror", None) or str(error))
        if pid == 0:
            enter_or_end(fds)
            os.setsid()
            self._become_child(self._pid, data_bytes)
            _take_streams(fds, self._highest_fd)
            return argv, env
        for fd in fds:
            os.close(fd)
        if pid is None:
            self._clear(number)
            tell(self._channel, "failed", failed)
        else:
            self._calls[pid] = number
            self._pids[number] = pid
            self._calls_alone -= 1
            self._watch.begin(number, most_kib)
        return None

    def _start(self, fds: list[int], argv: list[str], env: dict[Any, Any], data_bytes: int, place: int) -> int:
        """The process id; in a forked child 0. Raises OSError, or ValueError for a NUL in a string."""
        if self._program is None:
            return self._start_program(fds, argv, dict(self._environment, **env), data_bytes)
        if place and self._place is not None and self._place[0] == place:
            self._leave_place()  # its call has come before a process was forked for it
        return self._hand_over(fds, argv, env, data_bytes, place) or os.fork()

    def _take_place(self, place: int, fds: list[int]) -> None:
        self._leave_place()
        if fds:  # else this process has too many open, and the call brings it again
            self._place = place, fds[0]

    def _leave_place(self) -> None:
        """What is there for the next process that is forked ahead is not for another."""
        if self._place is not None and self._place is not NOWHERE:
            os.close(self._place[1])
            self._place = None

    def _fork_ahead(self) -> Any:
        """Have the next process there before its call, where nothing else is to do. In that one: what it is to run."""
        if self._spare or self._calls or self._ended or self._calls_alone > 0 or self._program is None:
            return None
        if self._place is None:
            return None
        if self._poll.poll(0):
            return None
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError:  # a call will try it, and say what is wrong
            ours.close()
            theirs.close()
            return None
        if pid == 0:
            return self._wait_for_call(ours, theirs)
        theirs.close()
        self._spare = pid, ours, self._place[0]
        self._leave_place()
        return None

    def _wait_for_call(self, ours: Any, theirs: Any) -> Any:
        """In a process that was forked ahead: be as a new one, hold nothing, and wait."""
        place = -1 if self._place is None else self._place[1]
        if place >= 0:
            enter_or_end([0, 1, 2, place])
        os.setsid()
        self._become_child(self._pid, 0)
        at = theirs.fileno()
        os.closerange(STREAMS, at)
        os.closerange(at + 1, max(self._highest_fd, ours.fileno(), place) + 1)
        ours.detach()
        self._program.touch()
        size, ancillary, _, _ = theirs.recvmsg_into([self._buffer], RIGHTS_SPACE, _socket.MSG_CMSG_CLOEXEC)
        if not size:
            os._exit(0)
        argv, env, data_bytes = marshal.loads(self._buffer[:size])  # noqa: S302  # from our own process
        limit_data(0, data_bytes)
        fds = descriptors(ancillary)
        enter_or_end(fds)
        _take_streams(fds, theirs.detach())
        return argv, env

    def _hand_over(
        self, fds: list[int], argv: list[str], env: dict[bytes, bytes], data_bytes: int, place: int
    ) -> int | None:
        """Give the call to the process that was forked ahead: its id, or None where there is none."""
        if self._spare is None:
            return None
        (pid, channel, its_place), self._spare = self._spare, None
        if place and place == its_place:
            fds = fds[:STREAMS]  # it is there
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
        try:
            call = marshal.dumps((argv, env, data_bytes), MARSHAL)
            channel.sendmsg([call], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        except OSError:  # it has ended, or will, as nobody can send it anything
            return None
        finally:
            channel.close()
        return pid

    def _start_program(self, fds: list[int], argv: list[str], env: dict[str, str], data_bytes: int) -> int:
        """Where processes share their numbers with others' they may not set the limits of any but themselves."""
        if len(fds) > STREAMS or (data_bytes and not self.in_namespace):
            return fork_and_execute(fds, argv, env, data_bytes)
        pid = spawn(fds, argv, env)
        limit_data(pid, data_bytes)
        return pid

    def _rehearse(self) -> None:
        """Do what each forked child will do, as far as it changes nothing here."""
        soft, hard = getrlimit(RLIMIT_DATA)
        self._become_child(os.getppid(), hard if soft == hard else 0)
        _take_streams([0, 1, 2], 2)

    def _become_child(self, parent: int, data_bytes: int) -> None:
        """As a new process is, but for a session of its own: limited, signals as they come."""
        limit_data(0, data_bytes)
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if not self.in_namespace:  # else the kernel ends it together with this process
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it ended before the signal was asked for
                os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _kill(self, number: int, signal_number: int) -> None:
        """The group; of a fork that has not yet made its own, the process."""
        pid = self._pids.get(number)
        if pid is not None and not signal_group(pid, signal_number):
            send_signal(pid, signal_number)

    def _memory_kib(self, number: int) -> int | None:
        """What a call has of memory now, with all that it started; None where it has ended."""
        roots = self._roots().get(number)
        if roots is None:
            return None
        return _size_kib(self._family.descendants(roots))

    def _roots(self) -> dict[int, list[int]]:
        """Of each running call its process, and those that have come to this one when they lost their parent.

        The others that have come are `NOBODY`'s.
        """
        roots = {number: [pid] for number, pid in self._pids.items()}
        roots[NOBODY] = []
        for child in self._family.children():
            if child not in self._calls and not self._is_spare(child):
                roots[self._call_of(child) or NOBODY].append(child)
        return roots

    def _look(self) -> None:
        """Kill each call that has too much, as a whole, and again if some of it got away. Tell what the others have.

        Of orphans that are too many all are killed, until none is left, as at the end of a call.
        """
        now, due = self._watch.look()
        if not due:
            return
        using = []
        roots = self._roots()
        for number, seen in due.items():
            pids = self._family.descendants(roots[number])
            kib = _size_kib(pids) or 0
            if seen.take(kib, now):
                using.append((number, kib))
            excess = self._excess(pids, kib, seen)
            if excess is None and self._scratch is not None:
                excess = self._scratch.excess(number)
            if excess is not None:
                self._excessive.setdefault(number, excess)
                self._end_roots(roots[number])
        self._watch.rest()
        if self._are_too_many(self._count(self._family.descendants(roots[NOBODY]))):
            self._orphans_crowd = self._orphans_left()
        while using:
            tell(self._channel, "using", using[:TOLD_AT_ONCE])
            del using[:TOLD_AT_ONCE]

    def _excess(self, pids: list[int], kib: int, seen: Seen) -> str | None:
        """What these processes of a call have that they may not."""
        if seen.most_kib and kib > seen.most_kib:
            return TOO_MUCH % kib
        count = self._count(pids)
        return TOO_MANY % (count, self._most) if self._are_too_many(count) else None

    def _count(self, pids: list[int]) -> int:
        return sum(map(tasks, pids)) if self._most else 0

    def _are_too_many(self, count: int) -> bool:
        return 0 < self._most < count

    @staticmethod
    def _end_roots(pids: list[int]) -> None:
        """Only children, since any other number may be another process's by now. What is below them comes to us."""
        for pid in pids:
            signal_group_of(pid, signal.SIGKILL)
            send_signal(pid, signal.SIGKILL)

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
        if (self._ended or self._orphans_crowd) and not self._orphans_left():
            self._ended = list(map(self._cleared, self._ended))
            while self._ended:
                tell(self._channel, "ended", self._ended[:TOLD_AT_ONCE])
                del self._ended[:TOLD_AT_ONCE]
            self._sweeps = 0
            self._orphans_crowd = False
            self._killed.clear()

    def _cleared(self, end: tuple[Any, ...]) -> tuple[Any, ...]:
        """The end of a call, once nothing is left of it. Nobody has looked at what it wrote last."""
        excess = self._clear(end[0])
        return end if excess is None or end[-1] is not None else (*end[:-1], excess)

    def _clear(self, number: int) -> str | None:
        """Let nothing be left of what a call has written to the places that are made for calls.

        Returns what of that was too much, in words; None for nothing.
        """
        if self._scratch is None:
            return None
        excess = self._scratch.remove(number)
        if not self._calls:
            self._scratch.empty_shared_memory()
        return excess

    def _bury(self, pid: int) -> None:
        """Reap one. Its group is killed before, while nobody else can have its number."""
        number = self._calls.pop(pid, None)
        if number is not None:
            signal_group(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        self._killed.discard(pid)
        if self._is_spare(pid):
            self._drop_spare()
        if number is not None:
            del self._pids[number]
            cpu_ms = round((usage.ru_utime + usage.ru_stime) * 1000, 3)
            peak_kib = max(usage.ru_maxrss, self._watch.end(number))
            self._ended.append((number, status, cpu_ms, peak_kib, self._why(number, status)))

    def _why(self, number: int, status: int) -> str | None:
        """What ended it from here."""
        excess = self._excessive.pop(number, None)
        if excess is not None:
            return excess
        by_us = self.in_namespace and self._sweeps > SWEEPS and os.WIFSIGNALED(status)
        return LOST if by_us and os.WTERMSIG(status) == signal.SIGKILL else None

    def _orphans_left(self) -> bool:
        """Kill what no running call can account for. True where there was something: its end is waited for.

        One that takes its time to end is no sweep: only another that has come since tells that they get away.
        """
        orphans = list(filter(self._is_unaccounted_for, self._family.children()))
        if not orphans:
            return False
        if not self._killed.issuperset(orphans):
            self._sweeps += 1
            if self._sweeps > SWEEPS and self.in_namespace:
                os.kill(-1, signal.SIGKILL)
        self._killed.update(orphans)
        for pid in orphans:
            if self._sweeps > SWEEPS_ALONE:
                signal_group_of(pid, signal.SIGKILL)
            send_signal(pid, signal.SIGKILL)
        return True

    def _is_unaccounted_for(self, child: int) -> bool:
        return child not in self._calls and not self._is_spare(child) and self._call_of(child) is None

    def _is_spare(self, child: int) -> bool:
        return self._spare is not None and self._spare[0] == child

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare[1].close()
            self._spare = None

    def _call_of(self, orphan: int) -> int | None:
        """The running call that it belongs to.

        In mode fork each call keeps its orphans itself, as a subreaper, if it does not undo that; and the kernel shows
        the environment that the interpreter was started with, which names none.
        """
        try:
            session = os.getsid(orphan)
        except OSError:  # it is gone
            return None
        number = self._calls.get(session)
        if number is not None or self._program is not None:
            return number
        return self._call_named_by(orphan) or self._call_named_by(session)

    def _call_named_by(self, pid: int) -> int | None:
        """The running call that the environment of a process names. (Numbers begin with 1.)"""
        name = ("%s=%s-" % (MARK, self._mark)).encode()
        try:
            with open("/proc/%d/environ" % pid, "rb") as file:
                numbers = [text[len(name) :] for text in file.read().split(b"\0") if text.startswith(name)]
        except OSError:  # it is gone, or of another user
            return None
        return next((int(number) for number in numbers if number.isdigit() and int(number) in self._pids), None)

    def _end_all(self) -> NoReturn:
        """The bus is gone. In a namespace all ends with this process."""
        if not self.in_namespace:
            self._family.end()
        os._exit(0)


def _size_kib(pids: list[int]) -> int | None:
    """What processes have in memory: of one what is resident, of several their shares; None of one that has ended."""
    return resident_kib(pids[0]) if len(pids) == 1 else sum(map(share_kib, pids))


def _wake(_number: int, _frame: Any) -> None:
    """The signal has been written to the alarm, which the poll sees. (A function that a child need not free.)"""


def _check_number(fds: list[int], count: int) -> None:
    """The kernel passes as many as this process may have open (unix(7), MSG_CTRUNC). Raises OSError."""
    if len(fds) < count:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _take_streams(fds: list[int], highest_fd: int) -> None:
    """Have the first three of these descriptors, and no other."""
    dup2 = os.dup2
    dup2(fds[0], 0)
    dup2(fds[1], 1)
    dup2(fds[2], 2)
    os.closerange(STREAMS, max(highest_fd, *fds) + 1)


def given_environment(more: dict[str, str]) -> dict[str, str]:
    """The environment as the bus gave it, with `more`; Python may have added LC_CTYPE to its own (PEP 538)."""
    with open("/proc/self/environ", "rb") as file:
        pairs = [line.partition(b"=") for line in file.read().split(b"\0") if line]
    return {**{os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}, **more}
