import os
import sys
import tempfile

folder = tempfile.TemporaryDirectory()
left = open("/dev/stdout", "w")
left.write("left open\n")
raw = open("/dev/stdout", "wb")
raw.write(b"left open, binary\n")
sys.stdout.write("stdout\n")
held = [open(os.path.join(folder.name, "x"), "w")]
