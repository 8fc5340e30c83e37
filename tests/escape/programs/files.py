"""Attempts at files: to read, to write, to change what is not the overlay's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from kernel import syscall  # type: ignore[import-not-found]  # a copy stands beside it
from telling import NothingGainedError  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from tests.escape.programs.telling import Facts

AT_FDCWD = -100
HANDLE_BYTES = 128
IN_CREATE = 0x100


def scratch() -> Path:
    return Path(os.environ["OVERLAY_SCRATCH"])


def state() -> Path:
    return Path(os.environ["OVERLAY_STATE"])


def outside(facts: Facts, name: str = "") -> Path:
    """The folder that everybody may write to, as far as modes go, or something in it."""
    return Path(facts["outside"]) / name


# To read


def read_shadow(_: Facts) -> int:
    return len(Path("/etc/shadow").read_bytes())


def read_ssh_key(facts: Facts) -> str:
    return (Path(facts["home"]) / ".ssh" / "id_ed25519").read_text()


def list_home(facts: Facts) -> list[str]:
    return sorted(path.name for path in Path(facts["home"]).iterdir())


def read_another_overlay(facts: Facts) -> str:
    return (Path(facts["another"]) / "secret.txt").read_text()


def list_overlays(facts: Facts) -> int:
    return len(list(Path(facts["another"]).parent.iterdir()))


def read_anothers_state(facts: Facts) -> str:
    return Path(facts["anothers_state"]).read_text()


def read_ledger(facts: Facts) -> int:
    with Path(facts["ledger"]).open("rb") as file:
        return len(file.read(100))


def append_to_ledger(facts: Facts) -> None:
    os.close(os.open(facts["ledger"], os.O_WRONLY | os.O_APPEND))


def read_settings(facts: Facts) -> str:
    return Path(facts["settings"]).read_text()


def read_outside(facts: Facts) -> str:
    return outside(facts, "file").read_text()


def read_by_link_in_scratch(facts: Facts) -> str:
    link = scratch() / "link"
    link.symlink_to(outside(facts, "file"))
    return link.read_text()


def read_by_root_of_proc(facts: Facts) -> str:
    """By the root folder of the first process, which may be another's."""
    return Path(f"/proc/1/root{outside(facts, 'file')}").read_text()


def read_by_working_folder(facts: Facts) -> str:
    """By the folder that the process stands in, which may be read, and up from there."""
    return Path(f"/proc/self/cwd/../{Path(facts['another']).name}/secret.txt").read_text()


def read_by_handle(facts: Facts) -> None:
    """By a handle of a file, which has no path (open_by_handle_at(2)). The first call refused is told."""
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    ctypes.memmove(handle, (HANDLE_BYTES - 8).to_bytes(4, "little"), 4)
    mount_id = ctypes.create_string_buffer(8)
    syscall("name_to_handle_at", AT_FDCWD, os.fsencode(outside(facts, "file")), handle, mount_id, 0)
    root = os.open("/", os.O_RDONLY)
    os.close(syscall("open_by_handle_at", root, handle, os.O_RDONLY))


def read_granted(facts: Facts) -> str:
    """A file that the manifest asks for."""
    return outside(facts, "readable").read_text()


def watch_folder(facts: Facts) -> int:
    """And learn the names that come to it (inotify(7))."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch: int = libc.inotify_add_watch(libc.inotify_init1(0), facts["outside"].encode(), IN_CREATE)
    if watch < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch")
    return watch


# To write


def write_scratch(_: Facts) -> str:
    """Which every phase allows, with all that belongs to it."""
    folder = scratch() / "folder"
    folder.mkdir()
    (folder / "file").write_text("written")
    (folder / "file").rename(scratch() / "renamed")
    (scratch() / "link").symlink_to("renamed")
    return (scratch() / "link").read_text()


def write_state(_: Facts) -> str:
    (state() / "file").write_text("kept")
    return (state() / "file").read_text()


def write_outside(facts: Facts) -> None:
    outside(facts, "new").write_text("written")


def append_outside(facts: Facts) -> None:
    with outside(facts, "file").open("a") as file:
        file.write("more")


def truncate_outside(facts: Facts) -> None:
    os.truncate(outside(facts, "truncated"), 0)


def make_folder_outside(facts: Facts) -> None:
    outside(facts, "new-folder").mkdir()


def make_fifo_outside(facts: Facts) -> None:
    os.mkfifo(outside(facts, "new-fifo"))


def make_device_in_scratch(_: Facts) -> None:
    """The null device, under a name of our own: as that, so the disk."""
    os.mknod(scratch() / "disk", stat.S_IFCHR | 0o600, os.makedev(1, 3))


def make_link_outside(facts: Facts) -> None:
    outside(facts, "new-link").symlink_to("/etc")


def remove_outside(facts: Facts) -> None:
    outside(facts, "removed").unlink()


def remove_folder_outside(facts: Facts) -> None:
    outside(facts, "removed-folder").rmdir()


def rename_outside(facts: Facts) -> None:
    outside(facts, "renamed").rename(outside(facts, "new-name"))


def rename_from_scratch(facts: Facts) -> None:
    (scratch() / "mine").write_text("written")
    (scratch() / "mine").rename(outside(facts, "moved"))


def hard_link_outside(facts: Facts) -> None:
    outside(facts, "new-hard-link").hardlink_to(outside(facts, "file"))


def hard_link_into_state(facts: Facts) -> None:
    """A name of the foreign file where writing is allowed."""
    (state() / "hard-link").hardlink_to(outside(facts, "file"))


def write_by_link_in_scratch(facts: Facts) -> None:
    link = scratch() / "link"
    link.symlink_to(outside(facts, "by-link"))
    link.write_text("written")


def write_by_link_in_state(facts: Facts) -> None:
    link = state() / "link"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(outside(facts, "by-link"))
    link.write_text("written")


def write_by_descriptor(facts: Facts) -> None:
    """By /proc/self/fd, from a descriptor that is for reading only."""
    with outside(facts, "readable").open() as file:
        Path(f"/proc/self/fd/{file.fileno()}").write_text("written")


def write_by_path_descriptor(facts: Facts) -> None:
    """By /proc/self/fd, from a descriptor that is for nothing (O_PATH), which may be had of any file."""
    fd = os.open(outside(facts, "file"), os.O_PATH)
    Path(f"/proc/self/fd/{fd}").write_text("written")


def write_to_fifo(facts: Facts) -> None:
    os.close(os.open(outside(facts, "fifo"), os.O_WRONLY | os.O_NONBLOCK))


def write_own_folder(_: Facts) -> None:
    Path(__file__).with_name("written.py").write_text("import os")


def write_own_program(_: Facts) -> None:
    with Path(__file__).with_name("run.py").open("a") as file:
        file.write("\n")


def write_granted(facts: Facts) -> None:
    """In a folder that the manifest asks for."""
    (Path(facts["granted"]) / "file").write_text("written")


# To change


def change_mode(facts: Facts) -> None:
    outside(facts, "mine").chmod(0o600)


def change_owner(facts: Facts) -> None:
    os.chown(outside(facts, "mine"), os.getuid(), os.getgid())


def change_times(facts: Facts) -> None:
    os.utime(outside(facts, "mine"), (0, 0))


def change_attributes(facts: Facts) -> None:
    os.setxattr(outside(facts, "mine"), "user.escape", b"written")


def remove_attributes(facts: Facts) -> None:
    os.setxattr(outside(facts, "mine"), "user.removed", b"written")
    os.removexattr(outside(facts, "mine"), "user.removed")


# What lies in memory


def find_shared_memory(facts: Facts) -> str:
    """A file of somebody else in /dev/shm."""
    try:
        return Path(facts["shared"]).read_text()
    except FileNotFoundError:
        raise NothingGainedError("no such file") from None


def use_shared_memory(_: Facts) -> str:
    """Which every phase has, for locks and queues between processes of one call."""
    path = Path("/dev/shm/own")
    path.write_text("written")
    text = path.read_text()
    path.unlink()
    return text


def find_leftovers(_: Facts) -> list[str]:
    """What calls before or beside this one have in their scratch folders."""
    found = [str(path) for path in scratch().parent.iterdir() if path != scratch()]
    found += [str(path) for path in scratch().iterdir()]
    if not found:
        raise NothingGainedError(f"{scratch().parent} holds only the call's own, empty folder")
    return found
