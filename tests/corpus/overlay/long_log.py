import sys

for number in range(20_000):
    print("line", number, file=sys.stderr)
print(sys.stdin.read() and "read")
