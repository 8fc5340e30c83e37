"""Hostile input: whatever comes to one of the bus's readers, it answers as it says it does.

    python -m tests.fuzz [--cases 50000] [--only NAME,...] [--seed N]

Each `Target` is one reader with the cases for it and a check. A check gives a short name for what came out, and raises
where that may not come out. What is counted is therefore also how far the cases reach: a reader that only ever refuses
has not been tested, so a target names what must have come out at least once.

    campaign    targets, and running many cases of one
    samples     JSON values, sound documents, and the ways to damage them
    readers     manifests, runes, requests, replies, settings, tokens: text in, a value or one kind of error out
    frames      what a helper says to the bus, byte by byte; fuzz_frames is the same under atheris, guided by coverage
    launching   what the bus says to a real helper
    doors       HTTP: the operations of GET /openapi.json by schemathesis, and damaged requests on the socket
"""
