"""A file system that is full, and ones that are read-only, while a ledger is on them.

They are mounted in a namespace of their own, by a child that ends with them: nothing is left behind, and nobody needs
to be root where users may have namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from bus.ledger import Fsync, LedgerError
from tests.faults import facts
from tests.faults.children import HUNG, Child
from tests.ledgers import append, call, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bus.ledger import Ledger
    from tests.faults.children import Say

_NEWNS = 0x00020000
_NEWUSER = 0x10000000
_NOBODY = 65534
_KIB = 1024
_BALLAST_KIB = 64
_LEAST_KIB, _MOST_KIB = 16, 80


def lacking() -> str | None:
    """Why nothing can be mounted here; None where it can."""
    said = _apart(lambda folder, _: _mount("-t", "tmpfs", "tmpfs", str(folder)))
    return None if not said else f"nothing can be mounted: {said[-1]}"


def full(step_kib: int) -> Iterator[list[str]]:
    """A ledger on file systems that fill up at other places: each `step_kib` of size, in each mode of AAL_FSYNC."""
    for size_kib in range(_LEAST_KIB, _MOST_KIB, step_kib):
        for fsync in get_args(Fsync):
            faults = _apart(functools.partial(_fill, size_kib, fsync))
            yield [f"{size_kib} KiB, AAL_FSYNC={fsync}: {fault}" for fault in faults]


def read_only() -> Iterator[list[str]]:
    """A file system without writing, and a log that may not be written, until they can be again."""
    for name, work in (("a read-only file system", _read_only), ("a log of mode 0444", _of_mode_0444)):
        yield [f"{name}: {fault}" for fault in _apart(work)]


def _fill(size_kib: int, fsync: Fsync, folder: Path, say: Say) -> None:
    _mount("-t", "tmpfs", "-o", f"size={size_kib + _BALLAST_KIB}k", "tmpfs", str(folder))
    path = folder / "logs" / "provenance.jsonl"
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(_BALLAST_KIB * _KIB))
    with opened(path, fsync) as ledger:
        said = _append_until_it_fails(ledger, size_kib)
        if "No space left" not in (ledger.reason or ""):
            say(f"a full disk is no reason: {ledger.reason}")
        if ledger.probe():
            say("a full disk can be written, it says")
        _tell(say, facts.of_file(path, said))
        ballast.unlink()
        said += _goes_on(ledger, say)
    _tell(say, facts.after_reopening(path, said))


def _read_only(folder: Path, say: Say) -> None:
    _mount("-t", "tmpfs", "tmpfs", str(folder))
    path = folder / "logs" / "provenance.jsonl"
    with opened(path) as ledger:
        said = _appended(ledger, "before")
    _mount("-o", "remount,ro", str(folder))
    with opened(path) as ledger:
        if "Read-only file system" not in (ledger.reason or "") or ledger.probe():
            say(f"a read-only file system is no reason: {ledger.reason}")
        with contextlib.suppress(LedgerError):
            say(f"answered with {_appended(ledger, 'refused')}")
        _tell(say, facts.of_file(path, said))
        _mount("-o", "remount,rw", str(folder))
        said += _goes_on(ledger, say)
    _tell(say, facts.after_reopening(path, said))


def _of_mode_0444(folder: Path, say: Say) -> None:
    path = folder / "logs" / "provenance.jsonl"
    with opened(path) as ledger:
        said = _appended(ledger, "before")
    path.chmod(0o444)
    if os.geteuid() == 0:  # who stands above the modes of files
        for each in (folder, path.parent, *path.parent.iterdir()):
            os.chown(each, _NOBODY, -1)
        os.seteuid(_NOBODY)
    with opened(path) as ledger:
        if "Permission denied" not in (ledger.reason or "") or ledger.probe():
            say(f"a log that may not be written is no reason: {ledger.reason}")
        with contextlib.suppress(LedgerError):
            say(f"answered with {_appended(ledger, 'refused')}")
        _tell(say, facts.of_file(path, said))
        path.chmod(0o644)
        said += _goes_on(ledger, say)
    _tell(say, facts.after_reopening(path, said))


def _append_until_it_fails(ledger: Ledger, most: int) -> list[str]:
    """Each line has more than a KiB, so that fewer than `most` go in."""
    said: list[str] = []
    with contextlib.suppress(LedgerError):
        for number in range(most):
            said += _appended(ledger, str(number))
    return said


def _appended(ledger: Ledger, name: str) -> list[str]:
    receipt = append(ledger, call(name, error="x" * _KIB))
    return [f"stands {receipt.seq} {receipt.hash} {name}"]


def _goes_on(ledger: Ledger, say: Say) -> list[str]:
    try:
        if not ledger.probe():
            say(f"it does not get well: {ledger.reason}")
        return _appended(ledger, "again")
    except LedgerError as error:
        say(f"it is not written any more: {error}")
        return []


def _tell(say: Say, faults: Iterator[str]) -> None:
    for fault in faults:
        say(fault)


def _apart(work: Callable[[Path, Say], None]) -> list[str]:
    """What a child says that has a folder, and a mount namespace, of its own."""

    def inside(say: Say) -> None:
        _enter_namespace()
        work(Path(folder), say)

    with tempfile.TemporaryDirectory(prefix="faults-") as folder, Child(inside) as child:
        child.go()
        said = child.lines()
    return ["it hangs"] if said[-1:] == [HUNG] else said


def _enter_namespace() -> None:
    """Of mounts; for who is not root one of users as well, in which he is. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEWNS if uid == 0 else _NEWNS | _NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _mount("--make-rprivate", "/")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, stdin=subprocess.DEVNULL)
