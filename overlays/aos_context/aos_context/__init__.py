"""Context management for agents: what a run has in mind, what it did, what it reached, and what is remembered of it.

    working set   what an agent works on now; changed by patches that name the state that they saw (`ws_manager`)
    ledger        what happened to the run, one line an event (`ledger`)
    episode       an immutable checkpoint at a milestone (`episode`)
    memory        what outlives the run; proposed at any time, committed only at a milestone (`memory`)
    resume pack   a run that can be carried elsewhere (`resume_pack`)
    brief         what of all this goes into a model's prompt (`context_brief`)

Reading order; a file imports only what stands before it:

    ground        `config`, `layout` (where things lie), `errors`, `artifacts` (schemas), `files` (atomic writes),
                  `locks`, `instants` (timestamps)
    working set   `tokens`, `eviction`, `ledger`, `patches` (what a patch makes), `ws_file`, `recovery` (what a crash
                  left behind), `ws_manager`
    memory        `memory_words`, `memory_gate` (its rules), `memory_filters` (what a search sees), `memory_store` (the
                  protocol), `memory_shelf` (what a store keeps), `memory_compared` (with what is alike), `memory_gated`
                  (a store behind the gate), `memory_in_memory`, `memory` (what a program names), `memory_sqlite`,
                  `memory_mem0`
    episode       `summary` (its words), `episode_slice` (its part of the ledger), `episode`
    resume pack   `scratch` (folders that end with the work in them), `pack_files` (names and limits), `pack_content`
                  (whether its documents belong together), `resume_pack`, `bus_ledger` (the ledger of a bus),
                  `bus_calls` (what it has of calls), `canonical` (RFC 8785), `pack_answers` (what must have been
                  answered), `pack_check` (a pack against it)
    brief         `recall` (what of memory belongs to it), `context_brief`
    together      `noted` (what a ledger says of memory and episodes), `run`, `runs` (a folder of them), `contract`
                  (the manifest's capabilities), `operations` (what each does), `settings`, `opening`
    service       `api` (HTTP, the bus, the page), `serving`
    commands      `demo`, `commands`, `cli`
"""

__version__ = "2.1.0"
