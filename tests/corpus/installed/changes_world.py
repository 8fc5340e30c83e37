import os
import signal

os.environ["CORPUS_WORD"] = "changed by an import"
os.umask(0o027)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
