import subprocess
import sys

print(subprocess.run(["sh", "-c", "echo out; echo err >&2; exit 3"], capture_output=True))
print(subprocess.run(["cat"], stdout=subprocess.PIPE).stdout)
script = "import signal; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGPIPE))"
subprocess.run([sys.executable, "-c", script], check=True)
subprocess.run(["sh", "-c", "kill -9 $$"])
