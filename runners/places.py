"""Which places of the disk a process may read, write and execute in.

They are resolved once, when a helper is planned: a link leads where it leads then. But a link that lies below a place
that the overlay may write to is the overlay's own to change, and leads nowhere. Nor does any lead to what the bus keeps
for itself, as another overlay may have laid it.

A file that its keeper replaces by another (`/etc/hosts`) is out of reach for a process that was started before, as the
kernel holds to the file and not to the name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runners.programs import is_below, real, resolve, resolved, search_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from runners.programs import Program

LIBRARIES = (
    "/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share",
    "/usr/local/lib", "/usr/local/lib64", "/usr/local/share", "/usr/local/cuda*",
)  # fmt: skip
"""No folder of programs is among them: what may be read can be run by the loader, which may be executed."""

STORES = ("/nix/store", "/gnu/store")
"""Where Nix and Guix keep libraries and programs alike, so that the former cannot be read without the latter."""

ETC = (
    "ssl/certs", "ssl/cert.pem", "ssl/openssl.cnf", "pki/tls/certs", "pki/tls/cert.pem", "pki/tls/openssl.cnf",
    "pki/ca-trust", "ca-certificates", "ca-certificates.conf", "crypto-policies", "resolv.conf", "hosts", "host.conf",
    "nsswitch.conf", "gai.conf", "services", "protocols", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload",
    "localtime", "timezone", "passwd", "group", "mime.types", "os-release", "alternatives",
    "python3*", "java-*", "perl", "R", "fonts", "gitconfig",
)  # fmt: skip
"""Below /etc. `ssl` and `pki/tls` hold private keys beside the certificates, so neither is here as a whole. The last
are what distributions keep there of their interpreters, whose libraries have links to it, and what git reads."""

KERNEL = ("/proc", "/sys/devices/system/cpu", "/sys/devices/system/node")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
GPU = ("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/nvgpu", "/dev/dri", "/dev/kfd")
"""The device nodes of graphics processors, of a desktop and of a Jetson."""

GPU_KERNEL = (
    "/sys/bus/pci/devices", "/sys/class/drm", "/sys/class/kfd", "/sys/devices/pci*", "/sys/devices/virtual/kfd",
)  # fmt: skip
"""What their libraries look through to find them."""

_RUN = Path("/run")
_RESOLVERS = frozenset({"resolve", "resolvconf"})
"""Folders below /run whose resolv.conf is replaced by another file at any time, and that hold nothing else of worth."""

_OF_PROGRAMS = (Path("/usr"), Path("/bin"), Path("/sbin"), Path("/opt"))
_NOT_LOOKED_INTO = frozenset({".venv", "node_modules", "__pycache__", ".git"})

LOOKED_AT = 20_000
"""Entries of an overlay's folder that are looked at for links. Links beyond that lead nowhere."""


class Kept(NamedTuple):
    """What nobody is given: `paths` with all in them, but for what is in `own`. Real paths, made by `keep`."""

    paths: tuple[Path, ...] = ()
    own: tuple[Path, ...] = ()

    def is_reached_by(self, path: Path) -> bool:
        """Whether some of it would be given with a real path and what is below that."""
        return any(self._has(path, kept) or (_is_in(kept, path) and kept not in self.own) for kept in self.paths)

    def _has(self, path: Path, kept: Path) -> bool:
        """Where `own` and what is kept lie in each other, the inner one counts."""
        return _is_in(path, kept) and not any(_is_in(path, own) and _is_in(own, kept) for own in self.own)


class Wishes(NamedTuple):
    """What decides the places of an overlay's process, beside its program, folder and environment. Absolute paths.

    `own` is what the overlay may write to in some call, though perhaps not in this one, and is real. With `any_program`
    every folder of the PATH may be executed in.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    own: tuple[Path, ...] = ()
    kept: Kept = Kept()
    any_program: bool = False
    gpu: bool = False


class Places(NamedTuple):
    """Resolved paths of files, and of folders with all below them, that are there. Devices are read and written."""

    read: tuple[Path, ...]
    write: tuple[Path, ...]
    execute: tuple[Path, ...]
    devices: tuple[Path, ...]


def places(wishes: Wishes, program: Program, folder: Path, env: Mapping[str, str]) -> Places:
    """Where a process may go. Takes milliseconds, more only for a folder with many files."""
    home = real(folder)
    own = [*wishes.own, *resolved(wishes.write, wishes.own)]
    execute = _beside(program.executed, own, wishes.kept)
    read = [*_of_system(), home, *_beside(program.read, own, wishes.kept), *execute]
    devices = list(_matching(DEVICES))
    if wishes.any_program:
        searched = (*search_path(home, env), *_OF_PROGRAMS, *program.trees)
        execute += [home, *_beside(searched, own, wishes.kept)]
        read += execute
    if wishes.gpu:
        devices += _matching(GPU)
        read += _matching(GPU_KERNEL)
    asked = _there((*wishes.read, *_led_to(home, own)), own, wishes.kept)
    write = _there(wishes.write, own, wishes.kept)
    return Places((*_there(read, own), *asked), write, _there(execute, own), _there(devices, own))


def keep(paths: Iterable[Path], own: Iterable[Path]) -> Kept:
    """`paths` but for `own`, also where a link in one of them leads, as the folder of an overlay may be one."""
    found = [real(path) for path in paths]
    found += [real(Path(entry.path)) for path in found for entry in _entries(str(path)) if entry.is_symlink()]
    return Kept(tuple(dict.fromkeys(found)), tuple(map(real, own)))


def _of_system() -> Iterator[Path]:
    """What every program may read of the machine, not resolved."""
    yield from _matching((*LIBRARIES, *STORES, *KERNEL))
    for path in _matching(f"{Path('/etc', name)}" for name in ETC):
        yield path
        yield from _replaced_in(real(path))


def _matching(patterns: Iterable[str]) -> Iterator[Path]:
    for pattern in patterns:
        path = Path(pattern)
        yield from path.parent.glob(path.name) if "*" in path.name else (path,)


def _replaced_in(path: Path) -> Iterator[Path]:
    """The folder of a file that comes anew under the same name."""
    if is_below(path, _RUN) and path.parent.name in _RESOLVERS:
        yield path.parent


def _there(paths: Iterable[Path], own: Collection[Path], kept: Kept = Kept()) -> tuple[Path, ...]:  # noqa: B008
    """Resolved, once each, without what is kept, is not there or is out of this process's own reach."""
    targets = (target for target in resolved(paths, own) if os.access(target, os.F_OK))
    return tuple(dict.fromkeys(target for target in targets if not kept.is_reached_by(target)))


def _beside(paths: Iterable[Path], own: Collection[Path], kept: Kept) -> list[Path]:
    """Where they lead, beside what is kept."""
    return [part for path in resolved(paths, own) for part in _around(path, kept)]


def _around(path: Path, kept: Kept) -> Iterator[Path]:
    """A real path, or, where it would give something kept, what is in it beside that."""
    if not kept.is_reached_by(path):
        yield path
        return
    for entry in _entries(str(path)) if any(is_below(place, path) for place in kept.paths) else ():
        if not entry.is_symlink():
            yield from _around(Path(entry.path), kept)


def _is_in(path: Path, folder: Path) -> bool:
    return path == folder or is_below(path, folder)


def _led_to(home: Path, own: Collection[Path]) -> Iterator[Path]:
    """Where links lead that the author of a folder laid in it: what is outside, but no folder that this one is in."""
    for link in _links_in(home, own):
        target = resolve(link, own)
        if target is not None and target != home and not is_below(target, home) and not is_below(home, target):
            yield target


def _links_in(home: Path, own: Collection[Path]) -> Iterator[Path]:
    """What is installed in the folder (`.venv`, `node_modules`) is not looked through: much, and links of tools."""
    waiting = [] if home in own else [str(home)]
    kept = {str(path) for path in own}
    left = LOOKED_AT
    while waiting and left > 0:
        for entry in _entries(waiting.pop()):
            left -= 1
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.name not in _NOT_LOOKED_INTO and entry.is_dir() and entry.path not in kept:
                waiting.append(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
