class Loud:
    def __del__(self):
        raise ValueError("in a finalizer")


loud = Loud()
