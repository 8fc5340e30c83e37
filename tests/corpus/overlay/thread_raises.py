import sys
import threading


def work():
    raise ValueError("in a thread")


threading.excepthook = lambda args: print(args.exc_type.__name__, args.exc_value)
threading.Thread(target=work).start()
threading.Thread(target=sys.exit, args=(5,)).start()
