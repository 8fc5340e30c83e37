"""Fixtures that every test file may use."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from typing import TYPE_CHECKING

import hypothesis
import pytest

from bus import envelopes, records
from bus.canonical import canonical, canonical_own
from runners import cgroups
from tests import vm
from tests.support import settings_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from bus.settings import Settings


# No deadline: a slow machine is no fault. No database: the checkout may be read-only; a failure prints its blob.
hypothesis.settings.register_profile("aal", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("aal")


# What the tests start is to hear a hangup, even where they are themselves run by nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _has_cgroups() -> bool:
    try:
        cgroups.find()
    except cgroups.UnavailableError:
        return False
    return True


# Elsewhere all of them would be skipped: `python -m tests.vm` runs them. Who names them is told what this kernel lacks.
collect_ignore = [] if _has_cgroups() else [str(vm.REPO / path) for path in vm.ON_ITS_KERNEL]


def pytest_collection() -> None:
    """The tests are thousands of objects that live to the end: the garbage collector is not to look at them again."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def _checked_own(members: dict[str, Any]) -> bytes:
    text = canonical_own(members)
    assert text == canonical(members)
    return text


@pytest.fixture(autouse=True)
def own_objects_are_canonical(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bus writes in a test without looking at it is in canonical form."""
    for module in (envelopes, records):
        monkeypatch.setattr(module, "canonical_own", _checked_own)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of an empty working folder."""
    return settings_in(tmp_path)


@pytest.fixture
def bound_by_modes() -> Iterator[None]:
    """Root stands above the modes of files by two capabilities; this takes them from the thread for one test.

    The structures are those of capget(2), version 3; threads that the test starts inherit the loss.
    """
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = effective
    assert libc.capset(header, sets) == 0
