import argparse
import sys

print(argparse.ArgumentParser(prog="x").format_usage(), sys.modules["gettext"].__file__)
