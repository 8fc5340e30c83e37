"""Every target, in the order in which they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz import doors, frames, launching, private_files, readers

if TYPE_CHECKING:
    from tests.fuzz.campaign import Target

TARGETS: tuple[Target, ...] = (
    *readers.TARGETS,
    *private_files.TARGETS,
    *frames.TARGETS,
    *launching.TARGETS,
    *doors.TARGETS,
)
