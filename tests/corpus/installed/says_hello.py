import sys

print("hello from an import")
print("and to the log", file=sys.stderr)
