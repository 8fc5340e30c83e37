"""A bus as far as cgroups know one: `python -m tests.programs.a_cgroup_bus MODE TOKEN [MB]`.

Runs `eater.py` for so many MiB, or where none are given for one, and then waits to be killed. It says what became of
it, as JSON: {"why_not", "path", "at_limit", "peak_mb"}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from runners.cgroups import Cgroups
from runners.helpers import Helpers
from runners.processes import Script
from tests.programs import FOLDER
from tests.programs.a_home import INTERPRETER, a_home

EATER = (str(FOLDER / "eater.py"),)
HELD_KIB = 32 * 1024


async def main(mode: str, token: str, mb: int) -> None:
    cgroups = Cgroups()
    helpers = Helpers(most=1, cgroups=cgroups)
    script = Script(INTERPRETER, EATER, stdin="pipe") if mode == "fork" else None
    helper = await helpers.pool(a_home(token), script).ready()
    reader, stdin = os.pipe()
    stdout, writer = os.pipe()
    command = [*INTERPRETER, *EATER, token, "eat", str(mb or 1)]
    process = helper.launch(command, (reader, writer, 2), {}, held_kib=HELD_KIB)
    path = None if process.cgroup is None else process.cgroup.path
    os.close(writer)
    if not mb:
        await asyncio.to_thread(os.read, stdout, 6)
        print(json.dumps({"why_not": cgroups.why_not, "path": path}), flush=True)
        await asyncio.Event().wait()
    ended = await process.ended
    await helpers.close()
    for fd in (reader, stdin, stdout):
        os.close(fd)
    told = {"why_not": cgroups.why_not, "path": path, "at_limit": ended.at_limit, "peak_mb": ended.peak_mb}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0))
