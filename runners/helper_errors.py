"""Why a helper cannot be had, or not as it was asked for."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Mapping


class AnotherWayError(Exception):
    """Instead of being ready a helper told that it has to be started another way.

    `no_namespace`: without a pid namespace. `unfit`: its script cannot be forked. `unclean`: without these modules.
    `given` says why: of a namespace by the kernel's error, of modules by their names.
    """

    def __init__(
        self, verb: Literal["no_namespace", "unfit", "unclean"], given: OSError | str | dict[str, str]
    ) -> None:
        super().__init__(f"{verb}: {given}")
        self.verb = verb
        self.given = given


class GoneError(OSError):
    """The helper ended before it could be given a program. Nothing was started: ask its pool for another helper."""

    def __init__(self) -> None:
        super().__init__(errno.ESRCH, "the helper has ended")


class UnheldError(OSError):
    """The kernel did not take what `AAL_SANDBOX=enforce` asks for: the words say what, and why. Nothing was started."""

    def __init__(self, words: str) -> None:
        super().__init__(errno.EPERM, words)
        self.words = words

    @classmethod
    def of(cls, failed: Mapping[str, str]) -> Self:
        """`failed` says why, by mechanism."""
        return cls(f"the kernel does not hold what AAL_SANDBOX=enforce asks for: {in_words(failed)}")


def in_words(failed: Mapping[str, str]) -> str:
    """Mechanisms, each with why it failed."""
    return "; ".join(f"{mechanism}: {why}" for mechanism, why in failed.items())
