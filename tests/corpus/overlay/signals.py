import os
import signal

print([(number.name, signal.getsignal(number)) for number in sorted(signal.valid_signals()) if hasattr(number, "name")])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.set_wakeup_fd(-1))


def handler(number, frame):
    print(signal.Signals(number).name, frame.f_code.co_name, frame.f_back)


signal.signal(signal.SIGTERM, handler)
signal.signal(signal.SIGALRM, handler)
os.kill(os.getpid(), signal.SIGTERM)
signal.setitimer(signal.ITIMER_REAL, 0.001)
signal.pause()
os.kill(os.getpid(), signal.SIGHUP)
signal.pause()
