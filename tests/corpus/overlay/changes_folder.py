import atexit
import os

atexit.register(lambda: print(os.getcwd()))
os.chdir("/")
