import select
import sys

print(select.select([sys.stdin], [], [])[0] == [sys.stdin], sys.stdin.readline())
