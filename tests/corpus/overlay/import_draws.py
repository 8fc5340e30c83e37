import draws
import sys

print(draws.fixed.random())
if len(sys.argv) > 1:
    print(draws.source.random())
