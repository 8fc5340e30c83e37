"""What the ledger promises, held against system calls that fail, kill -9, full and read-only disks, and damaged files.

    python -m tests.faults --seed 7          a sample of each, some seconds
    python -m tests.faults --all             everything, some minutes

After each fault the ledger is opened again, and four facts are held: no line that a client was answered for is
missing, none is double, the chain with its tree verifies, and no note that a client was answered with is contradicted:
the log has the tree that it names, and the key goes on signing. A writer that is not killed never hangs: it answers
with `LedgerError` or goes on. Reading order:

    children    a forked process: what it says, and a bounded wait for its end
    scenario    what writers do, and say
    facts       whether what they said holds in the file
    syscalls    each system call of a writer on the ledger's files, made to fail or to be the last (strace)
    pairs       system calls of one process made to fail while another writes or signs the same ledger
    kills       two writers under load on one ledger and one that signs, killed at random moments, many times
    disks       a full file system and read-only ones, in a mount namespace of their own
    damage      a log truncated at every byte of its end, and with every bit of it flipped
"""
