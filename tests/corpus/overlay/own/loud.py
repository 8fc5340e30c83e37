class Loud:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        print("finalized", self.name)


of_a_module = Loud("of a module")
