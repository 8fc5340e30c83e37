import io
import own.loud


class Loud:
    __del__ = print


a = own.loud.Loud("a")
b = own.loud.Loud("b")
a.b = b
c = io.TextIOWrapper(io.FileIO("/dev/stdout", "w"))
c.write("left open\n")
