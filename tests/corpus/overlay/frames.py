import inspect
import logging
import sys
import traceback


def deep():
    print([frame.function for frame in inspect.stack()], inspect.stack()[-1].filename)
    traceback.print_stack()
    logging.warning("where", stack_info=True)


print(sys._getframe().f_back, sys.exc_info(), getattr(sys, "last_value", None), sys.gettrace(), sys.excepthook)
deep()
