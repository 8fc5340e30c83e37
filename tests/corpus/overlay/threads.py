import threading

gate = threading.Event()


def work(name):
    gate.wait()
    print(name, threading.current_thread().name, threading.current_thread().daemon)


print(threading.main_thread().name, threading.current_thread() is threading.main_thread())
print(threading.main_thread().native_id == __import__("os").getpid(), threading.active_count())
thread = threading.Thread(target=work, args=("joined at the end",))
thread.start()
gate.set()
