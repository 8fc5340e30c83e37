"""Signs notes of one log, and sees to it that a key never signs two histories, in however many processes.

A note is handed out only once its tree stands in the one memory of the key (`signed`), which is looked at and written
under its lock: what stands there, by whatever process, is in the history of the log that this note is of, or the note
is not handed out. So all notes of a key are one row, each of a log that has grown out of the one before.

The order, which neither kill -9 nor a power loss can turn into two notes that contradict each other:

1. Lines are on the disk before a note of them is remembered. It never comes first: a power loss would leave the memory
   of lines that are lost though nobody was answered for them.
2. It is remembered before it is handed out: in an answer, in a proof, or in a checkpoint's line, which everybody can
   read as soon as it is written.
3. The memory is synced with the first note of each process, each that is asked for (`prove`, `checkpoint`), each
   checkpoint, and when the process ends; of the notes of answers in between, some thousands a second, it is not.

That the log is what was signed is looked at when it is opened, whenever its name turns out to bear another file or a
shorter one, whenever another process has signed, and before a note that is asked for: the tree of the remembered size
must have the remembered root, and the tree of all lines must have grown out of that. Where it has not, nothing is
signed, by no process and also after a restart, until the log is back that was signed first: the memory stays as it is.
Where it was replaced under a process that knows of another history, both stay in it; then no log is right, and only a
new key helps, which begins with nothing remembered.

Promised: a log that lost or changed a line that the key has signed is not signed by it again, whether its processes
live, end or are killed. Not promised: that it shows if a power loss takes the unsynced end of the memory (at most
`checkpoints.LINES`, of a server those of `checkpoints.AFTER_S` seconds) and somebody then takes away these lines, which
were synced; nor anything against whoever can change the state folder, who has the key as well.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from bus.errors import BusError, OperatorError
from bus.signed import Signed, SignedTrees

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from bus.notes import Signer
    from bus.signed import Trees

    RootAt = Callable[[int], bytes | None]
    """The root of the tree of so many first lines of the log as it stands; None where that has no such tree."""

CODE = "ERR_CONTRADICTED"
HINT = (
    "Put the log back that was signed. To begin another on purpose, move ledger_key.json away, make a new key with "
    "aal provenance key new, and restart the server."
)

_log = logging.getLogger(__name__)


class Notary:
    """The key of a log, and what it has signed. One for a process; for several threads.

    `refusal` says why nothing is signed, None where it is.
    """

    def __init__(self, signer: Signer, state: Path) -> None:
        self.vkey = signer.vkey
        self.refusal: BusError | None = None
        self.is_held = False
        """Whether the log was held against what is remembered."""
        self._signer = signer
        self._memory = SignedTrees(state, signer.vkey)
        self._mutex = threading.Lock()
        self._own: Signed | None = None
        """What this process has handed out last."""
        self._known: Trees = ()
        """What was remembered when it was last looked at: the log that is held has all of it."""
        self._has_synced = False
        """Whether the memory was synced with a note of this process."""

    @property
    def may_answer(self) -> bool:
        """Whether notes can be handed out at once: a first one of this process was synced."""
        return self._has_synced or self.refusal is not None

    def note(self, signed: Signed) -> str | None:
        """The note of a tree, which nobody gets before it is handed out; None where nothing is signed."""
        return None if self.refusal is not None else self._signer.checkpoint(*signed)

    def covers(self, signed: Signed) -> bool:
        """Whether this note was handed out here, as the last of all."""
        return self.is_held and self._has_synced and self._own == signed

    def hand_out(self, signed: Signed, root_at: RootAt) -> bool:
        """Whether the note may be handed out now: its lines are synced, and it is remembered. Does not wait.

        `root_at` is of the log that is held and written, as far as can be told in some microseconds. Where it is False,
        `vouch` says whether it may.
        """
        if not self.is_held or not self._has_synced or not self._mutex.acquire(blocking=False):
            return False
        try:
            return self.refusal is None and self._remember(signed, root_at, wait=False)
        except BusError:  # which who waits for it will say
            return False
        finally:
            self._mutex.release()

    def vouch(self, signed: Signed, root_at: RootAt) -> bool:
        """As `hand_out`, and waits for the disk. Where it is False and there is no `refusal`, hold the log again."""
        with self._mutex:
            if not self.is_held or self.refusal is not None:
                return False
            try:
                if not self._has_synced:
                    self._memory.change(lambda held: held)  # which opens it
                self.is_held = self._remember(signed, root_at, wait=True)
                if self.is_held and not self._has_synced:
                    self._has_synced = self.is_held = self._memory.sync()
            except BusError as error:
                self._refuse(error)
                return False
            return self.is_held

    def _remember(self, signed: Signed, root_at: RootAt, *, wait: bool) -> bool:
        """Have it remembered; False where what others have remembered is not in its history, by what can be told."""
        while all(one.size < signed.size for one in self._known):
            held = self._memory.swap(self._known, (signed,), wait=wait)
            if held != (signed,) and not all(root_at(one.size) == one.root for one in (*held, signed)):
                return False
            self._known = held
        if self._own is None or signed.size > self._own.size:
            self._own = signed
        return True

    def hold(self, size: int, root_at: RootAt) -> None:
        """Hold the log, which has `size` lines, against all that was signed.

        For who keeps the log from changing meanwhile. What `root_at` raises is passed on, and nothing is held then.
        """
        with self._mutex:
            refusal: BusError | None
            try:
                held = self._memory.get()
                refusal = self._contradiction(_all(*held, self._own), size, root_at)
                if self._own is not None and self._is_missing(self._own, held, is_refused=refusal is not None):
                    held = self._memory.change(self._with_own)
                self._known = held
            except BusError as error:
                refusal = error
            self._refuse(refusal)
            self.is_held = True

    @staticmethod
    def _is_missing(own: Signed, held: Trees, *, is_refused: bool) -> bool:
        """Whether the memory is not the one that was written here."""
        return own not in held and (is_refused or all(one.size < own.size for one in held))

    def _with_own(self, held: Trees) -> Trees:
        return tuple(sorted(_all(*held, self._own)))

    def remember(self) -> bool:
        """Sync what was handed out; False where the memory was taken away, and the log is to be held again."""
        with self._mutex:
            if self._own is None or self.refusal is not None:
                return True
            try:
                self.is_held = self._memory.sync()
            except BusError as error:
                self._refuse(error)
            return self.is_held

    def close(self) -> None:
        """Let go of the memory's file; what comes then opens it again."""
        with self._mutex:
            self._memory.close()
            self._has_synced = False

    def try_again(self) -> None:
        """Where the memory could not be read or written, have the log held anew by the next who writes."""
        if self.refusal is not None and self.refusal.code != CODE:
            self.is_held = False

    def known(self) -> list[Signed]:
        """All that is known to be signed, the newest last. Raises `SettingError` where that cannot be read."""
        return sorted(_all(*self._memory.get(), self._own))

    def require(self, known: Iterable[Signed], size: int, root_at: RootAt) -> None:
        """Raises `OperatorError` unless a log of `size` lines has grown out of what was `known` before it was read."""
        if (found := self._contradiction(known, size, root_at)) is not None:
            raise found

    def sign(self, signed: Signed, size: int, root_at: RootAt) -> str:
        """The note of a tree of the first lines of a log, of which `size` were read and synced; it is remembered.

        `root_at` is of all lines that the log has by now, where those that were read are among them. Raises
        `OperatorError` where something else was signed meanwhile, or where it cannot be remembered; `SettingError`
        where that cannot be read.
        """
        while True:
            held = self._memory.get()
            self.require(_all(*held, self._own), size, root_at)
            is_there = any(one.size >= signed.size for one in held)  # then it is in the history of that
            with self._mutex:
                if self._exchange(held, held if is_there else (max(_all(signed, self._own)),)) or is_there:
                    self._own = max(_all(signed, self._own))
                    return self._signer.checkpoint(*signed)

    def _exchange(self, known: Trees, new: Trees) -> bool:
        """Have the memory hold something else, on the disk; False where it does not hold what is known."""
        return self._memory.change(lambda held: new if held == known else held) == new

    def _contradiction(self, known: Iterable[Signed], size: int, root_at: RootAt) -> OperatorError | None:
        for one in sorted(known, reverse=True):
            if (found := root_at(one.size)) != one.root:
                return _contradiction(self._signer.name, one, size, found)
        return None

    def _refuse(self, refusal: BusError | None) -> None:
        if refusal is not None and (self.refusal is None or refusal.code != self.refusal.code):
            _log.error("nothing is signed: %s. %s", refusal.detail, refusal.hint)
        elif refusal is None and self.refusal is not None:
            _log.warning("the log is what was signed, and is signed again")
        self.refusal = refusal


def _all(*signed: Signed | None) -> list[Signed]:
    return [one for one in dict.fromkeys(signed) if one is not None]


def _contradiction(name: str, one: Signed, size: int, found: bytes | None) -> OperatorError:
    """Of a log with `size` lines whose first `one.size` have the root `found`."""
    if size < one.size:
        has = f"it has {size} lines"
    elif found is None:
        has = f"its {size} lines have not grown out of those"
    else:
        has = f"the first {one.size} of its {size} lines have the root {found.hex()}"
    detail = (
        f"the key {name} has signed {one.size} lines with the root {one.root.hex()}, and this is another log: {has}"
    )
    return OperatorError(CODE, detail, hint=HINT)
