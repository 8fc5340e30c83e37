"""The registry: which overlays there are, now. Folders come, change and go while the bus runs.

Nothing is trusted longer than one look: `entries` and `resolve` compare a few `stat` results with those of the last
reading, so a change is seen by the next call whether or not the file system tells of it. `watch` only sees it sooner,
and tells others.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import itertools
import logging
import os
import stat
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from watchfiles import awatch

from bus import manifests, overlay_packages, overlay_programs
from bus.canonical import shown
from bus.codehash import EXCLUDED, IGNORE_FILE, CodeHash, Look, Stamp, TooLargeError, Walk, code_hash, stamp_of
from bus.errors import BusError, DeniedError, Fault, NotFoundError
from bus.manifests import NAME, ManifestError, local_name
from bus.overlay_entry import Entry, Resolved
from bus.overlay_files import DisabledNames, copy_in, locked, move_out
from bus.profiles import Asked, Profiles

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Set
    from pathlib import Path

    from bus.model import Capability, Manifest
    from bus.runes import MemoryProfile

__all__ = ["CodeHash", "Entry", "ManifestError", "Registry", "Resolved", "code_hash"]

log = logging.getLogger(__name__)

POLL_S = 1.0
"""How often `watch` looks by itself: bind mounts and network folders send no events."""

RETRY_S = 1.0
"""How soon a broken overlay is read again though nothing about it has changed: what breaks it may lie elsewhere."""

DEBOUNCE_MS = 200
"""How long `watch` gathers events of one change, as a copy of many files, before it looks."""

_TRIES = 3
"""How often a call looks anew at a folder that changes while it is read."""

_STEP_MS = 50
_ANY = ""


class _Seen(NamedTuple):
    """What tells that an overlay's manifest is the one that was read.

    `folder` is resolved, `identity` is its device and inode. The one may change without the other: a release that is
    renamed, with the link to it made anew, keeps its inode.
    """

    folder: str
    identity: tuple[int, int]
    manifest: Stamp | None


class _State(NamedTuple):
    """What `watch` compares of an overlay; `error` is empty where it is sound."""

    seen: _Seen
    enabled: bool
    links: tuple[str, ...]
    error: str
    memory: tuple[MemoryProfile, ...]


@dataclass(frozen=True, slots=True)
class _Edition:
    """One of the things that an overlay has been; the next differs in something.

    `code` is its code hash, `memory` has the profile of each of its capabilities.
    """

    number: int
    seen: _Seen
    code: str
    packages: Look
    memory: tuple[MemoryProfile, ...]

    def stands(self, seen: _Seen, codes: CodeHash) -> bool:
        """Whether it is sure to be the overlay of now, of which `seen` and `codes` tell."""
        return self.code == codes.hash and self.seen == seen and codes.is_unchanged() and self.packages.holds()


@dataclass(slots=True)
class _Loaded:
    """An overlay as it was read at `read_at`, of `time.monotonic`.

    `look` has what its entry's links and programs and `folders`, those to watch, were made from; `profiles` has the
    files of the memory profiles that its manifest names. `edition` is that of the last call, None before the first.
    """

    seen: _Seen
    settled: bool
    entry: Entry
    codes: CodeHash
    folders: tuple[str, ...]
    look: Look
    profiles: Look
    read_at: float
    edition: _Edition | None

    def is_current(self, seen: _Seen) -> bool:
        """Whether the entry is sure to be what another reading would give."""
        return (
            self.seen == seen
            and self.settled
            and self.look.holds()
            and self.profiles.holds()
            and (self._is_lasting() or self.is_of_this_moment())
        )

    def is_of_this_moment(self) -> bool:
        return time.monotonic() - self.read_at < RETRY_S

    def _is_lasting(self) -> bool:
        return self.entry.error is None or self.entry.error.is_lasting


class _Inspected(NamedTuple):
    """What was found in a folder; `folders`, `look` and `profiles` as in `_Loaded`."""

    entry: Entry
    folders: tuple[str, ...] = ()
    look: Look = Look()
    profiles: Look = Look()


class _Found(NamedTuple):
    """What a call found: manifest, code hash and edition of the same state of the folder."""

    manifest: Manifest
    code: str
    edition: int


def _no_check(_manifest: Manifest, _folder: Path) -> Iterable[str]:
    return ()


class Registry:
    """The overlays in the folders of `root`. Names that begin with a dot are not looked at, nor are files.

    `check` gives further faults of a manifest that is well formed; it raises nothing. `runners` are the names that a
    capability may give as its runner, `profiles` the memory profiles. For one thread: that of the event loop.
    """

    def __init__(
        self,
        root: Path,
        state: Path,
        *,
        check: Callable[[Manifest, Path], Iterable[str]] = _no_check,
        default_timeout_s: float = 30.0,
        runners: Collection[str] = manifests.RUNNERS,
        profiles: Profiles | None = None,
    ) -> None:
        self._root = root
        self._state = state
        self._check = check
        self._default_timeout_s = default_timeout_s
        self._runners = runners
        self._profiles = profiles or Profiles()
        self._disabled = DisabledNames(state)
        self._loaded: dict[str, _Loaded] = {}
        self._numbers = itertools.count(1)
        self._root_error: str | None = None

    def load(self) -> None:
        """Read every overlay. Raises `SettingError` if the list of disabled overlays cannot be read, nothing else."""
        for entry in self.entries():
            if entry.error:
                log.warning("%s", entry.error.detail)

    def entries(self, *, patient: bool = False) -> list[Entry]:
        """Every overlay there is now, by name; the broken ones too, or where `patient` as they were `RETRY_S` ago."""
        names = self._names()
        for gone in self._loaded.keys() - names:
            del self._loaded[gone]
        return [entry for name in sorted(names) if (entry := self._refresh(name, patient=patient))]

    def entry(self, name: str) -> Entry:
        """One overlay. Raises `NotFoundError` that names those whose names come near."""
        found = self._refresh(name) if NAME.fullmatch(name) else None
        if found is None:
            known = sorted(self._names())
            near = difflib.get_close_matches(name[:80], known, n=3)
            raise NotFoundError("ERR_UNKNOWN_OVERLAY", shown(f"no overlay {_quoted(name)}{_suggestion(near, known)}"))
        return found

    def resolve(self, name: str, capability: str | None = None) -> Resolved:
        """What a call of `name` and `capability` goes to; `psyfi.ping` may be given as the one or the other.

        Without a capability the overlay's only one is meant. Raises `NotFoundError`, and `DeniedError` for an overlay
        that is disabled or broken.
        """
        if capability is None and (within := name.partition("."))[2]:
            name, _, capability = within
        manifest, code, edition = self._unchanged(name) or self._of_one_moment(name)
        return Resolved(manifest, _choose(manifest, capability), code, edition)

    def renew(self, name: str) -> None:
        """Count the overlay as another from its next call on, though nothing of its folder has changed."""
        if name in self._loaded:
            self._loaded[name].edition = None

    def enable(self, name: str) -> None:
        """Let calls through again; a name that was disabled need not exist. Raises `NotFoundError`, `OperatorError`."""
        if name not in self._disabled.get():
            self.entry(name)
        self._disabled.change(lambda names: names - {name})

    def disable(self, name: str) -> None:
        """Refuse calls from now on, after restarts too. Raises `NotFoundError`, `OperatorError`."""
        self.entry(name)
        self._disabled.change(lambda names: names | {name})

    def add(self, path: Path) -> Entry:
        """Copy an overlay's folder in. Raises `ManifestError` if it is broken, and `OperatorError`."""
        name = manifests.overlay_name(path)
        if error := self._inspect(name, path).entry.error:
            raise error
        with locked(self._state):
            copy_in(path, self._root, name)
        return self.entry(name)

    def remove(self, name: str) -> Path:
        """Move an overlay away and forget that it was disabled; gives the path where it lies now.

        Raises `NotFoundError`, `OperatorError`.
        """
        folder = self.entry(name).folder
        with locked(self._state):
            moved = move_out(folder, self._state)
        self._loaded.pop(name, None)
        self._disabled.change(lambda names: names - {name})
        return moved

    async def watch(
        self,
        on_change: Callable[[str], None] | None = None,
        on_look: Callable[[Set[str]], None] | None = None,
    ) -> None:
        """Run until cancelled: look at once when files change, and every `POLL_S`.

        `on_change` is called with the name of each overlay that changed; `on_look` after each look with the names of
        those that are there and not disabled, whether or not that is news. A folder of overlays that does not exist is
        waited for.
        """
        known: dict[str, _State] = dict(self._states() or {})
        while True:
            try:
                await self._watch_once(known, on_change, on_look)
            except Exception:  # the edge of this task: nobody would notice that it has ended
                log.exception("cannot watch the overlays; looking again in %s s", POLL_S)
                await asyncio.sleep(POLL_S)

    async def _watch_once(
        self,
        known: dict[str, _State],
        on_change: Callable[[str], None] | None,
        on_look: Callable[[Set[str]], None] | None,
    ) -> None:
        """Watch the folders of now until there are others; keeps in `known` what was told of."""
        watched = self._watched()
        async with contextlib.aclosing(_changes(watched)) as changes:
            async for paths in changes:
                touched = {name for path in paths for name in _owners(path, watched)}
                for name in touched & self._loaded.keys():
                    self._loaded[name].settled = False
                if (states := self._states()) is None:
                    continue
                changed = {name for name in known.keys() | states.keys() if known.get(name) != states.get(name)}
                known.clear()
                known.update(states)
                _tell(changed | (touched & states.keys()), on_change)
                if on_look:
                    on_look({name for name, state in states.items() if state.enabled})
                if self._watched() != watched:
                    return

    def _states(self) -> Mapping[str, _State] | None:
        """What `watch` compares; None while the list of disabled overlays cannot be read, as calls tell."""
        try:
            entries = self.entries(patient=True)
        except BusError:
            return None
        return {
            e.name: _State(self._loaded[e.name].seen, e.enabled, e.links, str(e.error or ""), _memory(e.manifest))
            for e in entries
        }

    def _watched(self) -> dict[str, set[str]]:
        """The folders to watch, each with the overlays that it belongs to; `_ANY` stands for all those in the root."""
        watched: dict[str, set[str]] = {}
        for name, loaded in self._loaded.items():
            for folder in loaded.folders:
                watched.setdefault(folder, set()).add(name)
        if os.path.isdir(self._root):  # noqa: PTH112  # Path.is_dir raises where the way there may not be gone
            watched.setdefault(str(self._root.resolve()), set()).add(_ANY)
        return watched

    def _names(self) -> set[str]:
        """The names in the root that are or lead to folders, or lead nowhere.

        Those that are known already while it cannot be listed, as when no descriptor is free.
        """
        try:
            found = {path.name for path in self._root.iterdir() if _may_be_overlay(path)}
        except FileNotFoundError:
            found, problem = set[str](), None
        except OSError as error:
            found, problem = set(self._loaded), shown(f"cannot list the overlays: {error}")
        else:
            problem = None
        if problem and problem != self._root_error:
            log.error("%s", problem)
        self._root_error = problem
        return found

    def _refresh(self, name: str, *, patient: bool = False) -> Entry | None:
        """The entry as the disk has it now; None where there is no such folder.

        Read again if the manifest, the programs or what the folders list has changed. What is broken is read again
        after `RETRY_S` too where the reason may lie elsewhere, and `patient` does not read it sooner whatever changes.
        """
        now_ns = time.time_ns()
        folder = self._root / name
        seen = _look(folder)
        if seen is None:
            self._loaded.pop(name, None)
            return None
        loaded = self._loaded.get(name)
        can_wait = patient and loaded is not None and loaded.entry.error is not None and loaded.is_of_this_moment()
        if loaded is None or not (can_wait or loaded.is_current(seen)):
            loaded = self._loaded[name] = self._read(name, folder, seen)
            loaded.settled = seen.manifest is None or seen.manifest.is_settled(now_ns)
        enabled = name not in self._disabled.get()
        return loaded.entry if enabled else replace(loaded.entry, enabled=False)

    def _read(self, name: str, folder: Path, seen: _Seen) -> _Loaded:
        before = self._loaded.get(name)
        codes = before.codes if before and before.seen[:2] == seen[:2] else CodeHash(folder)
        inspected = self._inspect(name, folder)
        return _Loaded(
            seen,
            settled=False,
            entry=inspected.entry,
            codes=codes,
            folders=inspected.folders,
            look=inspected.look,
            profiles=inspected.profiles,
            read_at=time.monotonic(),
            edition=before.edition if before else None,
        )

    def _inspect(self, name: str, folder: Path) -> _Inspected:
        """What is in a folder, wherever it lies."""
        entry = Entry(name, folder)
        began_ns = time.time_ns()
        surface = [(path, stamp_of(path)) for path in (str(folder), f"{folder}/{IGNORE_FILE}")]
        try:
            walk = Walk.of(folder)
        except (OSError, TooLargeError) as error:
            broken = ManifestError(name, [_folder_fault(error)], is_lasting=False)
            return _Inspected(replace(entry, error=broken), look=Look.of(surface, began_ns))
        entry = replace(entry, links=tuple(walk.leading_out))
        found = _Inspected(entry, tuple(walk.folders), walk.look())
        asked = Asked(self._profiles)
        try:
            manifest = self._read_manifest(folder, asked)
        except ManifestError as error:
            return found._replace(entry=replace(entry, error=error), profiles=Look.of(asked.places, began_ns))
        found = found._replace(profiles=Look.of(asked.places, began_ns))
        programs = overlay_programs.look(manifest)
        found = found._replace(look=found.look.with_places(programs.places, began_ns))
        if programs.faults:
            broken = ManifestError(name, programs.faults, warnings=manifest.warnings)
            return found._replace(entry=replace(entry, error=broken))
        return found._replace(entry=replace(entry, manifest=manifest))

    def _read_manifest(self, folder: Path, asked: Asked) -> Manifest:
        manifest = manifests.read(
            folder, default_timeout_s=self._default_timeout_s, runners=self._runners, profile_of=asked.resolve
        )
        if faults := [Fault("$", text, "what the plugins accept") for text in self._check(manifest, manifest.folder)]:
            raise ManifestError(manifest.name, faults, warnings=manifest.warnings, is_lasting=False)
        return manifest

    def _unchanged(self, name: str) -> _Found | None:
        """What the last call of this overlay found, where all of it still stands: the way of nearly every call."""
        loaded = self._loaded.get(name)
        if loaded is None or loaded.edition is None or not loaded.settled:
            return None
        manifest, edition = loaded.entry.manifest, loaded.edition
        if manifest is None or not edition.stands(loaded.seen, loaded.codes) or name in self._disabled.get():
            return None
        if not loaded.profiles.holds():
            return None
        return _Found(manifest, edition.code, edition.number)

    def _of_one_moment(self, name: str) -> _Found:
        """All of the same state of the folder.

        Between the two readings the folder may be replaced by another, as when the link that it is moves on.
        """
        for _ in range(_TRIES):
            manifest = self.entry(name).usable()
            loaded = self._loaded[name]
            try:
                code = loaded.codes.get()
            except (OSError, TooLargeError) as error:
                raise _broken(name, _folder_fault(error)) from error
            packages = overlay_packages.look(loaded.seen.folder)
            if _look(self._root / name) == loaded.seen:
                loaded.edition = self._edition(loaded, code, packages)
                return _Found(manifest, code, loaded.edition.number)
        loaded.settled = False
        raise _broken(name, Fault("folder", "one that changes while it is read", "one that stands still"))

    def _edition(self, loaded: _Loaded, code: str, packages: Look) -> _Edition:
        """The last one, where nothing has changed.

        Packages that changed a moment ago may do so again unseen; once they have come to rest, it is one edition more.
        """
        last = loaded.edition
        now = (loaded.seen, code, packages.places, _memory(loaded.entry.manifest))
        if last is None or (last.seen, last.code, last.packages.places, last.memory) != now:
            return self._next_edition(loaded, code, packages)
        comes_to_rest = packages.is_settled and not last.packages.is_settled
        return self._next_edition(loaded, code, packages) if comes_to_rest else last

    def _next_edition(self, loaded: _Loaded, code: str, packages: Look) -> _Edition:
        return _Edition(next(self._numbers), loaded.seen, code, packages, _memory(loaded.entry.manifest))


def _look(folder: Path) -> _Seen | None:
    """What `stat` says of an overlay's folder; None where there is none. A link that leads nowhere is a folder."""
    try:
        status = folder.stat()
        if not stat.S_ISDIR(status.st_mode):
            return None
    except OSError:
        return _Seen("", (0, 0), None) if folder.is_symlink() else None
    try:
        manifest = Stamp.of((folder / manifests.FILE).stat())
    except OSError:
        manifest = None
    return _Seen(os.path.realpath(folder), (status.st_dev, status.st_ino), manifest)


def _memory(manifest: Manifest | None) -> tuple[MemoryProfile, ...]:
    """The profile of each capability, in their order. They are other ones also where only a profile's file changed."""
    return tuple(capability.memory for capability in manifest.capabilities.values()) if manifest else ()


def _may_be_overlay(path: Path) -> bool:
    if path.name.startswith(".") or path.name in EXCLUDED:
        return False
    return os.path.isdir(path) or (path.is_symlink() and not os.path.exists(path))  # noqa: PTH110, PTH112  # as above


def _choose(manifest: Manifest, capability: str | None) -> Capability:
    offered = manifest.capabilities
    if capability is None and len(offered) == 1:
        return next(iter(offered.values()))
    found = None if capability is None else offered.get(local_name(manifest.name, capability))
    if found is None:
        asked = "several capabilities, and none was named" if capability is None else f"no {_quoted(capability)}"
        detail = f"overlay {manifest.name!r} has {asked}; it has {', '.join(offered)}"
        raise NotFoundError("ERR_UNKNOWN_CAPABILITY", detail)
    return found


async def _changes(watched: Collection[str]) -> AsyncGenerator[set[str]]:
    """The paths that changed in these folders, not below them, and an empty set every `POLL_S`.

    Ends when it cannot watch, or not any more, after a last `POLL_S`. A folder whose name is no UTF-8 is left out: it
    cannot be watched.
    """
    if paths := [path for path in watched if path.isascii() or shown(path) == path]:
        try:
            watcher = awatch(
                *paths,
                watch_filter=None,  # with a filter a stream of filtered events would keep the polls from coming
                debounce=DEBOUNCE_MS,
                step=_STEP_MS,
                rust_timeout=int(POLL_S * 1000),
                yield_on_timeout=True,
                recursive=False,
            )
            async with contextlib.aclosing(watcher) as batches:
                async for batch in batches:
                    yield {path for _, path in batch}
        except (OSError, RuntimeError, ValueError, ExceptionGroup) as error:  # a folder has gone, or too many watches
            log.info("cannot watch the overlays, so looking every %s s: %s", POLL_S, shown(str(error)))
    await asyncio.sleep(POLL_S)
    yield set()


def _owners(path: str, watched: Mapping[str, set[str]]) -> set[str]:
    """The overlays that a changed path belongs to."""
    folder, _, name = path.rpartition("/")
    if name in EXCLUDED:
        return set()
    owners = watched.get(path, set()) | watched.get(folder, set())
    return owners - {_ANY} | ({name} if _ANY in watched.get(folder, ()) else set())


def _tell(names: Iterable[str], on_change: Callable[[str], None] | None) -> None:
    for name in sorted(names):
        log.info("overlay %r changed", shown(name))
        if on_change:
            on_change(shown(name))


def _broken(name: str, fault: Fault) -> DeniedError:
    return DeniedError("ERR_OVERLAY_BROKEN", f"overlay {name!r} is broken: {fault}", faults=[fault])


def _folder_fault(error: Exception) -> Fault:
    found = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Fault("folder", found, "a folder of code that can be read")


def _quoted(name: str) -> str:
    return ascii(name[:80])


def _suggestion(near: list[str], known: list[str]) -> str:
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are {', '.join(known[:20])}" if known else "; there are none"
