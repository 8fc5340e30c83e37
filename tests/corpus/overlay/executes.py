import os
import sys

print("before")
sys.stdout.flush()
os.environ["MORE"] = "more"
os.execvp("sh", ["sh", "-c", "echo $MORE; exec cat"])
