import os
import sys

import __main__

FILE, ARGV, PATH = __main__.__file__, sys.argv, sys.path[0]
NAME = os.path.basename(FILE)
