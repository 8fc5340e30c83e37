import queue
import threading

asked, answered = queue.Queue(), queue.Queue()


def work():
    while True:
        answered.put(asked.get() * 2)


threading.Thread(target=work, daemon=True).start()
