"""Signs notes of one log, and remembers beside the key what it has signed: a key never signs two histories.

The order, which neither kill -9 nor a power loss can turn into two notes that contradict each other:

1. Lines are on the disk before a note of them is handed out. With AAL_FSYNC=never answers have no note, and only the
   lines up to a signed checkpoint are synced.
2. Then what is signed is remembered, and that is synced: the first note of each process, and each that is asked for
   (`prove`, `checkpoint`), before it is handed out; of the notes of answers after that, which are some thousands a
   second, one with each checkpoint line, and the last when the process ends. It never comes first: a power loss would
   leave the memory of lines that are lost though nobody was answered for them.

So a log that keeps what was synced to it has grown out of all that was signed. That is looked at when the log is
opened, whenever its name turns out to bear another file or a shorter one, and before a note that is asked for: the tree
of the remembered size must have the remembered root, and the tree of all lines must have grown out of that. Where it
has not, nothing is signed until the right log is back. A new key begins with nothing remembered.

Promised: a log that lost or changed a line up to the remembered size is not signed by this key again. Not promised:
that it shows if the process is killed and somebody then takes later lines away which were synced (at most
`checkpoints.LINES`, of a server those of `checkpoints.AFTER_S` seconds); nor anything against whoever can change the
state folder, who has the key as well.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.errors import BusError, OperatorError
from bus.notes import ROOT_BYTES
from bus.private_file import PrivateFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from bus.notes import Signer

    RootAt = Callable[[int], bytes | None]
    """The root of the tree of so many first lines of the log as it stands; None where that has no such tree."""

FILE = "ledger_signed.json"
LOCK = "ledger_signed.lock"
CODE = "ERR_CONTRADICTED"
HINT = (
    "Put the log back that was signed. To begin another on purpose, move ledger_key.json away, make a new key with "
    "aal provenance key new, and restart the server."
)

_log = logging.getLogger(__name__)


class Signed(NamedTuple):
    """A tree that a note was signed of: its leaves, and its root (32 bytes)."""

    size: int
    root: bytes


class _Form:
    name = FILE
    allowed = '{"signed": {"<verifier key>": {"size": N, "root": "64 hex digits"}}}'
    hint = "Put the file back that was there. Without it the key does not know what it has signed: make a new key then."

    def empty(self) -> Mapping[str, Signed]:
        return {}

    def read(self, document: Any) -> Mapping[str, Signed]:  # noqa: ANN401
        if not isinstance(document, dict) or document.keys() != {"signed"} or not isinstance(document["signed"], dict):
            raise ValueError("something else")
        return {vkey: _read(one) for vkey, one in document["signed"].items()}

    def document(self, held: Mapping[str, Signed]) -> object:
        return {"signed": {vkey: {"size": one.size, "root": one.root.hex()} for vkey, one in held.items()}}


def _read(one: Any) -> Signed:  # noqa: ANN401
    if not isinstance(one, dict) or one.keys() != {"size", "root"} or type(one["size"]) is not int:
        raise ValueError("something else")
    root = bytes.fromhex(one["root"]) if isinstance(one["root"], str) else b""
    if one["size"] < 1 or len(root) != ROOT_BYTES:
        raise ValueError("something else")
    return Signed(one["size"], root)


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
        self._file = PrivateFile(state, _Form(), lock=LOCK)
        self._mutex = threading.Lock()
        self._last: Signed | None = None
        self._seen: Signed | None = None
        self._is_known = False

    @property
    def may_answer(self) -> bool:
        """Whether notes can be handed out at once: the log was held, and a first note of this process remembered."""
        return self.is_held and (self._is_known or self.refusal is not None)

    def note(self, signed: Signed) -> str | None:
        """The note of a tree, which nobody gets before it is `handed_out`; None where nothing is signed."""
        return None if self.refusal is not None else self._signer.checkpoint(*signed)

    def handed_out(self, signed: Signed) -> None:
        """The lines of this tree are on the disk, and its note goes out: before that call `remember` the first time."""
        if self._last is None or signed.size > self._last.size:
            self._last = signed

    def hold(self, size: int, root_at: RootAt) -> None:
        """Hold the log, which has `size` lines, against all that was signed, and remember the last of that.

        For who keeps the log from changing meanwhile. What `root_at` raises is passed on, and nothing is held then.
        """
        with self._mutex:
            refusal: BusError | None = None

            def compared(known: Signed | None) -> Signed | None:
                nonlocal refusal
                told = _all(known, self._last)
                refusal = self._contradiction(told, size, root_at)
                return max(told, default=None)

            try:
                self._seen = self._change(compared)
            except BusError as error:
                refusal = refusal or error
            self._refuse(refusal)
            self.is_held, self._is_known = True, self._last is not None

    def remember(self) -> bool:
        """Remember the last note that was handed out; blocks for as long as the disk takes.

        False where another process has remembered one since the log was held: then it is to be held again, which
        remembers as well.
        """
        with self._mutex:
            last = self._last
            if last is None or self.refusal is not None:
                return True
            try:
                now = self._change(lambda known: max(_all(known, last)) if known == self._seen else known)
            except BusError as error:
                self._refuse(error)
                return True
            self.is_held = now in {self._seen, last}
            if self.is_held:
                self._seen, self._is_known = now, True
            return self.is_held

    def try_again(self) -> None:
        """Where the memory could not be read or written, have the log held anew by the next who writes."""
        if self.refusal is not None and self.refusal.code != CODE:
            self.is_held = False

    def known(self) -> list[Signed]:
        """All that is known to be signed, the newest last. Raises `SettingError` where that cannot be read."""
        with self._mutex:
            return sorted(_all(self._file.get().get(self.vkey), self._last))

    def require(self, known: list[Signed], size: int, root_at: RootAt) -> None:
        """Raises `OperatorError` unless a log of `size` lines has grown out of what was `known` before it was read."""
        if (found := self._contradiction(known, size, root_at)) is not None:
            raise found

    def sign(self, signed: Signed, size: int, root_at: RootAt) -> str:
        """The note of a tree of the first lines of a log, of which `size` were read and synced; it is remembered.

        Raises `OperatorError` where another process has signed something else meanwhile, or where it cannot be
        remembered; `SettingError` where that cannot be read.
        """

        def forward(known: Signed | None) -> Signed:
            if known is not None and known.size <= size:  # what came behind the lines that were read is not known here
                self.require([known], size, root_at)
            return max(_all(known, signed))

        with self._mutex:
            before = self._file.get().get(self.vkey)
            now = self._change(forward)
            if before == self._seen:
                self._seen = now
        return self._signer.checkpoint(*signed)

    def _contradiction(self, known: list[Signed], size: int, root_at: RootAt) -> OperatorError | None:
        for one in sorted(known, reverse=True):
            if (found := root_at(one.size)) != one.root:
                return _contradiction(self._signer.name, one, size, found)
        return None

    def _change(self, change: Callable[[Signed | None], Signed | None]) -> Signed | None:
        """Replace what is remembered of this key; gives what is then. Raises as `PrivateFile.change`, and `change`."""

        def changed(held: Mapping[str, Signed]) -> Mapping[str, Signed]:
            now = change(held.get(self.vkey))
            return held if now is None else {**held, self.vkey: now}

        return self._file.change(changed).get(self.vkey)

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
