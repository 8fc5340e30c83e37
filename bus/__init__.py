"""AAL-Core: an overlay bus.

A folder with a manifest becomes callable; every call is authorized by phase, admitted by memory, run by a runner and
written to a hash-chained ledger. Read `dispatch` first: `Bus.invoke` is the story. Then, in the order of a call:

    protocol, guard     who may speak to the bus, from where, and how slowly; with callers and tokens
    app, local          how a call comes in: HTTP, or Python without an event loop; app_ledger is what HTTP reads of the
                        ledger, web what all endpoints share; openapi describes them, and events are what HTTP tells
                        while they happen
    envelopes, course   what is said (request, overlay's request, reply), and what is known of one call so far
    overlays            which overlays there are, now; with codehash, overlay_entry, overlay_files; overlay_programs and
                        overlay_packages are what an overlay needs and what it brings along
    manifests           one manifest.json, whatever its shape, as a Manifest; manifest_form says what is wrong with it
    policy              phases times permissions -> rights
    targets             where its calls go, and with what environment; with secrets and redaction
    scheduler           admission behind an event loop: slots, claims of memory, queue, eviction; with runes (how it is
                        declared), profiles (what has a name there), needs (what was measured) and profiling (the rune
                        that fits it), balance (what is done where memory is short), degradation (what a call is told
                        then), purges (what lets go of its caches, and when), and stress (the signal), which is made of
                        memory (what the kernel tells) and stress_sources (what plug-ins say)
    runners/            a process or an HTTP service: job in, outcome out
    ledger, provenance  writing and reading the ledger; chain is the file that is written, in groups of lines, segments
                        are all its files, members what the compressed ones are made of, upkeep compresses them, index
                        is what finds lines and index_view reads it, from a file as index_file opens it; filesync makes
                        the file last, and unsynced is what could not be made last; tails is how far it is sound after a
                        power loss, and losses are what is said of what is gone; records says what a line is, canonical
                        its JSON; merkle is the tree over its lines, recent its latest roots, checkpoints what it says
                        of that now and then, in notes that the notary signs with the ledger_key, of one history only:
                        signed is what it has; proofs come from it, and verification holds all against all; starts
                        writes down what may be cut off
    replay              a line run again through the same Bus, and the verdict; drift is what differs, and its cause;
                        gate tries another version of an overlay with many lines, apart from the live bus

Around it: plugins and hookspecs (the plugin API), metrics (a plugin); events (what is told to who listens); settings,
errors, schemas, model, resources, private_file (what only the operator may read), own_files (what lies where others
may write); and the command line: cli, cli_overlays, cli_profile, cli_runes, cli_ledger, cli_proofs, cli_replay,
cli_callers, cli_stress (with stress_watch and plot), console, serve (serving says where it is, server_lock that it is
the only one), remote (what a server is asked), doctor, templates.
"""

from bus.hookspecs import hookimpl

__all__ = ["hookimpl"]
