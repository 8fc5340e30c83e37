"""A file of the bus's state that is for its owner's eyes only: JSON, mode 0600. Tokens and secrets are kept so.

Read again whenever it has changed, which costs one `stat` a look and needs no restart. It fails closed: a file that
does not make sense as a whole, or that others than its owner may open, is refused, and not read as an empty one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import orjson

from bus.canonical import shown
from bus.codehash import Stamp
from bus.errors import Fault, SettingError
from bus.overlay_files import failing_as_operator_error, locked
from runners.base import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODE = 0o600
_OTHERS = 0o077

Held = TypeVar("Held")


class Form(Protocol[Held]):
    """What such a file holds, and how that is spelled."""

    name: str
    allowed: str
    """What the file may hold, for people."""
    hint: str
    """What to do where it holds something else."""

    def empty(self) -> Held:
        """What no file stands for."""

    def read(self, document: Any) -> Held:  # noqa: ANN401
        """Of the file's JSON. Raises `ValueError`, whose message says what is wrong and repeats nothing secret."""

    def document(self, held: Held) -> object:
        """The JSON to write; `read` gives the same again."""


class PrivateFile(Generic[Held]):
    """The file `<state>/<form.name>`, as the values of `form`."""

    def __init__(self, state: Path, form: Form[Held]) -> None:
        self._state = state
        self._form = form
        self._file = state / form.name
        self._path = str(self._file)
        self._stamp: Stamp | None = None
        self._settled = False
        self._held = form.empty()

    def get(self) -> Held:
        """What the file holds now: the same object as the last time, as long as it is equal to it.

        Raises `SettingError` where the file cannot be used.
        """
        now_ns = time.time_ns()
        try:
            stamp = Stamp.of(os.stat(self._path))  # noqa: PTH116  # a string: this runs for every request
        except FileNotFoundError:
            stamp = None
        except OSError as error:
            raise self._unusable(str(error.strerror)) from error
        if stamp != self._stamp or not self._settled:
            held = self._form.empty() if stamp is None else self._read()
            if held != self._held:
                self._held = held
            self._stamp, self._settled = stamp, stamp is None or stamp.is_settled(now_ns)
        return self._held

    def change(self, change: Callable[[Held], Held]) -> Held:
        """Replace what is held by what `change` makes of it, and give that; what `change` raises changes nothing.

        Raises `OperatorError` where it cannot be written, and `SettingError` as `get`.
        """
        with locked(self._state):
            held = self.get()
            if (changed := change(held)) != held:
                text = orjson.dumps(self._form.document(changed), option=orjson.OPT_INDENT_2)
                with failing_as_operator_error(f"write {self._file}"):
                    replace_private(self._file, text + b"\n")
            return changed

    def _read(self) -> Held:
        try:
            with self._file.open("rb") as file:
                require_private(self._file, os.fstat(file.fileno()))
                return self._form.read(parse_json(file.read()))
        except OSError as error:
            raise self._unusable(str(error.strerror)) from error
        except ValueError as error:  # JsonError is one
            raise self._unusable(str(error)) from None  # its traceback would hold what was read

    def _unusable(self, found: str) -> SettingError:
        return unusable(self._path, found, self._form.allowed, self._form.hint)


def unusable(path: str, found: str, allowed: str, hint: str) -> SettingError:
    """That a private file holds what it may not hold."""
    fault = Fault(shown(path), shown(found), allowed)
    return SettingError("ERR_SETTING", str(fault), faults=[fault], hint=hint)


def require_private(path: Path, status: os.stat_result) -> None:
    """Raises `SettingError` where others than its owner may open the file, which has this status."""
    mode = status.st_mode & 0o777
    if mode & _OTHERS:
        name = shown(str(path))
        fault = Fault(name, f"mode {mode:o}", f"mode {MODE:o}: nobody but its owner may open it")
        hint = f"chmod {MODE:o} {shlex.quote(name)}, once it is known that nobody has changed it."
        raise SettingError("ERR_SETTING", str(fault), faults=[fault], hint=hint)


def replace_private(path: Path, text: bytes) -> None:
    """Replace a file so that a reader, or a power loss, finds the old one or the new one, and nobody else reads it.

    It belongs to whom its folder belongs to: else a server that is not root could not read what root has set for it.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE), "wb") as file:  # noqa: PTH123
            owner = os.fstat(folder)
            with contextlib.suppress(OSError):  # who is not root can give nothing away
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        os.fsync(folder)
    except BaseException:  # also an operator's Ctrl-C
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)
