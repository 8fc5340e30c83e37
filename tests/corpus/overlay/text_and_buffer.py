import sys

first = sys.stdin.readline()
rest = sys.stdin.buffer.read()
print("text", len(first), end=" ")
sys.stdout.flush()
sys.stdout.buffer.write(b"bytes %d\n" % len(rest))
print("caf\u00e9 \U0001f980")
print("to the log", file=sys.stderr)
