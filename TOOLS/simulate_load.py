"""What does admission by memory buy? Hours of calls in seconds, for this bus's policy and for what others do.

    python TOOLS/simulate_load.py [--seeds 5] [--minutes 60] [--load 0.5] [--scenario mixed,linear,late] [--quick]
                                  [--only NAME,...] [--json FILE] [--markdown]
    python TOOLS/simulate_load.py --trace FILE.jsonl | --ledger logs/provenance.jsonl
    python TOOLS/simulate_load.py --save FILE.jsonl

A trace of calls, made from a seed or read from a ledger, is played against each policy of `simulation/` with a virtual
clock and a virtual memory whose OOM killer ends the largest call. The policy of this bus is not told again for that:
its own classes (`AdmissionControl`, `Needs`, `StressMonitor`, `Meter`, the helper's `Seen`) run on the virtual clock.
What is shown are medians over the seeds, with the least and the most in the JSON.

How many times faster than real time it ran is taken from the CPU time of this process, as other programs come between.

What it leaves out: a call takes as long as it takes, however many run beside it (no CPU, no swap, no page cache), and
starting or ending one takes no time.

Ends with 0, or 2 where it could not run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    try:
        from simulation.command import main
    except ModuleNotFoundError as missing:
        print(f"simulate_load.py: {missing}. Install the bus first: pip install -e .", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
