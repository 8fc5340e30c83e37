import subprocess

SAID = subprocess.run(["echo", "from a child"], stdout=subprocess.PIPE).stdout
