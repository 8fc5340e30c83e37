import changes_world
import os
import reads_environment
import signal

print(reads_environment.WORD, oct(os.umask(0)), signal.getsignal(signal.SIGUSR1), changes_world.__name__)
