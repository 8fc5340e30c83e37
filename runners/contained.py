"""The two processes of a helper, as the bus sees them; what they do is said in `containment.py`.

The one outside is a child of the bus. The one inside is known by a pidfd, which it has sent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from functools import partial
from typing import TYPE_CHECKING

from runners.output import describe
from runners.sealed_file import sealed_file

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_BY_SIGNAL = 128
_SIGNALLED = range(_BY_SIGNAL + 1, _BY_SIGNAL + signal.SIGRTMAX + 1)
"""The process outside says this + the signal that ended the one inside, as shells do."""


class Contained:
    """Starts the process outside, which inherits `channel`. Raises OSError.

    Its stdin is empty, and of the kind that a call gets, since Python looks at that once, at its start. `said` is our
    end of the pipe that it writes to. `exited` is called when one of them has ended, with whether it was that outside.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        command: Sequence[str],
        exited: Callable[[bool], object],
        *,
        folder: Path,
        env: Mapping[str, str],
        channel: int,
        pipe_stdin: bool,
    ) -> None:
        self._loop = loop
        self._tell = exited
        self._pidfds: set[int] = set()
        self.said, says = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(says, True)
        stdin = -1
        try:
            stdin = _empty_pipe() if pipe_stdin else sealed_file(b"")
            self._popen = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=says,
                stderr=says,
                cwd=folder,
                env=env,
                pass_fds=(channel,),
                start_new_session=True,
            )
            self._outside = self._open_outside()
        except BaseException:
            os.close(self.said)
            raise
        finally:
            os.close(says)
            if stdin >= 0:
                os.close(stdin)
        self.watch(self._outside)

    def _open_outside(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:
            self._popen.kill()
            self._popen.wait()
            raise

    @property
    def pid(self) -> int:
        """Of the process outside."""
        return self._popen.pid

    @property
    def is_left(self) -> bool:
        """Whether one of them, as far as they are known, has not ended."""
        return bool(self._pidfds)

    def ended_in_order(self) -> bool:
        """Whether the process outside has ended by itself, and so after all that it knew of.

        A bus that ignores SIGCHLD is told no status: to `Popen` all of them are 0.
        """
        return self._popen.wait() >= 0 and signal.getsignal(signal.SIGCHLD) != signal.SIG_IGN

    def how_it_ended(self) -> str:
        """Of both, since the one outside ends as the one inside did. For people."""
        code = self._popen.wait()
        return describe(_BY_SIGNAL - code if code in _SIGNALLED else code)

    def watch(self, pidfd: int) -> None:
        """Tell when the process inside has ended. The pidfd is closed then."""
        self._pidfds.add(pidfd)
        self._loop.add_reader(pidfd, partial(self._exited, pidfd))

    def terminate(self, within_s: float) -> None:
        """TERM to the process outside, which KILLs the one inside; after `within_s` KILL to both."""
        self._popen.send_signal(signal.SIGTERM)
        self._popen.send_signal(signal.SIGCONT)
        self._loop.call_later(within_s, self.kill)

    def kill(self) -> None:
        """KILL to both."""
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _exited(self, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        self._pidfds.discard(pidfd)
        self._tell(pidfd == self._outside)


def _empty_pipe() -> int:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.close(writer)
    return reader
