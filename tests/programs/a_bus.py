"""A bus as far as helpers know one, to be killed: `python -m tests.programs.a_bus FORM MODE TOKEN WAY...`.

Runs `hostile.py` in each of these ways at once. They have its own stdin, stdout and stderr, so a reader of its stdout
knows that nobody is left.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from runners.helpers import Helpers
from tests.programs.a_home import COMMAND, a_home, script_of

if TYPE_CHECKING:
    from collections.abc import Sequence


async def main(form: str, mode: str, token: str, ways: Sequence[str]) -> None:
    helpers = Helpers(most=1, namespace=form == "namespace")
    helper = await helpers.pool(a_home(token), script_of(mode)).ready()
    for way in ways:
        helper.launch([*COMMAND, token, way], (0, 1, 2), {})
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
