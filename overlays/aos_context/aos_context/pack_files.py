"""The files of a resume pack: what they are called, and a private copy of them out of a folder or a zip.

A pack is copied first and looked at then, so that who changes it meanwhile changes nothing. Only names that a pack has
are copied, which leaves no room for a path that leads elsewhere, for a second archive within, or for a file that
something else would pick up.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, NamedTuple

from aos_context.episode import number_of
from aos_context.errors import NotFoundError, PackError
from aos_context.files import CHUNK_BYTES, FILE_MODE, make_folder, write_all
from aos_context.layout import EPISODES, LEDGER, PACK_MANIFEST, PACK_MEMORY, WORKING_SET

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from aos_context.config import Config

FOLDERS = ("state", "ledger", "memory", EPISODES)
REQUIRED = (WORKING_SET, LEDGER, PACK_MEMORY)

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_ZIP_OVERHEAD_BYTES = 4 << 20
_RATIO_FROM_BYTES = 1 << 20
_MOST_RATIO = 200
"""A file of a MiB or more that is packed tighter is refused; ours are stored as they are."""

_END_OF_DIRECTORY = struct.Struct("<4s4H2IH")
_END_MAGIC = b"PK\x05\x06"
_LOCATOR_64_MAGIC = b"PK\x06\x07"
_LOCATOR_64_BYTES = 20
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError,
    ValueError,
)  # fmt: skip
"""What `zipfile` raises for bytes that are no zip."""


class FileSum(NamedTuple):
    """Of what a file holds: its size in bytes, and its SHA-256, hexadecimal."""

    size: int
    sha256: str


class Room:
    """What a pack may still hold: it is refused as soon as it holds more."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._files = 0
        self._bytes = 0

    def take_file(self, name: str) -> None:
        self._files += 1
        if self._files > self._config.pack_max_files:
            raise PackError(f"there are more than {self._config.pack_max_files} files", name)

    def take_bytes(self, name: str, count: int) -> None:
        self._bytes += count
        if self._bytes > self._config.pack_max_bytes:
            raise PackError(f"with this the pack has more than {self._config.pack_max_bytes} bytes", name)


def copy_pack(pack: Path, target: Path, config: Config) -> dict[str, FileSum]:
    """Copy the files of a pack into the empty folder `target`, and say what was copied, by name.

    Raises `NotFoundError`; `PackError` for what is no pack, or more than one may be.
    """
    room = Room(config)
    if pack.is_dir():
        return dict(_copy_folder(pack, target, room))
    if pack.is_file():
        return dict(_copy_zip(pack, target, room, config))
    raise NotFoundError(f"there is no resume pack {pack}", path=str(pack))


def printable(name: str) -> str:
    """A name as it can be shown: ASCII, and not without end."""
    return name.encode("ascii", "backslashreplace").decode()[:1024]


def require_name(name: str) -> None:
    """Raises `PackError` for what no file of a pack is called."""
    if not _PLAIN.fullmatch(name):
        raise PackError("the name is no plain relative path", printable(name))
    folder, _, last = name.rpartition("/")
    if name not in (PACK_MANIFEST, *REQUIRED) and not (folder == EPISODES and number_of(last)):
        raise PackError("a resume pack has no such file", name)


def write_file(path: Path, chunks: Iterable[bytes]) -> FileSum:
    """A new file with this content, not synced. Raises `OSError`."""
    make_folder(path.parent, synced=False)
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            write_all(fd, chunk)
    finally:
        os.close(fd)
    return FileSum(size, digest.hexdigest())


# --- A folder ---


def _copy_folder(pack: Path, target: Path, room: Room) -> Iterator[tuple[str, FileSum]]:
    fd = _opened(os.fspath(pack), os.O_DIRECTORY)
    try:
        yield from _copy_entries(fd, "", target, room)
    finally:
        os.close(fd)


def _copy_entries(folder: int, prefix: str, target: Path, room: Room) -> Iterator[tuple[str, FileSum]]:
    """Of an open folder and the folders in it. No link is followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            room.take_file(printable(name))
            if entry.is_dir(follow_symlinks=False):
                if name not in FOLDERS:
                    raise PackError("a resume pack has no such folder", printable(name))
                inner = _opened(entry.name, os.O_DIRECTORY | os.O_NOFOLLOW, folder, name)
                try:
                    yield from _copy_entries(inner, f"{name}/", target, room)
                finally:
                    os.close(inner)
            else:
                require_name(name)
                yield name, _copy_file(entry.name, folder, name, target, room)


def _copy_file(last: str, folder: int, name: str, target: Path, room: Room) -> FileSum:
    # Without O_NONBLOCK, a FIFO of this name would never open.
    fd = _opened(last, os.O_NOFOLLOW | os.O_NONBLOCK, folder, name)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise PackError("it is no regular file", name)
        return write_file(target / name, _read(fd, name, room))
    finally:
        os.close(fd)


def _opened(path: str, flags: int, folder: int | None = None, name: str | None = None) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as error:
        raise PackError(f"it cannot be opened as what a pack has there: {error.strerror}", name) from None


def _read(fd: int, name: str, room: Room) -> Iterator[bytes]:
    while chunk := os.read(fd, CHUNK_BYTES):
        room.take_bytes(name, len(chunk))
        yield chunk


# --- A zip ---


def _copy_zip(pack: Path, target: Path, room: Room, config: Config) -> Iterator[tuple[str, FileSum]]:
    private = target.with_name(target.name + ".zip")
    try:
        with pack.open("rb") as source:
            write_file(private, _read_zip(source, config))
        with private.open("rb") as file:
            _require_small_directory(file, config)
            yield from _unpack(file, target, room)
    finally:
        private.unlink(missing_ok=True)


def _read_zip(source: BinaryIO, config: Config) -> Iterator[bytes]:
    left = config.pack_max_bytes + _ZIP_OVERHEAD_BYTES
    while chunk := source.read(CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            raise PackError(f"the zip is larger than a pack of {config.pack_max_bytes} bytes can be")
        yield chunk


def _require_small_directory(file: BinaryIO, config: Config) -> None:
    """`zipfile` reads the whole directory into memory, whatever number of files it says: so that is bounded first.

    The end record is the last of the file, without a comment and without a zip64 record, of which a pack has no need
    (APPNOTE.TXT 6.3.10, sections 4.3.15 and 4.3.16): so no two readers can take different ones for it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_OF_DIRECTORY.size - _LOCATOR_64_BYTES))
    tail = file.read()
    if len(tail) < _END_OF_DIRECTORY.size:
        raise PackError("it is no zip")
    magic, *_, count, directory_bytes, _, comment_bytes = _END_OF_DIRECTORY.unpack(tail[-_END_OF_DIRECTORY.size :])
    if magic != _END_MAGIC or comment_bytes or tail[: -_END_OF_DIRECTORY.size].startswith(_LOCATOR_64_MAGIC):
        raise PackError("it is no zip, or one with more at its end than a pack has")
    if count > config.pack_max_files or directory_bytes > _ZIP_OVERHEAD_BYTES:
        raise PackError(f"there are more than {config.pack_max_files} files")


def _unpack(file: BinaryIO, target: Path, room: Room) -> Iterator[tuple[str, FileSum]]:
    try:
        archive = zipfile.ZipFile(file)
    except _UNREADABLE as error:
        raise PackError(f"it is no zip: {error}") from None
    seen: set[str] = set()
    with archive:
        for info in archive.infolist():
            name = info.orig_filename
            room.take_file(printable(name))
            if name in seen:
                raise PackError("it is there twice", printable(name))
            seen.add(name)
            if name.removesuffix("/") in FOLDERS and name.endswith("/") and not info.file_size:
                continue
            _require_plain_member(info)
            yield name, write_file(target / name, _read_member(archive, info, room))


def _require_plain_member(info: zipfile.ZipInfo) -> None:
    """Raises `PackError` for one that is not a file of a pack, or says of itself that it is a bomb."""
    name = info.orig_filename
    require_name(name)
    if info.filename != name:  # an extra field gives it another, for readers that know of such
        raise PackError("it has two names", name)
    if info.flag_bits & _ENCRYPTED:
        raise PackError("it is encrypted", name)
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise PackError("it is no regular file", name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PackError(f"it is compressed by method {info.compress_type}, and a pack by none, or by deflate", name)
    if info.file_size > _RATIO_FROM_BYTES and info.file_size > _MOST_RATIO * info.compress_size:
        raise PackError(f"it is compressed to less than a {_MOST_RATIO}th of its size", name)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, room: Room) -> Iterator[bytes]:
    name = info.orig_filename
    room.take_bytes(name, info.file_size)
    left = info.file_size
    try:
        with archive.open(info) as member:
            while chunk := member.read(CHUNK_BYTES):
                left -= len(chunk)
                yield chunk
    except _UNREADABLE as error:
        raise PackError(f"it cannot be unpacked: {error}", name) from None
    if left:
        raise PackError(f"it has {info.file_size - left} bytes, and says {info.file_size}", name)
