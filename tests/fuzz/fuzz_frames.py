"""What a helper says to the bus, as atheris finds it: mutated bytes, guided by the coverage of what reads them.

    python tests/fuzz/fuzz_frames.py -atheris_runs=N [libFuzzer options, a folder of inputs]

An input says, choice by choice, what came before (nothing, "contained", "ready" too), whether the helper runs a script,
whether a descriptor comes with the first message, and then the messages: bytes as they are, or a verb with values about
it, since what mutates bytes hardly finds JSON, whose reader shows no coverage.

Ends with 77 and the input in a file where a check of `frames.py` fails.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.frames import Frames

REPO = Path(__file__).resolve().parents[2]
KEYS = ("namespace", "taken", "failed", "floor_kib", "loaded", "left")
"""What the objects of a helper have."""

READERS = ("runners.helper", "runners.wire")
"""What is instrumented for coverage: what reads the frames."""

MESSAGES, MEMBERS, DEPTH, TEXT = 4, 6, 3, 12
"""The most messages of an input, members of a list or an object, lists within each other, characters of a text."""


class Reader:
    """Makes what a helper says of an input, which is an `atheris.FuzzedDataProvider`."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def frames(self) -> Frames:
        from tests.fuzz.frames import OPENINGS, Frames  # noqa: PLC0415  # its readers are instrumented first

        opening = self._given.PickValueInList(list(OPENINGS))
        scripted, pidfd = self._given.ConsumeBool(), self._given.ConsumeBool()
        messages = [self._message() for _ in range(self._given.ConsumeIntInRange(0, MESSAGES))]
        return Frames((*opening, *filter(None, messages)), scripted=scripted, pidfd=pidfd)

    def _message(self) -> bytes:
        from tests.fuzz.frames import VERBS  # noqa: PLC0415

        if self._given.ConsumeBool():
            return bytes(self._given.ConsumeBytes(self._given.ConsumeIntInRange(0, 64)))
        return json.dumps([self._given.PickValueInList(list(VERBS)), self._value(DEPTH)]).encode()

    def _value(self, depth: int) -> Any:
        kind = self._given.ConsumeIntInRange(0, 7 if depth else 5)
        if kind == 7:
            names = [self._name() for _ in range(self._given.ConsumeIntInRange(0, MEMBERS))]
            return {name: self._value(depth - 1) for name in names}
        if kind == 6:
            return [self._value(depth - 1) for _ in range(self._given.ConsumeIntInRange(0, MEMBERS))]
        return self._scalar(kind)

    def _name(self) -> Any:
        return self._given.PickValueInList([*KEYS, self._given.ConsumeUnicode(TEXT)])

    def _scalar(self, kind: int) -> Any:
        given = self._given
        numbers = (given.ConsumeFloat, partial(given.ConsumeInt, 9), partial(given.ConsumeIntInRange, 0, MEMBERS))
        return (lambda: None, given.ConsumeBool, partial(given.ConsumeUnicode, TEXT), *numbers)[kind]()


def main(argv: list[str]) -> None:
    sys.path.insert(0, str(REPO))
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=list(READERS)):
        for reader in READERS:
            importlib.import_module(reader)
    from tests.fuzz.frames import bench  # noqa: PLC0415

    with bench() as found:
        atheris.Setup(argv, lambda data: found.speak(Reader(atheris.FuzzedDataProvider(data)).frames()))
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
