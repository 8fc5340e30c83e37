import sys

print("before")
sys.exit(eval(sys.argv[1]))
