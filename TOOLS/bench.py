"""How fast is the bus? It is measured beside what people would use instead, all in one run, and the ratios are printed.

    python TOOLS/bench.py [--seconds 3] [--runs 3] [--connections 1,16,64] [--only NAME,...] [--json FILE] [--markdown]
    python TOOLS/bench.py --peers [--crowd 100] ...
    python TOOLS/bench.py --hostile [--seconds 3] [--runs 3] [--connections 16] [--json FILE]
    python TOOLS/bench.py --memory [--seed 1] [--json FILE]
    python TOOLS/bench.py --soak MINUTES [--rate CALLS_A_SECOND] [--every 10] [--csv FILE] [--json FILE]

Each server is a process of its own on a free port of 127.0.0.1; the load comes from another (`bench/load.py`). The
rivals stand in `bench/rivals.py` with the reason why each is fair. All run the same echo programs (`bench/echo.*`) in
the same environment, and get the same request. The bus is `aal serve` with AAL_FSYNC=batch in a temporary folder.

With `--peers` webhook and lighttpd are measured too (`bench/peers.py`), GET / beside sleeping calls
(`bench/sleepers.py`), and the memory of a bus with many overlays (`bench/crowd.py`); then the figures are held against
the goals (`bench/goals.py`). `--soak` holds a steady rate of mixed calls (`bench/soak.py`) and says whether the memory
and the descriptors of the bus stay flat (`bench/flat.py`).

`--hostile` measures what honest clients keep of their calls beside as many that send what no client should
(`bench/hostile.py`), and holds that against what they have beside as many honest ones (`bench/siege.py`).

`--memory` has calls that really take memory share too little of it, under this and other policies and the same OOM
killer (`bench/shared_memory.py`).

Speed on a shared machine drifts. So every round measures every target once, in turn, and a ratio is taken within a
round; what is shown is the median over the rounds. CPU per call is the user and system time of the server and all that
it started, ended or not, over all answers; it is what holds when the load generator wants the same cores.

Ends with 0, 1 where a call failed or a soak or a siege did not hold, 2 where the bench could not run.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    try:
        runpy.run_path(str(Path(__file__).with_suffix("")), run_name="__main__")
    except ModuleNotFoundError as missing:
        print(f"bench.py: {missing}. Install the test extra first: pip install -e '.[test]'", file=sys.stderr)
        sys.exit(2)
