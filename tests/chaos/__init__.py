"""Hostile programs, impatient clients and kill -9 at random moments; then a look whether anything was left or lost.

    python -m tests.chaos --rounds 200 --seed 7

Each round starts `aal serve` in a folder that stays, lets many clients call overlays that do their worst, strikes, and
looks: is every process gone, every descriptor closed, every answer in the ledger, the ledger whole after the next
start. Reading order:

    plans       what a round does, drawn from one `random.Random(seed)`
    overlays    the hostile overlays; programs/ has what they run
    place       the working folder, with its small disks
    server      `aal serve` as a process, and how it is struck
    processes   what runs, what is held open, what was left behind: read from /proc
    clients     who calls, and what became of each call
    verdicts    whether that is what the bus promises
    game        the rounds
"""
