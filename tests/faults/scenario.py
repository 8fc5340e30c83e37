"""What the writers do. For each line that the ledger has answered for they say so at once."""

from __future__ import annotations

import asyncio
import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.errors import BusError, OperatorError
from bus.ledger import Fsync, Ledger, LedgerError
from bus.notary import Notary
from bus.notes import Signer, new_key, read_checkpoint
from bus.proofs import Prover
from bus.records import environment_hash
from bus.starts import Starts
from tests.ledgers import ENVIRONMENT, call, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.faults.children import Say

BEGINNINGS = ("new", "torn", "foreign", "rotating")
"""What lies there when a writer opens the ledger: nothing, a chain with a torn end, another program's log, or a chain
that is to go on in a new file every few lines."""

ROTATING_BYTES = 4_000
CROWD_BYTES = 20_000
"""After so many bytes a file is full, in the one scenario and in the other."""

TURNS = 4
"""Of each of two writers."""

CALLERS = 16
SIGNATURES = 6
"""As many notes asks a process for that does nothing else."""

STARTING = 3
"""So many of the callers make calls that write a line before they start."""

_LARGE = 300_000
"""Characters: more than the event loop writes by itself."""

_FOREIGN = b'{"request_id":"0","overlay":"of another program"}\n'
_TORN = b'{"caller":null,"cap'


@functools.cache
def signer() -> Signer | None:
    """The same for all writers; None where signatures cannot be made here."""
    try:
        return Signer.read(new_key("faults.test"))
    except OperatorError:
        return None


def notary(path: Path) -> Notary | None:
    """A process's own, with what the key has signed kept beside the ledger's folder; None without signatures."""
    key = signer()
    return None if key is None else Notary(key, path.parent.parent / ".aal")


def prepare(path: Path, beginning: str) -> list[str]:
    """Lay a beginning; gives what writers have said of the lines that are in it."""
    said: list[str] = []
    if beginning in {"torn", "rotating"}:
        said += [_stands(receipt, name) for name in ("before-1", "before-2") for receipt in write(path, call(name))]
    if beginning == "torn":
        with path.open("ab") as file:
            file.write(_TORN)
    elif beginning == "foreign":
        path.parent.mkdir(parents=True)
        path.write_bytes(_FOREIGN)
    return said


def every_way(path: Path, fsync: Fsync, say: Say, *, large: bool = True, segment_bytes: int = 0) -> None:
    """Open a ledger, append in each way that there is, close it."""
    ledger = Ledger(path, fsync=fsync, environment=ENVIRONMENT, notary=notary(path), segment_bytes=segment_bytes)
    asyncio.run(_every_way(ledger, say, large))


async def _every_way(ledger: Ledger, say: Say, large: bool) -> None:
    ledger.open(serves=True)
    starts = Starts(ledger)
    await starts.close_left()
    for number in range(2):
        await _append(ledger, f"single-{number}", say)
    await asyncio.gather(*(_append(ledger, f"group-{number}", say) for number in range(4)))
    if large:
        await _append(ledger, "large", say, error="x" * _LARGE)
    await _append_started(ledger, starts, "starting", say)
    await asyncio.to_thread(ledger.probe)
    await _append(ledger, "last", say)
    await asyncio.to_thread(ledger.close)
    starts.close()


class Turn(NamedTuple):
    """How a writer waits for its turn, and how it gives it on."""

    wait: Callable[[], None]
    end: Callable[[], None]


def in_turns(path: Path, fsync: Fsync, name: str, turn: Turn, say: Say, *, segment_bytes: int = 0) -> None:
    """Open a ledger, append in each turn, close it."""
    turn.wait()
    ledger = Ledger(path, fsync=fsync, environment=ENVIRONMENT, notary=notary(path), segment_bytes=segment_bytes)
    asyncio.run(_in_turns(ledger, name, turn, say))
    turn.end()


async def _in_turns(ledger: Ledger, name: str, turn: Turn, say: Say) -> None:
    ledger.open(serves=True)
    starts = Starts(ledger)
    for number in range(TURNS):
        if number:
            turn.end()
            turn.wait()
        await _append(ledger, f"{name}-{number}", say)
        await asyncio.gather(*(_append(ledger, f"{name}-{number}-{which}", say) for which in range(2)))
        await _append_started(ledger, starts, f"{name}-{number}-starting", say)
    await asyncio.to_thread(ledger.close)
    starts.close()


def crowd(path: Path, fsync: Fsync, name: str, say: Say) -> None:
    """Append from many callers until somebody kills the process."""
    asyncio.run(_crowd(path, fsync, name, say))


async def _crowd(path: Path, fsync: Fsync, name: str, say: Say) -> None:
    ledger = Ledger(path, fsync=fsync, environment=ENVIRONMENT, notary=notary(path), segment_bytes=CROWD_BYTES)
    ledger.open(serves=True)
    starts = Starts(ledger)
    await starts.close_left()

    async def caller(number: int) -> None:
        for turn in itertools.count():
            if number < STARTING:
                await _append_started(ledger, starts, f"{name}-{number}-{turn}", say)
            else:
                await _append(ledger, f"{name}-{number}-{turn}", say)

    await asyncio.gather(*map(caller, range(CALLERS)))


def sign(path: Path, say: Say, *, times: int | None = None) -> None:
    """Ask for notes of the ledger as it is, so many or until somebody kills the process; without a key for none."""
    key = notary(path)
    say("begins to sign")
    for _ in itertools.count() if times is None else range(times):
        try:
            with Prover(path, key) as prover:
                note = prover.checkpoint().checkpoint
        except (BusError, OSError) as error:
            say(f"refused to sign: {error}")
            continue
        if note is not None:
            checkpoint = read_checkpoint(note)
            say(f"noted {checkpoint.size} {checkpoint.root.hex()}")


async def _append_started(ledger: Ledger, starts: Starts, name: str, say: Say) -> None:
    """As the bus does it: nothing runs where the first line is not there."""
    try:
        await starts.begin(_members(name, phase="SEAL"))
    except LedgerError:
        say(f"refused {name}")
        return
    if await _append(ledger, name, say, phase="SEAL"):
        starts.end(name)


async def _append(ledger: Ledger, name: str, say: Say, **members: Any) -> bool:
    record = call(**_members(name, **members))
    try:
        receipt = await ledger.submit(record)
    except LedgerError:
        say(f"refused {name}")
        return False
    say(_stands(receipt, name))
    return True


def _members(name: str, **members: Any) -> dict[str, Any]:
    return {"request_id": name, "environment_hash": environment_hash(ENVIRONMENT), **members}


def _stands(receipt: Any, name: str) -> str:
    said = f"stands {receipt.seq} {receipt.hash} {name}"
    if receipt.checkpoint is None:
        return said
    note = read_checkpoint(receipt.checkpoint)
    return f"{said} {note.size} {note.root.hex()}"
