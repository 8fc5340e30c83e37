import os
import sys

for _ in range(2):
    try:
        print(len(sys.stdin.read()), sys.stdin.tell(), sys.stdin.seek(0))
    except OSError as error:
        print(type(error).__name__, error)
print(os.fstat(0).st_size)
