import atexit


class Loud:
    def __del__(self):
        print("finalized")


def fail():
    raise ValueError("in an exit function")


loud = Loud()
atexit.register(print, "first registered")
atexit.register(fail)
atexit.register(lambda: atexit.register(print, "registered at exit"))
print("end of the script")
