import atexit
import os

atexit.register(lambda: print("at exit", "child" if pid == 0 else "parent"))
pid = os.fork()
if pid:
    print("status", os.waitpid(pid, 0)[1], os.getpid() != pid)
else:
    print("child")
