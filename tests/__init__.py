"""The tests, and what they share."""

import sys

from runners import channel, descendants, execution, scratch, watching

for module in (
    channel,
    descendants,
    execution,
    scratch,
    watching,
):  # the files of a helper find each other by their bare names
    sys.modules[module.__name__.rpartition(".")[2]] = module
