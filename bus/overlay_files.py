"""What an operator changes on disk: the list of disabled overlays, copying a folder in, moving one out.

Each change is seen whole or not at all: the list is renamed into place, an overlay is copied under a hidden name and
then renamed, and what is removed is renamed away. Several processes take turns by a lock file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson

from bus.canonical import shown
from bus.codehash import Stamp
from bus.errors import Fault, OperatorError, SettingError
from runners.base import JsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DISABLED_FILE = "overlays.json"
LOCK_FILE = "overlays.lock"
REMOVED_FOLDER = "removed"


@contextlib.contextmanager
def locked(state: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Hold a lock of `state` between processes, by default the one of all that has none of its own.

    Raises `OperatorError`.
    """
    with failing_as_operator_error(f"lock {state / name}"):
        state.mkdir(parents=True, exist_ok=True)
        file = (state / name).open("ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def failing_as_operator_error(what: str) -> Iterator[None]:
    """An `OSError` inside becomes an `OperatorError` that says what could not be done."""
    try:
        yield
    except OSError as error:  # shutil.Error is one, and holds every failure of a copy
        raise OperatorError("ERR_FILES", shown(f"cannot {what}: {_reason(error)}")) from error


class DisabledNames:
    """The disabled overlays, in `<state>/overlays.json` as `{"disabled": [names]}`."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._file = state / DISABLED_FILE
        self._path = str(self._file)
        self._stamp: Stamp | None = None
        self._settled = False
        self._names: frozenset[str] = frozenset()

    def get(self) -> frozenset[str]:
        """The names of now: the file is read again when it has changed. Raises `SettingError` if it makes no sense."""
        now_ns = time.time_ns()
        try:
            stamp = Stamp.of(os.stat(self._path))  # noqa: PTH116  # a string: this runs for every call
        except FileNotFoundError:
            stamp = None
        except OSError as error:
            raise self._unusable(_reason(error)) from error
        if stamp != self._stamp or not self._settled:
            self._names = frozenset() if stamp is None else self._read()
            self._stamp, self._settled = stamp, stamp is None or stamp.is_settled(now_ns)
        return self._names

    def change(self, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """Replace the names by what `change` makes of them. Raises `OperatorError`, and `SettingError` as `get`."""
        with locked(self._state):
            names = self.get()
            if (changed := change(names)) != names:
                with failing_as_operator_error(f"write {self._file}"):
                    write_whole(self._file, orjson.dumps({"disabled": sorted(changed)}) + b"\n")

    def _read(self) -> frozenset[str]:
        try:
            document = parse_json(self._file.read_bytes())
        except FileNotFoundError:
            return frozenset()
        except (OSError, JsonError) as error:
            raise self._unusable(_reason(error)) from error
        names = document.get("disabled") if isinstance(document, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._unusable("something else")
        return frozenset(names)

    def _unusable(self, found: str) -> SettingError:
        fault = Fault(shown(str(self._file)), shown(found), '{"disabled": [names of overlays]}')
        return SettingError("ERR_SETTING", str(fault), faults=[fault], hint="Mend or delete the file.")


def copy_in(source: Path, root: Path, name: str) -> None:
    """Copy a folder to `root/name`, symbolic links as links. The caller holds the lock. Raises `OperatorError`."""
    target = root / name
    if os.path.lexists(target):
        raise OperatorError("ERR_EXISTS", shown(f"there is already an overlay {name!r} in {root}"))
    if root.resolve().is_relative_to(source.resolve()):
        detail = f"cannot copy {source}: the folder of overlays {root} lies within it"
        raise OperatorError("ERR_FILES", shown(detail))
    hidden = root / f".tmp-{name}-{secrets.token_hex(4)}"
    with failing_as_operator_error(f"copy {source} to {target}"):
        root.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(source, hidden, symlinks=True)
            hidden.rename(target)
        except BaseException:  # also an operator's Ctrl-C
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def move_out(folder: Path, state: Path) -> Path:
    """Move an overlay's folder, or the link that it is, to `<state>/removed/<UTC time>/<name>`; gives the new path.

    Its name stays, so that it can be added again from there. The caller holds the lock. Raises `OperatorError`, and
    then the overlay is where it was.
    """
    target = state / REMOVED_FOLDER / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}" / folder.name
    with failing_as_operator_error(f"move {folder} to {target}"):
        target.parent.mkdir(parents=True)
        try:
            _move(folder, target)
        except BaseException:  # also an operator's Ctrl-C
            with contextlib.suppress(OSError):
                target.parent.rmdir()
            raise
    return target


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _move_across(folder, target)


def _move_across(folder: Path, target: Path) -> None:
    """Move to another file system. The original goes out of sight first, and is deleted only once the copy is whole."""
    hidden = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    partial = target.with_name(f".tmp-{target.name}")
    folder.rename(hidden)
    try:
        if hidden.is_symlink():
            partial.symlink_to(hidden.readlink())
        else:
            shutil.copytree(hidden, partial, symlinks=True)
        partial.rename(target)
    except BaseException:  # also an operator's Ctrl-C
        hidden.rename(folder)
        _delete(partial)
        raise
    _delete(hidden)


def _delete(path: Path) -> None:
    """Delete a link or a folder that nobody needs any more, as far as it goes."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, text: bytes) -> None:
    """Replace a file so that a reader, or a power loss, finds the old one or the new one, never a part.

    The new one has the mode of the old one. Raises `OSError`.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(path.stat().st_mode & 0o7777)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _reason(error: Exception) -> str:
    """An error without the path that the message names anyway; of a failed copy the first of its many."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return f"{error.args[0][0][2]} ({error.args[0][0][0]})"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
