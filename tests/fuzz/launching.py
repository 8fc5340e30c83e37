"""What the bus says to a real helper: programs, arguments and variables of any text, signals, with any descriptors.

The words come from manifests, so the launcher reads them all: each program that was asked for gets its exit, and the
helper goes on. Its messages are `marshal`, which is not for hostile bytes; only the bus has the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import strategies as st

from runners.base import Rights
from runners.helpers import Helpers
from runners.processes import Home
from tests.fuzz.campaign import HANG_S, Probe, Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from runners.exits import Exit
    from runners.helpers import Pool

SPELLED = st.text(st.characters(), max_size=20) | st.sampled_from(("", "\0", "\ud800", "\udcff", "a=b", "x" * 200_000))
"""Among them what no argument can be, and what is longer than a message."""


class Asked(NamedTuple):
    """One program, and what is done to it at once."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    signals: tuple[signal.Signals, ...]
    measured: bool


def _asked() -> st.SearchStrategy[Asked]:
    programs = st.sampled_from(("true", "true", "./data", "nowhere", "", ".", "no\0where", "x" * 300))
    return st.builds(
        lambda program, arguments, env, signals, measured: Asked((program, *arguments), env, signals, measured),
        programs,
        st.lists(SPELLED, max_size=3),
        st.dictionaries(SPELLED, SPELLED, max_size=3),
        st.lists(st.sampled_from((signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT)), max_size=2).map(
            tuple
        ),
        st.booleans(),
    )


@contextlib.contextmanager
def programs() -> Iterator[Probe]:
    with tempfile.TemporaryDirectory() as name, asyncio.Runner() as loop:
        folder = Path(name)
        (folder / "true").symlink_to("/bin/true")
        (folder / "data").write_text("no program")
        helpers = Helpers()
        home = Home("echo", "OPEN", Rights(), folder, {"PATH": name})
        try:
            yield Probe(st.lists(_asked(), min_size=1, max_size=3), lambda case: loop.run(_launch(helpers, home, case)))
        finally:
            loop.run(helpers.close())


async def _launch(helpers: Helpers, home: Home, asked: Sequence[Asked]) -> str:
    pool = helpers.pool(home, None)
    pid = (await pool.ready()).pid
    async with asyncio.timeout(HANG_S):
        exits = await asyncio.gather(*(_run(pool, program) for program in asked))
    assert (await pool.ready()).pid == pid, "the helper did not go on"
    return _word(exits[0])


async def _run(pool: Pool, asked: Asked) -> Exit | None:
    """Its exit; None of a program that was not sent at all, since its words make no message."""
    helper = await pool.ready()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        process = helper.launch(asked.argv, (null, null, null), asked.env)
    except (OSError, ValueError):
        return None
    finally:
        os.close(null)
    for number in asked.signals:
        process.signal(number)
    measured = await process.memory_mb() if asked.measured else None
    assert measured is None or measured >= 0  # one that is ending has none
    process.signal(signal.SIGKILL)  # one that was stopped would not end
    return await process.ended


def _word(exit_: Exit | None) -> str:
    if exit_ is None:
        return "not sent"
    if exit_.failed is not None:
        return "not started"
    assert exit_.code is not None
    return "ended" if exit_.code >= 0 else "killed"


TARGETS = (Target("launching", "programs to start", 3, programs, frozenset({"not sent", "not started", "killed"})),)
