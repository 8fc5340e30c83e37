"""The memory profiles that have a name: the operator's own, files `NAME.rune` in one folder, and the shipped ones.

The operator's own come first, also under the name of a shipped one. A file is read when its name is first asked for,
and again once it has changed: that costs one `stat` a question. A file that is no rune is an error for those who name
it, never the shipped profile instead, and harms nobody else.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from bus import runes
from bus.canonical import shown
from bus.codehash import Stamp, open_file, stamp_of
from bus.runes import RuneError

if TYPE_CHECKING:
    from pathlib import Path

    from bus.codehash import Place
    from bus.runes import MemoryProfile

SUFFIX = ".rune"
MAX_BYTES = 4 * runes.MAX_CHARS
"""As many as the longest rune text can have in UTF-8."""


@dataclass(frozen=True, slots=True)
class NamedProfile:
    """What a name means: the `profile`, or the `error` of its file. `file` is None for a profile that is shipped.

    `replaces_shipped`: the file has the name of a shipped profile, and counts in its place.
    """

    name: str
    file: Path | None = None
    profile: MemoryProfile | None = None
    error: RuneError | None = None
    replaces_shipped: bool = False


class _Held(NamedTuple):
    """What was read of a file that had this stamp. `is_settled`: a change since then is sure to give another."""

    stamp: Stamp
    is_settled: bool
    found: MemoryProfile | RuneError


class Profiles:
    """The profiles by name, as the files in `folder` have them now. Without a folder there are the shipped ones."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, _Held] = {}

    def resolve(self, text: str) -> MemoryProfile:
        """The profile of this name, or the one that this rune text declares. Raises `RuneError`."""
        name = runes.name_in(text)
        if name is None:
            return runes.parse(text)
        found = self._own(name) or runes.profiles().get(name)
        if found is None:
            raise runes.unknown_name(text, self._names())
        if isinstance(found, RuneError):
            raise found.within(found.source, found.hint)  # a new one: what is raised keeps the frames that it passes
        return found

    def all(self) -> list[NamedProfile]:
        """Every profile there is, by name; also what is broken, and a file whose name nobody can ask for.

        Raises `OSError` where the folder cannot be listed.
        """
        own = self._own_files()
        return [self._entry(name, own.get(name)) for name in sorted({*runes.profiles(), *own})]

    def place_of(self, name: str) -> Place | None:
        """The file that a name means first, with its stamp of now; None where there is no folder."""
        if self._folder is None:
            return None
        path = self._path(name)
        return path, stamp_of(path)

    def _entry(self, name: str, file: Path | None) -> NamedProfile:
        shipped = runes.profiles().get(name)
        if file is None:
            return NamedProfile(name, profile=shipped)
        profile = error = None
        try:
            if runes.name_in(name) != name:
                raise self._error(name, repr(shown(name)), f"a file's name that matches {runes.NAME.pattern}")
            profile = self.resolve(name)
        except RuneError as refusal:
            error = refusal
        return NamedProfile(name, file, profile, error, replaces_shipped=shipped is not None)

    def _names(self) -> set[str]:
        """What can be asked for. Only shipped ones where the folder cannot be listed."""
        try:
            own = filter(runes.name_in, self._own_files())
        except OSError:
            own = filter(None, ())
        return {*runes.profiles(), *own}

    def _own_files(self) -> dict[str, Path]:
        """The files by the name of their profile; none where there is no folder. Raises `OSError`."""
        try:
            files = [] if self._folder is None else list(self._folder.iterdir())
        except FileNotFoundError:
            files = []
        return {file.stem: file for file in files if file.suffix == SUFFIX and not file.name.startswith(".")}

    def _own(self, name: str) -> MemoryProfile | RuneError | None:
        """What the file of this name declares, or why it declares nothing; None where there is no such file."""
        if self._folder is None:
            return None
        path = self._path(name)
        now_ns = time.time_ns()
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            self._held.pop(name, None)
            return None
        except OSError as error:
            return self._unreadable(name, error)
        try:
            stamp = Stamp.of(os.stat(path) if stat.S_ISLNK(status.st_mode) else status)  # noqa: PTH116  # as above
            held = self._held.get(name)
            if held is None or held.stamp != stamp or not held.is_settled:
                held = self._held[name] = _Held(stamp, stamp.is_settled(now_ns), self._read(name, path))
        except OSError as error:  # also a link that leads nowhere: who made it meant another than the shipped profile
            return self._unreadable(name, error)
        return held.found

    def _read(self, name: str, path: str) -> MemoryProfile | RuneError:
        """Raises `OSError`."""
        try:
            return replace(runes.parse(read_text(path)), name=name)
        except RuneError as error:
            return error.within(self._label(name), _hint(name))

    def _unreadable(self, name: str, error: OSError) -> RuneError:
        """An error that may pass without a change of the file, so that it is not kept."""
        self._held.pop(name, None)
        return self._error(name, f"a file that cannot be read ({error.strerror})", "rune text", is_lasting=False)

    def _error(self, name: str, found: str, expected: str, *, is_lasting: bool = True) -> RuneError:
        return RuneError(1, 1, found, [expected], source=self._label(name), is_lasting=is_lasting, hint=_hint(name))

    def _label(self, name: str) -> str:
        """What people call the file. Callers read it too, so it does not say where the folder lies."""
        return shown(f"{self._folder.name}/{name}{SUFFIX}" if self._folder else name)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}{SUFFIX}"


class Asked:
    """Resolves for one reader, as `Profiles.resolve`, and keeps in `places` the files that its answers depend on."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles
        self._places: dict[str, Place] = {}

    def resolve(self, text: str) -> MemoryProfile:
        """The profile of this name, or the one that this rune text declares. Raises `RuneError`."""
        name = runes.name_in(text)
        if name is not None and name not in self._places and (place := self._profiles.place_of(name)):
            self._places[name] = place  # before it is read: what changes in between shows as a change
        return self._profiles.resolve(text)

    @property
    def places(self) -> list[Place]:
        """The files, each with its stamp from before it was read."""
        return [*self._places.values()]


def _hint(name: str) -> str:
    return f"Mend the file; aal runes check {shown(name)} shows the place."


def read_text(path: str | Path) -> str:
    """The text of a rune file. Raises `OSError`, and `RuneError` for what is no UTF-8 or too long for a rune."""
    with open_file(path) as file:
        return decode(file.read(MAX_BYTES + 1))


def decode(data: bytes) -> str:
    """The text that bytes are. Raises `RuneError` for what is no UTF-8 or too long for a rune."""
    if len(data) > MAX_BYTES:
        raise RuneError(1, 1, f"more than {MAX_BYTES} bytes", [f"at most {runes.MAX_CHARS} characters"])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        found = f"the byte 0x{data[error.start]:02x}"
        raise RuneError(*runes.place_of(before, len(before)), found, ["UTF-8"]) from None
