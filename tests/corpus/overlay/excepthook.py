import sys


def hook(kind, error, trace):
    print("hook", kind.__name__, error, trace.tb_frame.f_code.co_name, trace.tb_next, sys.last_value is error)


sys.excepthook = hook
print(sys.__excepthook__)
raise KeyError("x")
