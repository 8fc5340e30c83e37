"""AAL-Core: an overlay bus.

A folder with a manifest becomes callable; every call is authorized by phase, admitted by memory, run by a runner and
written to a hash-chained ledger. Read `dispatch.py` first: `Bus.invoke` is the story. Then, as it calls them:
overlays, policy, scheduler, provenance; and runners/ for what happens to the process.
"""

from bus.hookspecs import hookimpl

__all__ = ["hookimpl"]
