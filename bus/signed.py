"""What a key has signed: one small file of the state folder, which all processes that sign with it share.

It holds the newest tree that a note was made of, and takes the lock of itself (flock(2)) for as long as it is looked at
and written, some microseconds: so what one process signs comes behind all that the others have. It is written in
place, within one sector, by one pwrite(2): kill -9 leaves all of it or none, and so does a power loss, which may leave
an older one where it was not synced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.canonical import shown
from bus.errors import OperatorError
from bus.notes import ROOT_BYTES
from bus.overlay_files import failing_as_operator_error, locked
from bus.own_files import open_own
from bus.private_file import replace_private, require_private, unusable
from runners.base import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus.errors import SettingError

LOCK = "ledger_signed.lock"
"""Held by who makes the file."""

_SECTOR = 512
_ID_DIGITS = 16
_MOST_BYTES = 1 << 16
_ALLOWED = '{"key": "SHA-256 of the verifier key", "signed": [{"root": "64 hex digits", "size": N}]}'
_HINT = "Put the file back that was there. Without it the key does not know what it has signed: make a new key then."


class Signed(NamedTuple):
    """A tree that a note was signed of: its leaves, and its root (32 bytes)."""

    size: int
    root: bytes


Trees = tuple[Signed, ...]
"""One, or none; several only where the file was replaced under a process that had signed something else: all count."""


class SignedTrees:
    """The file of one key in the folder `state`. For one thread at a time, but for `get`.

    Every method raises `OperatorError` where the file cannot be written, and `SettingError` where it cannot be used.
    """

    def __init__(self, state: Path, vkey: str) -> None:
        self._state = state
        self._key = sha256(vkey.encode()).hexdigest()
        self.path = state / f"ledger_signed-{self._key[:_ID_DIGITS]}.json"
        self._fd = -1
        self._last: tuple[bytes | None, Trees] = None, ()
        """What was written here last, and what that says."""

    def get(self) -> Trees:
        """What it holds now; nothing where it is not there."""
        try:
            fd = self._open()
        except FileNotFoundError:
            return ()
        try:
            with failing_as_operator_error(f"lock {self.path}"):
                fcntl.flock(fd, fcntl.LOCK_SH)
            return self._read(fd)
        finally:
            os.close(fd)

    def change(self, change: Callable[[Trees], Trees]) -> Trees:
        """Replace what it holds by what `change` makes of it, and give that; it is on the disk then.

        The file is made where there is none, and stays open, for `swap`.
        """
        self._find()
        held = self._with_lock(change, fcntl.LOCK_EX)
        self.sync()
        return held

    def swap(self, known: Trees, new: Trees, *, wait: bool) -> Trees:
        """Replace `known` by `new`; gives what it holds then, which is something else where it did not hold `known`.

        Not synced. Without `wait`, it raises as well where another has the lock.
        """
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        return self._with_lock(lambda held: new if held == known else held, how)

    def sync(self) -> bool:
        """Make last what was written; False where the name bears another file by now, or none."""
        if self._fd < 0:
            self._find()
        with failing_as_operator_error(f"write {self.path}"):
            os.fdatasync(self._fd)
            return self._is_in_place()

    def close(self) -> None:
        """Let go of the file; what comes then opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _find(self) -> None:
        """Have the file open that bears the name, and make it where none does."""
        with failing_as_operator_error(f"write {self.path}"):
            if self._fd >= 0 and self._is_in_place():
                return
        self.close()
        try:
            self._fd = self._open()
        except FileNotFoundError:
            self._make()
            self._fd = self._open()

    def _make(self) -> None:
        with locked(self._state, LOCK), failing_as_operator_error(f"write {self.path}"):
            if not os.path.lexists(self.path):
                replace_private(self.path, self._text_of(()))

    def _open(self) -> int:
        """Raises `FileNotFoundError` where it is not there."""
        with contextlib.ExitStack() as stack:
            try:
                fd = open_own(self.path, os.O_RDWR)
                stack.callback(os.close, fd)
                status = os.fstat(fd)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise self._unusable(str(error.strerror)) from error
            require_private(self.path, status)
            stack.pop_all()
            return fd

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))  # noqa: PTH116  # as the line is
        except FileNotFoundError:
            return False

    def _with_lock(self, change: Callable[[Trees], Trees], how: int) -> Trees:
        """Replace what it holds, with the lock taken as flock(2) is told to; gives that. For each group of calls."""
        if self._fd < 0:
            self._find()
        try:
            fcntl.flock(self._fd, how)
            try:
                held = self._read(self._fd)
                if (changed := change(held)) != held:
                    self._write(changed)
                return changed
            finally:
                self._unlock()
        except OSError as error:
            raise OperatorError("ERR_FILES", shown(f"cannot write {self.path}: {error.strerror}")) from error

    def _unlock(self) -> None:
        """Let go of the lock, whatever the file system says: its descriptor's end takes the lock with it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        except OSError:
            self.close()

    def _read(self, fd: int) -> Trees:
        """With the lock."""
        try:
            text = os.pread(fd, _MOST_BYTES, 0)
        except OSError as error:
            raise self._unusable(str(error.strerror)) from error
        last, trees = self._last
        if text == last:
            return trees
        try:
            return self._trees_in(parse_json(text.partition(b"\n")[0]))
        except ValueError as error:  # JsonError is one
            raise self._unusable(str(error)) from None

    def _write(self, trees: Trees) -> None:
        self._last = None, ()
        text = self._text_of(trees)
        done = 0
        while done < len(text):
            done += os.pwrite(self._fd, text[done:], done)
        self._last = text, trees

    def _text_of(self, trees: Trees) -> bytes:
        """A line that ends with a sector: what stands behind it, of a longer one before, says nothing."""
        signed = ",".join(f'{{"root":"{root.hex()}","size":{size}}}' for size, root in trees)
        text = f'{{"key":"{self._key}","signed":[{signed}]}}'.encode()
        return text.ljust(-(-(len(text) + 1) // _SECTOR) * _SECTOR - 1) + b"\n"

    def _trees_in(self, document: Any) -> Trees:  # noqa: ANN401
        if not isinstance(document, dict) or document.keys() != {"key", "signed"} or document["key"] != self._key:
            raise ValueError("something else")
        if not isinstance(document["signed"], list):
            raise ValueError("something else")  # noqa: TRY004
        return tuple(map(_read, document["signed"]))

    def _unusable(self, found: str) -> SettingError:
        return unusable(shown(str(self.path)), found, _ALLOWED, _HINT)


def _read(one: Any) -> Signed:  # noqa: ANN401
    if not isinstance(one, dict) or one.keys() != {"size", "root"} or type(one["size"]) is not int:
        raise ValueError("something else")
    root = bytes.fromhex(one["root"]) if isinstance(one["root"], str) else b""
    if one["size"] < 1 or len(root) != ROOT_BYTES:
        raise ValueError("something else")
    return Signed(one["size"], root)
