"""Why a program could not be started, in words for people, and whether another try may go better."""

from __future__ import annotations

import errno
import os
import shutil
from typing import TYPE_CHECKING, NamedTuple

from runners.base import Code, Outcome
from runners.helper_errors import UnheldError
from runners.helpers import SHORTAGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Unstarted(NamedTuple):
    """`retryable` where something was short for the moment: memory, processes, descriptors."""

    words: str
    retryable: bool
    code: Code = Code.START

    @property
    def outcome(self) -> Outcome:
        """What the call gets."""
        return Outcome(self.code, error=self.words, retryable=self.retryable)


def unstarted(argv: Sequence[str], env: Mapping[str, str], folder: Path, error: BaseException) -> Unstarted:
    """What the error means that came of starting `argv` in the folder, with the PATH of `env`."""
    reason, short, code = str(error), False, Code.START
    if isinstance(error, UnheldError):
        reason, code = error.words, Code.SANDBOX
    elif isinstance(error, OSError):
        reason, short = _why(argv[0], env, folder, error), error.errno in SHORTAGES
    return Unstarted(f"could not start {argv[0]!r}: {reason}", short, code)


def _why(name: str, env: Mapping[str, str], folder: Path, error: OSError) -> str:
    if error.filename == folder:
        return f"its folder {str(folder)!r} cannot be entered: {error.strerror}"
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT and _is_there(name, env, folder):
        return f"{reason}: the file is there, but the interpreter or loader that it names is not"
    if error.errno == errno.ENOEXEC:
        return f"{reason}: a script needs a first line such as #!/bin/sh"
    return reason


def _is_there(name: str, env: Mapping[str, str], folder: Path) -> bool:
    if "/" in name:
        return (folder / name).exists()
    return shutil.which(name, path=env.get("PATH", os.defpath)) is not None
