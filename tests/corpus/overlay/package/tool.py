"""A module that is run by its name."""

import sys

from package.helper import VALUE

print(list(globals()), __file__, type(__loader__), sys.argv, VALUE)
if "interrupt" in sys.argv:
    raise KeyboardInterrupt
if "raise" in sys.argv:
    raise ValueError("in a module")
