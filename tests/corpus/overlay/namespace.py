"""Says what a script finds in its namespace."""

import sys

print(list(globals()))
print(__name__, __file__, __doc__, __package__, __spec__, globals().get("__cached__", "-"), __builtins__)
print(type(__loader__), __loader__.name, __loader__.path, globals().get("__annotations__", "-"))
print(sys.modules["__main__"].__dict__ is globals(), sys.modules["__main__"])
