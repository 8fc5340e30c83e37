"""A bus to be killed whose overlay has an interpreter of its own: `tests.programs.a_fooled_bus FORM TOKEN FOLDER`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from runners.helpers import Helpers
from runners.processes import Script
from tests.programs.a_home import a_home


async def main(form: str, token: str, folder: Path) -> None:
    helpers = Helpers(most=1, namespace=form == "namespace")
    await helpers.pool(a_home(token, folder=folder), Script(("./python3",), ("run.py",))).ready()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
