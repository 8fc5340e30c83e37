import os
import subprocess
import sys

print(os.environ.get("CORPUS_WORD"), os.environ["LANG"])
sys.stdout.flush()
subprocess.run(["sh", "-c", "echo $CORPUS_WORD $LANG"])
