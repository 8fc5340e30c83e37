import os
import sys

reading, writing = os.pipe()
os.close(reading)
try:
    os.write(writing, b"x")
except BrokenPipeError as error:
    print(error)
sys.stdout.close()
os.write(writing, b"x")
