"""What code an overlay's folder holds, as one hash, and how it stays cheap to ask for on every call.

The hash: SHA-256 over one record for each file, sorted by path. A record is five fields, each ended by a NUL:

    path     relative to the folder, POSIX, the bytes of the file system
    kind     file, link (its target was hashed at another place), dangling, unreadable or special
    mode     x where the owner may execute it, else -
    target   what each symbolic link on the way says, as written, joined by |; empty without links
    digest   SHA-256 of the content in hex; empty where the kind is not file

Left out, at any depth: `.venv`, `node_modules` and `__pycache__`, which hold what others wrote or what is made from the
code; `.git`, which changes without the code; and what `.aalignore` names. A line of it is a shell pattern (fnmatch: `*`
crosses `/`); without a `/` it is held against the name of each file and folder, with one against the path from the
folder on. `#` begins a comment, an ending `/` says folders only; there is no negation. The manifest and `.aalignore`
itself are never left out.

Symbolic links are followed. The walk goes depth first, names sorted, and enters a folder once: a second way to it, as
in a loop, is a `link`. More than `MAX_FILES` or `MAX_MB` is refused: an overlay's data belongs in `.aalignore`.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import stat
import time
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

from bus.canonical import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from io import BufferedReader
    from pathlib import Path

    Ignores = Callable[[str, bool], bool]
    Kind = Literal["file", "link", "dangling", "unreadable", "special"]

EXCLUDED = frozenset({".venv", "node_modules", "__pycache__", ".git"})
IGNORE_FILE = ".aalignore"
MANIFEST = "manifest.json"
ALWAYS = frozenset({MANIFEST, IGNORE_FILE})
"""What no `.aalignore` leaves out: it says what the rest means."""
MAX_FILES = 10_000
MAX_MB = 1024

RACY_NS = 100_000_000
"""A file changed less than this before it was looked at may change again within the same tick of its clock, so what
was read of it is not kept. The kernel's tick for time stamps is at most 10 ms."""

_MAX_IGNORE_BYTES = 64 * 1024


class TooLargeError(Exception):
    """The folder holds more than a code hash is made for."""


_stamped = attrgetter("st_dev", "st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns")


class Stamp(NamedTuple):
    """What tells that a file is the one that it was. Times are nanoseconds."""

    dev: int
    ino: int
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls._make(_stamped(status))

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change after `now_ns` (of `time.time_ns`) is sure to give another stamp.

        A change that the clock calls future is not settled: it came after `now_ns`, or the clock went back since.
        """
        return now_ns - self.ctime_ns > RACY_NS


Place = tuple[str, Stamp | None]
"""A path as it was reached, links and all, and its stamp; None where there was nothing."""


@dataclass(frozen=True, slots=True)
class Look:
    """Places as they were once found. `is_settled`: a change since then is sure to show in a stamp."""

    places: Sequence[Place] = ()
    is_settled: bool = False

    @classmethod
    def of(cls, places: Sequence[Place], began_ns: int) -> Look:
        """`places` found by what began at `began_ns`, of `time.time_ns`."""
        return cls(places, all(stamp is None or stamp.is_settled(began_ns) for _, stamp in places))

    def with_places(self, places: Sequence[Place], began_ns: int) -> Look:
        """This look and a further one."""
        further = Look.of(places, began_ns)
        return Look([*self.places, *places], self.is_settled and further.is_settled)

    def holds(self) -> bool:
        """Whether every place is sure to be as it was; one `stat` each."""
        if not self.is_settled:
            return False
        for path, stamp in self.places:  # no generator, and no Stamp made: this runs for every call
            try:
                if _stamped(os.stat(path)) != stamp:  # noqa: PTH116  # a string all along
                    return False
            except OSError:
                if stamp is not None:
                    return False
        return True


class File(NamedTuple):
    """One file of the walk. `path` is relative; `stamp` is that of the target of a link, None where there is none."""

    path: str
    kind: Kind
    target: str
    stamp: Stamp | None


class _Record(NamedTuple):
    """What the hash covers of one file, as the head of this module lists it."""

    path: str
    kind: Kind
    mode: str
    target: str
    digest: str


@dataclass(slots=True)
class Walk:
    """What lies in a folder at this moment; nothing of it was read yet.

    `began_ns` is when it began, of `time.time_ns`. `places` has all that is no file: folders, each with the stamp from
    before it was listed, second ways to them, links that lead nowhere. `leading_out` has the symbolic links to outside
    the folder, as `path -> resolved target`; `folders` every folder walked, resolved.
    """

    root: str
    began_ns: int
    files: list[File] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    leading_out: list[str] = field(default_factory=list)
    _seen: set[tuple[int, int]] = field(default_factory=set)
    _bytes: int = 0

    @classmethod
    def of(cls, folder: Path) -> Walk:
        """Raises `OSError` where the folder itself cannot be listed, and `TooLargeError`."""
        began_ns = time.time_ns()
        walk = cls(os.path.realpath(folder), began_ns)
        status = os.stat(walk.root)  # noqa: PTH116  # a string all along: this runs for every call
        walk.places.append((str(folder), Stamp.of(status)))
        walk._seen.add((status.st_dev, status.st_ino))
        with os.scandir(walk.root) as listing:
            walk._list(sorted(listing, key=_name), "", "", _ignores(walk.root))
        walk.folders.insert(0, walk.root)
        walk.files.sort()
        return walk

    def look(self) -> Look:
        """All that `leading_out` and `folders` were made from."""
        return Look.of(self.places, self.began_ns)

    def look_at_all(self) -> Look:
        """`look`, and the files with it."""
        files = [(f"{self.root}/{file.path}", file.stamp) for file in self.files if file.stamp]
        return Look.of([*self.places, *files], self.began_ns)

    def _list(self, listing: list[os.DirEntry[str]], prefix: str, target: str, ignores: Ignores | None) -> None:
        for entry in listing:
            path = prefix + entry.name
            if entry.name in EXCLUDED:
                continue
            if entry.is_symlink():
                self._add_link(entry, path, target, ignores)
            elif path in ALWAYS or not (ignores and ignores(path, entry.is_dir(follow_symlinks=False))):
                self._add(entry, path, target, ignores)

    def _add(self, entry: os.DirEntry[str], path: str, target: str, ignores: Ignores | None) -> None:
        """Add a file or a folder, itself or as the target of a link."""
        try:
            status = entry.stat()
        except OSError:  # gone by now, no permission, or a loop of links
            self.places.append((entry.path, None))
            self._count(File(path, "dangling", target, None), 0)
            return
        if stat.S_ISREG(status.st_mode):
            self._count(File(path, "file", target, Stamp.of(status)), status.st_size)
            return
        self.places.append((entry.path, Stamp.of(status)))
        if stat.S_ISDIR(status.st_mode):
            self._add_folder(entry.path, status, path, target, ignores)
        else:
            self._count(File(path, "special", target, None), 0)

    def _add_folder(self, place: str, status: os.stat_result, path: str, target: str, ignores: Ignores | None) -> None:
        identity = (status.st_dev, status.st_ino)
        if identity in self._seen:
            self._count(File(path, "link", target, None), 0)
            return
        self._seen.add(identity)
        try:
            with os.scandir(place) as found:
                listing = sorted(found, key=_name)
        except OSError:
            self._count(File(path, "unreadable", target, None), 0)
            return
        self.folders.append(os.path.realpath(place) if target else place)
        self._list(listing, path + "/", target, ignores)

    def _add_link(self, entry: os.DirEntry[str], path: str, target: str, ignores: Ignores | None) -> None:
        if path not in ALWAYS and ignores and ignores(path, entry.is_dir()):
            return
        try:
            written = os.readlink(entry.path)  # noqa: PTH115  # as above
        except OSError:  # gone by now
            return
        resolved = os.path.realpath(entry.path)
        if resolved != self.root and not resolved.startswith(self.root + "/"):
            self.leading_out.append(shown(f"{path} -> {resolved}"))
        self._add(entry, path, f"{target}|{written}" if target else written, ignores)

    def _count(self, file: File, size: int) -> None:
        self.files.append(file)
        self._bytes += size
        if len(self.files) > MAX_FILES or self._bytes > MAX_MB * 2**20:
            raise TooLargeError(f"more than {MAX_FILES} files or {MAX_MB} MB; name what is not code in {IGNORE_FILE}")


class CodeHash:
    """The code hash of one folder. While nothing changes, asking again reads no file.

    `is_unchanged` costs one `stat` for each file and folder and finds every change: of a file by its own stamp, of
    what a folder lists, links included, by the folder's, and of where a link leads in the end by asking through it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hash = ""
        self.links: tuple[str, ...] = ()
        self._digests: dict[Stamp, str] = {}
        self._files: list[File] | None = None
        self._look = Look()

    def is_unchanged(self) -> bool:
        """Whether `hash` is sure to be still right. After a change just before the last look, only `get` can tell."""
        return self._look.holds()

    def get(self) -> str:
        """64 hex digits. Raises as `Walk.of` does."""
        walk = Walk.of(self.folder)
        self.links = tuple(walk.leading_out)
        if walk.files != self._files:
            self._read(walk)
        self._look = Look() if self._files is None else walk.look_at_all()
        return self.hash

    def _read(self, walk: Walk) -> None:
        """Make the hash, and keep what it was made from where that is sure to show a change."""
        records = [self._record(walk.root, file) for file in walk.files]
        self.hash = _combine(records)
        settled = {file.stamp for file in walk.files if file.stamp and file.stamp.is_settled(walk.began_ns)}
        self._digests = {stamp: digest for stamp, digest in self._digests.items() if stamp in settled}
        # What could not be read may be readable the next time without a change of its own, as with no free descriptor.
        is_whole = all(file.stamp in settled for file in walk.files if file.stamp) and all(
            record.kind != "unreadable" for record in records
        )
        self._files = walk.files if is_whole else None

    def _record(self, root: str, file: File) -> _Record:
        if file.stamp is None:
            return _Record(file.path, file.kind, "-", file.target, "")
        mode = "x" if file.stamp.mode & stat.S_IXUSR else "-"
        digest = self._digests.get(file.stamp) or _digest(f"{root}/{file.path}")
        if digest is None:
            return _Record(file.path, "unreadable", mode, file.target, "")
        self._digests[file.stamp] = digest
        return _Record(file.path, "file", mode, file.target, digest)


def code_hash(folder: Path) -> str:
    """The code hash of a folder, everything read anew. Raises as `Walk.of` does."""
    return CodeHash(folder).get()


def code_hash_under(folder: Path, manifest_hash: str) -> str:
    """What the code hash of a folder would be if its manifest were one with this SHA-256. Raises as `Walk.of` does.

    So it is found whether a folder of which only the manifest has changed is the one that a record names.
    """
    codes, walk = CodeHash(folder), Walk.of(folder)
    records = [codes._record(walk.root, file) for file in walk.files]
    return _combine(one._replace(digest=manifest_hash) if one.path == MANIFEST else one for one in records)


def open_file(path: str | Path) -> BufferedReader:
    """Open a regular file to read its bytes. Raises `OSError`, also for what is no regular file.

    `O_NONBLOCK`: opening a FIFO would wait for its writer for ever.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _must_be_file(os.fstat(handle).st_mode)
        return open(handle, "rb")  # noqa: PTH123  # a descriptor, not a path
    except BaseException:  # open() does not close a descriptor that it refuses
        os.close(handle)
        raise


def _must_be_file(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "something that is no file")


def stamp_of(path: str) -> Stamp | None:
    """What a path leads to now; None where that is nothing."""
    try:
        return Stamp.of(os.stat(path))  # noqa: PTH116  # a string all along: this runs for every call
    except OSError:
        return None


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _combine(records: Iterable[_Record]) -> str:
    total = hashlib.sha256()
    for record in records:
        for part in record:
            total.update(os.fsencode(part) + b"\0")
    return total.hexdigest()


def _digest(path: str) -> str | None:
    """SHA-256 of a file's content in hex; None where it cannot be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _ignores(root: str) -> Ignores | None:
    """Tells of a relative path, and whether it is a folder, if the folder's `.aalignore` names it."""
    try:
        with open_file(f"{root}/{IGNORE_FILE}") as file:
            text = file.read(_MAX_IGNORE_BYTES).decode("utf-8", "surrogateescape")
    except OSError:
        return None
    rules = list(_rules(text))

    def ignores(path: str, is_folder: bool) -> bool:
        name = path.rpartition("/")[2]
        return any(
            pattern.match(path if on_path else name) and (is_folder or not folders_only)
            for pattern, on_path, folders_only in rules
        )

    return ignores


def _rules(text: str) -> Iterator[tuple[re.Pattern[str], bool, bool]]:
    """Pattern, whether it is held against the whole path, whether it is for folders only."""
    for line in text.splitlines():
        written = line.strip()
        if written and not written.startswith("#"):
            body = written.rstrip("/")
            yield re.compile(fnmatch.translate(body.lstrip("/"))), "/" in body, written.endswith("/")
