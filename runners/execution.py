"""How a program of another kind than this one is started: by `posix_spawn`, or by a fork that limits itself before.

Part of the helper (`launcher.py`), under the same rules.
"""

from __future__ import annotations

import errno
import os
from resource import RLIMIT_DATA, prlimit  # `os.wait4` looks for it, too, when nothing can be read any more

import _signal as signal  # type: ignore[import-not-found]  # `signal` would bring `enum` with it

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

STREAMS = 3
"""stdin, stdout and stderr: the descriptors that a program gets. A fourth is `cgroup.procs` of the cgroup to enter."""

OS_ERROR = 71
"""The exit status of a fork that could not enter its cgroup: EX_OSERR of sysexits.h(3head)."""

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


def spawn(fds: list[int], argv: list[str], env: dict[str, str]) -> int:
    return os.posix_spawnp(
        argv[0],
        argv,
        env,
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(fds)],
        setsid=True,
        setsigmask=(),
        setsigdef=RESET_SIGNALS,
    )


def fork_and_execute(fds: list[int], argv: list[str], env: dict[str, str], data_bytes: int) -> int:
    """As `posix_spawnp` of a process that limits itself; the pipe says by which error it failed. Raises OSError.

    It enters the cgroup of a fourth descriptor.
    """
    failed, fails = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _execute(fds, argv, env, data_bytes, fails)
    finally:
        os.close(fails)
        error = os.read(failed, 16)
        os.close(failed)
    if error:
        os.waitpid(pid, 0)
        raise OSError(int(error), os.strerror(int(error)))
    return pid


def _execute(fds: list[int], argv: list[str], env: dict[str, str], data_bytes: int, fails: int) -> NoReturn:
    """In a forked process."""
    number = errno.EINVAL
    try:
        enter(fds)
        os.setsid()
        signal.set_wakeup_fd(-1)
        for reset in RESET_SIGNALS:
            signal.signal(reset, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for to, fd in enumerate(fds[:STREAMS]):
            os.dup2(fd, to)
        limit_data(0, data_bytes)
        os.execvpe(argv[0], argv, env)  # noqa: S606
    except OSError as error:
        number = error.errno or number
    finally:
        os.write(fails, b"%d" % number)
        os._exit(1)


def enter(fds: list[int]) -> None:
    """Go into the cgroup of the fourth descriptor, if there is one: 0 is whoever writes it. Raises OSError."""
    for fd in fds[STREAMS:]:
        os.write(fd, b"0")


def enter_or_end(fds: list[int]) -> None:
    """The same of a process that nobody waits for: it says on its stderr why it could not, and ends."""
    try:
        enter(fds)
    except OSError as error:
        os.write(
            fds[2], b"the cgroup of the call cannot be entered: %s\n" % str(error.strerror).encode("utf-8", "replace")
        )
        os._exit(OS_ERROR)


def limit_data(pid: int, data_bytes: int) -> None:
    """Of a process that may just have ended, or be held to less already; 0 is this one."""
    if data_bytes:
        try:
            prlimit(pid, RLIMIT_DATA, (data_bytes, data_bytes))
        except (OSError, ValueError):  # ValueError: the limit cannot be raised
            pass
