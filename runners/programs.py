"""What a command's program is on the disk: the files that the kernel executes for it, and what it reads beside them.

The kernel executes the file that PATH leads to, for a script its `#!` line's interpreter as well (execve(2)), and for
an ELF file the loader that it names (elf(5), PT_INTERP). All that is read here, nothing is run.

A version manager's `shims/python3`, and any other shell script on the PATH that stands in for a program, finds out by
running what the program is. Which that will be cannot be read, so it is a `stand_in`, whose execs cannot be held by
their paths. It is not passed over for the next of that name on the PATH: that would be another interpreter, without
the packages of the first.

What the overlay may write to (`own`, real paths) it may have changed in a call before. A program there is run, but what
it says is not believed: no link, `#!` line, loader or `pyvenv.cfg` that lies there leads on to anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import struct
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from typing import BinaryIO

MAX_INTERPRETERS = 5
"""How many `#!` lines the kernel follows (BINPRM_MAX_RECURSION, with one to spare)."""

MAX_LINKS = 40
"""How many links the kernel follows (path_resolution(7))."""

_FIRST_LINE = 256
"""How much of a `#!` line the kernel reads (BINPRM_BUF_SIZE)."""

_ELF = b"\x7fELF"
_IDENT_BYTES, _HEADER_BYTES = 16, 48
_WIDE, _LITTLE = 2, 1
_PT_INTERP = 3
_MAX_HEADERS = 64 * 1024
_MAX_NAME = 4096

_BESIDE_BIN = (
    "lib",
    "lib64",
    "ssl/certs",
    "ssl/cert.pem",
    "ssl/cacert.pem",
    "ssl/openssl.cnf",
    "share/locale",
    "share/terminfo",
    "share/zoneinfo",
    "Cellar",
)
"""What a program in `<prefix>/bin` reads of its prefix. All of `share` may be a person's data (`~/.local/share`)."""

_PYTHON = re.compile(r"python[0-9.]*t?")
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "mksh", "fish"})
_ENV = "env"
_SHIMS = "shims"
_SEARCHED = ("PYTHONPATH", "LD_LIBRARY_PATH", "NODE_PATH", "PERL5LIB", "RUBYLIB")
"""Variables that name folders for an interpreter or the loader to look for libraries in."""


class Program(NamedTuple):
    """`executed` are real files, `read` files and folders that need not be there.

    `stand_in` says what it is where it stands in for another program, which may be in `trees`: folders to be read and
    executed in.
    """

    executed: tuple[Path, ...] = ()
    read: tuple[Path, ...] = ()
    stand_in: str | None = None
    trees: tuple[Path, ...] = ()


def look(name: str, folder: Path, env: Mapping[str, str], own: Collection[Path] = ()) -> Program:
    """The program of a command whose first word is `name`, run in `folder` with `env`; empty for one that is not there.

    Where the command names a file, or finds one in its folder, that is its program, whatever it does.
    """
    search = search_path(folder, env)
    found = find(name, folder, search)
    if found is None:
        return Program()
    paths = list(_interpreters(found, folder, search, own))
    executed = resolved(paths, own)
    executed += resolved(_loaders(executed, folder, own), own)
    read = [place for path in paths for place in _read_by(path, env, own)]
    read += [folder / place for name in _SEARCHED for place in env.get(name, "").split(os.pathsep) if place]
    is_named = "/" in name or is_below(found, folder)
    on_path = ([] if is_named else [found]) + [path for before, path in pairwise(paths) if before.name == _ENV]
    stand_ins = {path: what for path in on_path if (what := _stands_in(path, paths[-1]))}
    trees = resolved([tree for path in stand_ins for tree in _trees(path)], own)
    return Program(_once(executed), _once(read), next(iter(stand_ins.values()), None), _once(trees))


def search_path(folder: Path, env: Mapping[str, str]) -> list[Path]:
    """The folders of the PATH; an empty or relative one is seen from `folder`."""
    return [folder / place for place in env.get("PATH", os.defpath).split(os.pathsep)]


def find(name: str, folder: Path, search: Sequence[Path]) -> Path | None:
    """The path of a program, not resolved: its own where it has a `/`, else the first on the PATH that may be run."""
    paths = [folder / name] if "/" in name else [place / name for place in search]
    return next((path for path in paths if name and path.is_file() and os.access(path, os.X_OK)), None)


def real(path: Path) -> Path:
    """Where it leads, also where that is not there. (`Path.resolve` raises for links in a circle.)

    The path itself, absolute, where a link on the way may not be read, as those of others below /proc.
    """
    try:
        return Path(os.path.realpath(path))
    except OSError:
        return path.absolute()


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, by their names."""
    return folder in path.parents


def resolve(path: Path, own: Collection[Path]) -> Path | None:
    """Where an absolute path leads. None where a link on its way lies below one of `own`, and for no path at all."""
    at, rest = Path("/"), [*reversed(path.parts)]
    links = 0
    while rest:
        part = rest.pop()
        ahead = at.parent if part == ".." else at / part
        try:
            target = ahead.readlink()
        except OSError:  # no link, or not there
            at = ahead
            continue
        except ValueError:  # a NUL
            return None
        links += 1
        if links > MAX_LINKS or any(is_below(ahead, place) for place in own):
            return None
        rest += reversed(target.parts)  # of which the first of an absolute one leads back to the root
    return at


def resolved(paths: Iterable[Path], own: Collection[Path]) -> list[Path]:
    """Where they lead, without those that lead nowhere."""
    return [target for path in paths if (target := resolve(path, own)) is not None]


def _is_believed(path: Path, own: Collection[Path]) -> bool:
    """Whether what a file says is its author's word."""
    file = resolve(path, own)
    return file is not None and not any(file == place or is_below(file, place) for place in own)


def elf_loader(path: Path) -> Path | None:
    """The loader that an ELF file names; None where it is linked statically, no ELF file or cannot be read."""
    try:
        with path.open("rb") as file:
            name = _interp(file)
    except (OSError, struct.error):
        return None
    return Path(os.fsdecode(name)) if name else None


def _loaders(files: Iterable[Path], folder: Path, own: Collection[Path]) -> Iterator[Path]:
    for file in files:
        loader = elf_loader(file) if _is_believed(file, own) else None
        if loader is not None:
            yield folder / loader


def _interp(file: BinaryIO) -> bytes | None:
    """The PT_INTERP of the program headers. Raises struct.error where the file is too short for them."""
    ident, header = file.read(_IDENT_BYTES), file.read(_HEADER_BYTES)
    if len(ident) < _IDENT_BYTES or not ident.startswith(_ELF):
        return None
    is_wide, order = ident[4] == _WIDE, "<" if ident[5] == _LITTLE else ">"
    at, size, count = struct.unpack_from(order + ("16xQ14xHH" if is_wide else "12xI10xHH"), header)
    if not 0 < size * count <= _MAX_HEADERS:
        return None
    file.seek(at)
    headers = file.read(size * count)
    for start in range(0, len(headers), size):
        kind, offset, length = struct.unpack_from(order + ("I4xQ16xQ" if is_wide else "II8xI"), headers, start)
        if kind == _PT_INTERP:
            file.seek(offset)
            return file.read(min(length, _MAX_NAME)).rstrip(b"\0")
    return None


def _interpreters(path: Path, folder: Path, search: Sequence[Path], own: Collection[Path]) -> Iterator[Path]:
    """The program itself, then those of the `#!` lines, each by the path that it is found by."""
    for _ in range(MAX_INTERPRETERS):
        yield path
        words = _first_line(path) if _is_believed(path, own) else []
        if not words:
            return
        path = folder / words[0]
        if path.name == _ENV:
            yield path
            found = find(_program_of_env(words[1:]), folder, search)
            if found is None:
                return
            path = found


def _first_line(path: Path) -> list[str]:
    """The interpreter of a `#!` line and the one argument that it may have."""
    try:
        with path.open("rb") as file:
            line = file.read(_FIRST_LINE).partition(b"\n")[0]
    except OSError:
        return []
    return os.fsdecode(line[2:].strip()).split(None, 1) if line.startswith(b"#!") else []


def _program_of_env(arguments: Sequence[str]) -> str:
    """What env(1) runs: the first word that is no option and sets no variable; empty where there is none."""
    words: list[str] = []
    with contextlib.suppress(ValueError):  # a quote that does not end
        words = shlex.split(re.sub(r"^(-\w*S|--split-string=)", "", " ".join(arguments)))
    return next((word for word in words if not word.startswith("-") and "=" not in word), "")


def _stands_in(found: Path, interpreter: Path) -> str | None:
    """What makes a program that was found on the PATH a stand-in, if it is one."""
    if found.parent.name == _SHIMS:
        return f"{found.name} is a version manager's shim"
    is_shell = interpreter != found and interpreter.name in _SHELLS
    return f"{found.name} is a shell script that stands in for a program" if is_shell else None


def _trees(found: Path) -> tuple[Path, ...]:
    """A version manager keeps beside its shims what they lead to: `<root>/shims`, `<root>/versions`."""
    return (found.parent.parent,) if found.parent.name == _SHIMS else ()


def _read_by(path: Path, env: Mapping[str, str], own: Collection[Path]) -> Iterator[Path]:
    """The libraries beside a program and beside each file that it is a link to, since it may look there for either."""
    for hop in _hops(path, own):
        yield from _of_environment(hop, own)
        if hop.parent.name in ("bin", "sbin"):
            yield from _of_prefix(hop.parent.parent, path.name)
    if _PYTHON.fullmatch(path.name):
        yield from _of_user(env)


def _hops(path: Path, own: Collection[Path]) -> Iterator[Path]:
    """The path, and each that a link leads on to. The last is the file itself, or a link that is not believed."""
    for _ in range(MAX_LINKS):
        parent = resolve(path.parent, own)
        if parent is None:
            return
        path = parent / path.name
        yield path
        if any(is_below(path, place) for place in own):
            return
        try:
            path = parent / path.readlink()
        except (OSError, ValueError):  # no link, or no path
            return


def _of_prefix(prefix: Path, name: str) -> Iterator[Path]:
    own = {name, name.rstrip("0123456789.")}
    yield from (prefix / beside for beside in (*_BESIDE_BIN, *(f"share/{name}" for name in sorted(own))))


def _of_environment(path: Path, own: Collection[Path]) -> Iterator[Path]:
    """Of a virtual environment's Python (PEP 405): the environment, and the Python that it was made from."""
    for root in path.parents[:2]:
        file = root / "pyvenv.cfg"
        if not file.is_file():
            continue
        yield file
        yield from _of_prefix(root, path.name)
        for home in _homes(file) if _is_believed(file, own) else ():
            yield from _of_prefix(root.joinpath(home).parent, path.name)


def _homes(file: Path) -> Iterator[str]:
    """The folder of the Python that an environment was made from."""
    with contextlib.suppress(OSError):
        for line in file.read_text("utf-8", "surrogateescape").splitlines():
            key, _, value = line.partition("=")
            if key.strip().lower() == "home":
                yield value.strip()


def _of_user(env: Mapping[str, str]) -> Iterator[Path]:
    """The packages that a person installed for a Python (`site.getusersitepackages`), where the program finds them."""
    home = env.get("HOME")
    base = env.get("PYTHONUSERBASE") or (home and f"{home}/.local")
    if base and base.startswith("/"):
        with contextlib.suppress(OSError):
            pythons = sorted(path for path in Path(base, "lib").iterdir() if _PYTHON.fullmatch(path.name))
            yield from (path / "site-packages" for path in pythons)


def _once(paths: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(paths))
