import sys

from . import helper

print(__name__, __package__, __spec__.name, sys.argv, sys.path[0], helper.VALUE)
