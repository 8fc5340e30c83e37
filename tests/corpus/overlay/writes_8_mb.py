import sys

for number in range(8192):
    sys.stdout.write(f"{number:1023}\n")
