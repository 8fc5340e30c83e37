"""Syncs by the kernel itself, on real files."""

from __future__ import annotations

import ctypes
import errno
import os
import select
from typing import TYPE_CHECKING

import pytest

from bus.filesync import FileSync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sync() -> Iterator[FileSync]:
    try:
        sync = FileSync()
    except OSError as error:
        pytest.skip(f"this kernel has no asynchronous I/O: {error}")
    yield sync
    sync.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_the_eventfd_tells_that_a_file_was_synced(sync: FileSync, eventfd: int, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        for _ in range(3):
            file.write(b"line")
            sync.begin(file.fileno(), eventfd)
            select.select([eventfd], [], [])
            assert os.eventfd_read(eventfd) == 1
            sync.end()


def test_the_end_is_waited_for(sync: FileSync, eventfd: int, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(bytes(1 << 20))
        sync.begin(file.fileno(), eventfd)
        sync.end()


def test_a_sync_whose_end_was_not_learned_does_not_pass_for_the_next(
    sync: FileSync, eventfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FileSync._call

    def fail(self: FileSync, number: int, *arguments: object) -> int:
        if number == self._numbers.io_getevents:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, number, *arguments)

    with (tmp_path / "file").open("wb", buffering=0) as file:
        sync.begin(file.fileno(), eventfd)
        with monkeypatch.context() as patch:
            patch.setattr(FileSync, "_call", fail)
            with pytest.raises(OSError, match="Input/output"):
                sync.end()
        sync.begin(file.fileno(), eventfd)
        sync.end()
        ended = 0
        while ended < 2:
            select.select([eventfd], [], [])
            ended += os.eventfd_read(eventfd)
    at_once = (ctypes.c_int64 * 2)()
    assert sync._call(sync._numbers.io_getevents, sync._context, 0, 1, ctypes.byref(sync._event), at_once) == 0


def test_what_cannot_be_synced_is_refused(sync: FileSync, eventfd: int) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            sync.begin(writing, eventfd)
    finally:
        os.close(reading)
        os.close(writing)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sync.begin(writing, eventfd)
