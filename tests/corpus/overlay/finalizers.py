import builtins
import gc
import sys
import typing
import weakref


class Loud:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        print("finalized", self.name, Loud is None, sys is None, sys and sys.meta_path is None)


class Holder:
    held = Loud("by a class")


def default(value=Loud("by a default")):
    return value


def generator():
    try:
        yield Loud("by a generator")
    finally:
        print("generator closed")


_private = Loud("private")
plain = Loud("plain")
cycle = Loud("cycle")
cycle.itself = cycle
garbage = Loud("garbage")
garbage.itself = garbage
del garbage
running = generator()
next(running)
builtins.left = Loud("by builtins")

finalizer = weakref.finalize(plain, print, "finalize")
print(gc.isenabled(), gc.get_threshold())
