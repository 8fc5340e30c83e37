"""Where things lie: in the folder of runs, in a run's own folder, and in a resume pack, which keeps a run's places."""

DATABASE = "memory.v2.1.sqlite"
"""In the folder of runs: the memory of all of them."""

WORKING_SET = "state/working_set.v2.1.json"
LEDGER = "ledger/run.v2.1.jsonl"
EPISODES = "episodes"
PACKS = "resume"
CHANGING = "state/.changing"
"""Lies there while the run is changed."""

PACK_MANIFEST = "manifest.v2.1.json"
PACK_MEMORY = "memory/items.v2.1.jsonl"
"""In a pack only: what it holds, and what the run has committed."""

PENDING_MEMORY = "memory/pending.v2.1.jsonl"
"""In a run that was loaded only: what its pack remembers, as long as it is not proposed."""
