import ctypes

ctypes.CDLL(None).printf(b"by printf\n")
print("by print")
