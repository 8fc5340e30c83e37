import typing


class Loud:
    def __del__(self):
        print("finalized")


Louds = typing.List[Loud]
loud = Loud()
Loud.one = Loud()
