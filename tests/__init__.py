"""The tests, and what they share."""

import sys

from runners import descendants

sys.modules["descendants"] = descendants  # the files of a helper find each other by their bare names
