class Own(KeyboardInterrupt):
    pass


import sys

raise Own("x") if len(sys.argv) > 1 else KeyboardInterrupt
