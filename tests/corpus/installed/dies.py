import os

os._exit(8)
