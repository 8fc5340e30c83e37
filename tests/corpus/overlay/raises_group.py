import sys

print("unflushed", end="")
sys.stdout.write(" text")
raise SystemError({"code": 1}, sys.argv)
